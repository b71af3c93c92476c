"""A reward behind HTTP, in a process and an environment of its own, so that conflicting packages never meet.

    POST /v1/score    a batch (rewards/wire.py) -> scores           GET /v1/info      facts, version, hash of the weights, limits
    POST /v1/check    prompts -> can they ever be scored?           GET /v1/health    answers while a batch is being scored
                                                                    GET /metrics      for Prometheus
Errors are JSON, {"error": kind, "message": one line}:
    400 bad_request or client_gone, 401 unauthorized, 408 slow_body, 413 too_large, 415 unsupported_type, 422 not_scored (the reward says why),
    500 reward_failed or internal, 503 busy or closing (with Retry-After).

One thread owns the reward (rewards/batching.py). What is read before a request is understood is bounded: its bytes, its seconds, and the number of requests.
It listens on this machine only, unless there is a token. Nothing is unpickled. A token in clear over http is no protection on a network that others read:
put a proxy with TLS, or a tunnel, in between.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

from flowrl.types import Reward, SampleBatch, Scores, UserError
from rewards.batching import NotScored, Scorer
from rewards.checkpoints import require
from rewards.wire import API, BATCH_TYPE, JSON_TYPE, WireError, decode_prompts, decode_request, plain_info, plain_scores

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from fastapi.responses import Response

__all__ = ["make_app", "serve"]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
"""What ASGI gives an application to read the next part of a request with."""

_log = logging.getLogger(__name__)
_MIB = 2**20
_KINDS = {400: "bad_request", 401: "unauthorized", 408: "slow_body", 413: "too_large", 415: "unsupported_type"}
_OUTCOMES = {"refused": (422, "not_scored"), "failed": (500, "reward_failed"), "closing": (503, "closing"), "busy": (503, "busy")}
_RETRY_AFTER = 1  # seconds
_GRACE = 30  # seconds that requests have to end when the server closes
_DRAIN = 2  # seconds that the rest of a body is read before its refusal is sent
_QUICK = _MIB  # bytes of a binary body that are decoded in less time than a thread takes to start
_IDLE = 600  # seconds that a connection may rest between two requests: a training step, say


def make_app(
    reward: Reward,
    *,
    version: str = "",
    token: str | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    max_batch: int = 64,
    max_wait_ms: float = 2.0,
    max_body_mib: float = 256.0,
    max_queue: int = 64,
    body_seconds: float = 60.0,
) -> FastAPI:
    """The web application of one reward. It loads the reward when it starts, and gives it back when it ends.

    Args:
        version: of the reward's code and arguments; clients compare it and keep it with their cache.
        token: that every request but /v1/health must bring as ``Authorization: Bearer``; None = no token.
        device, dtype: to load the reward with; None = the CPU, and what the reward asks for.
        max_batch: samples up to which waiting requests are scored together; 1 = never. max_wait_ms: that the oldest of them waits for others.
        max_body_mib: of one request, and of its pictures as uint8. max_queue: requests inside the server at a time; further ones are told to come back.
        body_seconds: that the body of a request may take to arrive.
    Raises:
        UserError: a limit out of range, or a package is missing.
    """
    for name, value, least in (("max_batch", max_batch, 1), ("max_queue", max_queue, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"serve-reward: {name} must be a whole number of at least {least}, not {value!r}")
    for name, number, zero in (("max_wait_ms", max_wait_ms, True), ("max_body_mib", max_body_mib, False), ("body_seconds", body_seconds, False)):
        if isinstance(number, bool) or not isinstance(number, int | float) or not (0 <= number < float("inf")) or not (zero or number):
            raise UserError(f"serve-reward: {name} must be a {'number that is not negative' if zero else 'positive number'}, not {number!r}")
    fastapi = require(reward.info.name, "fastapi", "server")
    routing = require(reward.info.name, "starlette.routing", "server")
    metrics = _Metrics(reward.info.name)
    scorer = Scorer(reward, device=device or torch.device("cpu"), dtype=dtype, max_batch=max_batch, max_wait=max_wait_ms / 1000, observe=metrics.call)
    service = _Service(scorer, metrics, reward, version, token, int(max_body_mib * _MIB), max_queue, max_batch, body_seconds)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(scorer.start)
        yield
        await asyncio.to_thread(scorer.close)

    routes = [
        routing.Route("/v1/score", service.answering(service.score), methods=["POST"]),
        routing.Route("/v1/check", service.answering(service.check), methods=["POST"]),
        routing.Route("/v1/info", service.answering(service.info), methods=["GET"]),
        routing.Route("/v1/health", service.health, methods=["GET"]),
        routing.Route("/metrics", service.answering(service.metrics_page), methods=["GET"]),
    ]
    app: FastAPI = fastapi.FastAPI(title=f"reward {scorer.name}", routes=routes, lifespan=lifespan, openapi_url=None)
    app.state.scorer = scorer
    return app


def serve(
    reward: Reward,
    *,
    host: str = "127.0.0.1",
    port: int = 8100,
    token_env: str | None = None,
    open_to_all: bool = False,
    announce: Callable[[str], object] = lambda url: None,
    **options: Any,
) -> None:
    """Serve a reward until SIGTERM or SIGINT, then finish what is there and return.

    Args:
        port: 0 = any that is free. announce: is told the address once requests can come.
        token_env: the environment variable that holds the token.
        open_to_all: listen on other addresses than this machine's own without a token.
        options: of `make_app`.
    Raises:
        UserError: the address cannot be used, or may not without a token; the variable is not set; the reward cannot be loaded.
    """
    token = _token(token_env)
    if token is None and not open_to_all and not _is_loopback(host):
        raise UserError(
            f"serve-reward: on {host} everybody who reaches this machine could use the reward; name the environment variable of a token with --token-env, "
            "or stay on 127.0.0.1"
        )
    uvicorn = require(reward.info.name, "uvicorn", "server")
    app = make_app(reward, token=token, **options)
    with _bound(host, port) as listener:
        app.state.scorer.start()  # before the port opens: who can connect can score
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE, timeout_keep_alive=_IDLE)
        listener.listen(128)
        shown = f"[{host}]" if ":" in host else host
        announce(f"http://{shown}:{listener.getsockname()[1]}")
        with _signals_end_quietly():
            uvicorn.Server(config).run(sockets=[listener])
        app.state.scorer.close()


class _Service:
    """The requests of one application; runs in its event loop."""

    def __init__(
        self,
        scorer: Scorer,
        metrics: _Metrics,
        reward: Reward,
        version: str,
        token: str | None,
        max_bytes: int,
        max_queue: int,
        max_batch: int,
        body_seconds: float,
    ) -> None:
        self._scorer, self._metrics, self._reward, self._version = scorer, metrics, reward, version
        self._token = None if token is None else f"bearer {token}".encode()
        self._max_bytes, self._max_queue, self._max_batch, self._body_seconds = max_bytes, max_queue, max_batch, body_seconds
        self._inside = 0  # requests between their admission and their answer

    def answering(self, work: Callable[[Request, _Upload], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """``work`` behind the token, with its errors as answers, counted and timed."""

        async def answer(request: Request) -> Response:
            start, upload = time.perf_counter(), _Upload(request.receive, self._max_bytes)
            outcome, status, message = "ok", 200, ""
            try:
                self._authorize(request)
                return await work(request, upload)
            except WireError as error:
                outcome, status, message = _KINDS[error.status], error.status, str(error)
            except NotScored as error:
                (status, outcome), message = _OUTCOMES[error.kind], str(error)
            except _ClientGone:
                outcome, status, message = "client_gone", 400, "the client left before its answer"
            except Exception:  # noqa: BLE001 - a bug of ours must not end the server
                _log.exception("a request failed")
                outcome, status, message = "internal", 500, "the server made a mistake; its log says more"
            finally:
                self._metrics.request(request.url.path, outcome, time.perf_counter() - start)
            if status != 408:
                await upload.drain()
            return _error(status, outcome, message, close=not upload.complete)

        return answer

    async def score(self, request: Request, upload: _Upload) -> Response:
        with self._admission():
            body = await self._body(request, upload)
            kind = request.headers.get("content-type", "")
            if kind == BATCH_TYPE and len(body) <= _QUICK:
                request_id, batch = decode_request(body, kind, self._max_bytes)
            else:
                request_id, batch = await asyncio.to_thread(decode_request, body, kind, self._max_bytes)
            del body
            scores = await self._scored(upload, batch)
        self._metrics.scored(scores)
        return _json(200, {"api": API, "request_id": request_id, "reward": self._scorer.name, "version": self._version, **plain_scores(scores)})

    async def check(self, request: Request, upload: _Upload) -> Response:
        with self._admission():
            prompts = await asyncio.to_thread(decode_prompts, await self._body(request, upload))
            await asyncio.to_thread(self._scorer.check_prompts, prompts)
        return _json(200, {"api": API, "prompts": len(prompts)})

    async def info(self, request: Request, upload: _Upload) -> Response:
        del request, upload
        facts = {
            "api": API,
            "reward": self._scorer.name,
            "version": self._version,
            "weights_sha256": self._scorer.weights_sha256,
            "max_body_bytes": self._max_bytes,
            "max_batch": self._max_batch,
            "info": plain_info(self._reward.info),
        }
        return _json(200, facts)

    async def health(self, request: Request) -> Response:
        del request
        return _json(200, {"status": "ok", "reward": self._scorer.name, "requests": self._inside, "scoring_seconds": round(self._scorer.busy_seconds, 3)})

    async def metrics_page(self, request: Request, upload: _Upload) -> Response:
        del request, upload
        return self._metrics.page(inside=self._inside, waiting=self._scorer.waiting)

    def _authorize(self, request: Request) -> None:
        if self._token is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = f"{scheme.lower()} {token.strip()}".encode("utf-8", "replace")
        if not hmac.compare_digest(given, self._token):
            raise WireError("the token is missing or wrong; send it as Authorization: Bearer", 401)

    @contextmanager
    def _admission(self) -> Iterator[None]:
        if self._inside >= self._max_queue:
            raise NotScored("busy", f"{self._inside} requests are inside already; come back later")
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    async def _body(self, request: Request, upload: _Upload) -> bytearray:
        coding = request.headers.get("content-encoding", "identity")
        if coding != "identity":
            raise WireError(f"the body has the content encoding {coding[:40]!r}; send it as it is", 415)
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            raise _too_large(self._max_bytes)
        try:
            async with asyncio.timeout(self._body_seconds):
                return await upload.read()
        except TimeoutError as error:
            raise WireError(f"the body was not complete after {self._body_seconds:g} s", 408) from error

    async def _scored(self, upload: _Upload, batch: SampleBatch) -> Scores:
        """The scores; the batch loses its turn when the client goes."""
        scores = asyncio.wrap_future(self._scorer.submit(batch))
        gone = asyncio.ensure_future(upload.gone())
        try:
            both: list[asyncio.Future[Any]] = [scores, gone]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not scores.done():
                raise _ClientGone
            return scores.result()
        finally:
            scores.cancel()
            gone.cancel()


class _ClientGone(Exception):
    pass


class _Upload:
    """The body of a request as it arrives, never more of it than the limit."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive, self._max_bytes = receive, max_bytes
        self.complete = False  # nothing more will come

    async def read(self) -> bytearray:
        body = bytearray()
        while not self.complete:
            body += await self._chunk()
            if len(body) > self._max_bytes:
                raise _too_large(self._max_bytes)
        return body

    async def drain(self) -> None:
        """Read and forget what the client still sends, within bounds: a connection that is closed in the middle of it would lose the answer."""
        seen = 0
        with suppress(TimeoutError, _ClientGone):
            async with asyncio.timeout(_DRAIN):
                while not self.complete and seen <= self._max_bytes:
                    seen += len(await self._chunk())

    async def gone(self) -> None:
        """Wait until the client leaves; only after `read`."""
        await self._receive()

    async def _chunk(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.complete = True
            raise _ClientGone
        self.complete = not message.get("more_body", False)
        chunk: bytes = message.get("body", b"")
        return chunk


class _Metrics:
    """What Prometheus is told, in a registry of its own."""

    def __init__(self, reward: str) -> None:
        client = require(reward, "prometheus_client", "server")
        self._registry = client.CollectorRegistry()
        self._latest, self._type = client.generate_latest, client.CONTENT_TYPE_LATEST
        own = {"registry": self._registry}
        prefix = "flowrl_reward"
        self._requests = client.Counter(f"{prefix}_requests", "Requests by path and outcome.", ["path", "outcome"], **own)
        self._errors = client.Counter(f"{prefix}_errors", "Requests without the wanted answer, by kind.", ["kind"], **own)
        self._samples = client.Counter(f"{prefix}_samples", "Samples scored, by validity.", ["valid"], **own)
        self._seconds = client.Histogram(f"{prefix}_request_seconds", "From a request's head to its answer.", ["path"], **own)
        self._call_seconds = client.Histogram(f"{prefix}_call_seconds", "Of one call of the reward.", **own)
        self._batch = client.Histogram(f"{prefix}_batch_samples", "Samples in one call of the reward.", buckets=[2**k for k in range(13)], **own)
        self._inside = client.Gauge(f"{prefix}_requests_inside", "Requests between admission and answer.", **own)
        self._waiting = client.Gauge(f"{prefix}_queue_length", "Requests that wait for the reward.", **own)

    def request(self, path: str, outcome: str, seconds: float) -> None:
        self._requests.labels(path, outcome).inc()
        self._seconds.labels(path).observe(seconds)
        if outcome != "ok":
            self._errors.labels(outcome).inc()

    def call(self, samples: int, seconds: float) -> None:
        self._batch.observe(samples)
        self._call_seconds.observe(seconds)

    def scored(self, scores: Scores) -> None:
        valid = int(scores.valid.sum())
        self._samples.labels("true").inc(valid)
        self._samples.labels("false").inc(len(scores.valid) - valid)

    def page(self, *, inside: int, waiting: int) -> Response:
        from fastapi.responses import Response

        self._inside.set(inside)
        self._waiting.set(waiting)
        return Response(self._latest(self._registry), media_type=self._type)


def _json(status: int, content: dict[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    from fastapi.responses import Response

    return Response(json.dumps(content, allow_nan=False, ensure_ascii=False).encode(), status, headers, JSON_TYPE)


def _error(status: int, kind: str, message: str, *, close: bool) -> Response:
    headers = {503: {"Retry-After": str(_RETRY_AFTER)}, 401: {"WWW-Authenticate": "Bearer"}}.get(status, {})
    if close:  # what else of the body may come is not read
        headers["Connection"] = "close"
    return _json(status, {"error": kind, "message": message[:400]}, headers)


def _too_large(limit: int) -> WireError:
    return WireError(f"the body has more than {limit} bytes, the limit of this server; send fewer samples in a request", 413)


def _token(token_env: str | None) -> str | None:
    if token_env is None:
        return None
    token = os.environ.get(token_env, "").strip()
    if not token:
        raise UserError(f"serve-reward: the environment variable {token_env}, which should hold the token, is not set; export it")
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bound(host: str, port: int) -> socket.socket:
    """A socket on the address, not yet listening."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)  # asyncio sends without delay (TCP_NODELAY) only where the protocol is named
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(f"serve-reward: {host}:{port} is no address of this machine ({error})") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(f"serve-reward: {host}:{port} cannot be used ({error}); choose another --port, or stop what uses it") from error
    return listener


@contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """uvicorn closes on SIGTERM and SIGINT and then raises the signal once more: here that is no news, so that the process ends with 0."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda number, frame: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
