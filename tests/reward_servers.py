"""Servers of rewards for tests: an application in a thread of this process, and rewards whose calls can be held up and looked at."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from loading import load_script

from flowrl.types import RewardInfo, SampleBatch, Scores, UserError
from rewards.server import _bound, make_app

bench = load_script("benchmarks/remote_rewards.py")


class Watched:
    """The reward of the benchmark, with a gate in front, and a record of its calls. Numbers above 900 make trouble.

    901: UserError; 902: RuntimeError; 903: SystemExit; 904: a valid NaN; 905: not valid.
    """

    def __init__(self, **facts: Any) -> None:
        self.inner = bench.IdReward()
        self.info = RewardInfo(**{"name": "watched", "description": "d", "low": 0.0, "high": 1e9, "batch_size": 1000, **facts})
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.calls: list[SampleBatch] = []
        self.threads: set[int] = set()
        self.closed = False
        self._inside = threading.Lock()

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        self.threads.add(threading.get_ident())

    def score(self, batch: SampleBatch) -> Scores:
        assert self._inside.acquire(blocking=False), "the reward was entered twice at a time"
        try:
            self.threads.add(threading.get_ident())
            self.calls.append(batch)
            self.entered.set()
            assert self.gate.wait(20)
            values = torch.tensor([float(text) for text in batch.texts]) if batch.texts is not None else self.inner.score(batch).values
            self._trouble(values)
            values = torch.where((values == 904) | (values == 905), torch.nan, values)
            wrong = (values.isnan() & ~self._has(batch, 904)).nonzero().flatten().tolist()
            return Scores(values, ~values.isnan() | self._has(batch, 904), {"half": values / 2}, dict.fromkeys(wrong, "nothing to say"))
        finally:
            self._inside.release()

    def close(self) -> None:
        self.closed = True

    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.calls]

    def check_prompts(self, prompts: Any) -> None:
        for prompt in prompts:
            if "never" in prompt.text:
                raise UserError(f"reward watched: never is no good prompt: {prompt.text}")

    def _has(self, batch: SampleBatch, number: int) -> torch.Tensor:
        if batch.texts is not None:
            return torch.tensor([text == str(number) for text in batch.texts])
        found: torch.Tensor = self.inner.score(batch).values == number
        return found

    def _trouble(self, values: torch.Tensor) -> None:
        if (values == 901).any():
            raise UserError("reward watched: 901 is no good number")
        if (values == 902).any():
            raise RuntimeError("broken plug-in")
        if (values == 903).any():
            raise SystemExit(3)


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The application in a thread; its address."""
    listener = _bound("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        eventually(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@contextmanager
def serving(reward: Any, **options: Any) -> Iterator[str]:
    """A server of a reward; its address."""
    with running(make_app(reward, **options)) as url:
        yield url


def eventually(condition: Any, seconds: float = 10) -> None:
    """Wait until it is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.002)
