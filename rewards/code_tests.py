"""Code tests: the share of a prompt's tests that the program in a completion passes, each program in a sandboxed process of its own.

    value = passed / all tests, or, with all_or_nothing, 1 if all pass, else 0

Tests are the metadata `tests`: a list of sources, such as ``["assert add(1, 2) == 3", ...]``, each one test; or one source, of which every statement at the
top counts but imports, definitions, assignments and the docstring, which are set-up. A test passes when it raises nothing. The program is the last closed code
block of the completion that is marked python, py or not at all; without one the value is 0.

What a program does to its process (exit, crash, loop, bomb, tampering) is its failure: those tests count as failed, a real 0. What goes wrong with the sandbox
itself is invalid. ``left == right`` in a test does not ask classes of the program whether they equal Python's own data, so an object that equals everything
equals nothing.

**The sandbox is no security boundary against a determined attacker**; `rewards/sandbox.py` says what it does and does not do. Where Linux namespaces do not
work the reward refuses to load, unless ``allow_unsafe`` is set: then only the resource limits and the audit hook are left.

Source: ours; tests as assert statements are the form of MBPP, arXiv:2108.07732, and of HumanEval, arXiv:2107.03374 (from memory).
"""

from __future__ import annotations

import ast
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flowrl.types import Prompt, RewardInfo, SampleBatch, Scores, UserError
from rewards.math_equivalence import check_pool_arguments
from rewards.text_match import shorten, texts_of
from rewards.workers import Outcome, WorkerPool

__all__ = ["CodeTests", "find_code", "split_tests"]

_BLOCK = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
_SET_UP = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign)
_GRACE_S = 10.0  # beyond the program's own limit, before a worker is taken for hung


def find_code(text: str) -> str | None:
    """The last closed code block that is marked python, py or not at all; None if there is none."""
    blocks = [code for language, code in _BLOCK.findall(text) if language.lower() in ("", "py", "python", "python3")]
    return blocks[-1] if blocks else None


def split_tests(tests: object) -> list[tuple[str, bool]]:
    """The metadata `tests` as [source, counted]: what is counted is a test, the rest is set-up.

    Raises:
        ValueError: it is no source and no list of sources, is not Python, or has nothing to count.
    """
    whole = isinstance(tests, str)
    sources = [tests] if whole else tests
    if not isinstance(sources, Sequence) or not sources or not all(isinstance(source, str) and source.strip() for source in sources):
        raise ValueError("are neither a list of assert statements nor a source text")
    parts: list[tuple[str, bool]] = []
    for source in sources:
        try:
            statements = ast.parse(source).body
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"are not Python ({error})") from error
        if whole:
            parts += [(ast.unparse(statement), not isinstance(statement, _SET_UP) and not _is_text(statement)) for statement in statements]
        else:
            parts.append((source, True))
    if not any(counted for _, counted in parts):
        raise ValueError("hold no test, such as an assert statement")
    return parts


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


class CodeTests:
    """The share of the prompt's metadata `tests` that the program in the completion passes. See the module's text.

    Args:
        all_or_nothing: True = 1 only if every test passes.
        timeout_s: wall time for one completion, all its tests together. memory_mb: its address space, at least 64.
        num_workers: programs at once; None = one per core, at most 4.
        allow_unsafe: True = run without namespaces where they do not work, with limits and the audit hook alone.
    Raises:
        UserError: an argument is out of its range.
    """

    def __init__(
        self, all_or_nothing: bool = False, timeout_s: float = 5.0, memory_mb: int = 512, num_workers: int | None = None, allow_unsafe: bool = False
    ) -> None:
        self.info = RewardInfo(
            name="code_tests",
            description="share of the prompt's metadata `tests` that the program in the completion passes, in a sandboxed process",
            low=0.0,
            high=1.0,
            source="flowrl, programmatic; tests as in MBPP, arXiv:2108.07732",
            batch_size=256,
            reads=("texts", "metadata"),
            metadata=("tests",),
            runs_on="cpu",
        )
        workers = check_pool_arguments("code_tests", timeout_s, num_workers)
        if isinstance(memory_mb, bool) or not isinstance(memory_mb, int) or memory_mb < 64:
            raise UserError(f"reward code_tests: memory_mb must be a whole number from 64 on, not {memory_mb!r}")
        self.all_or_nothing, self.timeout_s, self.memory_mb, self.allow_unsafe = all_or_nothing, timeout_s, memory_mb, allow_unsafe
        self._sandbox = Path(__file__).with_name("sandbox.py")
        self._pool = WorkerPool(self._sandbox, "run_tests", workers, timeout_s + _GRACE_S)
        self._confine: bool | None = None

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Find out whether the sandbox works on this machine, and start the workers.

        Raises:
            UserError: it does not, and ``allow_unsafe`` is not set, or the machine is not Linux.
        """
        if sys.platform != "linux":
            raise UserError(f"reward code_tests: runs programs on Linux only, and this is {sys.platform}")
        reason = self._try("probe")
        if reason is not None and not self.allow_unsafe:
            raise UserError(
                f"reward code_tests: programs cannot be confined on this machine ({reason}); run where Linux namespaces are allowed, or, if nothing here is "
                "of value, set allow_unsafe: true"
            )
        if reason is not None and (other := self._try("probe_unconfined")) is not None:
            raise UserError(f"reward code_tests: programs cannot be run on this machine, confined or not ({reason}; {other})")
        self._confine = reason is None
        self._pool.start()

    def _try(self, probe: str) -> str | None:
        pool = WorkerPool(self._sandbox, probe, 1, 60.0)
        try:
            outcome = pool.map([()])[0]
        finally:
            pool.close()
        reason: str | None = outcome.problem or outcome.value
        return reason

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise a UserError for the first prompt whose metadata `tests` are missing or are no tests."""
        for prompt in prompts:
            self._tests_of(prompt)

    def close(self) -> None:
        """End the workers. A later ``score`` starts new ones."""
        self._pool.close()

    def score(self, batch: SampleBatch) -> Scores:
        """values [B] float32 in [0, 1]; raw [B] float32: "code_tests_passed", the share, also with all_or_nothing; "code_tests_code_found", 0 or 1;
        "code_tests_refused", 1 where the program tried a file outside of its folder, the network, a process or the like, which the sandbox refuses.

        Raises:
            UserError: no texts, or a prompt without usable metadata `tests`.
            ValueError: B = 0.
            RuntimeError: ``load`` was not called.
        """
        if self._confine is None:
            raise RuntimeError("reward code_tests: load must be called before score")
        programs = [find_code(text) for text in texts_of("code_tests", batch)]
        tests = [self._tests_of(prompt) for prompt in batch.prompts]
        limits = (self.timeout_s, self.memory_mb, self._confine)
        tasks: list[tuple[Any, ...]] = [(program, its_tests, *limits) for program, its_tests in zip(programs, tests, strict=True) if program is not None]
        outcomes = iter(self._pool.map(tasks))
        nothing = Outcome({"problem": None, "passed": [False], "refused": False})
        results = [nothing if program is None else next(outcomes) for program in programs]
        problems = {i: problem for i, result in enumerate(results) if (problem := result.problem or result.value["problem"]) is not None}
        shares = [math.nan if i in problems else sum(result.value["passed"]) / len(result.value["passed"]) for i, result in enumerate(results)]
        passed = torch.tensor(shares, dtype=torch.float32)
        values = torch.where(passed.isnan(), passed, (passed == 1).float()) if self.all_or_nothing else passed.clone()
        found = torch.tensor([float(program is not None) for program in programs])
        refused = torch.tensor([math.nan if i in problems else float(result.value["refused"]) for i, result in enumerate(results)])
        raw = {"code_tests_passed": passed, "code_tests_code_found": found, "code_tests_refused": refused}
        return Scores(values, ~values.isnan(), raw, problems)

    def _tests_of(self, prompt: Prompt) -> list[tuple[str, bool]]:
        tests = prompt.metadata.get("tests")
        if tests is None:
            raise UserError(f"reward code_tests: the prompt {shorten(prompt.text)} has no metadata 'tests'; add a list of assert statements to every prompt")
        try:
            return split_tests(tests)
        except ValueError as error:
            raise UserError(f"reward code_tests: the metadata tests of the prompt {shorten(prompt.text)} {error}; give a list of assert statements") from error
