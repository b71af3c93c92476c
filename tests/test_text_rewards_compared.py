"""Several rewards and hard constraints in runs of language models: each reward's advantage, GDPO, minimum, and statistics without dropped groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import build_language_model
from text_runs import assert_trains, assign_rewards, text_config
from torch import Tensor

from flowrl.allocation import Outcomes
from flowrl.comparison import compared, gated
from flowrl.config import Config
from flowrl.core.length_shaping import overlong
from flowrl.estimation import Estimator
from flowrl.reward_weights import RewardWeights
from flowrl.text.pairs import choose_pairs
from flowrl.trainer import Trainer
from flowrl.types import Scores, UserError

TWO = "rewards=[{name: 'letters:Even', label: a}, {name: 'letters:Vowels', label: b, weight: -0.5}]"
GATED = "rewards=[{name: 'letters:Even', label: a}, {name: 'letters:Vowels', label: b, weight: 0.0, minimum: -0.5}]"
ZSCORE = "advantage={centre: group, scale: group_std, ddof: 0, eps: 1.0e-12, aggregate: %s}"
A = [1.0, 3.0, 2.0, 6.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 3.0, 3.0]
"""Group means 3, 0, 2; variances 3.5, 0, 1."""
B = [0.0, 0.0, 2.0, 2.0, 5.0, 7.0, 5.0, 7.0, 4.0, 4.0, 4.0, 4.0]
"""Group means 1, 6, 4; variances 1, 1, 0."""
STD = math.sqrt(3.5)
SUM = [-2 / STD + 0.5, 0.5, -1 / STD - 0.5, 3 / STD - 0.5, 0.5, -0.5, 0.5, -0.5, -1.0, -1.0, 1.0, 1.0]
"""z(a) - z(b) / 2; a reward that is the same throughout a group adds nothing there."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model whose answers have different lengths."""
    folder = tmp_path_factory.mktemp("compared")
    text_config(folder)
    build_language_model(folder / "model", "llama", ends=range(5, 256, 4))
    return folder


@pytest.fixture(autouse=True)
def on_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)


def trainer_of(folder: Path, *overrides: str) -> Trainer:
    return Trainer(text_config(folder, *overrides))


def assign(trainer: Trainer, iteration: int = 1, **columns: Sequence[float]) -> Any:
    """Roll out, give the answers these scores (NaN = none) and their weighted sum, and assign."""
    indices = trainer.engine.groups(iteration)
    prompts, numbers = [trainer.prompts[i] for i in indices], list(range(len(indices)))
    rolled_out, _ = trainer.engine.roll_out(prompts, indices, numbers, iteration)
    values = {name: torch.tensor(column, dtype=torch.float32) for name, column in columns.items()}
    scores = {name: Scores(value, ~value.isnan()) for name, value in values.items()}
    required = [reward.key for reward in trainer.config.rewards if reward.required and reward.weight]
    total = sum(weight * values[name].nan_to_num() for name, weight in trainer.rewards.weights.items() if name in values)
    valid = torch.stack([scores[name].valid for name in required]).all(0)
    scores["total"] = Scores(torch.where(valid, torch.as_tensor(total), torch.nan), valid)
    assigned, _ = trainer.assign(rolled_out, scores, prompts, numbers, iteration)
    return assigned


def of_answers(assigned: Any) -> Tensor:
    """[B] float64: the advantage at an answer's first token; 0 of one that is not trained."""
    return assigned.advantages[:, 0].double()


def zscore(values: Tensor, group: Tensor) -> Tensor:
    """By group, ddof 0; 0 where a group has one value."""
    out = torch.zeros_like(values)
    for number in group.unique():
        rows = group == number
        std = values[rows].std(correction=0)
        out[rows] = (values[rows] - values[rows].mean()) / (std if std > 0 else 1.0)
    return out


# --- advantages of each reward ---


def test_each_reward_has_an_advantage_of_its_own(folder: Path) -> None:
    found = of_answers(assign(trainer_of(folder, TWO, ZSCORE % "advantages"), a=A, b=B))
    torch.testing.assert_close(found, torch.tensor(SUM, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_gdpo_standardises_the_sum_over_the_iteration(folder: Path) -> None:
    """The sum has mean 0 in every group; a reward on another scale changes nothing."""
    spread = math.sqrt(sum(x * x for x in SUM) / 12)
    expected = torch.tensor([x / spread for x in SUM], dtype=torch.float64)
    for scale in (1.0, 1000.0):
        found = of_answers(assign(trainer_of(folder, TWO, ZSCORE % "gdpo"), a=A, b=[scale * b for b in B]))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_mean_that_gdpo_takes_off_is_that_of_all_groups(folder: Path) -> None:
    """Without a centre the sum is a: mean 5 / 3, mean square 70 / 12."""
    one = "rewards=[{name: 'letters:Even', label: a}]"
    found = of_answers(assign(trainer_of(folder, one, "advantage={centre: none, scale: none, aggregate: gdpo, ddof: 0, eps: 1.0e-12}"), a=A))
    mean, std = 20 / 12, math.sqrt(70 / 12 - (20 / 12) ** 2)
    torch.testing.assert_close(found, (torch.tensor(A, dtype=torch.float64) - mean) / std, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("centre", "scale"),
    [("group", "group_std"), ("leave_one_out", "none"), ("length_weighted", "none"), ("batch", "batch_std"), ("group", "batch_std_centred"), ("ema", "none")],
)
def test_one_reward_of_weight_1_is_the_plain_way(folder: Path, centre: str, scale: str) -> None:
    way = f"advantage={{centre: {centre}, scale: {scale}, aggregate: %s}}"
    one = "rewards=[{name: 'letters:Even', label: a}]"
    trainers = [trainer_of(folder, one, way % aggregate) for aggregate in ("rewards", "advantages")]
    for values in (A, [*A[6:], *A[:6]]):  # the second time an average has something to remember
        plain, alone = (assign(trainer, a=values) for trainer in trainers)
        assert torch.equal(plain.advantages, alone.advantages)
    assert plain.advantages.abs().max() > 0.1
    assert plain.answers.lengths.unique().numel() > 1


def test_two_equal_rewards_are_one(folder: Path) -> None:
    halves = "rewards=[{name: 'letters:Even', label: a, weight: 0.25}, {name: 'letters:Even', label: b, weight: 0.75}]"
    one = "rewards=[{name: 'letters:Even', label: a}]"
    for aggregate in ("advantages", "gdpo"):
        two = assign(trainer_of(folder, halves, ZSCORE % aggregate), a=A, b=A)
        torch.testing.assert_close(two.advantages, assign(trainer_of(folder, one, ZSCORE % aggregate), a=A).advantages)


def test_without_a_scale_the_sum_of_advantages_is_the_advantage_of_the_sum(folder: Path) -> None:
    """Shaping included: what it adds is a further reward of weight 1."""
    shaping = "shaping={overlong: {max_length: 8, cache: 6}}"
    way = "advantage={centre: group, scale: none, aggregate: %s}"
    found = [assign(trainer_of(folder, TWO, shaping, way % aggregate), a=A, b=B).advantages for aggregate in ("rewards", "advantages")]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def test_what_shaping_adds_is_a_reward_of_its_own(folder: Path) -> None:
    shaped = assign(trainer_of(folder, TWO, ZSCORE % "advantages", "shaping={overlong: {max_length: 8, cache: 6}}"), a=A, b=B)
    added = overlong(shaped.answers.lengths.double(), max_length=8, cache=6)
    assert added.unique().numel() > 2
    expected = torch.tensor(SUM, dtype=torch.float64) + zscore(added, shaped.answers.group)
    torch.testing.assert_close(of_answers(shaped), expected, rtol=1e-5, atol=1e-5)
    idle = assign(trainer_of(folder, TWO, ZSCORE % "advantages", "shaping={overlong: {max_length: 100, cache: 6}}"), a=A, b=B)
    assert torch.equal(idle.advantages, assign(trainer_of(folder, TWO, ZSCORE % "advantages"), a=A, b=B).advantages)  # it adds 0


def test_a_floor_and_a_reward_that_is_not_required(folder: Path) -> None:
    floor = "advantage={centre: group, scale: group_std, ddof: 0, eps: 1.0e-12, aggregate: advantages, std_floor: 0.5}"
    one = "rewards=[{name: 'letters:Even', label: a}]"
    wide = torch.tensor(A).double().std(correction=0) / 2
    found = of_answers(assign(trainer_of(folder, one, floor), a=A))
    torch.testing.assert_close(found[:4], torch.tensor([-2.0, 0, -1, 3], dtype=torch.float64) / (STD + wide), rtol=1e-6, atol=1e-6)
    optional = "rewards=[{name: 'letters:Even', label: a}, {name: 'letters:Vowels', label: b, required: false}]"
    nan = math.nan
    found = of_answers(assign(trainer_of(folder, optional, ZSCORE % "advantages"), a=A, b=[nan, nan, 0.0, 2.0, *[nan] * 8]))
    torch.testing.assert_close(found[:4], torch.tensor([-2 / STD, 0, -1 / STD - 1, 3 / STD + 1], dtype=torch.float64), rtol=1e-6, atol=1e-6)
    found = of_answers(assign(trainer_of(folder, optional, ZSCORE % "advantages"), a=A, b=[nan] * 12))
    torch.testing.assert_close(found[:4], torch.tensor([-2 / STD, 0, -1 / STD, 3 / STD], dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_groups_of_different_sizes(folder: Path) -> None:
    trainer = trainer_of(folder, TWO.replace("-0.5", "0.5"), ZSCORE % "advantages", "allocation={name: knapsack, args: {least: 2, most: 8, warmup: 0}}")
    for iteration in range(1, 4):
        indices = trainer.engine.groups(iteration)
        assigned = assign(trainer, iteration, a=[0.0, 1.0, 0.0] * 4, b=[float(i) for i in range(12)])
        sizes = torch.bincount(assigned.answers.group)
        assert len(indices) == len(sizes) == 3 and int(sizes.sum()) == 12
        group = assigned.answers.group
        expected = zscore(torch.tensor([0.0, 1.0, 0.0] * 4, dtype=torch.float64), group) + 0.5 * zscore(torch.arange(12).double(), group)
        torch.testing.assert_close(of_answers(assigned), expected, rtol=1e-5, atol=1e-5)
        trainer.engine.rounds.allocator.observe(_outcomes(indices))
    assert len(set(sizes.tolist())) > 1


def _outcomes(indices: Sequence[int]) -> Any:
    """The first prompt is worth more samples than the others."""
    prompt = torch.tensor([index for index in indices for _ in range(2)])
    rewards = torch.tensor([1.0, 0.0] + [1.0, 1.0] * (len(indices) - 1), dtype=torch.float64)
    return Outcomes(prompt, rewards, torch.ones(len(prompt), dtype=torch.bool))


def test_the_whitening_over_tokens_is_a_choice_of_the_credit(folder: Path) -> None:
    """verl's GDPO: the sum of the advantages at every token, less its mean over all tokens, divided by its spread."""
    assigned = assign(trainer_of(folder, TWO, ZSCORE % "advantages", "token_credit.name=token_returns"), a=A, b=B)
    mask = assigned.mask
    spread = torch.tensor(SUM, dtype=torch.float64)[:, None].expand(mask.shape)[mask]
    torch.testing.assert_close(assigned.advantages[mask].double(), (spread - spread.mean()) / spread.std(), rtol=1e-5, atol=1e-5)


def test_the_factor_of_the_weights_scales_advantages(folder: Path) -> None:
    trainer = trainer_of(folder, TWO, ZSCORE % "advantages")
    trainer.reward_weights.factor = 0.5
    torch.testing.assert_close(of_answers(assign(trainer, a=A, b=B)), torch.tensor(SUM, dtype=torch.float64) / 2, rtol=1e-6, atol=1e-6)


def test_current_weights_count_and_gradients_of_each_reward_move_them(folder: Path) -> None:
    rewards = "rewards=[{name: 'letters:Even', label: a}, {name: 'letters:Vowels', label: b, weight: 3.0}]"
    trainer = trainer_of(folder, rewards, ZSCORE % "advantages", "reward_weights={kind: gradient, every: 1, rate: 1.0e+4}")
    trainer.iterate(1)
    weights = trainer.reward_weights.weights
    assert sum(weights.values()) == pytest.approx(4) and weights["b"] != 3.0
    trainer.reward_weights.weights |= {"a": 0.5, "b": 2.0}
    expected = 0.5 * zscore(torch.tensor(A).double(), torch.arange(12) // 4) + 2 * zscore(torch.tensor(B).double(), torch.arange(12) // 4)
    torch.testing.assert_close(of_answers(assign(trainer, a=A, b=B)), expected, rtol=1e-5, atol=1e-5)


# --- hard constraints ---


@pytest.mark.parametrize("aggregate", ["rewards", "advantages"])
def test_an_answer_that_breaks_a_constraint_is_the_worst_of_its_group(folder: Path, aggregate: str) -> None:
    assigned = assign(trainer_of(folder, GATED, ZSCORE % aggregate), a=A, b=[0, 0, -0.5, -0.6, *[-1.0] * 4, *[math.nan] * 4])
    found = of_answers(assigned)
    if aggregate == "rewards":  # 1, 3, 2 keep it; 6 becomes 1 - 2
        values = torch.tensor([1.0, 3.0, 2.0, -1.0], dtype=torch.float64)
        expected = (values - values.mean()) / values.std(correction=0)
    else:
        expected = torch.tensor([-2 / STD, 0, -1 / STD, -2 / STD - 2 / STD], dtype=torch.float64)
    torch.testing.assert_close(found[:4], expected, rtol=1e-6, atol=1e-6)
    assert found[4:8].tolist() == [0.0] * 4  # all of them break it
    torch.testing.assert_close(found[8:], torch.tensor([-1.0, -1, 1, 1], dtype=torch.float64), rtol=1e-6, atol=1e-6)  # nobody knows
    assert assigned.answers.rewards.tolist() == [1.0, 3, 2, -1, *A[4:]]  # what pairs and other credits see


def test_a_pair_prefers_what_keeps_the_constraint(folder: Path) -> None:
    trainer = trainer_of(folder, "method=dpo", GATED, "rollout={groups_per_iteration: 3, group_size: 4}", "training.rows_per_backward=5")
    assigned = assign(trainer, a=A, b=[0, 0, -0.5, -0.6] * 3)
    found = choose_pairs(assigned.answers, None).tolist()
    assert [1, 3] in found and all(winner % 4 != 3 for winner, _ in found)


def test_an_experts_answer_is_gated_and_is_no_measure(folder: Path) -> None:
    """Of the counted 2, 3 and a broken 5 the last becomes 2 - 1; the expert's 0, which keeps the constraint, would have made it 0 - 3."""
    config = text_config(folder, GATED)
    scores = {
        "a": Scores(torch.tensor([2.0, 3, 5, 0]), torch.ones(4, dtype=torch.bool)),
        "b": Scores(torch.tensor([0.0, 0, -1, 0]), torch.ones(4, dtype=torch.bool)),
        "total": Scores(torch.tensor([2.0, 3, 5, 0]), torch.ones(4, dtype=torch.bool)),
    }
    group, own = torch.zeros(4, dtype=torch.int64), torch.tensor([True, True, True, False])
    once = gated(config, scores, group, 1, own)
    assert once.values.tolist() == [2, 3, 1, 0]
    assert gated(config, scores, group, 1).values.tolist() == [2, 3, -3, 0]
    assert gated(config, {**scores, "total": once}, group, 1, own).values.tolist() == [2, 3, 1, 0]  # once more changes nothing


# --- statistics over the iteration are of the groups that are trained ---


DROPPED = [0.0, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1]
"""Of the second group nothing can be learnt."""
KEPT = torch.tensor([True] * 4 + [False] * 4 + [True] * 4)


def test_whitening_is_over_the_tokens_of_the_groups_that_are_kept(folder: Path) -> None:
    trainer = trainer_of(folder, "allocation={name: drop}", "token_credit.name=token_returns", "advantage={centre: none, scale: none}")
    assigned = assign_rewards(trainer, DROPPED)
    mask = assigned.answers.mask & KEPT[:, None]
    assert torch.equal(assigned.mask, mask)
    values = torch.tensor(DROPPED, dtype=torch.float64)[:, None].expand(mask.shape)[mask]
    torch.testing.assert_close(assigned.advantages[mask].double(), (values - values.mean()) / values.std(), rtol=1e-5, atol=1e-5)
    assert float(assigned.advantages[~mask].abs().sum()) == 0


@pytest.mark.parametrize(
    ("centre", "scale", "aggregate"),
    [("batch", "batch_std", "rewards"), ("batch", "batch_std", "advantages"), ("group", "batch_std_centred", "rewards"), ("none", "none", "gdpo")],
)
def test_a_dropped_group_is_no_part_of_the_batch(folder: Path, centre: str, scale: str, aggregate: str) -> None:
    """As in DAPO, where it is filtered out before advantages are worked out: the others have what they have without it."""
    one = "rewards=[{name: 'letters:Even', label: a}]"
    way = f"advantage={{centre: {centre}, scale: {scale}, aggregate: {aggregate}, ddof: 0, eps: 1.0e-12}}"
    dropped = of_answers(assign(trainer_of(folder, one, way, "allocation={name: drop}"), a=DROPPED))
    values = torch.tensor(DROPPED, dtype=torch.float64)[KEPT]
    mean, std = values.mean(), values.std(correction=0)  # 3 / 8
    if centre == "group":
        mean = torch.tensor([0.5] * 4 + [0.25] * 4, dtype=torch.float64)
        std = (values - mean).std(correction=0)
    torch.testing.assert_close(dropped[KEPT], (values - mean) / std, rtol=1e-6, atol=1e-6)
    assert dropped[~KEPT].tolist() == [0.0] * 4
    everyone = of_answers(assign(trainer_of(folder, one, way), a=DROPPED))
    assert (everyone[KEPT] - dropped[KEPT]).abs().max() > 0.01


def test_all_groups_dropped_teach_nothing(folder: Path) -> None:
    for way in ("advantage={centre: batch, scale: batch_std}", "advantage={centre: ema, scale: none}", "token_credit.name=token_returns"):
        assigned = assign_rewards(trainer_of(folder, "allocation={name: drop}", way), [1.0] * 12)
        assert not assigned.mask.any() and not assigned.advantages.any()


def test_an_average_learns_of_the_batch_alone(folder: Path) -> None:
    trainer = trainer_of(folder, "allocation={name: drop}", "advantage={centre: ema, scale: none}")
    assign_rewards(trainer, [1.0] * 12)
    average = trainer.engine.estimator.averages["total"]
    assert (average.total, average.weight) == (0.0, 0.0)  # nothing was kept, so there is nothing to remember
    assign_rewards(trainer, DROPPED)
    average = trainer.engine.estimator.averages["total"]
    assert average.total / average.weight == pytest.approx(3 / 8)


def test_gated_totals_are_not_in_statistics_over_the_iteration() -> None:
    """With and without a mask of what counts: the totals before constraints."""
    config = Config.model_validate(
        {"run_dir": "r", "rewards": [{"name": "a"}, {"name": "b", "weight": 0.0, "minimum": 0.0}], "advantage": {"centre": "batch", "scale": "none"}}
    )
    every = torch.ones(4, dtype=torch.bool)
    scores = {name: Scores(torch.tensor(values), every) for name, values in {"a": [1.0, 3, 2, 6], "b": [0.0, 0, 0, -1], "total": [1.0, 3, 2, 6]}.items()}
    group = torch.zeros(4, dtype=torch.int64)
    for mask in (None, (every, every)):
        found = compared(config, RewardWeights(config), Estimator(config.advantage), scores, scores, group, 1, prompts=(group, group), stats_mask=mask)
        assert found.tolist() == [-2.0, 0.0, -1.0, -4.0]  # mean 3; 6 becomes 1 - 2


# --- runs ---


@pytest.mark.parametrize(
    "settings",
    [
        ["method=gdpo"],
        ["method=gdpo", "allocation={name: dynamic, args: {max_rounds: 2}}", "shaping={overlong: {max_length: 8, cache: 4}}"],
        ["method=gdpo", "allocation.samples=[{name: hints, args: {rule: ghpo}}]", "token_credit.name=token_returns"],
        ["method=dynamic_weights"],
        ["method=grpo", "advantage.aggregate=advantages", "advantage.centre=ema", "objective.updates_per_iteration=2"],
    ],
)
def test_a_run_trains_and_goes_on_from_its_state(folder: Path, settings: list[str]) -> None:
    (folder / "hinted.jsonl").write_text('{"prompt": "one and two", "hints": ["a", "b"]}\n{"prompt": "five", "hints": ["c", "d"]}\n' * 2)
    rewards = "rewards=[{name: 'letters:Even', label: a}, {name: 'letters:Vowels', label: b, minimum: 0.05}]"
    config = text_config(folder, *settings, rewards, "rollout={groups_per_iteration: 3, group_size: 4}", f"data.train={folder / 'hinted.jsonl'}")
    trainer, _ = assert_trains(config)
    resumed = Trainer(config)
    resumed.load_state(deepcopy(trainer.state()))
    assert resumed.iterate(3)[0] == trainer.iterate(3)[0]


# --- what does not go together ---


PER_REWARD = "advantage.aggregate=gdpo"
REFUSED = [
    (["method=dpo", PER_REWARD], "advantage.aggregate: gdpo gives each reward an advantage, and dpo compares the weighted sum of the rewards"),
    (["method=a_star_po", PER_REWARD], "advantage.aggregate: gdpo gives each reward an advantage, and a_star_po compares the weighted sum"),
    (["method=nft", PER_REWARD], "advantage.aggregate: gdpo gives each reward an advantage, and token_nft compares the weighted sum"),
    (["method=ppo", PER_REWARD], "advantage.aggregate: gdpo gives each reward an advantage, and token_credit: gae compares their weighted sum"),
    (["method=tree_po", PER_REWARD], "and token_credit: tree compares their weighted sum; use aggregate: rewards"),
    (["method=unlikeliness", PER_REWARD], "and shaping: rank_unlikely replaces their weighted sum; use aggregate: rewards"),
    (["method=tempsamp_r1", PER_REWARD], "and shaping: inserted replaces their weighted sum; use aggregate: rewards"),
    (["advantage={scale: history, aggregate: gdpo}"], "advantage.aggregate: scale history remembers the weighted sum of the rewards"),
    (["method=nft", GATED], "rewards: the minimum of b puts answers below 0, and token_nft takes rewards that are 0 or 1; leave it out"),
    (["method=t_ppo", GATED], "rewards: the minimum of b ranks the answers of a group, and with partial some are not finished; leave it out"),
]


@pytest.mark.parametrize(("settings", "line"), REFUSED)
def test_what_does_not_go_together_is_refused(folder: Path, settings: list[str], line: str) -> None:
    with pytest.raises(UserError) as error:
        text_config(folder, *settings)
    assert line in str(error.value)


def test_what_shapes_advantages_goes_with_each_reward(folder: Path) -> None:
    """The anchor of an expert's answer is set after the advantages, and bonuses for places and novelty too."""
    for shaping in ("{name: novelty}", "{name: position_bonus, args: {marker: e}}"):
        assert text_config(folder, PER_REWARD, f"shaping=[{shaping}]").advantage.aggregate == "gdpo"
    expert = "allocation.samples=[expert]"
    assert text_config(folder, PER_REWARD, expert, "shaping=[{name: inserted, args: {kind: anchor}}]").advantage.aggregate == "gdpo"
