"""Branches of trees, and turns of episodes, that are compared with others of their kind: values by hand, special cases, two iterations, a resume."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from language_models import build_language_model
from text_runs import assert_trains, assign_rewards, text_config

from flowrl.config import load_config
from flowrl.core.branches import branch_advantages
from flowrl.trainer import Trainer
from flowrl.types import UserError

TREE = ("method=spo_tree", "rollout={groups_per_iteration: 3, group_size: 4}", "tree={segment: 3, branches: 2, roots: 2}", "tokens.weights=[once]")
ENVIRONMENT = '''
from flowrl.environments.base import Step

class Letters:
    """Rewards each turn with its vowels; it is over after some turns."""

    def reset(self, prompt, seed):
        self.turns = 0
        return ""

    def step(self, action):
        self.turns += 1
        return Step(observation=f"turn {self.turns}", reward=float(sum(letter in "aeiou" for letter in action)), done=False, key=self.turns)

    @property
    def success(self):
        return False

    def copy(self):
        raise NotImplementedError
'''
AGENT = (
    "method=step_grpo",
    "rollout={groups_per_iteration: 3, group_size: 4}",
    "rewards=[episode]",
    "environment={name: 'turns:Letters', max_turns: 3, reply: ' {observation} '}",
    "generation={max_new_tokens: 6, stop: []}",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of which every second token ends a turn, and an environment."""
    monkeypatch.syspath_prepend(str(tmp_path))
    text_config(tmp_path)
    build_language_model(tmp_path / "model", "llama", ends=range(5, 256, 2))
    (tmp_path / "turns.py").write_text(ENVIRONMENT)
    return tmp_path


@pytest.mark.parametrize("settings", [TREE, AGENT], ids=["spo_tree", "step_grpo"])
def test_every_preset_trains_evaluates_nothing_twice_and_resumes(settings: tuple[str, ...], folder: Path) -> None:
    config = text_config(folder, *settings)
    trainer, _ = assert_trains(config, 1)
    state = copy.deepcopy(trainer.state())
    there, _ = trainer.iterate(2)
    resumed = Trainer(config)
    resumed.load_state(state)
    assert resumed.iterate(2)[0] == there
    assert there["nfe/used"] == there["nfe/minimum"]


@pytest.mark.parametrize(("method", "credit"), [("spo_tree", "branches"), ("step_grpo", "turns")])
def test_presets_load_for_the_embedded_model(method: str, credit: str) -> None:
    config = load_config(Path(__file__).parent.parent / "configs" / "tiny_text.yaml", [f"method={method}"])
    assert config.token_credit.name == credit


# --- branches -----------------------------------------------------------------------------------------------------------------------------------


def test_branches_by_hand():
    """Node 0 has the children 1 (leaves 1 and 3, so 2), 2 (leaf 6) and 3 (only leaf 1): mean 3; node 1 has the leaves 1 and 3."""
    rewards = torch.tensor([1.0, 3.0, 6.0, 1.0], dtype=torch.float64)
    ancestors = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 3]])
    found, sharing = branch_advantages(rewards, ancestors, torch.ones(4, dtype=torch.bool), normalize=False)
    assert found.tolist() == [[-1, -1], [-1, 1], [3, 0], [-2, 0]]
    assert sharing.tolist() == [[2, 1], [2, 1], [1, 1], [1, 1]]
    scaled, _ = branch_advantages(rewards, ancestors, torch.ones(4, dtype=torch.bool), eps=0.0)
    std = ((1 + 9 + 4) / 3) ** 0.5
    torch.testing.assert_close(scaled, torch.tensor([[-1 / std, -1], [-1 / std, 1], [3 / std, 0], [-2 / std, 0]], dtype=torch.float64))


def test_a_path_that_ends_early_is_a_child_of_its_last_node():
    """Node 0: child 1 (leaves 2 and 4, so 3), and leaf 1 that goes on alone: mean 2."""
    rewards, ancestors = torch.tensor([2.0, 4.0, 1.0]), torch.tensor([[0, 1], [0, 1], [0, -1]])
    found, sharing = branch_advantages(rewards, ancestors, torch.ones(3, dtype=torch.bool), normalize=False)
    assert found.tolist() == [[1, -1], [1, 1], [-1, 0]] and sharing.tolist() == [[2, 1], [2, 1], [1, 1]]


def test_leaves_without_a_reward_and_equal_siblings_have_no_advantage():
    rewards, ancestors = torch.tensor([2.0, float("nan"), 2.0, 8.0]), torch.tensor([[0, 1], [0, 1], [0, 2], [3, 4]])
    found, sharing = branch_advantages(rewards, ancestors, torch.tensor([True, False, True, True]))
    assert found.nan_to_num(9.0).tolist() == [[0, 0]] * 4 and sharing.tolist() == [[1, 1]] * 4
    assert branch_advantages(rewards[:0], ancestors[:0], torch.zeros(0, dtype=torch.bool))[0].shape == (0, 2)


def test_a_tree_that_forks_at_the_prompt_alone_is_a_group_in_population_form():
    rewards = torch.tensor([0.0, 1.0, 1.0, 5.0], dtype=torch.float64)
    found, _ = branch_advantages(rewards, torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, dtype=torch.bool), eps=0.0)
    torch.testing.assert_close(found[:, 0], (rewards - rewards.mean()) / rewards.std(correction=0))


def test_the_tokens_of_a_segment_have_its_branchs_advantage_and_are_trained_once(folder: Path) -> None:
    trainer = Trainer(text_config(folder, *TREE, "token_credit={name: branches, args: {normalize: false}}"))
    rewards = torch.arange(12.0) ** 1.5
    assigned = assign_rewards(trainer, rewards.tolist())
    c = assigned.answers.completions
    found, sharing = branch_advantages(rewards.double(), c.ancestors, torch.ones(12, dtype=torch.bool), normalize=False)
    shared = 0
    for row in range(12):
        last = int((c.ancestors[row] >= 0).sum()) - 1
        for place in range(int(c.length[row])):
            column = min(place // 3, last)
            assert assigned.advantages[row, place] == pytest.approx(float(found[row, column]), abs=1e-5)
            start = c.tokens[row, : place + 1].tolist()
            same = [other for other in range(12) if torch.equal(c.ancestors[other, : column + 2], c.ancestors[row, : column + 2])]
            assert float(assigned.factor[row, place]) == pytest.approx(1 / float(sharing[row, column]))
            if column < last:
                assert sharing[row, column] == len(same) and all(c.tokens[other, : place + 1].tolist() == start for other in same)
                shared += len(same) > 1
    assert shared  # there are tokens that several answers share
    assert float((c.mask * assigned.factor).sum()) < float(c.mask.sum())


# --- turns --------------------------------------------------------------------------------------------------------------------------------------


def test_a_turn_is_compared_with_the_same_turn_of_the_others(folder: Path) -> None:
    trainer = Trainer(text_config(folder, *AGENT))
    assigned = assign_rewards(trainer, [0.5] * 12)  # rewards of whole episodes are not read
    answers = assigned.answers
    episodes, c = answers.extra["episodes"], answers.completions
    compared = 0
    for row in range(12):
        for turn in range(int(episodes.present[row].sum())):
            rivals = [r for r in range(row // 4 * 4, row // 4 * 4 + 4) if bool(episodes.present[r, turn])]
            values = torch.stack([episodes.step_rewards[r, turn] for r in rivals]).double()
            expected = 0.0 if len(rivals) < 2 else float((episodes.step_rewards[row, turn] - values.mean()) / (values.std() + 1e-6))
            tokens = c.mask[row] & (c.turn[row] == turn)
            assert torch.allclose(assigned.advantages[row, tokens], torch.tensor(expected, dtype=torch.float32), atol=1e-4)
            compared += turn > 0 and expected != 0
    assert compared


def test_with_one_turn_it_is_grpo(folder: Path) -> None:
    one = "environment.max_turns=1"
    steps, plain = (Trainer(text_config(folder, *AGENT, one, *more)) for more in ([], ["token_credit={name: answer}"]))
    for trainer in (steps, plain):
        indices = trainer.engine.groups(1)
        trainer.found, _ = trainer.engine.roll_out([trainer.prompts[i] for i in indices], indices, [0, 1, 2], 1)
    rewards = steps.found.rolled.extra["episodes"].rewards.tolist()
    torch.testing.assert_close(assign_rewards(steps, rewards).advantages, assign_rewards(plain, rewards).advantages)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ((*TREE, "tree=null"), "token_credit: branches is of answers that fork; set tree, or use answer"),
        ((*TREE, "advantage.centre=group"), "advantage: with token_credit: branches, the branches say what a reward is compared with; use centre: none"),
        (("method=grpo", "tokens.weights=[once]"), "tokens.weights: once is of tokens that branches share; set token_credit: {name: branches}"),
        ((*AGENT, "environment=null", "rewards=['letters:Vowels']"), "token_credit: turns is of turns in an environment; set environment, or use answer"),
        ((*AGENT, "advantage.centre=none"), "advantage: with token_credit: turns it is centre: group, and scale: none or group_std"),
    ],
)
def test_what_does_not_go_together_is_one_line(folder: Path, settings: tuple[str, ...], line: str) -> None:
    with pytest.raises(UserError) as error:
        text_config(folder, *settings)
    assert line in str(error.value)
