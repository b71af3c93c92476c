"""Network rows of an iteration: counted at the network, in the policy's count, in ``nfe/minimum``, and written out by hand for each method."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from drills import ODE, RowCount, move

from flowrl.config import Config
from flowrl.trainer import Trainer
from flowrl.updates.direct import steps_with_gradient
from flowrl.updates.matching import MatchingUpdate
from flowrl.updates.minimum import least_rows, rows_per_unit, units_of_samples
from samplers.nfe import Rows

Configure = Callable[..., Config]
P, G, T, TAU = 3, 4, 4, 2
"""Groups, samples of a group, steps, noise levels of a sample."""
BASE = [ODE, f"matching.num_times={TAU}", "training={rows_per_forward: 10, rows_per_backward: 5}"]
FREE = ["kl.weight=0", "anchor.weight=0", "old_policy=null"]


def assert_rows(config: Config, expected: Rows) -> None:
    """(forward, backward) of two iterations: in the second one all policies differ."""
    trainer = Trainer(config)
    count = RowCount(trainer)
    for iteration in (1, 2):
        before = (count.forward, count.backward)
        metrics, _ = trainer.iterate(iteration)
        assert (count.forward - before[0], count.backward - before[1]) == expected
        assert (metrics["nfe/forward"], metrics["nfe/backward"]) == expected
        assert metrics["nfe/used"] == metrics["nfe/minimum"] == sum(expected)
        assert metrics["nfe/total"] == iteration * sum(expected)


AWM = {
    # settings -> forward rows of a group with c = 2 with guidance of the rollout and d = 2 with that of the loss, K epochs: G [c T + d TAU (K + r + e)] and
    # d TAU M, the first update's own forward serving as its old log-probability
    "on-policy": (FREE, G * (T + TAU * 1)),
    "guidance": ([*FREE, "rollout.guidance_scale=2"], G * (2 * T + TAU * 1)),
    "guidance of the loss": ([*FREE, "matching.guidance_scale=2"], G * (T + 2 * TAU * 1)),
    "anchor": (["kl.weight=0"], G * (T + TAU * (1 + 1))),
    "reference": ([*FREE, "kl={weight: 0.1, form: v_elbo}"], G * (T + TAU * (1 + 1))),
    "anchor and reference": ([], G * (T + TAU * (1 + 1 + 1))),
    "full": (["model.adapter=full"], G * (T + TAU * (1 + 1 + 1))),
    "heun": ([*FREE, "rollout.solver=heun"], G * (2 * T - 1 + TAU)),
    "epochs": ([*FREE, "objective.inner_epochs=3"], G * (T + TAU * 3)),
    # four updates: each takes one sample of the four, and three samples need an old log-probability of their own
    "updates": ([*FREE, "objective.updates_per_iteration=4"], G * (T + TAU) + TAU * 3),
    "sum first": ([*FREE, "objective.updates_per_iteration=4", "matching.combine=sum_first"], G * (T + TAU) + TAU * 3),
    "updates and epochs": ([*FREE, "objective={updates_per_iteration: 2, inner_epochs: 3}"], G * (T + TAU * 3) + TAU * 2),
    "everything": (
        ["objective={updates_per_iteration: 2, inner_epochs: 2}", "rollout.guidance_scale=2", "matching.guidance_scale=3"],
        2 * (G * (T + TAU * (2 + 2)) + TAU * 2),
    ),
    # off-policy the old policy is asked at every state anyway, and that one pass serves anchor and ratios
    "off-policy": ([*FREE, "old_policy={rollout: true}", "objective.updates_per_iteration=2"], G * (T + TAU * (1 + 1))),
    "off-policy and anchor": (["kl.weight=0", "old_policy.rollout=true", "objective.inner_epochs=2"], G * (T + TAU * (2 + 1))),
    "reinforce": ([*FREE, "objective={name: reinforce, updates_per_iteration: 4}"], G * (T + TAU)),
    "chain": ([*FREE, "rollout.plan=chain"], G * (T + TAU)),
}


@pytest.mark.parametrize("case", AWM)
def test_awm(configure: Configure, case: str) -> None:
    settings, forward = AWM[case]
    config = configure(*BASE, "method=awm", *settings)
    assert_rows(config, (P * forward, P * G * TAU * config.objective.inner_epochs))


@pytest.mark.parametrize(
    ("settings", "forward"),
    [
        (["kl.weight=0"], G * (T + TAU * (1 + 1))),
        ([], G * (T + TAU * (1 + 1 + 1))),  # flow.md 10.1: the policy, the old one and the reference
        (["rollout.solver=heun", "objective={updates_per_iteration: 3, inner_epochs: 2}"], G * (2 * T - 1 + TAU * (2 + 1 + 1))),
        (["matching.guidance_scale=2", "anchor.weight=1"], G * (T + 2 * TAU * (1 + 1 + 1))),  # anchor and mirror share the old policy's pass
    ],
    ids=str,
)
def test_diffusion_nft(configure: Configure, settings: list[str], forward: int) -> None:
    config = configure(*BASE, "method=diffusion_nft", *settings)
    assert_rows(config, (P * forward, P * G * TAU * config.objective.inner_epochs))


@pytest.mark.parametrize("method", ["orw_cfm_w2", "flow_sft", "flow_rwr"])
def test_weighted_regression(configure: Configure, method: str) -> None:
    reference = 1 if method == "orw_cfm_w2" else 0
    assert_rows(configure(*BASE, f"method={method}", "objective.updates_per_iteration=2"), (P * G * (T + TAU * (1 + reference)), P * G * TAU))


@pytest.mark.parametrize(
    ("settings", "forward"),
    [
        (["method=flow_dpo"], G * T + 2 * TAU * (1 + 1)),
        (["method=flow_dpo", "rollout.guidance_scale=2", "objective={inner_epochs: 2, updates_per_iteration: 3}"], 2 * G * T + 2 * TAU * (2 + 1)),
        (["method=flow_rpo", "kl={weight: 0.1, form: v_mse}"], G * T + 2 * TAU * (1 + 1)),  # one reference for both
        (["method=flow_simpo", "kl.weight=0"], G * T + 2 * TAU),
        (["method=flow_simpo"], G * T + 2 * TAU * (1 + 1)),
    ],
    ids=str,
)
def test_pairs(configure: Configure, settings: list[str], forward: int) -> None:
    config = configure(*BASE, *settings)
    assert_rows(config, (P * forward, P * 2 * TAU * config.objective.inner_epochs))


@pytest.mark.parametrize(
    ("settings", "forward", "backward"),
    [
        (["method=refl", "direct={low: 1, high: 4}"], G * (T + 1), G),
        (["method=refl", "direct={low: 1, high: 4}", "objective={updates_per_iteration: 4, inner_epochs: 2}"], G * (T + 2), 2 * G),
        (["method=refl", "direct={low: 1, high: 4}", "rollout.solver=heun"], G * (2 * T - 1 + 1), G),
        (["method=draft", "direct={renoise: 0, last_steps: 3}"], G * (T + 3), 3 * G),
        (["method=draft", "direct={renoise: 2}", "rollout.guidance_scale=2"], 2 * G * (T + 2), 2 * G),
        (["method=srpo"], G * (T + 1), G),
    ],
    ids=str,
)
def test_direct_gradients(configure: Configure, settings: list[str], forward: int, backward: int) -> None:
    assert_rows(configure(*BASE, "rewards=[toys:Warmth]", *settings), (P * forward, P * backward))


def test_a_drawn_number_of_steps_is_counted(configure: Configure) -> None:
    config = configure(*BASE, "rewards=[toys:Warmth]", "method=draft", "direct={renoise: 0, last_steps: 4, random_steps: true}")
    trainer, seen = Trainer(config), set()
    for iteration in (1, 2, 3, 4):
        steps = steps_with_gradient(config, iteration)
        seen.add(steps)
        metrics, _ = trainer.iterate(iteration)
        assert (metrics["nfe/forward"], metrics["nfe/backward"]) == (P * G * (T + steps), P * G * steps)
        assert metrics["nfe/used"] == metrics["nfe/minimum"]
    assert len(seen) > 1


def test_old_log_probabilities_of_later_updates_are_as_many_as_are_dealt_to_them(configure: Configure) -> None:
    trainer = Trainer(configure(*BASE, "method=awm", *FREE))
    for groups, size, updates in itertools.product((2, 3), (4, 5), (2, 3)):
        rollout = f"rollout={{groups_per_iteration: {groups}, group_size: {size}}}"
        for together, combine in ((1, "exp_first"), (TAU, "sum_first")):
            settings = [rollout, f"objective.updates_per_iteration={updates}", f"matching.combine={combine}"]
            config = trainer.config = trainer.engine.config = configure(*BASE, "method=awm", *FREE, *settings)
            parts = trainer.split(torch.arange(groups).repeat_interleave(size * TAU // together), list(range(groups)), (1, 0))
            later = together * sum(len(part) for part in parts[1:])
            assert least_rows(config, 1, rollout=0, units=groups * size) == (TAU * groups * size + later, TAU * groups * size)


def test_one_pass_of_the_old_policy_and_one_of_the_reference_serve_all_updates(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cached predictions are those of the other policies at exactly the states that are trained, kept over updates and epochs."""
    trainer = move(Trainer(configure(*BASE, "method=awm", "objective={updates_per_iteration: 2, inner_epochs: 2}")))
    made: list[MatchingUpdate] = []
    original = trainer.engine.update

    def keep(*arguments: object) -> object:
        update, metrics = original(*arguments)  # type: ignore[arg-type]
        assert isinstance(update, MatchingUpdate)
        made.append(update)
        return update, metrics

    monkeypatch.setattr(trainer.engine, "update", keep)
    trainer.iterate(1)
    (update,) = made
    velocity = trainer.policy.velocity()
    with trainer.policy.reference():
        torch.testing.assert_close(update.reference, update.noised.velocity(velocity), rtol=1e-5, atol=1e-6)
    assert update.old is not None
    assert (update.old - update.noised.velocity(velocity)).abs().max() > 1e-4  # the policy has moved on since
    torch.testing.assert_close(update.old, update.reference, rtol=1e-5, atol=1e-6)  # the old policy was the base model in the first iteration


def test_nothing_trained_needs_no_rows_and_idle_rows_are_added(configure: Configure) -> None:
    config = configure(*BASE, "method=flow_dpo", "rollout.guidance_scale=2", "matching.guidance_scale=2")
    assert least_rows(config, 1, rollout=48, units=0) == (96, 0)
    assert least_rows(config, 1, rollout=48, units=0, placeholders=1) == (2 * (48 + 2 * TAU), 0)
    assert least_rows(config, 1, rollout=48, units=1, idle_rows=4, placeholders=1) == (2 * (48 + 2 * TAU * (2 + 1) + 4), 2 * TAU + 4)
    assert rows_per_unit(config, 1) == 2 * TAU


def test_units_and_their_rows(configure: Configure) -> None:
    awm = configure(*BASE, "method=awm")
    assert (units_of_samples(awm, P), rows_per_unit(awm, 1)) == (P * G, TAU)
    renoised = configure(*BASE, "method=draft", "rewards=[ink]", "direct={renoise: 3}")
    assert (units_of_samples(renoised, P), rows_per_unit(renoised, 1)) == (3 * P * G, 1)
    chain = configure(f"rollout={{plan: chain, num_steps: {T}}}", "kl.weight=0.1")
    assert least_rows(chain, 1, rollout=10, units=5) == (10 + 5 * 2, 5)
    assert rows_per_unit(chain, 1) == 1
    off_policy = configure(f"rollout={{plan: chain, num_steps: {T}}}", "old_policy={rollout: true}", "objective.updates_per_iteration=2")
    assert least_rows(off_policy, 1, rollout=10, units=5) == (15, 5)  # the rollout has measured the old log-probabilities of SDE steps
