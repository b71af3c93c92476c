"""More pair losses: of the policy that the iteration started from, of rewards and win rates, of two anchors. Called like those in `preference`.

Letters: B pairs, S places where each is judged (noise levels; 1 for text). u is log_prob - reference, a is log_prob - previous; h = u_chosen - u_rejected,
d = a_chosen - a_rejected, each a sum over tokens for text. R is the reward of a sample, or its win rate.

beta is the price of a unit of log-ratio in reward, for all of them. Papers that write eta for its inverse (SPPO, REBEL) or for itself (DNO, INPO) are
translated: the docstrings say which. ``margin``, ``sft_weight`` and ``label_smoothing`` have no effect where a docstring does not name them; they are here
so that every pair loss is called alike. For images log-probabilities are minus mean squared velocity errors, see `preference`: a beta for sums of thousands
of elements becomes a beta for their mean times that number. What the losses read besides `dpo`'s fields: `PAIR_NEEDS`.

Pairs of identical responses have h = 0 and nothing to say (p3o's separate clips can even push them), yet count in a mean; leave them and pairs with an
empty response out (`pair_tokens.comparable`).
A masked pair has loss 0 and no gradient. All return the metrics of `preference.dpo`, from the log-ratios that the loss is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from flowrl.core.gates import LOG_RATIO_LIMIT
from flowrl.core.objectives import clipped_surrogate
from flowrl.core.pair_terms import log_ratios, measured, pair_fields, per_token, smoothed, soft_cross_entropy
from flowrl.types import Decisions, Objective, Pairs

__all__ = [
    "PAIR_LOSSES",
    "PAIR_NEEDS",
    "copg",
    "dno",
    "inpo",
    "length_normalised_dpo",
    "osp",
    "p3o",
    "rebel",
    "robust_dpo",
    "sppo",
    "srpo",
    "vpo",
]


def robust_dpo(pairs: Pairs, *, beta: float, margin: float = 0.0, sft_weight: float = 0.0, label_smoothing: float = 0.0) -> Objective:
    """Robust DPO: [-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2 e), e the label_smoothing.

    If labels are flipped with probability e, its mean over the flips is DPO's loss on the true labels. It can be negative. At the reference the loss is
    ln 2 and its gradient DPO's times 1 / (1 - 2 e).

    Args:
        beta: > 0. label_smoothing: in [0, 1/2), known or guessed; 0 is DPO.
    Source:
        arXiv:2403.00409, formula from TRL's documentation.
    """
    chosen, rejected = log_ratios("robust_dpo", pairs)
    z = beta * (chosen - rejected)
    loss = ((1 - label_smoothing) * smoothed(z, 0.0) - label_smoothing * smoothed(-z, 0.0)) / (1 - 2 * label_smoothing)
    return measured(pairs, loss, beta, chosen, rejected)


def length_normalised_dpo(pairs: Pairs, *, beta: float, margin: float = 0.0, sft_weight: float = 0.0, label_smoothing: float = 0.0) -> Objective:
    """Tulu 3's length-normalised DPO: DPO on log-ratios divided by their own lengths.

    Args:
        pairs: without lengths it is DPO. With equal lengths n it is DPO with beta / n; so images, whose log-probabilities are means, never need it.
        beta: > 0; 5 (from memory). label_smoothing: as in `preference.dpo`.
    Source:
        arXiv:2411.15124, from TRL's documentation.
    """
    chosen, rejected = log_ratios("length_normalised_dpo", pairs)
    chosen, rejected = per_token(pairs, chosen, pairs.chosen_length), per_token(pairs, rejected, pairs.rejected_length)
    return measured(pairs, smoothed(beta * (chosen - rejected), label_smoothing), beta, chosen, rejected)


def vpo(
    pairs: Pairs, *, beta: float, margin: float = 0.0, sft_weight: float = 0.0, label_smoothing: float = 0.0, alpha: float = 1.0, online: bool = False
) -> Objective:
    """VPO: DPO plus s alpha beta times the mean u of calibration samples; s = 1 online (optimism: less of them), -1 offline (pessimism: more of them).

    Offline with the chosen samples for calibration it has RPO's gradient, with sft_weight = alpha beta on sums. Online with samples of the reference it has
    XPO's bonus. alpha = 0 is DPO.

    Args:
        pairs: ``calibration`` is the mean u of the calibration samples; where it is None offline, the chosen sample's own u.
        beta: > 0; 0.1. alpha: >= 0; tuned over 0.01 .. 10 (from memory). label_smoothing: as in `preference.dpo`.
    Raises:
        ValueError: no reference, or no calibration samples online.
    Source:
        arXiv:2405.19320. Unverified: our reading; the signs follow from the optimism and pessimism that the paper states.
    """
    chosen, rejected = log_ratios("vpo", pairs)
    calibration = pair_fields("vpo", pairs, "calibration")[0] if online or pairs.calibration is not None else chosen
    loss = smoothed(beta * (chosen - rejected), label_smoothing) + (alpha * beta if online else -alpha * beta) * calibration
    return measured(pairs, loss, beta, chosen, rejected)


def sppo(
    pairs: Pairs, *, beta: float, margin: float = 0.0, sft_weight: float = 0.0, label_smoothing: float = 0.0, form: Literal["hard", "soft"] = "hard"
) -> Objective:
    """SPPO: (a_chosen - (P_chosen - 1/2) / beta)^2 + (a_rejected - (P_rejected - 1/2) / beta)^2, P a win rate.

    Each side is pulled to its own target, so that the chosen one cannot sink with the rejected. hard: P is 1 and 0. At the start of an iteration the
    gradient is -2 (P - 1/2) / beta grad log_prob: REINFORCE with baseline 1/2. For whole groups: `list_losses.sppo_group`.

    Args:
        pairs: soft reads the rewards as win rates in [0, 1].
        beta: > 0, 1 / eta of the paper; 0.001.
    Raises:
        ValueError: no previous log-probabilities, soft without win rates, or an unknown form.
    Source:
        arXiv:2405.00675. hard: TRL's documentation (sppo_hard); soft: the paper's loss, also in verl-recipe (sppo/dp_actor.py).
    """
    chosen, rejected = log_ratios("sppo", pairs, "previous")
    if form == "hard":
        wins, losses = torch.ones_like(chosen), torch.zeros_like(rejected)
    elif form == "soft":
        wins, losses = pair_fields("sppo, form soft,", pairs, "chosen_reward", "rejected_reward")
    else:
        raise ValueError(f"unknown form {form!r} of SPPO; known: hard, soft")
    loss = (chosen - (wins.detach() - 0.5) / beta).square() + (rejected - (losses.detach() - 0.5) / beta).square()
    return measured(pairs, loss, beta, chosen, rejected)


def dno(pairs: Pairs, *, beta: float, margin: float = 0.0, sft_weight: float = 0.0, label_smoothing: float = 0.0) -> Objective:
    """DNO: -p log sigmoid(beta d) - (1 - p) log sigmoid(-beta d), p = sigmoid(R_chosen - R_rejected), R the win rate against the policy of the iteration.

    A large difference of R makes it DPO whose reference is the policy before the iteration. That is the practical DNO-Prct: `preference.dpo` with the
    previous policy as reference on `pairing_rules.make_pairs` with the rule threshold, where a teacher's answers may win and never lose.

    Args:
        beta: > 0, eta of the paper.
    Source:
        arXiv:2404.03715, from the loss tables of two public papers.
    """
    chosen, rejected = log_ratios("dno", pairs, "previous")
    better, worse = pair_fields("dno", pairs, "chosen_reward", "rejected_reward")
    return measured(pairs, soft_cross_entropy(beta * (chosen - rejected), torch.sigmoid(better - worse)), beta, chosen, rejected)


def inpo(pairs: Pairs, *, beta: float, margin: float = 0.0, sft_weight: float = 0.0, label_smoothing: float = 0.0, reference_share: float = 1 / 3) -> Objective:
    """INPO: (h' - 1 / (2 beta))^2, h' = share h + (1 - share) d: IPO whose anchor lies between the reference and the policy of the iteration.

    reference_share = 1 is IPO on sums; 0 is IPO with the previous policy as reference. In expectation over samples of the previous policy h' should be
    (P(y beats it) - P(y' beats it)) / beta; the fixed target differs from that loss by a constant. The paper draws K = 8 samples and keeps best against
    worst, for 3 iterations.

    Args:
        beta: > 0, eta of the paper; 0.0075. reference_share: in [0, 1], tau / eta of the paper.
    Raises:
        ValueError: an anchor with a share above 0 is missing.
    Source:
        arXiv:2407.00617, formula from the paper's text (another paper prints the target as 1 / (2 tau)); defaults from secondary sources.
    """
    terms = []
    for anchor, share in (("reference", reference_share), ("previous", 1 - reference_share)):
        if share != 0:
            terms.append([share * side for side in log_ratios("inpo", pairs, "reference" if anchor == "reference" else "previous")])
    chosen, rejected = (torch.stack(side).sum(0) for side in zip(*terms, strict=True))
    return measured(pairs, (chosen - rejected - 1 / (2 * beta)).square(), beta, chosen, rejected)


def rebel(pairs: Pairs, *, beta: float, margin: float = 0.0, sft_weight: float = 0.0, label_smoothing: float = 0.0) -> Objective:
    """REBEL: (d - (R_chosen - R_rejected) / beta)^2: the log-ratios regress the difference of rewards. Which of the two is "chosen" does not matter.

    At the start of an iteration the gradient is -2 (R_1 - R_2) / beta grad (log_prob_1 - log_prob_2): leave-one-out REINFORCE of a pair, up to scale.
    REFUEL is this loss on two continuations of one history: mask what they share (`pair_tokens.after_shared_prefix`), R the reward-to-go of each.

    Args:
        beta: > 0, 1 / eta of the papers; 1 is the released default, its README also has eta 1000. Rewards may be whitened before.
    Source:
        arXiv:2404.16767 and 2410.04612 (REFUEL); verified in the released code (ZhaolinGao/REBEL src/tldr/rebel.py, ZhaolinGao/REFUEL refuel.py).
    """
    chosen, rejected = log_ratios("rebel", pairs, "previous")
    better, worse = pair_fields("rebel", pairs, "chosen_reward", "rejected_reward")
    return measured(pairs, (chosen - rejected - (better - worse).detach() / beta).square(), beta, chosen, rejected)


def copg(pairs: Pairs, *, beta: float, margin: float = 0.0, sft_weight: float = 0.0, label_smoothing: float = 0.0) -> Objective:
    """Contrastive policy gradient, a pair: (R_chosen - R_rejected - beta h)^2, for samples of any policy, without importance weights.

    It is REBEL towards the reference, times beta^2, and has 2 beta times the gradient of minus the paper's (R_1 - R_2) h - beta h^2 / 2. With
    R_1 - R_2 = 1 it is IPO with beta / 2, up to scale. For more samples of a prompt: `list_losses.copg_group`.

    Args:
        beta: > 0; 0.1, tuned over 0.01 .. 0.5.
    Source:
        arXiv:2406.19185; the square is our derivation from the pair form.
    """
    chosen, rejected = log_ratios("copg", pairs)
    better, worse = pair_fields("copg", pairs, "chosen_reward", "rejected_reward")
    return measured(pairs, ((better - worse).detach() - beta * (chosen - rejected)).square(), beta, chosen, rejected)


def osp(pairs: Pairs, *, beta: float, margin: float = 0.0, sft_weight: float = 0.0, label_smoothing: float = 0.0) -> Objective:
    """OSP: -q log sigmoid(beta h) - (1 - q) log sigmoid(-beta h), q the strength of the preference. Its minimum is h = logit(q) / beta.

    q = 1 is DPO. q = 1/2, a tie, holds h at 0. Any source of soft labels will do.

    Args:
        pairs: ``preference`` is q, from the policy's own judgement of its ranked samples in the paper.
        beta: > 0.
    Source:
        arXiv:2405.14103. Unverified: our reading.
    """
    chosen, rejected = log_ratios("osp", pairs)
    (strength,) = pair_fields("osp", pairs, "preference")
    return measured(pairs, soft_cross_entropy(beta * (chosen - rejected), strength), beta, chosen, rejected)


def srpo(pairs: Pairs, *, beta: float, margin: float = 0.0, sft_weight: float = 0.0, label_smoothing: float = 0.0, alpha: float = 0.5) -> Objective:
    """Self-improving robust preference optimisation: (1 - alpha) [(beta g_l - 1/2)^2 + (beta g_w - 1/2)^2] + alpha (beta h - 1/2)^2.

    g_w (g_l) is h of the same policy when its prompt holds the chosen (rejected) sample as a draft to improve; one model has both roles. alpha = 1 is IPO
    times beta^2. (SRPO is also the name of other methods: here the self-improving one.)

    Args:
        pairs: ``revising_chosen`` is g_w, ``revising_rejected`` g_l: four more log-probabilities and their references.
        beta: > 0. alpha: in [0, 1]; tuned by the paper.
    Source:
        arXiv:2406.01660; the game from a secondary source, the loss unverified: our reading.
    """
    chosen, rejected = log_ratios("srpo", pairs)
    loss = alpha * (beta * (chosen - rejected) - 0.5).square()
    if alpha != 1:
        for gain in pair_fields("srpo", pairs, "revising_chosen", "revising_rejected"):
            loss = loss + (1 - alpha) * (beta * gain - 0.5).square()
    return measured(pairs, loss, beta, chosen, rejected)


def p3o(
    pairs: Pairs,
    *,
    beta: float,
    margin: float = 0.0,
    sft_weight: float = 0.0,
    label_smoothing: float = 0.0,
    clip: float = 0.2,
    form: Literal["separate", "joint"] = "separate",
) -> Objective:
    """Pairwise PPO: D (r_rejected - r_chosen), clipped; D half the difference of rewards, r = exp(a) the ratio of a whole sample.

    The reward is R - beta (previous - reference): what the sampling policy paid for leaving the reference is in it. Constants added to both rewards of a
    pair change nothing. At the start of an iteration the gradient is -D grad (log_prob_chosen - log_prob_rejected), that of group-mean advantages of two.

    | form | loss |
    | --- | --- |
    | separate (V1) | the clipped surrogate of the chosen with advantage D plus that of the rejected with -D |
    | joint (V2) | max(-D x, -D clip(x, -2 clip, 2 clip)), x = r_chosen - r_rejected: both keep their gradient or both lose it |

    Args:
        pairs: the reference is needed only if beta > 0.
        beta: >= 0. clip: > 0; 0.2 for sums over tokens, far less for mean log-probabilities of images.
    Returns:
        The metrics of `preference.dpo`, margin with the 1 in place of beta, and ``clipped``: 1.0 where both gradients are stopped, 1/2 where one is.
    Raises:
        ValueError: a field is missing, or an unknown form.
    Source:
        arXiv:2310.00212, from three notes on it; the joint clip is unverified: our reading. Log-ratios are cut at +-20 before exp, as in verl.
    """
    chosen, rejected = log_ratios("p3o", pairs, "previous")
    better, worse = pair_fields("p3o", pairs, "chosen_reward", "rejected_reward")
    half = 0.5 * (better - worse).detach()
    if beta != 0:
        now = log_ratios("p3o", pairs)
        half = half - 0.5 * beta * ((now[0] - chosen) - (now[1] - rejected)).detach()
    cut = [side.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT) for side in (chosen, rejected)]
    if form == "separate":
        zero = torch.zeros_like(chosen)
        sides = [
            clipped_surrogate(Decisions(ratio, zero, advantage, pairs.mask), clip_low=clip, clip_high=clip)
            for ratio, advantage in zip(cut, (half, -half), strict=True)
        ]
        loss = sides[0].loss + sides[1].loss
        stopped = sum((side.metrics[name] for side in sides for name in ("clipped_low", "clipped_high")), zero) / 2
    elif form == "joint":
        gap = cut[0].exp() - cut[1].exp()
        beyond = (half * gap > half.abs() * 2 * clip).detach()
        loss = -half * torch.where(beyond, gap.detach().clamp(-2 * clip, 2 * clip), gap)
        stopped = beyond.to(loss)
    else:
        raise ValueError(f"unknown form {form!r} of P3O; known: separate, joint")
    objective = measured(pairs, loss, 1.0, chosen, rejected)
    objective.metrics["clipped"] = stopped.detach()
    return objective


PAIR_LOSSES: dict[str, Callable[..., Objective]] = {
    "robust_dpo": robust_dpo,
    "length_normalised_dpo": length_normalised_dpo,
    "vpo": vpo,
    "sppo": sppo,
    "dno": dno,
    "inpo": inpo,
    "rebel": rebel,
    "copg": copg,
    "osp": osp,
    "srpo": srpo,
    "p3o": p3o,
}

PAIR_NEEDS: dict[str, frozenset[str]] = {
    "dpo": frozenset({"reference"}),
    "ipo": frozenset({"reference"}),
    "simpo": frozenset(),
    "rpo": frozenset({"reference"}),
    "robust_dpo": frozenset({"reference"}),
    "length_normalised_dpo": frozenset({"reference"}),
    "vpo": frozenset({"reference"}),
    "sppo": frozenset({"previous"}),
    "dno": frozenset({"previous", "reward"}),
    "inpo": frozenset({"reference", "previous"}),
    "rebel": frozenset({"previous", "reward"}),
    "copg": frozenset({"reference", "reward"}),
    "osp": frozenset({"reference", "preference"}),
    "srpo": frozenset({"reference", "revising"}),
    "p3o": frozenset({"reference", "previous", "reward"}),
}
"""Which fields of `Pairs` a loss reads, for both sides, besides its log-probabilities; with default settings. vpo online needs the calibration too, sppo
soft the reward; vpo reads a calibration that is there; inpo with share 0 or 1 and p3o with beta 0 need one policy less, srpo with alpha 1 no revising."""
