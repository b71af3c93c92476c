"""Pictures: denoising plans are rolled out, and steps or finished samples are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from flowrl.assignment import Assigner, Assignment, Samples
from flowrl.config import Config
from flowrl.core.advantages import group_statistics
from flowrl.critic import Critic, critic_advantages
from flowrl.data import GroupSampler, load_prompts
from flowrl.engines.base import Awaited, Data, Engine, Known, Setting, gathered_samples, reward_bounds
from flowrl.evaluation import Evaluation, Evaluator, sigmas_of
from flowrl.likelihood_agreement import trains_steps
from flowrl.likelihoods.transition import TransitionLikelihood
from flowrl.pairs import PairSet, load_pairs
from flowrl.picture_groups import PictureGroups
from flowrl.picture_shaping import PICTURE_SHAPERS, shape_rewards
from flowrl.planning import build_plan, minimum_rows, trained_rows
from flowrl.preflight import check_kernel, check_memory, check_pairs, check_shaping, check_updates
from flowrl.reward_metrics import join_scores
from flowrl.rollout_log import SavedRollout, save_rollout
from flowrl.sections import SelectionConfig
from flowrl.seeds import derive_seed, generator
from flowrl.text.parts import make_part
from flowrl.types import Prompt, Rollout, SampleBatch, Scores, UserError
from flowrl.updates.base import Update
from flowrl.updates.direct import DIRECT_OBJECTIVES, DirectUpdate, kept_steps
from flowrl.updates.matching import MatchingUpdate
from flowrl.updates.minimum import least_rows, units_of_samples
from flowrl.updates.noised import NoisedSamples
from flowrl.updates.pairs import PairUpdate, needs_reference
from flowrl.updates.transition import TransitionUpdate
from rewards.composite import Pending, WeightedRewards
from samplers.forest import concatenate, leaves_only, move
from samplers.plans import Plan
from samplers.rollout import execute

__all__ = ["DiffusionEngine", "Sampled", "diffusion_engine"]

_WAITING = 4
"""Batches of pictures that wait for their scores while sampling goes on."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A rollout and the plan that it follows; see `flowrl.engines.base.RolledOut`. runs: of groups of different sizes, as in `Assigner`."""

    plan: Plan
    rollout: Rollout
    num_sampled: int
    runs: tuple[tuple[Plan, int], ...] = ()

    @property
    def group(self) -> Tensor:
        return self.rollout.leaf_group

    @property
    def compared(self) -> Tensor:
        return self.rollout.leaf_set


def diffusion_engine(engine: Engine, what: str) -> DiffusionEngine:
    """The engine of a run of pictures.

    Raises:
        UserError: the run is one of text, with which ``what`` cannot work.
    """
    if not isinstance(engine, DiffusionEngine):
        raise UserError(f"model.path: {what} works on models of pictures, and this is a language model")
    return engine


class DiffusionEngine:
    """See `flowrl.engines.base.Engine`."""

    counted: ClassVar[str] = "images"

    @staticmethod
    def load_data(config: Config) -> Data:
        pairs = load_pairs(config.data.pairs) if config.data.pairs is not None else None
        prompts = load_prompts(config.data.train) if pairs is None else pairs.prompts
        return Data(prompts, {name: load_prompts(path) for name, path in config.data.eval.items()}, pairs)

    @staticmethod
    def needs_reference(config: Config) -> bool:
        return needs_reference(config)

    def __init__(self, setting: Setting) -> None:
        config, policy = setting.config, setting.policy
        if config.likelihood == "token":
            raise UserError(
                f"likelihood: token belongs to language models, and {config.model.path} is an image generator; set likelihood: transition or matching, or "
                "another model.path"
            )
        self.setting, self.config, self.accelerator, self.policy = setting, config, setting.accelerator, policy
        self.prompts, self.rewards = setting.data.prompts, setting.rewards
        self.pairs: PairSet | None = setting.data.pairs
        self.sampler = GroupSampler(len(self.prompts), config.rollout.groups_per_iteration, config.seed)
        check_kernel(self)
        self.sigmas = sigmas_of(config.rollout, config.rollout.num_steps, policy)
        self.shift = policy.shift_for(config.rollout.num_steps) if config.rollout.shift is None else config.rollout.shift
        self.likelihood = TransitionLikelihood(config.rollout.kernel, config.rollout.log_prob_reduction, policy.prediction)
        self.assigner = Assigner(config, setting.add, setting.reward_weights, reward_bounds(config, self.rewards))
        self.allocation = PictureGroups(config, len(self.prompts), self.assigner.estimator.bounds)
        self.shapers = [make_part("shaping", PICTURE_SHAPERS, part.name, part.args) for part in config.shaping]
        self.critic: Critic | None = None
        if config.critic is not None:
            channels, pooled_dim = policy.latent_shape[0], policy.pooled.shape[1]
            self.critic = Critic(config.critic, channels=channels, pooled_dim=pooled_dim, device=policy.device, seed=config.seed)
        e = config.evaluation
        self.evaluator = self.make_evaluator(config, policy, setting.data.splits, setting.eval_rewards, self.accelerator, e.num_steps, e.seed)
        if config.rollout.group_shards > 1 and self.rewards.compares:
            raise UserError("rollout.group_shards: a reward compares the samples of a group, which must stay together then; use group_shards: 1")
        check_memory(self)
        check_updates(self)
        check_shaping(self)
        if self.pairs is not None:
            check_pairs(self)

    def groups(self, iteration: int) -> list[int]:
        return self.allocation.ask(iteration)

    def plan(self, iteration: int, group_size: int | None = None) -> Plan:
        """The plan of an iteration (>= 1) for groups of that size, the same on every process; None = equally large ones."""
        seed = derive_seed(self.config.seed, iteration)
        kept = kept_steps(self.config, iteration)
        rollout = self.config.rollout
        part = rollout.model_copy(update={"group_size": group_size or rollout.group_size // rollout.group_shards})
        return build_plan(part, self.sigmas, shift=self.shift, iteration=iteration, seed=seed, kept_steps=kept)

    # --- sampling ---

    def roll_out(self, prompts: list[Prompt], indices: list[int], numbers: list[int], iteration: int) -> tuple[Sampled, Sequence[Awaited]]:
        """While one chunk of groups is sampled, the rewards of those before are computed in threads, or elsewhere."""
        plan = self.plan(iteration)
        if self.pairs is not None:
            rollout, scores = self.read_pairs(indices)
            return Sampled(plan, rollout, 0), [Known(scores)]
        sizes, parts, pending, start = self.allocation.sizes(numbers), list[Rollout](), list[Pending](), 0
        runs = [(self.plan(iteration, size), len(list(run))) for size, run in groupby(sizes)]
        for own, count in runs:
            stop = start + count
            rollout, submitted = self.sample(own, prompts[start:stop], numbers[start:stop], iteration)
            parts.append(rollout)
            pending += submitted
            for waiting in pending[:-_WAITING]:
                waiting.result()
            start = stop
        rollout = concatenate(parts)
        return Sampled(plan, rollout, len(rollout.leaves), tuple(runs)), pending

    def read_pairs(self, indices: Sequence[int]) -> tuple[Rollout, dict[str, Scores]]:
        """Stored preference pairs as a rollout of groups of two: the chosen sample has reward 1, the rejected one 0."""
        assert self.pairs is not None
        found = self.pairs.load(indices, self.policy.image_size, self.policy.latent_shape).flatten(0, 1)
        latents = found.to(self.policy.device) if self.pairs.is_latent else self.policy.encode(found)
        rewards = torch.tensor([1.0, 0.0]).repeat(len(indices))
        return leaves_only(latents, torch.arange(len(indices)).repeat_interleave(2)), {"total": Scores(rewards, torch.ones(len(rewards), dtype=torch.bool))}

    def sample(self, plan: Plan, prompts: list[Prompt], numbers: list[int], iteration: int) -> tuple[Rollout, list[Pending]]:
        """Roll out a plan for some groups, and submit the pictures to the rewards."""
        config, policy = self.config, self.policy
        prompt_rows = policy.prompt_rows([p.text for p in prompts])
        velocity = policy.velocity(config.rollout.guidance_scale)
        chunk = max(1, config.training.rows_per_forward // max(len(wave) for wave in plan.waves))
        parts: list[Rollout] = []
        pending: list[Pending] = []
        with self.setting.sampling(), policy.in_step():
            for start in range(0, len(prompts), chunk):
                stop = min(start + chunk, len(prompts))
                part = execute(
                    velocity,
                    plan,
                    prompt_rows[start:stop],
                    [generator(config.seed, "noise", iteration, g) for g in numbers[start:stop]],
                    policy.latent_shape,
                    device=policy.device,
                    reduction=config.rollout.log_prob_reduction,
                    keep_velocity=self.assigner.keep_velocity,
                    prediction=policy.prediction,
                )
                parts.append(move(part, torch.device("cpu")) if config.training.offload_rollouts else part)
                shown = [prompts[start + g] for g in part.leaf_group.tolist()]
                batch = SampleBatch(shown, images=policy.decode(part.leaves), group=part.leaf_group + start)
                pending.append(self.rewards.submit(batch))
                if len(pending) > _WAITING:  # pictures of more batches would pile up in memory
                    pending[-1 - _WAITING].result()
        return concatenate(parts), pending

    def keep(self, iteration: int, rolled_out: Sampled, scores: dict[str, Scores], prompts: Sequence[Prompt], numbers: Sequence[int]) -> SavedRollout:
        rollout = rolled_out.rollout
        shown = [prompts[g] for g in rollout.leaf_group.tolist()]
        group = torch.tensor(numbers)[rollout.leaf_group]
        every, latents, numbered, joined = gathered_samples(self.accelerator, shown, list(rollout.leaves.cpu()), group, scores)
        return SavedRollout(iteration, every, torch.stack(latents), numbered, joined)

    def save_rollout(self, run_dir: Path, kept: SavedRollout) -> None:
        save_rollout(run_dir, kept.iteration, prompts=kept.prompts, latents=kept.latents, group=kept.group, scores=kept.scores)

    # --- credit and updates ---

    def assign(
        self,
        rolled_out: Sampled,
        scores: dict[str, Scores],
        everywhere: dict[str, Scores],
        *,
        prompts: tuple[Tensor, Tensor],
        numbers: Sequence[int],
        iteration: int,
    ) -> tuple[Assignment | Samples, dict[str, Any]]:
        add = self.setting.add
        metrics: dict[str, Any] = {}
        keeps = torch.ones(len(numbers), dtype=torch.bool)
        if not self.allocation.plain:
            keeps, metrics = self.allocation.observe(rolled_out.group, numbers, scores["total"], everywhere["total"], self.gather, add)
        assigned = self._assign(self.assigner, rolled_out, scores, everywhere, prompts, numbers, iteration, keeps)
        whole = self._whole(rolled_out, numbers)
        if whole is not None:
            total, sets = everywhere["total"], whole[0]
            _, std, count = group_statistics(total.values.double(), sets, total.valid, int(sets.max()) + 1, self.config.advantage.ddof)
            metrics["reward/zero_std_groups"] = int(((std == 0) | (count < 2)).sum())
        if self.config.selection != SelectionConfig():
            metrics["selection/kept"] = add(assigned.sums["kept"]) / add(assigned.sums["all"])
        if isinstance(assigned, Assignment) and assigned.tuning is not None:
            metrics["tuning/rows"] = add(assigned.sums["tuned"]) / add(assigned.sums["rows"])
        if isinstance(assigned, Samples) and assigned.pairs is not None:
            metrics["pair/count"] = int(add(0.0 if assigned.placeholder else float(len(assigned.pairs))))
        return assigned, metrics

    def assign_alone(
        self, rolled_out: Sampled, scores: dict[str, Scores], everywhere: dict[str, Scores], numbers: Sequence[int], iteration: int
    ) -> Assignment | Samples:
        one = self.config.model_copy(update={"rewards": self.config.rewards[:1]})
        assigner = Assigner(one, self.setting.add, bounds=self.assigner.estimator.bounds)
        nobody = torch.zeros(0, dtype=torch.int64)
        return self._assign(assigner, rolled_out, scores, everywhere, (nobody, nobody), numbers, iteration, torch.ones(len(numbers), dtype=torch.bool))

    def gather(self, value: Any) -> list[Any]:
        """A value of every process."""
        return gather_object([value]) if self.accelerator.num_processes > 1 else [value]

    def _assign(
        self,
        assigner: Assigner,
        rolled_out: Sampled,
        scores: dict[str, Scores],
        everywhere: dict[str, Scores],
        prompts: tuple[Tensor, Tensor],
        numbers: Sequence[int],
        iteration: int,
        keeps: Tensor,
    ) -> Assignment | Samples:
        """keeps: [P] bool, groups that are trained."""
        whole = self._whole(rolled_out, numbers)

        def join(total: Scores) -> Scores:
            return join_scores([{"total": part} for part in self.gather(total)])["total"]

        scores, everywhere = shape_rewards(self.shapers, rolled_out.rollout, scores, everywhere, join)
        if trains_steps(self.config):
            assigned = assigner(
                rolled_out.plan,
                rolled_out.rollout,
                scores,
                everywhere,
                prompts=prompts,
                numbers=numbers,
                iteration=iteration,
                whole=whole,
                runs=rolled_out.runs,
                trained=None if bool(keeps.all()) else keeps[rolled_out.group],
            )
            trained = zip(self.allocation.sizes(numbers), keeps.tolist(), strict=True)
            return replace(assigned, sizes=tuple(size for size, kept in trained if kept))
        return assigner.samples(rolled_out.rollout, scores, everywhere, prompts=prompts, whole=whole)

    def _whole(self, rolled_out: Sampled, numbers: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """The group of each sample of all processes, and the places of this process's samples among them; None where groups are whole."""
        shards = self.config.rollout.group_shards
        if shards == 1:
            return None
        here = torch.tensor(numbers)[rolled_out.group] // shards
        parts = self.gather(here)
        before = sum(len(part) for part in parts[: self.accelerator.process_index])
        return torch.cat(parts), torch.arange(before, before + len(here))

    def update(
        self, rolled_out: Sampled, assigned: Assignment | Samples, prompts: list[Prompt], numbers: list[int], iteration: int
    ) -> tuple[Update | None, dict[str, Any]]:
        """None while the critic learns alone."""
        config, policy = self.config, self.policy
        prompt_rows = policy.prompt_rows([p.text for p in prompts])
        if isinstance(assigned, Assignment):
            return TransitionUpdate(config, policy, self.likelihood, rolled_out.plan, assigned, prompt_rows), {}
        rollout, sigmas = assigned.rollout, tuple(self.sigmas)
        if config.objective.name in DIRECT_OBJECTIVES:
            update = DirectUpdate(
                config, policy, self.rewards, rollout, prompts=prompts, prompt_rows=prompt_rows, numbers=numbers, iteration=iteration, sigmas=sigmas
            )
            return update, {}
        pairs = assigned.pairs
        leaves = torch.arange(len(rollout.leaves)) if pairs is None else pairs.flatten()
        slots = leaves if pairs is None else torch.arange(len(pairs)).repeat_interleave(2)
        noised = NoisedSamples(
            config, policy, rollout, leaves, slots, prompt_rows=prompt_rows, numbers=numbers, iteration=iteration, sigmas=sigmas, shift=self.shift
        )
        if pairs is not None:
            return PairUpdate(config, policy, noised, placeholder=assigned.placeholder), {}
        advantages, metrics = self._criticise(noised, assigned, numbers, iteration)
        if self._strength(iteration) == 0:
            return None, metrics
        weights = self.assigner.weights(advantages, rollout.leaf_group, assigned.valid).float()
        return MatchingUpdate(config, policy, noised, weights, assigned.valid, self.setting.old_policy), metrics

    def _strength(self, iteration: int) -> float:
        """How much of its advantages the policy is trained with, see `Critic.strength`."""
        return 1.0 if self.critic is None else self.critic.strength(iteration)

    def _criticise(self, noised: NoisedSamples, samples: Samples, numbers: Sequence[int], iteration: int) -> tuple[Tensor, dict[str, Any]]:
        """Advantages [N, S] of samples at their noise levels: without a critic those of the samples, else less its value. The critic learns too."""
        shaped, count = samples.advantages, self.config.matching.num_times
        if self.critic is None:
            return shaped[:, None].expand(-1, count), {}
        x, sigma, prompt_row = noised.states(), noised.sigma[noised.slots].flatten(), noised.prompt_row.repeat_interleave(count)
        value = self.critic.value(x, sigma, prompt_row, pooled=self.policy.pooled)
        width = len(shaped) // len(numbers) * count  # groups are equally large
        metrics: dict[str, Any] = dict(
            self.critic.fit(
                x,
                sigma,
                prompt_row,
                shaped.float().repeat_interleave(count),
                samples.valid.repeat_interleave(count),
                pooled=self.policy.pooled,
                generator=generator(self.config.seed, "critic", iteration),
                accelerator=self.accelerator,
                numbers=(torch.tensor(numbers)[:, None] * width + torch.arange(width)).flatten(),
                value=value,
            )
        )
        self.critic.update_gate(iteration)
        strength = self.critic.strength(iteration)
        metrics["critic/strength"] = strength
        return strength * critic_advantages(shaped.float(), value.view(-1, count), self.critic.config.advantage_clip), metrics

    def finish(self, assigned: Assignment | Samples) -> None:
        """Nothing is left to do."""

    def minimum_nfe(self, assigned: Assignment | Samples, num_groups: int, iteration: int, idle_rows: int, all_valid: bool) -> int:
        """By the closed formulas of docs/nfe.md.

        Where draws, rewards or their absence decide what is trained, N is the number of distinct latents that the selected decisions leave, or of pairs.
        ``idle_rows`` keep this process in step with others that have something to train.
        """
        config, add = self.config, self.setting.add
        seed = derive_seed(config.seed, iteration)
        sized = {size: self._sized(size) for size in {*self.allocation.sizes(range(num_groups))}}
        least = {size: minimum_rows(part.rollout, iteration=iteration, seed=seed)[0] for size, part in sized.items()}
        rollout = sum(least[size] for size in self.allocation.sizes(range(num_groups))) if self.pairs is None else 0
        placeholders = int(add(float(assigned.placeholder)))
        if isinstance(assigned, Assignment):
            rows = {size: trained_rows(part, iteration) for size, part in sized.items()}
            trained, selected = int(add(float(sum(rows[size] or 0 for size in assigned.sizes)))), int(add(assigned.rows))
            units = selected if None in rows.values() or not all_valid else trained
        elif assigned.pairs is not None:
            units = int(add(0.0 if assigned.placeholder else float(len(assigned.pairs))))
        else:
            units = units_of_samples(config, num_groups // config.rollout.group_shards) if self._strength(iteration) > 0 else 0
        idle = int(add(idle_rows))
        return sum(least_rows(config, iteration, rollout=rollout, units=units, idle_rows=idle, placeholders=placeholders))

    def _sized(self, group_size: int) -> Config:
        """The config with groups of that size."""
        return self.config.model_copy(update={"rollout": self.config.rollout.model_copy(update={"group_size": group_size})})

    # --- evaluation and state ---

    @staticmethod
    def make_evaluator(
        config: Config, policy: Any, splits: Mapping[str, Sequence[Prompt]], rewards: WeightedRewards, accelerator: Accelerator, num_steps: int, seed: int
    ) -> Evaluator:
        return Evaluator(policy, splits, rewards, sigmas=sigmas_of(config.rollout, num_steps, policy), seed=seed, accelerator=accelerator)

    def evaluate(self, split: str, number: int, guidance_scale: float, keep: int) -> Evaluation:
        return self.evaluator(split, number, guidance_scale, keep)

    def state_dict(self) -> dict[str, Any]:
        critic = None if self.critic is None else self.critic.state_dict()
        return {"critic": critic, "assigner": self.assigner.state_dict(), "allocation": self.allocation.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if (self.critic is None) != (state["critic"] is None):
            raise UserError("the checkpoint and the config disagree on whether there is a critic")
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
        self.assigner.load_state_dict(state.get("assigner"))
        self.allocation.load_state_dict(state.get("allocation"))
