"""Language models: answers are sampled, scored and shaped, and their tokens are trained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from flowrl.allocation import Drop
from flowrl.comparison import gated
from flowrl.config import Config
from flowrl.data import load_prompts
from flowrl.engines.base import Awaited, Data, Known, Setting, gathered_samples, reward_bounds
from flowrl.estimation import Estimator
from flowrl.reward_metrics import join_scores
from flowrl.seeds import generator
from flowrl.text.agents import EpisodeRollout
from flowrl.text.answers import Answers, measure
from flowrl.text.credit import CREDITS
from flowrl.text.evaluation import TextEvaluation, TextEvaluator, on_cpu
from flowrl.text.factors import FACTORS
from flowrl.text.lists import measure_lagged
from flowrl.text.metrics import Facts, answer_metrics, metrics_of_samples
from flowrl.text.objectives import TokenObjective, make_objective
from flowrl.text.pairs import PairObjective
from flowrl.text.parts import Part, make_part
from flowrl.text.rollout_base import Rolled
from flowrl.text.rollouts import make_rollout
from flowrl.text.rounds import Drawn, Rounds
from flowrl.text.samples import sampling_tokens
from flowrl.text.shaping import SHAPERS
from flowrl.text.sources import Asked
from flowrl.text.stored_pairs import StoredPairs
from flowrl.text.terms import make_terms
from flowrl.text.value import make_value
from flowrl.text_pairs import TextPairs, load_text_pairs
from flowrl.tracking import replace_file
from flowrl.types import Completions, Prompt, SampleBatch, Scores, UserError
from flowrl.updates.answer_pairs import AnswerPairUpdate
from flowrl.updates.base import Update
from flowrl.updates.tokens import TokenUpdate
from rewards.composite import Pending, WeightedRewards

if TYPE_CHECKING:
    from flowrl.policies.causal_lm import CausalLmPolicy

__all__ = ["AssignedAnswers", "SampledAnswers", "TextEngine"]


@dataclass(frozen=True, slots=True)
class SampledAnswers:
    """Answers of this process's groups; see `flowrl.engines.base.RolledOut`. indices: prompt number of each group. drawn: None = all are fresh."""

    completions: Completions
    prompts: Sequence[Prompt]
    indices: Sequence[int]
    num_sampled: int
    drawn: Drawn | None = None
    rolled: Rolled | None = None

    @property
    def group(self) -> Tensor:
        return self.completions.group if self.drawn is None else self.drawn.samples.group

    @property
    def compared(self) -> Tensor:
        return self.group


@dataclass(frozen=True, slots=True)
class AssignedAnswers:
    """What an iteration trains with; see `flowrl.engines.base.Assigned`.

    Attributes:
        advantages: [B, T] float32. mask: [B, T] bool. factor: [B, T] float32 or None.
        alone: of one reward, whose gradient is only measured: parts of the method learn nothing from it.
    """

    answers: Answers
    advantages: Tensor
    mask: Tensor
    factor: Tensor | None
    sums: dict[str, float]
    alone: bool = False

    @property
    def placeholder(self) -> bool:
        return not bool(self.mask.any())


class TextEngine:
    """See `flowrl.engines.base.Engine`."""

    counted: ClassVar[str] = "answers"

    @staticmethod
    def load_data(config: Config) -> Data:
        pairs = load_text_pairs(config.data.pairs) if config.data.pairs is not None else None
        prompts = load_prompts(config.data.train) if pairs is None else pairs.prompts
        return Data(prompts, {name: load_prompts(path) for name, path in config.data.eval.items()}, pairs)

    @staticmethod
    def needs_reference(config: Config) -> bool:
        shapers = [make_part("shaping", SHAPERS, part.name, part.args) for part in config.shaping]
        objective = make_objective(config)
        of_pairs = isinstance(objective, PairObjective) and "reference" in objective.anchors
        return config.kl.weight > 0 or of_pairs or any("reference" in part.needs for part in (objective, *shapers))

    def __init__(self, setting: Setting) -> None:
        config = setting.config
        if config.likelihood != "token":
            raise UserError(f"likelihood: {config.likelihood} belongs to pictures, and {config.model.path} is a language model; set likelihood: token")
        self.setting, self.config, self.accelerator = setting, config, setting.accelerator
        self.policy = cast("CausalLmPolicy", setting.policy)
        self.prompts, self.splits = setting.data.prompts, setting.data.splits
        self.rewards = setting.rewards
        self.evaluator = self.make_evaluator(config, self.policy, self.splits, setting.eval_rewards, self.accelerator, 1, config.evaluation.seed)
        self.estimator = Estimator(config.advantage, setting.add, reward_bounds(config, self.rewards))
        self.shapers = [make_part("shaping", SHAPERS, part.name, part.args) for part in config.shaping]
        self.credit = make_part("token_credit", CREDITS, config.token_credit.name, config.token_credit.args)
        self.factors = [make_part("tokens.weights", FACTORS, part.name, part.args) for part in config.tokens.weights]
        self.terms = make_terms(config)
        self.policy.check_generation(config.generation)
        pairs: TextPairs | None = setting.data.pairs
        self.stored = None if pairs is None else StoredPairs(pairs, self.policy)
        self.objective = self._objective()
        for prompts in (*(() if self.stored else (self.prompts,)), *self.splits.values()):  # one that does not fit is an error now
            self.policy.encode(prompts, config.generation)
        self.rounds = Rounds(self, self.estimator.bounds)
        self._sampled_before = self.policy.sampled_tokens  # this iteration
        self.value = make_value(config, self.policy.hidden_size, self.accelerator)
        every = (self.prompts, *self.splits.values())
        self.rollout = make_rollout(config, self.policy, self.credit, every, lambda shown, found: self._submit(shown, found).result()["total"])

    def _objective(self) -> TokenObjective:
        objective = make_objective(self.config)
        if isinstance(objective, PairObjective):
            objective.attach(self.policy, self.stored)
        return objective

    @property
    def _parts(self) -> dict[str, Part]:
        parts: dict[str, Part] = {"credit": self.credit, "objective": self.objective}
        parts |= {f"shaping/{i}": part for i, part in enumerate(self.shapers)}
        parts |= {f"factor/{i}": part for i, part in enumerate(self.factors)}
        parts |= {name: part for name, part in (("value", self.value), ("rollout", self.rollout)) if part is not None}
        return parts | {f"term/{term.name}": term for term in self.terms} | self.rounds.parts

    def groups(self, iteration: int) -> list[int]:
        self._sampled_before = self.policy.sampled_tokens
        found = self.rounds.groups(iteration)
        return found if self.rollout is None else self.rollout.groups(found)

    # --- sampling ---

    def roll_out(self, prompts: list[Prompt], indices: list[int], numbers: list[int], iteration: int) -> tuple[SampledAnswers, Sequence[Awaited]]:
        if self.stored is not None:
            completions, scores = self.stored.read(indices)
            return SampledAnswers(completions, prompts, indices, 0), [Known(scores)]
        if not self.rounds.plain:
            drawn = self.rounds.draw(Asked(prompts, indices, numbers, iteration))
            return SampledAnswers(drawn.samples.completions, prompts, indices, drawn.answers, drawn), [Known(dict(drawn.samples.scores))]
        counts = self.rounds.counts(numbers)
        if self.rollout is not None:
            with self.phase():
                rolled = self.rollout(Asked(prompts, indices, numbers, iteration), counts)
            self.rollout.meet(self.gather)
            completions = on_cpu(rolled.completions)
            shown = [prompts[g] for g in completions.group.tolist()] if rolled.shown is None else rolled.shown
            return SampledAnswers(completions, prompts, indices, len(completions), rolled=rolled), [self._submit(shown, completions)]
        generators = [generator(self.config.seed, "tokens", iteration, g) for g in numbers]
        completions = self.sample(prompts, counts, generators)
        return SampledAnswers(completions, prompts, indices, len(completions)), [self.score(prompts, completions)]

    def sample(self, prompts: Sequence[Prompt], counts: Sequence[int], generators: Sequence[torch.Generator]) -> Completions:
        """Answers to prompts by the policy that samples, on the CPU."""
        with self.phase():
            return self.generate(prompts, counts, generators)

    @contextmanager
    def phase(self) -> Iterator[None]:
        """See `flowrl.text.sources.Sampler`, whose methods these are."""
        with self.setting.sampling(), self.policy.in_step():
            yield

    def generate(self, prompts: Sequence[Prompt], counts: Sequence[int], generators: Sequence[torch.Generator], **more: Any) -> Completions:
        return on_cpu(self.policy.generate(self.policy.encode(prompts, self.config.generation), counts, self.config.generation, generators, **more))

    def scored(self, prompts: Sequence[Prompt], completions: Completions, group: Tensor) -> dict[str, Scores]:
        return self.rewards.submit(SampleBatch([prompts[g] for g in group.tolist()], texts=completions.texts, group=group)).result()

    def gather(self, value: Any) -> list[Any]:
        return gather_object([value]) if self.accelerator.num_processes > 1 else [value]

    @property
    def rows_per_forward(self) -> int:
        return self.policy.rows_per_forward

    @property
    def place(self) -> tuple[int, int]:
        return self.accelerator.process_index, self.accelerator.num_processes

    def score(self, prompts: Sequence[Prompt], completions: Completions) -> Pending:
        """Let the rewards look at answers."""
        return self._submit([prompts[g] for g in completions.group.tolist()], completions)

    def _submit(self, shown: Sequence[Prompt], completions: Completions) -> Pending:
        """shown: the prompt of each answer."""
        return self.rewards.submit(SampleBatch(shown, texts=completions.texts, group=completions.group))

    def keep(
        self, iteration: int, rolled_out: SampledAnswers, scores: dict[str, Scores], prompts: Sequence[Prompt], numbers: Sequence[int]
    ) -> tuple[int, list[dict[str, Any]]]:
        c, group = rolled_out.completions, rolled_out.group
        shown, group = [prompts[g] for g in group.tolist()], torch.tensor(numbers)[group]
        every, texts, numbered, joined = gathered_samples(self.accelerator, shown, c.texts, group, scores)
        lines = []
        for i, (prompt, text) in enumerate(zip(every, texts, strict=True)):
            values = {name: s.values[i].item() if bool(s.valid[i]) else None for name, s in joined.items()}
            lines.append({"prompt": prompt.text, "group": int(numbered[i]), "answer": text, "scores": values, "metadata": dict(prompt.metadata)})
        return iteration, lines

    def save_rollout(self, run_dir: Path, kept: tuple[int, list[dict[str, Any]]]) -> None:
        iteration, lines = kept
        folder = run_dir / "rollouts"
        folder.mkdir(exist_ok=True)
        replace_file(folder / f"iteration_{iteration:06d}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())

    # --- credit and updates ---

    def answers(
        self,
        rolled_out: SampledAnswers,
        scores: dict[str, Scores],
        everywhere: dict[str, Scores],
        prompts: tuple[Tensor, Tensor],
        numbers: Sequence[int],
        iteration: int,
    ) -> Answers:
        total, c, drawn = scores["total"], rolled_out.completions, rolled_out.drawn
        answers = Answers(
            config=self.config,
            completions=c,
            prompts=rolled_out.prompts,
            indices=torch.tensor(list(rolled_out.indices), dtype=torch.int64),
            numbers=numbers,
            iteration=iteration,
            scores=scores,
            everywhere=everywhere,
            prompt_key=prompts,
            rewards=total.values.double(),
            valid=total.valid.clone(),
            train=torch.ones(len(c), dtype=torch.bool),
            policy=self.policy,
            add=self.setting.add,
            reward_weights=self.setting.reward_weights,
            gather=self.gather,
            sampling=self.setting.sampling,
        )
        if drawn is not None:
            drawn.into(answers)
        if self.stored is not None:
            answers.extra["sampling_tokens"] = 0
        if rolled_out.rolled is not None:
            answers.extra |= {"sampling_tokens": rolled_out.rolled.sampled, **rolled_out.rolled.extra}
            answers.means |= rolled_out.rolled.means
        answers.extra |= {"value": self.value, "advantage_factor": self.setting.reward_weights.factor, "scored": self.scored}
        return answers

    def assign(
        self,
        rolled_out: SampledAnswers,
        scores: dict[str, Scores],
        everywhere: dict[str, Scores],
        *,
        prompts: tuple[Tensor, Tensor],
        numbers: Sequence[int],
        iteration: int,
    ) -> tuple[AssignedAnswers, dict[str, Any]]:
        answers = self.answers(rolled_out, scores, everywhere, prompts, numbers, iteration)
        self.rounds.observe(answers)
        self._measure(answers)
        assigned = self._assign(answers, self.credit, self.estimator)
        if self.value is not None:
            self.value.learn(answers)
        return assigned, self._metrics(answers, rolled_out.drawn, assigned.mask)

    def _measure(self, answers: Answers) -> None:
        """Evaluate what the parts of the method need, each policy once."""
        parts = [*self.shapers, self.credit, *self.factors, self.objective, *self.terms]
        needs = frozenset[str]().union(*(part.needs for part in parts))
        if self.config.kl.weight > 0 and self.config.kl.place == "reward":
            needs |= {"log_prob", "reference"}
        if self.setting.samples_with_old_policy and not isinstance(self.objective, PairObjective):
            needs |= {"log_prob"}
        measure(answers, sorted(needs))
        if self.config.anchor.weight > 0 and (old := self.setting.old_policy) is not None:
            measure_lagged(answers, old.applied)

    def assign_alone(
        self, rolled_out: SampledAnswers, scores: dict[str, Scores], everywhere: dict[str, Scores], numbers: Sequence[int], iteration: int
    ) -> AssignedAnswers:
        nobody = torch.zeros(0, dtype=torch.int64)
        answers = self.answers(rolled_out, scores, everywhere, (nobody, nobody), numbers, iteration)
        self._measure(answers)
        return replace(self._assign(answers, self.credit, Estimator(self.config.advantage, self.setting.add, self.estimator.bounds)), alone=True)

    def _assign(self, answers: Answers, credit: Any, estimator: Estimator) -> AssignedAnswers:
        self._shape(answers)
        raw = credit(answers, estimator)
        for shaper in self.shapers:
            raw = shaper.advantages(answers, raw)
        clip = self.config.advantage.clip
        clamped = raw.clamp(-clip, clip) * self.setting.reward_weights.factor
        spread = clamped if clamped.dim() == 2 else clamped[:, None].expand(answers.mask.shape)
        mask = answers.mask & (answers.valid & answers.train)[:, None]
        advantages = torch.where(mask, spread, 0.0).float()
        factor: Tensor | None = None
        for part in self.factors:
            found = part(answers, advantages)
            if found.dtype == torch.bool:
                mask = mask & found
            else:
                factor = found.float() if factor is None else factor * found
        counted = mask if clamped.dim() == 2 else mask.any(1)
        sums = {
            "abs_advantage": float(torch.where(counted, clamped.abs(), 0.0).sum()),
            "clamped": float(((raw.abs() > clip) & counted).sum()),
            "all": float(counted.sum()) or 1e-300,
        }
        return AssignedAnswers(answers, advantages, mask, factor, sums)

    def _shape(self, answers: Answers) -> None:
        """Rewards as the shapers and the constraints leave them, and what statistics over the iteration need to know of all processes."""
        for shaper in self.shapers:
            shaper.rewards(answers)
        if self.shapers or self.selective:
            trained = torch.bincount(answers.group[answers.train], minlength=answers.num_groups) > 0
            batch = trained[answers.group] if answers.in_statistics is None else trained[answers.group] & answers.in_statistics
            added = Scores((answers.rewards - answers.scores["total"].values.double()).float(), answers.valid)
            parts = self.gather(({"total": Scores(answers.rewards.float(), answers.valid), "added": added}, batch))
            everywhere = join_scores([scores for scores, _ in parts])
            answers.extra["everywhere"] = everywhere["total"]
            if self.shapers:
                answers.extra["added"] = (added, everywhere["added"])
            if self.selective:
                answers.batch = (batch, torch.cat([part for _, part in parts]))
        own = None if answers.batch is None else answers.batch[0]
        answers.rewards = gated(self.config, {**answers.scores, "total": answers.shaped()}, answers.group, answers.num_groups, own).values

    @property
    def selective(self) -> bool:
        """Whether answers may be compared and not trained, or trained and not the policy's own of the iteration."""
        return not self.rounds.plain or isinstance(self.rounds.allocator, Drop)

    def _metrics(self, answers: Answers, drawn: Drawn | None, mask: Tensor) -> dict[str, Any]:
        """Of all processes. Answers are those of the policy in this iteration, with those that are not trained and without others'."""
        add, all_here = self.setting.add, Facts.of(answers.completions, answers.scores)
        trained = mask.any(1)
        own = [all_here] if drawn is None else [Facts.of(part.completions, part.scores) for part in drawn.own]
        parts = self.gather((own, all_here.only(trained)))
        nothing = parts[0][1].only(torch.zeros(len(parts[0][1].length), dtype=torch.bool))  # an iteration may sample nothing, and train what is kept
        said = Facts.join([nothing, *(part for some, _ in parts for part in some)])
        metrics = answer_metrics(said)
        metrics["answer/trained"] = add(float(trained.sum())) / add(float(len(answers)))
        metrics["tokens/sampled"] = int(add(float(self.policy.sampled_tokens - self._sampled_before)))
        if self.selective:
            metrics |= metrics_of_samples(self.config, self.setting.reward_weights, said, Facts.join([part for _, part in parts]))
            metrics["trained/reward/invalid"] = int(add(float((~answers.scores["total"].valid).sum())))
        metrics |= {name: add(value) / self.accelerator.num_processes for name, value in answers.metrics.items()}
        return metrics | {name: add(total) / add(count) for name, (total, count) in answers.means.items()}

    def update(
        self, rolled_out: SampledAnswers, assigned: AssignedAnswers, prompts: list[Prompt], numbers: list[int], iteration: int
    ) -> tuple[Update | None, dict[str, Any]]:
        answers = assigned.answers
        objective, terms = (self._objective(), []) if assigned.alone else (self.objective, self.terms)
        objective.begin(answers, assigned.advantages)
        if isinstance(objective, PairObjective):
            is_old = self.setting.samples_with_old_policy
            of_pairs = AnswerPairUpdate(self.config, self.policy, answers, objective, self.setting.sampling, is_old=is_old)
            return of_pairs, {name: int(self.setting.add(value)) for name, value in of_pairs.counts.items()}
        update = TokenUpdate(
            self.config,
            self.policy,
            answers,
            objective,
            terms,
            advantages=assigned.advantages,
            mask=assigned.mask,
            factor=assigned.factor,
        )
        if rolled_out.drawn is not None:
            update.know(rolled_out.drawn.samples.old, rolled_out.drawn.samples.known)
        return update, {}

    def finish(self, assigned: AssignedAnswers) -> None:
        self.objective.finish(assigned.answers)
        for term in self.terms:
            term.finish(assigned.answers)

    def minimum_nfe(self, assigned: AssignedAnswers, num_groups: int, iteration: int, idle_rows: int, all_valid: bool) -> int:
        """Tokens: every prompt once for its group, every sampled token but the last of an answer; and whole answers, with their prompts, for each pass."""
        answers, o = assigned.answers, self.config.objective
        prompt = torch.tensor([len(tokens) for tokens in answers.completions.prompt_tokens], dtype=torch.int64)
        whole = prompt[answers.completions.group] + answers.completions.length - 1
        sampled = answers.extra.get("sampling_tokens", sampling_tokens(answers.completions, self.rows_per_forward))
        trained = answers.extra.get("trained_tokens", int(whole[assigned.mask.any(1)].sum()))
        passes = sum(1 for name in ("log_prob", "reference") if name in answers.measured) * int(whole.sum())
        measured = answers.extra.get("measured_tokens", 0)
        later = int(whole[answers.extra["later"]].sum()) if "later" in answers.extra else 0
        idle = 0
        if idle_rows:
            members = answers.extra["first_unit"]
            idle = idle_rows // len(members) * answers.extra.get("first_unit_tokens", int(whole[members].sum()))
        return int(self.setting.add(float(sampled + passes + measured + later + 2 * (o.inner_epochs * trained + idle))))

    # --- evaluation and state ---

    @staticmethod
    def make_evaluator(
        config: Config, policy: Any, splits: Mapping[str, Sequence[Prompt]], rewards: WeightedRewards, accelerator: Accelerator, num_steps: int, seed: int
    ) -> TextEvaluator:
        episodes = None if config.environment is None else EpisodeRollout(config, policy, list(splits.values()))
        greedy = config.evaluation.greedy
        return TextEvaluator(policy, splits, rewards, config.generation, greedy=greedy, seed=seed, accelerator=accelerator, episodes=episodes)

    def evaluate(self, split: str, number: int, guidance_scale: float, keep: int) -> TextEvaluation:
        return self.evaluator(split, number, guidance_scale, keep)

    def state_dict(self) -> dict[str, Any]:
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        return {"estimator": self.estimator.state_dict(), "parts": parts, "rounds": self.rounds.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.estimator.load_state_dict(state["estimator"])
        self.rounds.load_state_dict(state["rounds"])
        for name, part in self._parts.items():
            if name not in state["parts"]:
                raise UserError(f"the checkpoint and the config disagree on whether there is a {name.partition('/')[0]}")
            part.load_state_dict(state["parts"][name])
