"""How per-decision losses become one number. A reduction is a weight per decision, so that micro-batches and processes never change the result.

Letters: E decisions, P groups; B sequences of S decisions, n_i of them count in sequence i.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["REDUCTIONS", "SEQUENCE_REDUCTIONS", "SequenceWeights", "group_mean_weights", "mean_weights", "sequence_weights"]


def mean_weights(group: Tensor, num_groups: int) -> Tensor:
    """Every decision counts the same: weight 1.

    Args:
        group: [E] int64, the group of each decision of one update on this process; groups are whole on a process.
    Returns:
        [E] float32, not normalised: the loss is sum(weight * loss) / sum(weight) with the sum of weights over all processes.
    """
    return torch.ones(len(group))


def group_mean_weights(group: Tensor, num_groups: int) -> Tensor:
    """Every group counts the same, however many decisions it has: weight 1 / (decisions of the group). Shapes as in `mean_weights`."""
    return 1.0 / torch.bincount(group, minlength=num_groups)[group].float()


REDUCTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {"mean": mean_weights, "group_mean": group_mean_weights}


SEQUENCE_REDUCTIONS = ("mean", "group_mean", "seq_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")


class SequenceWeights(NamedTuple):
    """Weights of decisions [B, S] and this part's share of the number that their weighted loss is divided by, []; both add over parts."""

    weight: Tensor
    total: Tensor


def sequence_weights(
    kind: str, mask: Tensor, *, group: Tensor | None = None, num_groups: int = 0, max_length: float | None = None, dtype: torch.dtype = torch.float32
) -> SequenceWeights:
    """Weight of every decision of sequences: the loss is sum(weight * loss) over all micro-batches and processes / sum(total) over them.

    | kind | weight | total | of |
    | --- | --- | --- | --- |
    | mean | 1 | decisions | DAPO (token mean), Lite PPO |
    | group_mean | 1 / decisions of the group | groups | |
    | seq_mean_token_mean | 1 / n_i | sequences | GRPO, GSPO-token, SAPO |
    | seq_mean | 1 / n_i | sequences | losses of whole sequences (GSPO, GMPO, Reg-GRPO), which stand at each decision of theirs and count once |
    | seq_mean_token_sum | 1 | sequences | REINFORCE over trajectories, BNPO, VESPO; LUSPO with GSPO's ratio |
    | seq_mean_token_sum_norm | 1 / max_length | sequences | Dr.GRPO |

    A sequence without a decision that counts has no weight and is in no total. With sequences of one length n all but group_mean differ by a constant:
    mean = seq_mean_token_mean = seq_mean_token_sum / n = seq_mean_token_sum_norm max_length / n. With totals of 0 everywhere there is nothing to learn;
    do not divide. To normalise by a nominal number of sequences instead, filtered ones included, put it in the place of the totals.

    Args:
        mask: [B, S] bool, True where a decision counts; whole sequences. A tree edge is a sequence with S = 1.
        group: [B] int64 in 0..P-1 and num_groups P, of group_mean only; whole groups.
        max_length: > 0, the constant of seq_mean_token_sum_norm only; 3000 in Dr.GRPO's reference run.
    Returns:
        weight [B, S] and total [], of ``dtype``, on the device of ``mask``.
    Raises:
        ValueError: unknown kind, or its argument is missing.
    Source:
        verl core_algos.agg_loss, verified in code; text.md 0. Deviation: TRL counts sequences without decisions too.
    """
    counts, length = mask.to(dtype), mask.sum(1, keepdim=True).to(dtype)
    sequences = (length > 0).to(dtype).sum()
    match kind:
        case "mean":
            return SequenceWeights(counts, counts.sum())
        case "group_mean":
            if group is None or num_groups < 1:
                raise ValueError("the reduction group_mean needs the group of every sequence")
            size = torch.zeros(num_groups, dtype=dtype, device=mask.device).index_add_(0, group, length[:, 0])
            return SequenceWeights(counts / size[group].clamp_min(1)[:, None], (size > 0).to(dtype).sum())
        case "seq_mean" | "seq_mean_token_mean":
            return SequenceWeights(counts / length.clamp_min(1), sequences)
        case "seq_mean_token_sum":
            return SequenceWeights(counts, sequences)
        case "seq_mean_token_sum_norm":
            if max_length is None or max_length <= 0:
                raise ValueError("the reduction seq_mean_token_sum_norm needs max_length > 0")
            return SequenceWeights(counts / max_length, sequences)
        case _:
            raise ValueError(f"unknown reduction {kind!r}; known: {', '.join(SEQUENCE_REDUCTIONS)}")
