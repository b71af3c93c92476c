"""rewards/win_rate.py: judges with a known answer, schedules, Bradley-Terry values worked out by hand, scores turned into wins, and judges that fail."""

from __future__ import annotations

import inspect
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reward_models import assert_reward_contract, part_of, pictures
from torch import Tensor

from flowrl.types import Prompt, RewardInfo, SampleBatch, Scores, UserError
from rewards.composite import WeightedRewards
from rewards.win_rate import WinRate, bradley_terry, schedule

CPU = torch.device("cpu")
HERE = __name__


class Brightness:
    """Scores a picture by its mean; a picture that is all black cannot be scored. Records what is done to it."""

    def __init__(self, factor: float = 1.0, scope: Any = "sample") -> None:
        self.info = RewardInfo(name="brightness", description="mean of the picture", low=0.0, high=1.0, source="the test", scope=scope, batch_size=2)
        self.factor = factor
        self.calls: list[object] = []

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        self.calls.append(("load", device, dtype))

    def to(self, device: torch.device) -> None:
        self.calls.append(("to", device))

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if not prompt.text:
                raise UserError("reward brightness: a prompt is empty")

    def close(self) -> None:
        self.calls.append("close")

    def score(self, batch: SampleBatch) -> Scores:
        self.calls.append(len(batch))
        values = self.factor * batch.images.mean((1, 2, 3))  # type: ignore[union-attr]
        valid = values != 0
        problems = dict.fromkeys(torch.nonzero(~valid).flatten().tolist(), "all black")
        return Scores(torch.where(valid, values, torch.nan), valid, {}, problems)


class Judge:
    """Answers by a function of the brightness of the two; remembers all it was shown."""

    def __init__(self, answer: Callable[[float, float], Any]) -> None:
        self.answer = answer
        self.shown: list[tuple[float, float, str]] = []
        self.sizes: list[int] = []
        self.closed = False

    def prefer(self, first: Tensor, second: Tensor, prompts: Sequence[str]) -> list[Any]:
        assert first.shape == second.shape
        assert len(prompts) == len(first)
        assert not first.requires_grad
        levels = [(round(a, 4), round(b, 4)) for a, b in zip(first.mean((1, 2, 3)).tolist(), second.mean((1, 2, 3)).tolist(), strict=True)]
        self.sizes.append(len(first))
        self.shown += [(a, b, prompt) for (a, b), prompt in zip(levels, prompts, strict=True)]
        return [self.answer(a, b) for a, b in levels]

    def close(self) -> None:
        self.closed = True


def brighter(first: float, second: float) -> str:
    return "first" if first > second else "second" if second > first else "tie"


def flat(levels: Sequence[float], prompts: Sequence[str] | None = None) -> SampleBatch:
    """Grey pictures of these levels, by default of one prompt."""
    images = torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()
    return SampleBatch([Prompt(text) for text in prompts or ["a cat"] * len(levels)], images)


def loaded(**args: Any) -> WinRate:
    reward = WinRate(**args)
    reward.load(CPU, torch.float32)
    return reward


# --------------------------------------------------------------------------------------------------------------------------------------------- formulas


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 25), st.one_of(st.none(), st.integers(1, 30)), st.integers(0, 10**6))
def test_a_schedule_meets_nobody_twice_and_gives_everyone_enough_opponents(num: int, opponents: int | None, seed: int) -> None:
    pairs = schedule(num, opponents, torch.Generator().manual_seed(seed))
    assert all(a != b for a, b in pairs)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    met = Counter(player for pair in pairs for player in pair)
    assert set(met) <= set(range(num))
    if opponents is None or opponents >= num - 1:
        assert len(pairs) == num * (num - 1) // 2
    else:
        assert {met[i] for i in range(num)} <= ({opponents} if num % 2 == 0 else {opponents, opponents + 1})


def test_strengths_of_a_chain_by_hand() -> None:
    """A beat B, B beat C. By symmetry p_B = 1 and p_C = 1 / p_A. For A, 1 + 1/2 wins = p / (p + 1) against B + p / (p + 1) against the prior: p = 3."""
    wins = torch.tensor([[0.0, 1, 0], [0, 0, 1], [0, 0, 0]])
    torch.testing.assert_close(bradley_terry(wins), torch.tensor([3.0, 1.0, 1 / 3], dtype=torch.float64))


def test_strengths_of_one_game_by_hand() -> None:
    """p_2 = 1 / p_1, and 3/2 = p^2 / (p^2 + 1) + p / (p + 1), which is p^3 - p^2 - p - 3 = 0."""
    strength = bradley_terry(torch.tensor([[0.0, 1], [0, 0]]))
    p = float(strength[0])
    assert p**3 - p**2 - p - 3 == pytest.approx(0, abs=1e-8)
    assert float(strength[1]) == pytest.approx(1 / p)
    assert bradley_terry(torch.tensor([[0.0, 0.5], [0.5, 0]])).tolist() == [1.0, 1.0]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(0, 10**6))
def test_strengths_are_where_the_likelihood_with_its_prior_has_no_slope(num: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    wins = torch.randint(0, 3, (num, num), generator=generator).double().fill_diagonal_(0) / 2
    log_strength = bradley_terry(wins).log().requires_grad_()
    pairs = log_strength[:, None] - log_strength
    prior = torch.nn.functional.logsigmoid(log_strength) + torch.nn.functional.logsigmoid(-log_strength)
    likelihood = (wins * torch.nn.functional.logsigmoid(pairs)).sum() + 0.5 * prior.sum()
    (slope,) = torch.autograd.grad(likelihood, log_strength)
    assert slope.abs().max() < 1e-8


# ----------------------------------------------------------------------------------------------------------------------------------------------- judges


@pytest.mark.parametrize("orders", ["coin", "both"])
def test_a_transitive_judge_gives_1_down_to_0(orders: str) -> None:
    judge = Judge(brighter)
    scores = loaded(judge=judge, orders=orders).score(flat([0.2, 0.9, 0.4, 0.7, 0.5]))
    assert scores.values.tolist() == [0.0, 1.0, 0.25, 0.75, 0.5]
    assert scores.valid.all()
    times = 2 if orders == "both" else 1
    assert scores.raw["win_rate_comparisons"].tolist() == [4.0 * times] * 5
    assert len(judge.shown) == 10 * times
    assert len({(a, b) for a, b, _ in judge.shown}) == 10 * times
    assert len({frozenset((a, b)) for a, b, _ in judge.shown}) == 10


def test_a_judge_that_sees_no_difference_gives_a_half_and_no_advantage() -> None:
    values = loaded(judge=Judge(lambda a, b: "tie")).score(flat([0.1, 0.2, 0.3, 0.4])).values
    assert values.tolist() == [0.5] * 4
    assert values.std() == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([None, 3]))
def test_the_order_of_the_two_pictures_does_not_matter_to_a_fair_judge(seed: int, opponents: int | None) -> None:
    batch = flat([0.2, 0.9, 0.4, 0.7, 0.5, 0.5])
    once, twice = (loaded(judge=Judge(brighter), orders=orders, opponents=opponents, seed=seed).score(batch) for orders in ("coin", "both"))
    torch.testing.assert_close(once.values, twice.values, rtol=0, atol=1e-6)
    assert torch.equal(2 * once.raw["win_rate_comparisons"], twice.raw["win_rate_comparisons"])


def test_asking_in_both_orders_takes_away_a_preference_for_a_place_and_the_coin_draws_it() -> None:
    always_first = Judge(lambda a, b: "first")
    assert loaded(judge=always_first, orders="both").score(flat([0.1, 0.2, 0.3, 0.4])).values.tolist() == [0.5] * 4
    drawn = [loaded(judge=Judge(lambda a, b: "first"), seed=seed).score(flat([0.1, 0.2])).values.tolist() for seed in range(40)]
    wins = sum(values == [1.0, 0.0] for values in drawn)
    assert all(sorted(values) == [0.0, 1.0] for values in drawn)
    assert 10 < wins < 30  # 40 fair coins leave this range once in 500 times


def test_the_draws_depend_on_the_seed_the_prompt_and_the_size_of_the_group_alone() -> None:
    def asked(batch: SampleBatch, seed: int = 0) -> list[tuple[float, float, str]]:
        judge = Judge(brighter)
        loaded(judge=judge, opponents=2, seed=seed).score(batch)
        return judge.shown

    levels = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    first, again = asked(flat(levels)), asked(flat(levels))
    assert first == again
    assert first != asked(flat(levels), seed=1)
    assert [pair[:2] for pair in first] != [pair[:2] for pair in asked(flat(levels, ["a dog"] * 6))]
    mixed = flat([*levels, 0.7, 0.8, 0.9, 1.0], ["a cat"] * 6 + ["a dog"] * 4)
    assert [pair for pair in asked(mixed) if pair[2] == "a cat"] == first


def test_with_fewer_opponents_the_model_of_bradley_and_terry_gives_the_order_back() -> None:
    levels = [0.05 * (i + 1) for i in range(12)]
    judge = Judge(brighter)
    scores = loaded(judge=judge, opponents=6).score(flat(levels))
    assert len(judge.shown) == 12 * 6 // 2
    assert scores.raw["win_rate_comparisons"].tolist() == [6.0] * 12
    true = torch.arange(12) / 11
    assert torch.corrcoef(torch.stack([scores.values, true]))[0, 1] > 0.9
    assert scores.values.min() > 0
    assert scores.values.max() < 1


def test_a_chain_of_verdicts_gives_the_values_worked_out_by_hand() -> None:
    """A > B > C without A against C: strengths 3, 1, 1/3, so A has (3/4 + 9/10) / 2, B (1/4 + 3/4) / 2, C (1/10 + 1/4) / 2."""
    judge = Judge(lambda a, b: None if abs(a - b) > 0.5 else brighter(a, b))
    scores = loaded(judge=judge).score(flat([0.9, 0.5, 0.2]))
    torch.testing.assert_close(scores.values, torch.tensor([0.825, 0.5, 0.175]))
    assert scores.raw["win_rate_comparisons"].tolist() == [1.0, 2.0, 1.0]
    assert scores.valid.all()  # one of two is half


def test_both_orders_count_as_one_comparison_in_the_fit_also_where_one_is_missing() -> None:
    judge = Judge(lambda a, b: None if abs(a - b) > 0.5 or (a, b) == (0.9, 0.5) else brighter(a, b))
    scores = loaded(judge=judge, orders="both").score(flat([0.9, 0.5, 0.2]))
    assert scores.raw["win_rate_comparisons"].tolist() == [1.0, 3.0, 2.0]
    assert scores.valid.tolist() == [False, True, True]  # 1 of 4
    torch.testing.assert_close(scores.values[1:], torch.tensor([0.5, 0.175]))


def test_a_sample_with_fewer_than_half_of_its_verdicts_is_invalid_and_not_a_loser() -> None:
    """Nothing is read of the picture of 0.9 but once: 1 of 3. The others keep 2 or 3 of 3."""
    judge = Judge(lambda a, b: None if 0.9 in (a, b) and 0.1 not in (a, b) else brighter(a, b))
    scores = loaded(judge=judge).score(flat([0.1, 0.9, 0.3, 0.5]))
    assert scores.valid.tolist() == [True, False, True, True]
    assert scores.problems == {1: "the judge gave a verdict in fewer than half of its comparisons"}
    assert scores.values[1].isnan()
    assert scores.values[[0, 2, 3]].argsort().tolist() == [0, 1, 2]
    assert scores.raw["win_rate_comparisons"].tolist() == [3.0, 1.0, 2.0, 2.0]
    silent = loaded(judge=Judge(lambda a, b: None)).score(flat([0.1, 0.9]))
    assert not silent.valid.any()
    assert silent.raw["win_rate_comparisons"].tolist() == [0.0, 0.0]


def test_groups_are_judged_apart_and_broken_pictures_and_lonely_samples_left_out() -> None:
    batch = flat([0.9, 0.8, 0.1, 0.2, 0.5, 0.3, 0.6], ["a", "b", "a", "b", "a", "c", "d"])
    batch.images[4, 0, 0, 0] = float("nan")  # type: ignore[index]
    judge = Judge(brighter)
    scores = loaded(judge=judge).score(batch)
    assert scores.valid.tolist() == [True, True, True, True, False, False, False]
    assert scores.values[:4].tolist() == [1.0, 1.0, 0.0, 0.0]
    lonely = "no other sample of its prompt to compare it with"
    assert scores.problems == {4: "the picture has NaN or infinite pixels", 5: lonely, 6: lonely}
    assert sorted(shown[2] for shown in judge.shown) == ["a", "b"]
    alone = loaded(judge=Judge(brighter)).score(part_of(batch, [5, 6]))
    assert not alone.valid.any()  # and the judge is not bothered


def test_the_judge_gets_at_most_64_pairs_at_a_time() -> None:
    judge = Judge(brighter)
    levels = [round(0.05 * (i + 1), 2) for i in range(12)]
    batch = flat(levels + levels, ["a"] * 12 + ["b"] * 12)
    values = loaded(judge=judge).score(batch).values
    assert judge.sizes == [64, 64, 4]
    torch.testing.assert_close(values, torch.arange(12).repeat(2) / 11)


def test_the_reward_keeps_the_contract_with_a_judge() -> None:
    prompts = [Prompt("a cat" if i % 2 else "a dog") for i in range(7)]
    assert_reward_contract(lambda: WinRate(judge=Judge(brighter)), SampleBatch(prompts, pictures(7)))


@pytest.mark.parametrize("answers", [["first"], ["first", "left"], []])
def test_a_judge_that_breaks_its_promise_is_an_error(answers: list[str]) -> None:
    class Broken:
        def prefer(self, first: Tensor, second: Tensor, prompts: Sequence[str]) -> list[Any]:
            return answers * 3 if answers == ["first"] else answers

    with pytest.raises(UserError, match="^reward win_rate: the judge answered .* to 2 pairs; it must say first, second, tie or None of each"):
        loaded(judge=Broken(), orders="both").score(flat([0.1, 0.2]))


def test_a_judge_behind_an_endpoint_is_made_when_loaded_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Judge] = []

    class PairJudge(Judge):
        def __init__(self, **args: Any) -> None:
            super().__init__(brighter)
            self.args = args
            made.append(self)

    module = ModuleType("rewards.judge")
    module.PairJudge = PairJudge  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rewards.judge", module)
    reward = WinRate(url="http://127.0.0.1:9/v1", model="qwen", judge_args={"timeout": 3})
    assert made == []
    assert (reward.info.runs_on, reward.info.extra) == ("network", "remote")
    reward.load(CPU, torch.float32)
    reward.load(CPU, torch.float32)
    assert [judge.args for judge in made] == [{"url": "http://127.0.0.1:9/v1", "model": "qwen", "both_orders": False, "timeout": 3}]  # type: ignore[attr-defined]
    assert reward.score(flat([0.1, 0.2])).values.tolist() == [0.0, 1.0]
    reward.check_prompts([Prompt("")])
    reward.to(CPU)
    reward.close()
    assert made[0].closed
    with pytest.raises(RuntimeError, match="load must be called before score"):
        reward.score(flat([0.1, 0.2]))
    reward.load(CPU, torch.float32)
    assert len(made) == 2


def test_the_real_judge_takes_what_it_is_given_here() -> None:
    from rewards.judge import PairJudge

    inspect.signature(PairJudge).bind(url="http://x", model="m", both_orders=False)
    assert list(inspect.signature(PairJudge.prefer).parameters) == ["self", "first", "second", "prompts"]


# --------------------------------------------------------------------------------------------------------------------------------- scores turned to wins


def test_the_scores_of_another_reward_become_wins() -> None:
    batch = flat([0.2, 0.9, 0.4, 0.4, 0.1, 0.3], ["a", "a", "a", "a", "b", "b"])
    scores = loaded(reward=f"{HERE}:Brightness").score(batch)
    torch.testing.assert_close(scores.values, torch.tensor([0.0, 1.0, 0.5, 0.5, 0.0, 1.0]))  # of the twins, each has a loss, a tie and a win
    torch.testing.assert_close(scores.raw["win_rate_score"], batch.images.mean((1, 2, 3)))  # type: ignore[union-attr]
    assert scores.raw["win_rate_comparisons"].tolist() == [3, 3, 3, 3, 1, 1]


def test_with_a_temperature_a_value_is_the_mean_of_sigmoids_and_a_small_one_gives_ranks() -> None:
    levels = [0.2, 0.9, 0.4, 0.5]
    values = loaded(reward=f"{HERE}:Brightness", temperature=0.5).score(flat(levels)).values
    expected = [sum(1 / (1 + math.exp(-(r - other) / 0.5)) for j, other in enumerate(levels) if j != i) / 3 for i, r in enumerate(levels)]
    torch.testing.assert_close(values, torch.tensor(expected))
    cold = loaded(reward=f"{HERE}:Brightness", temperature=1e-3).score(flat(levels)).values
    torch.testing.assert_close(cold, torch.tensor([0.0, 1.0, 1 / 3, 2 / 3]))
    hot = loaded(reward=f"{HERE}:Brightness", temperature=1e6).score(flat(levels)).values
    torch.testing.assert_close(hot, torch.full((4,), 0.5))


def test_wins_do_not_see_a_rising_change_of_the_scores() -> None:
    batch = flat([0.2, 0.9, 0.4, 0.5])
    plain, scaled = (loaded(reward=f"{HERE}:Brightness", reward_args={"factor": factor}).score(batch).values for factor in (1.0, 0.01))
    assert torch.equal(plain, scaled)
    turned = loaded(reward=f"{HERE}:Brightness", reward_args={"factor": -1.0}).score(batch).values
    torch.testing.assert_close(turned, 1 - plain)


def test_a_sample_that_the_reward_cannot_score_is_invalid_and_no_opponent() -> None:
    scores = loaded(reward=f"{HERE}:Brightness").score(flat([0.2, 0.0, 0.4, 0.6]))
    assert scores.values[[0, 2, 3]].tolist() == [0.0, 0.5, 1.0]
    assert scores.valid.tolist() == [True, False, True, True]
    assert scores.problems == {1: f"{HERE}:Brightness: all black"}


def test_the_reward_keeps_the_contract_with_a_reward_and_a_temperature() -> None:
    prompts = [Prompt("a cat" if i % 2 else "a dog") for i in range(7)]
    assert_reward_contract(lambda: WinRate(f"{HERE}:Brightness", temperature=0.01), SampleBatch(prompts, pictures(7)))


def test_the_judging_reward_is_made_once_scored_in_its_batches_moved_and_closed() -> None:
    reward = WinRate(f"{HERE}:Brightness")
    reward.check_prompts([Prompt("x")])
    with pytest.raises(UserError, match="a prompt is empty"):
        reward.check_prompts([Prompt("")])
    reward.load(CPU, torch.bfloat16)
    reward.score(flat([0.1, 0.2, 0.3]))
    reward.to(CPU)
    reward.close()
    assert reward._inner.calls == [("load", CPU, torch.bfloat16), 2, 1, ("to", CPU), "close"]  # type: ignore[union-attr]


def test_a_registered_reward_judges_and_the_whole_goes_into_a_weighted_sum() -> None:
    noise = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    strength = torch.tensor([0.1, 1.0, 0.4]).view(3, 1, 1, 1)
    batch = SampleBatch([Prompt("x")] * 3, 0.5 + strength * (noise - 0.5))
    rewards = WeightedRewards([("win_rate", 2.0, WinRate("jpeg_incompressibility"))])
    rewards.load(CPU, torch.float32)
    assert rewards.score(batch)["total"].values.tolist() == [0.0, 2.0, 1.0]


def test_a_group_reward_cannot_judge_and_an_unknown_one_is_named() -> None:
    with pytest.raises(UserError, match="^reward win_rate: .*Brightness looks at a whole group; let a reward judge that scores a sample alone"):
        loaded(reward=f"{HERE}:Brightness", reward_args={"scope": "group"})
    with pytest.raises(UserError, match="unknown reward 'brightnes'"):
        loaded(reward="brightnes")


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"reward": "ink", "url": "http://x", "model": "m"}, "reward and url are given; one of them is the judge, remove the other"),
        ({"url": "http://x"}, "needs both url and model"),
        ({"model": "m"}, "needs both url and model"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"temperature": True}, "temperature must be"),
        ({"temperature": 1.0, "url": "http://x", "model": "m"}, "needs a `reward` as the judge"),
        ({"opponents": 0}, "opponents must be a whole number of 1 or more, or nothing for all, not 0"),
        ({"opponents": 2.0}, "opponents must be"),
        ({"opponents": True}, "opponents must be"),
        ({"orders": "random"}, "orders must be coin or both, not 'random'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(args: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"^reward win_rate: .*{reason}"):
        WinRate(**args)


def test_without_any_judge_pickscore_judges() -> None:
    assert WinRate().name == "pickscore"
    assert "pickscore" in WinRate().info.description
