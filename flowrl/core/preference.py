"""Pair losses: prefer the chosen sample to the rejected one. The same functions serve images and text; reduce their losses with core/reductions.py.

Letters: B pairs, S places where each is judged (noise levels; 1 for text). u is a sample's log-probability minus the reference's, h = u_chosen - u_rejected.

A flow model has no cheap log-probability; log_prob = -<(v - u)^2>, minus the mean squared velocity error, takes its place (flowrl/likelihoods/matching.py).
Flow-DPO's loss, -log sigmoid(-beta_F / 2 ((m - m_ref)_chosen - (m - m_ref)_rejected)) with m the mean squared error, is then `dpo` with beta = beta_F / 2:
its beta of 100 is 50 here, its 2000 is 1000.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import logsigmoid

from flowrl.core.pair_losses import PAIR_LOSSES, PAIR_NEEDS
from flowrl.core.pair_terms import log_ratios, measured, per_token, smoothed
from flowrl.types import Objective, Pairs

__all__ = ["NEEDS_REFERENCE", "PAIR_OBJECTIVES", "dpo", "ipo", "rpo", "simpo"]


def dpo(pairs: Pairs, *, beta: float, margin: float, sft_weight: float, label_smoothing: float) -> Objective:
    """DPO: -(1 - label_smoothing) log sigmoid(beta h) - label_smoothing log sigmoid(-beta h).

    At the reference the loss is ln 2 and its gradient -(1/2 - label_smoothing) beta grad h. A masked pair has loss 0 and no gradient.

    Args:
        pairs: see `Pairs`; lengths have no effect, the log-probabilities are taken as they are (for text: sums over tokens).
        beta: > 0; 0.1 for text sums, 50 for mean squared velocity errors (see above).
        label_smoothing: in [0, 1/2), the chance that a preference is the wrong way round; the minimum is then at beta h = log(1 / label_smoothing - 1).
        margin, sft_weight: have no effect; here so that every pair loss is called alike.
    Returns:
        loss [B, S] and metrics, each [B, S] and detached: ``chosen_log_ratio`` and ``rejected_log_ratio`` (the two terms of h), ``margin`` = beta h,
        ``accuracy`` (1 where the margin is above 0, 1/2 where it is 0). All but the accuracy, 1/2, are 0 where masked.
    Raises:
        ValueError: no reference.
    Source:
        arXiv:2305.18290; label smoothing: cDPO, as TRL has it. Diffusion-DPO, arXiv:2311.12908, and Flow-DPO, whose loss and beta were read in
        released code (yifan123/flow_grpo, train_sd3_dpo.py).
    """
    chosen, rejected = log_ratios("dpo", pairs)
    return measured(pairs, smoothed(beta * (chosen - rejected), label_smoothing), beta, chosen, rejected)


def ipo(pairs: Pairs, *, beta: float, margin: float, sft_weight: float, label_smoothing: float) -> Objective:
    """IPO: (h - 1 / (2 beta))^2. Its minimum is h = 1 / (2 beta), however certain the preference; DPO's is h = infinity.

    Args:
        pairs: see `Pairs`. With lengths, each log-ratio is divided by its own (TRL's variant); without, h is as in the paper, sums for text.
        beta: > 0; 0.1 for text.
        margin, sft_weight, label_smoothing: have no effect.
    Returns:
        As `dpo`; the metrics are of the log-ratios that h is made of.
    Raises:
        ValueError: no reference.
    Source:
        arXiv:2310.12036; the length-normalised variant as in TRL's DPO trainer.
    """
    chosen, rejected = log_ratios("ipo", pairs)
    chosen, rejected = per_token(pairs, chosen, pairs.chosen_length), per_token(pairs, rejected, pairs.rejected_length)
    return measured(pairs, (chosen - rejected - 1 / (2 * beta)).square(), beta, chosen, rejected)


def simpo(pairs: Pairs, *, beta: float, margin: float, sft_weight: float, label_smoothing: float) -> Objective:
    """SimPO: -log sigmoid(beta (mean log_prob of the chosen - mean log_prob of the rejected) - margin), without a reference.

    Args:
        pairs: see `Pairs`; log-probabilities are divided by their lengths (None: they are means already). A reference has no effect.
        beta: > 0; 2 .. 10 for text.
        margin: >= 0, the paper's gamma; 0.1 .. 0.8 times beta for text.
        sft_weight, label_smoothing: have no effect.
    Returns:
        As `dpo`; there is no reference, so ``chosen_log_ratio`` and ``rejected_log_ratio`` are the mean log-probabilities. ``margin`` and ``accuracy`` do
        not subtract gamma.
    Source:
        arXiv:2405.14734, verified in the released code (princeton-nlp/SimPO, scripts/simpo_trainer.py).
    """
    chosen, rejected = (torch.where(pairs.mask, x, torch.zeros_like(x)) for x in (pairs.chosen, pairs.rejected))
    chosen, rejected = per_token(pairs, chosen, pairs.chosen_length), per_token(pairs, rejected, pairs.rejected_length)
    return measured(pairs, -logsigmoid(beta * (chosen - rejected) - margin), beta, chosen, rejected)


def rpo(pairs: Pairs, *, beta: float, margin: float, sft_weight: float, label_smoothing: float) -> Objective:
    """RPO: DPO plus sft_weight times the chosen sample's negative log-likelihood, which keeps the chosen from sinking together with the rejected.

    On images the second term is the flow-matching loss on the chosen sample.

    Args:
        pairs: see `Pairs`; with lengths the negative log-likelihood is that of a token, as in TRL. The log-ratios of h are not divided.
        beta, label_smoothing: as in `dpo`. sft_weight: >= 0; 0.005 with beta 0.01 for text; 0 is DPO.
        margin: has no effect.
    Returns:
        As `dpo`.
    Raises:
        ValueError: no reference.
    Source:
        arXiv:2405.16436 (formula and defaults from TRL's documentation). With sft_weight 1 and lengths: Iterative RPO, arXiv:2404.19733.
    """
    chosen, rejected = log_ratios("rpo", pairs)
    likelihood = per_token(pairs, torch.where(pairs.mask, pairs.chosen, torch.zeros_like(chosen)), pairs.chosen_length)
    loss = smoothed(beta * (chosen - rejected), label_smoothing) - sft_weight * likelihood
    return measured(pairs, loss, beta, chosen, rejected)


PAIR_OBJECTIVES: dict[str, Callable[..., Objective]] = {"dpo": dpo, "ipo": ipo, "simpo": simpo, "rpo": rpo, **PAIR_LOSSES}
"""All pair losses, of pictures and of text; which of them judge which: flowrl/objective_names.py."""

NEEDS_REFERENCE = frozenset(name for name, needs in PAIR_NEEDS.items() if "reference" in needs)
