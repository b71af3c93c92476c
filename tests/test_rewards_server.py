"""rewards/server.py and rewards/batching.py: scores over HTTP, requests merged and parted, and everything that clients can do wrong."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from reward_servers import Watched, bench, eventually, running, serving
from torch import nn

from flowrl.serving import reward_version, serve_reward
from flowrl.types import Prompt, SampleBatch, UserError
from rewards import server
from rewards.batching import NotScored, Scorer, weights_hash
from rewards.jpeg import jpeg_compressibility
from rewards.server import make_app, serve
from rewards.wire import BATCH_TYPE, encode_request

CPU = torch.device("cpu")
HEADERS = {"Content-Type": BATCH_TYPE}


def body_of(numbers: list[int], size: int = 4) -> bytes:
    return encode_request(bench.numbered(numbers, size), "id")


def texts_of(numbers: list[int]) -> bytes:
    return encode_request(SampleBatch([Prompt("a")] * len(numbers), None, [str(number) for number in numbers]), "id")


def post(url: str, content: Any, path: str = "/v1/score", **headers: str) -> httpx.Response:
    return httpx.post(url + path, content=content, headers={**HEADERS, **headers}, timeout=20)


def metric(url: str, name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in httpx.get(url + "/metrics").text.splitlines() if line.startswith(name))


@pytest.fixture(scope="module")
def shared() -> Iterator[str]:
    """A server whose limits are small."""
    with serving(Watched(), version="1", max_body_mib=0.25, body_seconds=0.5) as url:
        yield url


# the ordinary


def test_scores_facts_and_health(shared: str) -> None:
    reply = post(shared, body_of([7, 905, 2**24 - 1]))
    assert reply.status_code == 200
    assert reply.json() == {
        "api": 1,
        "request_id": "id",
        "reward": "watched",
        "version": "1",
        "values": [7.0, None, 16777215.0],
        "valid": [True, False, True],
        "raw": {"half": [3.5, None, 8388607.5]},
        "problems": {"1": "nothing to say"},
    }
    about = httpx.get(shared + "/v1/info").json()
    assert (about["reward"], about["version"], about["weights_sha256"], about["max_body_bytes"], about["max_batch"]) == ("watched", "1", None, 2**18, 64)
    assert about["info"]["scope"] == "sample"
    health = httpx.get(shared + "/v1/health").json()
    assert (health["status"], health["requests"], health["scoring_seconds"]) == ("ok", 0, 0.0)


def test_prompts_are_checked_in_the_words_of_the_reward(shared: str) -> None:
    good = post(shared, json.dumps({"api": 1, "prompts": ["a", "b"]}), "/v1/check")
    assert good.json() == {"api": 1, "prompts": 2}
    bad = post(shared, json.dumps({"api": 1, "prompts": ["a", "never"]}), "/v1/check")
    assert (bad.status_code, bad.json()) == (422, {"error": "not_scored", "message": "reward watched: never is no good prompt: never"})
    assert post(shared, "no json", "/v1/check").status_code == 400


def test_metrics_count_requests_samples_calls_and_errors() -> None:
    with serving(Watched()) as url:
        for numbers in ([1, 2, 905], [4]):
            assert post(url, body_of(numbers)).status_code == 200
        assert post(url, b"nothing").status_code == 400
        assert metric(url, 'flowrl_reward_requests_total{outcome="ok",path="/v1/score"}') == 2
        assert metric(url, 'flowrl_reward_errors_total{kind="bad_request"}') == 1
        assert metric(url, 'flowrl_reward_samples_total{valid="true"}') == 3
        assert metric(url, 'flowrl_reward_samples_total{valid="false"}') == 1
        assert metric(url, "flowrl_reward_batch_samples_count") == 2
        assert metric(url, "flowrl_reward_batch_samples_sum") == 4
        assert metric(url, "flowrl_reward_request_seconds_count") >= 3
        assert metric(url, "flowrl_reward_queue_length") == 0
        assert metric(url, "flowrl_reward_requests_inside") == 0


# bad requests


@pytest.mark.parametrize(
    ("content", "headers", "status", "error", "says"),
    [
        (pickle.dumps([1, 2, 3]), {}, 400, "bad_request", "pickles and other formats are not read"),
        (pickle.dumps([1, 2, 3]), {"Content-Type": "application/octet-stream"}, 415, "unsupported_type", "octet-stream"),
        (body_of([1])[:-1], {}, 400, "bad_request", "but 47 follow"),
        (body_of([1]) + b"x", {}, 400, "bad_request", "but 49 follow"),
        (body_of([1]), {"Content-Encoding": "gzip"}, 415, "unsupported_type", "content encoding 'gzip'"),
        (bytes(2**18 + 1), {}, 413, "too_large", "more than 262144 bytes, the limit of this server"),
        (body_of([901]), {}, 422, "not_scored", "reward watched failed on the prompt '901': 901 is no good number"),
        (body_of([902]), {}, 500, "reward_failed", "RuntimeError: broken plug-in"),
        (body_of([904]), {}, 500, "reward_failed", "returned nan for the prompt '904'"),
        (body_of([903]), {}, 500, "reward_failed", "reward watched failed on the prompt '903': SystemExit: 3"),
    ],
)
def test_every_bad_request_is_an_error_with_a_name_and_the_server_goes_on(
    shared: str, content: bytes, headers: dict[str, str], status: int, error: str, says: str
) -> None:
    reply = post(shared, content, **headers)
    assert (reply.status_code, reply.json()["error"]) == (status, error)
    assert says in reply.json()["message"]
    assert post(shared, body_of([5])).json()["values"] == [5.0]


def test_other_paths_and_methods_are_refused(shared: str) -> None:
    assert post(shared, b"", "/v1/other").status_code == 404
    assert httpx.get(shared + "/v1/score").status_code == 405
    assert httpx.get(shared + "/openapi.json").status_code == 404


def test_a_body_without_a_length_is_read_no_further_than_the_limit(shared: str) -> None:
    chunks = (bytes(2**16) for _ in range(6))  # 1.5 times the limit; twice is the most that is read and forgotten
    reply = post(shared, chunks)
    assert (reply.status_code, reply.json()["error"]) == (413, "too_large")
    good = body_of([3, 4])
    assert post(shared, iter([good[:50], good[50:]])).json()["values"] == [3.0, 4.0]


def raw(url: str, sent: bytes, *, wait: bool = True) -> bytes:
    """What a server says to bytes; without ``wait`` the client leaves at once."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(sent)
        received = b""
        with suppress(ConnectionError):
            while wait and (part := connection.recv(65536)):
                received += part
        return received


HEAD = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: " + BATCH_TYPE.encode() + b"\r\nContent-Length: "


def test_a_lying_length_a_body_that_stops_and_a_client_that_leaves(shared: str) -> None:
    answer = raw(shared, HEAD + b"99999999999999999999\r\n\r\nabc")
    assert b" 413 " in answer.partition(b"\r\n")[0] or b" 400 " in answer.partition(b"\r\n")[0]
    answer = raw(shared, HEAD + b"1000\r\n\r\nflowrl")
    assert b" 408 " in answer.partition(b"\r\n")[0]
    assert b"the body was not complete after 0.5 s" in answer
    assert b" 400 " in raw(shared, b"\x16\x03\x01 no HTTP at all\r\n\r\n").partition(b"\r\n")[0]
    before = metric(shared, 'flowrl_reward_errors_total{kind="client_gone"}')
    raw(shared, HEAD + b"1000\r\n\r\nflowrl", wait=False)
    eventually(lambda: metric(shared, 'flowrl_reward_errors_total{kind="client_gone"}') == before + 1)
    assert post(shared, body_of([5])).json()["values"] == [5.0]


def test_a_bug_of_the_server_is_an_answer_too(shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(server, "decode_request", broken)
    reply = post(shared, body_of([1]))
    assert (reply.status_code, reply.json()["error"]) == (500, "internal")


def test_without_the_token_only_health_answers() -> None:
    with serving(Watched(), token="s3cret") as url:
        assert httpx.get(url + "/v1/health").status_code == 200
        for authorization in (None, "Bearer", "Bearer wrong", "Basic s3cret", "s3cret", "Bearer s3cretx", b"Bearer \xff\xfe"):
            headers: Any = {} if authorization is None else {"Authorization": authorization}
            for path in ("/v1/info", "/metrics"):
                assert httpx.get(url + path, headers=headers).status_code == 401
            for path in ("/v1/score", "/v1/check"):
                reply = httpx.post(url + path, content=body_of([1]), headers={**HEADERS, **headers})
                assert (reply.status_code, reply.json()["error"]) == (401, "unauthorized")
                assert reply.headers["www-authenticate"] == "Bearer"
        assert post(url, body_of([1]), Authorization="bearer  s3cret").status_code == 200


def test_a_thousand_fuzzed_requests_give_right_scores_or_named_errors() -> None:
    with serving(bench.IdReward(), max_wait_ms=0) as url, httpx.Client(base_url=url) as client:
        counts, mistakes = bench.run_fuzz(client, range(1000))
        assert mistakes == []
        assert counts["whole: scored"] > 40
        assert len({key.partition(":")[0] for key in counts}) == 13
        assert client.get("/v1/health").json()["requests"] == 0


# load


def test_health_answers_and_the_queue_is_bounded_while_a_call_is_slow() -> None:
    reward = Watched()
    with serving(reward, max_queue=2) as url, ThreadPoolExecutor(2) as pool:
        reward.gate.clear()
        first = pool.submit(post, url, body_of([1]))
        assert reward.entered.wait(10)
        second = pool.submit(post, url, body_of([2]))
        eventually(lambda: httpx.get(url + "/v1/health").json()["requests"] == 2)
        assert httpx.get(url + "/v1/health").json()["scoring_seconds"] > 0
        assert metric(url, "flowrl_reward_queue_length") == 1
        third = post(url, body_of([3]))
        assert (third.status_code, third.json()["error"], third.headers["retry-after"]) == (503, "busy", "1")
        reward.gate.set()
        assert [reply.result().json()["values"] for reply in (first, second)] == [[1.0], [2.0]]
        assert post(url, body_of([3])).json()["values"] == [3.0]
    assert reward.closed
    assert len(reward.threads) == 1


def queued(url: str, reward: Watched, pool: ThreadPoolExecutor, bodies: list[bytes]) -> list[httpx.Response]:
    """Replies to requests that wait behind a call of one sample, in the order given."""
    reward.gate.clear()
    reward.entered.clear()
    first = pool.submit(post, url, body_of([0]))
    assert reward.entered.wait(10)
    reward.calls.clear()
    replies = []
    for place, body in enumerate(bodies):
        replies.append(pool.submit(post, url, body))
        eventually(lambda expected=place + 2: httpx.get(url + "/v1/health").json()["requests"] == expected)
    time.sleep(0.05)  # until the last one is decoded, too
    reward.gate.set()
    assert first.result().json()["values"] == [0.0]
    return [reply.result() for reply in replies]


def test_waiting_requests_are_merged_up_to_the_limit_and_everyone_gets_the_own_scores() -> None:
    reward = Watched()
    numbers = [[1], [2, 3], [4, 5, 6], [7, 905], [9], [10, 11, 12, 13, 14, 15, 16, 17, 18, 19], [20]]
    with serving(reward, max_batch=8) as url, ThreadPoolExecutor(8) as pool:
        replies = queued(url, reward, pool, [body_of(some) for some in numbers])
    assert reward.sizes() == [8, 1, 10, 1]  # in the order of arrival; a large request is not cut
    assert [reply.json()["values"] for reply in replies] == [[None if number == 905 else float(number) for number in some] for some in numbers]
    assert replies[3].json()["problems"] == {"1": "nothing to say"}
    assert replies[2].json()["raw"] == {"half": [2.0, 2.5, 3.0]}


def test_requests_of_other_sizes_or_without_pictures_are_not_merged_with_them() -> None:
    reward = Watched()
    bodies = [body_of([1]), body_of([2], size=6), texts_of([3]), body_of([4]), texts_of([5, 6]), body_of([7], size=6)]
    with serving(reward, max_batch=8) as url, ThreadPoolExecutor(8) as pool:
        replies = queued(url, reward, pool, bodies)
    assert reward.sizes() == [2, 2, 3]
    assert [reply.json()["values"] for reply in replies] == [[1.0], [2.0], [3.0], [4.0], [5.0, 6.0], [7.0]]


def test_a_bad_request_does_not_spoil_those_it_was_merged_with() -> None:
    for bad, status in ((901, 422), (902, 500), (904, 500)):
        reward = Watched()
        with serving(reward) as url, ThreadPoolExecutor(8) as pool:
            replies = queued(url, reward, pool, [body_of([1, 2]), body_of([3, bad]), body_of([4])])
        assert [reply.status_code for reply in replies] == [200, status, 200]
        assert [reply.json().get("values") for reply in replies] == [[1.0, 2.0], None, [4.0]]
        assert reward.sizes()[0] == 5


def test_a_reward_that_compares_samples_gets_each_request_alone_and_with_its_groups() -> None:
    reward = Watched(scope="group", batch_size=1)
    batch = bench.numbered([1, 2, 3, 4], 4)
    grouped = encode_request(SampleBatch(batch.prompts, batch.images, None, torch.tensor([5, 5, -1, 5])), "id")
    with serving(reward) as url, ThreadPoolExecutor(8) as pool:
        queued(url, reward, pool, [grouped, body_of([5, 6])])
    assert reward.sizes() == [4, 2]
    assert reward.calls[0].group is not None
    assert reward.calls[0].group.tolist() == [5, 5, -1, 5]


def test_a_lone_request_waits_for_company_no_longer_than_it_should() -> None:
    scorer = Scorer(Watched(), device=CPU, max_wait=0.2)
    scorer.start()
    scorer.start()  # the second time there is nothing to do
    start = time.monotonic()
    results = [scorer.submit(bench.numbered([1], 4))]
    time.sleep(0.05)
    results.append(scorer.submit(bench.numbered([2], 4)))
    assert [result.result(5).values.tolist() for result in results] == [[1.0], [2.0]]
    assert 0.19 < time.monotonic() - start < 2
    start = time.monotonic()
    assert scorer.submit(bench.numbered(range(64), 4)).result(5).valid.all()  # full: nothing to wait for
    assert time.monotonic() - start < 0.19
    scorer.close()
    with pytest.raises(NotScored, match="closing"):
        scorer.submit(bench.numbered([1], 4))
    scorer.close()


def test_a_client_that_leaves_loses_its_turn() -> None:
    reward = Watched()
    with serving(reward, max_batch=1) as url, ThreadPoolExecutor(2) as pool:
        reward.gate.clear()
        first = pool.submit(post, url, body_of([1]))
        assert reward.entered.wait(10)
        content = body_of([2])
        raw(url, HEAD + str(len(content)).encode() + b"\r\n\r\n" + content, wait=False)
        eventually(lambda: metric(url, 'flowrl_reward_errors_total{kind="client_gone"}') == 1)
        reward.gate.set()
        assert first.result().json()["values"] == [1.0]
        assert post(url, body_of([3])).json()["values"] == [3.0]
    assert [batch.prompts[0].text for batch in reward.calls] == ["1", "3"]


def test_closing_finishes_what_waits() -> None:
    reward = Watched()
    scorer = Scorer(reward, device=CPU)
    scorer.start()
    reward.gate.clear()
    results = [scorer.submit(bench.numbered([k], 4 + k)) for k in range(5)]
    closing = threading.Thread(target=scorer.close)
    closing.start()
    eventually(lambda: scorer._closing)
    reward.gate.set()
    closing.join()
    assert [result.result(0).values.tolist() for result in results] == [[float(k)] for k in range(5)]
    assert reward.closed
    assert scorer.waiting == 0
    Scorer(reward, device=CPU).close()  # one that was never started


# beginning and end


def test_a_reward_that_cannot_be_loaded_is_the_error_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = Watched()

    def fail(device: torch.device, dtype: torch.dtype) -> None:
        raise FileNotFoundError("weights")

    reward.load = fail  # type: ignore[method-assign]
    with pytest.raises(UserError, match="reward watched could not be loaded: FileNotFoundError: weights"):
        serve(reward, port=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_batch": 0}, "max_batch must be a whole number of at least 1"),
        ({"max_queue": 1.5}, "max_queue must be a whole number"),
        ({"max_batch": True}, "max_batch must be a whole number"),
        ({"max_wait_ms": -1}, "max_wait_ms must be a number that is not negative"),
        ({"max_body_mib": 0}, "max_body_mib must be a positive number"),
        ({"body_seconds": float("nan")}, "body_seconds must be a positive number"),
        ({"max_wait_ms": "2"}, "max_wait_ms must be a number"),
    ],
)
def test_limits_that_cannot_be_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"^serve-reward: {says}"):
        make_app(Watched(), **options)


def test_an_open_address_needs_a_token_and_a_token_needs_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.invalid"):
        with pytest.raises(UserError, match="name the environment variable of a token"):
            serve(Watched(), host=host, port=0)
    monkeypatch.setenv("EMPTY_TOKEN", " ")
    for variable in ("EMPTY_TOKEN", "NO_SUCH_TOKEN"):
        with pytest.raises(UserError, match=f"the environment variable {variable}, which should hold the token, is not set"):
            serve(Watched(), port=0, token_env=variable)
    with pytest.raises(UserError, match="is no address of this machine"):
        serve(Watched(), host="no such host", port=0, open_to_all=True)
    with pytest.raises(UserError, match=r"192\.0\.2\.1:0 cannot be used"):
        serve(Watched(), host="192.0.2.1", port=0, open_to_all=True)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="cannot be used .*choose another --port"):
        serve(Watched(), port=taken.getsockname()[1])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_the_address_is_told_when_it_answers(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_TOKEN", "abc")
    told: list[str] = []
    stop = threading.Event()
    real = uvicorn.Server.run

    def run(self: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        threading.Thread(target=lambda: (stop.wait(10), setattr(self, "should_exit", True))).start()
        real(self, sockets)

    monkeypatch.setattr(uvicorn.Server, "run", run)
    reward = Watched()
    thread = threading.Thread(target=serve, args=(reward,), kwargs={"host": host, "port": 0, "token_env": "THE_TOKEN", "announce": told.append})
    thread.start()
    eventually(lambda: told)
    assert told[0].startswith("http://[::1]:" if host == "::1" else f"http://{host}:")
    assert httpx.get(told[0] + "/v1/info", headers={"Authorization": "Bearer abc"}, timeout=10).json()["reward"] == "watched"
    stop.set()
    thread.join()
    assert reward.closed


def test_signals_that_uvicorn_raises_once_more_do_not_end_the_process() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with server._signals_end_quietly():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


SLOW = """
import time
from flowrl.types import SampleBatch

def slow(batch: SampleBatch):
    time.sleep(1)
    return [len(prompt.text) for prompt in batch.prompts]
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_server_finish_what_it_has_and_end_with_0(number: int, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(SLOW)
    options = "host='127.0.0.1', port=0, device='cpu', dtype='float32', token_env=None, max_batch=8, max_wait_ms=1, max_body_mib=1, max_queue=8"
    code = f"from flowrl.serving import serve_reward\nserve_reward('own:slow', {{}}, {options})"
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent.parent}:{tmp_path}"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    assert process.stdout is not None
    url = process.stdout.readline().rpartition(" at ")[2].strip()
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(post, url, json.dumps({"api": 1, "prompts": ["four"], "texts": ["x"]}), **{"Content-Type": "application/json"})
        eventually(lambda: httpx.get(url + "/v1/health").json()["scoring_seconds"] > 0)
        process.send_signal(number)
        assert reply.result().json()["values"] == [4.0]
    assert process.wait(20) == 0


def test_the_version_tells_arguments_apart() -> None:
    plain = reward_version({}, None)
    versions = [plain, reward_version({"quality": 90}, None), reward_version({"quality": 91}, None), reward_version({}, "float16")]
    assert len(set(versions)) == 4
    assert all(version.startswith(plain) for version in versions)
    assert reward_version({"a": 1, "b": 2}, None) == reward_version({"b": 2, "a": 1}, None)


def test_what_the_command_gives_reaches_the_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, Any] = {}

    def serve_it(reward: Any, *, announce: Any, **options: Any) -> None:
        seen.update(options, reward=reward)
        announce("http://there")

    monkeypatch.setattr(server, "serve", serve_it)
    options: dict[str, Any] = {"host": "h", "port": 1, "token_env": "T", "max_batch": 2, "max_wait_ms": 3.0, "max_body_mib": 4.0, "max_queue": 5}
    serve_reward("jpeg_compressibility", {"quality": 90}, device="cpu", dtype="bfloat16", **options)
    assert seen["reward"].quality == 90
    assert {**options, "device": CPU, "dtype": torch.bfloat16, "open_to_all": False}.items() <= seen.items()
    version = reward_version({"quality": 90}, "bfloat16")
    assert capsys.readouterr().out == f"reward jpeg_compressibility, version {version}, at http://there\n"
    with pytest.raises(UserError, match="dtype must be float32, bfloat16, float16, not 'int8'"):
        serve_reward("jpeg_compressibility", {}, device="cpu", dtype="int8", **options)


def test_the_hash_of_the_weights_sees_every_weight_and_only_weights() -> None:
    class Owner:
        def __init__(self, *networks: nn.Module) -> None:
            self.info = jpeg_compressibility().info
            self.first, self.second = networks

    def make(seed: int, dtype: torch.dtype = torch.float32) -> Any:
        torch.manual_seed(seed)
        return Owner(nn.Linear(3, 2), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(2, 2))).__class__(nn.Linear(3, 2).to(dtype), nn.BatchNorm1d(4).to(dtype))

    assert weights_hash(jpeg_compressibility()) is None
    assert weights_hash(object()) is None  # type: ignore[arg-type]
    reference = weights_hash(make(0))
    assert reference == weights_hash(make(0))
    changed = make(0)
    with torch.no_grad():
        changed.second.running_var[3] += 1e-6
    different = [weights_hash(changed), weights_hash(make(1)), weights_hash(make(0, torch.bfloat16)), reference]
    assert len(set(different)) == 4


def test_a_server_without_a_lifespan_is_started_by_its_scorer() -> None:
    app = make_app(jpeg_compressibility())
    with running(app) as url:
        assert app.state.scorer.name == "jpeg_compressibility"
        batch = bench.numbered([1, 2], 8)
        values = post(url, encode_request(batch, "x")).json()["values"]
    assert values == jpeg_compressibility().score(batch).values.tolist()
