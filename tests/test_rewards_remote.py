"""rewards/remote.py: the same bits as in-process, order, groups, the cache, and endpoints that hang, die, lie or change."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from reward_models import assert_reward_contract
from reward_servers import Watched, bench, eventually, running, serving
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flowrl.types import Prompt, Reward, SampleBatch, Scores, UserError
from rewards.composite import WeightedRewards
from rewards.ink import InkReward
from rewards.jpeg import jpeg_compressibility
from rewards.remote import RemoteReward
from rewards.scene import SceneReward

CPU = torch.device("cpu")


def loaded(*args: Any, **options: Any) -> RemoteReward:
    reward = RemoteReward(*args, **options)
    reward.load(CPU, torch.float32)
    return reward


def pictures(num: int, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num)
    coarse = torch.rand(num, 3, 4, 4, generator=generator)
    return (torch.nn.functional.interpolate(coarse, size=(size, size)).clamp(0, 1) * 255).round() / 255


def same(a: Scores, b: Scores) -> None:
    """Equal to the bit."""
    assert torch.equal(a.values.view(torch.int32), b.values.view(torch.int32))
    assert torch.equal(a.valid, b.valid)
    assert a.raw.keys() == b.raw.keys()
    for name, column in a.raw.items():
        assert torch.equal(column.float().nan_to_num(7), b.raw[name].nan_to_num(7)), name
    assert a.problems == b.problems


@contextmanager
def answering(info: Any, score: Any = None) -> Iterator[str]:
    """A server that is none of ours: what it says to /v1/info, and to /v1/score as a function of the request id."""

    async def about(request: Request) -> Response:
        return info if isinstance(info, Response) else JSONResponse(info)

    async def scored(request: Request) -> Response:
        body = await request.body()
        request_id = json.loads(body[12 : 12 + int.from_bytes(body[8:12], "little")])["request_id"]
        answer = score(request_id)
        return answer if isinstance(answer, Response) else JSONResponse(answer)

    with running(FastAPI(routes=[Route("/v1/info", about), Route("/v1/score", scored, methods=["POST"])])) as url:
        yield url


def facts(name: str = "fake", version: str = "1", **more: Any) -> dict[str, Any]:
    return {"reward": name, "version": version, "info": {"name": name, "low": 0.0, "high": 1.0}, **more}


# the same as in-process


@pytest.mark.parametrize(
    ("make", "prompts", "samples"),
    [
        (SceneReward, ["a red circle above a blue square", "two green circles"], 64),
        (jpeg_compressibility, ["x", "y"], 5),
        (InkReward, ["a red circle", "two green circles"], 5),
    ],
    ids=["scene", "jpeg", "ink"],
)
def test_remote_scores_are_those_of_the_process_itself_to_the_bit(make: Any, prompts: list[str], samples: int, one_thread: None) -> None:
    images = pictures(22)
    images[3, 0, 0, 0] = torch.nan  # one sample that is not valid, and for all of its request pixels in float32
    batch = SampleBatch([Prompt(prompts[i % 2], {"i": i}) for i in range(22)], images, None, torch.arange(22) // 4)
    with serving(make()) as url:
        remote = loaded(url, samples_per_request=samples)
        here, there = (WeightedRewards([("x", 1.0, reward)]) for reward in (make(), remote))
        for side in (here, there):
            side.load(CPU, torch.float32)
        expected = here.score(batch)["x"]
        assert not expected.valid[3]
        same(expected, there.score(batch)["x"])
        remote.close()
    assert isinstance(remote, Reward)
    local = make().info
    assert (remote.info.name, remote.info.low, remote.info.high, remote.info.reads) == ("remote", local.low, local.high, local.reads)
    assert (remote.info.differentiable, remote.info.runs_on, remote.info.batch_size) == (False, "network", samples * 8)
    assert local.name in remote.info.description


def test_it_keeps_the_contract_of_a_reward() -> None:
    with serving(jpeg_compressibility()) as url:
        made: list[RemoteReward] = []

        def make() -> RemoteReward:
            made.append(RemoteReward(url, samples_per_request=2))
            return made[-1]

        assert_reward_contract(make, SampleBatch([Prompt(f"{i}") for i in range(5)], pictures(5)))
        for reward in made:
            reward.close()


def test_texts_are_scored_too() -> None:
    with serving(Watched()) as url:
        reward = loaded(url, samples_per_request=2)
        scores = reward.score(SampleBatch([Prompt("a")] * 3, None, ["5", "6", "905"]))
        assert scores.values[:2].tolist() == [5, 6]
        assert scores.valid.tolist() == [True, True, False]
        assert scores.problems == {2: "nothing to say"}
        reward.close()


def test_many_threads_share_a_reward_and_each_gets_its_own() -> None:
    reward = Watched()
    with serving(reward) as first, serving(Watched()) as second:
        remote = loaded(urls=[first, second], samples_per_request=3, concurrency=2)
        batches = [list(range(100 * k, 100 * k + 20)) for k in range(1, 9)]
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda numbers: remote.score(bench.numbered(numbers, 4)).values.tolist(), batches))
        remote.close()
    assert results == [[float(number) for number in numbers] for numbers in batches]
    assert 0 < len(reward.calls) < 56  # the other endpoint had its part


# groups


def group_batch(groups: Sequence[int], *, explicit: bool) -> SampleBatch:
    batch = bench.numbered(range(1, len(groups) + 1), 4)
    prompts = [Prompt(f"prompt {group}") for group in groups]
    return SampleBatch(prompts, batch.images, None, torch.tensor(groups) if explicit else None)


@pytest.mark.parametrize("explicit", [True, False])
def test_groups_are_never_cut_and_their_samples_come_back_where_they_were(explicit: bool) -> None:
    reward = Watched(scope="group")
    groups = [7, 8, 7, 9, 9, 9, 9, 8, 7, 6]  # of 3, 2, 4 and 1
    with serving(reward) as url:
        remote = loaded(url, samples_per_request=3, concurrency=1)
        assert remote.info.scope == "group"
        scores = remote.score(group_batch(groups, explicit=explicit))
        remote.close()
    assert scores.values.tolist() == [float(k) for k in range(1, 11)]
    assert [[prompt.text[7:] for prompt in batch.prompts] for batch in reward.calls] == [["7"] * 3, ["8"] * 2, ["9"] * 4, ["6"]]
    for batch in reward.calls:
        assert (batch.group is not None) == explicit


def test_a_reward_of_single_samples_is_not_told_of_groups() -> None:
    reward = Watched()
    with serving(reward) as url:
        remote = loaded(url)
        remote.score(group_batch([1, 1, 2], explicit=True))
        remote.close()
    assert reward.calls[0].group is None


# the cache


def test_what_is_known_is_not_asked_again_and_all_that_a_reward_sees_is_part_of_the_key(tmp_path: Path) -> None:
    reward = Watched()
    plain = bench.numbered([1, 2, 905], 4)
    assert plain.images is not None
    with serving(reward, version="1") as url:
        remote = loaded(url, cache=str(tmp_path))
        first = remote.score(plain)
        assert reward.sizes() == [3]
        same(remote.score(plain), first)
        assert reward.sizes() == [3, 1]  # what was not valid is tried again
        known = SampleBatch(plain.prompts[:2], plain.images[:2])
        assert remote.score(known).values.tolist() == [1, 2]
        assert reward.sizes() == [3, 1]
        changed = plain.images[:2].clone()
        changed[1, 2, 3, 3] = (changed[1, 2, 3, 3] * 255 + 1).round() % 256 / 255
        others = [
            SampleBatch(known.prompts, changed),
            SampleBatch([known.prompts[0], Prompt("another")], known.images),
            SampleBatch([known.prompts[0], Prompt("2", {"k": [1, "a"]})], known.images),
            SampleBatch([known.prompts[0], Prompt("2", {"k": [1, "b"]})], known.images),
        ]
        for other in others:
            remote.score(other)
        assert reward.sizes()[2:] == [1] * 4  # of two samples only the changed one
        remote.score(SampleBatch(known.prompts, None, ["7", "8"]))
        remote.score(SampleBatch(known.prompts, None, ["7", "9"]))
        assert reward.sizes()[6:] == [2, 1]
        remote.close()
    later = Watched()
    with serving(later, version="2") as url:
        remote = loaded(url, cache=str(tmp_path))
        assert remote.score(known).values.tolist() == [1, 2]
        assert later.sizes() == [2]
        remote.close()


def test_known_and_unknown_samples_come_back_in_order_and_damaged_entries_are_asked_again(tmp_path: Path) -> None:
    reward = Watched()
    with serving(reward) as url:
        remote = loaded(url, cache=str(tmp_path), samples_per_request=2)
        both = bench.numbered([4, 9], 4)
        remote.score(both)
        wider = bench.numbered([1, 4, 2, 9, 3], 4)
        assert wider.images is not None
        assert both.images is not None
        wider.images[1], wider.images[3] = both.images[0], both.images[1]
        assert remote.score(wider).values.tolist() == [1, 4, 2, 9, 3]
        assert sum(reward.sizes()) == 5
        for entry in tmp_path.rglob("*.json"):
            content = json.loads(entry.read_text())
            content["value"]["values"] = [1.0, 2.0]
            entry.write_text(json.dumps(content))  # its checksum no longer fits
        assert remote.score(both).values.tolist() == [4, 9]
        assert sum(reward.sizes()) == 7
        assert remote._cache is not None
        key = remote._key(bench.numbered([4], 4))
        remote._cache.put(key, {"values": [1.0, 2.0], "valid": [True, True], "raw": {}, "problems": {}})  # whole, but of other samples
        assert remote.score(bench.numbered([4], 4)).values.tolist() == [4]
        remote.close()


def test_groups_are_kept_as_groups(tmp_path: Path) -> None:
    reward = Watched(scope="group")
    with serving(reward) as url:
        remote = loaded(url, cache=str(tmp_path))
        batch = group_batch([1, 2, 1, 2], explicit=True)
        assert batch.images is not None
        assert batch.group is not None
        scores = remote.score(batch)
        same(remote.score(batch), scores)
        assert reward.sizes() == [4]
        index = torch.tensor([1, 3, 0])  # the whole second group, and half of the first
        part = SampleBatch([batch.prompts[i] for i in index], batch.images[index], None, batch.group[index])
        assert remote.score(part).values.tolist() == [2, 4, 1]
        assert reward.sizes() == [4, 1]
        remote.close()


# endpoints in trouble


def test_one_of_two_endpoints_hangs_and_all_is_scored_by_the_other() -> None:
    good, hanging = Watched(), Watched()
    with serving(good) as first, serving(hanging) as second:
        remote = loaded(urls=[first, second], samples_per_request=2, timeout=0.3, concurrency=2)
        hanging.gate.clear()
        scores = remote.score(bench.numbered(range(16), 4))
        assert scores.values.tolist() == [float(k) for k in range(16)]
        assert hanging.calls
        hanging.gate.set()
        remote.close()


def test_a_request_without_an_answer_makes_its_samples_invalid_with_the_reason() -> None:
    with serving(Watched()) as url:
        remote = loaded(url, samples_per_request=2, tries=1)
        scores = remote.score(bench.numbered([1, 2, 902, 3, 4, 901 - 897], 4))
        assert scores.valid.tolist() == [True, True, False, False, True, True]
        assert scores.values.isnan().tolist() == [False, False, True, True, False, False]
        assert scores.raw["half"].isnan().tolist() == [False, False, True, True, False, False]
        assert list(scores.problems) == [2, 3]
        assert "gave up after 1 tries" in scores.problems[2]
        assert "broken plug-in" in scores.problems[2]
        with pytest.raises(UserError, match=f"no endpoint answered, gave up .*{url}: HTTP 500 .*broken plug-in"):
            remote.score(bench.numbered([902, 1, 902], 4))
        remote.close()


def test_what_is_cached_counts_when_no_endpoint_answers(tmp_path: Path) -> None:
    with serving(Watched()) as url:
        remote = loaded(url, cache=str(tmp_path), tries=1, timeout=1)
        batch = bench.numbered([1, 2], 4)
        assert batch.images is not None
        remote.score(SampleBatch(batch.prompts[:1], batch.images[:1]))
    scores = remote.score(batch)
    assert scores.valid.tolist() == [True, False]
    assert scores.values[0] == 1
    remote.close()


def test_refusals_are_errors_in_the_words_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIGHT", "abc")
    monkeypatch.setenv("WRONG", "abd")
    with serving(Watched(), token="abc", max_body_mib=0.01) as url:
        for variable in (None, "WRONG"):
            with pytest.raises(UserError, match="refused the request with 401: the token is missing or wrong.*right token as `token_env`"):
                loaded(url, token_env=variable)
        with pytest.raises(UserError, match="the environment variable NOT_THERE"):
            loaded(url, token_env="NOT_THERE")
        remote = loaded(url, token_env="RIGHT", samples_per_request=9)
        with pytest.raises(UserError, match="413: the body has more than 10485 bytes.*lower `samples_per_request` .9."):
            remote.score(SampleBatch([Prompt("a")] * 9, pictures(9, 20) * 0.99))  # off the 8-bit grid: four bytes where one was expected
        with pytest.raises(UserError, match="422: reward watched failed on the prompt '901': 901 is no good number"):
            remote.score(bench.numbered([1, 901], 4))
        remote.close()
    with serving(Watched()) as url:
        remote = RemoteReward(url)
        with pytest.raises(UserError, match="422: reward watched: never is no good prompt: never 1003"):
            remote.check_prompts([Prompt(f"{'never' if i > 1002 else 'a'} {i}") for i in range(1500)])
        remote.check_prompts([Prompt("a")])
        remote.close()


def test_requests_are_as_large_as_the_server_takes_and_no_larger() -> None:
    reward = Watched()
    with serving(reward, max_body_mib=0.01, max_batch=1) as url:  # 10485 bytes, of which 9436 for pixels: seven pictures of 1200
        remote = loaded(url)
        assert remote.score(bench.numbered(range(20), 20)).values.tolist() == [float(k) for k in range(20)]
        assert sorted(reward.sizes()) == [6, 7, 7]
        remote.close()


def test_nothing_at_the_address_is_one_error_with_all_that_was_tried() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for work in (lambda reward: reward.load(CPU, torch.float32), lambda reward: reward.check_prompts([Prompt("a")])):
        with pytest.raises(UserError, match=rf"^reward remote: no endpoint answered, gave up after 2 tries .*127\.0\.0\.1:{port}: ConnectError.*serve-reward"):
            work(RemoteReward(f"http://127.0.0.1:{port}", tries=2))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Response("<html>"), "is not what a server of flowrl serve-reward answers .the JSON cannot be read"),
        (facts(info=[]), "is not what a server of flowrl serve-reward answers"),
        (Response("nothing here", 404), "refused the request with 404: nothing here; is that a server"),
        (Response('{"message": 5', 403), '403: {"message": 5'),
        (Response("[1]", 403), r"403: \[1\]"),
    ],
)
def test_a_server_of_something_else_is_an_error(answer: Any, says: str) -> None:
    with answering(answer) as url, pytest.raises(UserError, match=says):
        loaded(url)


def test_all_endpoints_must_serve_one_reward_and_the_expected_one() -> None:
    with answering(facts("a", "1", weights_sha256="12345678ab")) as first:
        for other in (facts("b", "1"), facts("a", "2"), facts("a", "1", weights_sha256="ffff")):
            with answering(other) as second, pytest.raises(UserError, match=f"{first} serves a 1 with weights 12345678, but {second} serves"):
                loaded(urls=[first, second])
        for expected in ("a", "a@1"):
            loaded(first, expect=expected).close()
        for wrong in ("b", "a@2", "a@"):
            with pytest.raises(UserError, match=f"serves a@1, but `expect` is {wrong}"):
                loaded(first, expect=wrong)


GOOD = {"reward": "fake", "version": "1", "values": [0.5, None], "valid": [True, False], "raw": {}, "problems": {}}


@pytest.mark.parametrize(
    ("score", "says"),
    [
        (lambda request_id: {**GOOD, "request_id": "other"}, "is to the request 'other'"),
        (lambda request_id: {**GOOD, "request_id": request_id, "values": [0.5]}, "values must be a list of 2"),
        (lambda request_id: {**GOOD, "request_id": request_id, "values": [0.5, 0.0]}, "null elsewhere"),
        (lambda request_id: Response("{}", 200), "is to the request None"),
        (lambda request_id: Response(b"\x80\x04]", 200), "not UTF-8"),
        (lambda request_id: {**GOOD, "request_id": request_id, "version": "2"}, "served fake 1 at the start and fake 2 now"),
        (lambda request_id: {**GOOD, "request_id": request_id, "reward": "x"}, "served fake 1 at the start and x 1 now"),
    ],
)
def test_a_reply_that_does_not_fit_is_an_error_never_a_score(score: Any, says: str) -> None:
    with answering(facts(), score) as url:
        remote = loaded(url)
        with pytest.raises(UserError, match=f"reward remote: {url}.*{says}"):
            remote.score(bench.numbered([1, 2], 4))
        remote.close()
    with answering(facts(), lambda request_id: {**GOOD, "request_id": request_id}) as url:
        remote = loaded(url)
        assert remote.score(bench.numbered([1, 2], 4)).valid.tolist() == [True, False]
        remote.close()


def test_the_other_requests_are_called_off_when_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Watched()) as url:
        remote = loaded(url, samples_per_request=1, concurrency=1)
        sent = []
        real = remote._ask
        monkeypatch.setattr(remote, "_ask", lambda batch: (sent.append(1), real(batch))[1])
        with pytest.raises(UserError, match="901"):
            remote.score(bench.numbered([901, *range(200)], 4))
        assert len(sent) < 150
        remote.close()


@pytest.mark.slow
def test_a_server_killed_and_started_again_in_the_middle_loses_and_changes_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def start() -> subprocess.Popen[str]:
        options = {"host": "127.0.0.1", "port": port, "device": "cpu", "dtype": None, "token_env": None}
        limits = {"max_batch": 64, "max_wait_ms": 0, "max_body_mib": 64, "max_queue": 64}
        root = Path(__file__).parent.parent
        command = [sys.executable, "-c", bench._SERVE, f"{root / 'benchmarks/remote_rewards.py'}:IdReward", json.dumps(options | limits)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert process.stdout is not None
        assert "http://127.0.0.1" in process.stdout.readline()
        return process

    server = start()
    remote = loaded(f"http://127.0.0.1:{port}", samples_per_request=4, tries=40, deadline=60, timeout=10)
    results: list[list[float]] = []
    stop = threading.Event()

    def score() -> None:
        while not stop.is_set():
            first = 16 * len(results)
            scores = remote.score(bench.numbered(range(first, first + 16), 8))
            results.append(scores.values.tolist())

    thread = threading.Thread(target=score)
    thread.start()
    eventually(lambda: len(results) > 20, 30)
    server.send_signal(signal.SIGKILL)
    server.wait()
    killed_at = len(results)
    server = start()
    eventually(lambda: len(results) > killed_at + 20, 60)
    stop.set()
    thread.join()
    remote.close()
    server.terminate()
    assert server.wait(20) == 0
    flat = [number for numbers in results for number in numbers]
    assert flat == [float(k) for k in range(len(flat))]


# arguments and life


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"url": "http://a", "urls": ["http://b"]}, "needs either `url`"),
        ({"urls": "http://a"}, "needs either `url`"),
        ({"url": "http://a", "samples_per_request": 0}, "samples_per_request must be a whole number of at least 1"),
        ({"url": "http://a", "concurrency": 2.0}, "concurrency must be a whole number"),
        ({"url": "http://a", "samples_per_request": True}, "samples_per_request must be"),
    ],
)
def test_arguments_that_cannot_be_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"^reward remote: {says}"):
        RemoteReward(**options)


@pytest.mark.parametrize("options", [{"url": "ftp://x"}, {"urls": []}, {"url": "http://a", "tries": 0}, {"url": "http://a", "timeout": -1}])
def test_addresses_and_times_that_cannot_be_are_refused_when_it_is_loaded(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="^reward remote: "):
        loaded(**options)


def test_it_is_loaded_once_closed_and_loaded_again_and_can_be_copied_before() -> None:
    with serving(Watched()) as url:
        remote = pickle.loads(pickle.dumps(RemoteReward(url)))
        batch = bench.numbered([1], 4)
        with pytest.raises(RuntimeError, match="load must be called before score"):
            remote.score(batch)
        remote.load(CPU, torch.float32)
        endpoints = remote._endpoints
        remote.load(CPU, torch.float32)
        assert remote._endpoints is endpoints
        with pytest.raises(ValueError, match="empty batch"):
            remote.score(SampleBatch([], torch.zeros(0, 3, 4, 4)))
        remote.close()
        remote.close()
        with pytest.raises(RuntimeError):
            remote.score(batch)
        remote.load(CPU, torch.float32)
        assert remote.score(batch).values.tolist() == [1]
        remote.close()


def test_a_cache_that_cannot_be_made_is_an_error_of_loading(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with serving(Watched()) as url, pytest.raises(UserError, match="the cache folder .* cannot be made"):
        loaded(url, cache=str(tmp_path / "file" / "below"))


def test_metadata_that_cannot_be_sent_is_named() -> None:
    with serving(Watched()) as url:
        remote = loaded(url)
        with pytest.raises(UserError, match="the prompt 'a' or its metadata cannot be sent"):
            remote.score(SampleBatch([Prompt("a", {"x": object()})], pictures(1)))
        remote.close()


@pytest.mark.parametrize("options", [{}, {"urls": []}])
def test_without_an_address_it_can_be_listed_but_not_loaded(options: dict[str, Any]) -> None:
    reward = RemoteReward(**options)
    assert reward.info.runs_on == "network"
    with pytest.raises(UserError, match="^reward remote: needs either `url`, such as http://127.0.0.1:8000"):
        reward.load(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("size", "samples", "expected"), [(32, None, 64), (512, None, 8), (2048, None, 1), (512, 20, 20)])
def test_large_pictures_go_in_more_requests_unless_told_otherwise(size: int, samples: int | None, expected: int) -> None:
    reward = RemoteReward("http://127.0.0.1:1", samples_per_request=samples)
    images = torch.zeros(1, 1, 1, 1).expand(70, 3, size, size)
    assert reward._per_request(SampleBatch([Prompt("x")] * 70, images)) == expected
    assert reward._per_request(SampleBatch([Prompt("x")] * 70, texts=["t"] * 70)) == (samples or 64)
