"""Updates that follow the reward's gradient: against finite differences through the sampler, by hand, and whether they raise the reward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from drills import ODE, Drill, RowCount, assert_same_gradient, begin, by_hand, difference, move, put, weights
from torch import Tensor

from flowrl.config import Config
from flowrl.trainer import Trainer
from flowrl.types import Prompt, Rollout, SampleBatch, UserError
from flowrl.updates.direct import DirectUpdate, kept_steps, steps_with_gradient
from samplers.direct import clean_estimate
from samplers.forest import leaves_only

Configure = Callable[..., Config]
COMMON = [ODE, "rewards=[toys:Warmth]"]
REFL = [*COMMON, "method=refl", "direct={low: 1, high: 4, threshold: null, scale: 1}"]
DRAFT = [*COMMON, "method=draft", "direct={renoise: 0}"]
LV = [*COMMON, "method=draft", "direct={last_steps: 1, renoise: 3}"]
ALIGN = [*COMMON, "method=srpo", "direct={sigma_low: 0.2, sigma_high: 0.8, sigma_jump: 0.15, threshold: null, inversion: false}"]


def update_of(drill: Drill) -> DirectUpdate:
    update = drill.material()
    assert isinstance(update, DirectUpdate)
    return update


def warmth(images: Tensor) -> Tensor:
    return (images[:, 0] - images[:, 2]).flatten(1).mean(1)


def velocity_of(trainer: Trainer) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return trainer.policy.velocity(trainer.config.rollout.guidance_scale)


# --- where it starts ----------------------------------------------------------------------------------------------------------------------------


def test_the_step_that_refl_starts_from_is_drawn_for_every_iteration(configure: Configure) -> None:
    config, late = configure(*REFL, "direct={low: 1, high: 3}"), configure(*REFL, "direct={low: 2, high: null}")
    assert {kept_steps(config, iteration) for iteration in range(1, 40)} == {(1,), (2,)}
    assert {kept_steps(late, iteration) for iteration in range(1, 40)} == {(2,), (3,)}
    assert steps_with_gradient(config, 1) == 1


def test_draft_starts_k_steps_before_the_end_and_alignprop_draws_k(configure: Configure) -> None:
    assert kept_steps(configure(*DRAFT, "direct.last_steps=3"), 5) == (1,)
    assert steps_with_gradient(configure(*DRAFT, "direct.last_steps=3"), 5) == 3
    random = configure(*DRAFT, "direct={last_steps: 3, random_steps: true}")
    drawn = [steps_with_gradient(random, iteration) for iteration in range(1, 60)]
    assert set(drawn) == {1, 2, 3}
    assert [kept_steps(random, iteration) for iteration in range(1, 60)] == [(4 - k,) for k in drawn]
    for finished in (LV, ALIGN):
        assert kept_steps(configure(*finished), 1) == ()


def test_the_latents_to_start_from_are_those_of_the_rollout(configure: Configure) -> None:
    trainer = Trainer(configure(*DRAFT, "direct.last_steps=3", "training.rows_per_forward=6"))
    drill = begin(trainer)
    update = update_of(drill)
    assert update.unit_group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert update.sigma.tolist() == [trainer.engine.sigmas[1]] * 12
    # three more Euler steps without gradient end in the leaves
    with torch.no_grad():
        clean = update._clean(torch.arange(12))
    torch.testing.assert_close(clean, drill.rollout.leaves, rtol=1e-4, atol=1e-5)


# --- the gradient -------------------------------------------------------------------------------------------------------------------------------


def slope(trainer: Trainer, direction: Sequence[Tensor], value: Callable[[], Tensor], step: float) -> float:
    """Central difference of a value along a direction of the weights."""
    before, found = weights(trainer), []
    for sign in (1, -1):
        put(trainer, [b + sign * step * d for b, d in zip(before, direction, strict=True)])
        with torch.no_grad():
            found.append(value().double())
    put(trainer, before)
    return float((found[0] - found[1]) / (2 * step))


@pytest.mark.parametrize(
    "settings",
    [
        REFL,
        [*DRAFT, "direct.last_steps=1"],
        [*DRAFT, "direct.last_steps=2"],
        [*DRAFT, "direct.last_steps=4"],  # through the whole sampler
        LV,
        ALIGN,
        [*ALIGN, "direct={inversion: true, threshold: 0.3, scale: 0.5, positive_text: Realistic, negative_text: CG}"],
    ],
    ids=["refl", "draft 1", "draft 2", "draft 4", "draft lv", "direct align", "srpo"],
)
def test_the_gradient_is_a_finite_difference_of_the_reward(configure: Configure, settings: list[str]) -> None:
    settings = [*settings, "rewards={'toys:Warmth': {args: {word: CG}}}", "training.rows_per_backward=7"]
    trainer = move(Trainer(configure(*settings)), size=0.1)
    drill = begin(trainer)
    found = drill.gradient()
    norm = torch.cat([g.flatten() for g in found]).norm()
    assert norm > 1e-4
    d, update = trainer.config.direct, update_of(drill)

    def loss() -> Tensor:
        """The mean over samples, written out again from latents to loss."""
        velocity, x, sigma, row = velocity_of(trainer), update.x, update.sigma.float().view(-1, 1, 1, 1), update.prompt_row
        if trainer.config.objective.name == "direct_align":
            assert update.noise is not None
            x0, noise = drill.rollout.leaves, update.noise
            jump = torch.full((12, 1, 1, 1), -d.sigma_jump)
            jump[1::2] *= -1 if d.inversion else 1
            a, b = sigma, sigma + jump
            x = (1 - a) * x0 + a * noise
            clean = (x + (b - a) * velocity(x, update.sigma, row) - b * noise) / (1 - b)
        else:
            levels = trainer.engine.sigmas[update.step :] if trainer.config.objective.name == "draft" else (update.sigma[0].item(), 0.0)
            clean = x
            for here, after in itertools.pairwise(levels):
                clean = clean - (here - after) * velocity(clean, torch.full((len(x),), here, dtype=torch.float64), row)
        reward = warmth(trainer.policy.decode_with_grad(clean))
        if d.positive_text:
            reward = reward - -reward  # toys:Warmth turns round where the prompt has the word CG
        if d.inversion:
            reward[1::2] *= -1
        return (d.scale * (-reward if d.threshold is None else (d.threshold - reward).clamp_min(0))).mean()

    direction = [g / norm for g in found]
    assert slope(trainer, direction, loss, 0.02) == pytest.approx(norm.item(), rel=0.02)


@pytest.mark.parametrize("scale", [1.0, 2.0])  # with guidance the unconditional half has no gradient, so that a finite difference is another number
def test_the_gradient_of_refl_by_hand(configure: Configure, scale: float) -> None:
    trainer = move(Trainer(configure(*REFL, f"rollout.guidance_scale={scale}")))
    drill = begin(trainer)
    found, rows = drill.gradient(), drill.rollout
    prompt_rows = trainer.policy.prompt_rows([p.text for p in drill.prompts])[rows.row_group]
    clean = clean_estimate(velocity_of(trainer), rows.row_x, rows.row_sigma, prompt_rows)
    reward = trainer.rewards.differentiable_total(
        SampleBatch([drill.prompts[g] for g in rows.row_group.tolist()], images=trainer.policy.decode_with_grad(clean))
    )
    assert_same_gradient(found, by_hand(trainer, -reward.mean()))
    metrics = drill.update()
    assert metrics["direct/reward"] == pytest.approx(reward.mean().item(), rel=1e-4)
    assert metrics["loss"] == pytest.approx(-reward.mean().item(), rel=1e-4)


def test_above_the_threshold_nothing_is_learned_and_the_scale_multiplies(configure: Configure) -> None:
    def gradient(*settings: str) -> list[Tensor]:
        return begin(move(Trainer(configure(*REFL, *settings)))).gradient()

    plain = gradient()
    assert_same_gradient(gradient("direct.threshold=9"), plain)
    assert_same_gradient(gradient("direct.scale=0.25"), [g / 4 for g in plain])
    assert difference(gradient("direct.threshold=-9"), [torch.zeros_like(g) for g in plain]) == 0


def test_a_prefix_is_put_before_the_prompt_and_the_other_ones_reward_is_subtracted(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(configure(*ALIGN, "direct={positive_text: Fine, negative_text: Bad}"))
    drill = begin(trainer)
    shown: list[list[Prompt]] = []
    original = trainer.rewards.differentiable_total

    def spy(batch: SampleBatch) -> Tensor:
        shown.append(list(batch.prompts))
        return original(batch)

    monkeypatch.setattr(trainer.rewards, "differentiable_total", spy)
    metrics = drill.update()
    expected = [drill.prompts[g].text for g in range(3) for _ in range(4)]
    assert [[p.text for p in prompts] for prompts in shown] == [[f"Fine {t}" for t in expected], [f"Bad {t}" for t in expected]]
    assert metrics["direct/reward"] == 0.0  # both get the same of this reward
    assert metrics["grad_norm"] == 0.0


def test_every_second_sample_of_the_iteration_steps_towards_noise_whoever_samples_it(configure: Configure) -> None:
    trainer = Trainer(configure(*ALIGN, "direct.inversion=true", "rollout.group_size=3"))
    given = {"iteration": 1, "sigmas": tuple(trainer.engine.sigmas)}
    rows = trainer.policy.prompt_rows(["a", "b", "c"])

    def upside_down(numbers: list[int]) -> list[bool]:
        rollout = leaves_only(torch.zeros(3 * len(numbers), 4, 4, 4), torch.arange(len(numbers)).repeat_interleave(3))
        prompts = [Prompt("abc"[n]) for n in numbers]
        update = DirectUpdate(trainer.config, trainer.policy, trainer.rewards, rollout, prompts=prompts, prompt_rows=rows[numbers], numbers=numbers, **given)
        return update.upside_down.tolist()

    whole = upside_down([0, 1, 2])
    assert whole == [False, True] * 4 + [False]
    assert upside_down([0, 2]) + upside_down([1]) == whole[:3] + whole[6:] + whole[3:6]


def test_draft_lv_puts_fresh_noise_of_the_last_level_on_every_sample(configure: Configure) -> None:
    trainer = Trainer(configure(*LV))
    drill = begin(trainer)
    update = update_of(drill)
    last = trainer.engine.sigmas[-2]
    assert update.sigma.tolist() == [last] * 36
    assert update.unit_group.tolist() == torch.arange(3).repeat_interleave(12).tolist()
    noise = (update.x - (1 - last) * drill.rollout.leaves.repeat_interleave(3, 0)) / last
    torch.testing.assert_close(noise, update.noise, rtol=1e-4, atol=1e-4)
    assert noise.std() == pytest.approx(1, abs=0.1)
    assert len(noise.flatten(1).unique(dim=0)) == 36


def test_levels_of_direct_align_lie_in_their_range_and_differ(configure: Configure) -> None:
    sigma = update_of(begin(Trainer(configure(*ALIGN)))).sigma
    assert len(sigma.unique()) == 12
    assert 0.2 <= sigma.min() < sigma.max() <= 0.8
    assert len(update_of(begin(Trainer(configure(*ALIGN, "direct={sigma_low: 0.15, sigma_high: 0.15}")))).sigma.unique()) == 1
    Trainer(configure(*ALIGN, "direct={sigma_low: 0.15, sigma_high: 0.15}")).iterate(1)  # a step down to exactly 0


def test_recomputing_the_steps_gives_the_same_gradient_for_twice_the_rows(configure: Configure) -> None:
    found, rows = [], []
    for recompute in (False, True):
        trainer = move(Trainer(configure(*DRAFT, "direct.last_steps=3", f"direct.recompute={recompute}", "training.rows_per_backward=6")))
        found.append(begin(trainer).gradient())
        metrics, _ = trainer.iterate(1)
        assert metrics["nfe/used"] == metrics["nfe/minimum"]
        rows.append((metrics["nfe/forward"], metrics["nfe/backward"]))
    assert_same_gradient(*found)
    sampled = 12 * 4
    assert rows == [(sampled + 36, 36), (sampled + 72, 72)]


@pytest.mark.parametrize("settings", [REFL, [*DRAFT, "direct.last_steps=3"], LV, ALIGN], ids=["refl", "draft", "lv", "align"])
def test_the_size_of_a_micro_batch_does_not_change_the_gradient(configure: Configure, settings: list[str]) -> None:
    found = []
    for rows in (7, 1000):
        trainer = move(Trainer(configure(*settings, f"training.rows_per_backward={rows}")))
        count, drill = RowCount(trainer), begin(trainer)
        count.backward = 0
        found.append(drill.gradient())
        assert count.backward == (36 if settings is LV or settings[-1].endswith("last_steps=3") else 12)
    assert_same_gradient(*found)


# --- training -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [REFL, [*DRAFT, "direct.last_steps=2"], [*DRAFT, "direct={last_steps: 4, random_steps: true}"], LV, [*ALIGN, "direct.inversion=true"]],
    ids=["refl", "draft", "alignprop", "draft lv", "srpo"],
)
def test_the_reward_rises(configure: Configure, settings: list[str]) -> None:
    trainer = Trainer(configure(*settings, "optimizer={learning_rate: 0.01, max_grad_norm: 1}"))
    course = [trainer.iterate(iteration)[0] for iteration in range(1, 16)]
    means = [metrics["reward/total/mean"] for metrics in course]
    assert sum(means[-3:]) / 3 > sum(means[:3]) / 3 + 0.02
    assert all(metrics["nfe/used"] == metrics["nfe/minimum"] for metrics in course)
    assert "ratio/mean" not in course[0] and "clip/low" not in course[0]


@pytest.mark.parametrize("method", ["refl", "draft", "srpo"])
def test_the_embedded_reward_can_be_followed(configure: Configure, method: str) -> None:
    trainer = Trainer(configure(ODE, f"method={method}", "direct={low: 2, high: 4}", "rewards=[ink]"))
    before = weights(trainer)
    metrics, _ = trainer.iterate(1)
    assert metrics["grad_norm"] > 0
    assert difference(before, weights(trainer)) > 1e-4


# --- mistakes -----------------------------------------------------------------------------------------------------------------------------------


def test_a_reward_without_a_gradient_is_refused_at_the_start(configure: Configure) -> None:
    with pytest.raises(UserError, match="reward toys:brightness is not differentiable, which this objective needs"):
        Trainer(configure(*REFL, "rewards={toys:brightness: 1, toys:Warmth: 1}"))
    Trainer(configure(*REFL, "rewards={toys:brightness: 0, toys:Warmth: 1}")).iterate(1)  # one that is only watched may be anything


def test_a_picture_that_has_no_score_stops_the_run(configure: Configure) -> None:
    trainer = Trainer(configure(*REFL, "rewards=[ink]"))
    drill = begin(trainer)
    broken: Rollout = drill.rollout
    broken.row_x[0, 0, 0, 0] = float("nan")
    before = weights(trainer)
    with pytest.raises(UserError, match="a reward could not score a picture that it must differentiate"):
        drill.update()
    assert difference(before, weights(trainer)) == 0
