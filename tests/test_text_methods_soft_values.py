"""OREO: a policy and its values are fitted to each other; values by hand, special cases, two iterations, a resume."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rows import seeded
from text_runs import assert_trains, assign_rewards, text_config

from flowrl.config import load_config
from flowrl.core.soft_values import a_star_po, oreo_critic
from flowrl.core.token_advantages import value_loss
from flowrl.text.batch import Batch
from flowrl.text.soft_values import Oreo
from flowrl.text_estimate import estimate_text
from flowrl.trainer import Trainer
from flowrl.types import Decisions, UserError

OREO = ("method=oreo", "value.warmup_iterations=0", "objective.updates_per_iteration=2", "optimizer.learning_rate=1.0e-3")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def batch_of(log_prob: torch.Tensor, reference: torch.Tensor, values: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor) -> Any:
    decisions = Decisions(log_prob, log_prob.detach(), torch.where(mask, rewards[:, None], 0.0), mask)
    answers: Any = SimpleNamespace(extra={"soft_values": values}, token=lambda name: reference)
    return Batch(answers, torch.arange(len(log_prob)), SimpleNamespace(columns={}), decisions, torch.arange(len(log_prob)), len(log_prob), True)


def test_the_preset_trains_evaluates_nothing_twice_and_resumes(folder: Path) -> None:
    config = text_config(folder, *OREO)
    trainer, _ = assert_trains(config, 1)
    state = copy.deepcopy(trainer.state())
    there, _ = trainer.iterate(2)
    resumed = Trainer(config)
    resumed.load_state(state)
    assert resumed.iterate(2)[0] == there
    assert there["nfe/used"] == there["nfe/minimum"] and there["value/loss"] > 0


def test_the_preset_loads_for_the_embedded_model() -> None:
    config = load_config(Path(__file__).parent.parent / "configs" / "tiny_text.yaml", ["method=oreo"])
    assert (config.objective.name, config.token_credit.name) == ("oreo", "soft_values")


def test_a_token_pays_for_itself_and_all_that_follow(folder: Path) -> None:
    """beta 0.5, R = 1, V = (0.2, 0.4), log-ratios (1, 2): residuals 0.2 + 0.5 * 3 - 1 and 0.4 + 0.5 * 2 - 1; the gradient is that of the own token alone."""
    objective = Oreo(text_config(folder, "method=oreo", "objective.args={beta: 0.5}"))
    log_prob, mask = torch.tensor([[1.0, 2.0, 9.0]], requires_grad=True), torch.tensor([[True, True, False]])
    found = objective(batch_of(log_prob, torch.zeros(1, 3), torch.tensor([[0.2, 0.4, 7.0]]), torch.tensor([1.0]), mask))
    torch.testing.assert_close(found.loss, torch.tensor([[0.7**2, 0.4**2, 0.0]]))
    (gradient,) = torch.autograd.grad(found.loss.sum(), log_prob)
    torch.testing.assert_close(gradient, torch.tensor([[2 * 0.7 * 0.5, 2 * 0.4 * 0.5, 0.0]]))


def test_answers_of_one_token_with_the_prompts_value_are_a_star_po(folder: Path) -> None:
    objective, g = Oreo(text_config(folder, "method=oreo", "objective.args={beta: 0.3}")), seeded(2)
    log_prob, reference, values = (torch.randn(4, 1, generator=g) for _ in range(3))
    rewards, mask = torch.rand(4, generator=g), torch.ones(4, 1, dtype=torch.bool)
    decisions = Decisions(log_prob, log_prob, rewards[:, None] - values, mask)
    expected = a_star_po(decisions, group=torch.arange(4), num_groups=4, ref_log_prob=reference, beta=0.3).loss
    torch.testing.assert_close(objective(batch_of(log_prob, reference, values, rewards, mask)).loss, expected)


def test_the_value_learns_what_the_critic_of_the_core_asks(folder: Path) -> None:
    trainer = Trainer(text_config(folder, *OREO, "objective.args={beta: 0.4}"))
    trainer.iterate(1)  # the policy has left its reference, and the values are no longer 0
    rewards = torch.arange(12.0) / 10
    assigned = assign_rewards(trainer, rewards.tolist(), 2)
    answers = assigned.answers
    targets, mask = answers.extra["value_targets"], answers.mask
    ratio = answers.token("log_prob") - answers.token("reference")
    assert float(ratio[mask].abs().max()) > 1e-4 and float(targets.old.abs().max()) > 0
    for row in range(12):
        length = int(answers.lengths[row])
        left = [float(rewards[row]) - 0.4 * float(ratio[row, place:length].sum()) for place in range(length)]
        torch.testing.assert_close(targets.returns[row, :length], torch.tensor(left), rtol=1e-4, atol=1e-5)
    ours = 2 * value_loss(targets.old, targets.old, targets.returns, mask, clip=1e6)
    theirs = oreo_critic(targets.old, answers.token("log_prob"), answers.token("reference"), mask, mask, rewards, beta=0.4)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(assigned.advantages[mask], rewards[:, None].expand_as(mask)[mask])


def test_the_policy_waits_for_its_values(folder: Path) -> None:
    trainer = Trainer(text_config(folder, *OREO, "value.warmup_iterations=1"))
    before = [p.detach().clone() for p in trainer.parameters]
    metrics, _ = trainer.iterate(1)
    assert all(torch.equal(p, old) for p, old in zip(trainer.parameters, before, strict=True)) and metrics["value/loss"] > 0
    assert metrics["nfe/used"] == metrics["nfe/minimum"]
    trainer.iterate(2)
    assert any(not torch.equal(p, old) for p, old in zip(trainer.parameters, before, strict=True))


def test_its_tokens_are_estimated(folder: Path) -> None:
    config = text_config(folder, *OREO, "generation={max_new_tokens: 8, min_new_tokens: 8}", f"rewards=['{folder / 'letters.py'}:Vowels']")
    expected, used = estimate_text(config), Trainer(config).iterate(1)[0]
    assert expected.forward is not None and expected.forward.most >= used["nfe/forward"] >= expected.forward.least


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["token_credit={name: gae}"], "token_credit: soft_values and objective oreo fit a policy and its values to each other; set both, or neither"),
        (["objective={name: clipped_surrogate}"], "token_credit: soft_values and objective oreo fit a policy and its values to each other; set both"),
        (["value=null"], "token_credit: soft_values needs values; set value: {}"),
        (["advantage.centre=batch"], "advantage: with token_credit: soft_values, the values say what a reward is compared with; use centre: none, scale: none"),
        (["objective.ratio=seq_mean_token"], "objective.ratio: oreo reads the log-probability of each token; use plain"),
        (["objective.args.beta=0"], "objective.args: beta = 0 of oreo is not a number above 0"),
    ],
)
def test_what_does_not_go_together_is_one_line(folder: Path, more: list[str], line: str) -> None:
    with pytest.raises(UserError) as error:
        text_config(folder, "method=oreo", *more)
    assert line in str(error.value)
