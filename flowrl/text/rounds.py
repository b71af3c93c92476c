"""The groups of an iteration: rounds of sampling as an allocator asks for them, what is trained of them, and answers that come from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from flowrl.allocation import ALLOCATORS, Budget, Group, Order, Outcomes
from flowrl.seeds import generator
from flowrl.text.exits import Exits
from flowrl.text.hints import Hints
from flowrl.text.inserted import Expert, Replay
from flowrl.text.parts import Part, make_part
from flowrl.text.pieces import Held, Piece, fetched, taken_up, written_down
from flowrl.text.samples import COLUMNS, FRESH, Pick, Samples, picked, sampling_tokens
from flowrl.text.sources import Asked, Sampler, Source
from flowrl.types import UserError

if TYPE_CHECKING:
    from flowrl.text.answers import Answers

__all__ = ["SOURCES", "Drawn", "Rounds"]

SOURCES: dict[str, Callable[..., Source]] = {"expert": Expert, "exits": Exits, "hints": Hints, "replay": Replay}


@dataclass(frozen=True, slots=True)
class Drawn:
    """Answers of this process's groups. answers: so many were sampled for them, here; tokens: the least that a network reads for that; mixed: some may come
    from elsewhere. own: what the policy has said to the prompts in this iteration, here, before groups were dropped and sources had their say.
    """

    samples: Samples
    answers: int
    tokens: int
    metrics: Mapping[str, float]
    mixed: bool
    own: Sequence[Samples]

    def into(self, answers: Answers) -> None:
        """Tell an iteration what these answers are."""
        s = self.samples
        answers.compared, answers.origin, answers.train = s.group, s.column("origin"), s.columns["train"].clone()
        answers.in_statistics = s.columns["compared"] if self.mixed else None
        answers.extra |= {"sampling_tokens": self.tokens, **{name: s.columns[name] for name in s.columns if name not in COLUMNS}}
        answers.metrics |= self.metrics


class Rounds:
    """Which groups an iteration has, and what of them this process samples.

    Args:
        sampler: the engine. bounds: of the total reward.
    Raises:
        UserError: the allocator or a source cannot work with this run.
    """

    def __init__(self, sampler: Sampler, bounds: tuple[float, float]) -> None:
        config, self.sampler = sampler.config, sampler
        r, a = config.rollout, config.allocation
        self.allocator = make_part("allocation", ALLOCATORS, a.name, a.args)
        self.sources = [make_part("allocation.samples", SOURCES, part.name, part.args) for part in a.samples]
        for source in self.sources:
            source.check(sampler)
        self.allocator.begin(Budget(len(sampler.prompts), r.groups_per_iteration, r.group_size, config.seed, *bounds))
        self.stored: list[Piece] = []
        self._chosen: list[Piece] = []
        self._counts: Sequence[int] = ()
        self._tokens = self._answers = 0
        self._own_samples: list[Samples] = []

    @property
    def parts(self) -> dict[str, Part]:
        return {f"samples/{i}": source for i, source in enumerate(self.sources)}

    def groups(self, iteration: int) -> list[int]:
        """Prompt numbers; an allocator that gathers samples the groups now."""
        if not self.allocator.gathers:
            order = self.allocator.ask(iteration, 0, ())
            self._counts = order.counts
            return list(order.prompts)
        self._tokens = self._answers = 0
        self._own_samples = []
        pieces = [piece.aged() for piece in self.stored]
        old, number = len(pieces), 0
        while (order := self.allocator.ask(iteration, number, [piece.facts(iteration) for piece in pieces])).prompts:
            found = self._round(order, iteration, number, len(pieces))
            if order.extends is None:
                pieces += found
            else:
                for place, more in zip(order.extends, found, strict=True):
                    pieces[place] = pieces[place].joined(more)
            number += 1
        facts = [piece.facts(iteration) for piece in pieces]
        choice = self.allocator.choose(iteration, facts, self.sampler.place[1])
        if not choice.train and not choice.idle:
            raise UserError("allocation: no group was sampled; use more groups")
        self.stored = [pieces[n].kept(is_trained=n in choice.train, is_new=facts[n].age == 0) for n in choice.store]
        self._chosen = [pieces[n] for n in choice.train] + [replace(pieces[n], train=False) for n in choice.idle]
        self.allocator.observe(_outcomes(facts[old:]))
        return [piece.prompt for piece in self._chosen]

    def _round(self, order: Order, iteration: int, number: int, first: int) -> list[Piece]:
        """Sample and score this process's share of an order; the groups of all processes, in its order. What is told to the others are rewards."""
        rank, world = self.sampler.place
        mine = list(range(rank, len(order.prompts), world))
        handles = [first + n if order.extends is None else order.extends[n] for n in mine]
        prompts, counts = [self.sampler.prompts[order.prompts[n]] for n in mine], [self._own(order.counts[n]) for n in mine]
        extra = () if order.extends is None else (number,)
        seed = self.sampler.config.seed
        with self.sampler.phase():
            completions = self.sampler.generate(prompts, counts, [generator(seed, "tokens", iteration, handle, *extra) for handle in handles])
        self._tokens, self._answers = self._tokens + sampling_tokens(completions, self.sampler.rows_per_forward), self._answers + len(completions)
        own: dict[int, Samples] = {}
        if mine:
            samples = Samples.of(completions, self.sampler.scored(prompts, completions, completions.group))
            self._own_samples.append(samples)
        for place, n in enumerate(mine):
            rows = torch.nonzero(samples.group == place).squeeze(1).tolist()
            own[n] = picked([samples], [Pick(0, row, 0) for row in rows])
        told = {n: (one.scores["total"].values.double(), one.scores["total"].valid) for n, one in own.items()}
        known = {n: facts for part in self.sampler.gather(told) for n, facts in part.items()}
        return [Piece(prompt, known[n][0], known[n][1], iteration, (Held(n % world, own.get(n)),)) for n, prompt in enumerate(order.prompts)]

    def _own(self, count: int) -> int:
        for source in self.sources:
            count = source.own(count)
        return count

    @property
    def plain(self) -> bool:
        """The policy is asked once, and that is all."""
        return not self.allocator.gathers and not self.sources

    def draw(self, asked: Asked) -> Drawn:
        """The answers of this process's groups."""
        sampler, metrics = self.sampler, dict[str, float]()
        if self.allocator.gathers:
            chosen = [self._chosen[number] for number in asked.numbers]
            groups = fetched(self._chosen, asked.numbers, sampler)
            picks = [Pick(p, row, p) for p, group in enumerate(groups) for row in range(len(group))]
            samples, tokens, answers = picked(groups, picks), self._tokens, self._answers
            trained = torch.tensor([piece.train for piece in chosen])
            self._tokens = self._answers = 0
        else:
            trained = torch.ones(len(asked.prompts), dtype=torch.bool)
            generators = [generator(sampler.config.seed, "tokens", asked.iteration, number) for number in asked.numbers]
            with sampler.phase():
                completions = sampler.generate(asked.prompts, self.counts(asked.numbers), generators)
            samples = Samples.of(completions, sampler.scored(asked.prompts, completions, completions.group))
            tokens, answers = sampling_tokens(completions, sampler.rows_per_forward), len(completions)
            self._own_samples = [samples]
        for source in self.sources:
            added = source(samples, asked, sampler)
            samples, tokens, answers = added.samples, tokens + added.tokens, answers + added.answers
            metrics |= added.metrics
        samples = samples.with_columns(train=samples.columns["train"] & trained[samples.group])
        world = sampler.place[1]
        return Drawn(samples, answers, tokens, {name: value * world for name, value in metrics.items()}, bool(self.sources), self._own_samples)

    def counts(self, numbers: Sequence[int]) -> list[int]:
        """Answers to sample for groups of this process."""
        return [self._own(self._counts[number]) for number in numbers]

    def observe(self, answers: Answers) -> None:
        """Tell the allocator, and leave out groups that it does not train; every process must call it.

        Metrics: ``groups/trained``, and ``groups/singletons``, groups with one reward that can be compared: `advantage.singleton` says what such an answer
        learns where the centre or the scale compares within the group.
        """
        total = answers.scores["total"]
        keeps = self.allocator.keeps(total.values.double(), answers.group, total.valid, answers.num_groups)
        answers.train &= keeps[answers.group]
        compared = total.valid if answers.in_statistics is None else total.valid & answers.in_statistics
        size = torch.bincount(answers.group[compared], minlength=answers.num_groups)
        world = self.sampler.place[1]  # metrics are means over processes
        answers.metrics |= {"groups/trained": world * float(keeps.sum()), "groups/singletons": world * float((size == 1).sum())}
        answers.metrics |= self.allocator.metrics()
        if not self.allocator.gathers:
            own = torch.ones(len(answers), dtype=torch.bool) if answers.origin is None else answers.origin == FRESH
            here = (answers.indices[answers.group][own], total.values[own].double(), total.valid[own])
            prompt, rewards, valid = (torch.cat(column) for column in zip(*answers.gather(here), strict=True))
            self.allocator.observe(Outcomes(prompt, rewards, valid))

    def state_dict(self) -> dict[str, Any]:
        """The same on every process; every one must call it."""
        stored = written_down(self.stored, self.sampler)
        return {"name": self.sampler.config.allocation.name, "allocator": self.allocator.state_dict(), "stored": stored}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: the checkpoint is of another allocator.
        """
        name = self.sampler.config.allocation.name
        if state["name"] != name:
            raise UserError(f"allocation.name: the checkpoint was written with {state['name']}, and the config says {name}; go on with the same")
        self.allocator.load_state_dict(state["allocator"])
        self.stored = taken_up(state["stored"], self.sampler.place)


def _outcomes(groups: Sequence[Group]) -> Outcomes:
    prompt = torch.tensor([group.prompt for group in groups for _ in group.rewards], dtype=torch.int64)
    nothing = torch.zeros(0, dtype=torch.float64)
    rewards = torch.cat([nothing, *(group.rewards for group in groups)])
    return Outcomes(prompt, rewards, torch.cat([nothing.bool(), *(group.valid for group in groups)]))
