"""What is logged of text iterations: the policy's own answers of the iteration, all of them; and what it is trained with, where that is something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report import edit, make_run
from text_runs import PROMPTS, text_config

from flowrl import run
from flowrl.checks import check_run
from flowrl.reward_weights import RewardWeights
from flowrl.run_records import load_run
from flowrl.text.metrics import Facts, answer_metrics, metrics_of_samples
from flowrl.trainer import Trainer
from flowrl.types import Completions, Scores

MAIN = ["reward/letters:Even/mean", "reward/total/mean", "reward/total/std", "answer/length", "answer/unfinished"]
PLACES = '''
from flowrl.environments import Step

class Two:
    """One turn; the prompt with the letter f succeeds."""

    def __init__(self):
        self.success = False

    def reset(self, prompt, seed):
        self.words = prompt.text
        return ""

    def step(self, action):
        self.success = "f" in self.words
        return Step("", 0.5, True, 1)

    def copy(self):
        raise NotImplementedError
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metrics")
    text_config(folder)
    rows = [{"prompt": text, "solution": f"it is {number} really"} for number, text in enumerate(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "two_places.py").write_text(PLACES)
    return folder


@pytest.fixture(autouse=True)
def on_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)


class Watched:
    """A run of rewards 0 and 1 whose engine's requests are recorded: what the policy has said, and what was scored."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
        self.trainer = Trainer(text_config(folder, f"data.train={folder / 'prompts.jsonl'}", *overrides, reward="even"))
        self.said: list[Completions] = []
        self.scored: list[Any] = []
        engine = self.trainer.engine
        generate, scored = engine.generate, engine.scored

        def spied_generate(*args: Any, **more: Any) -> Completions:
            self.said.append(generate(*args, **more))
            return self.said[-1]

        def spied_scored(prompts: Any, completions: Completions, group: Any) -> Any:
            self.scored.append((completions, scored(prompts, completions, group)))
            return self.scored[-1][1]

        monkeypatch.setattr(engine, "generate", spied_generate)
        monkeypatch.setattr(engine, "scored", spied_scored)

    def iterate(self, iteration: int = 1) -> dict[str, Any]:
        self.said.clear()
        self.scored.clear()
        return self.trainer.iterate(iteration)[0]

    @property
    def tokens(self) -> int:
        return sum(int(c.mask.sum()) for c in self.said)

    def own(self) -> torch.Tensor:
        """Rewards of all that was said, float64: 1 where the number of letters is even."""
        return torch.tensor([float(len(text) % 2 == 0) for c in self.said for text in c.texts], dtype=torch.float64)


def test_plain_runs_say_everything_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(folder, monkeypatch)
    metrics = watched.iterate()
    assert not [key for key in metrics if key.startswith("trained/")]
    assert metrics["tokens/sampled"] == watched.tokens > 0
    assert metrics["answer/length"] == watched.tokens / 12 and metrics["answer/trained"] == 1


def test_dynamic_sampling_shows_the_groups_that_it_threw_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(folder, monkeypatch, "allocation={name: dynamic, args: {factor: 4, max_rounds: 1}}", "rollout={groups_per_iteration: 2, group_size: 2}")
    metrics = watched.iterate()
    own = watched.own()
    assert torch.equal(own, torch.cat([scores["total"].values.double() for _, scores in watched.scored]))
    assert len(own) == 16  # 8 groups of 2
    assert metrics["reward/total/mean"] == metrics["reward/letters:Even/mean"] == pytest.approx(float(own.mean()))
    assert metrics["reward/total/std"] == pytest.approx(float(own.std(correction=0)))
    assert metrics["trained/reward/total/mean"] == 0.5  # a useful group of 2 has one right answer
    assert metrics["trained/reward/total/std"] == 0.5
    assert metrics["reward/total/mean"] != 0.5
    assert metrics["tokens/sampled"] == watched.tokens
    assert metrics["answer/length"] == watched.tokens / 16 and metrics["trained/answer/length"] <= 8


def test_an_iteration_that_samples_nothing_says_so_and_what_it_trains(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = "rollout={groups_per_iteration: 1, group_size: 4}"
    watched = Watched(folder, monkeypatch, "allocation={name: dynamic, args: {carry: true, factor: 4, max_rounds: 1}}", size)
    watched.iterate(1)
    assert watched.trainer.engine.rounds.stored
    metrics = watched.iterate(2)
    assert watched.said == [] and metrics["tokens/sampled"] == 0
    assert metrics["reward/total/mean"] is None and metrics["answer/length"] is None and metrics["reward/invalid"] == 0
    assert 0 < metrics["trained/reward/total/mean"] < 1 and metrics["trained/answer/length"] > 0
    assert metrics["nfe/used"] == metrics["nfe/minimum"]


def test_dropped_groups_are_shown_and_not_among_the_trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(folder, monkeypatch, "allocation={name: drop}", "rollout={groups_per_iteration: 4, group_size: 2}")
    for iteration in range(1, 4):
        metrics = watched.iterate(iteration)
        own = watched.own().view(4, 2)
        useful = own[:, 0] != own[:, 1]
        assert metrics["reward/total/mean"] == pytest.approx(float(own.mean()))
        assert metrics["groups/trained"] == float(useful.sum())
        assert metrics["answer/trained"] == float(useful.double().mean())
        assert metrics.get("trained/reward/total/mean") == (0.5 if bool(useful.any()) else None)
        if bool(useful.any()) and float(own.mean()) != 0.5:
            return
    raise AssertionError("no iteration told the two apart")


def test_an_experts_answers_are_not_the_policys(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(folder, monkeypatch, "allocation.samples=[expert]")
    metrics = watched.iterate()
    (own, own_scores), (expert, expert_scores) = watched.scored
    assert (len(own), len(expert)) == (12, 3)
    rewards = own_scores["total"].values.double(), expert_scores["total"].values.double()
    assert metrics["reward/total/mean"] == pytest.approx(float(rewards[0].mean()))
    assert metrics["trained/reward/total/mean"] == pytest.approx(float(torch.cat(rewards).mean()))
    assert metrics["answer/length"] == float(own.mask.sum()) / 12 and metrics["tokens/sampled"] == float(own.mask.sum())
    assert metrics["trained/answer/length"] == pytest.approx(float(own.mask.sum() + expert.mask.sum()) / 15)


def test_an_experts_answer_without_a_score_is_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(folder, monkeypatch, "allocation.samples=[expert]", "training.max_invalid_share=1.0")

    def scored(prompts: Any, completions: Completions, group: Any) -> dict[str, Scores]:
        valid = torch.full((len(completions),), len(completions) == 12)  # nothing of the expert's 3
        values = torch.arange(len(valid)).double() / 12
        return {"letters:Even": Scores(values, valid), "total": Scores(values, valid)}

    monkeypatch.setattr(watched.trainer.engine, "scored", scored)
    metrics = watched.iterate()
    assert (metrics["reward/invalid"], metrics["trained/reward/invalid"]) == (0, 3)
    assert [line for kind, line in run._warnings(watched.trainer, metrics) if kind == "invalid"] == [
        "3 samples of iteration 1 could not be scored and were left out"
    ]


def test_an_answer_that_another_one_replaces_was_given_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hints are given where all have failed; helped answers take the place of failed ones, and help is not the policy."""
    watched = Watched(folder, monkeypatch, "allocation.samples=[{name: hints, args: {rule: ghpo, warmup: 0, threshold: 0.5}}]")
    calls = [0]

    def scored(prompts: Any, completions: Completions, group: Any) -> dict[str, Scores]:
        calls[0] += 1
        values = torch.full((len(completions),), 0.25 if calls[0] == 1 else 1.0)
        every = torch.ones(len(values), dtype=torch.bool)
        return {"letters:Even": Scores(values, every), "total": Scores(values, every)}

    monkeypatch.setattr(watched.trainer.engine, "scored", scored)
    metrics = watched.iterate()
    assert calls[0] > 1 and metrics["groups/helped"] == 3
    assert metrics["reward/total/mean"] == 0.25
    assert metrics["trained/reward/total/mean"] > 0.25
    assert metrics["tokens/sampled"] == watched.tokens > int(watched.said[0].mask.sum())
    assert metrics["answer/length"] == float(watched.said[0].mask.sum()) / 12


def test_success_and_turns_are_means_over_the_episodes_of_all_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process with 2 of 8 episodes solved, and one with 3 of 4: 5 of 12 and not the mean of the shares, 1 / 2."""
    trainer = Trainer(text_config(folder, "rewards=[episode]", "environment={name: 'two_places:Two', max_turns: 1}", "generation.max_new_tokens=4"))
    indices = trainer.engine.groups(1)
    rolled_out, pending = trainer.engine.roll_out([trainer.prompts[i] for i in indices], indices, [0, 1, 2], 1)
    share = sum("f" in trainer.prompts[i].text for i in indices) / 3
    assert rolled_out.rolled.means == {"episode/success": (12 * share, 12.0), "episode/turns": (12.0, 12.0)}
    scores = pending[0].result()
    nobody = torch.zeros(12, dtype=torch.int64)
    answers = trainer.engine.answers(rolled_out, scores, scores, (nobody, nobody), [0, 1, 2], 1)
    answers.means, answers.metrics = {"episode/success": (2.0, 8.0)}, {}
    others = {2.0: 3.0, 8.0: 4.0}
    object.__setattr__(trainer.engine.setting, "add", lambda value: value + others.get(value, 0.0))
    assert trainer.engine._metrics(answers, None, answers.completions.mask)["episode/success"] == pytest.approx(5 / 12)
    metrics, _ = Trainer(trainer.config).iterate(1)
    assert metrics["episode/success"] == pytest.approx(share) and metrics["episode/turns"] == 1


def test_the_facts_of_several_processes_by_hand(folder: Path) -> None:
    def facts(values: list[float], length: list[int], finished: list[bool]) -> Facts:
        found = torch.tensor(values)
        score = Scores(found, ~found.isnan(), {"work": 10 * found})
        empty = torch.tensor([count == 0 for count in length], dtype=torch.bool)
        return Facts({"letters:Even": score, "total": score}, torch.tensor(length, dtype=torch.int64), torch.tensor(finished, dtype=torch.bool), empty)

    here, there = facts([1.0, float("nan")], [4, 0], [True, False]), facts([0.0], [2], [True])
    both = Facts.join([here, there])
    assert answer_metrics(both) == {"answer/length": 2.0, "answer/unfinished": pytest.approx(1 / 3), "answer/empty": 1}
    config = text_config(folder, reward="even")
    found = metrics_of_samples(config, RewardWeights(config), both, here.only(torch.tensor([True, False])))
    assert (found["reward/total/mean"], found["reward/total/std"], found["reward/invalid"]) == (0.5, 0.5, 1)
    assert found["reward/letters:Even/work"] == 5.0
    assert {key: value for key, value in found.items() if key.startswith("trained/")} == {
        "trained/reward/letters:Even/mean": 1.0,
        "trained/reward/letters:Even/std": 0.0,
        "trained/reward/total/mean": 1.0,
        "trained/reward/total/std": 0.0,
        "trained/answer/length": 4.0,
        "trained/answer/unfinished": 0.0,
    }
    nothing = here.only(torch.zeros(2, dtype=torch.bool))
    assert answer_metrics(nothing) == {"answer/length": None, "answer/unfinished": None, "answer/empty": 0}


def test_an_iteration_that_sampled_nothing_is_no_fault_in_the_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for tokens, lines in ((0, []), (5, ["Not finite in at least one iteration: reward/total/mean."])):
        edit(run, 4, **{"reward/total/mean": None, "tokens/sampled": tokens})
        assert [text for _, text in check_run(load_run(run)) if text.startswith("Not finite")] == lines
