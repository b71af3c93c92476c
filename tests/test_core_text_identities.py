"""The identities of text.md section 12 that are about gradients, in the parameters of a small softmax policy: against central differences, in float64.

Letters: P prompts, B sequences of S tokens out of V; theta [P, S, V] are the policy's logits, so that a gradient of a loss goes through grad log_prob.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from estimates import group_mean, group_zscore
from torch import Tensor

from flowrl.core.bounds import bound_candidates, bound_statistics, choose_bounds
from flowrl.core.gates import bgpo, cispo, gmpo, kimi, mdpo, rl_plus_off_policy, rover, sapo, token_nft, vespo
from flowrl.core.group_gates import drpo, gvpo, reg_grpo
from flowrl.core.list_losses import copg_group, lipo, sppo_group, trpa
from flowrl.core.objectives import clipped_surrogate, reinforce
from flowrl.core.pair_losses import copg, inpo, p3o, rebel, sppo
from flowrl.core.pair_tokens import guide_weights, sum_tokens
from flowrl.core.preference import dpo, ipo, rpo
from flowrl.core.ratio_levels import at_level
from flowrl.core.reductions import sequence_weights
from flowrl.core.regularizers import categorical_kl_estimate
from flowrl.core.soft_values import a_star_po
from flowrl.types import Decisions, Objective, Pairs

NUMERIC = {"rtol": 1e-6, "atol": 1e-8}
VOCABULARY = 5
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
GROUPED = {"group": GROUP, "num_groups": 2}
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0]]).bool()
LENGTH = MASK.sum(1, keepdim=True).double()
EVERYONE = torch.ones(6, dtype=torch.bool)
PLAIN = {"margin": 0.0, "sft_weight": 0.0, "label_smoothing": 0.0}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


TOKENS = torch.randint(VOCABULARY, (6, 4), generator=seeded(0))
THETA, REFERENCE_THETA = normal(2, 4, VOCABULARY, seed=1), normal(2, 4, VOCABULARY, seed=2)
AWAY = THETA + 0.5 * normal(2, 4, VOCABULARY, seed=3)
"""A policy that has left the one that sampled."""
REWARDS = normal(6, seed=4)
RIGHT = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
RATE = torch.tensor([1 / 3] * 3 + [2 / 3] * 3, dtype=torch.float64)


def log_prob(theta: Tensor) -> Tensor:
    """[B, S], of every token that was sampled."""
    return theta.log_softmax(-1)[GROUP].gather(-1, TOKENS[..., None])[..., 0]


OLD, REFERENCE = log_prob(THETA), log_prob(REFERENCE_THETA)
CENTRED = group_mean(REWARDS, GROUP, EVERYONE, 2)
GRPO = group_zscore(REWARDS, GROUP, EVERYONE, 2, eps=0.0)


def spread(values: Tensor) -> Tensor:
    """[B] to [B, S]."""
    return values[:, None].expand(6, 4)


def decisions(theta: Tensor, advantages: Tensor, old: Tensor = OLD) -> Decisions:
    return Decisions(log_prob(theta), old, spread(advantages) if advantages.ndim == 1 else advantages, MASK)


def reduced(objective: Objective, reduction: str) -> Tensor:
    weight, total = sequence_weights(reduction, MASK, dtype=torch.float64, max_length=7.0 if reduction.endswith("norm") else None)
    return (weight * objective.loss).sum() / total


def mean_log_prob(theta: Tensor) -> Tensor:
    """[B], DRPO's score."""
    return torch.where(MASK, log_prob(theta), 0.0).sum(1) / LENGTH[:, 0]


def sums(theta: Tensor, anchor: Tensor) -> Tensor:
    """[B], sum over a sequence of log_prob - anchor."""
    return torch.where(MASK, log_prob(theta) - anchor, 0.0).sum(1)


def pairs(theta: Tensor, chosen: tuple[int, ...] = (0, 4), rejected: tuple[int, ...] = (2, 3)) -> Pairs:
    """A pair of each prompt, with everything that a loss may ask for."""
    here, there = list(chosen), list(rejected)
    now, old, reference = (torch.where(MASK, x, 0.0).sum(1)[:, None] for x in (log_prob(theta), OLD, REFERENCE))
    columns = [x[rows] for x in (now, reference) for rows in (here, there)]
    rewards = {"chosen_reward": REWARDS[here, None], "rejected_reward": REWARDS[there, None]}
    previous = {"previous_chosen": old[here], "previous_rejected": old[there]}
    return Pairs(*columns, torch.ones(len(here), 1, dtype=torch.bool), **rewards, **previous)


def margins(theta: Tensor, anchor: Tensor) -> Tensor:
    """[pairs, 1], h of `pairs` to an anchor."""
    value = sums(theta, anchor)[:, None]
    return value[[0, 4]] - value[[2, 3]]


def differences(function: Callable[[Tensor], Tensor], theta: Tensor, step: float = 1e-5) -> Tensor:
    """The gradient of a number in theta, by central differences."""
    found = torch.zeros_like(theta)
    for place in range(theta.numel()):
        ends = []
        for sign in (1, -1):
            moved = theta.clone()
            moved.view(-1)[place] += sign * step
            ends.append(float(function(moved).detach()))
        found.view(-1)[place] = (ends[0] - ends[1]) / (2 * step)
    return found


def gradient(function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    at = theta.clone().requires_grad_()
    return torch.autograd.grad(function(at), at)[0]


class Case(NamedTuple):
    """A loss, and a number whose gradient the identity says it has.

    Attributes:
        smooth: the loss's own differences are its gradient: it holds nothing constant, and no bound is touched.
    """

    loss: Callable[[Tensor], Tensor]
    same: Callable[[Tensor], Tensor]
    smooth: bool = True


def assert_gradients_agree(case: Case, theta: Tensor) -> None:
    found = gradient(case.loss, theta)
    torch.testing.assert_close(found, differences(case.same, theta), **NUMERIC)
    if case.smooth:
        torch.testing.assert_close(found, differences(case.loss, theta), **NUMERIC)
    assert float(found.abs().max()) > 1e-3


def of_tokens(gate: Callable[..., Objective], reduction: str, advantages: Tensor = GRPO, **more: object) -> Callable[[Tensor], Tensor]:
    return lambda theta: reduced(gate(decisions(theta, advantages), **more), reduction)


def policy_gradient(reduction: str, advantages: Tensor = GRPO, factor: float = 1.0) -> Callable[[Tensor], Tensor]:
    """factor times REINFORCE's -sum of A log_prob, written out."""
    divisor = {"seq_mean_token_mean": LENGTH * 6, "mean": MASK.sum(), "seq_mean_token_sum": torch.tensor(6.0), "seq_mean_token_sum_norm": torch.tensor(42.0)}
    return lambda theta: -factor * (torch.where(MASK, spread(advantages) * log_prob(theta), 0.0) / divisor[reduction]).sum()


def of_pairs(pair_loss: Callable[..., Objective], **more: object) -> Callable[[Tensor], Tensor]:
    """A pair loss, summed over its pairs."""
    return lambda theta: pair_loss(pairs(theta), **more).loss.sum()


# --- on-policy: theta is the policy that sampled --------------------------------------------------------------------------------------------------

MEAN, TOKEN_MEAN, SUM, NORM = "seq_mean_token_mean", "mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"
PAIR_GAP = REWARDS[[0, 4], None] - REWARDS[[2, 3], None]
BINARY_GRPO, BINARY_DR = (estimator(RIGHT, GROUP, EVERYONE, 2, eps=0.0) for estimator in (group_zscore, group_mean))
RLOO = CENTRED * 3 / 2
NEXT = torch.zeros(6, 4, dtype=torch.float64)

ON_POLICY = {
    **{f"6 PPO, clip {clip}": Case(of_tokens(clipped_surrogate, MEAN, clip_low=clip, clip_high=clip), policy_gradient(MEAN)) for clip in (1e-3, 0.2, 5.0)},
    "6 PPO, dual clip": Case(of_tokens(clipped_surrogate, MEAN, clip_low=0.2, clip_high=0.2, dual_clip=3.0, ratio_max=4.0), policy_gradient(MEAN)),
    "7 GSPO": Case(
        lambda theta: reduced(clipped_surrogate(at_level(decisions(theta, GRPO), "seq_mean"), clip_low=3e-3, clip_high=4e-3), "seq_mean"), policy_gradient(MEAN)
    ),
    **{
        f"8 SAPO, tau {tau}": Case(of_tokens(sapo, MEAN, temperature_positive=tau, temperature_negative=3 * tau), policy_gradient(MEAN))
        for tau in (0.05, 1.0, 9.0)
    },
    "9 CISPO": Case(of_tokens(cispo, TOKEN_MEAN, clip_low=1.0, clip_high=4.0), policy_gradient(TOKEN_MEAN), smooth=False),
    "10 NFT, GRPO": Case(of_tokens(token_nft, NORM, RIGHT, success_rate=RATE, omega="grpo"), policy_gradient(NORM, BINARY_GRPO), smooth=False),
    "10 NFT, Dr.GRPO": Case(of_tokens(token_nft, NORM, RIGHT, success_rate=RATE, omega="dr_grpo"), policy_gradient(NORM, BINARY_DR), smooth=False),
    "10 NFT without its floor": Case(of_tokens(token_nft, NORM, RIGHT, success_rate=RATE, floor_negative=0.0), policy_gradient(NORM, BINARY_GRPO)),
    "12 REBEL": Case(of_pairs(rebel, beta=0.5), lambda theta: -2 / 0.5 * (PAIR_GAP * margins(theta, OLD)).sum()),
    "14 P3O, separate": Case(of_pairs(p3o, beta=0.0), lambda theta: -0.5 * (PAIR_GAP * margins(theta, OLD)).sum()),
    "14 P3O, joint": Case(of_pairs(p3o, beta=0.0, form="joint"), lambda theta: -0.5 * (PAIR_GAP * margins(theta, OLD)).sum()),
    "15 BGPO": Case(
        of_tokens(bgpo, MEAN),
        lambda theta: -(GRPO * (torch.where(MASK, log_prob(theta) - OLD, 0.0).sum(1) / LENGTH[:, 0]).exp()).mean(),
    ),
    "30 ROVER": Case(of_tokens(rover, TOKEN_MEAN, CENTRED, next_value=NEXT, kappa=0.7), policy_gradient(TOKEN_MEAN, CENTRED, 2 * 0.7)),
    "31 Reg-GRPO": Case(of_tokens(partial(reg_grpo, **GROUPED), "seq_mean", scale=0.6), policy_gradient(SUM, GRPO, 2 * 0.6)),
    "B6 GMPO": Case(of_tokens(gmpo, "seq_mean", clip_low=0.4, clip_high=0.4), policy_gradient(MEAN)),
    "B7 VESPO": Case(of_tokens(vespo, TOKEN_MEAN), policy_gradient(TOKEN_MEAN), smooth=False),
    "B17 MDPO": Case(of_tokens(mdpo, TOKEN_MEAN, penalty=3.0), policy_gradient(TOKEN_MEAN)),
    "B18 Kimi": Case(of_tokens(kimi, "seq_mean", CENTRED, tau=0.4), policy_gradient(SUM, CENTRED)),
    "F8 SPPO": Case(of_tokens(partial(sppo_group, **GROUPED), "seq_mean", CENTRED, beta=0.3), policy_gradient(SUM, CENTRED, 2 / 0.3)),
    "REINFORCE": Case(of_tokens(reinforce, SUM, clip_low=1.0, clip_high=1.0), policy_gradient(SUM)),
}


@pytest.mark.parametrize("name", ON_POLICY)
def test_on_policy_a_gradient_is_that_of_the_identity(name: str) -> None:
    assert_gradients_agree(ON_POLICY[name], THETA)


AT_THE_REFERENCE = {
    # -2 beta sum of A_RLOO log_prob over the 3 of a prompt, as a mean over sequences
    "39 CoPG": Case(
        lambda theta: reduced(copg_group(decisions(theta, REWARDS), **GROUPED, ref_log_prob=OLD, beta=0.4), "seq_mean"),
        policy_gradient(SUM, RLOO, 2 * 0.4 * 3),
    ),
    "B24 GVPO": Case(
        lambda theta: reduced(gvpo(decisions(theta, CENTRED), **GROUPED, ref_log_prob=OLD, beta=0.4), "seq_mean"), policy_gradient(SUM, CENTRED, 0.4 * 3 / 2)
    ),
    "F1 DPO": Case(
        lambda theta: dpo(anchored(theta), beta=0.4, **PLAIN).loss.sum(),
        lambda theta: -0.2 * margins(theta, OLD).sum(),
    ),
    "13 TRPA": Case(
        lambda theta: reduced(trpa(decisions(theta, REWARDS), **GROUPED, level=torch.tensor([1, 2, 2, 3, 3, 3]), beta=0.4), "seq_mean"),
        # two pairs below the top, c = 2.5: half of c beta times the difference of mean log-probabilities, over the 2 pairs
        lambda theta: -0.5 * 2.5 * 0.4 * (2 * mean_log_prob(theta)[0] - mean_log_prob(theta)[1] - mean_log_prob(theta)[2]) / 2,
    ),
}


def anchored(theta: Tensor) -> Pairs:
    """`pairs` whose reference is the policy that sampled."""
    found = pairs(theta)
    return Pairs(found.chosen, found.rejected, found.previous_chosen, found.previous_rejected, found.mask)


@pytest.mark.parametrize("name", AT_THE_REFERENCE)
def test_at_the_reference_a_gradient_is_that_of_the_identity(name: str) -> None:
    assert_gradients_agree(AT_THE_REFERENCE[name], THETA)
    if name in ("13 TRPA", "F1 DPO"):
        pairs_in_it = 2 if name == "F1 DPO" else 1
        assert float(AT_THE_REFERENCE[name].loss(THETA)) == pytest.approx(pairs_in_it * math.log(2), rel=1e-12)


# --- off-policy: theta has moved -------------------------------------------------------------------------------------------------------------------


def gspo(theta: Tensor, level: str, reduction: str) -> Tensor:
    return reduced(clipped_surrogate(at_level(decisions(theta, GRPO), level), clip_low=0.05, clip_high=0.08), reduction)  # type: ignore[arg-type]


def surrogate(theta: Tensor, reduction: str, advantages: Tensor = GRPO, low: float = 0.0, high: float = math.inf) -> Tensor:
    """-sum of A min / max of the ratio and its bounds, PPO written out; without bounds the unclipped surrogate."""
    ratio, a = (log_prob(theta) - OLD).exp(), spread(advantages)
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(low, high))
    divisor = {"seq_mean_token_mean": LENGTH * 6, "mean": MASK.sum()}[reduction]
    return (torch.where(MASK, loss, 0.0) / divisor).sum()


def bapo(theta: Tensor) -> Objective:
    """The clipped surrogate with the bounds that the search finds for P / N >= 0."""
    candidates, here = bound_candidates(), decisions(theta, GRPO)
    low, high = choose_bounds(candidates, bound_statistics(here.log_prob - OLD, here.advantages, MASK, candidates), target=0.0)
    return clipped_surrogate(here, clip_low=1 - low, clip_high=high - 1)


def copg_objective(theta: Tensor) -> Tensor:
    """J = (R_1 - R_2) h - beta h^2 / 2 of each pair, to be maximised; beta 0.3."""
    h = margins(theta, REFERENCE)
    return (PAIR_GAP * h - 0.15 * h.square()).sum()


def to_the_reference(theta: Tensor) -> Pairs:
    """`pairs` whose previous policy is the reference."""
    p = pairs(theta)
    previous = {"previous_chosen": p.reference_chosen, "previous_rejected": p.reference_rejected}
    return Pairs(p.chosen, p.rejected, None, None, p.mask, chosen_reward=p.chosen_reward, rejected_reward=p.rejected_reward, **previous)


def disco(theta: Tensor) -> Tensor:
    """Mean over prompts of the soft maximum of the wrong scores less the mean of the right ones; temperature 0.7."""
    s, total = mean_log_prob(theta), torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 3), slice(3, 6)):
        right, wrong = s[rows][RIGHT[rows] == 1], s[rows][RIGHT[rows] == 0]
        total = total + 0.7 * (wrong / 0.7).exp().mean().log() - right.mean()
    return total / 2


def drpo_of_two(theta: Tensor) -> Tensor:
    """Of each prompt one right and one wrong answer; short right answers count more, but there is only one."""
    mask = MASK & torch.tensor([True, False, True, False, True, True])[:, None]
    whole = decisions(theta, RIGHT - 0.5)
    weight, total = sequence_weights("seq_mean", mask, dtype=torch.float64)
    loss = drpo(Decisions(whole.log_prob, OLD, whole.advantages, mask), **GROUPED, temperature=0.3, max_length=6.0).loss
    return (weight * loss).sum() / total


def tgdpo(theta: Tensor) -> Tensor:
    """DPO on the sums of TGDPO's weights with alpha 0."""
    now, columns = log_prob(theta), []
    for rows, side in (([0, 4], "chosen"), ([2, 3], "rejected")):
        weight = guide_weights(REFERENCE[rows] - 1, REFERENCE[rows], alpha=0.0, beta=0.3, side=side)  # type: ignore[arg-type]
        columns.append([sum_tokens(value[rows], MASK[rows], weight) for value in (now, REFERENCE)])
    (chosen, reference_chosen), (rejected, reference_rejected) = columns
    return dpo(Pairs(chosen, rejected, reference_chosen, reference_rejected, torch.ones(2, 1, dtype=torch.bool)), beta=0.3, **PLAIN).loss.sum()


def written_dpo(theta: Tensor, beta: float) -> Tensor:
    return torch.log1p((-beta * margins(theta, REFERENCE)).exp()).sum()


LIST = torch.tensor([True, False, True, False, False, False])
"""Two sequences of the first prompt."""


def list_of_two(theta: Tensor) -> Tensor:
    whole = decisions(theta, torch.tensor([1.0, 9.0, 0.0, 9.0, 9.0, 9.0], dtype=torch.float64))
    mask = MASK & LIST[:, None]
    weight, total = sequence_weights("seq_mean", mask, dtype=torch.float64)
    loss = lipo(Decisions(whole.log_prob, whole.old_log_prob, whole.advantages, mask), **GROUPED, ref_log_prob=REFERENCE, beta=0.3).loss
    return (weight * loss).sum() / total


def pair_of_regressions(theta: Tensor) -> Tensor:
    """Reg-GRPO of groups of two with normalised rewards."""
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 1, 1, 2, 2])
    loss = reg_grpo(decisions(theta, signs), group=group, num_groups=3, scale=0.4).loss
    return (loss / LENGTH).sum()


def pair_of_rebels(theta: Tensor) -> Tensor:
    """0.4^2 / 2 times REBEL's square with eta 1 / 0.4 on rewards +-1."""
    d, gap = sums(theta, OLD).view(3, 2), torch.tensor([2.0, 2.0, -2.0], dtype=torch.float64)
    return 0.08 * (d[:, 0] - d[:, 1] - 2.5 * gap).square().sum()


RATIO_AWAY = (log_prob(AWAY) - OLD).exp()
SIGMOID_AWAY = torch.sigmoid(2.0 * (RATIO_AWAY - 1))
RL_PLUS = 2 * log_prob(AWAY).exp() / (1.5 * OLD.exp() + 0.5) * (1 - log_prob(AWAY).exp()).sqrt()
VESPO_W = torch.where(MASK, log_prob(AWAY) - OLD, 0.0).sum(1).exp()
VESPO_WEIGHT = torch.where(GRPO > 0, VESPO_W**2 * (3 * (1 - VESPO_W)).exp(), VESPO_W**3 * (2 * (1 - VESPO_W)).exp())

OFF_POLICY = {
    "7 GSPO, token form": Case(lambda theta: gspo(theta, "seq_mean_token", MEAN), lambda theta: gspo(theta, "seq_mean", "seq_mean"), smooth=False),
    "7 GSPO, sequence form": Case(
        lambda theta: gspo(theta, "seq_mean", "seq_mean"),
        lambda theta: torch.maximum(-GRPO * (s := (sums(theta, OLD) / LENGTH[:, 0]).exp()), -GRPO * s.clamp(0.95, 1.08)).mean(),
    ),
    "11 CoPG is -2 beta J": Case(of_pairs(copg, beta=0.3), lambda theta: -2 * 0.3 * copg_objective(theta)),
    "11 CoPG is REBEL": Case(of_pairs(copg, beta=0.3), lambda theta: 0.3**2 * rebel(to_the_reference(theta), beta=0.3).loss.sum()),
    "12 INPO is IPO": Case(of_pairs(inpo, beta=0.3, reference_share=1.0), lambda theta: (margins(theta, REFERENCE) - 1 / 0.6).square().sum()),
    "12 IPO": Case(of_pairs(ipo, beta=0.3, **PLAIN), lambda theta: (margins(theta, REFERENCE) - 1 / 0.6).square().sum()),
    "12 TGDPO is DPO": Case(tgdpo, lambda theta: written_dpo(theta, 0.3)),
    "12 RPO is DPO": Case(of_pairs(rpo, beta=0.3, **PLAIN), lambda theta: written_dpo(theta, 0.3)),
    "12 SPPO": Case(
        of_pairs(sppo, beta=0.3),
        lambda theta: ((sums(theta, OLD)[[0, 4]] - 1 / 0.6).square() + (sums(theta, OLD)[[2, 3]] + 1 / 0.6).square()).sum(),
    ),
    "19 RL-PLUS": Case(
        of_tokens(rl_plus_off_policy, TOKEN_MEAN), lambda theta: -(torch.where(MASK, RL_PLUS * spread(GRPO) * log_prob(theta), 0.0)).sum() / MASK.sum(), False
    ),
    "20 BAPO, target 0": Case(lambda theta: reduced(bapo(theta), TOKEN_MEAN), lambda theta: surrogate(theta, TOKEN_MEAN, low=0.6, high=1.2)),
    "31 Reg-GRPO of two is REBEL": Case(pair_of_regressions, pair_of_rebels),
    "35 DRPO is DisCO": Case(lambda theta: reduced(drpo(decisions(theta, RIGHT - 0.5), **GROUPED, temperature=0.7), "seq_mean"), disco),
    "35 DRPO of one right and one wrong": Case(drpo_of_two, lambda theta: -(mean_log_prob(theta)[[0, 4]] - mean_log_prob(theta)[[2, 5]]).mean()),
    "36 LiPO of two is DPO": Case(
        list_of_two, lambda theta: abs(1 / math.log(2) - 1 / math.log(3)) * torch.log1p((-0.3 * (sums(theta, REFERENCE)[0] - sums(theta, REFERENCE)[2])).exp())
    ),
    "39 CoPG is GVPO": Case(
        lambda theta: reduced(copg_group(decisions(theta, REWARDS), **GROUPED, ref_log_prob=REFERENCE, beta=0.4), "seq_mean"),
        lambda theta: 2 * 3 * reduced(gvpo(decisions(theta, CENTRED), **GROUPED, ref_log_prob=REFERENCE, beta=0.4), "seq_mean"),
    ),
    "B4 SAPO weighs by 4 s (1 - s)": Case(
        of_tokens(sapo, MEAN, temperature_positive=2.0, temperature_negative=2.0),
        lambda theta: -(torch.where(MASK, 4 * SIGMOID_AWAY * (1 - SIGMOID_AWAY) * RATIO_AWAY * spread(GRPO) * log_prob(theta), 0.0) / LENGTH).sum() / 6,
    ),
    "B5 CISPO without bounds": Case(of_tokens(cispo, TOKEN_MEAN, clip_low=1.0, clip_high=math.inf), lambda theta: surrogate(theta, TOKEN_MEAN), smooth=False),
    "B7 VESPO": Case(
        of_tokens(vespo, TOKEN_MEAN),
        lambda theta: -torch.where(MASK, spread(VESPO_WEIGHT * GRPO) * log_prob(theta), 0.0).sum() / MASK.sum(),
        smooth=False,
    ),
    "B17 MDPO without a penalty": Case(of_tokens(mdpo, TOKEN_MEAN, penalty=0.0), lambda theta: surrogate(theta, TOKEN_MEAN)),
    "B18 Kimi is a square": Case(of_tokens(kimi, "seq_mean", CENTRED, tau=0.4), lambda theta: (CENTRED - 0.4 * sums(theta, OLD)).square().mean() / 0.8),
    "V2 A*-PO": Case(
        lambda theta: reduced(a_star_po(decisions(theta, CENTRED), **GROUPED, ref_log_prob=REFERENCE, beta=0.4), "seq_mean"),
        lambda theta: (0.4 * sums(theta, REFERENCE) - CENTRED).square().mean(),
    ),
}


@pytest.mark.parametrize("name", OFF_POLICY)
def test_off_policy_a_gradient_is_that_of_the_identity(name: str) -> None:
    assert_gradients_agree(OFF_POLICY[name], AWAY)


def test_the_moved_policy_is_on_both_sides_of_the_bounds() -> None:
    """What the cases above need in order to say anything."""
    ratio = RATIO_AWAY[MASK]
    assert float(ratio.min()) < 0.6 and float(ratio.max()) > 1.2
    s = (sums(AWAY, OLD) / LENGTH[:, 0]).exp()
    stopped = ((s > 1.08) & (GRPO > 0)) | ((s < 0.95) & (GRPO < 0))
    assert 0 < int(stopped.sum()) < 6
    assert float((torch.cat([ratio - 0.6, ratio - 1.2, s - 0.95, s - 1.08])).abs().min()) > 1e-3  # no difference crosses one
    assert float((GRPO - CENTRED).abs().min()) > 1e-3


# --- item 21: divergences -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "exact"), [("k1", "none"), ("k2", "forward"), ("k3_k2", "forward"), ("k3", "backward")])
def test_item_21_averaged_gradients_of_the_estimates_are_differences_of_exact_divergences(kind: str, exact: str) -> None:
    log_q = REFERENCE_THETA.log_softmax(-1)

    def divergence(theta: Tensor) -> Tensor:
        log_p = theta.log_softmax(-1)
        one, other = (log_p, log_q) if exact == "forward" else (log_q, log_p)
        return torch.zeros(()) if exact == "none" else (one.exp() * (one - other)).sum()

    def average(theta: Tensor) -> Tensor:
        log_p = theta.log_softmax(-1)
        return (log_p.detach().exp() * categorical_kl_estimate(kind, log_p, log_q)).sum()  # type: ignore[arg-type]

    found = gradient(average, THETA)
    torch.testing.assert_close(found, differences(divergence, THETA), **NUMERIC)
    assert (float(found.abs().max()) > 1e-2) == (exact != "none")
