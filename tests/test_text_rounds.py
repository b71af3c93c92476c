"""Groups of an iteration: what processes tell each other of them, what waits for the next one, and what is learnt from whose answers."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_text_methods_objectives import Processes, answers_of
from text_processes import PLACES, sent
from text_runs import PROMPTS, assign_rewards, text_config
from torch import Tensor

from flowrl.config import Config
from flowrl.core.token_weights import low_probability_selection
from flowrl.engines.text import TextEngine
from flowrl.text import lists
from flowrl.text.gated import LpReg
from flowrl.text.lists import WinRate
from flowrl.text.samples import EXPERT, FRESH, HINTED, PAST
from flowrl.text.shapers import HistoryLength
from flowrl.trainer import Trainer
from flowrl.types import Scores

VARIED = "rewards=['round_places:Varied']"
CARRY = (VARIED, "allocation={name: dynamic, args: {carry: true, factor: 3}}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounds")
    rows = [{"prompt": text, "solution": f"it is {number} really"} for number, text in enumerate(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "round_places.py").write_text(PLACES)
    return folder


@pytest.fixture(autouse=True)
def on_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))


def configure(folder: Path, *overrides: str) -> Config:
    return text_config(folder, f"data.train={folder / 'prompts.jsonl'}", *overrides)


def drawn(trainer: Trainer, iteration: int) -> Any:
    """`Drawn` of an iteration."""
    indices = trainer.engine.groups(iteration)
    prompts, numbers = [trainer.prompts[i] for i in indices], list(range(len(indices)))
    return trainer.engine.roll_out(prompts, indices, numbers, iteration)[0].drawn


# --- what is told to other processes ---


def test_the_groups_of_an_allocator_are_told_by_their_rewards(folder: Path) -> None:
    """9 groups of 4 answers: of each the numbers of a reward and a flag, whatever the answers' length."""
    told = []
    for length in (4, 40):
        trainer = Trainer(configure(folder, *CARRY, f"generation={{max_new_tokens: {length}, min_new_tokens: {length}}}"))
        with sent() as said:
            trainer.engine.groups(1)
        (facts,) = map(pickle.loads, said.gathered)
        assert {number: (len(rewards), len(valid)) for number, (rewards, valid) in facts.items()} == dict.fromkeys(range(9), (4, 4))
        told.append(len(said.gathered[0]))
    assert told[0] == told[1]
    with sent() as said:
        state = trainer.engine.state_dict()  # a checkpoint has the answers themselves
    assert len(said.gathered[0]) > 3 * told[0] and len(state["rounds"]["stored"]) == 6


def test_each_process_finds_its_part_of_what_was_stored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(configure(folder, *CARRY))
    trainer.iterate(1)
    state = trainer.engine.rounds.state_dict()
    monkeypatch.setattr(TextEngine, "place", (1, 2))
    trainer.engine.rounds.load_state_dict(state)
    stored = trainer.engine.rounds.stored
    assert [[part.samples is not None for part in piece.parts] for piece in stored] == [[False], [True]] * 3
    for piece, there in zip(stored, state["stored"], strict=True):
        assert piece.rewards.tolist() == there["samples"]["scores"]["total"][0].tolist() and piece.valid.all() and piece.born == 1


# --- whose answers the history learns from ---


def test_what_is_carried_over_is_known_from_what_is_trained_again(folder: Path) -> None:
    carry = Trainer(configure(folder, *CARRY))
    assert "carried" not in drawn(carry, 1).samples.columns
    samples = drawn(carry, 2).samples
    assert samples.column("origin").tolist() == [PAST] * 12 and samples.columns["carried"].tolist() == [1] * 12
    assert drawn(carry, 3).samples.columns["carried"].tolist() == [1] * 12  # had waited for two iterations
    again = Trainer(configure(folder, VARIED, "method=remix", "rollout={groups_per_iteration: 3, group_size: 4}", "allocation.args={share: 0.9, window: 3}"))
    drawn(again, 1)
    samples = drawn(again, 2).samples
    assert PAST in samples.column("origin").tolist() and samples.columns["carried"].tolist() == [0] * 12
    samples = drawn(again, 3).samples
    assert PAST in samples.column("origin").tolist() and samples.columns["carried"].tolist() == [0] * 12


class Answered(SimpleNamespace):
    """Answers of an iteration."""

    def __len__(self) -> int:
        return len(self.lengths)


def right_answers(origin: Sequence[int] | None, lengths: Sequence[int], **extra: Tensor) -> Any:
    """To prompt 0."""
    count = len(lengths)
    one, zero = torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.int64)
    return Answered(
        scores={"total": SimpleNamespace(values=torch.ones(count), valid=one)},
        lengths=torch.tensor(lengths),
        indices=torch.tensor([0]),
        group=zero,
        valid=one,
        rewards=torch.ones(count, dtype=torch.float64),
        origin=None if origin is None else torch.tensor(origin),
        extra=extra,
        gather=lambda value: [value],
    )


def test_the_history_learns_from_the_policys_own_answers_once() -> None:
    shaper = HistoryLength(mode="mean")
    shaper.rewards(right_answers([FRESH, EXPERT, FRESH, HINTED, PAST], [4, 1, 8, 2, 3]))
    assert (shaper.history.shortest.tolist(), shaper.history.total.tolist(), shaper.history.count.tolist()) == ([4.0], [12.0], [2.0])
    late = right_answers([PAST, PAST, FRESH, EXPERT], [3, 2, 6, 1], carried=torch.tensor([1, 0, 0, 0]))
    shaper.rewards(late)
    assert (shaper.history.total.tolist(), shaper.history.count.tolist()) == ([21.0], [4.0])  # 3 and 6 more
    f = [math.cos(math.pi / 2 * n / 6) for n in (3, 2, 6, 1)]  # all are shaped, by the mean before: 6
    assert late.rewards.tolist() == pytest.approx([1 + value for value in f])
    plain = HistoryLength()
    plain.rewards(right_answers(None, [5, 7]))
    assert (plain.history.shortest.tolist(), plain.history.count.tolist()) == ([5.0], [2.0])


@pytest.mark.parametrize("samples", ["[]", "[expert]"])
def test_an_experts_short_solution_is_no_history(folder: Path, samples: str) -> None:
    """Expert answers of two tokens beside answers of eight, all right: the shortest right answer of the policy has eight tokens."""
    (folder / "short.jsonl").write_text("".join(json.dumps({"prompt": text, "solution": "a"}) + "\n" for text in PROMPTS))
    settings = ("rollout={groups_per_iteration: 3, group_size: 2}", "generation={max_new_tokens: 8, min_new_tokens: 8}")
    trainer = Trainer(configure(folder, "method=hapo", f"data.train={folder / 'short.jsonl'}", *settings, f"allocation.samples={samples}"))
    count = 6 if samples == "[]" else 9
    answers = assign_rewards(trainer, [1.0] * count).answers
    assert len(answers) == count and int(answers.lengths.min()) == (8 if samples == "[]" else 2)
    history = trainer.engine.shapers[0].history
    assert {value for value in history.shortest.tolist() if value < math.inf} == {8.0} and history.count.sum() == 6


# --- groups in which nobody is compared ---


@pytest.mark.parametrize("method", ["grpo", "vade", "knapsack_rl", "xrpo"])
def test_groups_with_one_reward_are_counted(folder: Path, method: str) -> None:
    """What an allocator did not make a group of one may become one: only one of its answers could be scored."""
    none = math.nan
    settings = ("rollout={groups_per_iteration: 3, group_size: 4}", "training.max_invalid_share=1")
    trainer = Trainer(configure(folder, VARIED, f"method={method}", *settings))
    indices = trainer.engine.groups(1)
    prompts = [trainer.prompts[i] for i in indices]
    rolled_out, _ = trainer.engine.roll_out(prompts, indices, [0, 1, 2], 1)
    sizes = torch.bincount(rolled_out.group, minlength=3).tolist()
    values = torch.tensor([0.25, *[none] * (sizes[0] - 1), *[none] * sizes[1], *torch.arange(sizes[2]).div(10).tolist()])
    assigned, metrics = trainer.assign(rolled_out, {"total": Scores(values, ~values.isnan())}, prompts, [0, 1, 2], 1)
    assert metrics["groups/singletons"] == 1 and metrics["groups/trained"] == 3
    assert metrics["reward/zero_std_groups"] == 2
    assert not assigned.advantages[0].any() and assigned.advantages[sizes[0] + sizes[1] :].any()


def test_an_answer_beside_an_experts_is_alone(folder: Path) -> None:
    for statistics, alone in (("false", 3), ("true", 0)):
        samples = f"allocation.samples=[{{name: expert, args: {{within: true, statistics: {statistics}}}}}]"
        centre = "advantage={centre: batch, scale: none}"
        trainer = Trainer(configure(folder, VARIED, samples, centre, "rollout={groups_per_iteration: 3, group_size: 2}"))
        indices = trainer.engine.groups(1)
        prompts = [trainer.prompts[i] for i in indices]
        rolled_out, pending = trainer.engine.roll_out(prompts, indices, [0, 1, 2], 1)
        _, metrics = trainer.assign(rolled_out, pending[0].result(), prompts, [0, 1, 2], 1)
        assert metrics["groups/singletons"] == alone


def test_xrpo_with_one_answer_a_prompt_says_so(folder: Path) -> None:
    args = "allocation.args={first: 1, rounds: 2, exploration: 0.0}"
    metrics, _ = Trainer(configure(folder, VARIED, "method=xrpo", args, "rollout={groups_per_iteration: 3, group_size: 2}")).iterate(1)
    assert metrics["groups/singletons"] == 1


# --- Lp-Reg and win rates ---


def test_the_rarest_tokens_are_those_of_all_processes(folder: Path) -> None:
    config = configure(folder, "method=lp_reg", "objective.args.share=0.4")
    generator = torch.Generator().manual_seed(4)
    log_prob, signs = -torch.rand(6, 9, generator=generator), torch.randn(6, 9, generator=generator)
    log_prob[:2] -= 2  # the rarest are the first process's
    mask = torch.rand(6, 9, generator=generator) < 0.8
    whole = answers_of(log_prob, mask=mask)
    LpReg(config).begin(whole, signs)
    above = torch.full_like(log_prob, torch.inf)
    assert torch.equal(whole.extra["rare"], low_probability_selection(log_prob, above, signs, mask, share=0.4))

    def part(rank: int, add: Any) -> Tensor:
        rows = slice(0, 2) if rank == 0 else slice(2, 6)
        answers = answers_of(log_prob[rows], mask=mask[rows], add=add)
        LpReg(config).begin(answers, signs[rows])
        return answers.extra["rare"]

    parts = Processes().run(part)
    assert torch.equal(torch.cat(parts), whole.extra["rare"]) and parts[0].sum() > parts[1].sum() / 2
    least = answers_of(log_prob, mask=mask)
    LpReg(configure(folder, "method=lp_reg", "objective.args.share=0.05")).begin(least, signs)
    assert not least.extra["rare"].any()  # floor(0.05 n) is 1, and one alone is none


def test_an_experts_reward_is_a_win_rate_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compared with the others and they not with it; comparisons are made group by group."""
    answers: Any = SimpleNamespace(
        rewards=torch.tensor([7.0, 5.0, 9.0, 6.0, 3.0, 8.0, 4.0, math.nan], dtype=torch.float64),
        valid=torch.tensor([True] * 7 + [False]),
        group=torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]),
        in_statistics=torch.tensor([True, True, False, True, True, False, False, True]),
    )
    sizes = []

    def seen(scores: Tensor, *, temperature: float) -> Tensor:
        sizes.append(len(scores))
        return compare(scores, temperature=temperature)

    compare = lists.preferences
    monkeypatch.setattr(lists, "preferences", seen)
    WinRate().rewards(answers)
    # group 0: 7 beats 5 and 6, 5 beats none, 6 beats 5, the expert's 9 beats all three; group 1: 3 has no rival, 8 beats it; group 2: nobody to be met
    assert answers.rewards.tolist() == [1.0, 0.0, 1.0, 0.5, 0.5, 1.0, 0.5, 0.0]
    assert sizes == [4, 2, 2]
