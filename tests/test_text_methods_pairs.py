"""Preference methods of language models: stored pairs, pairs from the sampled groups, lists, and what each loss is at the start and in special cases."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from language_models import build_language_model
from text_runs import assert_trains, assign_rewards, text_config
from torch import Tensor
from typer.testing import CliRunner

from flowrl.cli import app
from flowrl.config import Config, load_config
from flowrl.core.list_losses import nash_mp_penalty
from flowrl.pairing import PairCounts
from flowrl.seeds import generator
from flowrl.text.lists import AnchorTerm, WinRate, levels_of
from flowrl.text.pairs import choose_pairs, revised, trained_tokens
from flowrl.text.samples import EXPERT
from flowrl.text.terms import KlTerm
from flowrl.text_pairing import make_text_pairs
from flowrl.text_pairs import load_text_pairs
from flowrl.trainer import Trainer
from flowrl.types import Prompt, Scores, UserError
from flowrl.updates.answer_pairs import AnswerPairUpdate

SMALL: dict[str, tuple[str, ...]] = {
    "dpo": (),
    "cdpo": (),
    "robust_dpo": ("objective.inner_epochs=2",),
    "ipo": (),
    "simpo": (),
    "rpo": (),
    "length_normalised_dpo": (),
    "tgdpo": (),
    "vpo": (),
    "sppo": ("objective.updates_per_iteration=2",),
    "sppo_group": ("objective.updates_per_iteration=2",),
    "dno": ("objective.updates_per_iteration=2",),
    "inpo": ("objective.updates_per_iteration=2",),
    "rebel": ("objective.updates_per_iteration=2",),
    "refuel": ("objective.updates_per_iteration=2", "tree.segment=3", "generation.max_new_tokens=16"),
    "copg": (),
    "copg_group": (),
    "p3o": ("objective.updates_per_iteration=3",),
    "osp": (),
    "self_improving_rpo": ("generation.max_new_tokens=6", "training.rows_per_backward=6", "pairing.revision=or"),
    "nash_mp": (),
    "trpa": ("pairing.levels=[0.3,0.1]", "objective.updates_per_iteration=3"),
    "lipo": (),
    "a_star_po": ("shaping={reference_value: {samples: 2, temperature: 0.5}}",),
}
LIKE_DPO = ("dpo", "cdpo", "robust_dpo", "rpo", "length_normalised_dpo", "tgdpo", "vpo", "osp")
STORED = (
    {"prompt": "one", "chosen": "two", "rejected": "no"},
    {"prompt": "three birds", "chosen": "a", "rejected": "bird"},
    {"prompt": "five", "chosen": "six", "rejected": "sit"},
    {"prompt": "ten", "chosen": "ta", "rejected": "do"},
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, prompts and rewards."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(place))
        text_config(place)
    return place


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def stored(folder: Path, *overrides: str, method: str = "dpo", pairs: Any = STORED) -> Config:
    """A run on stored pairs, 3 in an iteration."""
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return text_config(folder, f"method={method}", *SMALL[method], f"data.pairs={folder / 'pairs.jsonl'}", "rollout.group_size=2", *overrides)


def sampled(folder: Path, method: str, *overrides: str) -> Config:
    return text_config(folder, f"method={method}", *SMALL[method], *overrides)


def begin(config: Config, rewards: list[float] | None = None) -> tuple[Trainer, Any, Any]:
    """(trainer, the first iteration's answers, its update), with these rewards or those of stored pairs."""
    trainer = Trainer(config)
    indices = trainer.engine.groups(1)
    prompts, numbers = [trainer.prompts[i] for i in indices], list(range(len(indices)))
    rolled_out, pending = trainer.engine.roll_out(prompts, indices, numbers, 1)
    scores = pending[0].result()
    if rewards is not None:
        values = torch.tensor(rewards)
        scores = {"total": Scores(values, ~values.isnan())}
    assigned, _ = trainer.assign(rolled_out, scores, prompts, numbers, 1)
    update, _ = trainer.engine.update(rolled_out, assigned, prompts, numbers, 1)
    return trainer, assigned.answers, update


def first_gradient(config: Config, rewards: list[float] | None = None, *, moved: bool = False) -> Tensor:
    """[parameters] of the first update; moved: with weights that are no longer the reference's."""
    trainer, _, update = begin(config, rewards)
    if moved:
        noise = torch.Generator().manual_seed(0)
        for p in trainer.parameters:
            p.data.add_(torch.randn(p.shape, generator=noise), alpha=0.01)
    units = torch.arange(len(update.unit_group))
    update.prepare([units])
    assert trainer.backward(update, units, config.rollout.groups_per_iteration, first=True)
    return torch.cat([p.grad.flatten() for p in trainer.parameters if p.grad is not None])


def assert_proportional(found: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    assert float(expected.norm()) > 0
    assert float((found - factor * expected).norm()) <= 2e-4 * float((factor * expected).norm())


# --- all methods --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(SMALL))
def test_every_method_trains_evaluates_no_token_twice_and_resumes(method: str, folder: Path) -> None:
    config = sampled(folder, method)
    trainer, (first,) = assert_trains(config, 1)
    assert first.get("pair/count", 1) >= 1
    state = copy.deepcopy(trainer.state())
    there, _ = trainer.iterate(2)
    assert there["nfe/used"] == there["nfe/minimum"]
    resumed = Trainer(config)
    resumed.load_state(state)
    assert resumed.iterate(2)[0] == there


def test_every_method_fits_the_embedded_model() -> None:
    for method in SMALL:
        config = load_config(Path(__file__).parent.parent / "configs" / "tiny_text.yaml", [f"method={method}"])
        assert config.likelihood == "token"


@pytest.mark.parametrize("method", ["dpo", "simpo", "vpo", "rebel", "p3o", "self_improving_rpo", "lipo", "copg_group"])
def test_methods_train_on_stored_pairs(method: str, folder: Path) -> None:
    _, (first, second) = assert_trains(stored(folder, method=method))
    assert first["tokens/sampled"] == first["answers"] == 0
    assert first.get("pair/count", 3) == second.get("pair/count", 3) == 3


# --- stored pairs -------------------------------------------------------------------------------------------------------------------------------


def test_stored_pairs_are_groups_of_two_with_an_end_and_are_counted_in_closed_form(folder: Path) -> None:
    config = stored(folder, "rollout.groups_per_iteration=4", "objective.inner_epochs=2")
    trainer, answers, _ = begin(config)
    c = answers.completions
    order = [int(index) for index in answers.indices]
    assert c.texts == tuple(text for i in order for text in (STORED[i]["chosen"], STORED[i]["rejected"]))
    end = trainer.policy.tokenizer.eos_token_id
    assert all(int(c.tokens[i, int(c.length[i]) - 1]) == end and int(c.length[i]) == len(c.texts[i]) + 1 for i in range(8))
    assert answers.rewards.tolist() == [1.0, 0.0] * 4
    # prompt: 3 marks and a token for each letter; an answer its letters (its end is not read): both, by the reference once, in 2 epochs forward and backward
    tokens = sum(2 * (3 + len(pair["prompt"])) + len(pair["chosen"]) + len(pair["rejected"]) for pair in STORED)
    metrics, _ = Trainer(config).iterate(1)
    assert metrics["nfe/used"] == metrics["nfe/minimum"] == 5 * tokens
    assert metrics["nfe/backward"] == 2 * tokens


def test_scores_and_strengths_of_the_data_reach_the_loss(folder: Path) -> None:
    rich = [pair | {"chosen_score": 3.0, "rejected_score": 1.0 + n} for n, pair in enumerate(STORED)]
    config = stored(folder, method="rebel", pairs=rich)
    trainer = Trainer(config)
    metrics, _ = trainer.iterate(1)
    gaps = [2.0 - index for index in trainer.engine.groups(1)]  # of equal log-ratios the loss is the square of the difference of the scores
    assert metrics["reward/total/mean"] == pytest.approx(sum(3.0 - gap / 2 for gap in gaps) / 3)
    _, _, update = begin(stored(folder, "objective.updates_per_iteration=1", method="rebel", pairs=rich))
    weights = SimpleNamespace(decision=torch.ones(3), scale=1.0, unit_scale=1.0)
    assert update.loss(torch.arange(3), weights, first=True, idle=False).item() == pytest.approx(sum(gap**2 for gap in gaps), rel=1e-5)
    even = [pair | {"preference": 0.5} for pair in STORED]
    loss = first_gradient(stored(folder, method="osp", pairs=even))
    assert float(loss.norm()) < 1e-7  # a tie holds h at 0, where it is


def test_the_pairs_of_a_file_train_from_the_command_line(folder: Path) -> None:
    stored(folder)
    told = ["prefer", str(folder / "run.yaml"), "method=dpo", "--pairs", str(folder / "pairs.jsonl"), "training.iterations=1", "evaluation.num_images=2"]
    result = CliRunner().invoke(app, [*told, "evaluation.final_num_images=2"])
    assert result.exit_code == 0, result.output
    (line,) = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_answers_of_a_run_become_pairs_that_can_be_trained(folder: Path) -> None:
    answered = CliRunner().invoke(app, ["pairs", str(folder / "run.yaml"), "method=grpo", "--out", str(folder / "base"), "--groups", "4"])
    assert answered.exit_code == 0, answered.output
    found = load_text_pairs(folder / "base")
    assert 1 <= len(found) <= 4
    assert found.chosen_reward is not None and found.rejected_reward is not None
    assert bool((found.chosen_reward > found.rejected_reward).all())
    vowels = [sum(letter in "aeiou" for letter in text) / len(text) for text in found.chosen]
    assert vowels == pytest.approx(found.chosen_reward.tolist())
    wrong = CliRunner().invoke(app, ["pairs", str(folder / "run.yaml"), "method=grpo", "--out", str(folder / "more"), "--images"])
    assert "--images: a language model makes no pictures; leave it out" in str(wrong.exception or wrong.output)


def test_kept_answers_become_pairs_by_the_score_that_is_asked_for(tmp_path: Path) -> None:
    def line(group: int, answer: str, total: float | None, other: float, **metadata: Any) -> dict[str, Any]:
        return {"prompt": f"p{group}", "group": group, "answer": answer, "scores": {"total": total, "other": other}, "metadata": metadata}

    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "p1"}]
    kept = [line(0, "a", 0.5, 1.0, level=2), line(0, "b", 1.0, 0.0), line(0, "c", 0.0, 3.0), line(0, " ", 2.0, 9.0), line(0, "d", None, 1.0)]
    kept += [line(1, "x", 1.0, 0.0, messages=talk), line(1, "x ", 0.0, 0.0, messages=talk), line(2, "y", 1.0, 0.0, messages=talk)]
    kept += [line(2, "z", 0.25, 0.0, messages=talk)]
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "iteration_000003.jsonl").write_text("".join(json.dumps(one) + "\n" for one in kept))
    assert make_text_pairs(tmp_path, tmp_path / "out") == PairCounts(groups=3, samples=9, invalid=2, without_pair=1, found=2, written=2)
    found = load_text_pairs(tmp_path / "out")
    assert list(zip(found.chosen, found.rejected, strict=True)) == [("b", "c"), ("y", "z")]
    assert found.chosen_reward is not None and found.chosen_reward.tolist() == [1.0, 1.0]
    assert found.prompts[0] == Prompt("p0", {"pair": {"iteration": 3, "group": 0, "reward": "total"}})
    assert found.prompts[1].metadata["messages"] == talk
    make_text_pairs(tmp_path, tmp_path / "by_other", reward="other", margin=1.5, max_pairs=1)
    assert load_text_pairs(tmp_path / "by_other").chosen == ["c"]
    with pytest.raises(UserError, match=r"--reward othr: not among the scores of iteration 3; did you mean other\?"):
        make_text_pairs(tmp_path, tmp_path / "no", reward="othr")
    with pytest.raises(UserError, match="none of the 3 groups has two answers whose total differs by more than 5; lower --margin, or use another --reward"):
        make_text_pairs(tmp_path, tmp_path / "no", margin=5)
    with pytest.raises(UserError, match=r"no saved answers; train it with logging.rollouts_every=1"):
        make_text_pairs(tmp_path / "rollouts", tmp_path / "no")


# --- what a loss is at the start ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LIKE_DPO)
def test_at_the_reference_the_loss_is_ln_2(method: str, folder: Path) -> None:
    extra = ("objective.sft_weight=0",) if method == "rpo" else ()
    pairs = [pair | {"chosen_score": 1, "rejected_score": 0} for pair in STORED]
    metrics, _ = Trainer(stored(folder, *extra, "objective.inner_epochs=1", method=method, pairs=pairs)).iterate(1)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["pair/margin"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("method", "loss"),
    [
        ("ipo", 1 / 0.2**2),  # (0 - 1 / (2 beta))^2, beta 0.1
        ("sppo", 2 * 500.0**2),  # both sides are 1 / (2 beta) from their targets
        ("inpo", 1 / 0.015**2),
        ("self_improving_rpo", 0.5 * 0.25 + 0.5 * 2 * 0.25),
    ],
)
def test_squared_losses_begin_at_the_square_of_their_target(method: str, loss: float, folder: Path) -> None:
    overrides = ["objective.updates_per_iteration=1"] if method != "ipo" else []
    assert Trainer(stored(folder, *overrides, method=method)).iterate(1)[0]["loss"] == pytest.approx(loss, rel=1e-5)


def test_under_lora_the_reference_is_the_model_without_it(folder: Path) -> None:
    trainer, (first, second) = assert_trains(stored(folder, "model={adapter: lora, lora: {rank: 4, alpha: 8.0}}", "optimizer.learning_rate=0.01"))
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert second["loss"] != pytest.approx(math.log(2), abs=1e-4)
    assert trainer.policy.reference_network is None


def test_swapped_pairs_have_the_opposite_gradient_at_the_reference(folder: Path) -> None:
    there = first_gradient(stored(folder))
    back = first_gradient(stored(folder, pairs=[pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in STORED]))
    assert_proportional(back, there, -1.0)


@pytest.mark.parametrize(
    ("method", "overrides", "base", "against", "factor"),
    [
        ("cdpo", (), "dpo", (), 1 - 2 * 0.1),
        ("robust_dpo", (), "dpo", (), 1 / (1 - 2 * 0.1)),
        ("rpo", ("objective.sft_weight=0",), "dpo", ("objective.beta=0.01",), 1.0),
        ("rpo", ("objective.sft_weight=0",), "cdpo", ("objective={beta: 0.01, label_smoothing: 0.0}",), 1.0),
        ("vpo", ("objective.args={alpha: 0}",), "dpo", (), 1.0),
        ("osp", (), "dpo", (), 2 / (1 + math.exp(-1)) - 1),  # q = sigmoid(1 - 0), and q - 1/2 against 1/2
        ("tgdpo", (), "dpo", (), 1.0),  # the guide is the model itself
        ("lipo", (), "dpo", ("objective.beta=0.05",), 1 / math.log(2) - 1 / math.log(3)),  # a list of two
        ("copg", (), "rebel", ("objective={beta: 0.1, updates_per_iteration: 1}",), 0.1**2),
        ("copg_group", (), "copg", (), 1.0),  # k = 2: (R'_1 - R'_2)^2
        (
            "self_improving_rpo",
            ("objective.args={alpha: 1}", "pairing.revision=Improve your answer."),
            "inpo",
            ("objective={beta: 0.1, args: {reference_share: 1}, updates_per_iteration: 1}",),
            0.1**2,
        ),
        ("dpo", ("objective.name=sppo", "objective.beta=0.5"), "dpo", ("objective.beta=0.5",), 8.0),  # -2 (P - 1/2) / beta = 2 against beta / 2
    ],
)
def test_special_cases_hold_in_the_gradient_of_a_run(
    method: str, overrides: tuple[str, ...], base: str, against: tuple[str, ...], factor: float, folder: Path
) -> None:
    pairs = [pair | {"chosen_score": 1, "rejected_score": 0} for pair in STORED]
    found = first_gradient(stored(folder, *overrides, method=method, pairs=pairs))
    assert_proportional(found, first_gradient(stored(folder, *against, method=base, pairs=pairs)), factor)


def test_pessimism_on_stored_pairs_is_a_pull_to_the_chosen_answer(folder: Path) -> None:
    """VPO offline has RPO's gradient with sft_weight = alpha beta, on sums: here all answers have 4 tokens, of which RPO takes the mean."""
    even = [{"prompt": prompt, "chosen": "yes", "rejected": "nah"} for prompt in ("one", "two")]
    run = ("rollout.groups_per_iteration=2",)
    found = first_gradient(stored(folder, *run, "objective={beta: 0.1, args: {alpha: 0.5}}", method="vpo", pairs=even))
    assert_proportional(found, first_gradient(stored(folder, *run, "objective={beta: 0.1, sft_weight: 0.2}", method="rpo", pairs=even)))


def test_of_equal_lengths_the_mean_forms_are_the_sums_with_another_beta(folder: Path) -> None:
    even = [{"prompt": prompt, "chosen": "yes", "rejected": "nah"} for prompt in ("one", "two")]  # 4 tokens each
    run = ("rollout.groups_per_iteration=2",)
    found = first_gradient(stored(folder, *run, "objective.beta=0.4", method="length_normalised_dpo", pairs=even))
    assert_proportional(found, first_gradient(stored(folder, *run, pairs=even)))
    found = first_gradient(stored(folder, *run, method="ipo", pairs=even))  # (h / 4 - 5)^2 = (h - 20)^2 / 16
    against = "objective={beta: 0.025, args: {reference_share: 1}, updates_per_iteration: 1}"
    assert_proportional(found, first_gradient(stored(folder, *run, against, method="inpo", pairs=even)), 1 / 16)


def test_pairs_of_fresh_answers_have_the_policy_gradient_of_two(folder: Path) -> None:
    """P3O is group-mean REINFORCE (whose mean is over twice as many answers), REBEL four times that."""
    rewards, two = [1.0, 0.0, 0.5, 0.75, 0.0, 0.25], ("rollout.group_size=2", "objective.updates_per_iteration=1")
    plain = ("method=grpo", *two, "objective={name: reinforce, reduction: seq_mean_token_sum}", "advantage.scale=none")
    base = first_gradient(text_config(folder, *plain), rewards)
    p3o = first_gradient(text_config(folder, "method=p3o", *two), rewards)
    assert_proportional(p3o, base, 2.0)
    assert_proportional(first_gradient(text_config(folder, "method=p3o", *two, "objective.args={form: joint}"), rewards), p3o)
    assert_proportional(first_gradient(text_config(folder, "method=rebel", *two), rewards), p3o, 4.0)


def test_soft_self_play_of_whole_groups_is_reinforce_on_win_rates(folder: Path) -> None:
    """-2 A / beta grad log_prob, A the win rate less 1/2: 0.5, -0.5 and 0 within groups of two."""
    rewards = [1.0, 0.0, 0.5, 0.5, 0.0, 0.25]
    two = ("rollout.group_size=2", "objective.updates_per_iteration=1")
    found = first_gradient(text_config(folder, "method=sppo_group", *two), rewards)
    signs = [0.5, -0.5, 0.0, 0.0, -0.5, 0.5]
    plain = ("method=grpo", *two, "objective={name: reinforce, reduction: seq_mean_token_sum}", "advantage={centre: none, scale: none}")
    assert_proportional(found, first_gradient(text_config(folder, *plain), signs), 2.0)


def test_the_optimal_value_is_asked_of_the_reference_once(folder: Path) -> None:
    config = sampled(folder, "a_star_po", "rollout.groups_per_iteration=4", "optimizer.learning_rate=0.01", "objective.args.beta=0.5")
    trainer = Trainer(config)
    shaper = trainer.engine.shapers[0]
    spent = [trainer.iterate(iteration)[0]["nfe/forward"] for iteration in (1, 2)]
    assert spent[0] > spent[1]  # 4 prompts, all met in the first iteration
    with trainer.policy.reference():
        for index, prompt in enumerate(trainer.prompts):
            draws = [generator(0, "reference_value", index)]
            completions = trainer.policy.generate(trainer.policy.encode([prompt]), [2], config.generation, draws)
            first, second = ((sum(letter in "aeiou" for letter in text) / max(1, len(text))) for text in completions.texts)
            # temperature log mean exp(R / temperature)
            assert shaper.values[index] == pytest.approx(0.5 * math.log((math.exp(2 * first) + math.exp(2 * second)) / 2), abs=1e-6)
    one = [0.5] * 12  # at the reference u = 0: the gradient is -2 beta (R - V) grad log_prob
    found = first_gradient(sampled(folder, "a_star_po", "objective.args.beta=0.5"), one)
    _, answers, _ = begin(sampled(folder, "a_star_po", "objective.args.beta=0.5"), one)
    plain = ("method=grpo", "objective={name: reinforce, reduction: seq_mean_token_sum, updates_per_iteration: 1}", "advantage={centre: none, scale: none}")
    assert_proportional(found, first_gradient(text_config(folder, *plain), answers.rewards.tolist()), 1.0)


# --- pairs of sampled groups --------------------------------------------------------------------------------------------------------------------


def chosen_in(folder: Path, rewards: list[float], *overrides: str) -> list[list[int]]:
    _, answers, _ = begin(sampled(folder, "dpo", "training.max_invalid_share=1", *overrides), rewards)
    found: list[list[int]] = answers.extra["pairs"].tolist()
    return found


def test_rules_choose_pairs_within_groups(folder: Path) -> None:
    rewards = [0.2, 0.9, 0.1, 0.5, math.nan, 1.0, 1.0, 1.0, 0.0, 0.3, 0.35, 0.3]  # of the second group all that score tie
    assert chosen_in(folder, rewards) == [[1, 2], [10, 8]]
    threshold = chosen_in(folder, rewards, "pairing={rule: threshold, threshold: 0.34}")
    assert threshold == [[1, 0], [1, 2], [1, 3], [3, 2], [10, 8]]
    levels = chosen_in(folder, rewards, "pairing={rule: levels, levels: [0.9, 0.3]}")  # levels 3 1 3 2, 1 1 1, 3 2 2 2
    assert levels == [[1, 0], [1, 2], [1, 3], [3, 0], [3, 2], [9, 8], [10, 8], [11, 8]]
    assert len(chosen_in(folder, rewards, "pairing={rule: all, cap: 2}")) == 4


def test_equal_and_empty_answers_are_no_pair_and_an_expert_never_loses(folder: Path) -> None:
    trainer = Trainer(sampled(folder, "dpo"))
    answers = assign_rewards(trainer, [0.0, 0.1, 0.2, 0.3] * 3).answers
    c = answers.completions
    assert choose_pairs(answers, None).tolist() == [[3, 0], [7, 4], [11, 8]]
    c.tokens[3], c.mask[3], c.length[3] = c.tokens[0], c.mask[0], c.length[0]
    c.mask[4] = False
    answers.origin = torch.zeros(12, dtype=torch.int64)
    answers.origin[8] = EXPERT
    assert choose_pairs(answers, None).tolist() == [[3, 1], [7, 5], [11, 9]]
    answers.train[7] = False
    assert choose_pairs(answers, None).tolist() == [[3, 1], [6, 5], [11, 9]]


def test_draws_do_not_depend_on_the_process_that_has_a_group(folder: Path) -> None:
    trainer = Trainer(sampled(folder, "dpo", "pairing.rule=random"))
    answers = assign_rewards(trainer, [0.0, 0.1, 0.2, 0.3] * 3).answers
    every = choose_pairs(answers, None)
    c = answers.completions
    answers.numbers, answers.prompts, answers.compared = [1, 2], answers.prompts[1:], torch.arange(2).repeat_interleave(4)
    names = ("rewards", "valid", "train")
    for name in names:
        setattr(answers, name, getattr(answers, name)[4:])
    answers.completions = type(c)(c.prompt_tokens, c.tokens[4:], c.mask[4:], c.length[4:], c.group[4:], c.finished[4:], c.log_prob[4:], c.texts[4:])
    assert (choose_pairs(answers, None) + 4).tolist() == every[1:].tolist()


def test_a_shared_beginning_counts_on_neither_side() -> None:
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]])
    mask = torch.tensor([[True, True, True, True], [True, True, True, False]])
    assert trained_tokens(tokens, mask, skip=False) is mask
    assert trained_tokens(tokens, mask, skip=True).tolist() == [[False, False, True, True], [False, False, True, False]]


def test_only_lengths_change_where_a_shared_beginning_is_left_out(folder: Path) -> None:
    pairs = [{"prompt": "one", "chosen": "abxy", "rejected": "abzz"}, {"prompt": "two", "chosen": "abc", "rejected": "abd"}]
    run = ("rollout.groups_per_iteration=2",)
    assert_proportional(first_gradient(stored(folder, *run, "pairing.skip_shared=true", pairs=pairs)), first_gradient(stored(folder, *run, pairs=pairs)))
    pairs = pairs[:1]  # 3 tokens of 5
    run = ("rollout.groups_per_iteration=1", "objective.beta=0.3")
    short = first_gradient(stored(folder, *run, "pairing.skip_shared=true", method="length_normalised_dpo", pairs=pairs))
    assert_proportional(short, first_gradient(stored(folder, *run, method="length_normalised_dpo", pairs=pairs)), 5 / 3)


def test_the_parts_that_fit_into_memory_do_not_matter(folder: Path) -> None:
    rewards = [0.2, 0.9, 0.1, 0.5, 0.5, 1.0, 1.0, 1.0, 0.3, 0.3, 0.3, 0.3]  # 6, 3 and 0 pairs of levels
    for method, more in (("dpo", "pairing.rule=all"), ("trpa", "pairing.levels=[0.9, 0.4]"), ("lipo", "seed=0")):
        runs = [sampled(folder, method, more, "objective.updates_per_iteration=1", f"training.rows_per_backward={rows}") for rows in (4, 64)]
        assert_proportional(first_gradient(runs[0], rewards, moved=True), first_gradient(runs[1], rewards, moved=True))


def test_trpa_compares_every_pair_of_levels(folder: Path) -> None:
    """One pair, both below the top: length-normalised DPO against the policy of the iteration, which is the reference still."""
    rewards = [0.5, 0.0] * 3
    two = ("rollout.group_size=2", "objective.updates_per_iteration=1")
    found = first_gradient(sampled(folder, "trpa", *two, "pairing.levels=[0.9,0.4]"), rewards)
    assert_proportional(found, first_gradient(sampled(folder, "length_normalised_dpo", *two, "objective.beta=0.1"), rewards))
    top = first_gradient(sampled(folder, "trpa", *two, "pairing.levels=[0.4]"), rewards)
    assert_proportional(top, found, 2.5)
    assert levels_of(torch.tensor([1.0, 0.9, 0.5, 0.1]), [0.9, 0.4]).tolist() == [1, 1, 2, 3]


# --- the policies that a loss compares with -----------------------------------------------------------------------------------------------------


def test_the_policy_of_the_iteration_is_remembered_through_all_its_updates(folder: Path) -> None:
    config = sampled(folder, "inpo", "pairing.rule=all", "objective.updates_per_iteration=3", "objective.inner_epochs=2", "optimizer.learning_rate=0.01")
    trainer, answers, update = begin(config, [0.2, 0.9, 0.1, 0.5, 0.4, 1.0, 0.8, 0.6, 0.0, 0.3, 0.35, 0.25])
    rows = torch.unique(answers.extra["pairs"])
    with torch.no_grad():
        before = trainer.policy.token_output(answers.completions, rows).log_prob
    assert isinstance(update, AnswerPairUpdate)
    parts = trainer.split(update.unit_group, [0, 1, 2], (1, 0))
    update.prepare(parts)
    for units in parts:
        trainer.step(update, units, 3, first=units is parts[0])
    torch.testing.assert_close(update.previous[rows], before, atol=1e-5, rtol=0)
    with torch.no_grad():
        assert float((trainer.policy.token_output(answers.completions, rows).log_prob - before).abs().max()) > 0.01
    assert not set(answers.extra["later"].tolist()) & set(answers.extra["pairs"][parts[0]].flatten().tolist())


def test_an_old_policy_that_samples_is_the_previous_one(folder: Path) -> None:
    old = ("old_policy={rollout: true, every: 9, decay_slope: 0.0}", "optimizer.learning_rate=0.01")
    config = sampled(folder, "rebel", "objective.updates_per_iteration=1", *old)
    _, (first, second) = assert_trains(config)
    assert first["pair/margin"] == pytest.approx(0, abs=1e-5)
    assert abs(second["pair/chosen_log_ratio"]) > 1e-3  # the old one is still that of the beginning


def test_nash_mp_has_two_anchors(folder: Path) -> None:
    config = sampled(folder, "nash_mp", "kl.weight=0.3", "anchor.weight=0.15")
    generator = torch.Generator().manual_seed(0)
    now, reference, lagged = (torch.randn(3, 4, generator=generator) for _ in range(3))
    batch: Any = SimpleNamespace(decisions=SimpleNamespace(log_prob=now), token={"reference": reference, "lagged": lagged}.__getitem__)
    total = KlTerm(config)(batch)[0] + AnchorTerm(config)(batch)[0]
    torch.testing.assert_close(total, nash_mp_penalty(now, reference, lagged, beta=0.3, eta=2.0))
    trainer = Trainer(sampled(folder, "nash_mp", "optimizer.learning_rate=0.01"))
    distances = [trainer.iterate(iteration)[0]["anchor/mean"] for iteration in (1, 2, 3)]
    assert distances[1] > 10 * distances[2]  # the second iteration still pulls to where the first began, the third to its own start


def test_win_rates_are_within_groups_and_of_answers_that_score() -> None:
    answers: Any = SimpleNamespace(
        rewards=torch.tensor([0.3, 0.1, 0.1, math.nan, 2.0], dtype=torch.float64),
        valid=torch.tensor([True, True, True, False, True]),
        group=torch.tensor([0, 0, 0, 0, 1]),
        in_statistics=None,
    )
    WinRate().rewards(answers)
    assert answers.rewards.tolist() == [1.0, 0.25, 0.25, 0.0, 0.5]
    with pytest.raises(ValueError, match="temperature is -1"):
        WinRate(-1)


def test_a_guide_weighs_tokens_and_is_counted_apart(folder: Path) -> None:
    config = stored(folder)
    guide = build_language_model(folder / "guide", "llama", seed=3)
    base = first_gradient(config)
    run = stored(folder, f"pairing.guide={{path: {guide}, alpha: 0.5}}", method="tgdpo")
    assert float((first_gradient(run) - base).norm()) > 1e-3 * float(base.norm())
    assert_proportional(first_gradient(stored(folder, f"pairing.guide={{path: {guide}, alpha: 0}}", method="tgdpo")), base)
    metrics, _ = Trainer(run).iterate(1)
    assert metrics["pair/guide_tokens"] == metrics["nfe/backward"]  # each answer once
    assert metrics["nfe/used"] == metrics["nfe/minimum"] == 3 * metrics["nfe/backward"]
    other = build_language_model(folder / "other", "llama")
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["vocab"]["new"] = 999
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match=r"pairing.guide.path: .* has another tokenizer than .*; use a model that was trained from it"):
        Trainer(stored(folder, f"pairing.guide.path={other}", method="tgdpo"))


def test_a_draft_stands_in_the_conversation_before_the_request(folder: Path) -> None:
    trainer = Trainer(stored(folder))
    found = revised(trainer.policy, Prompt("one"), "two", "better")
    assert trainer.policy.tokenizer.decode(found) == "<|user|>one<|end|><|assistant|>two<|end|><|user|>better<|end|><|assistant|>"
    trainer.policy.tokenizer.chat_template = None
    assert trainer.policy.decode([revised(trainer.policy, Prompt("one"), "two", "better").tolist()]) == ["one\ntwo\nbetter\n"]


# --- nothing to train, and mistakes -------------------------------------------------------------------------------------------------------------


def test_an_iteration_without_a_pair_changes_nothing(folder: Path) -> None:
    config = sampled(folder, "dpo", "training.max_invalid_share=1")
    trainer, _, update = begin(config, [0.5] * 12)
    assert update.placeholder and update.counts == {"pair/count": 0.0}
    assert not trainer.backward(update, torch.arange(1), 3, first=True)
    weights = SimpleNamespace(decision=torch.zeros(1), scale=0.0, unit_scale=0.0)
    loss = update.loss(torch.zeros(1, dtype=torch.int64), weights, first=True, idle=True)  # what keeps a process in step with others
    loss.backward()
    assert all(p.grad is None or not bool(p.grad.any()) for p in trainer.parameters)


@pytest.mark.parametrize(
    ("method", "overrides", "expected"),
    [
        ("simpo", ("kl={weight: 0.1, form: k3}",), "kl.weight: simpo has no reference, and a divergence needs samples of the policy; leave it out"),
        ("dpo", ("kl={weight: 0.1, form: k3}",), "kl.weight: dpo is pulled to the reference by its own beta, and a divergence needs samples of the policy"),
        ("dpo", ("entropy.weight=0.1",), "entropy.weight: dpo compares whole answers; leave it out"),
        ("dpo", ("objective.reduction=seq_mean",), "objective.reduction: seq_mean is of tokens, and dpo has one loss for a pair; use mean or group_mean"),
        ("dpo", ("pairing.rule=levels",), "pairing.levels: the rule levels needs the rewards at which levels begin, for example [1]"),
        ("dpo", ("pairing.threshold=0.5",), "pairing.threshold: the rule best_worst has none; use rule: threshold"),
        ("dpo", ("pairing.levels=[0.5, 1.0]",), "pairing.levels: [0.5, 1.0] do not fall; level 1 is from the first upwards, level 2 from the second"),
        ("dpo", ("objective.updates_per_iteration=4",), "objective.updates_per_iteration: 4 is more than the 3 pairs of an iteration; use fewer"),
        ("ipo", ("pairing.guide.path=x",), "pairing.guide: a guide weighs the tokens of dpo, not of ipo; use dpo, or leave it out"),
        ("dpo", ("training.rows_per_backward=1",), "training.rows_per_backward: 1 is less than the 2 rows of a pair, which are trained together; use 2"),
        ("grpo", ("pairing.cap=2",), "pairing.cap: clipped_surrogate compares no pairs; leave it out, or use an objective of pairs, such as dpo"),
        (
            "grpo",
            ("data.pairs=x",),
            "data.pairs: clipped_surrogate needs samples of the policy; use an objective of pairs such as dpo",
        ),
        ("dpo", ("data.pairs=x",), "rollout.group_size: a stored pair is a group of 2, not of 4; set rollout.group_size: 2"),
        ("refuel", ("data.pairs=x", "rollout.group_size=2"), "tree: it says how answers are sampled, and stored pairs are not; leave it out"),
        ("lipo", ("advantage.centre=group",), "advantage: lipo compares rewards itself; set centre: none and scale: none"),
        ("trpa", ("pairing.levels=[]",), "pairing.levels: trpa compares answers of different levels; give the rewards at which levels begin, for example [1]"),
        ("a_star_po", ("shaping=[]",), "shaping: a_star_po regresses rewards less what the reference could reach; add reference_value"),
        ("trpa", ("objective.reduction=mean",), "objective.reduction: the loss of trpa is that of a whole answer; use seq_mean"),
        ("nash_mp", ("old_policy=null",), "anchor.weight: there is no old policy to anchor to; give old_policy, for example {every: 2, decay_slope: 0}"),
    ],
)
def test_what_cannot_work_together_is_one_line(method: str, overrides: tuple[str, ...], expected: str, folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        text_config(folder, f"method={method}", *SMALL.get(method, ()), *overrides)
    lines = str(caught.value).splitlines()
    assert any(line.startswith(expected) for line in lines), lines


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ({"chosen": "same", "rejected": "same"}, "the chosen and the rejected answer are the same; remove the pair"),
        ({"chosen": "some", "rejected": " "}, "the rejected answer is empty; remove the pair"),
        ({"chosen": "long" * 20, "rejected": "no"}, "data.pairs: pair 2: the prompt and the chosen answer have 90 tokens, and the model's context is 64"),
    ],
)
def test_pairs_that_cannot_be_trained_are_named(pair: dict[str, str], expected: str, folder: Path) -> None:
    with pytest.raises(UserError, match=expected):
        Trainer(stored(folder, pairs=[STORED[0], {"prompt": "a word", **pair}]))


def test_what_the_data_or_the_context_lack_is_an_error_before_the_first_iteration(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data.pairs: osp needs how strong each preference is; give `preference` or scores with every pair, or use dpo"):
        Trainer(stored(folder, method="osp"))
    with pytest.raises(UserError, match=r"objective.name: srpo puts an answer of up to 30 tokens into a prompt .* context of 64"):
        Trainer(sampled(folder, "self_improving_rpo", "generation.max_new_tokens=30"))
