"""Methods of agents: episodes in an environment, and advantages of their turns."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import build_language_model
from text_runs import assert_trains, assign_rewards, text_config

from flowrl.config import load_config
from flowrl.text.credit import CREDITS
from flowrl.trainer import Trainer
from flowrl.types import Prompt, SampleBatch, UserError
from rewards.episode import EpisodeReward

METHODS = ("agent_flow", "gigpo", "igpo", "salt")
ENVIRONMENT = '''
from flowrl.environments import Step

class Letters:
    """Three turns at most; each gives the share of the prompt's letters in the action, and a turn with an "e" ends the episode."""

    def __init__(self):
        self.success, self.answer = False, "oo"

    def reset(self, prompt, seed):
        self.turn, self.words, self.number = 0, prompt.text, seed % 1000
        return ""

    def step(self, action):
        self.turn += 1
        self.success = "e" in action
        reward = sum(letter in self.words for letter in action) / max(1, len(action))
        return Step(f"no {self.number}", reward, self.turn == 3 or self.success, self.turn)

    def copy(self):
        raise NotImplementedError
'''
AGENT = ("rewards=[episode]", "environment={name: 'agent_places:Letters', max_turns: 3, reply: ' {observation} '}", "generation.max_new_tokens=6")


@pytest.fixture
def agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of which every second token ends a turn, and its environment."""
    monkeypatch.syspath_prepend(str(tmp_path))
    text_config(tmp_path)
    build_language_model(tmp_path / "model", "llama", ends=range(5, 256, 2))
    (tmp_path / "agent_places.py").write_text(ENVIRONMENT)
    return tmp_path


def make_trainer(folder: Path, method: str, *overrides: str) -> Trainer:
    return Trainer(text_config(folder, f"method={method}", *AGENT, *overrides))


def roll_out(trainer: Trainer, iteration: int = 1) -> Any:
    """`SampledAnswers` of an iteration."""
    indices = trainer.engine.groups(iteration)
    found, _ = trainer.engine.roll_out([trainer.prompts[i] for i in indices], indices, list(range(len(indices))), iteration)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_evaluates_nothing_twice_and_resumes(method: str, agents: Path) -> None:
    config = text_config(agents, f"method={method}", *AGENT)
    trainer, _ = assert_trains(config, 1)
    state = copy.deepcopy(trainer.state())
    there, _ = trainer.iterate(2)
    resumed = Trainer(config)
    resumed.load_state(state)
    assert resumed.iterate(2)[0] == there
    assert there["nfe/used"] == there["nfe/minimum"]


def test_presets_load_for_the_embedded_model() -> None:
    for method in METHODS:
        config = load_config(Path(__file__).parent.parent / "configs" / "tiny_text.yaml", [f"method={method}"])
        assert config.environment is not None
        assert config.token_credit.name in CREDITS


def episodes_of(trainer: Trainer) -> Any:
    return roll_out(trainer).rolled.extra["episodes"]


def test_episodes_have_several_turns_and_their_own_reward(agents: Path) -> None:
    trainer = make_trainer(agents, "gigpo")
    rolled_out = roll_out(trainer)
    episodes, c = rolled_out.rolled.extra["episodes"], rolled_out.completions
    assert 1 < episodes.present.sum(1).double().mean() <= 3
    assert [prompt.metadata["episode_reward"] for prompt in rolled_out.rolled.shown] == episodes.rewards.tolist()
    replies = torch.arange(c.tokens.shape[1]) < c.length[:, None]
    assert bool((replies & ~c.mask).any())  # what the environment said
    assert bool((c.log_prob[~c.mask] == 0).all())
    out = trainer.policy.token_output(c, torch.arange(len(c)))
    assert torch.allclose(out.log_prob[c.mask], c.log_prob[c.mask], atol=1e-4)
    metrics, _ = trainer.iterate(1)
    assert metrics["episode/turns"] > 1


def test_episodes_do_not_depend_on_the_other_groups(agents: Path) -> None:
    """A process that has the second group alone samples the same episodes, as far as states and random numbers go."""
    trainer = make_trainer(agents, "gigpo")
    every = roll_out(trainer).completions
    index = trainer.engine.groups(1)[1]
    alone, _ = trainer.engine.roll_out([trainer.prompts[index]], [index], [1], 1)
    mine = [every.tokens[row, : every.length[row]].tolist() for row in range(4, 8)]
    assert [alone.completions.tokens[row, : alone.completions.length[row]].tolist() for row in range(4)] == mine


def test_every_turn_has_its_episodes_advantage(agents: Path) -> None:
    assigned = assign_rewards(make_trainer(agents, "agent_flow"), [0.0, 1.0, 2.0, 3.0] * 3)
    c = assigned.answers.completions
    expected = (torch.tensor([0.0, 1, 2, 3] * 3) - 1.5) / (torch.tensor([0.0, 1, 2, 3]).std() + 1e-6)
    assert int(c.turn.max()) > 0
    assert torch.allclose(assigned.advantages, torch.where(c.mask, expected[:, None], 0.0), atol=1e-6)
    assert torch.equal(assigned.mask, c.mask)  # the environment's words are not trained


def test_gigpo_compares_turns_from_the_same_state(agents: Path) -> None:
    trainer = make_trainer(agents, "gigpo")
    episodes = episodes_of(trainer)
    assigned = assign_rewards(trainer, episodes.rewards.tolist())
    for group in range(3):
        rows = range(4 * group, 4 * group + 4)
        mean = sum(float(episodes.rewards[row]) for row in rows) / 4
        returns: dict[tuple[int, int], float] = {}
        for row in rows:
            later = 0.0
            for turn in reversed(range(int(episodes.present[row].sum()))):
                later = float(episodes.step_rewards[row, turn]) + 0.95 * later
                returns[row, turn] = later
        for (row, turn), value in returns.items():
            rivals = [other for (_, at), other in returns.items() if at == turn]  # the state is the turn's number
            expected = float(episodes.rewards[row]) - mean + (value - sum(rivals) / len(rivals) if len(rivals) > 1 else 0.0)
            c = assigned.answers.completions
            tokens = c.mask[row] & (c.turn[row] == turn)
            assert torch.allclose(assigned.advantages[row, tokens], torch.tensor(expected), atol=1e-5)


def test_shared_turns_get_the_mean_advantage(agents: Path) -> None:
    trainer = make_trainer(agents, "salt")
    episodes = episodes_of(trainer)
    rewards = torch.arange(12.0)
    assigned = assign_rewards(trainer, rewards.tolist())
    own = torch.tensor([0.0, 1, 2, 3] * 3).sub(1.5) / (torch.tensor([0.0, 1, 2, 3]).std() + 1e-6)
    c = assigned.answers.completions
    for row in range(12):
        for turn in range(int(episodes.present[row].sum())):
            history = (episodes.actions[row][: turn + 1], episodes.observations[row][1 : turn + 1])
            same = [
                other
                for other in range(12)
                if other // 4 == row // 4 and (episodes.actions[other][: turn + 1], episodes.observations[other][1 : turn + 1]) == history
            ]
            tokens = c.mask[row] & (c.turn[row] == turn)
            assert torch.allclose(assigned.advantages[row, tokens], own[same].mean(), atol=1e-5)


def test_turns_gain_what_they_add_to_the_right_answer(agents: Path) -> None:
    trainer = make_trainer(agents, "igpo", "token_credit.args={form: first, outcome_weight: 0.0}")
    credit = trainer.engine.credit
    assigned = assign_rewards(trainer, [0.0] * 12)
    episodes, c = assigned.answers.extra["episodes"], assigned.answers.completions
    log_prob, known = credit._answer_log_prob(assigned.answers, episodes)
    assert known.all()
    gold = trainer.policy.tokenizer("oo", add_special_tokens=False)["input_ids"]
    row = int(episodes.present.sum(1).argmax())
    last = int(episodes.present[row].sum()) - 1
    ends = []
    for turn in (0, last):
        context = torch.cat([c.prompt_tokens[int(c.group[row])], c.tokens[row, : int(episodes.turn_start[row, turn])]])
        ids = torch.cat([context, torch.tensor(gold)])[None]
        logits = trainer.policy.network.model(input_ids=ids).logits[0].detach().log_softmax(-1)
        each = [float(logits[len(context) - 1 + place, token]) for place, token in enumerate(gold)]
        assert float(log_prob[row, turn]) == pytest.approx(sum(each) / len(gold), abs=1e-4)
        ends.append(float(torch.tensor(sum(each) / len(gold)).exp()))
    returns = {}
    for i in range(12):
        used = int(episodes.present[i].sum())
        probability = log_prob[i, :used].exp()
        returns[i] = float(probability[-1] - probability[0])  # the gains of all turns
    assert returns[row] == pytest.approx(ends[1] - ends[0], abs=1e-5)
    rivals = torch.tensor([returns[i] for i in range(row // 4 * 4, row // 4 * 4 + 4)])
    expected = (returns[row] - rivals.mean()) / (rivals.std(correction=trainer.config.advantage.ddof) + trainer.config.advantage.eps)
    assert torch.allclose(assigned.advantages[row, 0], expected, atol=1e-3)


def test_evaluation_plays_episodes(agents: Path) -> None:
    trainer = make_trainer(agents, "gigpo")
    first = trainer.engine.evaluate("eval", 4, 1.0, 4)
    assert first.summary(4)["episode"][2] == 4
    assert any(" no " in text for text in first.texts)
    assert torch.equal(trainer.engine.evaluate("eval", 4, 1.0, 4).scores["episode"], first.scores["episode"])


def test_episodes_that_do_not_fit_are_an_error_before_sampling(agents: Path) -> None:
    with pytest.raises(UserError, match=r"^environment\.max_tokens: a prompt of \d+ tokens leaves \d+ of the model's context of 64"):
        make_trainer(agents, "gigpo", "environment.max_tokens=60")


def test_the_reward_of_episodes_needs_episodes() -> None:
    with pytest.raises(UserError, match="reward episode: there are no episodes; set environment, or choose another reward"):
        EpisodeReward().score(SampleBatch([Prompt("one")], texts=("two",)))
