"""rewards/http_client.py against servers that answer what each test says: what is retried, where it goes, when it gives up, and how it says so."""

from __future__ import annotations

import datetime
import gzip
import importlib.util
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
import torch
from fake_server import FakeServer, Reply, Seen, closed_port

from flowrl.types import UserError
from rewards import chat, http_client, judge
from rewards.http_client import Endpoints, Refused, Request, Unreachable

OK = Reply(body=b"fine")


class Time:
    """A clock that only sleeping moves, by what was asked for."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(round(seconds, 6))
        self.now += seconds


@contextmanager
def client(urls: str | list[str], **options: Any) -> Iterator[Endpoints]:
    endpoints = Endpoints("far", [urls] if isinstance(urls, str) else urls, **options)
    try:
        yield endpoints
    finally:
        endpoints.close()


def timed(urls: str | list[str], moments: Time, **options: Any) -> Any:
    return client(urls, clock=moments.clock, sleep=moments.sleep, **options)


def post(endpoints: Endpoints, content: bytes = b"question") -> httpx.Response:
    return endpoints.post("/ask", content=content, headers={"content-type": "text/plain"})


def test_a_request_arrives_as_it_was_sent_and_so_does_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_TOKEN", " secret-1 ")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody is there: it must not be asked
    with FakeServer([Reply(body=bytes(range(256)), headers={"x-more": "yes"})]) as server, client(server.url + "/base/", token_env="FAR_TOKEN") as endpoints:
        answer = post(endpoints, b"\x00\xff")
        assert (answer.status_code, answer.content, answer.headers["x-more"]) == (200, bytes(range(256)), "yes")
        endpoints.get("/models")
        first, second = server.seen
        assert (first.method, first.path, first.body) == ("POST", "/base/ask", b"\x00\xff")
        assert (first.headers["authorization"], first.headers["content-type"]) == ("Bearer secret-1", "text/plain")
        assert (second.method, second.path, second.body, second.headers["authorization"]) == ("GET", "/base/models", b"", "Bearer secret-1")
        assert endpoints.urls == (server.url + "/base",)


def test_no_token_is_sent_unless_one_is_named() -> None:
    with FakeServer([OK]) as server, client(server.url) as endpoints:
        post(endpoints)
        assert "authorization" not in server.seen[0].headers


def test_a_compressed_answer_is_unpacked_and_a_large_one_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "_MAX_REPLY_BYTES", 10_000)
    packed = [Reply(body=gzip.compress(bytes(size)), headers={"content-encoding": "gzip"}) for size in (10_000, 10_001)]
    with FakeServer(packed) as server, client(server.url, tries=1) as endpoints:
        assert post(endpoints).content == bytes(10_000)
        with pytest.raises(Unreachable, match="the reply has more than 10000 bytes"):
            post(endpoints)


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413, 422])
def test_a_refusal_is_not_tried_again_and_says_status_and_text(status: int) -> None:
    with FakeServer([Reply(status, b"no,\n  because", {"location": "http://127.0.0.1:9/"})]) as server, client(server.url) as endpoints:
        with pytest.raises(Refused) as caught:
            post(endpoints)
        assert str(caught.value) == f"{server.url}/ask answered {status}: no, because"
        assert (caught.value.status, caught.value.text, caught.value.url) == (status, "no, because", f"{server.url}/ask")
        assert len(server.seen) == 1


def test_the_text_of_a_refusal_is_cut_at_500_characters() -> None:
    with FakeServer([Reply(400, b"x" * 501)]) as server, client(server.url) as endpoints, pytest.raises(Refused) as caught:
        post(endpoints)
    assert caught.value.text == "x" * 497 + "..."


def test_a_busy_server_is_asked_again_after_the_time_it_names() -> None:
    later = format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90), usegmt=True)
    past = format_datetime(datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=90), usegmt=True)
    moments = Time()
    with FakeServer([Reply(429, headers={"retry-after": "7"}), OK]) as server, timed(server.url, moments) as endpoints:
        assert post(endpoints).content == b"fine"
        assert 7 <= moments.now - 1000 < 7.001
        server.answer = [OK, OK, Reply(503, headers={"retry-after": later}), OK]
        moments.now = 5000
        post(endpoints)
        assert 88 < moments.now - 5000 <= 91
        server.answer = [*[OK] * 4, Reply(429, headers={"retry-after": past}), Reply(429, headers={"retry-after": "soon"}), OK]
        moments.now = 9000
        post(endpoints)
        assert 0.75 <= moments.now - 9000 <= 1.5  # 0.5 s and 1 s, each times 0.5 to 1


def test_a_busy_server_does_not_open_the_circuit() -> None:
    moments = Time()
    with FakeServer([Reply(429), Reply(503, headers={"retry-after": "0"}), Reply(429), OK]) as server, timed(server.url, moments, break_after=1) as endpoints:
        assert post(endpoints).content == b"fine"
        assert moments.now - 1000 < 5  # a circuit that had opened would have cost the cool-down of 10 s


def test_pauses_double_with_jitter_and_leave_the_random_state_of_the_run_alone() -> None:
    moments = Time()
    random.seed(3)
    torch.manual_seed(3)
    before = random.getstate(), torch.get_rng_state()
    with FakeServer([Reply(500, b"oops")]) as server, timed(server.url, moments, tries=9, break_after=99, deadline=1e6) as endpoints:
        with pytest.raises(Unreachable) as caught:
            post(endpoints)
        assert caught.value.reasons == {server.url: "HTTP 500 oops"}
        assert str(caught.value).startswith("gave up after 9 tries in ")
        assert len(server.seen) == 9
    assert len(moments.pauses) == 8
    for pause, longest in zip(moments.pauses, [0.5, 1, 2, 4, 8, 16, 30, 30], strict=True):
        assert longest / 2 <= pause <= longest
    assert len({pause / longest for pause, longest in zip(moments.pauses, [0.5, 1, 2, 4, 8, 16, 30, 30], strict=True)}) > 4
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (Reply(hang_up=True), "RemoteProtocolError"),
        (Reply(body=b"half", missing=4), "RemoteProtocolError"),
        (Reply(502), "HTTP 502"),
        (Reply(after=0.3), "ReadTimeout"),
    ],
)
def test_what_may_pass_is_tried_again(broken: Reply, reason: str) -> None:
    moments = Time()
    with FakeServer([broken, OK]) as server, timed(server.url, moments, timeout=0.15) as endpoints:
        assert post(endpoints).content == b"fine"
        server.answer = [broken]
        with pytest.raises(Unreachable, match=reason):
            post(endpoints)
        assert len(server.seen) == 2 + 4


def test_an_answer_that_drips_is_given_up_after_the_time_of_a_try() -> None:
    with FakeServer([Reply(body=b"x" * 100, drip=0.03)]) as server, client(server.url, timeout=0.2, tries=1) as endpoints:
        start = time.monotonic()
        with pytest.raises(Unreachable, match=r"the reply was not complete after 0.2 s"):
            post(endpoints)
        assert time.monotonic() - start < 1


def test_nobody_listens() -> None:
    with (
        timed(f"http://127.0.0.1:{closed_port()}", Time()) as endpoints,
        pytest.raises(Unreachable, match=r"gave up after 4 tries .*http://127\.0\.0\.1:\d+: ConnectError"),
    ):
        post(endpoints)


def test_the_deadline_ends_pauses_and_the_wait_for_a_busy_server() -> None:
    moments = Time()
    with FakeServer([Reply(500)]) as server, timed(server.url, moments, tries=99, deadline=20, break_after=99) as endpoints:
        with pytest.raises(Unreachable, match=r"gave up after \d+ tries in 20\.0 s, the deadline: http"):
            post(endpoints)
        assert moments.now == pytest.approx(1020, abs=0.01)
        server.answer = [Reply(429, headers={"retry-after": "3600"})]
        with pytest.raises(Unreachable, match="gave up after 1 tries in 20.0 s, the deadline: .*HTTP 429"):
            post(endpoints)
        with pytest.raises(Unreachable, match="gave up after 0 tries in 20.0 s, the deadline: .*: busy"):  # the rest that was asked for is everybody's
            post(endpoints)


def test_a_request_goes_to_another_endpoint_at_once_after_a_failure() -> None:
    moments = Time()
    with FakeServer([Reply(500)]) as bad, FakeServer([OK]) as good, timed([bad.url, good.url], moments) as endpoints:
        for _ in range(4):
            assert post(endpoints).content == b"fine"
        assert moments.pauses == []
        assert len(good.seen) == 4


def test_requests_one_after_another_are_shared_out() -> None:
    with FakeServer([OK]) as one, FakeServer([OK]) as two, client([one.url, two.url]) as endpoints:
        for _ in range(10):
            post(endpoints)
        assert (len(one.seen), len(two.seen)) == (5, 5)


def test_the_circuit_opens_rests_tries_once_and_closes() -> None:
    moments = Time()
    with FakeServer([Reply(500)]) as server, timed(server.url, moments, tries=3, break_after=3, cool_down=10, deadline=1000) as endpoints:
        with pytest.raises(Unreachable):
            post(endpoints)
        assert len(server.seen) == 3
        opened = moments.now
        server.answer = [*[Reply(500)] * 5, OK]
        assert post(endpoints).content == b"fine"  # waits 10 s, fails, waits 20 s, fails, waits 40 s
        assert moments.now - opened == pytest.approx(10 + 20 + 40)
        assert len(server.seen) == 6
        server.answer = [Reply(500)]
        closed = moments.now
        with pytest.raises(Unreachable):  # closed again: three failures in a row are needed anew
            post(endpoints)
        assert moments.now - closed < 2
        assert len(server.seen) == 9


def test_a_trial_is_one_request_and_the_others_wait_for_its_outcome() -> None:
    seen_during_the_trial: list[int] = []

    def answer(seen: Seen) -> Reply:
        if len(server.seen) <= 2:
            return Reply(500)
        if len(server.seen) == 3:
            time.sleep(0.15)
            seen_during_the_trial.append(len(server.seen))
        return OK

    with FakeServer(answer) as server, client(server.url, tries=1, break_after=2, cool_down=0.05, concurrency=4) as endpoints:
        for _ in range(2):
            with pytest.raises(Unreachable):
                post(endpoints)
        answers = endpoints.post_many([Request("/ask", b"", {})] * 8)
        assert [type(answer) for answer in answers] == [httpx.Response] * 8
        assert seen_during_the_trial == [3]
        assert len(server.seen) == 10


def test_the_rest_between_trials_is_at_most_16_times_the_first() -> None:
    moments = Time()
    with FakeServer([Reply(500)]) as server, timed(server.url, moments, tries=8, break_after=1, cool_down=10, deadline=1e5) as endpoints:
        with pytest.raises(Unreachable):
            post(endpoints)
        assert moments.now - 1000 == pytest.approx(10 + 20 + 40 + 80 + 160 + 160 + 160)


def test_an_open_circuit_does_not_slow_the_other_endpoint() -> None:
    moments = Time()
    with FakeServer([Reply(500)]) as bad, FakeServer([OK]) as good, timed([bad.url, good.url], moments, break_after=2) as endpoints:
        for _ in range(20):
            post(endpoints)
        assert len(bad.seen) == 2
        assert moments.now == 1000
        moments.now += 10  # the bad one has recovered; one request tries it
        bad.answer = [OK]
        for _ in range(4):
            post(endpoints)
        assert len(bad.seen) > 3


def test_once_everything_has_been_down_for_the_deadline_requests_fail_at_once_until_a_trial_succeeds() -> None:
    moments = Time()
    with FakeServer([Reply(500, b"gone")]) as server, timed(server.url, moments, tries=4, break_after=2, cool_down=30, deadline=100) as endpoints:
        with pytest.raises(Unreachable):
            post(endpoints)  # tries at 0, 0.5, 30 and 90 s
        with pytest.raises(Unreachable):
            post(endpoints)
        assert len(server.seen) == 4
        assert 100 <= moments.now - 1000 <= 101
        now = moments.now
        with pytest.raises(Unreachable, match="gave up after 0 tries in 0.0 s, because all endpoints have been down for more than 100 s: .*HTTP 500 gone"):
            post(endpoints)
        assert moments.now == now
        assert len(server.seen) == 4
        server.answer = [OK]
        moments.now += 200
        assert post(endpoints).content == b"fine"
        assert post(endpoints).content == b"fine"


def test_answers_keep_the_order_of_the_requests_whatever_the_order_of_completion() -> None:
    finished: list[bytes] = []

    def answer(seen: Seen) -> Reply:
        time.sleep((16 - int(seen.body)) * 0.01)
        finished.append(seen.body)
        return Reply(400 if int(seen.body) % 5 == 0 else 200, b"re " + seen.body)

    with FakeServer(answer) as server, client(server.url, concurrency=16) as endpoints:
        answers = endpoints.post_many([Request("/ask", str(i).encode(), {}) for i in range(16)])
    assert finished != sorted(finished, key=int)
    assert [answer.text for answer in answers if not isinstance(answer, Unreachable)] == [f"re {i}" for i in range(16)]
    assert [isinstance(answer, Refused) for answer in answers] == [i % 5 == 0 for i in range(16)]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_each_endpoint_gets_as_many_requests_at_once_as_allowed_and_no_more(concurrency: int) -> None:
    slow = Reply(after=0.05)
    with FakeServer([slow]) as one, FakeServer([slow]) as two, client([one.url, two.url], concurrency=concurrency) as endpoints:
        callers = [threading.Thread(target=endpoints.post_many, args=([Request("/ask", b"", {})] * 6,)) for _ in range(3)]
        for caller in callers:
            caller.start()
        for _ in range(2):
            post(endpoints)  # from a thread of its own: it has to wait for a place as well
        for caller in callers:
            caller.join()
        assert one.most_at_once == two.most_at_once == concurrency
        assert len(one.seen) + len(two.seen) == 20
        assert min(len(one.seen), len(two.seen)) >= 6


def test_a_slow_endpoint_gets_fewer_requests() -> None:
    with FakeServer([Reply(after=0.2)]) as slow, FakeServer([Reply(after=0.01)]) as fast, client([slow.url, fast.url], concurrency=2) as endpoints:
        endpoints.post_many([Request("/ask", b"", {})] * 20)
        assert len(fast.seen) > 2 * len(slow.seen)


def test_a_hanging_endpoint_loses_nothing() -> None:
    with (
        FakeServer([Reply(after=0.3)]) as hanging,
        FakeServer([OK]) as good,
        client([hanging.url, good.url], timeout=0.1, concurrency=2, break_after=2) as endpoints,
    ):
        answers = endpoints.post_many([Request("/ask", b"", {})] * 40)
        assert Counter(answer.status_code for answer in answers if isinstance(answer, httpx.Response)) == {200: 40}
        assert len(hanging.seen) <= 4


def test_a_server_that_is_started_again_loses_nothing() -> None:
    def answer(seen: Seen) -> Reply:
        return Reply(body=seen.body)

    with FakeServer(answer) as first, client(first.url, tries=50, cool_down=0.05, concurrency=2, break_after=2) as endpoints:
        post(endpoints)
        first.stop()
        second: list[FakeServer] = []

        def start_again() -> None:
            time.sleep(0.2)
            second.append(FakeServer(answer, port=first.port).__enter__())

        starter = threading.Thread(target=start_again)
        starter.start()
        answers = endpoints.post_many([Request("/ask", str(i).encode(), {}) for i in range(20)])
        starter.join()
        assert [answer.text for answer in answers if isinstance(answer, httpx.Response)] == [str(i) for i in range(20)]
        assert Counter(seen.body for seen in second[0].seen) == Counter(str(i).encode() for i in range(20))
        second[0].stop()


def test_unreachable_requests_of_many_are_errors_in_their_places() -> None:
    def answer(seen: Seen) -> Reply:
        return Reply(500) if seen.body == b"1" else OK

    with FakeServer(answer) as server, client(server.url, tries=1, break_after=99) as endpoints:
        answers = endpoints.post_many([Request("/ask", str(i).encode(), {}) for i in range(3)])
        assert [type(answer) for answer in answers] == [httpx.Response, Unreachable, httpx.Response]
        assert endpoints.post_many([]) == []


def test_closing_ends_requests_that_wait_and_refuses_new_ones() -> None:
    with FakeServer([Reply(after=0.4)]) as server:
        endpoints = Endpoints("far", [server.url], concurrency=1, tries=2)
        answers: list[Any] = []
        served = threading.Thread(target=lambda: answers.extend(endpoints.post_many([Request("/ask", b"", {})])))

        def wait() -> None:
            with pytest.raises(Unreachable, match="because the client was closed"):
                post(endpoints)
            answers.append("refused")

        waiting = threading.Thread(target=wait)
        for caller in (served, waiting):
            caller.start()
            time.sleep(0.1)
        endpoints.close()
        endpoints.close()
        waiting.join(0.2)
        assert answers == ["refused"]
        with pytest.raises(Unreachable, match="closed"):
            post(endpoints)
        (late,) = endpoints.post_many([Request("/ask", b"", {})])
        assert str(late) == "the client is closed"
        served.join(2)
        assert not served.is_alive()


def test_an_error_of_the_caller_is_not_hidden() -> None:
    class Broken(Exception):
        pass

    def clock() -> float:
        raise Broken

    with FakeServer([OK]) as server, client(server.url, clock=clock) as endpoints, pytest.raises(Broken):
        endpoints.post_many([Request("/ask", b"", {})] * 3)
    with FakeServer([OK]) as server, client(server.url) as endpoints:
        endpoints._client.close()  # by somebody else
        with pytest.raises(RuntimeError, match="closed"):
            post(endpoints)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tries": 0}, "tries must be a whole number of at least 1, not 0"),
        ({"concurrency": 2.5}, "concurrency must be a whole number of at least 1, not 2.5"),
        ({"break_after": True}, "break_after must be"),
        ({"timeout": 0}, "timeout must be a positive number of seconds, not 0"),
        ({"deadline": float("inf")}, "deadline must be"),
        ({"cool_down": "10"}, "cool_down must be"),
        ({"token_env": "FAR_NO_TOKEN"}, "the environment variable FAR_NO_TOKEN, which should hold the token, is not set; export it"),
        ({"token_env": "FAR_BAD_TOKEN"}, "FAR_BAD_TOKEN holds characters that no token has"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_BAD_TOKEN", "two words")
    with pytest.raises(UserError, match=f"reward far: .*{message}") as caught:
        Endpoints("far", ["http://127.0.0.1:1"], **options)
    assert "two words" not in str(caught.value)


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ([], "needs the addresses of its endpoints as a list with at least one"),
        ("http://host:1", "as a list"),
        (["host:8000"], "'host:8000' is no address of an endpoint; write it like http://host:8000"),
        (["ftp://host"], "no address"),
        (["http://"], "no address"),
        (["http://host:port"], "no address"),
        (["http://[::1"], "no address"),
        (["http://host?a=b"], "no address"),
        ([7], "no address"),
        (["http://me:word@host:8000"], "the address of host holds a user or a password; name an environment variable as token_env instead"),
        (["http://host:1", "http://host:1/"], "the endpoint http://host:1/ is listed twice"),
    ],
)
def test_bad_addresses(urls: Any, message: str) -> None:
    with pytest.raises(UserError, match="reward far: ") as caught:
        Endpoints("far", urls)
    assert message in str(caught.value)
    assert "me:word" not in str(caught.value)


def test_the_module_imports_without_httpx_and_says_which_extra_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(UserError, match=r"reward far: needs the package httpx, .* install flowrl-diffusion\[remote\]"):
        Endpoints("far", ["http://127.0.0.1:1"])
    for module in (http_client, chat, judge):
        spec = importlib.util.spec_from_file_location("again", str(module.__file__))
        assert spec is not None
        assert spec.loader is not None
        again = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "again", again)
        spec.loader.exec_module(again)


def test_a_client_that_is_closed_under_a_request_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeServer([OK]) as server, client(server.url) as endpoints:
        send = endpoints._send

        def close_and_send(*args: Any) -> httpx.Response:
            endpoints.close()
            return send(*args)

        monkeypatch.setattr(endpoints, "_send", close_and_send)
        with pytest.raises(Unreachable, match="because the client was closed: .*the client has been closed"):
            post(endpoints)
