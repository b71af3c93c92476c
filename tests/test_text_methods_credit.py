"""Methods of language models whose novelty is what an advantage belongs to: tokens with a value, bundles, steps, branches, segments."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from language_models import build_language_model
from text_runs import assert_trains, assign_rewards, text_config

from flowrl.config import load_config
from flowrl.core.bundles import Blend
from flowrl.text.bundles import RiskCredit, blended
from flowrl.text.credit import CREDITS
from flowrl.text.rollout_base import continuation_tokens
from flowrl.text.steps import step_numbers
from flowrl.text.trees import TreeCredit
from flowrl.trainer import Trainer
from flowrl.types import Decisions, Objective, UserError

SMALL = {
    "ppo": ("objective.updates_per_iteration=2",),
    "vapo": ("value.warmup_iterations=0", "objective.updates_per_iteration=2"),
    "t_ppo": ("partial.window=3", "objective.updates_per_iteration=2"),
    "risk_po": ("token_credit.args.bundle=1",),
    "copo": ("objective.updates_per_iteration=2",),
    "empg": (),
    "tree_po": ("tree={segment: 3, branches: 2, roots: 2}",),
    "spo": ("token_credit.args={interval: 2, threshold: 0.9, continuations: 2}", "objective.updates_per_iteration=2"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def make_trainer(folder: Path, method: str, *overrides: str, reward: str = "vowels") -> Trainer:
    return Trainer(text_config(folder, f"method={method}", *SMALL[method], *overrides, reward=reward))


def roll_out(trainer: Trainer, iteration: int = 1) -> Any:
    """`SampledAnswers` of an iteration."""
    indices = trainer.engine.groups(iteration)
    found, _ = trainer.engine.roll_out([trainer.prompts[i] for i in indices], indices, list(range(len(indices))), iteration)
    return found


@pytest.mark.parametrize("method", list(SMALL))
def test_every_method_trains_evaluates_nothing_twice_and_resumes(method: str, folder: Path) -> None:
    config = text_config(folder, f"method={method}", *SMALL[method])
    trainer, _ = assert_trains(config, 1)
    state = copy.deepcopy(trainer.state())
    there, _ = trainer.iterate(2)
    resumed = Trainer(config)
    resumed.load_state(state)
    again, _ = resumed.iterate(2)
    assert again == there
    assert there["nfe/used"] == there["nfe/minimum"]


def test_presets_load_for_the_embedded_model() -> None:
    for method in SMALL:
        config = load_config(Path(__file__).parent.parent / "configs" / "tiny_text.yaml", [f"method={method}"])
        assert config.likelihood == "token"
        assert config.token_credit.name in CREDITS


# --- values ---


def test_a_value_of_zero_leaves_the_reward(folder: Path) -> None:
    trainer = make_trainer(folder, "ppo", "token_credit.args={lam: 1.0, whitened: false}")
    rewards = [0.5 * i - 2 for i in range(12)]
    assigned = assign_rewards(trainer, rewards)
    mask = assigned.answers.mask
    assert torch.equal(assigned.advantages, torch.where(mask, torch.tensor(rewards)[:, None], 0.0))


def test_advantages_fall_by_lambda_towards_the_beginning(folder: Path) -> None:
    trainer = make_trainer(folder, "ppo", "token_credit.args={lam: 0.5, whitened: false}")
    trainer.engine.value.network[-1].bias.data.fill_(0.25)  # every value is 1/4
    rewards = [0.0, 1.0] * 6
    assigned = assign_rewards(trainer, rewards)
    from_end = assigned.answers.mask.flip(1).cumsum(1).flip(1)  # 1 at the last token
    expected = (torch.tensor(rewards)[:, None] - 0.25) * 0.5 ** (from_end - 1)
    assert torch.allclose(assigned.advantages, torch.where(assigned.answers.mask, expected, 0.0))


def test_the_value_learns_the_rewards_and_not_the_policy(folder: Path) -> None:
    trainer = make_trainer(folder, "ppo", "value={learning_rate: 0.02, updates_per_iteration: 150, clip: 10, hidden: 16}", "token_credit.args={lam: 1.0}")
    before = [p.detach().clone() for p in trainer.parameters]
    rewards = [1.0] * 4 + [0.0] * 4 + [-1.0] * 4
    answers = assign_rewards(trainer, rewards).answers
    values = trainer.engine.value.values(answers.token("hidden"), answers.mask)
    assert torch.allclose(values[answers.mask], torch.tensor(rewards)[:, None].expand_as(values)[answers.mask], atol=0.2)
    assert answers.metrics["value/loss"] < 0.02
    assert answers.metrics["value/explained_variance"] == pytest.approx(0.0, abs=1e-6)  # that of the values before
    assert assign_rewards(trainer, rewards).answers.metrics["value/explained_variance"] > 0.9
    assert all(torch.equal(p, old) for p, old in zip(trainer.parameters, before, strict=True))


def test_the_policy_waits_for_its_value(folder: Path) -> None:
    trainer = make_trainer(folder, "vapo", "value.warmup_iterations=1")
    before = [p.detach().clone() for p in trainer.parameters]
    metrics, _ = trainer.iterate(1)
    assert metrics["updates"] == 0
    assert metrics["value/loss"] > 0
    assert metrics["nfe/used"] == metrics["nfe/minimum"]
    assert all(torch.equal(p, old) for p, old in zip(trainer.parameters, before, strict=True))
    trainer.iterate(2)
    assert any(not torch.equal(p, old) for p, old in zip(trainer.parameters, before, strict=True))


def test_vapo_takes_lambda_from_the_length_and_returns_are_monte_carlo(folder: Path) -> None:
    trainer = make_trainer(folder, "vapo", "token_credit.args={lam: length, alpha: 0.25, value_lam: 1.0, whitened: false}")
    trainer.engine.value.network[-1].bias.data.fill_(0.5)
    rewards = [1.0] * 12
    assigned = assign_rewards(trainer, rewards)
    length = assigned.answers.lengths
    from_end = assigned.answers.mask.flip(1).cumsum(1).flip(1)
    lam = (1 - 1 / (0.25 * length)).clamp(0, 1)[:, None]
    assert int(length.max()) == 8
    assert torch.allclose(assigned.advantages, torch.where(assigned.answers.mask, 0.5 * lam ** (from_end - 1), 0.0))
    assert torch.allclose(assigned.answers.extra["value_targets"].returns, assigned.answers.mask.float())


# --- T-PPO ---


def test_answers_stop_at_the_window_and_go_on(folder: Path) -> None:
    trainer = make_trainer(folder, "t_ppo")
    first, prompts = roll_out(trainer).completions, trainer.engine.groups(2)
    assert prompts == trainer.engine.groups(1)  # nothing was finished
    assert first.length.tolist() == [3] * 12
    assigned = assign_rewards(trainer, [1.0] * 12, iteration=2)
    second = assigned.answers.completions
    assert second.length.tolist() == [6] * 12
    assert torch.equal(second.tokens[:, :3], first.tokens)
    assert torch.equal(second.log_prob[:, :3], first.log_prob)
    assert torch.equal(assigned.mask, torch.tensor([False] * 3 + [True] * 3).expand(12, 6))  # earlier tokens are not trained again
    assert not assigned.answers.extra["value_targets"].mask.any()  # and the value waits for the end
    third = assign_rewards(trainer, [1.0] * 12, iteration=3)
    assert third.answers.completions.length.tolist() == [8] * 12
    assert bool(third.answers.extra["done"].all())  # the longest length ends an answer too
    assert third.answers.extra["value_targets"].mask.all()
    assert max(roll_out(trainer, 4).completions.length.tolist()) == 3


def test_an_unfinished_answer_has_no_reward_yet(folder: Path) -> None:
    trainer = make_trainer(folder, "t_ppo", "token_credit.args={lam: 1.0, whitened: false}")
    assert not assign_rewards(trainer, [1.0] * 12).advantages.any()
    assert not assign_rewards(trainer, [1.0] * 12, iteration=2).advantages.any()
    assert torch.equal(assign_rewards(trainer, [1.0] * 12, iteration=3).advantages, torch.ones(12, 8))


def test_a_window_as_long_as_an_answer_is_ppo(folder: Path) -> None:
    settings = ("objective.clip_high=0.2", "token_credit.args={gamma: 1.0, lam: 0.95}", "objective.updates_per_iteration=1")
    whole = assign_rewards(make_trainer(folder, "t_ppo", *settings, "partial.window=8"), [float(i % 3) for i in range(12)])
    plain = assign_rewards(make_trainer(folder, "ppo", *settings), [float(i % 3) for i in range(12)])
    assert whole.mask.all(0).any()
    assert torch.equal(whole.mask, whole.answers.mask)
    for assigned in (whole, plain):  # their random numbers differ, their answers are all 8 long
        assert torch.allclose(assigned.advantages, plain.advantages, atol=1e-6)


# --- RiskPO and COPO ---


def test_risk_judges_the_papers_of_a_bundle(folder: Path) -> None:
    args = "token_credit.args={bundle: 3, low: 0.0, high: 1.0, mixture: 0.0, quantiles: batch, credit: uniform, normalize: false}"
    trainer = make_trainer(folder, "risk_po", args)
    assigned = assign_rewards(trainer, [0, 1, 0, 1] + [0, 0, 1, 1] + [0, 0, 0, 1])  # papers 0, 1, 1, 3; the best is 3
    assert torch.allclose(assigned.advantages[:, 0], torch.tensor([-3.0, -2, -2, 0] * 3), atol=1e-5)


def test_quantiles_are_followed_once_an_iteration(folder: Path) -> None:
    trainer = make_trainer(folder, "risk_po", "token_credit.args.bundle=3")
    credit = trainer.engine.credit
    assigned = assign_rewards(trainer, [0, 1, 2, 3] + [0.0] * 8)
    assert (credit.quantiles.low, credit.quantiles.high) == pytest.approx((0.6, 2.7))  # levels 0.2 and 0.9 of 0, 1, 2, 3
    credit(assigned.answers, trainer.engine.estimator)
    assert credit.quantiles.low == pytest.approx(0.6)
    assign_rewards(trainer, [0.0] * 12, iteration=2)
    assert (credit.quantiles.low, credit.quantiles.high) == pytest.approx((0.6 + 0.1 * (0.2 - 1), 2.7 + 0.1 * (0.9 - 1)))


def test_bundles_do_not_depend_on_the_number_of_processes() -> None:
    group = torch.arange(4).repeat_interleave(3)
    rewards, valid = torch.tensor([0.0, 1, 0, 1, 1, 0, 0, 0, 1, 1, 0, 1], dtype=torch.float64), torch.ones(12, dtype=torch.bool)
    valid[4] = False

    def answers(numbers: list[int], gather: Any) -> Any:
        mine = torch.isin(group, torch.tensor(numbers))
        own = torch.tensor([numbers.index(g) for g in group[mine].tolist()])
        return SimpleNamespace(
            rewards=rewards[mine], valid=valid[mine], group=own, numbers=numbers, iteration=1, gather=gather, metrics={}, __len__=lambda: int(mine.sum())
        )

    class Here(SimpleNamespace):
        def __len__(self) -> int:
            return len(self.rewards)

    def credit(numbers: list[int], gather: Any) -> torch.Tensor:
        found: torch.Tensor = RiskCredit(bundle=2)(Here(**vars(answers(numbers, gather))), None)  # type: ignore[arg-type]
        return found

    parts: list[Any] = []
    for numbers in ([0, 2], [1, 3]):
        with pytest.raises(StopIteration):
            credit(numbers, lambda part: (parts.append(part), next(iter(())))[0])
    alone = credit([0, 1, 2, 3], lambda part: [part])
    apart = [credit(numbers, lambda part: parts) for numbers in ([0, 2], [1, 3])]
    assert alone.abs().max() > 0
    assert torch.equal(apart[0], alone[(group == 0) | (group == 2)])
    assert torch.equal(apart[1], alone[(group == 1) | (group == 3)])


def test_agreement_compares_the_prompts(folder: Path) -> None:
    trainer = make_trainer(folder, "copo", "token_credit.args={answers: outcome, gamma: 3.0, entropy_centre: 1.0}", "advantage={ddof: 0, eps: 1.0e-12}")
    assigned = assign_rewards(trainer, [0.0] * 4 + [0.5] * 4 + [1.0] * 4)  # every prompt agrees with itself: local is 0, entropy 0
    weight = 1 / (1 + torch.tensor(3.0).exp())
    expected = (1 - weight) * torch.tensor([-(1.5**0.5), 0.0, 1.5**0.5]).repeat_interleave(4)
    assert torch.allclose(assigned.advantages[:, 0], expected, atol=1e-5)


def test_final_answers_are_counted_within_their_group(folder: Path) -> None:
    trainer = make_trainer(folder, "copo")
    texts = ("so 12", "it is 12.0 or 12", "#### 7", "no") * 3
    answers = SimpleNamespace(num_groups=3, group=torch.arange(3).repeat_interleave(4), completions=SimpleNamespace(texts=texts))
    numbers, most = trainer.engine.credit._numbers(answers)
    assert numbers.tolist() == [0, 0, 1, 2] * 3
    assert most == 3


def test_two_losses_are_blended_and_not_their_advantages() -> None:
    """Beyond the clip, the side with a positive advantage stops and the other goes on."""
    local, world, weight = torch.tensor([1.0]), torch.tensor([-2.0]), torch.tensor([0.25])
    log_prob = torch.tensor([[0.5]], requires_grad=True)  # ratio e^0.5, beyond 1.2
    decisions = Decisions(log_prob, torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
    config = SimpleNamespace(advantage=SimpleNamespace(clip=5.0))
    answers = SimpleNamespace(extra={"blend": Blend(local, world, weight)}, config=config)
    batch: Any = SimpleNamespace(answers=answers, decisions=decisions, of=lambda values: values)

    def clipped(d: Decisions) -> Objective:
        ratio = d.log_prob.exp()
        return Objective(-torch.minimum(ratio * d.advantages, ratio.clamp(0.8, 1.2) * d.advantages), {"ratio": ratio.detach()})

    found = blended(batch, clipped)
    ratio = torch.tensor(0.5).exp()
    assert torch.allclose(found.loss, 0.25 * -1.2 + 0.75 * 2 * ratio)
    assert torch.allclose(found.metrics["ratio"], ratio)
    found.loss.sum().backward()
    assert torch.allclose(log_prob.grad, 0.75 * 2 * ratio.reshape(1, 1))  # type: ignore[arg-type]


# --- EMPG ---


def test_steps_end_with_the_line_the_turn_or_so_many_tokens() -> None:
    names = {1: "a", 2: "\n", 3: "b\n\n"}
    completions = SimpleNamespace(tokens=torch.tensor([[1, 2, 1, 3, 1], [2, 1, 1, 9, 9]]), turn=torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 0, 0]]))
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    policy = SimpleNamespace(decode=lambda rows: [names[token] for (token,) in rows])
    answers: Any = SimpleNamespace(mask=mask, completions=completions, policy=policy)
    assert step_numbers(answers, "line").tolist() == [[0, 0, 1, 1, 2], [0, 1, 1, 0, 0]]
    assert step_numbers(answers, "turn").tolist() == [[0, 0, 1, 1, 1], [0, 1, 2, 0, 0]]
    assert step_numbers(answers, 2).tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 0, 0]]


def test_without_a_gate_empg_is_grpo(folder: Path) -> None:
    rewards = [0.0, 1, 2, 3] * 3
    plain = assign_rewards(Trainer(text_config(folder)), rewards)
    gated = assign_rewards(make_trainer(folder, "empg", "token_credit.args={gate: 0, bonus: 0, step: 100}"), rewards)
    assert torch.allclose(gated.advantages, plain.advantages, atol=1e-6)


def test_sure_steps_learn_more(folder: Path) -> None:
    rewards = [0.0, 1, 2, 3] * 3
    assigned = assign_rewards(make_trainer(folder, "empg", "token_credit.args={bonus: 0, step: 4}"), rewards)
    entropy = assigned.answers.token("entropy")[:, :8].view(12, 2, 4).mean(2).double()
    scaled = (entropy - entropy.min()) / (entropy.max() - entropy.min() + 1e-8)
    gate = (-scaled).exp() / (-scaled).exp().mean()
    base = (torch.tensor(rewards, dtype=torch.float64) - 1.5) / (torch.tensor([0.0, 1, 2, 3]).double().std() + 1e-6)
    expected = base[:, None] * gate
    expected = expected - expected.mean()
    assert torch.allclose(assigned.advantages.double(), expected.repeat_interleave(4, 1), atol=1e-5)


# --- trees and segments ---


def test_a_tree_has_a_group_of_leaves_that_share_beginnings(folder: Path) -> None:
    trainer = make_trainer(folder, "tree_po", "rollout.group_size=6")
    c = roll_out(trainer).completions
    assert torch.bincount(c.group).tolist() == [6, 6, 6]
    assert c.ancestors is not None
    assert torch.equal(c.ancestors[:, 0].unique(return_inverse=True)[1], c.group)
    shared = 0
    for depth in range(1, c.ancestors.shape[1]):
        children: dict[int, set[int]] = {}
        for node in c.ancestors[:, depth].unique().tolist():
            rows = torch.nonzero(c.ancestors[:, depth] == node)[:, 0]
            if node < 0:
                continue
            assert len({tuple(c.tokens[row, : 3 * depth].tolist()) for row in rows.tolist()}) == 1
            children.setdefault(int(c.ancestors[rows[0], depth - 1]), set()).add(node)
            shared += len(rows) > 1
        assert all(len(nodes) <= 2 for nodes in children.values())
    assert shared
    out = trainer.policy.token_output(c, torch.arange(len(c)))
    assert torch.allclose(out.log_prob[c.mask], c.log_prob[c.mask], atol=1e-4)


def test_leaves_that_are_missing_are_begun_anew(folder: Path) -> None:
    """With one beginning and answers that end at once, there is nothing to fork."""
    text_config(folder)
    build_language_model(folder / "model", "llama", ends=range(5, 261))
    trainer = make_trainer(folder, "tree_po", "tree={segment: 3, branches: 2, roots: 1}")
    c = roll_out(trainer).completions
    assert torch.bincount(c.group).tolist() == [4, 4, 4]
    metrics, _ = trainer.iterate(1)
    assert metrics["nfe/used"] == metrics["nfe/minimum"]


def test_tree_advantages_average_over_depths(folder: Path) -> None:
    trainer = make_trainer(folder, "tree_po", "tree={segment: 8, branches: 2}", "token_credit.args={whitened: false}")
    assigned = assign_rewards(trainer, [0.0, 1, 2, 3] * 3)
    plain = assigned.advantages[:, 0]
    assert torch.allclose(plain, torch.tensor([-1.5, -0.5, 0.5, 1.5] * 3))  # one segment: every leaf is alone below the prompt
    completions = replace(assigned.answers.completions, ancestors=torch.tensor([[g, 2 * g + (m > 1)] for g in range(3) for m in range(4)]))
    found = TreeCredit(whitened=False)(replace(assigned.answers, completions=completions), trainer.engine.estimator)
    by_half = torch.tensor([-0.5, 0.5, -0.5, 0.5])  # of two leaves each; the prompt's four count twice as much
    assert torch.allclose(found.float(), ((2 * plain[:4] + by_half) / 3).repeat(3))


def test_segments_add_up_to_the_reward_less_the_prompts_value(folder: Path) -> None:
    trainer = make_trainer(folder, "spo")
    rewards = torch.linspace(-1, 1, 12)
    assigned = assign_rewards(trainer, rewards.tolist())
    segment, values = assigned.answers.extra["segments"]
    assert int(segment.max()) > 1
    for row in range(12):
        of_each = [assigned.advantages[row, segment[row] == number][0] for number in segment[row].unique()]
        assert float(sum(of_each)) == pytest.approx(float(rewards[row] - values[row, 0]), abs=1e-5)
    assert torch.equal(values[:, 0].view(3, 4), values[::4, 0:1].expand(3, 4))  # one value of each prompt


def test_an_uncut_answer_is_compared_with_its_prompts_value(folder: Path) -> None:
    trainer = make_trainer(folder, "spo", "token_credit.args={interval: 100, continuations: 3}")
    assigned = assign_rewards(trainer, [1.0] * 12)
    _, values = assigned.answers.extra["segments"]
    assert values.shape == (12, 1)
    assert torch.allclose(assigned.advantages, torch.where(assigned.answers.mask, (1 - values).float(), 0.0))


def test_continuations_begin_with_what_was_cut(folder: Path) -> None:
    trainer = make_trainer(folder, "spo")
    seen: list[Any] = []
    score = trainer.engine.rollout.score
    trainer.engine.rollout.score = lambda shown, found: (seen.append((shown, found)), score(shown, found))[1]
    rolled_out = roll_out(trainer)
    segment, values = rolled_out.rolled.extra["segments"]
    shown, found = seen[0]
    assert len(shown) == len(found) == 2 * sum(int(row.max()) for row in segment) + 2 * 3
    own = score(shown, found).values
    start = segment[0].tolist().index(1)  # the first answer's first cut, after the prompt's own two
    assert torch.equal(found.tokens[2, :start], rolled_out.completions.tokens[0, :start])
    assert float(values[0, 0]) == pytest.approx(float(own[:2].mean()))
    assert float(values[0, 1]) == pytest.approx(float(own[2:4].mean()))


def test_tokens_of_a_call_are_counted_once() -> None:
    prompts = [torch.zeros(5), torch.zeros(7)]
    assert continuation_tokens(prompts, [0, 0], [[], []], [3, 4]) == 5 + 2 + 3
    assert continuation_tokens(prompts, [0, 0, 1], [[1, 2], [1, 2], [1, 2]], [4, 3, 6]) == 5 + 7 + 2 + 2 + 1 + 0 + 3


# --- mistakes ---


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("method=ppo", "value=null"), "token_credit: gae needs values; set value: {}"),
        (("method=ppo", "advantage.centre=group"), "advantage: with token_credit: gae, the values say what a reward is compared with"),
        (("value={}",), "value: token_credit: answer does not read it; use gae, or leave it out"),
        (("token_credit={name: gigpo}",), "token_credit: gigpo is of turns in an environment; set environment, or use answer"),
        (("token_credit={name: tree}", "advantage.scale=none"), "token_credit: tree is of answers that fork; set tree, or use token_returns"),
        (("method=tree_po", "partial={}"), "tree: answers are sampled either so or by partial; leave one out"),
        (("method=tree_po", "allocation.name=dapo"), "allocation: it decides what is sampled, and so does tree; leave one out"),
        (("partial={}",), "partial: an answer that goes on has no reward yet, and token_credit: answer needs one; use gae"),
        (("method=t_ppo", "tokens.weights=[]"), "tokens.weights: with partial, tokens of earlier iterations would be trained again; add fresh"),
        (("method=copo", "advantage.scale=none"), "advantage: with token_credit: consistency it is centre: group, scale: group_std"),
        (("method=copo", "objective.name=bapo"), "token_credit: consistency adds up two losses, which bapo cannot; use clipped_surrogate"),
        (("rewards=[episode]",), "rewards: episode is what an environment gives, and there is none; set environment, or choose another reward"),
        (("method=risk_po", "rollout.groups_per_iteration=4"), "token_credit: risk needs bundles of 5 prompts, and rollout.groups_per_iteration is 4"),
        (("method=ppo", "token_credit.args.lamb=1"), "token_credit: gae has no argument lamb"),
    ],
)
def test_what_does_not_go_together_is_one_line(overrides: tuple[str, ...], line: str, folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        text_config(folder, *overrides, "objective.updates_per_iteration=1")
    assert line in str(caught.value)


@pytest.mark.parametrize("section", ["value={}", "environment={name: guess}", "tree={}", "partial={}"])
def test_pictures_have_none_of_it(section: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("run_dir: r\nrewards: [scene]\n")
    with pytest.raises(UserError, match=f"^{section.partition('=')[0]}: it belongs to language models; with likelihood: transition leave it out$"):
        load_config(tmp_path / "run.yaml", [section])


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("gae", {"gamma": 0}),
        ("gae", {"lam": 2}),
        ("gae", {"lam": "long"}),
        ("gae", {"value_lam": -1}),
        ("gae", {"alpha": 0}),
        ("risk", {"bundle": 0}),
        ("risk", {"low": 0.9, "high": 0.2}),
        ("risk", {"credit": "all"}),
        ("consistency", {"answers": "some"}),
        ("step_gate", {"step": "word"}),
        ("step_gate", {"gate": -1}),
        ("gigpo", {"gamma": 0}),
        ("gigpo", {"episode_over": "turns"}),
        ("igpo", {"form": "last"}),
        ("igpo", {"gamma": 2}),
        ("tree", {"weight": "depth"}),
        ("segments", {"interval": 0}),
        ("segments", {"threshold": 0}),
    ],
)
def test_arguments_out_of_range_are_errors(name: str, args: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        CREDITS[name](**args)
