"""A small pool of worker processes for code that may hang or crash: every task has a time limit, kept by killing the process.

This file is two things. Imported, it gives `WorkerPool`. Run as a script, it is one worker: it loads one function from one file and answers tasks over its
standard input and output, one JSON line each. A worker imports neither torch nor this package, so it starts in a fraction of a second, and it has one thread,
so it may fork safely. Only plain JSON values go to and fro.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

__all__ = ["Outcome", "WorkerError", "WorkerPool", "serve"]

_START_S = 60.0  # to import what the function needs; a machine under load may take its time
_MAX_STARTS = 3  # in a row that end before they are ready


class WorkerError(Exception):
    """No worker can be started: the function's file, or something that it imports, does not load."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a task: the function's value, or, where there is none, the problem in a few words."""

    value: Any = None
    problem: str | None = None


@dataclass(eq=False, slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    deadline: float
    task: int | None = None  # None = still starting, or idle
    ready: bool = False
    buffer: bytearray = field(default_factory=bytearray)


class WorkerPool:
    """Up to ``num_workers`` processes that call ``function`` of the file ``path``; started once, reused, and replaced where one had to be killed.

    They end at ``close``, when the pool is garbage, and at the exit of the interpreter; if this process is killed, they end as soon as they have nothing to do.

    Args:
        path: a file that can be run on its own, without its package.
        function: a name in it, called with the task's values as positional arguments; it returns a JSON value.
        num_workers: processes at once, at least 1. timeout_s: for one task, in seconds of wall time.
    """

    def __init__(self, path: Path, function: str, num_workers: int, timeout_s: float) -> None:
        self.num_workers, self.timeout_s = num_workers, timeout_s
        self._head = json.dumps({"path": str(path), "function": function, "sys_path": sys.path}).encode() + b"\n"
        self._workers: list[_Worker] = []
        self._lock, self._failed_starts = threading.Lock(), 0
        self._finalizer = weakref.finalize(self, _kill_all, self._workers)  # also called at the exit of the interpreter

    def start(self) -> None:
        """Start the workers and wait until one is ready.

        Raises:
            WorkerError: the file or its function cannot be loaded.
        """
        self.map([], wait_for_one=True)

    def map(self, tasks: Sequence[Sequence[Any]], wait_for_one: bool = False) -> list[Outcome]:
        """Call the function with every task's arguments; the outcomes are in the order of the tasks, whatever finished first. May be called from any thread.

        A task beyond the time limit has its worker killed and the problem "timed out after 2 s"; one whose process ended, or whose function raised, says so.

        Raises:
            WorkerError: no worker can be started.
        """
        outcomes: list[Outcome | None] = [None] * len(tasks)
        waiting = deque(range(len(tasks)))
        with self._lock, selectors.DefaultSelector() as selector:
            try:
                for worker in self._workers:
                    selector.register(_stdout(worker), selectors.EVENT_READ, worker)
                while None in outcomes or (wait_for_one and not any(worker.ready for worker in self._workers)):
                    needed = len(waiting) + sum(worker.task is not None for worker in self._workers)
                    wanted = self.num_workers if wait_for_one else min(self.num_workers, needed)
                    while len(self._workers) < wanted:
                        worker = self._spawn()
                        selector.register(_stdout(worker), selectors.EVENT_READ, worker)
                    for worker in [worker for worker in self._workers if worker.ready and worker.task is None]:
                        if waiting and self._give(worker, waiting[0], tasks[waiting[0]]):
                            waiting.popleft()
                        elif waiting:
                            self._drop(worker, selector)  # it died while it was idle; the task waits for another
                    self._collect(selector, outcomes)
            finally:
                if any(worker.task is not None for worker in self._workers):  # interrupted: nobody waits for these answers
                    _kill_all(self._workers)
        return [outcome for outcome in outcomes if outcome is not None]

    def close(self) -> None:
        """Kill the workers. A later `map` starts new ones."""
        with self._lock:
            _kill_all(self._workers)

    def _spawn(self) -> _Worker:
        command = [sys.executable, "-P", str(Path(__file__).resolve())]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        worker = _Worker(process, time.monotonic() + _START_S)
        self._workers.append(worker)
        _send(worker, self._head)
        return worker

    def _give(self, worker: _Worker, index: int, task: Sequence[Any]) -> bool:
        if not _send(worker, json.dumps(list(task)).encode() + b"\n"):
            return False
        worker.task, worker.deadline = index, time.monotonic() + self.timeout_s
        return True

    def _collect(self, selector: selectors.BaseSelector, outcomes: list[Outcome | None]) -> None:
        """Wait for the next thing to happen: an answer, a death, or a deadline."""
        busy = [worker for worker in self._workers if worker.task is not None or not worker.ready]
        pause = min((worker.deadline for worker in busy), default=time.monotonic()) - time.monotonic()
        for key, _ in selector.select(max(0.0, pause)):
            worker: _Worker = key.data
            chunk = os.read(key.fd, 1 << 16)
            worker.buffer += chunk
            if not chunk:
                self._bury(worker, selector, outcomes, f"the worker process ended with code {worker.process.wait()}")
            elif worker.buffer.endswith(b"\n"):
                self._answer(worker, json.loads(bytes(worker.buffer)), outcomes)
        now = time.monotonic()
        for worker in [worker for worker in self._workers if (worker.task is not None or not worker.ready) and worker.deadline <= now]:
            self._bury(worker, selector, outcomes, f"timed out after {self.timeout_s:g} s")

    def _answer(self, worker: _Worker, answer: dict[str, Any], outcomes: list[Outcome | None]) -> None:
        worker.buffer.clear()
        if not worker.ready:
            if answer["problem"] is not None:
                _kill_all(self._workers)
                raise WorkerError(f"a worker process could not start: {answer['problem']}")
            worker.ready, self._failed_starts = True, 0
            return
        assert worker.task is not None, "a worker answers once for each task"
        outcomes[worker.task] = Outcome(answer["value"], answer["problem"])
        worker.task = None

    def _bury(self, worker: _Worker, selector: selectors.BaseSelector, outcomes: list[Outcome | None], problem: str) -> None:
        self._drop(worker, selector)
        if not worker.ready:
            self._failed_starts += 1
            if "ended" not in problem or self._failed_starts == _MAX_STARTS:
                _kill_all(self._workers)
                raise WorkerError(f"a worker process could not start: {problem if 'ended' in problem else f'not ready after {_START_S:g} s'}")
        if worker.task is not None:
            outcomes[worker.task] = Outcome(problem=problem)

    def _drop(self, worker: _Worker, selector: selectors.BaseSelector) -> None:
        selector.unregister(_stdout(worker))
        self._workers.remove(worker)
        _kill(worker)


def _stdout(worker: _Worker) -> IO[bytes]:
    assert worker.process.stdout is not None, "it was opened as a pipe"
    return worker.process.stdout


def _send(worker: _Worker, line: bytes) -> bool:
    assert worker.process.stdin is not None, "it was opened as a pipe"
    try:
        worker.process.stdin.write(line)
        worker.process.stdin.flush()
    except BrokenPipeError:
        return False
    return True


def _kill_all(workers: list[_Worker]) -> None:
    for worker in workers:
        _kill(worker)
    workers.clear()


def _kill(worker: _Worker) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.process.pid, signal.SIGKILL)  # its session is its own, so this takes what it started too
    worker.process.wait()
    _stdout(worker).close()
    with contextlib.suppress(BrokenPipeError):
        assert worker.process.stdin is not None, "it was opened as a pipe"
        worker.process.stdin.close()


def serve(source: IO[bytes], answers: IO[bytes]) -> None:
    """The life of a worker: read the head, load the function, say so, answer tasks until the source ends. Never raises; what fails is answered as a problem."""

    def answer(value: Any, problem: str | None) -> None:
        answers.write(json.dumps({"value": value, "problem": problem}).encode() + b"\n")
        answers.flush()

    try:
        function = _load(json.loads(source.readline()))
    except BaseException as error:  # noqa: BLE001  - whatever the file raises is the answer
        answer(None, _describe(error))
        return
    answer(None, None)
    for line in source:
        try:
            value = function(*json.loads(line))
            json.dumps(value)
        except BaseException as error:  # noqa: BLE001  - as above, and a function that exits must not end the worker
            answer(None, _describe(error))
        else:
            answer(value, None)


def _load(head: dict[str, Any]) -> Callable[..., Any]:
    sys.path[:] = head["sys_path"]
    spec = importlib.util.spec_from_file_location("worker_function", head["path"])
    assert spec is not None and spec.loader is not None, "the path ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, head["function"])
    return function


def _describe(error: BaseException) -> str:
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= 200 else line[:197] + "..."


if __name__ == "__main__":  # pragma: no cover - the worker's own process; `serve` is tested in ours, and the two together through the pool
    _answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the function prints must not look like an answer
    serve(sys.stdin.buffer, _answers)
