"""Updates on finished samples: their gradients against formulas written out by hand, the identities between methods, and the critic in the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from drills import LARGE_EPS, ODE, Drill, assert_same_gradient, begin, by_hand, difference, errors, move, put, twin, weights
from torch import Tensor

from flowrl.assignment import Samples
from flowrl.config import Config
from flowrl.trainer import Trainer
from flowrl.updates.matching import MatchingUpdate
from flowrl.updates.noised import NoisedSamples
from samplers.forest import leaves_only

Configure = Callable[..., Config]
AWM = [ODE, "method=awm", "matching={num_times: 2, weighting: uniform}", "old_policy=null", "anchor.weight=0", "kl.weight=0"]
NFT = [ODE, "method=diffusion_nft", "matching.num_times=2", "kl.weight=0"]
ORW = [ODE, "method=orw_cfm_w2", "matching.num_times=2"]
AC = [ODE, "method=ac_flow", "matching.num_times=2", "advantage={centre: group, scale: group_std, clip: 3}", "kl.weight=0"]
CRITIC = "critic={widths: [8, 8], hidden: 8, learning_rate: 0.01, warmup_iterations: 2, ramp_iterations: 2, gate: -1000}"
MIXED = [1.0, -0.5, 0.25, 2.0, -1.0, 0.5, 0.0, -2.0, 0.125, 3.0, -0.75, 1.5]
"""Made-up advantages of 12 samples."""


def update_of(drill: Drill) -> MatchingUpdate:
    update = drill.material()
    assert isinstance(update, MatchingUpdate)
    return update


def all_of(drill: Drill) -> Tensor:
    return torch.arange(len(drill.rollout.leaves))


# --- AWM ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["clipped_surrogate", "reinforce"])
@pytest.mark.parametrize("settings", [["matching.guidance_scale=2"], ["model.adapter=full"], ["matching.combine=sum_first"]], ids=str)
def test_advantages_of_one_give_the_gradient_of_the_flow_matching_loss(configure: Configure, objective: str, settings: list[str]) -> None:
    drill = begin(move(Trainer(configure(*AWM, f"objective.name={objective}", *settings)))).with_advantages([1.0] * 12)
    found, noised = drill.gradient(), update_of(drill).noised
    error, _ = errors(drill.trainer, noised.batch(all_of(drill)))
    assert len(error) == 24
    assert_same_gradient(found, by_hand(drill.trainer, error.mean()))


def test_supervised_fine_tuning_on_the_best_is_the_flow_matching_loss_of_the_best(configure: Configure) -> None:
    drill = begin(move(Trainer(configure(ODE, "method=flow_sft", "matching.num_times=2"))))
    found, noised = drill.gradient(), update_of(drill).noised
    assert isinstance(drill.assignment, Samples)
    best = drill.assignment.rewards.view(3, 4).argmax(1) + torch.arange(3) * 4
    assert_same_gradient(found, by_hand(drill.trainer, errors(drill.trainer, noised.batch(best))[0].mean()))


def test_each_error_is_weighted_with_the_advantage_of_its_sample(configure: Configure) -> None:
    drill = begin(move(Trainer(configure(*AWM, "matching.weighting=t")))).with_advantages(MIXED)
    found = drill.gradient()
    batch = update_of(drill).noised.batch(all_of(drill))
    error, _ = errors(drill.trainer, batch)
    loss = torch.tensor(MIXED).repeat_interleave(2) * batch.sigma.float() * error
    assert_same_gradient(found, by_hand(drill.trainer, loss.mean()))


def test_the_ratio_of_the_first_update_is_exactly_one_and_old_errors_are_those_of_the_weights_before(configure: Configure) -> None:
    # a large learning rate, so that a ratio to the wrong weights would show
    settings = ["objective={updates_per_iteration: 3, inner_epochs: 2}", "optimizer.learning_rate=0.05", "training.rows_per_backward=6"]
    drill = begin(move(Trainer(configure(*AWM, *settings))))
    update = update_of(drill)
    drill.trainer.engine.update = lambda *_: (update, {})  # keep it
    before = weights(drill.trainer)
    metrics = drill.update()
    assert metrics["ratio/max_abs_log_first"] == 0.0
    assert metrics["ratio/std"] > 1e-3
    assert metrics["updates"] == 6
    assert {key for key in metrics if key.startswith("ratio/time_")} >= {f"ratio/time_{t}/{name}" for t in (0, 1) for name in ("mean", "clip_low")}
    assert update.known.all()
    put(drill.trainer, before)
    expected = -errors(drill.trainer, update.noised.batch(all_of(drill)))[0].detach()
    torch.testing.assert_close(update.old_log_prob.flatten(), expected, rtol=1e-5, atol=1e-5)


def test_fresh_noise_for_the_old_policy_would_break_the_ratio(configure: Configure) -> None:
    trainer = move(Trainer(configure(*AWM)))
    drill = begin(trainer)
    here, later = (update_of(dataclasses.replace(drill, iteration=i)).noised.batch(all_of(drill)) for i in (1, 2))
    with torch.no_grad():
        assert (errors(trainer, here)[0] - errors(trainer, later)[0]).abs().max() > 0.01
        again = update_of(drill).noised.batch(all_of(drill))
        assert torch.equal(errors(trainer, here)[0], errors(trainer, again)[0])


@pytest.mark.parametrize("combine", ["exp_first", "sum_first"])
def test_off_policy_the_ratio_is_to_the_policy_that_sampled(configure: Configure, combine: str) -> None:
    old = "old_policy={rollout: true, decay_slope: 1, decay_max: 0.9}"
    settings = [*AWM, old, f"matching.combine={combine}", "objective={clip_low: 0.01, clip_high: 0.01}"]
    trainer = move(Trainer(configure(*settings)), size=0.1)
    assert trainer.old_policy is not None
    drill = begin(trainer).with_advantages(MIXED)
    plain = twin(drill, configure(*settings))  # the old policy: the weights before they were moved
    torch.testing.assert_close(drill.rollout.leaves, begin(plain).rollout.leaves, rtol=1e-5, atol=1e-5)
    found = drill.gradient()
    batch = update_of(drill).noised.batch(all_of(drill))

    def log_prob(of: Trainer) -> Tensor:
        table = -errors(of, batch)[0].view(12, 2)
        return table if combine == "exp_first" else table.mean(1, keepdim=True)

    ratio = (log_prob(trainer) - log_prob(plain).detach()).exp()
    advantages = torch.tensor(MIXED)[:, None]
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.99, 1.01))
    assert ratio.min() < 0.99 and ratio.max() > 1.01  # the clip has something to do
    assert_same_gradient(found, by_hand(trainer, loss.mean()))
    metrics = drill.update()
    assert metrics["ratio/max_abs_log_first"] == 0.0  # is not measured: the first ratio is not 1
    assert metrics["ratio/mean"] == pytest.approx(ratio.mean().item(), rel=1e-4)
    assert 0 < metrics["clip/low"] + metrics["clip/high"] < 1


def test_on_policy_it_does_not_matter_whether_times_are_averaged_before_or_after_the_exponential(configure: Configure) -> None:
    found = []
    for combine in ("exp_first", "sum_first"):
        drill = begin(move(Trainer(configure(*AWM, f"matching.combine={combine}")))).with_advantages(MIXED)
        update = update_of(drill)
        assert (len(update.unit_group), update.rows_per_unit) == ((24, 1) if combine == "exp_first" else (12, 2))
        found.append(drill.gradient())
    assert_same_gradient(*found)


def test_the_solver_of_the_rollout_is_forgotten(configure: Configure) -> None:
    leaves = torch.randn(12, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    group = torch.arange(3).repeat_interleave(4)
    found = []
    for rollout in ("{solver: heun}", "{solver: dpm++}", "{plan: chain}"):
        trainer = move(Trainer(configure(*AWM, f"rollout={rollout}", "advantage={centre: group, scale: none}")))
        drill = begin(trainer, rollout=leaves_only(leaves, group), rewards=MIXED)
        found.append(drill.gradient())
    for other in found[1:]:
        assert difference(found[0], other) == 0


def test_a_constant_added_to_the_rewards_of_a_group_changes_nothing(configure: Configure) -> None:
    trainer = move(Trainer(configure(*AWM, "advantage={centre: group, scale: group_std, clip: 100}")))
    shifted = [value + (7.0, -3.0, 0.5)[i // 4] for i, value in enumerate(MIXED)]
    assert_same_gradient(begin(trainer, rewards=shifted).gradient(), begin(trainer, rewards=MIXED).gradient())


@pytest.mark.parametrize("method", [AWM, NFT], ids=["awm", "nft"])
def test_a_sample_without_a_score_pulls_at_nothing(configure: Configure, method: list[str]) -> None:
    rewards = [*MIXED[:3], float("nan"), *MIXED[4:]]
    drill = begin(move(Trainer(configure(*method))), rewards=rewards)
    found = drill.gradient()
    broken = drill.rollout.leaves.clone()
    broken[3] += 1.0
    other = dataclasses.replace(drill, assignment=dataclasses.replace(drill.assignment, rollout=dataclasses.replace(drill.rollout, leaves=broken)))
    assert difference(found, other.gradient()) == 0
    broken[4] += 1.0
    assert difference(found, other.gradient()) > 1e-6


def test_regularisers_are_velocity_distances_to_the_reference_and_to_the_old_policy(configure: Configure) -> None:
    for form in ("v_mse", "v_elbo"):
        settings = [*AWM, f"kl={{weight: 0.5, form: {form}}}", "anchor.weight=2", "old_policy={rollout: false, decay_slope: 0}", "matching.guidance_scale=2"]
        trainer = move(Trainer(configure(*settings)), size=0.1)
        drill = begin(trainer).with_advantages(MIXED)
        base = twin(drill, configure(*settings))
        middle = [(a + b) / 2 for a, b in zip(weights(base), weights(trainer), strict=True)]
        assert trainer.old_policy is not None
        trainer.old_policy.average = middle
        found = drill.gradient()
        batch = update_of(drill).noised.batch(all_of(drill))
        error, velocity = errors(trainer, batch)
        with torch.no_grad():
            reference = errors(base, batch)[1]
            put(base, middle)
            old = errors(base, batch)[1]
        kl = (velocity - reference).square().flatten(1).mean(1)
        if form == "v_elbo":
            kl = kl / (2 * 0.49 * (batch.sigma / (1 - batch.sigma.clamp(max=0.99)))).float()
        anchor = (velocity - old).square().flatten(1).mean(1)
        loss = torch.tensor(MIXED).repeat_interleave(2) * error + 0.5 * kl + 2 * anchor
        assert_same_gradient(found, by_hand(trainer, loss.mean()))
        metrics = drill.update()
        assert metrics["kl/mean"] == pytest.approx(kl.mean().item(), rel=1e-4)
        assert metrics["anchor/mean"] == pytest.approx(anchor.mean().item(), rel=1e-4)
        assert metrics["matching/error"] == pytest.approx(error.mean().item(), rel=1e-4)


def test_a_new_adapter_is_at_no_distance_from_the_reference_and_a_large_weight_keeps_it_near(configure: Configure) -> None:
    distance = {}
    for weight in (1e-3, 1.0, 1e3):
        trainer = Trainer(configure(*ORW, f"kl.weight={weight}", "optimizer={learning_rate: 0.001, weight_decay: 0, max_grad_norm: 1000000}", "ema=null"))
        course = [trainer.iterate(iteration)[0]["kl/mean"] for iteration in range(1, 16)]
        assert course[0] == 0.0
        distance[weight] = course[-1]
    assert distance[1e3] < 0.1 * distance[1.0]
    assert distance[1.0] < distance[1e-3]


@pytest.mark.parametrize(
    "method",
    [[*AWM, "kl.weight=0.1", "objective.updates_per_iteration=2"], [*NFT, "objective.reduction=group_mean"], [ODE, "method=flow_dpo", "matching.num_times=1"]],
    ids=["awm", "nft", "dpo"],
)
def test_the_size_of_a_micro_batch_does_not_change_the_gradient(configure: Configure, method: list[str]) -> None:
    found = [
        begin(move(Trainer(configure(*method, LARGE_EPS, f"training={{rows_per_backward: {rows}, rows_per_forward: {rows}}}")))).gradients()
        for rows in (2, 1000)
    ]
    for small, large in zip(*found, strict=True):
        assert_same_gradient(small, large)


# --- objectives of text -------------------------------------------------------------------------------------------------------------------------

GATES = {
    "sapo": ["objective={name: sapo, args: {temperature_positive: 3, temperature_negative: 4}}"],
    "cispo": ["objective={name: cispo, clip_low: 0.1, clip_high: 0.1}"],
    "mdpo": ["objective={name: mdpo, args: {penalty: 2}}"],
    "bgpo": ["objective.name=bgpo"],
    "dual clip": ["objective={dual_clip: 3, ratio_max: 4}"],
}


@pytest.mark.parametrize("name", GATES)
def test_the_first_gradient_of_a_gate_is_that_of_reinforce(configure: Configure, name: str) -> None:
    trainer = move(Trainer(configure(*AWM, *GATES[name])))
    drill = begin(trainer).with_advantages(MIXED)
    loss = (torch.tensor(MIXED).repeat_interleave(2) * errors(trainer, update_of(drill).noised.batch(all_of(drill)))[0]).mean()
    assert_same_gradient(by_hand(trainer, loss), drill.gradient())


@pytest.mark.parametrize("name", GATES)
def test_a_gate_starts_at_ratio_1_and_takes_the_least_rows(configure: Configure, name: str) -> None:
    trainer = Trainer(configure(*AWM, *GATES[name], "objective.updates_per_iteration=3"))
    for iteration in (1, 2):
        metrics, _ = trainer.iterate(iteration)
        assert metrics["ratio/max_abs_log_first"] == 0.0
        assert metrics["nfe/used"] == metrics["nfe/minimum"]


def test_a_soft_gate_off_policy_by_hand(configure: Configure) -> None:
    old = "old_policy={rollout: true, decay_slope: 1, decay_max: 0.9}"
    settings = [*AWM, old, *GATES["sapo"]]
    trainer = move(Trainer(configure(*settings)), size=0.1)
    drill = begin(trainer).with_advantages(MIXED)
    plain = twin(drill, configure(*settings))
    batch = update_of(drill).noised.batch(all_of(drill))
    ratio = (errors(plain, batch)[0].detach() - errors(trainer, batch)[0]).exp().view(12, 2)
    advantages = torch.tensor(MIXED)[:, None]
    tau = torch.where(advantages > 0, 3.0, 4.0)
    loss = -advantages * 4 / tau * torch.sigmoid(tau * (ratio - 1))
    assert (ratio - 1).abs().max() > 0.05
    assert_same_gradient(by_hand(trainer, loss.mean()), drill.gradient())


# --- NFT ----------------------------------------------------------------------------------------------------------------------------------------


def positive_branch(trainer: Trainer, drill: Drill) -> Tensor:
    """DiffusionNFT's L+ of the policy itself for every state, [24]: the error of the clean estimate over its own size."""
    batch = update_of(drill).noised.batch(all_of(drill))
    _, velocity = errors(trainer, batch)
    sigma = batch.sigma.float().view(-1, 1, 1, 1)
    x0 = batch.x - sigma * batch.target
    off = batch.x - sigma * velocity - x0
    return (off.square() / off.detach().abs().flatten(1).mean(1).clamp_min(1e-5).view(-1, 1, 1, 1)).flatten(1).mean(1)


PROBABILITY = [0.0, 1.0, 0.5, 0.3, 0.9, 0.1, 0.2, 0.7, 0.6, 1.0, 0.0, 0.5]


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_where_the_policy_is_the_old_one_the_gradient_is_that_of_the_positive_branch_times_five_two_r_minus_one(configure: Configure, beta: float) -> None:
    trainer = Trainer(configure(*NFT, f"objective.beta={beta}"))
    move(trainer)
    assert trainer.old_policy is not None
    trainer.old_policy.average = weights(trainer)
    drill = begin(trainer).with_advantages(10 * (torch.tensor(PROBABILITY) - 0.5))  # r = A / 10 + 1/2
    found = drill.gradient()
    factor = 5 * (2 * torch.tensor(PROBABILITY) - 1).repeat_interleave(2)
    assert_same_gradient(found, by_hand(trainer, (factor * positive_branch(trainer, drill)).mean()), rtol=1e-3)
    even = drill.with_advantages([0.0] * 12).gradient()
    assert max(g.abs().max() for g in even) < 1e-5 * max(g.abs().max() for g in found)


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_away_from_the_old_policy_two_mirrored_policies_are_trained(configure: Configure, beta: float) -> None:
    settings = [*NFT, f"objective.beta={beta}", "kl={weight: 0.5, form: v_mse}"]
    trainer = move(Trainer(configure(*settings)), size=0.1)
    drill = begin(trainer).with_advantages(10 * (torch.tensor(PROBABILITY) - 0.5))
    base = twin(drill, configure(*settings))
    found = drill.gradient()
    batch = update_of(drill).noised.batch(all_of(drill))
    _, velocity = errors(trainer, batch)
    with torch.no_grad():
        old = errors(base, batch)[1]  # which is the reference too
    sigma = batch.sigma.float().view(-1, 1, 1, 1)
    x0 = batch.x - sigma * batch.target

    def branch(v: Tensor) -> Tensor:
        off = batch.x - sigma * v - x0
        return (off.square() / off.detach().abs().flatten(1).mean(1).clamp_min(1e-5).view(-1, 1, 1, 1)).flatten(1).mean(1)

    r = torch.tensor(PROBABILITY).repeat_interleave(2)
    loss = 5 / beta * (r * branch(beta * velocity + (1 - beta) * old) + (1 - r) * branch((1 + beta) * old - beta * velocity))
    loss = loss + 0.5 * (velocity - old).square().flatten(1).mean(1)
    assert_same_gradient(found, by_hand(trainer, loss.mean()))
    metrics = drill.update()
    assert metrics["loss"] == pytest.approx(loss.mean().item(), rel=1e-4)
    assert "ratio/mean" not in metrics and "clip/low" not in metrics


# --- ORW-CFM-W2 and AC-Flow ---------------------------------------------------------------------------------------------------------------------


def test_ac_flow_without_a_value_and_with_the_reward_is_orw_cfm_w2(configure: Configure) -> None:
    tau = 0.5
    plain = "advantage={centre: none, scale: none, clip: 30, transform: exp, temperature: 2}"
    reward = [plain, "kl={weight: 1.0, form: v_mse}", "rewards={toys:brightness: 3.0}"]
    theirs = begin(move(Trainer(configure(*ORW, *reward))))
    blind = "critic={enabled: false, warmup_iterations: 0, ramp_iterations: 0, advantage_clip: 30}"
    ours = begin(move(Trainer(configure(*AC, *reward, blind))))
    gradient = theirs.gradient()
    assert_same_gradient(ours.gradient(), gradient, rtol=1e-5)

    trainer = theirs.trainer  # flow.md 8.1
    batch = update_of(theirs).noised.batch(all_of(theirs))
    error, velocity = errors(trainer, batch)
    with torch.no_grad():
        reference = errors(twin(theirs, configure(*ORW, *reward)), batch)[1]
    assert isinstance(theirs.assignment, Samples)
    weight = torch.exp(tau * theirs.assignment.rewards).float()
    assert weight.std() > 1e-3
    weight = (weight / weight.mean()).repeat_interleave(2)
    loss = weight * error + 1.0 * (velocity - reference).square().flatten(1).mean(1)
    assert_same_gradient(gradient, by_hand(trainer, loss.mean()))


def test_a_critic_that_knows_all_rewards_leaves_supervised_training(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = "critic={advantage_clip: 3, warmup_iterations: 0, ramp_iterations: 0, gate: -1000, widths: [8], hidden: 8}"
    drill = begin(move(Trainer(configure(*AC, clip))))
    assert isinstance(drill.assignment, Samples) and drill.trainer.engine.critic is not None
    shaped = drill.assignment.advantages.float()
    monkeypatch.setattr(drill.trainer.engine.critic, "value", lambda *_args, **_more: shaped.repeat_interleave(2))
    found = drill.gradient()
    error, _ = errors(drill.trainer, update_of(drill).noised.batch(all_of(drill)))
    assert_same_gradient(found, by_hand(drill.trainer, error.mean()))


def test_while_the_critic_learns_alone_the_actor_keeps_every_bit(configure: Configure) -> None:
    trainer = Trainer(configure(*AC, CRITIC, "kl={weight: 0.1, form: v_mse}"))
    assert trainer.engine.critic is not None
    before, critic = weights(trainer), [p.detach().clone() for p in trainer.engine.critic.parameters]
    for iteration in (1, 2):
        metrics, _ = trainer.iterate(iteration)
        assert difference(before, weights(trainer)) == 0
        assert (metrics["updates"], metrics["critic/strength"], metrics["nfe/backward"]) == (0, 0.0, 0)
        assert metrics["nfe/used"] == metrics["nfe/minimum"] == 3 * 4 * 4  # the rollout's
        assert trainer.num_updates == 0 and not trainer.optimizer.state
        assert trainer.ema is not None and difference(trainer.ema.average, before) == 0
        now = [p.detach().clone() for p in trainer.engine.critic.parameters]
        assert difference(critic, now) > 1e-4
        critic = now
    strengths = []
    for iteration in (3, 4, 5):
        metrics, _ = trainer.iterate(iteration)
        strengths.append(metrics["critic/strength"])
        assert metrics["nfe/used"] == metrics["nfe/minimum"] == 3 * 4 * (4 + 2 * (1 + 1 + 1))
        assert metrics["updates"] == 1
    assert strengths == [0.5, 1.0, 1.0]
    assert difference(before, weights(trainer)) > 1e-4


def test_the_advantages_grow_over_the_ramp(configure: Configure) -> None:
    found = []
    for ramp in (1, 4):
        critic = f"critic={{enabled: false, warmup_iterations: 0, ramp_iterations: {ramp}}}"
        trainer = move(Trainer(configure(*AC, critic, "advantage={transform: identity}")))
        found.append(begin(trainer).gradient())
        assert trainer.engine.critic is not None and trainer.engine.critic.strength(1) == 1 / ramp
    assert_same_gradient([4 * g for g in found[1]], found[0])


def test_the_critic_learns_from_the_states_and_shaped_rewards_of_the_iteration(configure: Configure) -> None:
    trainer = Trainer(configure(*AC, CRITIC, "critic={updates_per_iteration: 200, target_decay: 0.9}", "rewards=[toys:redness]"))
    assert trainer.iterate(1)[0]["critic/explained_variance"] is not None
    assert trainer.engine.critic is not None
    drill = begin(trainer, 1)
    assert isinstance(drill.assignment, Samples)
    # on the states that it was fitted to, the critic now says what they were worth
    rows = trainer.policy.prompt_rows([p.text for p in drill.prompts])
    leaves = all_of(drill)
    noised = NoisedSamples(
        trainer.config, trainer.policy, drill.rollout, leaves, leaves, prompt_rows=rows, numbers=[0, 1, 2], iteration=1, sigmas=trainer.engine.sigmas, shift=3.0
    )
    seen = noised.batch(leaves)
    value = trainer.engine.critic.value(seen.x, seen.sigma, seen.prompt_row, pooled=trainer.policy.pooled)
    target = drill.assignment.advantages.float().repeat_interleave(2)
    found = torch.corrcoef(torch.stack([value, target]))[0, 1]
    assert found > 0.5, found


@pytest.mark.parametrize("method", [AWM, NFT], ids=["awm", "nft"])
def test_training_raises_the_reward(configure: Configure, method: list[str]) -> None:
    settings = ["advantage={centre: group, scale: group_std}", "rollout={groups_per_iteration: 4, group_size: 8}", "optimizer.learning_rate=0.02"]
    trainer = Trainer(configure(*method, *settings, "rewards=[toys:redness]"))
    means = [trainer.iterate(iteration)[0]["reward/total/mean"] for iteration in range(1, 26)]
    assert sum(means[-5:]) / 5 > sum(means[:5]) / 5 + 0.01
