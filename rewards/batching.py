"""One thread that owns a reward and scores the requests of many clients, small ones together, in the order of their arrival.

A request is never split between two calls of the worker, and of a reward that compares samples no two requests are merged. Requests are merged while they have
pictures of one size, up to ``max_batch`` samples, for which the oldest one waits at most ``max_wait`` seconds. If a merged batch fails, its requests are scored
one by one, so that a bad one never spoils the others.
Merging changes the batch that a network sees, and with it the last bits of some rewards; ``max_batch=1`` turns it off.

Letters: B samples.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import nn

from flowrl.types import Prompt, Reward, SampleBatch, Scores, UserError
from rewards.composite import WeightedRewards

__all__ = ["NotScored", "Scorer", "weights_hash"]

_log = logging.getLogger(__name__)


class NotScored(Exception):
    """A request that got no scores.

    Attributes:
        kind: "refused" = the reward says what is wrong with the samples; "failed" = the reward is at fault; "closing" = the server is.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class _Job:
    batch: SampleBatch
    result: Future[Scores] = field(default_factory=Future)

    @property
    def form(self) -> object:
        """What requests must share to be merged."""
        images = self.batch.images
        return None if images is None else images.shape[1:], self.batch.texts is None


class Scorer:
    """Scores batches in a thread of its own; `submit` may be called from any thread.

    Args:
        reward: is loaded, called and closed by the thread alone, and never entered twice at a time.
        device, dtype: to load it with; None = what the reward asks for on that device.
        max_batch: samples up to which requests are merged. max_wait: seconds.
        observe: is told the samples and the seconds of every call.
    """

    def __init__(
        self,
        reward: Reward,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        max_batch: int = 64,
        max_wait: float = 0.002,
        observe: Callable[[int, float], object] = lambda samples, seconds: None,
    ) -> None:
        self.name = reward.info.name
        self.weights_sha256: str | None = None
        self._reward, self._device, self._dtype = reward, device, dtype
        self._checked = WeightedRewards([(self.name, 1.0, reward)])  # micro-batches, strict checks
        self._max_batch, self._max_wait, self._observe = max_batch, max_wait, observe
        self._room = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._busy_since: float | None = None
        self._closing = False
        self._thread: threading.Thread | None = None
        self._loaded: Future[None] = Future()

    @property
    def waiting(self) -> int:
        """Requests that no call has taken yet."""
        return len(self._waiting)

    @property
    def busy_seconds(self) -> float:
        """How long the present call has been running; 0 where there is none."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def start(self) -> None:
        """Load the reward and wait until it is there. A second call only waits.

        Raises:
            UserError: it cannot be loaded.
        """
        with self._room:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"reward-{self.name}", daemon=True)
                self._thread.start()
        self._loaded.result()

    def submit(self, batch: SampleBatch) -> Future[Scores]:
        """The scores of a batch, B >= 1, or the error `NotScored`. A future that is cancelled before its turn is passed over."""
        job = _Job(batch)
        with self._room:
            if self._closing:
                raise NotScored("closing", "the server is closing")
            self._waiting.append(job)
            self._room.notify()
        return job.result

    def check_prompts(self, prompts: list[Prompt]) -> None:
        """Raises `NotScored` for a prompt that the reward could never score."""
        try:
            self._checked.check_prompts(prompts)
        except UserError as error:
            raise NotScored("refused", str(error)) from error

    def close(self) -> None:
        """Score what waits, take nothing more, close the reward. A second call does nothing."""
        with self._room:
            self._closing = True
            self._room.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._checked.load(self._device, self._dtype)
            self.weights_sha256 = weights_hash(self._reward)
        except BaseException as error:  # noqa: BLE001 - whatever it is, `start` raises it
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(None)
        while jobs := self._next():
            self._busy_since = time.monotonic()
            self._score(jobs)
            self._busy_since = None
        self._checked.close()

    def _next(self) -> list[_Job]:
        """The next requests to score together; none when the scorer is closed and all is done."""
        with self._room:
            while True:
                while not self._waiting and not self._closing:
                    self._room.wait()
                if not self._waiting:
                    return []
                jobs: list[_Job] = []
                end = time.monotonic() + self._max_wait
                while self._take(jobs) and not self._closing and (left := end - time.monotonic()) > 0:
                    self._room.wait(left)
                started = [job for job in jobs if job.result.set_running_or_notify_cancel()]
                if started:
                    return started

    def _take(self, jobs: list[_Job]) -> bool:
        """Move what fits from the queue to ``jobs``, oldest first; returns whether it pays to wait for more."""
        if not jobs:
            jobs.append(self._waiting.popleft())
        size = sum(len(job.batch) for job in jobs)
        if self._reward.info.scope != "sample":
            return False
        for job in [job for job in self._waiting if job.form == jobs[0].form]:
            if size + len(job.batch) > self._max_batch:
                return False
            self._waiting.remove(job)
            jobs.append(job)
            size += len(job.batch)
        return size < self._max_batch

    def _score(self, jobs: list[_Job]) -> None:
        if len(jobs) > 1:
            try:
                scores = self._call(_merged([job.batch for job in jobs]))
            except NotScored:
                pass  # one of them is at fault: below, each for itself
            else:
                stops = list(accumulate(len(job.batch) for job in jobs))
                for job, start, stop in zip(jobs, [0, *stops], stops, strict=False):
                    job.result.set_result(_part(scores, start, stop))
                return
        for job in jobs:
            try:
                job.result.set_result(self._call(job.batch))
            except NotScored as error:
                job.result.set_exception(error)

    def _call(self, batch: SampleBatch) -> Scores:
        if self._reward.info.scope == "sample":
            batch = SampleBatch(batch.prompts, batch.images, batch.texts)  # its group is nothing to such a reward, and cannot be merged
        start = time.perf_counter()
        try:
            return self._checked.score(batch)[self.name]
        except UserError as error:
            if isinstance(error.__cause__, UserError):
                raise NotScored("refused", str(error)) from error
            _log.exception("the reward failed")
            raise NotScored("failed", str(error)) from error
        except BaseException as error:  # such as sys.exit() in a plugin: the thread must go on
            _log.exception("the reward failed")
            raise NotScored("failed", f"reward {self.name} raised {type(error).__name__}") from error
        finally:
            self._observe(len(batch), time.perf_counter() - start)


def weights_hash(reward: Reward) -> str | None:
    """sha256 of the names, shapes, kinds and bytes of the weights of every network that is an attribute of the reward; None where there is none.

    Equal hashes mean equal networks on two servers, whatever files they came from.
    """
    networks = [(name, value) for name, value in sorted(vars(reward).items()) if isinstance(value, nn.Module)] if hasattr(reward, "__dict__") else []
    if not networks:
        return None
    digest = hashlib.sha256()
    for owner, network in networks:
        for name, value in sorted(network.state_dict().items()):
            if isinstance(value, torch.Tensor):
                digest.update(f"{owner}.{name} {value.dtype} {list(value.shape)}\n".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _merged(batches: list[SampleBatch]) -> SampleBatch:
    images = [batch.images for batch in batches if batch.images is not None]
    texts = [text for batch in batches for text in batch.texts or ()]
    prompts = [prompt for batch in batches for prompt in batch.prompts]
    return SampleBatch(prompts, torch.cat(images) if images else None, texts or None)


def _part(scores: Scores, start: int, stop: int) -> Scores:
    return Scores(
        scores.values[start:stop],
        scores.valid[start:stop],
        {name: column[start:stop] for name, column in scores.raw.items()},
        {index - start: reason for index, reason in scores.problems.items() if start <= index < stop},
    )
