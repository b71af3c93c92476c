"""An HTTP server on a free port of this machine that answers what a test says, for rewards that are scored elsewhere."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Seen:
    """A request as it arrived; header names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    """An answer. after: seconds before it starts. hang_up: close the connection instead. missing: bytes of the promised length that never come; the
    connection is closed. drip: seconds between single bytes of the body."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    after: float = 0
    hang_up: bool = False
    missing: int = 0
    drip: float = 0


class FakeServer:
    """``answer`` is called with each request, from many threads; a list is used up in the order of arrival, its last entry again and again.

    Attributes: seen (in order of arrival), most_at_once (requests), url.
    """

    def __init__(self, answer: Callable[[Seen], Reply] | Sequence[Reply], port: int = 0) -> None:
        self.answer = answer
        self.seen: list[Seen] = []
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                outer._connections.append(self.connection)

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                outer._serve(self)

            do_POST = do_GET

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 128

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that hung up is no news."""

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("content-length", 0)))
        seen = Seen(handler.command, handler.path, {name.lower(): value for name, value in handler.headers.items()}, body)
        with self._lock:
            index = len(self.seen)
            self.seen.append(seen)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            reply = self.answer(seen) if callable(self.answer) else self.answer[min(index, len(self.answer) - 1)]
            time.sleep(reply.after)
        finally:
            with self._lock:
                self._now -= 1
        if reply.hang_up:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        handler.send_response(reply.status)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        handler.send_header("content-length", str(len(reply.body) + reply.missing))
        handler.end_headers()
        if reply.drip:
            for i in range(len(reply.body)):
                handler.wfile.write(reply.body[i : i + 1])
                time.sleep(reply.drip)
        else:
            handler.wfile.write(reply.body)
        if reply.missing:
            handler.close_connection = True

    def __enter__(self) -> FakeServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """As when the process is killed: nobody listens, and the open connections break."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def closed_port() -> int:
    """A port of this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
