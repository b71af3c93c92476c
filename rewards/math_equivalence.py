r"""Math equivalence: is the final answer of a completion mathematically the gold answer? ``\frac{1}{2}`` is 0.5, and (x+1)^2 is x^2+2x+1.

value = 1 if math-verify finds the two equivalent, else 0

Source: the package math-verify, with its LaTeX extraction: the last ``\boxed{...}`` first, then formulas in dollars that follow words such as "the answer is".
What was
verified: the calls, against the installed release, and that without dollars it reads "(1, 2)" as 2, so a bare gold answer is put between dollars. Ours: an
unreadable gold answer is invalid; a completion without a readable answer is wrong, 0.

Symbolic algebra may run for ever. math-verify's own limits work only in the main thread of a process, so every comparison runs in a worker process that is
killed at the limit; that sample is then invalid, never 0.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from flowrl.types import Prompt, RewardInfo, SampleBatch, Scores, UserError
from rewards.checkpoints import require
from rewards.text_match import check_answers, gold_answer, texts_of
from rewards.workers import Outcome, WorkerError, WorkerPool

__all__ = ["MathEquivalence", "check_pool_arguments"]

_VERDICTS = {"right": 1.0, "wrong": 0.0, "no answer": 0.0}


def check_pool_arguments(reward: str, timeout_s: float, num_workers: int | None) -> int:
    """The number of workers: as given, or one per processor core, at most 4.

    Raises:
        UserError: the time limit is not a positive number of seconds, or the workers are fewer than 1.
    """
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s < math.inf:
        raise UserError(f"reward {reward}: timeout_s must be a positive number of seconds, not {timeout_s!r}")
    if num_workers is not None and (isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 1):
        raise UserError(f"reward {reward}: num_workers must be a whole number from 1 on, or null, not {num_workers!r}")
    return num_workers or min(4, os.cpu_count() or 1)


class MathEquivalence:
    """1 where math-verify finds the completion's final answer equivalent to the prompt's metadata `answer`, else 0. See the module's text.

    Args:
        timeout_s: wall time for one sample. num_workers: processes; None = one per core, at most 4. They start at ``load`` and are reused.
    Raises:
        UserError: an argument is out of its range.
    """

    def __init__(self, timeout_s: float = 2.0, num_workers: int | None = None) -> None:
        self.info = RewardInfo(
            name="math",
            description="1 if the final answer of the completion is mathematically equivalent to the prompt's metadata `answer`, else 0",
            low=0.0,
            high=1.0,
            source="math-verify (Hugging Face)",
            batch_size=1024,
            reads=("texts", "metadata"),
            metadata=("answer",),
            runs_on="cpu",
            extra="math",
        )
        workers = check_pool_arguments("math", timeout_s, num_workers)
        self._pool = WorkerPool(Path(__file__).with_name("math_verifier.py"), "judge", workers, timeout_s)
        self._is_loaded = False

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Start the workers.

        Raises:
            UserError: math-verify is not installed, or the workers cannot be started.
        """
        require("math", "math_verify", "math")
        try:
            self._pool.start()
        except WorkerError as error:
            raise UserError(f"reward math: {error}; reinstall flowrl-diffusion[math]") from error
        self._is_loaded = True

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise a UserError for the first prompt without an answer."""
        check_answers("math", prompts)

    def close(self) -> None:
        """End the workers. A later ``score`` starts new ones."""
        self._pool.close()

    def score(self, batch: SampleBatch) -> Scores:
        """values [B] float32, 0 or 1; raw["math_answer_found"] [B] float32, 0 where the completion has no readable answer.

        Invalid where the gold answer cannot be read, the time limit is over, or the verifier crashed.

        Raises:
            UserError: no texts, or a prompt without metadata `answer`.
            ValueError: B = 0.
            RuntimeError: ``load`` was not called.
        """
        if not self._is_loaded:
            raise RuntimeError("reward math: load must be called before score")
        texts = texts_of("math", batch)
        outcomes = self._pool.map([(gold_answer("math", prompt), text) for prompt, text in zip(batch.prompts, texts, strict=True)])
        problems = {i: problem for i, outcome in enumerate(outcomes) if (problem := self._problem(outcome, batch.prompts[i])) is not None}
        values = torch.tensor([math.nan if i in problems else _VERDICTS[outcome.value] for i, outcome in enumerate(outcomes)])
        found = torch.tensor([math.nan if i in problems else float(outcome.value != "no answer") for i, outcome in enumerate(outcomes)])
        return Scores(values, ~values.isnan(), {"math_answer_found": found}, problems)

    def _problem(self, outcome: Outcome, prompt: Prompt) -> str | None:
        if outcome.value == "no gold":
            return f"the gold answer {gold_answer('math', prompt)!r} cannot be read as mathematics"
        return outcome.problem
