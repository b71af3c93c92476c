"""Which samples of a group become pairs. Host-side: index tensors are int64 on the CPU, and there is a loop over groups.

Letters: B samples, P groups, N pairs. A winner scores higher than its loser; so ties, samples without a reward and groups of one give no pair.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flowrl.core.selection import best_and_worst

__all__ = ["PAIRING_RULES", "PairingRule", "constrained_pairs", "make_pairs"]

PairingRule = Literal["best_worst", "best_random", "all", "threshold", "random", "levels"]

PAIRING_RULES: tuple[PairingRule, ...] = ("best_worst", "best_random", "all", "threshold", "random", "levels")


def make_pairs(
    rewards: Tensor,
    group: Tensor,
    valid: Tensor,
    *,
    rule: PairingRule,
    threshold: float = 0.0,
    cap: int | None = None,
    seed: int = 0,
    may_lose: Tensor | None = None,
    content: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pairs (winner, loser) of samples of one group, sorted by group, then winner, then loser.

    | rule | pairs of a group | of |
    | --- | --- | --- |
    | best_worst | the best against the worst | online DPO, INPO |
    | best_random | the best against a random one of those it beats | |
    | all | every two samples with different rewards | OSP, whose ranks are then the rewards |
    | threshold | every two whose rewards differ by more than ``threshold`` | DNO-Prct |
    | random | ``cap`` (None: 1) of all, each as likely as the other | REBEL, P3O, CoPG |
    | levels | every two on different levels: the rewards are levels, of which the lowest is the best | TRPA |

    Of equally good (bad) samples the first is the best (worst).

    Args:
        rewards: [B] float, finite where valid. group: [B] int64 >= 0. valid: [B] bool; False for an empty response too.
        threshold: >= 0, of the rule threshold only.
        cap: >= 1, most pairs of a group, a random subset; None = all. No effect on the best_ rules, which give one.
        seed: of all draws. A group's draw depends on the seed, its number and its own pairs only, not on its neighbours.
        may_lose: [B] bool; False for a sample that may only win, such as a teacher's (DNO-Prct). None = all may lose.
        content: [B] int64, equal for identical responses, which are no pair whatever a noisy judge says. None = all differ.
    Returns:
        winner [N], loser [N], int64; N = 0 where there is no pair.
    Raises:
        ValueError: unknown rule, cap below 1, threshold below 0.
    Source:
        text.md, section 6; the rules of the methods as its entries describe them. best_worst is `selection.best_and_worst`.
    """
    if rule not in PAIRING_RULES:
        raise ValueError(f"unknown pairing rule {rule!r}; known: {', '.join(PAIRING_RULES)}")
    if threshold < 0 or (cap is not None and cap < 1):
        raise ValueError(f"pairs need threshold >= 0 and cap >= 1, got {threshold} and {cap}")
    score = -rewards if rule == "levels" else rewards
    num_groups = int(group.max()) + 1 if len(group) else 0
    if rule == "best_worst" and may_lose is None and content is None:
        pairs = best_and_worst(score, group, valid, num_groups)
        return pairs[:, 0], pairs[:, 1]
    found = []
    for number in range(num_groups):
        members = torch.nonzero((group == number) & valid).squeeze(1)
        value = score[members]
        gap = value[:, None] - value[None, :]
        wins = gap > (threshold if rule == "threshold" else 0.0)
        if may_lose is not None:
            wins &= may_lose[members][None, :]
        if content is not None:
            wins &= content[members][:, None] != content[members][None, :]
        if not bool(wins.any()):
            continue
        if rule in ("best_worst", "best_random"):  # the best that beats anyone it may be paired with
            best = int(torch.where(wins.any(1), value, -torch.inf).argmax())
            losers = torch.nonzero(wins[best]).squeeze(1)
            chosen = losers[value[losers].argmin()] if rule == "best_worst" else losers[_draw(len(losers), 1, seed, number)[0]]
            pairs = torch.stack([torch.tensor(best), chosen])[None]
        else:
            pairs = torch.nonzero(wins)
            most = cap if cap is not None else 1 if rule == "random" else len(pairs)
            if most < len(pairs):
                pairs = pairs[_draw(len(pairs), most, seed, number)]
        found.append(members[pairs])
    table = torch.cat(found) if found else torch.zeros(0, 2, dtype=torch.int64)
    return table[:, 0], table[:, 1]


def constrained_pairs(rewards: Tensor, satisfied: Tensor, group: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """CODPO's pairs: the best sample that keeps all constraints against the worst that breaks one, whichever of the two scores higher.

    A group without both kinds gives no pair. The loss is `preference.rpo` with lengths: DPO plus lambda / |y_chosen| times the negative log-likelihood.

    Args:
        rewards: [B] float. satisfied: [B] bool. group: [B] int64 >= 0. valid: [B] bool.
    Returns:
        winner [N], loser [N], int64, one pair of a group at most, in the order of group numbers; of equals the first counts.
    Source:
        CGPO, arXiv:2409.20370, from the paper's text.
    """
    found = []
    for number in range(int(group.max()) + 1 if len(group) else 0):
        here = (group == number) & valid
        keeps, breaks = (torch.nonzero(here & kind).squeeze(1) for kind in (satisfied, ~satisfied))
        if len(keeps) and len(breaks):
            found.append(torch.stack([keeps[rewards[keeps].argmax()], breaks[rewards[breaks].argmin()]]))
    table = torch.stack(found) if found else torch.zeros(0, 2, dtype=torch.int64)
    return table[:, 0], table[:, 1]


def _draw(number: int, count: int, seed: int, group: int) -> Tensor:
    """``count`` of 0 .. number - 1 in rising order."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + group) % 2**63)
    return torch.randperm(number, generator=generator)[:count].sort().values
