"""Advantages over all processes: by hand, the parts as the whole, what is remembered, and rewards without bounds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.core.estimators import CENTRES, SCALES, beta_parameters, beta_weight, group_success
from flowrl.core.history import PromptHistory
from flowrl.estimation import Estimator
from flowrl.sections import AdvantageConfig
from flowrl.types import Scores, UserError

NAN = math.nan
BOUNDS = (0.0, 1.0)
FP64: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
REWARDS = torch.tensor([0.0, 1.0, 0.5, 0.5, 0.25, 1.0, 1.0, 1.0])
GROUP = torch.arange(4).repeat_interleave(2)
PROMPTS = torch.tensor([7, 7, 8, 8, 9, 9, 7, 7])


def scores(values: Tensor | Sequence[float]) -> Scores:
    values = torch.as_tensor(values, dtype=torch.float32)
    return Scores(values, ~values.isnan())


def estimate(estimator: Estimator, values: Tensor | Sequence[float] = REWARDS, group: Tensor = GROUP, prompts: Tensor = PROMPTS, **more: Any) -> Tensor:
    """On one process."""
    found = scores(values)
    return estimator(found, found, group, int(group.max()) + 1, prompts=(prompts, prompts), **more)


def settings(centre: str, scale: str, **more: Any) -> AdvantageConfig:
    return AdvantageConfig(centre=centre, scale=scale, **more)  # type: ignore[arg-type]


def test_the_choices_of_the_config_are_those_of_the_core_and_the_history() -> None:
    fields = AdvantageConfig.model_fields
    for name, core in (("centre", CENTRES), ("scale", SCALES)):
        assert {*fields[name].annotation.__args__} == {*core, "history"} - {"given"}  # type: ignore[union-attr]


OLD = {
    "group_zscore": (("group", "group_std"), lambda r, m, s, spread, eps: (r - m) / (s + eps)),
    "global_std": (("group", "batch_std"), lambda r, m, s, spread, eps: (r - m) / (spread + eps)),
    "group_mean": (("group", "none"), lambda r, m, s, spread, eps: r - m),
    "reward": (("none", "none"), lambda r, m, s, spread, eps: r),
}


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("name", OLD)
def test_the_published_estimators_by_their_formulas(name: str, ddof: int) -> None:
    (centre, scale), formula = OLD[name]
    rewards = torch.rand(4, 6, generator=torch.Generator().manual_seed(1))
    each = rewards.double()
    expected = formula(each, each.mean(1, keepdim=True), each.std(1, correction=ddof, keepdim=True), each.flatten().std(correction=ddof), 1e-4)
    group = torch.arange(4).repeat_interleave(6)
    found = estimate(Estimator(settings(centre, scale, ddof=ddof)), rewards.flatten(), group)
    torch.testing.assert_close(found, expected.flatten(), rtol=1e-14, atol=1e-15)
    assert found.dtype == torch.float64


def test_the_history_bit_by_bit() -> None:
    history, estimator = PromptHistory(4, 2), Estimator(settings("history", "history", history_size=4, history_least=2, eps=1e-6))
    for seed in (1, 2, 3):
        rewards = torch.rand(8, generator=torch.Generator().manual_seed(seed))
        history.update(PROMPTS, rewards.double(), torch.ones(8, dtype=torch.bool))
        mean, std = history.statistics(PROMPTS)
        assert torch.equal(estimate(estimator, rewards), (rewards.double() - mean) / (std + 1e-6))


def test_a_sample_without_a_score_is_in_no_statistic() -> None:
    found = estimate(Estimator(settings("group", "batch_std", eps=1e-12)), [0.0, 1.0, NAN, 0.5], torch.tensor([0, 0, 1, 1]))
    std = (1 / 6) ** 0.5  # of 0, 1, 0.5
    torch.testing.assert_close(found, torch.tensor([-0.5 / std, 0.5 / std, 0.0, 0.0], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    raw = estimate(Estimator(settings("group", "none", singleton="raw")), [0.0, 1.0, NAN, 0.5], torch.tensor([0, 0, 1, 1]))
    assert raw.tolist() == [-0.5, 0.5, 0.0, 0.5]


def test_no_score_at_all_is_an_error() -> None:
    with pytest.raises(UserError, match="reward ink could score no sample of the iteration; see its own messages"):
        estimate(Estimator(settings("group", "none")), [NAN] * 8, name="ink")


def test_the_average_of_iterations_is_taken_off_before_it_learns_of_the_iteration() -> None:
    estimator = Estimator(settings("ema", "none", decay=0.75))
    group = torch.tensor([0, 1])
    assert estimate(estimator, [1.0, 3.0], group).tolist() == [-1.0, 1.0]  # its own mean at first
    assert estimate(estimator, [4.0, 6.0], group).tolist() == [2.0, 4.0]  # the first mean, 2
    assert estimate(estimator, [0.0, 1.0], group, name="other").tolist() == [-0.5, 0.5]  # another reward has its own
    expected = (0.75 * 0.25 * 2 + 0.25 * 5) / (0.75 * 0.25 + 0.25)
    assert estimate(estimator, [1.0, 1.0], group).tolist() == pytest.approx([1 - expected] * 2)


@pytest.mark.parametrize(("centre", "scale"), [("ema", "none"), ("history", "history"), ("group", "history"), ("ema", "history")])
def test_what_is_remembered_survives_a_checkpoint(centre: str, scale: str) -> None:
    config = settings(centre, scale, history_size=4, history_least=2)
    first, resumed = Estimator(config), Estimator(config)
    estimate(first)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    other = REWARDS.flip(0)
    assert torch.equal(estimate(resumed, other), estimate(first, other))
    plain = Estimator(settings("group", "none"))
    assert plain.state_dict() is None
    for one, state in ((plain, first.state_dict()), (resumed, None)):
        with pytest.raises(UserError, match="disagree on whether rewards are remembered"):
            one.load_state_dict(state)


def test_a_history_and_an_average_are_not_each_other() -> None:
    state = Estimator(settings("ema", "none")).state_dict()
    with pytest.raises(UserError, match="disagree on whether rewards are remembered"):
        Estimator(settings("history", "none")).load_state_dict(state)


def test_ngrpo_pushes_a_group_of_failures_away() -> None:
    config = settings("virtual_max", "group_std", ddof=1, eps=1e-12)
    found = estimate(Estimator(config, bounds=(0.0, 2.0)), [0.0, 0.0, 0.0, 2.0, 2.0, 2.0], torch.tensor([0, 0, 0, 1, 1, 1]))
    assert found.tolist() == pytest.approx([-0.5] * 3 + [0.0] * 3)  # -1 / sqrt(G + 1), whatever the highest reward
    two = estimate(Estimator(settings("virtual_max", "none", virtual=2), bounds=(0.0, 1.0)), [0.0, 1.0], torch.tensor([0, 0]))
    assert two.tolist() == [-0.75, 0.25]


def test_bnpo_by_its_parts() -> None:
    bounds = (-1.0, 3.0)
    config = settings("group", "beta")
    rewards = REWARDS * 4 - 1
    found = estimate(Estimator(config, bounds=bounds), rewards)
    counted = torch.ones(8, dtype=torch.bool)
    success, known = group_success(REWARDS.double(), GROUP, counted, 4, (0.0, 1.0))
    weight = beta_weight(success, beta_parameters(success, known))[GROUP]
    means = torch.tensor([0.5, 0.5, 0.625, 1.0]).repeat_interleave(2)
    torch.testing.assert_close(found, (REWARDS.double() - means) * weight, **FP64)


@pytest.mark.parametrize(
    ("centre", "scale", "bounds", "line"),
    [
        ("virtual_max", "none", None, "advantage.centre: virtual_max adds rewards of the highest value, and these rewards have no highest value; "),
        ("virtual_max", "none", (0.0, math.inf), "advantage.centre: virtual_max adds rewards of the highest value, "),
        ("group", "beta", None, "advantage.scale: beta takes rewards as success rates, and these rewards have no lowest and highest value; "),
        ("group", "beta", (-math.inf, 1.0), "advantage.scale: beta takes rewards as success rates, "),
        ("group", "beta", (1.0, 1.0), "advantage.scale: beta takes rewards as success rates, "),
    ],
)
def test_rewards_without_the_bounds_that_are_needed_are_refused(centre: str, scale: str, bounds: tuple[float, float] | None, line: str) -> None:
    with pytest.raises(UserError, match=f"^{line}"):
        Estimator(settings(centre, scale), bounds=bounds)
    Estimator(settings("virtual_max", "none"), bounds=(-math.inf, 1.0))


def test_lengths_weigh_a_group() -> None:
    estimator = Estimator(settings("length_weighted", "none"))
    found = estimate(estimator, [0.0, 1.0], torch.tensor([0, 0]), lengths=torch.tensor([3, 1]))
    assert found.tolist() == [-0.25, 0.75]
    with pytest.raises(ValueError, match="needs the lengths"):
        estimate(estimator, [0.0, 1.0], torch.tensor([0, 0]))


def test_samples_from_elsewhere_are_compared_and_not_counted() -> None:
    own = torch.tensor([True, True, False, True])
    group = torch.zeros(4, dtype=torch.int64)
    values = [0.0, 1.0, 5.0, 2.0]
    for centre in ("group", "batch"):
        assert estimate(Estimator(settings(centre, "none")), values, group, stats_mask=(own, own)).tolist() == [-1.0, 0.0, 4.0, 1.0]
    std = (2 / 3) ** 0.5
    for scale in ("batch_std", "batch_std_centred", "group_std"):
        found = estimate(Estimator(settings("group", scale, eps=1e-12)), values, group, stats_mask=(own, own))
        assert found.tolist() == pytest.approx([-1 / std, 0.0, 4 / std, 1 / std])


@pytest.mark.parametrize("scale", ["none", "group_std", "batch_std", "batch_std_centred", "beta", "history"])
@pytest.mark.parametrize("centre", ["none", "batch", "group", "leave_one_out", "length_weighted", "virtual_max", "best_minus_second", "ema", "history"])
@pytest.mark.parametrize("masked", [False, True])
def test_two_processes_find_what_one_finds(centre: str, scale: str, masked: bool) -> None:
    config = settings(centre, scale, ddof=1, history_size=8, history_least=3)
    lengths = torch.tensor([3, 1, 2, 2, 5, 1, 1, 4])
    mask = torch.tensor([True, True, True, False, True, True, True, True]) if masked else None
    whole = Estimator(config, bounds=BOUNDS)
    expected = [estimate(whole, values, lengths=lengths, stats_mask=mask if mask is None else (mask, mask)) for values in (REWARDS, REWARDS.flip(0))]

    def of_part(part: slice, add: Callable[[float], float]) -> list[Tensor]:
        estimator = Estimator(config, add, BOUNDS)
        found = []
        for values in (REWARDS, REWARDS.flip(0)):
            here, group = scores(values[part]), GROUP[part] - GROUP[part][0]
            prompts = (PROMPTS[part], PROMPTS)
            more = {"lengths": lengths[part], "stats_mask": None if mask is None else (mask[part], mask)}
            found.append(estimator(here, scores(values), group, int(group.max()) + 1, prompts=prompts, **more))
        return found

    parts = in_step([slice(0, 2), slice(2, 8)], of_part)
    for number in (0, 1):
        torch.testing.assert_close(torch.cat([part[number] for part in parts]), expected[number], **FP64)


def in_step(parts: Sequence[slice], work: Callable[[slice, Callable[[float], float]], list[Tensor]]) -> list[list[Tensor]]:
    """``work`` on every part at once, each in a thread; their sums meet like those of processes, and a missing one is an error."""
    barrier, values = Barrier(len(parts), timeout=20), [0.0] * len(parts)

    def run(rank: int) -> list[Tensor]:
        def add(value: float) -> float:
            values[rank] = value
            barrier.wait()
            total = sum(values)
            barrier.wait()
            return total

        return work(parts[rank], add)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, range(len(parts))))
