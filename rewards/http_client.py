"""A small HTTP client for rewards that are scored elsewhere: several endpoints, time-outs, retries, a circuit breaker, and errors with names.

Called from threads; every thread waits for its own reply. Bodies are bytes that the caller made, never pickles.
One request is sent to the endpoint with the fewest outstanding requests, and to another one after a failure, if there is another. What is retried: no
connection, a time-out, a broken or too large reply, 5xx, and 429. What is not: every other 4xx, and redirects, which would carry the token elsewhere.
An endpoint that fails ``break_after`` times in a row is left alone for ``cool_down`` seconds, then tried with one request; each failed trial doubles the rest,
up to 16 times. Where no endpoint is left, requests wait for the next trial, until all have been down for ``deadline`` seconds; from then on they fail at once.
"""

from __future__ import annotations

import datetime
import functools
import os
import random
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from flowrl.types import UserError
from rewards.checkpoints import require

if TYPE_CHECKING:
    import httpx

__all__ = ["Endpoints", "Refused", "Request", "Unreachable"]

_MAX_REPLY_BYTES = 64 * 2**20
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds between the tries of one request
_NEVER = float("-inf")


class Refused(Exception):
    """An endpoint answered that it will not serve this request, now or later.

    Attributes:
        url: what was asked. status: of the answer, 3xx or 4xx. text: the start of its body, at most 500 characters.
    """

    def __init__(self, url: str, status: int, text: str) -> None:
        super().__init__(f"{url} answered {status}{': ' if text else ''}{text}")
        self.url, self.status, self.text = url, status, text


class Unreachable(Exception):
    """No endpoint gave a usable answer before the tries or the time ran out.

    Attributes:
        reasons: endpoint -> why its last try failed.
    """

    def __init__(self, summary: str, reasons: Mapping[str, str]) -> None:
        told = "; ".join(f"{url}: {why}" for url, why in reasons.items())
        super().__init__(f"{summary}: {told}" if told else summary)
        self.reasons = dict(reasons)


class Request(NamedTuple):
    """One POST of `Endpoints.post_many`."""

    path: str
    content: bytes
    headers: Mapping[str, str]


class Endpoints:
    """Servers that can all answer the same requests.

    Args:
        owner: name of the reward, for messages.
        urls: ``http://host:port`` each, with a path in front of every request's path if the server lives below one.
        token_env: the environment variable that holds a bearer token; None = no token is sent.
        timeout: seconds that one try may take. deadline: seconds that a request may take from its first try to its last.
        tries: of one request, over all endpoints.
        concurrency: requests to one endpoint at a time.
        break_after: failures in a row after which an endpoint is left alone. cool_down: seconds of rest until it is tried again.
        clock, sleep: for tests; monotonic seconds.
    Raises:
        UserError: an argument out of range, an address that is none, a variable that is not set, or httpx is not installed.
    """

    def __init__(
        self,
        owner: str,
        urls: Sequence[str],
        *,
        token_env: str | None = None,
        timeout: float = 60,
        deadline: float = 180,
        tries: int = 4,
        concurrency: int = 8,
        break_after: int = 5,
        cool_down: float = 10,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        for name, value, least in (("tries", tries, 1), ("concurrency", concurrency, 1), ("break_after", break_after, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"reward {owner}: {name} must be a whole number of at least {least}, not {value!r}")
        for name, seconds in (("timeout", timeout), ("deadline", deadline), ("cool_down", cool_down)):
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
                raise UserError(f"reward {owner}: {name} must be a positive number of seconds, not {seconds!r}")
        self._endpoints = [_Endpoint(url) for url in _addresses(owner, urls)]
        self._headers = _authorization(owner, token_env)
        self._httpx = require(owner, "httpx", "remote")
        self._timeout, self._deadline, self._tries, self._concurrency = timeout, deadline, tries, concurrency
        self._break_after, self._cool_down = break_after, cool_down
        self._clock, self._stop = clock, threading.Event()
        self._sleep = sleep or self._stop.wait
        self._random = random.Random()  # jitter must not touch the state that a run depends on
        self._room = threading.Condition()
        workers = concurrency * len(self._endpoints)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=f"reward-{owner}")
        self._client = self._httpx.Client(
            headers=self._headers,
            verify=_certificates(),
            limits=self._httpx.Limits(max_connections=workers, max_keepalive_connections=workers),
            mounts={f"all://{host}": None for host in ("127.0.0.1", "localhost", "[::1]")},  # a proxy from the environment cannot know this machine's ports
        )

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses, without a slash at the end."""
        return tuple(endpoint.url for endpoint in self._endpoints)

    def post(self, path: str, *, content: bytes, headers: Mapping[str, str]) -> httpx.Response:
        """The 2xx answer to a POST, read completely.

        Raises:
            Refused: 3xx, or 4xx but 429.
            Unreachable: no usable answer in all tries, or before the deadline, or after `close`.
        """
        return self._ask("POST", path, content, headers)

    def get(self, path: str) -> httpx.Response:
        """The 2xx answer to a GET; raises as `post`."""
        return self._ask("GET", path, None, {})

    def post_many(self, requests: Sequence[Request]) -> list[httpx.Response | Refused | Unreachable]:
        """Answers or errors in the order of the requests, which are sent concurrently from a pool of threads. A request's deadline starts when it is sent."""
        if self._stop.is_set():
            return [Unreachable("the client is closed", {}) for _ in requests]
        pending: list[Future[httpx.Response | Refused | Unreachable]] = [self._pool.submit(self._post_or_error, request) for request in requests]
        try:
            return [future.result() for future in pending]
        except BaseException:
            for future in pending:
                future.cancel()
            raise

    def close(self) -> None:
        """Give back threads and connections; requests that wait for an endpoint fail at once. A second call does nothing."""
        self._stop.set()
        with self._room:
            self._room.notify_all()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _post_or_error(self, request: Request) -> httpx.Response | Refused | Unreachable:
        try:
            return self.post(request.path, content=request.content, headers=request.headers)
        except (Refused, Unreachable) as error:
            return error

    def _ask(self, method: str, path: str, content: bytes | None, headers: Mapping[str, str]) -> httpx.Response:
        start = self._clock()
        give_up = start + self._deadline
        reasons: dict[str, str] = {}
        for attempt in range(self._tries):
            if attempt and not self._another(reasons):
                pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (attempt - 1)) * self._random.uniform(0.5, 1)
                self._sleep(max(0.0, min(pause, give_up - self._clock())))
            taken = self._take(give_up, reasons)
            if isinstance(taken, str):
                raise Unreachable(f"gave up after {attempt} tries in {self._clock() - start:.1f} s, {taken}", reasons or self._troubles())
            endpoint, is_trial = taken
            answer = self._try(endpoint, is_trial, method, path, content, headers, max(1e-3, min(self._timeout, give_up - self._clock())))
            if isinstance(answer, str):
                reasons[endpoint.url] = answer
            elif answer.is_success:
                return answer
            else:
                raise Refused(endpoint.url + path, answer.status_code, _excerpt(answer))
        raise Unreachable(f"gave up after {self._tries} tries in {self._clock() - start:.1f} s", reasons)

    def _try(
        self, endpoint: _Endpoint, is_trial: bool, method: str, path: str, content: bytes | None, headers: Mapping[str, str], seconds: float
    ) -> httpx.Response | str:
        """The answer of an endpoint where a place was taken; or, where another try may help, why there is none."""
        answer: httpx.Response | str = "interrupted"
        healthy, busy_until = False, _NEVER
        try:
            response = self._send(method, endpoint.url + path, content, headers, seconds)
            status = response.status_code
            wait = _retry_after(response.headers.get("retry-after")) if status in (429, 503) else None
            busy_until = _NEVER if wait is None else self._clock() + wait
            healthy = status < 500 or wait is not None
            answer = f"HTTP {status} {_excerpt(response)}".strip() if status == 429 or status >= 500 else response
        except self._httpx.HTTPError as error:
            answer = f"{type(error).__name__}: {error}".rstrip(": ")
        except RuntimeError as error:  # what httpx raises once it is closed
            if not self._stop.is_set():
                raise
            answer = str(error)
        finally:
            self._give_back(endpoint, "" if healthy else str(answer), busy_until, is_trial)
        return answer

    def _send(self, method: str, url: str, content: bytes | None, headers: Mapping[str, str], seconds: float) -> httpx.Response:
        """One try, of ``seconds`` in all once the first byte of the answer is there; until then for each of connecting, sending and waiting."""
        end, body = self._clock() + seconds, bytearray()
        with self._client.stream(method, url, content=content, headers=headers, timeout=seconds) as response:
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > _MAX_REPLY_BYTES:
                    raise self._httpx.DecodingError(f"the reply has more than {_MAX_REPLY_BYTES} bytes")
                if self._clock() > end:
                    raise self._httpx.ReadTimeout(f"the reply was not complete after {seconds:g} s")
            kept = [(name, value) for name, value in response.headers.items() if name not in ("content-encoding", "content-length", "transfer-encoding")]
        whole: httpx.Response = self._httpx.Response(response.status_code, headers=kept, content=bytes(body), request=response.request)
        return whole

    def _another(self, reasons: Mapping[str, str]) -> bool:
        """Whether an endpoint that has not failed this request could be asked right away."""
        with self._room:
            now = self._clock()
            return any(endpoint.url not in reasons and endpoint.rests_until <= now for endpoint in self._endpoints)

    def _take(self, give_up: float, reasons: Mapping[str, str]) -> tuple[_Endpoint, bool] | str:
        """Wait for a place at an endpoint: the endpoint and whether this is a trial after a rest, or why there was none."""
        while True:
            with self._room:
                if self._stop.is_set():
                    return "because the client was closed"
                now = self._clock()
                if now >= give_up:
                    return "the deadline"
                free = [endpoint for endpoint in self._endpoints if endpoint.rests_until <= now and endpoint.outstanding < self._places(endpoint)]
                if free:
                    chosen = min(free, key=lambda endpoint: (endpoint.url in reasons, endpoint.outstanding, endpoint.served))
                    is_trial = chosen.failures >= self._break_after
                    chosen.outstanding += 1
                    chosen.served += 1
                    return chosen, is_trial
                until = give_up
                if all(endpoint.failures >= self._break_after for endpoint in self._endpoints):
                    until = min(until, max(endpoint.down_since for endpoint in self._endpoints) + self._deadline)
                if now >= until:
                    return f"because all endpoints have been down for more than {self._deadline:g} s"
                wake = min([until, *(endpoint.rests_until for endpoint in self._endpoints if endpoint.rests_until > now)]) - now
                if any(endpoint.outstanding for endpoint in self._endpoints):
                    self._room.wait(wake)
                    continue
            self._sleep(wake)

    def _places(self, endpoint: _Endpoint) -> int:
        return 1 if endpoint.failures >= self._break_after else self._concurrency

    def _give_back(self, endpoint: _Endpoint, trouble: str, busy_until: float, was_trial: bool) -> None:
        with self._room:
            endpoint.outstanding -= 1
            endpoint.busy_until = max(endpoint.busy_until, busy_until)
            if trouble:
                endpoint.trouble = trouble
                if not endpoint.failures:
                    endpoint.down_since = self._clock()
                endpoint.failures += 1
                if was_trial or endpoint.failures == self._break_after:
                    endpoint.open_until = self._clock() + self._cool_down * 2 ** min(endpoint.rests, 4)
                    endpoint.rests += 1
            else:
                endpoint.failures, endpoint.rests, endpoint.open_until, endpoint.trouble = 0, 0, _NEVER, ""
            self._room.notify_all()

    def _troubles(self) -> dict[str, str]:
        with self._room:
            return {endpoint.url: endpoint.trouble or "busy" for endpoint in self._endpoints}


@dataclass(slots=True)
class _Endpoint:
    """What is known of one server. ``open_until``: the circuit breaker's rest; ``busy_until``: the rest that the server asked for."""

    url: str
    outstanding: int = 0
    served: int = 0
    failures: int = 0
    rests: int = 0
    down_since: float = _NEVER
    open_until: float = _NEVER
    busy_until: float = _NEVER
    trouble: str = ""

    @property
    def rests_until(self) -> float:
        return max(self.open_until, self.busy_until)


def _addresses(owner: str, urls: Sequence[str]) -> list[str]:
    if isinstance(urls, str) or not urls:
        raise UserError(f"reward {owner}: needs the addresses of its endpoints as a list with at least one, got {urls!r}")
    found: list[str] = []
    for url in urls:
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and not parts.fragment and parts.port != 0
        except (ValueError, AttributeError):
            good = False
        if not good:
            raise UserError(f"reward {owner}: {url!r} is no address of an endpoint; write it like http://host:8000")
        if parts.username is not None or parts.password is not None:
            raise UserError(f"reward {owner}: the address of {parts.hostname} holds a user or a password; name an environment variable as token_env instead")
        if url.rstrip("/") in found:
            raise UserError(f"reward {owner}: the endpoint {url} is listed twice; list it once and raise concurrency")
        found.append(url.rstrip("/"))
    return found


def _authorization(owner: str, token_env: str | None) -> dict[str, str]:
    if token_env is None:
        return {}
    token = os.environ.get(token_env, "").strip()
    if not token:
        raise UserError(f"reward {owner}: the environment variable {token_env}, which should hold the token, is not set; export it")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"reward {owner}: the environment variable {token_env} holds characters that no token has; export the token alone")
    return {"Authorization": f"Bearer {token}"}


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Of the authorities that are trusted; read once, which takes 0.1 s."""
    import httpx

    return httpx.create_ssl_context()


def _retry_after(header: str | None) -> float | None:
    """Seconds from a Retry-After header, a number or a date; None where there is none that can be read."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


def _excerpt(response: httpx.Response) -> str:
    text = " ".join(response.text.split())
    return text if len(text) <= 500 else text[:497] + "..."
