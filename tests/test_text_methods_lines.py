"""Special cases of text methods that text.md can check (its lines T, and item 26 of section 12), of what flowrl/text adds to the core; tensors in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from text_runs import PROMPTS, text_config
from torch import Tensor

from flowrl.config import Config
from flowrl.core.bundles import consistency_blend
from flowrl.core.objectives import clipped_surrogate
from flowrl.core.reductions import sequence_weights
from flowrl.text.bundles import blended
from flowrl.text.covariance import clip_cov, kl_cov, wanted
from flowrl.text.gated import capo
from flowrl.text.mixed import chord, remix
from flowrl.text.ranks import smallest
from flowrl.text.samples import HINTED
from flowrl.trainer import Trainer
from flowrl.types import Decisions, Objective

FP64 = {"rtol": 1e-11, "atol": 1e-12}
SHAPE = (6, 4)
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0]]).bool()
EXPERT = torch.tensor([False, False, True, False, True, False])
NOBODY, ALL = torch.zeros(SHAPE, dtype=torch.bool), torch.ones(SHAPE, dtype=torch.bool)
CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(seed: int, mask: Tensor = MASK) -> Decisions:
    """A policy off the one that sampled, beyond its bounds on both sides."""
    old = -1 - normal(*SHAPE, seed=seed).abs()
    return Decisions((old + 0.5 * normal(*SHAPE, seed=seed + 1)).requires_grad_(), old, normal(6, seed=seed + 2)[:, None].expand(SHAPE), mask)


def gradient(loss: Tensor, decisions: Decisions) -> Tensor:
    return torch.autograd.grad(loss.sum(), decisions.log_prob, retain_graph=True)[0]


def assert_same_loss(ours: Tensor, theirs: Tensor, decisions: Decisions) -> None:
    torch.testing.assert_close(ours, theirs, **FP64)
    found = gradient(ours, decisions)
    torch.testing.assert_close(found, gradient(theirs, decisions), **FP64)
    assert found.ne(0).any()


def differences(loss: Callable[[Decisions], Tensor], decisions: Decisions, step: float = 1e-6) -> Tensor:
    """The gradient of a sum of losses, by central differences: a token's loss depends on its own log-probability alone."""
    ends = [
        loss(Decisions(decisions.log_prob.detach() + sign * step, decisions.old_log_prob, decisions.advantages, decisions.mask)).detach() for sign in (1, -1)
    ]
    return (ends[0] - ends[1]) / (2 * step)


# --- CHORD and ReMix --------------------------------------------------------------------------------------------------------------------------------


def chord_loss(decisions: Decisions, share: float, phi: bool) -> Tensor:
    """Reduced over all answers, of which 2 of 6 are an expert's."""
    weight, total = sequence_weights("seq_mean_token_mean", MASK, dtype=torch.float64)
    scales = {"own_scale": 6 / 4, "expert_scale": 6 / 2}
    found = chord(decisions, is_expert=EXPERT[:, None].expand(SHAPE), iteration=1, **scales, **CLIP, phi=phi, peak=share, valley=share)
    return (weight * found.loss).sum() / total


def test_b10_chord_without_a_share_is_grpo_on_the_own_answers_and_with_all_of_it_supervised_learning_on_the_experts() -> None:
    decisions = draw(0)
    length = MASK.sum(1)
    own = (clipped_surrogate(decisions, **CLIP).loss.sum(1) / length)[~EXPERT].mean()
    taught = (torch.where(MASK, -decisions.log_prob, 0.0).sum(1) / length)[EXPERT].mean()
    p = decisions.log_prob.detach().exp()
    weighed = (torch.where(MASK, -p * (1 - p) * decisions.log_prob, 0.0).sum(1) / length)[EXPERT].mean()
    assert_same_loss(chord_loss(decisions, 0.0, phi=False), own, decisions)
    assert_same_loss(chord_loss(decisions, 1.0, phi=False), taught, decisions)
    assert_same_loss(chord_loss(decisions, 1.0, phi=True), weighed, decisions)
    assert_same_loss(chord_loss(decisions, 0.3, phi=True), 0.7 * own + 0.3 * weighed, decisions)


def test_b12_a_trajectory_of_the_current_policy_has_ppos_loss_in_remix() -> None:
    decisions = draw(3)
    ours = remix(decisions, proximal_log_prob=decisions.old_log_prob, **CLIP).loss
    assert_same_loss(ours, clipped_surrogate(decisions, **CLIP).loss, decisions)
    past = remix(decisions, proximal_log_prob=decisions.old_log_prob + 0.5, **CLIP).loss
    assert not torch.allclose(past, ours)


# --- tokens that are left out or held -----------------------------------------------------------------------------------------------------------------


def test_b22_capo_without_a_threshold_is_its_base_and_with_all_tokens_rejected_0() -> None:
    decisions = draw(6)
    squares = decisions.log_prob.detach().exp().square() + 0.05
    assert_same_loss(capo(decisions, square_sum=squares, threshold=math.inf, **CLIP).loss, clipped_surrogate(decisions, **CLIP).loss, decisions)
    none = capo(decisions, square_sum=squares, threshold=1e-30, **CLIP).loss
    assert none.eq(0).all()
    assert gradient(none, decisions).eq(0).all()


def test_c7_with_share_0_no_token_is_chosen_and_the_losses_are_ppos_and_the_unclipped_surrogates() -> None:
    decisions = draw(9)
    assert wanted(0.0, 1e6) == 0
    covariance = normal(*SHAPE, seed=5).float()
    chosen = smallest(covariance, MASK, wanted(0.0, float(MASK.sum())), float)
    assert not chosen.any()
    assert smallest(covariance, MASK, wanted(0.2, float(MASK.sum())), float).sum() == 3
    assert_same_loss(clip_cov(decisions, dropped=chosen, **CLIP).loss, clipped_surrogate(decisions, **CLIP).loss, decisions)
    unclipped = torch.where(MASK, -decisions.advantages * (decisions.log_prob - decisions.old_log_prob).exp(), 0.0)
    assert_same_loss(kl_cov(decisions, held=chosen, coefficient=5.0).loss, unclipped, decisions)


def test_c7_gradients_of_chosen_tokens_are_differences() -> None:
    decisions, chosen = draw(12), torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.5
    delta = decisions.log_prob - decisions.old_log_prob
    ppo = clipped_surrogate(decisions, **CLIP).loss
    held = -decisions.advantages * delta.exp() + 2 * chosen * delta.abs()
    for loss, written in (
        (lambda d: clip_cov(d, dropped=chosen, **CLIP).loss, torch.where(chosen, 0.0, ppo)),
        (lambda d: kl_cov(d, held=chosen, coefficient=2.0).loss, torch.where(MASK, held, 0.0)),
    ):
        assert_same_loss(loss(decisions), written, decisions)
        torch.testing.assert_close(gradient(written, decisions), differences(loss, decisions), rtol=1e-6, atol=1e-8)


TOKEN_LOSSES: dict[str, Callable[[Decisions], Objective]] = {
    "chord": lambda d: chord(d, is_expert=EXPERT[:, None].expand(SHAPE), iteration=1, own_scale=1.5, expert_scale=3.0),
    "remix": lambda d: remix(d, proximal_log_prob=d.old_log_prob + 0.1),
    "capo": lambda d: capo(d, square_sum=torch.full(SHAPE, 0.3, dtype=torch.float64), threshold=1.0, **CLIP),
    "clip_cov": lambda d: clip_cov(d, dropped=NOBODY, **CLIP),
    "kl_cov": lambda d: kl_cov(d, held=ALL),
}


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_item_26_losses_of_nothing_are_0_with_gradient_0(name: str) -> None:
    full = draw(15)
    assert gradient(TOKEN_LOSSES[name](full).loss, full).ne(0).any()
    empty = draw(15, mask=NOBODY)
    loss = TOKEN_LOSSES[name](empty).loss
    assert loss.requires_grad
    assert loss.eq(0).all()
    assert gradient(loss, empty).eq(0).all()


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_item_28_parts_add_to_the_whole(name: str) -> None:
    decisions = draw(18)
    weight, total = sequence_weights("mean", MASK, dtype=torch.float64)
    whole = (weight * TOKEN_LOSSES[name](decisions).loss).sum() / total
    parts = torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 2), slice(2, 6)):
        mask = torch.zeros_like(MASK)
        mask[rows] = MASK[rows]
        weight, _ = sequence_weights("mean", mask, dtype=torch.float64)
        masked = Decisions(decisions.log_prob, decisions.old_log_prob, decisions.advantages, mask)
        parts = parts + (weight * TOKEN_LOSSES[name](masked).loss).sum() / total
    assert_same_loss(parts, whole, decisions)


# --- COPO -------------------------------------------------------------------------------------------------------------------------------------------


def copo(decisions: Decisions, rewards: Tensor, *, gamma: float, entropy_centre: float) -> Tensor:
    group, everyone = torch.tensor([0, 0, 0, 1, 1, 1]), torch.ones(6, dtype=torch.bool)
    blend = consistency_blend(rewards, group, everyone, 2, answer=None, num_answers=0, gamma=gamma, entropy_centre=entropy_centre, eps=0.0)
    answers = SimpleNamespace(extra={"blend": blend}, config=SimpleNamespace(advantage=SimpleNamespace(clip=50.0)))
    batch: Any = SimpleNamespace(answers=answers, decisions=decisions, of=lambda values: values)
    return blended(batch, lambda d: clipped_surrogate(d, **CLIP)).loss


def test_a13_groups_without_spread_but_of_different_success_have_a_gradient_that_prefers_the_better_prompt() -> None:
    decisions = draw(21)
    loss = copo(decisions, torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64), gamma=3.0, entropy_centre=1.0)
    found = gradient(loss, decisions)
    assert found[:3].ne(0).any() and found[3:].ne(0).any()
    assert (found[:3] <= 0).all() and (found[3:] >= 0).all()
    weight, size = 1 / (1 + math.exp(3)), 1 / math.sqrt(2)  # the entropy of each group is 0; success 1 and 0 have the z-scores +-1 / sqrt(2)
    world = torch.tensor([size] * 3 + [-size] * 3, dtype=torch.float64)[:, None].expand(SHAPE)
    theirs = (1 - weight) * clipped_surrogate(Decisions(decisions.log_prob, decisions.old_log_prob, world, MASK), **CLIP).loss
    torch.testing.assert_close(loss, theirs, rtol=1e-6, atol=1e-7)  # advantages are float32
    torch.testing.assert_close(found, gradient(theirs, decisions), rtol=1e-6, atol=1e-7)
    silent = copo(decisions, torch.ones(6, dtype=torch.float64), gamma=3.0, entropy_centre=1.0)
    assert gradient(silent, decisions).eq(0).all()  # and equal prompts have none


def test_a13_with_a_steep_weight_below_all_entropies_the_loss_is_grpos() -> None:
    decisions, rewards = draw(24), torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    r = rewards.view(2, 3)
    grpo = ((r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True)).reshape(6, 1).expand(SHAPE)
    theirs = clipped_surrogate(Decisions(decisions.log_prob, decisions.old_log_prob, grpo, MASK), **CLIP).loss
    ours = copo(decisions, rewards, gamma=1e6, entropy_centre=0.5)  # the entropies are 0.64
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient(ours, decisions), gradient(theirs, decisions), rtol=1e-6, atol=1e-7)


# --- presets whose special case is GRPO -------------------------------------------------------------------------------------------------------------


HELPED = '''
import torch
from flowrl.types import RewardInfo, Scores

class Helped:
    """1 for what is asked after the first answers, that is with a hint; the first ones have 0."""
    info = RewardInfo(name="helped", description="asked again", low=0.0, high=1.0, reads=("texts",))
    calls = 0

    def load(self, device, dtype):
        Helped.calls = 0

    def score(self, batch):
        Helped.calls += 1
        values = torch.full((len(batch.texts),), float(Helped.calls > 1))
        return Scores(values, torch.ones(len(values), dtype=torch.bool))
'''


@pytest.fixture(scope="module")
def configure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Config]]:
    folder = tmp_path_factory.mktemp("lines")
    rows = [{"prompt": text, "solution": f"it is {number} really", "hints": ["it", "it is", f"it is {number}"]} for number, text in enumerate(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "helped.py").write_text(HELPED)
    same = ["rollout={groups_per_iteration: 3, group_size: 4}", "generation.max_new_tokens=8", "objective.updates_per_iteration=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield lambda method, *more: text_config(folder, f"method={method}", f"data.train={folder / 'prompts.jsonl'}", *same, *more)


@pytest.mark.parametrize(
    ("method", "overrides", "besides"),
    [
        # B2: without its filter of groups, which leaves mixed groups alone (E1)
        (
            "dapo",
            ["objective.clip_high=0.2", "objective.reduction=seq_mean_token_mean", "shaping=[]", "kl.form=k3", "optimizer.learning_rate=1e-4"],
            {"allocation"},
        ),
        # G5: an episode of one turn is an answer
        ("agent_flow", ["kl.weight=0", "optimizer.learning_rate=1e-4"], {"environment", "generation"}),
    ],
)
def test_b2_and_g5_a_preset_without_what_is_its_own_is_grpos_config(
    method: str, overrides: list[str], besides: set[str], configure: Callable[..., Config]
) -> None:
    ours, theirs = configure(method, *overrides), configure("grpo", "optimizer.learning_rate=1e-4")
    different = {name for name in type(ours).model_fields if getattr(ours, name) != getattr(theirs, name)}
    assert different == {"method", *besides}


@pytest.fixture(scope="module")
def grpo_weights(configure: Callable[..., Config]) -> Tensor:
    return weights_after_one_iteration(configure("grpo", *ALIKE))


ALIKE = ("optimizer.learning_rate=1e-3", "kl.weight=0", "objective.reduction=seq_mean_token_mean", "seed=3")


def weights_after_one_iteration(config: Config) -> Tensor:
    trainer = Trainer(config)
    metrics, _ = trainer.iterate(1)
    assert metrics["ratio/max_abs_log_first"] < 1e-4
    assert trainer.samples == 12  # nothing was asked beside the groups
    return torch.cat([p.detach().flatten() for p in trainer.parameters])


@pytest.mark.parametrize("method", ["scaf_grpo", "ghpo", "guide_grpo", "arpo_gui", "remix"])
def test_e6_and_e7_a_source_that_is_never_needed_or_empty_leaves_grpo(method: str, configure: Callable[..., Config], grpo_weights: Tensor) -> None:
    found = weights_after_one_iteration(configure(method, *ALIKE))
    torch.testing.assert_close(found, grpo_weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("method", "replaced"), [("scaf_grpo", 3), ("ghpo", 12)])
def test_e6_an_answer_that_is_trained_in_the_context_it_was_sampled_in_has_ratio_1(method: str, replaced: int, configure: Callable[..., Config]) -> None:
    """The hint is in both contexts: the ratios of the first update are 1, also of the answers that were helped."""
    hints = ["allocation.samples=[{name: hints, args: {rule: scaf, levels: 3, warmup: 0}}]"] if method == "scaf_grpo" else []
    trainer = Trainer(configure(method, *ALIKE, *hints, "rewards=['helped:Helped']"))
    roll_out, seen = trainer.engine.roll_out, []
    trainer.engine.roll_out = lambda *args: seen.append(roll_out(*args)) or seen[-1]
    metrics, _ = trainer.iterate(1)
    assert int((seen[0][0].drawn.samples.column("origin") == HINTED).sum()) == replaced
    assert metrics["ratio/max_abs_log_first"] < 1e-4
