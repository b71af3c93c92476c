"""Peak memory and time of token log-probabilities with their gradients: in chunks, against the float32 log-softmax of all logits at once.

    python benchmarks/log_prob_memory.py                       8 texts of 1024 tokens, 128,000 tokens in the vocabulary; writes benchmarks/log_prob_memory.md
    python benchmarks/log_prob_memory.py --batch 1             smaller, where memory is short; writes nothing without --out

Hidden states and the head's weight are given; both get gradients. Each way runs in a process of its own: on a CPU the peak is the largest resident size over
that before the work, on a GPU what torch allocated at most over what it held before.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from torch import Tensor
from torch.nn.functional import linear

from flowrl.policies.token_statistics import positions_at_once, token_statistics
from flowrl.versions import cpu_name

ROOT = Path(__file__).parent.parent
WAYS = {
    "naive": "log-softmax of all logits in float32",
    "chunked": "`token_statistics`",
    "chunked+entropy": "`token_statistics` with the entropy",
}
COPIES = 3.5
"""Of all logits that the naive way holds at its peak, and something to spare."""


def log_probs(way: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """Columns [N], the first of them the log-probabilities."""
    if way == "naive":
        return [linear(hidden, weight).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]]
    columns = ["entropy"] if way == "chunked+entropy" else []
    return list(token_statistics(lambda part: linear(part, weight), hidden, targets, columns=columns, at_once=positions_at_once(len(weight))).values())


def measure(way: str, positions: int, vocabulary: int, width: int, device: str) -> dict[str, float]:
    """Peak bytes and seconds of one forward and backward pass, and a checksum of the gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, width, generator=generator).mul_(0.3).to(device).requires_grad_() for n in (positions, vocabulary))
    targets = torch.randint(vocabulary, (positions,), generator=generator).to(device)
    before = peak(device)
    clock = time.perf_counter if device == "cuda" else time.process_time  # whatever else the machine does
    start = clock()
    torch.stack([values.sum() for values in log_probs(way, hidden, weight, targets)]).sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - start
    assert hidden.grad is not None
    return {"bytes": peak(device) - before, "seconds": seconds, "checksum": float(hidden.grad.double().abs().sum())}


def peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def name_of(device: str) -> str:
    kind = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} thread(s)"
    return f"{kind}; torch {torch.__version__}"


def table(found: dict[str, dict[str, float]], positions: int, vocabulary: int, width: int, where: str) -> str:
    lines = [
        "# Memory of token log-probabilities",
        "",
        f"{where}.",
        "",
        f"{positions} positions, a vocabulary of {vocabulary:,}, hidden size {width}; forward and backward in float32, with gradients of hidden states and",
        f"head; one pass, each way in a process of its own. All logits at once are {positions * vocabulary * 4 / 1e9:.2f} GB. Seconds are the processor's.",
        "",
        "| way | peak, GB | share of naive | seconds | naive's time over it |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    first = found["naive"]
    for way, values in found.items():
        share, speed = values["bytes"] / first["bytes"], first["seconds"] / values["seconds"]
        lines.append(f"| {WAYS[way]} | {values['bytes'] / 1e9:.2f} | {share:.1%} | {values['seconds']:.1f} | {speed:.2f} |")
    return "\n".join(lines) + "\n"


def main(
    batch: int = 8,
    length: int = 1024,
    vocabulary: int = 128_000,
    width: int = 64,
    device: str = "cpu",
    out: Annotated[Path | None, typer.Option(help="null = benchmarks/log_prob_memory.md at full size on a CPU")] = None,
    way: Annotated[str, typer.Option(help="run one way in this process and print its numbers")] = "",
) -> None:
    positions = batch * length
    if way:
        print(json.dumps(measure(way, positions, vocabulary, width, device)))
        return
    needed, free = int(COPIES * positions * vocabulary * 4), psutil.virtual_memory().available
    if device == "cpu" and needed > free:
        raise typer.BadParameter(f"the naive way needs {needed / 1e9:.0f} GB, and {free / 1e9:.0f} are free; use a smaller --batch")
    found: dict[str, Any] = {}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}  # else glibc keeps freed tensors of up to 32 MB
    for name in WAYS:
        command = [sys.executable, __file__, "--way", name, "--batch", str(batch), "--length", str(length), "--vocabulary", str(vocabulary)]
        done = subprocess.run([*command, "--width", str(width), "--device", device], check=True, capture_output=True, text=True, env=environment)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, found[name], flush=True)
    ours = [values["checksum"] for values in found.values()][:2]
    if abs(ours[0] - ours[1]) > 1e-4 * ours[0]:
        raise SystemExit(f"the gradients differ: {ours}")
    text = table(found, positions, vocabulary, width, name_of(device))
    print(text)
    full = (batch, length, vocabulary, device) == (8, 1024, 128_000, "cpu")
    if out is not None or full:
        (out or ROOT / "benchmarks" / "log_prob_memory.md").write_text(text)


if __name__ == "__main__":
    typer.run(main)
