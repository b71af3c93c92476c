"""Allocators and shaping of language models on SDE steps of pictures: groups of different sizes, groups that are not trained, rewards of unlikely pictures."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drills import Drill
from toys import PROMPTS

from flowrl.config import Config
from flowrl.engines.diffusion import Sampled
from flowrl.picture_shaping import sampled_likelihood
from flowrl.reward_metrics import join_scores
from flowrl.seeds import generator
from flowrl.trainer import Trainer
from flowrl.types import Scores, UserError
from samplers.rollout import execute

Configure = Callable[..., Config]
CHAIN = "rollout={plan: chain, num_steps: 4, groups_per_iteration: 3, group_size: 4}"
BOUNDED = "rewards=['toys:Warmth']"
KNAPSACK = "allocation={name: knapsack, args: {least: 2, most: 8, warmup: 0}}"
ZSCORE = "advantage={centre: group, scale: group_std, eps: 1.0e-12}"
UNLIKELY = "shaping=[{name: rank_unlikely, args: {strength: 0.5}}]"


def know(trainer: Trainer, rates: dict[str, float]) -> None:
    """Success rates of the prompts with these texts."""
    texts = [prompt.text for prompt in trainer.prompts]
    state = {"num_prompts": len(texts), "prompt": [texts.index(text) for text in rates], "rate": list(rates.values())}
    trainer.engine.allocation.allocator.load_state_dict(state)


def roll_out(trainer: Trainer, iteration: int = 1) -> tuple[Sampled, dict[str, Scores], Any]:
    """As `Trainer.iterate` does it."""
    indices = trainer.engine.groups(iteration)
    prompts = [trainer.prompts[i] for i in indices]
    sampled, pending = trainer.engine.roll_out(prompts, indices, list(range(len(indices))), iteration)
    return sampled, join_scores([part.result() for part in pending]), prompts


def with_rewards(trainer: Trainer, rewards: list[float], iteration: int = 1) -> tuple[Drill, dict[str, Any]]:
    """An iteration with these rewards (NaN = none) instead of the scores, and its metrics."""
    sampled, _, prompts = roll_out(trainer, iteration)
    values = torch.tensor(rewards)
    assignment, metrics = trainer.assign(sampled, {"total": Scores(values, ~values.isnan())}, prompts, list(range(len(prompts))), iteration)
    return Drill(trainer, iteration, sampled.plan, sampled.rollout, assignment, prompts), metrics


# --- counts ---


def test_samples_go_to_the_prompts_that_gain_from_them(configure: Configure) -> None:
    """Three prompts of rates 0, 1 and 0.5 share 12 samples: 2 for each of the first two, and what is left, 8, for the third."""
    trainer = Trainer(configure(CHAIN, BOUNDED, KNAPSACK))
    groups = trainer.engine.groups(1)
    names = [trainer.prompts[i].text for i in groups]
    know(trainer, {names[0]: 0.0, names[1]: 1.0, names[2]: 0.5})
    sampled, scores, _ = roll_out(trainer)
    assert torch.bincount(sampled.group).tolist() == [2, 2, 8]
    assert [(sum(node.parent < 0 for node in plan.nodes), count) for plan, count in sampled.runs] == [(2, 2), (8, 1)]
    assert sampled.num_sampled == len(scores["total"].values) == 12


def test_a_sample_of_a_large_group_is_what_it_is_alone(configure: Configure) -> None:
    trainer = Trainer(configure(CHAIN, BOUNDED, KNAPSACK))
    engine, names = trainer.engine, [trainer.prompts[i].text for i in trainer.engine.groups(1)]
    know(trainer, dict(zip(names, (0.0, 0.5, 1.0), strict=True)))
    sampled, _, prompts = roll_out(trainer)
    assert torch.bincount(sampled.group).tolist() == [2, 8, 2]
    alone = execute(
        trainer.policy.velocity(1.0),
        engine.plan(1, 8),
        trainer.policy.prompt_rows([prompts[1].text]),
        [generator(trainer.config.seed, "noise", 1, 1)],
        trainer.policy.latent_shape,
        device=trainer.policy.device,
    )
    torch.testing.assert_close(sampled.rollout.leaves[2:10], alone.leaves, rtol=1e-5, atol=1e-5)


def test_what_was_seen_decides_the_next_counts(configure: Configure) -> None:
    """Five prompts, one rate each after two iterations of three groups; a reward of -1..1 becomes a rate of 0..1."""
    trainer = Trainer(configure(CHAIN, BOUNDED, KNAPSACK))
    drill, metrics = with_rewards(trainer, [-1.0, -1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 0.6, 0.6, 0.6, math.nan])
    assert (metrics["groups/trained"], metrics["groups/singletons"]) == (3, 0)
    table = trainer.engine.allocation.allocator.table.rates
    rates = [table[trainer.prompts.index(prompt)].item() for prompt in drill.prompts]
    assert rates == pytest.approx([0.0, 0.5, 0.8])
    assert int(table.isnan().sum()) == 2


@pytest.mark.parametrize(
    "settings",
    [
        [CHAIN, KNAPSACK, "objective={updates_per_iteration: 2, inner_epochs: 2}", "kl.weight=0.1"],
        [CHAIN, KNAPSACK, "selection.fraction=0.5", "rollout.guidance_scale=2", "training.rows_per_forward=10"],
        ["rollout={groups_per_iteration: 3, group_size: 4}", KNAPSACK, "objective.reduction=group_mean"],
        ["method=awm", "rollout={plan: ode, num_steps: 4, groups_per_iteration: 3, group_size: 4}", KNAPSACK, "matching.num_times=2", "ema=null"],
        ["method=flow_dpo", "rollout={plan: ode, num_steps: 4, groups_per_iteration: 3, group_size: 4}", KNAPSACK, "matching.num_times=2"],
        [CHAIN, "allocation={name: thompson}"],
        [CHAIN, "allocation={name: variance, args: {every: 1}}"],
        [CHAIN, "allocation={name: curriculum}"],
        [CHAIN, "allocation={name: priority}"],
        [CHAIN, "allocation={name: ramp, args: {iterations: 2}}"],
    ],
    ids=["chain", "fraction", "window", "awm", "pairs", "thompson", "variance", "curriculum", "priority", "ramp"],
)
def test_no_row_is_evaluated_twice(configure: Configure, settings: list[str]) -> None:
    trainer = Trainer(configure("model.adapter=lora", *settings, BOUNDED))
    if "knapsack" in str(settings):
        know(trainer, dict(zip(PROMPTS[:5], (0.5, 0.1, 0.9, 0.0, 1.0), strict=True)))
    sizes = set()
    for iteration in (1, 2):
        metrics, _ = trainer.iterate(iteration)
        assert metrics["nfe/used"] == metrics["nfe/minimum"] > 0
        assert metrics["groups/trained"] == 3
        assert all(math.isfinite(value) for value in metrics.values() if isinstance(value, float))
        found = trainer.engine.allocation.sizes(range(3))
        assert (sum(found), max(found)) == (12, metrics["groups/largest"])
        sizes |= set(found)
    assert metrics["images"] == 24
    assert (len(sizes) > 1) == ("knapsack" in str(settings))


# --- groups that are not trained ---


def test_a_dropped_group_has_no_decisions_and_changes_no_advantage(configure: Configure) -> None:
    """Groups 0, 0, 0, 0 | 1, 2, 3, 6 | 5, 5, 5, NaN: only the second one is trained, 4 samples of 3 decisions."""
    rewards = [0.0] * 4 + [1.0, 2.0, 3.0, 6.0] + [5.0] * 3 + [math.nan]
    for scale in ("group_std", "batch_std"):
        settings = [CHAIN, f"advantage={{centre: group, scale: {scale}}}"]
        whole, plain = with_rewards(Trainer(configure(*settings)), rewards)
        drill, metrics = with_rewards(Trainer(configure(*settings, "allocation={name: drop}")), rewards)
        assert set(metrics) - set(plain) == {"groups/trained", "groups/singletons", "groups/largest"}
        assert (metrics["groups/trained"], metrics["groups/singletons"]) == (1, 0)
        assert drill.rollout.leaves.shape == whole.rollout.leaves.shape
        kept = drill.assignment.rollout
        assert kept.row_group.unique().tolist() == [1] and len(kept.edge_row) == 12 and drill.assignment.sizes == (4,)
        before = whole.assignment.rollout
        of_group = before.row_group[before.edge_row] == 1
        assert drill.assignment.advantages.equal(whole.assignment.advantages[of_group])
        assert drill.assignment.advantages.abs().max() > 0.5


def test_losses_are_divided_by_what_is_left(configure: Configure) -> None:
    """Of three groups one teaches: the mean over all decisions is a third of the mean over its own."""
    settings = [CHAIN, ZSCORE, "ema=null", "objective={reduction: mean, updates_per_iteration: 1}", "kl.weight=0"]
    rewards = [0.0] * 4 + [1.0, 2.0, 3.0, 6.0] + [5.0] * 4
    whole, _ = with_rewards(Trainer(configure(*settings)), rewards)
    dropped, _ = with_rewards(Trainer(configure(*settings, "allocation={name: drop}")), rewards)
    first = True
    for a, b in zip(whole.gradient(), dropped.gradient(), strict=True):
        torch.testing.assert_close(3 * a, b, rtol=1e-3, atol=1e-7)
        first = first and float(b.abs().max()) == 0
    assert not first


def test_an_iteration_of_equal_rewards_trains_nothing(configure: Configure) -> None:
    trainer = Trainer(configure(CHAIN, "rewards=['toys:constant']", "allocation={name: drop}", "kl.weight=0"))
    before = [p.detach().clone() for p in trainer.parameters]
    metrics, _ = trainer.iterate(1)
    assert metrics["groups/trained"] == 0
    assert metrics["nfe/used"] == metrics["nfe/minimum"] == metrics["nfe/forward"]
    assert all(a.equal(b) for a, b in zip(before, trainer.parameters, strict=True))


@pytest.mark.parametrize(
    "plan",
    [
        "{plan: tree, num_steps: 5, group_size: 4, same_noise: true}",
        "{plan: granular, num_steps: 6, group_size: 4, same_noise: true, granularities: [1, 2], window: {high: 3}}",
    ],
)
def test_groups_of_forests_are_dropped_whole(configure: Configure, plan: str) -> None:
    trainer = Trainer(configure(f"rollout={plan}", "rewards={'toys:steps': {args: {word: red}}}", "allocation={name: drop}"))
    trained = []
    for iteration in (1, 2):
        metrics, _ = trainer.iterate(iteration)
        assert metrics["nfe/used"] == metrics["nfe/minimum"]
        trained.append(metrics["groups/trained"])
    assert 0 < sum(trained) < 6  # three of the five prompts name red


# --- shaping ---


def test_an_unlikely_picture_keeps_more_of_its_reward(configure: Configure) -> None:
    """Rewards 8, strength 1/2: by rising likelihood, the mean of the decisions' log-densities, 8, 7, 6, 5. A sample without a reward has no rank."""
    trainer = Trainer(configure(CHAIN, UNLIKELY, "advantage={centre: none, scale: none, clip: 100}"))
    rewards = [8.0] * 8 + [8.0, math.nan, 4.0, 0.0]
    drill, _ = with_rewards(trainer, rewards)
    r = drill.rollout
    likelihood = torch.zeros(12, dtype=torch.float64)
    for edge, leaf in r.leaf_edge.tolist():
        likelihood[leaf] += r.edge_old_log_prob[edge].item() / 3
    torch.testing.assert_close(sampled_likelihood(r), likelihood)
    expected = torch.zeros(12)
    for members in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 10, 11]):
        for rank, leaf in enumerate(sorted(members, key=lambda leaf: likelihood[leaf].item())):
            expected[leaf] = rewards[leaf] * (1 - 0.5 * rank / len(members))
    edge, leaf = drill.assignment.rollout.leaf_edge.unbind(1)
    torch.testing.assert_close(drill.assignment.advantages[edge], expected[leaf])
    assert sorted(expected[:4].tolist()) == [5, 6, 7, 8]


def test_statistics_are_those_of_shaped_rewards(configure: Configure) -> None:
    """Rewards 8 throughout become 8, 7, 6, 5 in each group: mean 6.5, and a variance over all of 5 / 4."""
    trainer = Trainer(configure(CHAIN, UNLIKELY, "advantage={centre: batch, scale: batch_std, ddof: 0, eps: 1.0e-12}"))
    drill, metrics = with_rewards(trainer, [8.0] * 12)
    edge, leaf = drill.assignment.rollout.leaf_edge.unbind(1)
    found = torch.zeros(12).index_put((leaf,), drill.assignment.advantages[edge])
    torch.testing.assert_close(found.view(3, 4).sort().values, (torch.tensor([-1.5, -0.5, 0.5, 1.5]) / 1.25**0.5).expand(3, 4))
    assert metrics["reward/total/mean"] == 8


def test_the_likelihood_of_a_picture_is_the_size_of_its_noise(configure: Configure) -> None:
    """-eps^2 / 2 on average over 3 steps of 64 elements, plus what all samples share: its variance is 1 / (2 x 192)."""
    sampled, _, _ = roll_out(Trainer(configure(CHAIN, "rollout.group_size=128")))
    likelihood = sampled_likelihood(sampled.rollout)
    assert likelihood.std().item() == pytest.approx((1 / 384) ** 0.5, rel=0.12)
    assert likelihood.view(3, -1).mean(1).std() < 0.02


def test_without_strength_nothing_changes(configure: Configure) -> None:
    rewards = [1.0, 2.0, 3.0, 6.0] * 3
    plain, before = with_rewards(Trainer(configure(CHAIN, ZSCORE)), rewards)
    shaped, after = with_rewards(Trainer(configure(CHAIN, ZSCORE, UNLIKELY.replace("0.5", "0"))), rewards)
    torch.testing.assert_close(plain.assignment.advantages, shaped.assignment.advantages)
    assert before == after


def test_metrics_and_allocators_see_rewards_before_shaping(configure: Configure) -> None:
    """Equal rewards become different ones; the group is dropped all the same."""
    trainer = Trainer(configure(CHAIN, ZSCORE, UNLIKELY, "allocation={name: drop}"))
    drill, metrics = with_rewards(trainer, [5.0] * 4 + [1.0, 2.0, 3.0, 6.0] * 2)
    assert metrics["groups/trained"] == 2 and metrics["reward/total/mean"] == pytest.approx(11 / 3)
    assert drill.assignment.rollout.row_group.unique().tolist() == [1, 2]


def test_negative_rewards_are_warned_about(configure: Configure, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Trainer(configure(CHAIN, UNLIKELY, "rewards={'toys:Steps': {args: {word: red}}}"))  # 0 to 1
        assert "which raises those below 0" not in caplog.text
        Trainer(configure(CHAIN, UNLIKELY, BOUNDED))
    assert "which raises those below 0" in caplog.text


# --- resume, memory, refusals ---


@pytest.mark.parametrize("allocation", [KNAPSACK, "allocation={name: thompson}"])
def test_a_resumed_run_asks_the_same(configure: Configure, allocation: str) -> None:
    config = configure(CHAIN, BOUNDED, allocation)
    one, two = Trainer(config), Trainer(config)
    for iteration in (1, 2):
        one.iterate(iteration)
    two.load_state(one.state())
    for trainer in (one, two):
        trainer.metrics, _ = trainer.iterate(3)
    assert one.metrics == two.metrics
    assert one.engine.allocation.sizes(range(3)) == two.engine.allocation.sizes(range(3))
    assert one.engine.allocation.state_dict() == two.engine.allocation.state_dict()


def test_a_checkpoint_of_another_allocator_is_refused(configure: Configure) -> None:
    state = Trainer(configure(CHAIN)).state()
    with pytest.raises(UserError, match="the checkpoint was written with uniform, and the config says drop; go on with the same"):
        Trainer(configure(CHAIN, "allocation={name: drop}")).load_state(state)
    del state["engine"]["allocation"]  # as older checkpoints are
    Trainer(configure(CHAIN)).load_state(state)


def test_memory_is_that_of_the_largest_groups(configure: Configure) -> None:
    """12 samples of 3 groups, 2 to 8 each: one group may have 8, two may have 10, three have all 12."""
    allocation = Trainer(configure(CHAIN, BOUNDED, KNAPSACK)).engine.allocation
    assert [allocation.most_samples(groups) for groups in (1, 2, 3)] == [8, 10, 12]
    assert [Trainer(configure(CHAIN)).engine.allocation.most_samples(groups) for groups in (1, 3)] == [4, 12]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["allocation.name=dynamic"],
            "dynamic samples in rounds or keeps samples, which only language models do; with .* use one of uniform, drop, knap",
        ),
        (["allocation.name=past"], "past samples in rounds or keeps samples"),
        (["allocation.name=xrpo"], "xrpo samples in rounds or keeps samples"),
        (["allocation.name=knapsak"], "allocation: unknown knapsak; did you mean knapsack"),
        (["allocation={name: knapsack, args: {most: 1}}"], "allocation: knapsack: 1 <= least <= most"),
        (["allocation.samples=[expert]"], "allocation.samples: answers from elsewhere belong to language models"),
        ([CHAIN, KNAPSACK, "rollout.same_noise=true"], "makes groups of different sizes, and samples with the same start noise share network rows"),
        ([KNAPSACK, "rollout={plan: granular, num_steps: 5}"], "makes groups of different sizes, and the samples of a granular plan share network rows"),
        ([KNAPSACK, "method=draft", "rollout={plan: ode}"], "makes groups of different sizes, and objective draft compares no groups; use uniform"),
        ([KNAPSACK, "method=ac_flow", "rollout={plan: ode}"], "makes groups of different sizes, and a critic need"),
        ([KNAPSACK, "method=awm", "rollout={plan: ode}", "objective.updates_per_iteration=2"], "and several updates on finished samples need equal ones"),
        (["allocation.name=drop", "method=awm", "rollout={plan: ode}"], "drop leaves out SDE steps, and here finished samples are trained"),
        (["allocation.name=drop", CHAIN, "rollout.group_shards=2"], "drop looks at whole groups, which rollout.group_shards: 2 takes apart"),
        (["shaping=[overlong]"], "shaping: overlong shapes answers of language models; with likelihood: transition there is rank_unlikely"),
        (["shaping=[rank_unlikly]"], "shaping: unknown rank_unlikly; did you mean rank_unlikely"),
        (["shaping=[{name: rank_unlikely, args: {strength: 2}}]"], r"shaping: rank_unlikely: strength must be in \[0, 1\]"),
        ([UNLIKELY, "method=awm", "rollout={plan: ode}"], "ranks samples by the log-probability of their SDE steps; use likelihood: transition"),
        ([UNLIKELY, "rollout.kernel=cps"], "ranks samples by their log-probability, which the cps kernel does not give"),
        ([UNLIKELY, "rollout={plan: tree, num_steps: 5, group_size: 4}"], "use likelihood: transition, an objective of steps, and plan: chain or window"),
        ([UNLIKELY, "rewards={toys:brightness: 1, toys:redness: 1}", "advantage.aggregate=gdpo"], "changes the weighted sum of the rewards"),
        ([UNLIKELY, CHAIN, "rollout.group_shards=2"], "ranks the samples of whole groups, which rollout.group_shards: 2 takes apart"),
        ([UNLIKELY, CHAIN, "credit.normalize=layer", ZSCORE], "changes rewards of whole samples, and credit.normalize: layer compares nodes"),
    ],
)
def test_what_does_not_go_together_is_refused(configure: Configure, settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configure(*settings)


def test_rewards_without_bounds_are_no_success_rates(configure: Configure) -> None:
    with pytest.raises(UserError, match="allocation.name: it takes rewards as success rates, and these rewards have no lowest and highest value"):
        Trainer(configure(CHAIN, KNAPSACK))
