"""Shaping of rewards and advantages of answers, and answers that come from elsewhere: experts, hints, replays, exits."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from text_runs import PROMPTS, assert_trains, assign_rewards, text_config

from flowrl.config import Config
from flowrl.core.ratio_levels import multiple_importance_log_ratio
from flowrl.core.replay import ReplayBuffer
from flowrl.text.batch import Batch
from flowrl.text.hints import hint_of, hinted
from flowrl.text.samples import EXPERT, HINTED, PAST, Pick, Samples, picked
from flowrl.text.shapers import sampled_likelihood
from flowrl.trainer import Trainer
from flowrl.types import Decisions, Prompt, Scores, UserError
from flowrl.updates.base import Weights

REWARDS = '''
import torch
from flowrl.types import RewardInfo, Scores
from letters import Vowels

class Later(Vowels):
    """0 in the first call, 1 in the second, and so on: what is asked once more succeeds."""
    calls = 0

    def score(self, batch):
        Later.calls += 1
        values = torch.full((len(batch.texts),), float(Later.calls % 2 == 0))
        return Scores(values, torch.ones(len(values), dtype=torch.bool))
'''
LATER = "rewards=['later:Later']"
EXITS = "allocation.samples=[{name: exits, args: {inducer: '!', until: ''}}]"
POSTERIOR = "rewards=[{name: 'letters:Even', label: outcome}, {name: 'letters:Vowels', label: quality}]"
HINTS = "allocation.samples=[{name: hints, args: {rule: scaf, levels: 3, warmup: 0}}]"
PRESETS: dict[str, list[str]] = {
    "unlikeliness": [],
    "hapo": [],
    "grpo_lambda": [],
    "s_grpo": [EXITS],
    "posterior_grpo": [POSTERIOR],
    "aspo": ["shaping=[{name: position_bonus, args: {marker: e}}]"],
    "tempsamp_r1": [],
    "cgpo": ["shaping=[{name: constraint_gate, args: {kl_max: 10.0, constraints: {'letters:Even': 0.0}}}]"],
    "rl_plus": ["objective.updates_per_iteration=2"],
    "chord": ["objective.updates_per_iteration=2"],
    "scaf_grpo": [HINTS, LATER],
    "ghpo": [LATER],
    "guide_grpo": [LATER, "objective.updates_per_iteration=2"],
    "arpo_gui": [LATER],
    "pf_ppo": [],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shaping")
    rows = [{"prompt": text, "solution": f"it is {number} really", "hints": ["it", "it is", f"it is {number}"]} for number, text in enumerate(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "later.py").write_text(REWARDS)
    return folder


@pytest.fixture(autouse=True)
def rewards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(folder)
    yield
    import sys

    if "later" in sys.modules:
        sys.modules["later"].Later.calls = 0


def configure(folder: Path, method: str, *overrides: str) -> Config:
    group = [] if any(o.startswith("rollout") for o in overrides) else ["rollout={groups_per_iteration: 3, group_size: 4}"]
    return text_config(folder, f"method={method}", f"data.train={folder / 'prompts.jsonl'}", *group, *overrides, reward="even")


def roll(trainer: Trainer, iteration: int = 1) -> Any:
    """`Drawn` of an iteration with sources."""
    indices = trainer.engine.groups(iteration)
    rolled_out, _ = trainer.engine.roll_out([trainer.prompts[i] for i in indices], indices, list(range(len(indices))), iteration)
    return rolled_out


def batch_of(trainer: Trainer, assigned: Any) -> Batch:
    """All answers as one micro-batch of the first update."""
    answers = assigned.answers
    rows = torch.arange(len(answers))
    out = trainer.policy.token_output(answers.completions, rows)
    decisions = Decisions(out.log_prob, out.log_prob.detach(), assigned.advantages, assigned.mask)
    trainer.engine.objective.begin(answers, assigned.advantages)
    return Batch(answers, rows, out, decisions, answers.group, answers.num_groups, True)


# --- runs ---


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_and_goes_on_from_its_state(name: str, folder: Path) -> None:
    trainer, _ = assert_trains(configure(folder, name, *PRESETS[name]))
    resumed = Trainer(trainer.config)
    resumed.load_state(deepcopy(trainer.state()))
    if LATER in PRESETS[name]:  # such a reward depends on how often it was asked
        assert json.dumps(resumed.engine.state_dict(), default=str) == json.dumps(trainer.engine.state_dict(), default=str)
    else:
        assert resumed.iterate(3)[0] == trainer.iterate(3)[0]


# --- shaping by hand ---


def test_of_right_answers_the_least_likely_gains_most(folder: Path) -> None:
    trainer = Trainer(configure(folder, "unlikeliness"))
    assigned = assign_rewards(trainer, [1.0, 1, 1, 0] * 3)
    answers = assigned.answers
    likelihood, advantage = sampled_likelihood(answers), assigned.advantages[:, 0]
    for start in (0, 4, 8):
        right = likelihood[start : start + 3]
        rank = {row: int((likelihood[start : start + 4] < likelihood[start + row]).sum()) for row in range(3)}
        shaped = [1 - 0.25 * rank[row] / 4 for row in range(3)] + [0.0]
        assert answers.rewards[start : start + 4].tolist() == pytest.approx(shaped)
        assert advantage[start : start + 3].argsort().tolist() == right.argsort(descending=True).tolist()


def test_hapo_compares_with_the_shortest_right_answer_so_far(folder: Path) -> None:
    trainer = Trainer(configure(folder, "hapo", "rollout={groups_per_iteration: 4, group_size: 2}"))
    first = assign_rewards(trainer, [1.0, 0.0] * 4)
    assert first.answers.rewards.tolist() == [1.0, 0.0] * 4  # no history
    length = dict(zip(first.answers.indices.tolist(), first.answers.lengths[::2].tolist(), strict=True))
    assert trainer.engine.shapers[0].history.shortest.tolist() == [length[prompt] for prompt in range(4)]
    second = assign_rewards(trainer, [1.0, 0.0] * 4, iteration=2).answers
    for row, (prompt, n) in enumerate(zip(second.indices[second.group].tolist(), second.lengths.tolist(), strict=True)):
        times = n / length[prompt]
        f = math.cos(math.pi / 2 * times) if times < 2 else -1.0
        assert second.rewards[row].item() == pytest.approx(1 + max(f, -0.7) if row % 2 == 0 else min(f, 0.0), abs=1e-9)


def test_grpo_lambda_shortens_the_best_groups_only(folder: Path) -> None:
    trainer = Trainer(configure(folder, "grpo_lambda", "generation.min_new_tokens=8"))  # all answers have 8 tokens
    answers = assign_rewards(trainer, [1.0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 0, 0]).answers
    short = 1 - 0.6 * 0.5  # the mean length is every length
    assert answers.rewards.tolist() == pytest.approx([1.0, 0, 0, 0, short, short, short, 0, 1, 1, 0, 0])  # ceil(0.2 x 3) = 1 group


def test_kimis_length_reward_waits_for_its_warmup(folder: Path) -> None:
    shaping = "shaping=[{name: relative_length, args: {weight: 2.0, warmup: 1}}]"
    trainer = Trainer(configure(folder, "kimi_length", shaping, "generation.max_new_tokens=20"))
    trainer.engine.rounds.allocator.observe = lambda outcomes: None  # rewards here are no rates
    assert assign_rewards(trainer, [1.0, 0, 0, 0] * 3).answers.rewards.tolist() == [1.0, 0, 0, 0] * 3
    answers = assign_rewards(trainer, [1.0, 0, 0, 0] * 3, iteration=2).answers
    for start in (0, 4, 8):
        n = answers.lengths[start : start + 4].double()
        spread = (n.max() - n.min()).item()
        added = torch.zeros(4, dtype=torch.float64) if spread == 0 else 0.5 - (n - n.min()) / spread
        added[1:] = added[1:].clamp_max(0)
        expected = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64) + 2 * added
        assert answers.rewards[start : start + 4].tolist() == pytest.approx(expected.tolist())


def test_quality_counts_only_where_the_outcome_is_right(folder: Path) -> None:
    trainer = Trainer(configure(folder, "posterior_grpo", POSTERIOR))
    rolled_out, prompts = (lambda indices: (indices, [trainer.prompts[i] for i in indices]))(trainer.engine.groups(1))
    sampled, _ = trainer.engine.roll_out(prompts, rolled_out, [0, 1, 2], 1)
    outcome, quality = torch.tensor([1.0, 1, 0, 0] * 3), torch.tensor([0.5, 0.25, 0.75, 0.0] * 3)
    scores = {name: Scores(value, torch.ones(12, dtype=torch.bool)) for name, value in (("outcome", outcome), ("quality", quality), ("total", outcome))}
    assigned, _ = trainer.assign(sampled, scores, prompts, [0, 1, 2], 1)
    assert assigned.answers.rewards.tolist() == pytest.approx([2.5, 2.25, 1.0, 1.0] * 3)


def test_a_reward_that_is_not_there_is_named(folder: Path) -> None:
    trainer = Trainer(configure(folder, "posterior_grpo"))
    with pytest.raises(UserError, match="no reward or column outcome; there are letters:Even"):
        trainer.iterate(1)


def test_calling_early_is_worth_more(folder: Path) -> None:
    trainer = Trainer(configure(folder, "aspo", "shaping=[{name: position_bonus, args: {marker: '!'}}]"))
    plain = assign_rewards(Trainer(configure(folder, "grpo")), [1.0, 1, 1, 0] * 3)
    shaper, advantages = trainer.engine.shapers[0], plain.advantages[:, 0].double()
    answers = plain.answers
    pad = answers.completions.tokens.clone()
    marks = {0: 1, 1: 5}  # answer -> place of the mark; the third right answer of each group has none
    mark = trainer.policy.tokenizer("!", add_special_tokens=False)["input_ids"][0]
    letter = trainer.policy.tokenizer("a", add_special_tokens=False)["input_ids"][0]
    pad[:] = letter
    for row, place in marks.items():
        pad[row, place] = mark
    lengths = torch.full((12,), pad.shape[1])
    texts = tuple(trainer.policy.decode(pad.tolist()))
    answers.completions = replace(answers.completions, tokens=pad, length=lengths, texts=texts, mask=torch.ones_like(answers.mask))
    shaped = shaper.advantages(answers, advantages)
    size, a = pad.shape[1], advantages[0].item()
    bonus = min(2 * 2 / size, 0.7 * a)  # the mean place is 3
    assert shaped.tolist() == pytest.approx([a + bonus, a - bonus, *advantages[2:].tolist()])


def test_novelty_lifts_rare_right_answers_at_most_twice(folder: Path) -> None:
    trainer = Trainer(configure(folder, "grpo", "shaping=[novelty]"))
    assigned = assign_rewards(trainer, [1.0, 1, 0, 0] * 3)
    plain = assign_rewards(Trainer(configure(folder, "grpo")), [1.0, 1, 0, 0] * 3).advantages[:, 0]
    likelihood = sampled_likelihood(assigned.answers).view(3, 4)
    eta = (likelihood - likelihood.mean(1, keepdim=True)).exp().flatten()
    a = plain[0].item()
    expected = [a + min(max(1 - e, 0.0), a) if p > 0 else p for e, p in zip(eta.tolist(), plain.tolist(), strict=True)]
    assert assigned.advantages[:, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert assigned.advantages[:, 0].max() > plain.max()


# --- experts ---


def test_an_experts_answer_is_the_datas_solution_in_the_policys_tokens(folder: Path) -> None:
    trainer = Trainer(configure(folder, "tempsamp_r1"))
    rolled_out = roll(trainer)
    c, origin = rolled_out.completions, rolled_out.drawn.samples.column("origin")
    assert origin.tolist() == [0, 0, 0, EXPERT] * 3  # one of the four
    assert rolled_out.num_sampled == 9
    for place, index in enumerate(rolled_out.indices):
        row = 4 * place + 3
        assert c.texts[row] == trainer.prompts[index].metadata["solution"][: len(c.texts[row])]
        assert not c.finished[row]  # 8 tokens are less than the solution
        assert c.mask[row, : c.length[row]].all()
    longer = roll(Trainer(configure(folder, "tempsamp_r1", "generation.max_new_tokens=24"))).completions
    assert longer.finished[3]
    assert int(longer.tokens[3, longer.length[3] - 1]) in trainer.policy.ends


def test_rewards_are_compressed_above_the_threshold(folder: Path) -> None:
    answers = assign_rewards(Trainer(configure(folder, "tempsamp_r1")), [0.0, 0.8, 0, 1] * 3).answers
    bottom = 0.8 - (math.exp(0.8) - 1) / (math.e - 1)
    assert answers.rewards[:4].tolist() == pytest.approx([bottom, 0.8, bottom, 0.8 + 0.01 * math.log(1.2)])


def test_an_anchored_expert_has_more_than_the_best_advantage(folder: Path) -> None:
    shaping = "shaping=[{name: inserted, args: {kind: anchor, scale: 1.5}}]"
    samples = "allocation.samples=[{name: expert, args: {within: true, statistics: false}}]"
    assigned = assign_rewards(Trainer(configure(folder, "tempsamp_r1", shaping, samples)), [0.0, 1, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0])
    a = assigned.advantages[:, 0]
    std = math.sqrt(1 / 3)  # of 0, 1, 0 with ddof 1
    assert a.tolist() == pytest.approx(
        [-1 / 3 / std, 2 / 3 / std, -1 / 3 / std, 1.0 / std, 0, 0, 0, 0, -1 / 3 / std, -1 / 3 / std, 2 / 3 / std, 1 / std], abs=1e-5
    )


def test_a_downscaled_expert_counts_as_nearly_right(folder: Path) -> None:
    shaping = "shaping=[{name: inserted, args: {kind: downscale, factor: 0.8}}]"
    answers = assign_rewards(Trainer(configure(folder, "tempsamp_r1", shaping)), [0.0, 1, 0, 1] * 3).answers
    assert answers.rewards.tolist() == pytest.approx([0.0, 1, 0, 0.8] * 3)


def test_cgpo_compares_with_the_experts_answer_which_is_not_trained(folder: Path) -> None:
    gate = "shaping=[{name: constraint_gate, args: {kl_max: 10.0}}]"
    assigned = assign_rewards(Trainer(configure(folder, "cgpo", gate)), [0.0, 1, 0, 1, 2] * 3)
    s = [1 / (1 + math.exp(-(r - 2))) for r in (0, 1, 0, 1)]  # the policy is still the reference: no divergence
    assert assigned.answers.rewards.view(3, 5)[0, :4].tolist() == pytest.approx(s)
    assert assigned.mask.any(1).tolist() == [True] * 4 + [False] + [True] * 4 + [False] + [True] * 4 + [False]


def test_rl_plus_judges_an_expert_by_its_own_ratio_and_the_others_statistics(folder: Path) -> None:
    trainer = Trainer(configure(folder, "rl_plus"))
    assigned = assign_rewards(trainer, [0.0, 1, 0, 1, 1] * 3)
    std = math.sqrt(1 / 3)  # of 0, 1, 0, 1 with ddof 1: the expert is not among them
    expert = [4, 9, 14]
    assert assigned.advantages[:5, 0].tolist() == pytest.approx([-0.5 / std, 0.5 / std, -0.5 / std, 0.5 / std, 0.5 / std], abs=1e-5)
    batch = batch_of(trainer, assigned)
    loss = trainer.engine.objective(batch).loss
    log_prob, mask = batch.decisions.log_prob.detach(), assigned.mask
    rho = multiple_importance_log_ratio(log_prob, log_prob).exp()
    wanted = -rho * 0.5 / std * (1 - log_prob.exp()).sqrt()
    for row in expert:
        assert loss[row][mask[row]].tolist() == pytest.approx(wanted[row][mask[row]].tolist(), rel=1e-4)
    assert loss[0][mask[0]].tolist() == pytest.approx([0.5 / std] * int(mask[0].sum()), rel=1e-4)  # the ratio is 1


def test_chord_is_grpo_and_supervised_learning_in_their_shares(folder: Path) -> None:
    """Mean over all answers of the losses = (1 - mu) mean over the own + mu mean over the expert's, mu 0.25 at half of the way from 0.5 to 0."""
    objective = "objective={args: {phi: false, peak: 0.5, decay: 2, valley: 0.0}}"
    trainer = Trainer(configure(folder, "chord", objective))
    assigned = assign_rewards(trainer, [0.0, 1, 0, 1, 1] * 3, iteration=2)
    batch = batch_of(trainer, assigned)
    mask, expert = assigned.mask, torch.arange(15) % 5 == 4

    def mean(loss: torch.Tensor, rows: torch.Tensor) -> float:
        return float((torch.where(mask, loss, 0.0).sum(1) / mask.sum(1))[rows].mean())

    loss = trainer.engine.objective(batch).loss.detach()
    taught, own = mean(-batch.decisions.log_prob.detach(), expert), mean(-assigned.advantages, ~expert)
    assert mean(loss, torch.ones(15, dtype=torch.bool)) == pytest.approx(0.75 * own + 0.25 * taught, rel=1e-5)
    phi = Trainer(configure(folder, "chord", "objective={args: {phi: true, peak: 1.0, decay: 0, valley: 1.0}}"))
    weighed = phi.engine.objective
    weighed.begin(assigned.answers, assigned.advantages)
    p = batch.decisions.log_prob.detach().exp()
    assert mean(weighed(batch).loss.detach(), expert) == pytest.approx(5 * mean(-(p * (1 - p) * p.log()), expert), rel=1e-4)  # 15 answers, 3 experts


# --- hints, replay, exits ---


def test_scaf_puts_the_least_helped_success_in_the_place_of_one_failure(folder: Path) -> None:
    trainer = Trainer(configure(folder, "scaf_grpo", HINTS, LATER))
    rolled_out = roll(trainer)
    s = rolled_out.drawn.samples
    assert s.column("origin").tolist() == [HINTED, 0, 0, 0] * 3
    assert s.scores["total"].values.tolist() == [1.0, 0, 0, 0] * 3
    assert rolled_out.num_sampled == 12 + 3 * 3  # three levels for each group
    for place, index in enumerate(rolled_out.indices):
        helped = hinted(trainer.prompts[index], "it", "{prompt}\n\nHint: {hint}")  # the first of three hints
        own, plain = (s.completions.prompt_tokens[int(s.completions.group[4 * place + row])] for row in (0, 1))
        assert torch.equal(own, trainer.policy.encode([helped])[0])
        assert torch.equal(plain, trainer.policy.encode([trainer.prompts[index]])[0])


def test_scaf_waits_for_its_warmup(folder: Path) -> None:
    rolled_out = roll(Trainer(configure(folder, "scaf_grpo", LATER)))
    assert rolled_out.num_sampled == 12
    assert not rolled_out.drawn.samples.column("origin").any()


def test_ghpo_asks_the_whole_group_again(folder: Path) -> None:
    trainer = Trainer(configure(folder, "ghpo", LATER))
    s = roll(trainer).drawn.samples
    assert s.column("origin").tolist() == [HINTED] * 12
    assert len(s.completions.prompt_tokens) == 3
    assert not s.known.any()  # both policies see the hint


def test_ghpo_climbs_until_something_helps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(configure(folder, "ghpo", "rewards=['later:Later']"))
    trainer.engine.rounds.sources[0].threshold = 1.0  # nothing ever is a success
    rolled_out = roll(trainer)
    assert rolled_out.num_sampled == 12 * 4  # 0.25, 0.5, 0.75
    assert not rolled_out.drawn.samples.column("origin").any()  # the groups stay as they were


def test_guided_answers_are_trained_without_their_hint(folder: Path) -> None:
    trainer = Trainer(configure(folder, "guide_grpo", LATER, "allocation.samples=[{name: hints, args: {rule: guide, tries: 2}}]"))
    rolled_out = roll(trainer)
    s = rolled_out.drawn.samples
    assert s.group.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert s.known.tolist() == ([False] * 4 + [True] * 2) * 3
    assert len(s.completions.prompt_tokens) == 3
    without = trainer.policy.token_output(s.completions, torch.arange(18)).log_prob.detach()
    ratio = torch.where(s.completions.mask, without - s.old, 0.0)[s.known]
    assert ratio.abs().max() > 0.01  # the hint has made a difference
    prompt = hinted(trainer.prompts[rolled_out.indices[0]], hint_of(trainer.prompts[rolled_out.indices[0]], 1.0) or "", "{prompt}\n\nHint: {hint}")
    helped = replace(s.completions, prompt_tokens=tuple(trainer.policy.encode([prompt] * 3)))
    within = trainer.policy.token_output(helped, torch.tensor([4])).log_prob.detach()[0]
    here = s.completions.mask[4]
    assert within[here].tolist() == pytest.approx(s.old[4][here].tolist(), abs=1e-4)  # and they were sampled with it


def test_the_first_update_leaves_the_old_log_probabilities_of_other_policies(folder: Path) -> None:
    """Answers of both kinds in one micro-batch: those without a hint get theirs now, the helped ones keep those that they were sampled with."""
    trainer = Trainer(configure(folder, "guide_grpo", LATER, "allocation.samples=[{name: hints, args: {rule: guide, tries: 2}}]"))
    indices, numbers = trainer.engine.groups(1), [0, 1, 2]
    prompts = [trainer.prompts[i] for i in indices]
    rolled_out, pending = trainer.engine.roll_out(prompts, indices, numbers, 1)
    assigned, _ = trainer.assign(rolled_out, pending[0].result(), prompts, numbers, 1)
    update, _ = trainer.engine.update(rolled_out, assigned, prompts, numbers, 1)
    units = torch.arange(18)
    update.prepare([units])
    update.loss(units, Weights(update.weigh(units, 3)[0], 1.0, 1.0), first=True, idle=False)
    s = rolled_out.drawn.samples
    now = trainer.policy.token_output(s.completions, units).log_prob.detach()
    assert torch.equal(update.old[s.known], s.old[s.known])
    assert update.old[~s.known].flatten().tolist() == pytest.approx(now[~s.known].flatten().tolist(), abs=1e-5)


def test_hints_are_shares_of_what_the_data_knows() -> None:
    listed = Prompt("q", {"hints": ["a", "ab", "abc", "abcd"], "solution": "x y"})
    assert [hint_of(listed, share) for share in (0.25, 0.26, 0.75, 1.0)] == ["a", "ab", "abc", "abcd"]
    told = Prompt("q", {"solution": "one two three four five"})
    assert [hint_of(told, share) for share in (0.2, 0.25, 1.0)] == ["one", "one two", "one two three four five"]
    assert hint_of(Prompt("q", {"hints": [1]}), 1.0) is None
    dialogue = Prompt("q", {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]})
    assert hinted(dialogue, "h", "{prompt} + {hint}").metadata["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "q + h"}]


def test_a_stored_success_takes_a_failed_answers_place(folder: Path) -> None:
    trainer = Trainer(configure(folder, "arpo_gui", LATER, "rollout={groups_per_iteration: 4, group_size: 2}"))
    __import__("later").Later.calls = 1
    first = roll(trainer).drawn.samples  # all are right: nothing is replaced, all are stored
    assert not first.column("origin").any()
    source = trainer.engine.rounds.sources[0]
    assert {task: len(handles) for task, handles in source.buffer.stored.items()} == {str(prompt): 2 for prompt in range(4)}
    second = roll(trainer, 2)
    s = second.drawn.samples
    assert s.column("origin").tolist() == [PAST, 0] * 4
    assert s.scores["total"].values.tolist() == [1.0, 0.0] * 4
    assert s.known.tolist() == [True, False] * 4
    for place, index in enumerate(second.indices):
        stored = [source.stored[handle].completions for handle in source.buffer.stored[str(index)]]
        found = [c for c in stored if c.texts[0] == s.completions.texts[2 * place]]
        assert found
        length = int(found[0].length[0])
        assert s.old[2 * place, :length].tolist() == pytest.approx(found[0].log_prob[0, :length].tolist())


def test_the_buffer_forgets_the_oldest(folder: Path) -> None:
    trainer = Trainer(configure(folder, "arpo_gui", LATER, "allocation.samples=[{name: replay, args: {capacity: 1}}]"))
    __import__("later").Later.calls = 1
    roll(trainer)
    source = trainer.engine.rounds.sources[0]
    assert isinstance(source.buffer, ReplayBuffer)
    assert len(source.stored) == 3  # one of each prompt


def test_exits_leave_the_trace_early_and_are_trained_from_there(folder: Path) -> None:
    trainer = Trainer(configure(folder, "s_grpo", EXITS))
    rolled_out = roll(trainer)
    s = rolled_out.drawn.samples
    c, places = s.completions, s.column("exit").view(3, 4)
    mark = trainer.policy.tokenizer("!", add_special_tokens=False)["input_ids"]
    assert rolled_out.num_sampled == 12
    for group in range(3):
        assert places[group].tolist() == sorted(places[group].tolist())  # early to late, the full trace last
        full = 4 * group + 3
        assert c.mask[full, : c.length[full]].all()
        for row in range(4 * group, full):
            place = int(s.column("exit")[row])
            assert c.tokens[row, :place].tolist() == c.tokens[full, :place].tolist()
            assert c.tokens[row, place : place + 1].tolist() == mark
            assert not c.mask[row, : place + 1].any()
            assert c.mask[row, place + 1 : c.length[row]].all()


def test_the_first_right_exit_is_worth_most(folder: Path) -> None:
    assigned = assign_rewards(Trainer(configure(folder, "s_grpo", EXITS)), [0.0, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0])
    rewards = [[0, 1, 0.5, 0.25], [1, 0, 0, 0.5], [0, 0, 0, 0]]
    assert assigned.answers.rewards.view(3, 4).tolist() == rewards
    last = torch.where(assigned.mask, assigned.advantages, 0.0).sum(1) / assigned.mask.sum(1)
    assert last.tolist() == pytest.approx([value - sum(row) / 4 for row in rewards for value in row])


def test_the_thinking_ends_where_the_text_says(folder: Path) -> None:
    trainer = Trainer(configure(folder, "s_grpo", EXITS))
    source = trainer.engine.rounds.sources[0]
    source.until = "cd"
    said = trainer.policy.tokenizer("abcdef", add_special_tokens=False)["input_ids"]
    assert source._thinking(said, trainer.engine) == 3  # a, b, c: with d the text is complete
    source.until = "x"
    assert source._thinking(said, trainer.engine) == 5


def test_answers_are_drawn_again_by_their_reward(folder: Path) -> None:
    trainer = Trainer(configure(folder, "pf_ppo"))
    assigned = assign_rewards(trainer, [0.0, 1, 0, 1] * 3)
    times = assigned.factor[:, 0]
    assert times.sum() == 12
    assert times[::2].tolist() == [0] * 6  # a reward of 0 is never drawn
    per_token = Trainer(configure(folder, "pf_ppo", "objective.reduction=mean"))
    again = assign_rewards(per_token, [0.0, 1, 0, 1] * 3)
    lengths = again.answers.lengths.double()
    assert float((again.factor[:, 0] * lengths).sum()) == pytest.approx(float(lengths.sum()), rel=1e-5)


def test_a_past_answers_bounds_lie_around_its_ratio(folder: Path) -> None:
    trainer = Trainer(configure(folder, "remix", "kl.weight=0"))
    assigned = assign_rewards(trainer, [0.0, 1, 0, 1] * 3)
    batch = batch_of(trainer, assigned)
    old = batch.decisions.old_log_prob.clone()
    old[:4] -= math.log(2)  # the first group was sampled by a policy with half of the probability
    decisions = replace(batch.decisions, old_log_prob=old, log_prob=batch.decisions.log_prob.detach().requires_grad_())
    objective = trainer.engine.objective(replace(batch, decisions=decisions))
    objective.loss.sum().backward()
    mask = assigned.mask
    assert objective.loss[1][mask[1]].tolist() == pytest.approx((-2 * assigned.advantages[1][mask[1]]).tolist(), rel=1e-4)  # ratio 2 is within 2 +- 0.2
    assert (decisions.log_prob.grad[mask & (assigned.advantages != 0)] != 0).all()


# --- samples ---


def test_picked_answers_keep_their_context_and_their_scores(folder: Path) -> None:
    trainer = Trainer(configure(folder, "tempsamp_r1", "generation.max_new_tokens=12"))
    s = roll(trainer).drawn.samples
    short = picked([s], [Pick(0, 3, 0)])
    both = picked([s, short], [Pick(0, 5, 1), Pick(1, 0, 0), Pick(0, 0, 0), Pick(0, 5, 1)])
    assert both.group.tolist() == [0, 0, 1, 1]
    rows = [3, 0, 5, 5]
    for new, row in enumerate(rows):
        length = int(s.completions.length[row])
        assert both.completions.texts[new] == s.completions.texts[row]
        assert torch.equal(both.completions.tokens[new, :length], s.completions.tokens[row, :length])
        assert not both.completions.mask[new, length:].any()
        context = [one.completions.prompt_tokens[int(one.completions.group[place])] for one, place in ((both, new), (s, row))]
        assert torch.equal(*context)
    assert both.column("origin").tolist() == [EXPERT, 0, 0, 0]
    assert both.scores["total"].values.tolist() == s.scores["total"].values[rows].tolist()
    back = Samples.from_state(deepcopy(both.state_dict()))
    assert json.dumps(back.state_dict(), default=str) == json.dumps(both.state_dict(), default=str)


def test_problems_and_raw_columns_follow_their_answers(folder: Path) -> None:
    s = roll(Trainer(configure(folder, "tempsamp_r1"))).drawn.samples
    valid = torch.ones(12, dtype=torch.bool)
    valid[5] = False
    values = torch.where(valid, torch.arange(12.0), torch.nan)
    marked = replace(s, scores={"total": Scores(values, valid, {"raw": torch.arange(12.0)}, {5: "no number"})})
    other = replace(s, scores={"total": Scores(torch.zeros(12), torch.ones(12, dtype=torch.bool))})
    total = picked([marked, other], [Pick(0, 5, 0), Pick(0, 1, 0), Pick(1, 2, 1)]).scores["total"]
    assert total.valid.tolist() == [False, True, True]
    assert total.problems == {0: "no number"}
    assert total.raw["raw"].tolist()[:2] == [5, 1]
    assert math.isnan(total.raw["raw"][2])


# --- what cannot be ---


@pytest.mark.parametrize(
    ("method", "overrides", "told"),
    [
        ("chord", ["allocation.samples=[]"], "objective.name: chord learns from an expert's answers"),
        ("rl_plus", ["allocation.samples=[]"], "rl_plus_off_policy learns from an expert's answers"),
        ("tempsamp_r1", ["allocation.samples=[]"], "shaping: inserted compares with an expert's answer"),
        ("cgpo", ["allocation.samples=[]"], "shaping: constraint_gate compares with an expert's answer"),
        ("s_grpo", ["shaping=[]"], "exit_decay and the source exits .* belong together"),
        ("s_grpo", ["allocation={name: xrpo}"], "exits make whole groups of equal size"),
        ("grpo", ["allocation={name: past}", "objective={name: reinforce}"], "reinforce does not look at the policy that sampled"),
        ("tempsamp_r1", ["allocation.samples=[{name: expert, args: {within: true}}]", "rollout.group_size=2"], "beside the expert's answer one is left"),
        ("tempsamp_r1", ["shaping=[{name: inserted, args: {kind: anchor}}]"], "set statistics: false"),
        ("chord", ["generation.importance=truncated"], "answers from elsewhere have no log-probabilities of a sampling engine"),
        ("grpo", ["shaping=[novelty]", "token_credit={name: token_returns}"], "novelty changes advantages of whole answers"),
        ("grpo", ["shaping=[position_bonus]"], "give its marker, or an environment"),
        ("hapo", ["reward_weights.kind=gradient"], "history_length remembers what it has seen"),
        ("ghpo", ["allocation.samples=[hints, hints]"], "stands there twice"),
        ("hapo", ["shaping=[{name: history_length, args: {weight: 2.0}}]"], "right answers would not stay above wrong ones"),
        ("hapo", ["shaping=[{name: history_length, args: {mode: median}}]"], "unknown mode median"),
        ("unlikeliness", ["shaping=[{name: rank_unlikely, args: {strength: 2}}]"], "strength must be in"),
        ("grpo_lambda", ["shaping=[{name: length_rank, args: {share: 2}}]"], "share and strength must be in"),
        ("tempsamp_r1", ["shaping=[{name: inserted, args: {kind: lift}}]"], "unknown kind lift"),
        ("ghpo", ["allocation.samples=[{name: hints, args: {rule: nobody}}]"], "unknown rule nobody"),
        ("ghpo", ["allocation.samples=[{name: hints, args: {rule: ghpo, tries: 3}}]"], "replaces whole groups"),
        ("ghpo", ["allocation.samples=[{name: hints, args: {rule: ghpo, levels: 3}}]"], "levels belongs to scaf"),
        ("ghpo", ["allocation.samples=[{name: hints, args: {template: '{hint}'}}]"], "template needs"),
        ("arpo_gui", ["allocation.samples=[{name: replay, args: {capacity: 0}}]"], "capacity must be at least 1"),
        ("pf_ppo", ["tokens.weights=[{name: resampled, args: {kind: worst}}]"], "unknown kind 'worst'"),
    ],
)
def test_values_that_cannot_be_are_one_line(method: str, overrides: list[str], told: str, folder: Path) -> None:
    with pytest.raises(UserError, match=told):
        Trainer(configure(folder, method, *overrides))


@pytest.mark.parametrize(
    ("method", "told"), [("chord", "expert needs a text under `solution` .* prompt 1 "), ("ghpo", "hints needs `hints` or `solution` with every prompt")]
)
def test_prompts_without_a_solution_are_told_before_the_first_iteration(method: str, told: str, folder: Path) -> None:
    with pytest.raises(UserError, match=told):
        Trainer(text_config(folder, f"method={method}", "rollout={groups_per_iteration: 3, group_size: 4}"))


def test_exits_need_room(folder: Path) -> None:
    with pytest.raises(UserError, match="exits have no room in generation.max_new_tokens, 3"):
        Trainer(configure(folder, "s_grpo", "allocation.samples=[{name: exits, args: {inducer: '!!', until: ''}}]", "generation.max_new_tokens=3"))
