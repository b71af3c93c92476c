"""rewards/ensemble.py: reductions by hand, a member that fails, and one line for every mistake."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch

from flowrl.types import Prompt, RewardInfo, SampleBatch, Scores, UserError
from rewards.ensemble import Ensemble
from rewards.win_rate import WinRate

CPU = torch.device("cpu")
TWO = [{"name": "toys:brightness", "label": "light"}, {"name": "toys:redness", "shift": -1, "scale": 2}]


def batch_of(*colors: tuple[float, float, float]) -> SampleBatch:
    images = torch.stack([torch.tensor(color)[:, None, None].expand(3, 4, 4) for color in colors])
    return SampleBatch([Prompt(f"picture {i}") for i in range(len(colors))], images)


def loaded(**options: object) -> Ensemble:
    ensemble = Ensemble(TWO, **options)  # type: ignore[arg-type]
    ensemble.load(CPU, torch.float32)
    return ensemble


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"reduce": "mean"}, [1.75, 1.0]),
        ({"reduce": "min"}, [0.5, 0.0]),
        ({"reduce": "median"}, [1.75, 1.0]),
        ({"reduce": "lcb"}, [0.5, 0.0]),  # of two, mean - std is the lower one
        ({"reduce": "lcb", "penalty": 0.5}, [1.125, 0.5]),
    ],
)
def test_reductions_by_hand(options: dict[str, object], expected: list[float]) -> None:
    # light 0.5 and (0.5 + 1) 2 = 3; light 0 and (0 + 1) 2 = 2
    scores = loaded(**options).score(batch_of((0.75, 0.5, 0.25), (0, 0, 0)))
    torch.testing.assert_close(scores.values, torch.tensor(expected))
    torch.testing.assert_close(scores.raw["light"], torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(scores.raw["toys:redness"], torch.tensor([3.0, 2.0]))
    torch.testing.assert_close(scores.raw["spread"], torch.tensor([1.25, 1.0]))
    assert scores.valid.all()


def test_what_one_member_cannot_score_is_invalid_and_says_who_and_why() -> None:
    ensemble = Ensemble(["jpeg_compressibility", "scene"])
    ensemble.load(CPU, torch.float32)
    images = torch.rand(2, 3, 32, 32)
    images[1, 0, 0, 0] = math.nan
    scores = ensemble.score(SampleBatch([Prompt("a red circle"), Prompt("a blue square")], images))
    assert scores.valid.tolist() == [True, False]
    assert "reward jpeg_compressibility on the prompt 'a blue square'" in scores.problems[1]


def test_it_takes_over_what_its_members_need() -> None:
    info = Ensemble([{"name": "toys:brightness"}, {"name": "ink"}]).info
    assert (info.scope, info.batch_size, info.reads) == ("sample", 64, ())
    assert Ensemble().info.name == "ensemble"
    Ensemble().check_prompts([])
    Ensemble().to(CPU)
    Ensemble().close()
    ensemble = loaded()
    ensemble.check_prompts([Prompt("x")])
    ensemble.to(CPU)
    ensemble.close()


class Movable:
    """A reward that notes where it is."""

    def __init__(self) -> None:
        from flowrl.types import RewardInfo

        self.info = RewardInfo("movable", "for tests", 0.0, 1.0)
        self.places: list[torch.device] = []

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        self.places.append(device)

    def to(self, device: torch.device) -> None:
        self.places.append(device)

    def score(self, batch: SampleBatch):
        raise AssertionError


def test_members_move_with_it() -> None:
    ensemble = Ensemble([{"name": "test_rewards_ensemble:Movable"}, {"name": "toys:redness"}])
    ensemble.to(torch.device("meta"))
    assert ensemble._members is not None
    assert ensemble._members.entry_of("test_rewards_ensemble:Movable").reward.places == [torch.device("meta")]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "sum"}, "reduce must be mean, median, min or lcb, not 'sum'"),
        ({"penalty": -1}, "penalty must be at least 0, not -1"),
        ({"members": [3]}, "a member is {name"),
        ({"members": [{"name": "ink", "weight": 2}]}, "a member has no weight; it takes name, label, args, shift, scale"),
        ({"members": [{"name": "ink", "scale": "2"}]}, "scale of ink must be a finite number, not '2'"),
        ({"members": [{"name": "ink", "scale": 0}]}, "ink with scale 0 says nothing"),
        ({"members": ["ink", "ink"]}, "reward ink is listed 2 times"),
        ({"members": ["inc"]}, "unknown reward 'inc'"),
    ],
)
def test_mistakes(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Ensemble(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("members", [[], ["ink"]])
def test_fewer_than_two_members_are_refused_when_it_is_loaded(members: list[str]) -> None:
    with pytest.raises(UserError, match="needs at least two members"):
        Ensemble(members).load(CPU, torch.float32)  # type: ignore[arg-type]


def test_scoring_comes_after_loading() -> None:
    with pytest.raises(RuntimeError, match="load must be called before score"):
        Ensemble().score(batch_of((0, 0, 0)))


class Noted:
    """Brightness; it notes the precision that it is loaded in."""

    dtypes: ClassVar[list[torch.dtype]] = []

    def __init__(self, name: str = "noted") -> None:
        self.info = RewardInfo(name, "for tests", 0.0, 1.0, dtype="bfloat16", weights_license="MIT", metadata=("colour",))

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        self.dtypes.append(dtype)

    def score(self, batch: SampleBatch) -> Scores:
        raise NotImplementedError


@pytest.mark.parametrize(("device", "given", "expected"), [("meta", "float32", "bfloat16"), ("meta", "float16", "float16"), ("cpu", "float32", "float32")])
def test_members_are_loaded_in_the_precision_that_they_ask_for(device: str, given: str, expected: str) -> None:
    Noted.dtypes.clear()
    made = "test_rewards_ensemble:Noted"
    ensemble = Ensemble([{"name": made, "label": "a"}, {"name": made, "label": "b"}])
    assert ensemble.info.weights_license == "MIT"
    for reward in (ensemble, WinRate(reward=made)):
        reward.load(torch.device(device), getattr(torch, given))
    assert Noted.dtypes == [getattr(torch, expected)] * 3


def test_what_the_judging_reward_of_a_win_rate_needs_is_looked_for_before_the_run() -> None:
    with pytest.raises(UserError, match="needs `colour` in the metadata of every prompt"):
        WinRate(reward="test_rewards_ensemble:Noted").check_prompts([Prompt("a")])
