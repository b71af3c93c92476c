"""rewards/math_equivalence.py: math-verify in killed worker processes; equivalences by hand, hangs, crashes, unreadable gold answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from reward_models import assert_reward_contract

from flowrl.types import Prompt, SampleBatch, UserError
from rewards.math_equivalence import MathEquivalence
from rewards.math_verifier import judge
from rewards.registry import load_reward
from rewards.workers import WorkerPool

CPU = torch.device("cpu")


def batch(cases: list[tuple[str, str]]) -> SampleBatch:
    """Of (gold, completion)."""
    return SampleBatch([Prompt(f"problem {i}", {"answer": gold}) for i, (gold, _) in enumerate(cases)], texts=[text for _, text in cases])


@pytest.fixture(scope="module")
def reward() -> Iterator[MathEquivalence]:
    made = load_reward("math", {"num_workers": 2})
    assert isinstance(made, MathEquivalence)
    made.load(CPU, torch.float32)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("gold", "completion", "verdict"),
    [
        ("1/2", r"so it is \boxed{\frac{1}{2}}", "right"),
        ("1/2", r"\boxed{0.5}", "right"),
        (r"\frac12", r"The final answer is $\frac{2}{4}$.", "right"),
        ("x^2+2x+1", r"\boxed{(x+1)^2}", "right"),
        ("(1, 2)", r"\boxed{(1,2)}", "right"),
        ("(1, 2)", r"\boxed{2}", "wrong"),
        (r"\{1,2\}", r"\boxed{\{2,1\}}", "right"),
        ("1,000", r"\boxed{1000}", "right"),
        ("B", r"\boxed{B}", "right"),
        (r"steps, so \boxed{3}", r"\boxed{3}", "right"),
        ("3", r"first \boxed{2}, better \boxed{3}", "wrong"),  # boxes side by side are one answer, the set of both
        (r"\{2, 3\}", r"\boxed{2} and \boxed{3}", "right"),
        ("3", "It is $\\boxed{2}$ at first.\n\nBut then $\\boxed{3}$.", "right"),
        ("3", r"\boxed{4}", "wrong"),
        ("3", "I think it is three", "no answer"),
        ("3", "", "no answer"),
        (r"$\frac{$", r"\boxed{3}", "no gold"),
        ("$$", r"\boxed{3}", "no gold"),
    ],
)
def test_the_verifier_by_hand(gold: str, completion: str, verdict: str) -> None:
    assert judge(gold, completion) == verdict


def test_right_is_1_wrong_and_no_answer_are_0_and_an_unreadable_gold_answer_is_invalid(reward: MathEquivalence) -> None:
    scores = reward.score(batch([("1/2", r"\boxed{0.5}"), ("3", r"\boxed{4}"), ("3", "hm"), ("$$", r"\boxed{3}")]))
    assert scores.values[:3].tolist() == [1, 0, 0]
    assert scores.valid.tolist() == [True, True, True, False]
    assert scores.values[3].isnan()
    assert scores.raw["math_answer_found"][:3].tolist() == [1, 1, 0]
    assert scores.problems == {3: "the gold answer '$$' cannot be read as mathematics"}


def test_64_samples_take_seconds_in_workers_that_are_reused(reward: MathEquivalence) -> None:
    cases = [(str(i), rf"\boxed{{{i if i % 2 else i + 1}}}") for i in range(64)]
    reward.score(batch(cases[:4]))
    pids = {worker.process.pid for worker in reward._pool._workers}
    start = time.monotonic()
    values = reward.score(batch(cases)).values
    assert time.monotonic() - start < 10
    assert values.tolist() == [float(i % 2) for i in range(64)]
    assert pids == {worker.process.pid for worker in reward._pool._workers}


def test_a_completion_that_keeps_the_verifier_busy_is_invalid_in_time_and_not_zero() -> None:
    reward = MathEquivalence(timeout_s=1.0, num_workers=1)
    reward.load(CPU, torch.float32)
    start = time.monotonic()
    scores = reward.score(batch([("3", r"\boxed{3}"), ("5", r"\boxed{10^{10^{10}}}"), ("7", r"\boxed{7}"), (r"9^{9^{9^{9}}}", r"\boxed{9^{9^{9^{9}}} + 1}")]))
    assert time.monotonic() - start < 20
    reward.close()
    assert scores.values[[0, 2]].tolist() == [1, 1]
    assert all(problem == "timed out after 1 s" for problem in scores.problems.values())
    assert set(scores.problems) == set(torch.nonzero(~scores.valid).flatten().tolist())


def test_a_verifier_that_hangs_or_crashes_is_invalid(tmp_path: Path, reward: MathEquivalence, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "verifier.py"
    acts = ["time.sleep(60 * (text == 'hang'))", "text == 'crash' and os.abort()", "return 'right' if text else 1 / 0"]
    file.write_text("import os, time\ndef judge(gold, text):\n    " + "\n    ".join(acts))
    pool = WorkerPool(file, "judge", 1, 0.5)
    monkeypatch.setattr(reward, "_pool", pool)
    scores = reward.score(batch([("1", "hang"), ("1", "fine"), ("1", "crash"), ("1", "")]))
    pool.close()
    assert scores.valid.tolist() == [False, True, False, False]
    assert scores.problems == {0: "timed out after 0.5 s", 2: "the worker process ended with code -6", 3: "ZeroDivisionError: division by zero"}


def test_a_missing_package_or_answer_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^reward math: the prompt 'why' has no metadata 'answer'"):
        MathEquivalence().check_prompts([Prompt("why")])
    broken = MathEquivalence(num_workers=1)
    (tmp_path / "bad.py").write_text("import nothing_like_it")
    monkeypatch.setattr(broken, "_pool", WorkerPool(tmp_path / "bad.py", "judge", 1, 1.0))
    with pytest.raises(UserError, match=r"^reward math: a worker process could not start: ModuleNotFoundError.*reinstall flowrl-diffusion\[math\]"):
        broken.load(CPU, torch.float32)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"^reward math: needs the package math_verify.*install flowrl-diffusion\[math\]"):
        MathEquivalence().load(CPU, torch.float32)


@pytest.mark.parametrize(
    ("args", "message"), [({"timeout_s": 0}, "timeout_s must be"), ({"timeout_s": True}, "timeout_s"), ({"num_workers": 0}, "num_workers must be")]
)
def test_arguments_out_of_range_are_refused(args: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=f"^reward math: {message}"):
        MathEquivalence(**args)


def test_the_reward_keeps_the_contract() -> None:
    made: list[MathEquivalence] = []

    def make() -> MathEquivalence:
        made.append(MathEquivalence(num_workers=1, timeout_s=20.0))
        return made[-1]

    assert_reward_contract(make, batch([("1/2", r"\boxed{0.5}"), ("3", r"\boxed{4}"), ("$$", r"\boxed{3}"), ("3", "hm"), ("7", r"\boxed{7}")]))
    for reward in made:
        reward.close()
    with pytest.raises(UserError, match="reward math: needs texts"):
        made[0].score(SampleBatch([Prompt("x")], torch.zeros(1, 3, 8, 8)))
