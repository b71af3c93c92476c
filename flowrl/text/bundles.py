"""Credit that looks beyond the prompt: RiskPO's bundles of prompts, and COPO's blend of two advantages.

Letters: B answers, T tokens, P groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from flowrl.core.advantages import group_statistics
from flowrl.core.bundles import Blend, QuantileMode, Quantiles, consistency_blend, paper_scores, risk_advantages, update_quantiles
from flowrl.estimation import Estimator
from flowrl.text.answers import Answers
from flowrl.text.parts import Stateless
from flowrl.types import Decisions, Objective
from rewards.text_match import clean_answer, find_answer

if TYPE_CHECKING:
    from flowrl.text.batch import Batch

__all__ = ["ConsistencyCredit", "RiskCredit", "blended"]


class RiskCredit:
    """RiskPO (arXiv:2510.00911): mixed value-at-risk of bundles of prompts, see `flowrl.core.bundles`.

    The groups of an iteration, in their order, make bundles; those of all processes together, so that it does not matter how many there are. Groups that are
    left over have no advantage. State: the quantiles.

    Args:
        bundle: prompts of a bundle. rate: of the quantiles' updates. The others as of `risk_advantages`.
    """

    needs: frozenset[str] = frozenset()

    def __init__(
        self,
        bundle: int = 5,
        low: float = 0.2,
        high: float = 0.9,
        mixture: float = 1.5,
        rate: float = 0.1,
        quantiles: QuantileMode = "track",
        credit: Literal["uniform", "std", "share"] = "std",
        baseline: bool = True,
        normalize: bool = True,
        eps: float = 1e-6,
    ) -> None:
        if bundle < 1:
            raise ValueError(f"bundle is {bundle}, and must be at least 1")
        if not 0 <= low < high <= 1:
            raise ValueError(f"low is {low:g} and high {high:g}; they are levels, 0 <= low < high <= 1")
        if quantiles not in ("track", "batch", "mix") or credit not in ("uniform", "std", "share"):
            raise ValueError("quantiles is track, batch or mix, and credit is uniform, std or share")
        self.bundle, self.low, self.high, self.mixture, self.rate = bundle, low, high, mixture, rate
        self.mode, self.credit, self.baseline, self.normalize, self.eps = quantiles, credit, baseline, normalize, eps
        self.quantiles, self._iteration = Quantiles(), 0

    def __call__(self, answers: Answers, estimator: Estimator) -> Tensor:
        numbers = torch.tensor(list(answers.numbers), dtype=torch.int64)
        parts = answers.gather((answers.rewards, answers.valid, numbers[answers.group]))
        rewards, valid, group = (torch.cat([part[k] for part in parts]) for k in range(3))
        num_groups = int(group.max()) + 1
        order = group.argsort(stable=True)
        rewards, valid, group = rewards[order], valid[order], group[order]
        num_bundles = num_groups // self.bundle
        bundle = torch.arange(num_groups) // self.bundle
        papers = paper_scores(rewards, group, valid, torch.where(bundle < num_bundles, bundle, -1), max(num_bundles, 1))
        if answers.iteration > self._iteration:  # once, however often it is asked
            self._iteration = answers.iteration
            self.quantiles = update_quantiles(self.quantiles, papers.scores[papers.known], low=self.low, high=self.high, rate=self.rate)
        found = risk_advantages(
            papers,
            rewards,
            group,
            valid,
            num_groups,
            quantiles=self.quantiles,
            mode=self.mode,
            low=self.low,
            high=self.high,
            mixture=self.mixture,
            baseline=self.baseline,
            normalize=self.normalize,
            credit=self.credit,
            eps=self.eps,
        )
        back = torch.empty_like(found)
        back[order] = found
        mine = [len(part[0]) for part in parts]
        place = _own_place(answers, mine)
        answers.metrics["quantiles/low"], answers.metrics["quantiles/high"] = self.quantiles.low, self.quantiles.high
        return back[place : place + len(answers)]

    def state_dict(self) -> dict[str, Any]:
        """Quantiles, and the iteration that was seen last."""
        return {"quantiles": self.quantiles.state_dict(), "iteration": self._iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self.quantiles, self._iteration = Quantiles(**state["quantiles"]), state["iteration"]


def _own_place(answers: Answers, sizes: list[int]) -> int:
    """Where this process's answers begin among those of all. Groups are dealt out in turn, so that the process's number is its first group's."""
    return sum(sizes[: answers.numbers[0]]) if len(sizes) > 1 else 0


class ConsistencyCredit(Stateless):
    """COPO (arXiv:2508.04138): where a prompt's answers differ they are compared with each other, where they agree the prompt is compared with the others.

    Two advantages, whose losses `blended` adds up; where their signs agree this is the loss of the blend [B] that is returned. eps, ddof and singleton are
    those of `advantage`.

    Args:
        answers: what answers agree on: "final", the final answer as the reward exact_match finds it; "text", the whole of it; "outcome", right (reward > 0) or
            wrong. gamma, entropy_centre: of `flowrl.core.bundles.consistency_blend`.
    """

    def __init__(self, answers: Literal["final", "text", "outcome"] = "final", gamma: float = 3.0, entropy_centre: float = 1.0) -> None:
        if answers not in ("final", "text", "outcome"):
            raise ValueError(f"answers is {answers}; known: final, text, outcome")
        self.answers, self.gamma, self.entropy_centre = answers, gamma, entropy_centre

    def __call__(self, answers: Answers, estimator: Estimator) -> Tensor:
        a = answers.config.advantage
        ids, num_answers = self._numbers(answers)
        mean, _, count = group_statistics(answers.rewards, answers.group, answers.in_batch, answers.num_groups, 0)
        prompts = answers.add(float((count > 0).sum()))
        centre = answers.add(float(mean[count > 0].sum())) / max(prompts, 1.0)
        square = answers.add(float((mean[count > 0] - centre).square().sum()))
        spread = (square / (prompts - a.ddof)) ** 0.5 if prompts > a.ddof else 0.0
        found = consistency_blend(
            answers.rewards,
            answers.group,
            answers.valid,
            answers.num_groups,
            answer=ids,
            num_answers=num_answers,
            success=(centre, spread),
            gamma=self.gamma,
            entropy_centre=self.entropy_centre,
            eps=a.eps,
            ddof=a.ddof,
            singleton=a.singleton,
        )
        answers.extra["blend"] = found
        weights, counted = answers.add(float(found.weight[answers.valid].sum())), answers.add(float(answers.valid.sum()))
        answers.metrics["consistency/local_weight"] = weights / max(counted, 1.0)
        return found.weight * found.local + (1 - found.weight) * found.world

    def _numbers(self, answers: Answers) -> tuple[Tensor | None, int]:
        """Number [B] of each answer among the different ones of its group, and how many there are at most."""
        if self.answers == "outcome":
            return None, 2
        seen: list[dict[str, int]] = [{} for _ in range(answers.num_groups)]
        numbers = []
        for group, text in zip(answers.group.tolist(), answers.completions.texts, strict=True):
            final = text if self.answers == "text" else find_answer(text)
            numbers.append(seen[group].setdefault("" if final is None else clean_answer(final), len(seen[group])))
        return torch.tensor(numbers, dtype=torch.int64), max(map(len, seen))


def blended(batch: Batch, loss: Callable[[Decisions], Objective]) -> Objective:
    """weight loss(local) + (1 - weight) loss(world) where the credit left a `Blend` of two advantages; else the loss of the decisions."""
    blend: Blend | None = batch.answers.extra.get("blend")
    if blend is None:
        return loss(batch.decisions)
    d, clip = batch.decisions, batch.answers.config.advantage.clip
    factor = batch.answers.extra.get("advantage_factor", 1.0)
    weight = batch.of(blend.weight.float())[:, None]
    local, world = (
        loss(Decisions(d.log_prob, d.old_log_prob, batch.of(side.clamp(-clip, clip).float() * factor)[:, None].expand_as(d.advantages), d.mask))
        for side in (blend.local, blend.world)
    )
    metrics = {name: weight * value + (1 - weight) * world.metrics[name] for name, value in local.metrics.items()}
    return Objective(weight * local.loss + (1 - weight) * world.loss, metrics)
