"""Updates on tokens: gradients by hand, the same whatever the micro-batch, ratios to the policy that sampled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from text_runs import assert_trains, assign_rewards, text_config
from torch import Tensor

from flowrl.config import Config
from flowrl.trainer import Trainer
from flowrl.types import UserError

REWARDS = [1.0, 0.0, 0.0, 1.0, 0.5, 0.25, 0.0, 0.75, 1.0, 1.0, 0.0, 1.0]
ONE = ["objective.updates_per_iteration=1", "objective.inner_epochs=1"]
Configure = Callable[..., Config]


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    monkeypatch.syspath_prepend(tmp_path)
    return lambda *overrides: text_config(tmp_path, *overrides)


def gradient(trainer: Trainer, rewards: list[float] | None = None) -> list[Tensor]:
    """Of the only update of the first iteration, before clipping."""
    assigned = assign_rewards(trainer, rewards or REWARDS)
    prompts = [trainer.prompts[i] for i in trainer.engine.groups(1)]
    found: list[Tensor] = []
    trainer._apply_gradients = lambda _: found.extend(p.grad.clone() for p in trainer.parameters)  # type: ignore[method-assign]
    trainer.update(_rolled_out(trainer), assigned, prompts, [0, 1, 2], 1)
    trainer.optimizer.zero_grad()
    return found


def _rolled_out(trainer: Trainer):
    indices = trainer.engine.groups(1)
    return trainer.engine.roll_out([trainer.prompts[i] for i in indices], indices, [0, 1, 2], 1)[0]


def by_hand(trainer: Trainer, weight: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """The gradient of -sum over tokens of weight * advantage * log-probability, from one plain forward of each answer."""
    assigned = assign_rewards(trainer, REWARDS)
    c, policy = assigned.answers.completions, trainer.policy
    weights = weight(c.mask, assigned.advantages)
    loss = torch.zeros(())
    for i in range(len(c)):
        prompt = c.prompt_tokens[int(c.group[i])]
        n = int(c.length[i])
        ids = torch.cat([prompt, c.tokens[i, :n]])[None]
        logits = policy.network.model(input_ids=ids).logits[0].float()
        log_prob = logits.log_softmax(-1)[len(prompt) - 1 : len(prompt) - 1 + n].gather(1, c.tokens[i, :n, None])[:, 0]
        loss = loss - (weights[i, :n] * assigned.advantages[i, :n] * log_prob).sum()
    return list(torch.autograd.grad(loss, trainer.parameters, allow_unused=True))


def assert_equal_gradients(ours: list[Tensor], theirs: list[Tensor]) -> None:
    scale = max(float(b.abs().max()) for b in theirs if b is not None)
    assert scale > 1e-4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("reduction", "weight"),
    [
        ("mean", lambda mask, _: mask.float() / mask.sum()),
        ("seq_mean_token_mean", lambda mask, _: mask.float() / mask.sum(1, keepdim=True) / len(mask)),
        ("seq_mean_token_sum", lambda mask, _: mask.float() / len(mask)),
        ("seq_mean_token_sum_norm", lambda mask, _: mask.float() / 8 / len(mask)),
    ],
)
def test_the_gradient_of_the_first_update_is_that_of_a_plain_forward(configure: Configure, reduction: str, weight: Callable[..., Tensor]) -> None:
    trainer = Trainer(configure(*ONE, f"objective.reduction={reduction}"))
    assert_equal_gradients(gradient(trainer), by_hand(trainer, weight))


@pytest.mark.parametrize("settings", [[], ["objective.ratio=seq_mean", "objective.reduction=seq_mean"], ["kl={weight: 0.1, form: k3}", "entropy.weight=0.01"]])
def test_the_micro_batch_changes_nothing(configure: Configure, settings: list[str]) -> None:
    small, large = (Trainer(configure(*ONE, *settings, f"training.rows_per_backward={rows}")) for rows in (1, 100))
    assert_equal_gradients(gradient(small), gradient(large))


def test_an_answer_without_a_reward_is_in_no_gradient_and_no_denominator(configure: Configure) -> None:
    rewards = [float("nan") if i == 3 else reward for i, reward in enumerate(REWARDS)]
    trainer = Trainer(configure(*ONE, "objective.reduction=seq_mean_token_sum", "advantage={centre: none, scale: none}", "training.max_invalid_share=0.5"))
    assigned = assign_rewards(trainer, rewards)
    assert not assigned.mask[3].any()
    without = gradient(trainer, rewards)
    zero = gradient(trainer, [0.0 if i == 3 else reward for i, reward in enumerate(REWARDS)])
    for a, b in zip(without, zero, strict=True):
        torch.testing.assert_close(a * 11, b * 12, rtol=1e-3, atol=1e-5)  # of 11 answers, and of 12


def test_the_first_ratio_is_exactly_one_and_later_ones_are_not(configure: Configure) -> None:
    config = configure("objective={updates_per_iteration: 2, inner_epochs: 2}", "optimizer.learning_rate=0.02", "objective.reduction=mean")
    _, metrics = assert_trains(config)
    assert [m["ratio/max_abs_log_first"] for m in metrics] == [0.0, 0.0]
    assert all(m["ratio/std"] > 1e-4 and m["updates"] == 4 for m in metrics)


def test_ratios_are_taken_to_the_slow_copy_that_samples(configure: Configure) -> None:
    slow = "old_policy={rollout: true, every: 1, decay_slope: 0.0, decay_max: 0.9, decay_start: 100}"  # follows at once while the decay is 0
    trainer, metrics = assert_trains(configure(*ONE, slow.replace("every: 1", "every: 5"), "optimizer.learning_rate=0.02"), iterations=3)
    assert metrics[0]["ratio/std"] == 0.0  # both are still the same
    assert metrics[2]["ratio/std"] > 1e-3
    assigned = assign_rewards(trainer, REWARDS)
    c = assigned.answers.completions
    old = assigned.answers.measured["log_prob"]
    assert (old - c.log_prob).abs().max() < 1e-4  # those that sampled
    now = trainer.policy.token_output(c, torch.arange(len(c))).log_prob
    assert (now - old).abs().max() > 1e-3


def test_weights_correct_for_an_engine_with_other_numerics(configure: Configure) -> None:
    trainer = Trainer(configure(*ONE, "generation={max_new_tokens: 8, importance: truncated, importance_high: 1.5}", "objective.reduction=mean"))
    assigned = assign_rewards(trainer, REWARDS)
    assigned.answers.completions.log_prob.sub_(0.1)  # the engine said less
    update, _ = trainer.engine.update(_rolled_out(trainer), assigned, [], [0, 1, 2], 1)
    assert update is not None
    update.prepare([torch.zeros(0, dtype=torch.int64), torch.arange(12)])  # all of them after the first update
    factor = update._factors(torch.arange(12))
    torch.testing.assert_close(factor[assigned.mask], torch.full_like(factor[assigned.mask], 0.1).exp(), rtol=1e-3, atol=1e-3)
    assigned.answers.completions.log_prob.sub_(1.0)
    assert float(update._factors(torch.arange(12))[assigned.mask].max()) == 1.5
    assigned.answers.completions.log_prob.add_(2.1)  # the engine said exp(1) as much
    assert float(update._factors(torch.arange(12))[assigned.mask].min()) < 0.4
    object.__setattr__(trainer.config.generation, "importance_low", 0.5)
    assert float(update._factors(torch.arange(12))[assigned.mask].min()) == 0.5


def test_what_belongs_to_other_runs_or_has_no_effect_is_refused(configure: Configure) -> None:
    for settings, message in (
        (["kl={weight: 0.1, form: k1, place: loss}"], "k1 has no gradient on average as a term of the loss"),
        (["method=unlikeliness", "allocation.samples=[expert]"], "shaping: rank_unlikely compares how likely answers were"),
        (["method=kl_cov", "allocation.samples=[expert]"], "objective.name: kl_cov chooses tokens by how likely they were"),
        (["method=remix", "objective.ratio=seq_mean"], "objective.ratio: "),
    ):
        with pytest.raises(UserError, match=message):
            configure(*settings)


@pytest.mark.parametrize("method", ["nash_mp", "adaptive_entropy", "bapo"])
def test_measuring_the_gradient_of_each_reward_leaves_no_trace(configure: Configure, method: str) -> None:
    """The same weights and states as with fixed weights, where the measured ones cannot move them."""
    two = "rewards=[{name: 'letters:Vowels', label: a}, {name: 'letters:Vowels', label: b}]"
    fixed, measured = (
        assert_trains(configure(f"method={method}", "rollout={groups_per_iteration: 3, group_size: 4}", two, *more))[0]
        for more in ([], ["reward_weights={kind: gradient, every: 1, rate: 1.0e-9}"])
    )
    for a, b in zip(fixed.parameters, measured.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert str(fixed.engine.state_dict()) == str(measured.engine.state_dict())
