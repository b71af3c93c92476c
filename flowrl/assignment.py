"""From scores of samples to what each random decision is trained with: its advantage, its clip bounds, whether it is trained at all.

The order: advantages of leaves, or rewards of nodes (`credit`); normalisation; clamp; selection. Everything is computed on whole groups, which live on
one process; only the statistics over all rewards of an iteration need the other processes.

Letters: B leaves, E decisions (edges), R rows, P groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowrl.comparison import compared, gated
from flowrl.config import Config
from flowrl.core.advantages import group_statistics
from flowrl.core.credit import backup, integrate, layer_advantages, layer_position, sibling_advantages
from flowrl.core.layer_tuning import progress_weights, rows_of_best, straight_velocity
from flowrl.core.objectives import dynamic_clip_bounds
from flowrl.core.preference import PAIR_OBJECTIVES
from flowrl.core.selection import best_and_worst, contrast_mask, depth_mask, depth_window, edges_of_leaves, fraction_mask, width_mask
from flowrl.core.transforms import NORMALISED, transform
from flowrl.estimation import Estimator
from flowrl.reward_weights import RewardWeights
from flowrl.seeds import generator
from flowrl.types import Rollout, Scores, UserError
from samplers.forest import select_edges
from samplers.plans import Plan

__all__ = ["Assigner", "Assignment", "Samples", "Tuning"]


@dataclass(frozen=True, slots=True)
class Tuning:
    """LayerTuning-RL: weight [R] float32 and target velocity [R, L...] of every training row."""

    weight: Tensor
    target: Tensor


@dataclass(frozen=True, slots=True)
class Assignment:
    """What an iteration trains with on this process.

    Attributes:
        rollout: with the selected decisions only.
        advantages, clip_low, clip_high: [E] float32.
        tuning: None without layer tuning.
        placeholder: nothing was selected here; the one decision that is left only keeps this process in step with the others and has no weight.
        rows: the least training rows of these decisions, counted from the plan.
        sums: numbers to be added over processes: abs_advantage, clamped, all (decisions before the selection), kept, tuned (rows with a weight), rows.
        sizes: `rollout.group_size` of each group of this process that is trained, as its plan had it.
    """

    rollout: Rollout
    advantages: Tensor
    clip_low: Tensor
    clip_high: Tensor
    tuning: Tuning | None
    rows: int
    placeholder: bool
    sums: dict[str, float]
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Samples:
    """What an iteration trains with on this process where whole samples are judged.

    Attributes:
        rollout: only its leaves count.
        advantages: [B] float64, clamped; 0 where not valid.
        rewards: [B] float64, the total. valid: [B] bool.
        pairs: [N, 2] int64, the chosen and the rejected sample of each preference; None where samples are judged one by one.
        placeholder: there is no preference here; the one pair that is left only keeps this process in step with the others and has no weight.
        sums: numbers to be added over processes: abs_advantage, clamped, all.
    """

    rollout: Rollout
    advantages: Tensor
    rewards: Tensor
    valid: Tensor
    pairs: Tensor | None
    placeholder: bool
    sums: dict[str, float]


class Assigner:
    """The `advantage`, `credit`, `selection` and `layer_tuning` sections of a run. Its only state is that of its `Estimator`.

    Args:
        add: a number summed over processes.
        rewards: their current weights, which others change; None = those of the config.
        bounds: lowest and highest total reward that there can be; None = not known.
    """

    def __init__(
        self,
        config: Config,
        add: Callable[[float], float] = float,
        rewards: RewardWeights | None = None,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        self.config, self.add = config, add
        self.rewards = rewards or RewardWeights(config)
        alone = config.rollout.group_shards > 1  # then each process sees all samples
        self.estimator = Estimator(config.advantage, float if alone else add, bounds)
        tuned = config.layer_tuning.weight > 0 and config.layer_tuning.target == "best_velocity"
        self.keep_velocity = tuned or config.objective.ratio == "ratio_norm"

    def __call__(
        self,
        plan: Plan,
        rollout: Rollout,
        scores: dict[str, Scores],
        everywhere: dict[str, Scores],
        *,
        prompts: tuple[Tensor, Tensor],
        numbers: Sequence[int],
        iteration: int,
        whole: tuple[Tensor, Tensor] | None = None,
        runs: Sequence[tuple[Plan, int]] = (),
        trained: Tensor | None = None,
    ) -> Assignment:
        """Assign credit.

        Args:
            scores: of this process's leaves; ``everywhere``: of all processes, in any fixed order.
            prompts: the prompt of each leaf as a number, here and everywhere; equal texts have equal numbers in every run.
            numbers: this process's group numbers within the iteration; they seed random selections.
            whole: where groups are shared among processes: what each sample of all processes is compared with, as a number, and the places [B] of this
                process's samples among them.
            runs: plans of different group sizes, each with its number of groups, in their order; () = all groups have ``plan``.
            trained: [B] bool, samples whose decisions are trained; the others only count in statistics. None = all.
        """
        config, total = self.config, self._gated(scores, rollout.leaf_set)
        group, rewards, valid = rollout.row_group[rollout.edge_row], total.values.double(), total.valid
        leaf = self._leaf_advantages(rollout, scores, everywhere, prompts, whole)
        value, known = self._backup(rollout, rewards, valid, "mean" if config.credit.normalize == "leaf" else config.credit.backup)
        clip = config.advantage.clip
        if config.advantage.transform == "identity":
            raw = self._edge_advantages(rollout, leaf, value, known, valid, group)
            clamped = raw.clamp(-clip, clip) * self.rewards.factor
        else:  # of samples, so that a weight reaches every decision of its sample as it is
            weights = self.weights(leaf.clamp(-clip, clip) * self.rewards.factor, rollout.leaf_group, valid)
            raw = clamped = self._edge_advantages(rollout, weights, value, known, valid, group)
        low, high = torch.full_like(clamped, config.objective.clip_low), torch.full_like(clamped, config.objective.clip_high)
        if config.objective.dynamic_clip > 0:
            position = layer_position(value, known, group=group, step=rollout.edge_step)
            low, high = dynamic_clip_bounds(
                position, clip_low=config.objective.clip_low, clip_high=config.objective.clip_high, sensitivity=config.objective.dynamic_clip
            )
        keep = self._selection(plan, rollout, leaf, valid, value, known, group, numbers, iteration)
        if trained is not None:
            keep &= edges_of_leaves(trained, rollout.leaf_edge, len(keep))
        placeholder = not bool(keep.any())  # e.g. no branch with a contrast: every process must still make the updates
        kept = float(keep.sum())
        if placeholder:
            keep[0] = True
        chosen = select_edges(rollout, keep)
        tuning = self._tuning(rollout, rollout.edge_row[keep].unique(), rewards, valid) if config.layer_tuning.weight > 0 else None
        sums = {
            "abs_advantage": clamped.abs().sum().item(),
            "clamped": float((raw.abs() > clip).sum()) if config.advantage.transform == "identity" else 0.0,
            "all": float(len(keep)),
            "kept": kept,
            "tuned": 0.0 if tuning is None else float((tuning.weight > 0).sum()),
            "rows": float(len(chosen.row_sigma)),
        }
        advantages, rows = clamped[keep].float(), 0 if placeholder else least_rows(runs or [(plan, len(numbers))], keep)
        return Assignment(chosen, advantages, low[keep].float(), high[keep].float(), tuning, rows, placeholder, sums)

    def samples(
        self,
        rollout: Rollout,
        scores: dict[str, Scores],
        everywhere: dict[str, Scores],
        *,
        prompts: tuple[Tensor, Tensor],
        whole: tuple[Tensor, Tensor] | None = None,
    ) -> Samples:
        """Advantages of whole samples; arguments as above."""
        total, clip = self._gated(scores, rollout.leaf_set), self.config.advantage.clip
        raw = self._leaf_advantages(rollout, scores, everywhere, prompts, whole)
        a = self.config.advantage
        clamped = raw if a.centre == a.scale == "none" else raw.clamp(-clip, clip)  # a reward has any scale
        num_clamped = float((raw != clamped).sum())
        clamped = clamped * self.rewards.factor
        sums = {"abs_advantage": clamped.abs().sum().item(), "clamped": num_clamped, "all": float(len(raw))}
        pairs = None
        if self.config.objective.name in PAIR_OBJECTIVES:
            pairs = best_and_worst(total.values, rollout.leaf_group, total.valid, int(rollout.leaf_group.max()) + 1)
        placeholder = pairs is not None and not len(pairs)
        pairs = torch.tensor([[0, 1]]) if placeholder else pairs
        return Samples(rollout, clamped, total.values.double(), total.valid, pairs, placeholder, sums)

    def weights(self, advantages: Tensor, group: Tensor, valid: Tensor) -> Tensor:
        """`advantage.transform` of the clamped advantages [B] or [B, S] of samples; those of some kinds have mean 1 over all processes."""
        a = self.config.advantage
        out = transform(a.transform, advantages, temperature=a.temperature, clip=a.clip, group=group, valid=valid, num_groups=int(group.max()) + 1)
        if not bool(out.isfinite().all()):
            raise UserError(f"advantage.transform: {a.transform} of these advantages at temperature {a.temperature:g} is beyond all numbers; raise it")
        if a.transform in NORMALISED:
            total, count = self.add(float(out[valid].sum())), self.add(float(out[valid].numel()))
            out = out * (count / total) if total > 0 else out
        return out

    def _gated(self, scores: dict[str, Scores], sets: Tensor) -> Scores:
        return gated(self.config, scores, sets, int(sets.max()) + 1)

    def _leaf_advantages(
        self,
        rollout: Rollout,
        scores: dict[str, Scores],
        everywhere: dict[str, Scores],
        prompts: tuple[Tensor, Tensor],
        whole: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """[B] float64; where groups are shared among processes, each works out the advantages of all samples and takes its own."""
        if whole is None:
            return self._compared(scores, everywhere, rollout.leaf_set, prompts)
        sets, mine = whole
        return self._compared(everywhere, everywhere, sets, (prompts[1], prompts[1]))[mine]

    def _compared(self, scores: dict[str, Scores], everywhere: dict[str, Scores], sets: Tensor, prompts: tuple[Tensor, Tensor]) -> Tensor:
        return compared(self.config, self.rewards, self.estimator, scores, everywhere, sets, int(sets.max()) + 1, prompts=prompts)

    def _backup(self, rollout: Rollout, values: Tensor, valid: Tensor, kind: Any) -> tuple[Tensor, Tensor]:
        elements = rollout.row_x[0].numel() if self.config.rollout.log_prob_reduction == "sum" else 1
        return backup(
            kind,
            values,
            valid,
            leaf_edge=rollout.leaf_edge,
            edge_parent=rollout.edge_parent,
            log_prob=rollout.edge_old_log_prob.cpu() / elements,
            temperature=self.config.credit.temperature,
        )

    def _edge_advantages(self, rollout: Rollout, leaf: Tensor, value: Tensor, known: Tensor, valid: Tensor, group: Tensor) -> Tensor:
        """[E] float64, before the clamp."""
        credit, a, step = self.config.credit, self.config.advantage, rollout.edge_step
        if credit.normalize == "layer":
            return layer_advantages(value, known, group=group, step=step, eps=a.eps, ddof=a.ddof)
        if credit.normalize == "sibling":
            return sibling_advantages(value, known, row=rollout.edge_row, group=group, step=step, eps=a.eps, ddof=a.ddof)
        if credit.backup == "mean":
            return integrate(credit.integrate, leaf, rollout.leaf_edge, len(step))
        backed, seen = self._backup(rollout, leaf, valid, credit.backup)
        return torch.where(seen, backed, 0.0)

    def _selection(
        self,
        plan: Plan,
        rollout: Rollout,
        leaf: Tensor,
        valid: Tensor,
        value: Tensor,
        known: Tensor,
        group: Tensor,
        numbers: Sequence[int],
        iteration: int,
    ) -> Tensor:
        """[E] bool: the decisions to train."""
        s, step = self.config.selection, rollout.edge_step
        keep = torch.ones(len(step), dtype=torch.bool)
        if s.fraction < 1:
            sample = torch.zeros(len(step), dtype=torch.int64).scatter_(0, rollout.leaf_edge[:, 0], rollout.leaf_edge[:, 1])
            keep &= fraction_mask(sample, group, s.fraction, [generator(self.config.seed, "fraction", iteration, g) for g in numbers])
        if s.depth is not None:
            keep &= depth_mask(step, depth_window(s.depth.first, s.depth.last, s.depth.slide_every, s.depth.stop, iteration))
        if s.width is not None:
            parents = [node.parent for node in plan.nodes if node.trained]
            last_split = max((plan.nodes[p].step for p in parents if parents.count(p) > 1), default=0)
            keep &= width_mask(
                value,
                known,
                row=rollout.edge_row,
                group=group,
                step=step,
                edge_parent=rollout.edge_parent,
                last_split=last_split,
                keep=s.width.keep,
                mode=s.width.mode,
            )
        if s.contrast is not None:
            chosen = contrast_mask(leaf, valid, branch=rollout.leaf_group, high=s.contrast.high, low=s.contrast.low)
            keep &= edges_of_leaves(chosen, rollout.leaf_edge, len(step))
        return keep

    def _tuning(self, rollout: Rollout, rows: Tensor, rewards: Tensor, valid: Tensor) -> Tuning:
        """Weights and targets of the supervised term for some rows, from all leaves below them and the best path of all, trained or not."""
        tuning, num_groups = self.config.layer_tuning, int(rollout.leaf_group.max()) + 1
        group = rollout.leaf_group
        low, high = torch.full((num_groups,), torch.inf, dtype=torch.float64), torch.full((num_groups,), -torch.inf, dtype=torch.float64)
        low = low.scatter_reduce(0, group, torch.where(valid, rewards, torch.inf), "amin")
        high = high.scatter_reduce(0, group, torch.where(valid, rewards, -torch.inf), "amax")
        mean, std, _ = group_statistics(rewards, group, valid, num_groups, 0)
        at_top = torch.nonzero(valid & (rewards == high[group])).squeeze(1)
        first = torch.full((num_groups,), len(group)).scatter_reduce(0, group[at_top], at_top, "amin")
        best_leaf = torch.where(first < len(group), first, -1)

        row, leaf = rollout.edge_row[rollout.leaf_edge[:, 0]], rollout.leaf_edge[:, 1]
        pairs = torch.stack([row, leaf], 1).unique(dim=0)
        use = valid[pairs[:, 1]].double()
        count = torch.zeros(len(rollout.row_sigma), dtype=torch.float64).index_add_(0, pairs[:, 0], use)
        total = torch.zeros_like(count).index_add_(0, pairs[:, 0], torch.where(valid, rewards, 0.0)[pairs[:, 1]])
        weight = progress_weights(total / count, rollout.row_group, high, low, mean, std, tuning.guard)
        source = rows_of_best(pairs, rollout.row_group, rollout.row_step, best_leaf)
        here = source >= 0 if tuning.nodes == "all" else source == torch.arange(len(source))
        weight = torch.where(here, weight, torch.zeros_like(weight))[rows].float()
        place = rows.to(rollout.row_x.device)
        if tuning.target == "to_best_x0":
            best = rollout.leaves[best_leaf[rollout.row_group[rows]].clamp_min(0).to(place.device)]
            return Tuning(weight, straight_velocity(rollout.row_x[place], rollout.row_sigma[rows], best))
        assert rollout.row_velocity is not None
        return Tuning(weight, rollout.row_velocity[source[rows].clamp_min(0).to(place.device)])

    def state_dict(self) -> dict[str, Any] | None:
        return self.estimator.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Raises what `Estimator.load_state_dict` raises."""
        self.estimator.load_state_dict(state)


def least_rows(runs: Sequence[tuple[Plan, int]], keep: Tensor) -> int:
    """Distinct latents that the kept decisions leave, from the plans alone.

    Args:
        runs: plans, each with the number of neighbouring groups that follow it.
        keep: [E] bool, group by group in the plan's order.
    """
    numbers, start = [torch.zeros(0, dtype=torch.int64)], 0
    for plan, num_groups in runs:
        parents = torch.tensor([node.parent for node in plan.nodes if node.trained])
        first = start + torch.arange(num_groups) * len(plan.nodes)
        numbers.append(first.repeat_interleave(len(parents)) + parents.repeat(num_groups))
        start += num_groups * len(plan.nodes)
    return len(torch.cat(numbers)[keep].unique())
