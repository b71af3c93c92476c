"""Rewards behind HTTP: does anything get lost under load, what does the journey cost, and what do broken requests do?

    python benchmarks/remote_rewards.py --out benchmarks/remote_rewards.md

Load: clients in threads of this process send numbered pictures to a server in another, whose reward reads the number of each picture back.
Cost: one and the same batch in-process and through the server, in turn, A B A B ..., and the median of the ratios, so that a machine whose speed drifts does
not matter. Broken requests: each is made from a seed, with what must come back: the right scores, or an error with a name.
"""

from __future__ import annotations

import base64
import collections
import io
import json
import os
import pickle
import random
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from flowrl.types import Prompt, RewardInfo, SampleBatch, Scores
from flowrl.versions import versions
from rewards.composite import WeightedRewards
from rewards.registry import load_reward
from rewards.remote import RemoteReward
from rewards.wire import BATCH_TYPE, JSON_TYPE, encode_request

_SERVE = """
import json, sys, torch
from flowrl.serving import serve_reward
torch.set_num_threads(1)
serve_reward(sys.argv[1], {}, **json.loads(sys.argv[2]))
"""


class IdReward:
    """Reads the number that `numbered` wrote into a picture's first pixel."""

    def __init__(self) -> None:
        self.info = RewardInfo("id", "the number in the first pixel", 0.0, 2.0**24, reads=("images",))

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing to load."""

    def score(self, batch: SampleBatch) -> Scores:
        """Numbers below 2^24, exact in float32."""
        assert batch.images is not None
        numbers = ((batch.images[:, :, 0, 0] * 255).round() * torch.tensor([65536.0, 256.0, 1.0])).sum(1)
        return Scores(numbers, torch.ones(len(batch), dtype=torch.bool))


def numbered(numbers: Sequence[int], size: int) -> SampleBatch:
    """Pictures [B, 3, size, size] of noise on the 8-bit grid, with a number below 2^24 in the first pixel of each."""
    generator = torch.Generator().manual_seed(len(numbers))
    levels = torch.randint(0, 256, (len(numbers), 3, size, size), generator=generator, dtype=torch.uint8)
    levels[:, :, 0, 0] = torch.tensor([[number >> 16, number >> 8 & 255, number & 255] for number in numbers], dtype=torch.uint8)
    return SampleBatch([Prompt(str(number)) for number in numbers], levels.float() / 255)


@contextmanager
def served(name: str, **options: Any) -> Iterator[str]:
    """A server of a reward in a process of its own, with one thread; its address. It must end with 0."""
    settings = {"host": "127.0.0.1", "port": 0, "device": "cpu", "dtype": None, "token_env": None} | {
        "max_batch": 64,
        "max_wait_ms": 0,
        "max_body_mib": 256,
        "max_queue": 64,
        **options,
    }
    command = [sys.executable, "-c", _SERVE, name, json.dumps(settings)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().rpartition(" at ")[2].strip()
    finally:
        process.terminate()
        code = process.wait(60)
    assert code == 0, f"the server ended with {code}"


# load


@dataclass(frozen=True)
class Load:
    """What came of many clients at once; seconds of every request."""

    size: int
    seconds: list[float]
    wall: float
    images: int
    wrong: int

    def row(self, clients: int, requests: int) -> list[str]:
        cuts = statistics.quantiles(self.seconds, n=100)
        numbers = [
            f"{1000 * cuts[49]:.1f}",
            f"{1000 * cuts[98]:.1f}",
            f"{self.images / self.wall:.0f}",
            f"{self.images / self.wall * 3 * self.size**2 / 1e6:.0f}",
        ]
        return [f"{self.size} x {self.size}", f"{clients} x {requests} x {self.images // (clients * requests)}", *numbers, f"{self.wrong}"]


def load_test(url: str, size: int, clients: int, requests: int, images: int) -> Load:
    """Every client sends its requests one after another, each with pictures whose numbers nobody else uses."""
    seconds: list[float] = []
    wrong: list[str] = []
    patterns = numbered([0] * images, size)
    assert patterns.images is not None

    def client(number: int) -> None:
        reward = RemoteReward(url, samples_per_request=images, concurrency=1, expect="id")
        reward.load(torch.device("cpu"), torch.float32)
        for request in range(requests):
            first = (number * requests + request) * images
            pictures = patterns.images.clone() if patterns.images is not None else torch.empty(0)
            pictures[:, :, 0, 0] = _digits(range(first, first + images))
            start = time.perf_counter()
            scores = reward.score(SampleBatch(patterns.prompts, pictures))
            seconds.append(time.perf_counter() - start)
            if scores.values.tolist() != [float(k) for k in range(first, first + images)]:
                wrong.append(f"client {number}, request {request}: {scores.values.tolist()}")
        reward.close()

    threads = [threading.Thread(target=client, args=(k,)) for k in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - start
    total = clients * requests * images
    page = httpx.get(f"{url}/metrics").text
    counted = sum(float(line.split()[1]) for line in page.splitlines() if line.startswith("flowrl_reward_samples_total{"))
    if counted != total or len(seconds) != clients * requests:
        wrong.append(f"{counted} samples were scored in {len(seconds)} answers, {total} were sent")
    return Load(size, seconds, wall, total, len(wrong))


def _digits(numbers: Sequence[int]) -> Tensor:
    return torch.tensor([[number >> 16, number >> 8 & 255, number & 255] for number in numbers]).float() / 255


# cost


@dataclass(frozen=True)
class Cost:
    """Seconds of one batch here and there, round by round."""

    name: str
    size: int
    samples_per_request: int
    here: list[float]
    there: list[float]

    @property
    def ratios(self) -> list[float]:
        return [b / a for a, b in zip(self.here, self.there, strict=True)]

    def row(self) -> list[str]:
        times = [f"{1000 * statistics.median(seconds):.1f}" for seconds in (self.here, self.there)]
        ratios = [f"{ratio:.3f}" for ratio in (statistics.median(self.ratios), min(self.ratios), max(self.ratios))]
        return [self.name, f"{self.size} x {self.size}", f"{self.samples_per_request}", *times, *ratios]


def cost(name: str, size: int, samples_per_request: int, rounds: int, batch_size: int = 64) -> Cost:
    """The same batch in-process and remote, in turn; the scores must agree to the bit."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch_size, 3, max(4, size // 8), max(4, size // 8), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    batch = SampleBatch([Prompt("a red circle above a blue square")] * batch_size, (smooth * 255).round() / 255)
    cpu, seconds = torch.device("cpu"), ([], [])  # type: tuple[torch.device, tuple[list[float], list[float]]]
    with served(name) as url:
        sides = [WeightedRewards([("x", 1.0, reward)]) for reward in (load_reward(name, {}), RemoteReward(url, samples_per_request=samples_per_request))]
        for side in sides:
            side.load(cpu, torch.float32)
        for _ in range(rounds + 2):
            values = []
            for side, taken in zip(sides, seconds, strict=True):
                start = time.perf_counter()
                values.append(side.score(batch)["x"].values)
                taken.append(time.perf_counter() - start)
            assert torch.equal(values[0].view(torch.int32), values[1].view(torch.int32)), "the remote scores differ"
        for side in sides:
            side.close()
    return Cost(name, size, samples_per_request, seconds[0][2:], seconds[1][2:])


# broken requests


@dataclass(frozen=True)
class Fuzz:
    """A request and what must come of it: ``values`` if it is answered, and whether it must be answered (True), refused (False), or may be either (None)."""

    kind: str
    content_type: str
    body: bytes
    values: list[float]
    answered: bool | None


def fuzz(seed: int) -> Fuzz:
    """A request made from a seed."""
    rng = random.Random(seed)
    numbers = [rng.randrange(2**24) for _ in range(rng.randint(1, 5))]
    batch = numbered(numbers, rng.choice([1, 3, 8]))
    values = [float(number) for number in numbers]
    body = bytearray(encode_request(batch, f"{seed}"))
    start = 12 + struct.unpack_from("<I", body, 8)[0]
    kind = rng.choice(["whole", "pixels", "header", "prefix", "truncated", "extended", "noise", "pickle", "type", "png", "broken png", "json", "lying json"])
    if kind == "pixels":
        for _ in range(rng.randint(1, 20)):
            body[rng.randrange(start, len(body))] = rng.randrange(256)
        levels = np.frombuffer(body, np.uint8, offset=start).reshape(len(numbers), 3, -1)[:, :, 0].astype(float)
        return Fuzz(kind, BATCH_TYPE, bytes(body), (levels @ [65536, 256, 1]).tolist(), True)
    if kind in ("header", "prefix"):
        span = (12, start) if kind == "header" else (0, 12)
        for _ in range(rng.randint(1, 4)):
            body[rng.randrange(*span)] = rng.randrange(256)
        return Fuzz(kind, BATCH_TYPE, bytes(body), values, None)  # a changed letter of a prompt changes no picture
    if kind == "truncated":
        return Fuzz(kind, BATCH_TYPE, bytes(body[: rng.randrange(len(body))]), values, False)
    if kind == "extended":
        return Fuzz(kind, BATCH_TYPE, bytes(body) + rng.randbytes(rng.randint(1, 40)), values, False)
    if kind == "noise":
        return Fuzz(kind, rng.choice([BATCH_TYPE, JSON_TYPE]), rng.randbytes(rng.randrange(400)), values, False)
    if kind == "pickle":
        return Fuzz(kind, rng.choice([BATCH_TYPE, JSON_TYPE, "application/octet-stream"]), pickle.dumps({"numbers": numbers}), values, False)
    if kind == "type":
        return Fuzz(kind, rng.choice(["", "text/plain", "image/png", "application/x-www-form-urlencoded"]), bytes(body), values, False)
    if kind in ("png", "broken png", "json", "lying json"):
        return _json_fuzz(rng, kind, batch, values)
    return Fuzz(kind, BATCH_TYPE, bytes(body), values, True)


def _json_fuzz(rng: random.Random, kind: str, batch: SampleBatch, values: list[float]) -> Fuzz:
    assert batch.images is not None
    files = []
    for picture in (batch.images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, *rng.choice([("PNG",), ("WEBP",)]), lossless=True)
        files.append(bytearray(file.getvalue()))
    answered: bool | None = True
    if kind == "broken png":
        broken = rng.randrange(len(files))
        del files[broken][rng.randrange(1, len(files[broken]) // 2) :]
        answered = False
    message: dict[str, Any] = {"api": 1, "prompts": [prompt.text for prompt in batch.prompts], "images": [base64.b64encode(file).decode() for file in files]}
    if kind == "lying json":
        key = rng.choice(["api", "prompts", "images", "texts", "group", "request_id", "surprise"])
        message[key] = rng.choice([-1, 1.5, {}, [[]], "x", {"a": [{}]}, [1, 2, 3, 4, 5, 6, 7], True])
        answered = None if key == "request_id" else False
    text = json.dumps(message)
    if kind == "json":
        place = rng.randrange(len(text))
        text, answered = rng.choice([(text[:place], False), (text + "]", False), (text[:1] + '"x": NaN, ' + text[1:], False), ("[" * 5000, False)])
    return Fuzz(kind, JSON_TYPE, text.encode(), values, answered)


def run_fuzz(client: httpx.Client, seeds: range) -> tuple[collections.Counter[str], list[str]]:
    """Answers by kind of request and of answer, and what was wrong: a score, a crash, an error without a name."""
    counts: collections.Counter[str] = collections.Counter()
    mistakes = []
    for seed in seeds:
        case = fuzz(seed)
        reply = client.post("/v1/score", content=case.body, headers={"Content-Type": case.content_type})
        answer = reply.json()
        counts[f"{case.kind}: {answer.get('error', 'scored')}"] += 1
        if reply.status_code == 200:
            good = case.answered is not False and answer["values"] == case.values and all(answer["valid"])
        else:
            good = case.answered is not True and reply.status_code in (400, 413, 415) and bool(answer["error"]) and bool(answer["message"])
        if not good:
            mistakes.append(f"seed {seed}, {case.kind}: {reply.status_code} {reply.text[:200]}")
    return counts, mistakes


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def main(
    out: Annotated[Path, typer.Option(help="the table to write")] = Path("benchmarks/remote_rewards.md"),
    clients: Annotated[int, typer.Option(help="at once")] = 8,
    requests: Annotated[int, typer.Option(help="of each client")] = 200,
    images: Annotated[int, typer.Option(help="in a request")] = 16,
    rounds: Annotated[int, typer.Option(help="timed rounds of in-process, remote")] = 15,
    broken: Annotated[int, typer.Option(help="fuzzed requests")] = 10_000,
) -> None:
    """Measure, print and write the tables."""
    torch.set_num_threads(1)
    about = versions(torch.device("cpu"))
    before = os.getloadavg()[0]  # what else ran: a core that is not free cannot overlap anything
    packages = ", ".join(f"{name} {about[name]}" for name in ("python", "torch"))
    lines = ["# Remote rewards", "", *(__doc__ or "").split("\n\n", 2)[2].strip().splitlines(), ""]
    machine = f"{about['cpu']}, {os.cpu_count()} cores, load average {before:.1f} at the start, one thread of torch in each process"
    lines += [f"{machine}; {packages}, httpx {httpx.__version__}; commit {about['commit']}.", ""]

    here = f"{Path(__file__)}:IdReward"
    rows = []
    for size in (32, 512):
        with served(here) as url:
            rows.append(load_test(url, size, clients, requests, images).row(clients, requests))
        print(rows[-1])
    head = ["pictures", "clients x requests x images", "p50 ms", "p99 ms", "images/s", "MB/s", "requests lost, doubled, reordered or wrong"]
    lines += ["## Load", "", "The reward reads a number and costs nothing: this is the way there and back.", "", *table(head, rows), ""]

    rows = []
    for name, size, samples in (("scene", 32, 64), ("jpeg_compressibility", 512, 8), ("jpeg_compressibility", 512, 64), ("jpeg_compressibility", 32, 64)):
        rows.append(cost(name, size, samples, rounds).row())
        print(rows[-1])
    head = ["reward", "pictures", "samples_per_request", "in-process ms", "remote ms", "ratio, median", "min", "max"]
    lines += [
        "## Cost at batch 64",
        "",
        "Scores agree to the bit. `samples_per_request` below 64 lets coding, sending and scoring overlap; by default it is 64 "
        "for 32 x 32 and 8 for 512 x 512.",
        "",
        *table(head, rows),
        "",
    ]

    with served(here) as url, httpx.Client(base_url=url) as client:
        counts, mistakes = run_fuzz(client, range(broken))
        alive = client.get("/v1/health").json()["status"]
    print(counts, mistakes[:5])
    rows = [[*key.split(": "), str(count)] for key, count in sorted(counts.items())]
    verdict = f"{broken} requests: {len(mistakes)} wrong scores, crashes or errors without a name; the server afterwards: {alive}."
    lines += ["## Broken requests", "", verdict, "", *table(["request", "answer", "count"], rows)]
    out.write_text("\n".join(lines) + "\n")
    if mistakes:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
