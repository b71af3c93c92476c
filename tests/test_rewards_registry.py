"""rewards/registry.py and rewards/composite.py: finding rewards by name, summing them, and one clear line for every mistake."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from flowrl.types import Prompt, Reward, RewardInfo, SampleBatch, Scores, UserError
from rewards import REWARDS, ConstantRewardMonitor, FunctionReward, WeightedRewards, list_rewards, load_reward

CPU = torch.device("cpu")
NAN = float("nan")
WriteModule = Callable[..., str]


class Planted:
    """A reward that says what it is told: `score` calls the given function."""

    def __init__(self, function: Callable[[SampleBatch], object], batch_size: int = 64, scope: Literal["sample", "pair", "group"] = "sample") -> None:
        self.info = RewardInfo("planted", "for tests", 0.0, 1.0, batch_size=batch_size, scope=scope)
        self.function = function
        self.calls: list[list[str]] = []
        self.loaded: list[object] = []

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        self.loaded.append((device, dtype))

    def score(self, batch: SampleBatch) -> Scores:
        self.calls.append([prompt.text for prompt in batch.prompts])
        return self.function(batch)  # type: ignore[return-value]


def brightness(batch: SampleBatch) -> Scores:
    """The mean pixel, and the mean red as a raw column."""
    assert batch.images is not None
    return Scores(batch.images.mean((1, 2, 3)), torch.ones(len(batch), dtype=torch.bool), {"red": batch.images[:, 0].mean((1, 2))})


def make_batch(num: int = 5) -> SampleBatch:
    images = torch.rand(num, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return SampleBatch([Prompt(f"prompt {i}") for i in range(num)], images, [f"text {i}" for i in range(num)], torch.arange(num) // 2)


def loaded(*rewards: tuple[str, float, Reward]) -> WeightedRewards:
    weighted = WeightedRewards(rewards)
    weighted.load(CPU, torch.float32)
    return weighted


def scores_of(values: list[float], valid: list[bool] | None = None) -> Scores:
    return Scores(torch.tensor(values), torch.tensor(valid if valid is not None else [True] * len(values)))


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WriteModule]:
    """Writes a module into a new current folder; the interpreter forgets it after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])

    def write(source: str, name: str = "planted_rewards") -> str:
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return name

    yield write
    sys.modules.pop("planted_rewards", None)


# --- the table


def test_every_registered_name_gives_a_reward_whose_info_has_that_name() -> None:
    infos = list_rewards()
    assert [info.name for info in infos] == list(REWARDS)
    assert all(info.description and info.low < info.high for info in infos)


def test_listing_rewards_loads_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("load was called")

    monkeypatch.setattr("rewards.scene.SceneReward.load", refuse)
    monkeypatch.setattr("rewards.jpeg.JpegReward.load", refuse)
    assert len(list_rewards()) == len(REWARDS)


def test_arguments_of_the_config_reach_a_registered_reward() -> None:
    assert "quality 50" in load_reward("jpeg_compressibility", {"quality": 50}).info.description
    assert load_reward("scene", {"form": "strict"}).info.name == "scene_strict"


@pytest.mark.parametrize(
    ("name", "near"), [("scen", "scene"), ("SCENES", "scene"), ("Scene-Strct", "scene_strict"), ("jpeg_compresibility", "jpeg_compressibility")]
)
def test_a_misspelt_name_suggests_the_nearest_and_the_command_that_lists_them(name: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"^unknown reward '{name}' \(did you mean '{near}'\?\); see `flowrl rewards`, or .*module:attribute$"):
        load_reward(name)


def test_a_name_like_no_other_has_no_suggestion() -> None:
    with pytest.raises(UserError, match=r"^unknown reward 'zzz'; see `flowrl rewards`"):
        load_reward("zzz")


# --- import strings


def test_a_function_in_the_current_folder_is_a_reward_with_its_arguments_bound(write_module: WriteModule) -> None:
    name = write_module(
        '''
        def constant(batch, value=1.0):
            """The same for all.

            More text.
            """
            return [value] * len(batch)
        '''
    )
    reward = load_reward(f"{name}:constant", {"value": 0.25})
    assert isinstance(reward, FunctionReward)
    assert (reward.info.name, reward.info.description, reward.info.source) == ("constant", "The same for all.", f"{name}:constant")
    reward.load(CPU, torch.float32)
    scores = reward.score(make_batch(3))
    assert torch.equal(scores.values, torch.tensor([0.25, 0.25, 0.25]))
    assert scores.valid.all()
    assert torch.equal(load_reward(f"{name}:constant").score(make_batch(2)).values, torch.ones(2))


@pytest.mark.parametrize("annotation", ["SampleBatch", '"SampleBatch"', "types.SampleBatch"])
def test_a_first_parameter_annotated_sample_batch_makes_a_scoring_function_under_any_name(write_module: WriteModule, annotation: str) -> None:
    name = write_module(
        f"""
        from __future__ import annotations
        from flowrl import types
        from flowrl.types import SampleBatch
        def count(samples: {annotation}):
            return range(len(samples))
        """
    )
    assert load_reward(f"{name}:count").score(make_batch(3)).values.tolist() == [0, 1, 2]


def test_classes_factories_objects_closures_and_callables_are_told_apart(write_module: WriteModule) -> None:
    name = write_module(
        """
        import functools
        import torch
        from flowrl.types import RewardInfo, SampleBatch, Scores

        class Constant:
            info = RewardInfo("constant", "the same for all", 0.0, 1.0)  # on the class: the class itself looks like a reward
            def __init__(self, value=1.0):
                self.value = value
            def load(self, device, dtype): ...
            def score(self, batch):
                return Scores(torch.full((len(batch),), self.value), torch.ones(len(batch), dtype=torch.bool))

        class Callable:
            def __init__(self, value): self.value = value
            def __call__(self, batch): return [self.value] * len(batch)

        class Shelf:
            ready = Constant(0.5)

        def factory(value=2.0, batch_size=1): return Constant(value)
        def closure(value):
            def score(samples: SampleBatch): return torch.full((len(samples),), value)
            return score
        plain = Callable(4.0)
        preset = functools.partial(closure(7.0))
        """
    )
    cases = [
        ("Constant", {}, 1.0),
        ("Constant", {"value": 3.0}, 3.0),
        ("factory", {}, 2.0),
        ("factory", {"value": 5.0}, 5.0),
        ("closure", {"value": 6.0}, 6.0),
        ("Callable", {"value": 8.0}, 8.0),
        ("plain", {}, 4.0),
        ("preset", {}, 7.0),
        ("Shelf.ready", {}, 0.5),
    ]
    for attribute, args, expected in cases:
        reward = load_reward(f"{name}:{attribute}", args)
        assert isinstance(reward, Reward), attribute
        assert reward.score(make_batch(2)).values.tolist() == [expected] * 2, attribute


def test_a_function_may_return_scores_with_invalid_samples(write_module: WriteModule) -> None:
    name = write_module(
        """
        import torch
        from flowrl.types import Scores
        def half(batch): return Scores(torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))
        """
    )
    assert load_reward(f"{name}:half").score(make_batch(2)).valid.tolist() == [True, False]


def test_the_own_imports_of_a_reward_file_work_also_when_it_scores(write_module: WriteModule, tmp_path: Path) -> None:
    (tmp_path / "planted_helper.py").write_text("VALUE = 3.0\n")
    name = write_module("def late(batch):\n    import planted_helper\n    return [planted_helper.VALUE] * len(batch)\n")
    try:
        assert load_reward(f"{name}:late").score(make_batch(1)).values.tolist() == [3.0]
    finally:
        sys.modules.pop("planted_helper", None)


@pytest.mark.parametrize("name", [":score", "rewards:", "a:b:c", "folder/file:score", "two words:score", "a..b:c"])
def test_a_malformed_import_string_is_explained(name: str) -> None:
    with pytest.raises(UserError, match=f"^reward '{re.escape(name)}' is no import string; write module:attribute, such as"):
        load_reward(name)


def test_a_module_that_is_not_there_is_named_with_the_folder_that_was_searched(write_module: WriteModule, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^reward 'nowhere_at_all:f': no module 'nowhere_at_all' .* in {re.escape(str(tmp_path))}$"):
        load_reward("nowhere_at_all:f")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import package_that_is_missing\n", "ModuleNotFoundError: No module named 'package_that_is_missing'"),
        ("def f(:\n", "SyntaxError: invalid syntax"),
        ("raise ValueError('first\\nsecond')\n", "ValueError: first second"),
        ("raise ValueError('x' * 999)\n", r"x\.\.\.$"),
    ],
)
def test_a_module_that_fails_while_it_is_imported_is_named_with_the_reason(write_module: WriteModule, source: str, reason: str) -> None:
    name = write_module(source)
    with pytest.raises(UserError, match=f"^reward '{name}:f': importing module '{name}' failed with .*{reason}") as caught:
        load_reward(f"{name}:f")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert caught.value.__cause__ is not None


def test_a_missing_attribute_suggests_the_nearest(write_module: WriteModule) -> None:
    name = write_module("def sharpness(batch): ...\n")
    with pytest.raises(UserError, match=rf"module '{name}' \(.*{name}\.py\) has no attribute 'sharpnes' \(did you mean 'sharpness'\?\)$"):
        load_reward(f"{name}:sharpnes")
    with pytest.raises(UserError, match=r"module 'math' \(.*\) has no attribute 'zzz'$"):
        load_reward("math:zzz")


# --- arguments and results


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("jpeg_compressibility", {"qualty": 3}, r"has no argument 'qualty' \(did you mean 'quality'\?\); it takes quality$"),
        ("scene", {"shape": 3}, r"^reward 'scene' has no argument 'shape'.*; it takes form$"),
        ("scene_strict", {"form": "strict"}, r"has no argument 'form'; it takes none$"),
        (
            "planted_rewards:score",
            {"wieght": 1, "bias": 0},
            r"has no argument 'wieght' \(did you mean 'weight'\?\); it takes bias, weight$",
        ),
        ("planted_rewards:score", {"weight": 1}, r"^reward 'planted_rewards:score' needs the argument 'bias'; set it under `args`$"),
        ("planted_rewards:score", {"batch": 1, "bias": 1}, r"has no argument 'batch'; it takes bias, weight$"),
        ("planted_rewards:flow", {}, r"needs the argument 'images'; .*\(a scoring function calls its first parameter `batch`\)$"),
        ("planted_rewards:Needy", {}, r"needs the argument 'model'; set it under `args`$"),
        ("planted_rewards:keyword_only", {}, r"needs the argument 'batch'"),
        ("planted_rewards:anything", {"x": 1}, r"could not be made with args \{'x': 1\}: ZeroDivisionError: division by zero$"),
        ("planted_rewards:polite", {}, r"^please set a model$"),
        ("scene", {"form": "loose"}, r"^reward scene: form must be graded or strict"),
    ],
)
def test_arguments_that_do_not_fit_are_named(write_module: WriteModule, name: str, args: dict[str, object], message: str) -> None:
    write_module(
        """
        from flowrl.types import UserError
        def score(batch, bias, weight=1.0): return [weight] * len(batch)
        def flow(images, prompts): ...
        def keyword_only(*, batch): ...
        def anything(*rest, **options): return 1 / 0
        def polite(): raise UserError("please set a model")
        class Needy:
            def __init__(self, model): ...
        """
    )
    with pytest.raises(UserError, match=message):
        load_reward(name, args)


@pytest.mark.parametrize(
    ("attribute", "args", "message"),
    [
        (
            "nothing",
            {},
            r"^reward 'planted_rewards:nothing' gave NoneType; give an object with info, load and score, or a function of `batch`$",
        ),
        ("gives_class", {}, r"gave type; give an object"),
        ("number", {}, r"^reward 'planted_rewards:number' is int without info, load, score; a reward has info, load and score$"),
        ("scorer", {}, r"is Scorer without info, load; "),
        ("ready", {"value": 1}, r"is a finished object and takes no args; remove value, or name its class$"),
        ("untold", {}, r"info is str; make it a flowrl\.types\.RewardInfo$"),
        ("builtin", {}, r"gave dict; give an object"),
    ],
)
def test_what_is_no_reward_is_refused(write_module: WriteModule, attribute: str, args: dict[str, object], message: str) -> None:
    name = write_module(
        """
        from flowrl.types import RewardInfo
        class Ready:
            info = RewardInfo("ready", "", 0.0, 1.0)
            def load(self, device, dtype): ...
            def score(self, batch): ...
        class Scorer:
            def score(self, batch): ...
        def nothing(): ...
        def gives_class(): return Ready
        number, scorer, ready, untold, builtin = 3, Scorer(), Ready(), Ready(), dict
        untold.info = "a text"
        """
    )
    with pytest.raises(UserError, match=message):
        load_reward(f"{name}:{attribute}", args)


@pytest.mark.parametrize("result", ["good", None, {"a": 1}, [1.0, None], [[1.0], [1.0, 2.0]]])
def test_a_function_that_returns_no_numbers_is_an_error_that_names_it(result: object) -> None:
    reward = FunctionReward("odd", lambda batch: result)  # type: ignore[arg-type,return-value]
    with pytest.raises(UserError, match=f"^reward odd: the function returned {type(result).__name__} that is no list of numbers .*Error.*; return a tensor"):
        reward.score(make_batch(2))


def test_a_function_without_a_docstring_is_described_as_such() -> None:
    assert FunctionReward("plain", lambda batch: [0.0]).info.description == "a function without a docstring"


# --- weighted sums


def test_the_total_is_the_weighted_sum_of_the_values() -> None:
    batch = make_batch(3)
    ones = Planted(lambda batch: Scores(torch.arange(len(batch)) + 1.0, torch.ones(len(batch), dtype=torch.bool)))
    weighted = loaded(("bright", 2.0, Planted(brightness)), ("count", -0.5, ones), ("watched", 0.0, Planted(brightness)))
    scores = weighted.score(batch)
    assert list(scores) == ["bright", "count", "watched", "total"]
    assert weighted.names == ("bright", "count", "watched")
    assert weighted.weights == {"bright": 2.0, "count": -0.5, "watched": 0.0}
    assert batch.images is not None
    torch.testing.assert_close(scores["total"].values, 2 * batch.images.mean((1, 2, 3)) - 0.5 * torch.tensor([1.0, 2.0, 3.0]))
    assert scores["total"].values.dtype == torch.float32
    assert scores["total"].valid.all()
    assert dict(scores["total"].raw) == {}


def test_a_sample_invalid_in_one_reward_is_nan_and_invalid_in_the_total_and_never_zero() -> None:
    first = Planted(lambda batch: scores_of([1.0, 0.0, 3.0], [True, False, True]))  # 0.0 in an invalid place becomes NaN
    second = Planted(lambda batch: scores_of([1.0, 2.0, NAN], [True, True, False]))
    scores = loaded(("first", 1.0, first), ("second", 1.0, second)).score(make_batch(3))
    assert scores["first"].valid.tolist() == [True, False, True]
    assert scores["first"].values.isnan().tolist() == [False, True, False]
    assert scores["second"].values.isnan().tolist() == [False, False, True]
    assert scores["total"].valid.tolist() == [True, False, False]
    assert scores["total"].values.isnan().tolist() == [False, True, True]
    assert scores["total"].values[0] == 2


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_batches_of_any_size_give_what_single_samples_give(batch_size: int) -> None:
    batch, reward = make_batch(5), Planted(brightness, batch_size)
    scores = loaded(("bright", 1.0, reward)).score(batch)["bright"]
    assert [len(call) for call in reward.calls] == {1: [1] * 5, 2: [2, 2, 1], 5: [5], 64: [5]}[batch_size]
    assert [text for call in reward.calls for text in call] == [prompt.text for prompt in batch.prompts]
    expected = brightness(batch)
    torch.testing.assert_close(scores.values, expected.values)
    torch.testing.assert_close(scores.raw["red"], expected.raw["red"])


def test_the_order_of_the_samples_does_not_change_their_scores() -> None:
    batch, order = make_batch(5), [3, 0, 4, 2, 1]
    assert batch.images is not None
    shuffled = SampleBatch([batch.prompts[i] for i in order], batch.images[order])
    weighted = loaded(("bright", 1.0, Planted(brightness, 2)), ("jpeg", 0.1, load_reward("jpeg_compressibility")))
    straight, mixed = weighted.score(batch), weighted.score(shuffled)
    for name in straight:
        torch.testing.assert_close(straight[name].values[order], mixed[name].values)


def test_every_part_of_the_batch_is_cut_at_the_same_places() -> None:
    def together(batch: SampleBatch) -> Scores:
        assert batch.images is not None
        assert batch.texts is not None
        assert batch.group is not None
        assert len(batch) == len(batch.images) == len(batch.texts) == len(batch.group)
        numbers = [int(prompt.text.split()[1]) for prompt in batch.prompts]
        assert batch.texts == [f"text {i}" for i in numbers]
        assert batch.group.tolist() == [i // 2 for i in numbers]
        return brightness(batch)

    loaded(("parts", 1.0, Planted(together, 2))).score(make_batch(5))


def test_a_reward_of_texts_needs_no_images() -> None:
    reward = FunctionReward("length", lambda batch: [len(text) for text in batch.texts or ()])
    batch = SampleBatch([Prompt("a"), Prompt("b")], texts=["one", "three"])
    assert loaded(("length", 1.0, reward)).score(batch)["total"].values.tolist() == [3, 5]


@pytest.mark.parametrize("scope", ["group", "pair"])
def test_a_reward_of_groups_gets_the_whole_batch(scope: Literal["pair", "group"]) -> None:
    reward = Planted(brightness, 2, scope)
    loaded(("grouped", 1.0, reward)).score(make_batch(5))
    assert [len(call) for call in reward.calls] == [5]


def test_scoring_runs_without_gradient_and_outside_autocast() -> None:
    seen = []

    def look(batch: SampleBatch) -> Scores:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        with torch.enable_grad():
            return Scores(torch.ones(len(batch), requires_grad=True) * 2, torch.ones(len(batch), dtype=torch.bool))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = loaded(("look", 1.0, Planted(look))).score(make_batch(2))
    assert seen == [(False, False)]
    assert not scores["look"].values.requires_grad


def test_scores_in_half_precision_come_back_as_float32() -> None:
    half = Planted(lambda batch: Scores(torch.full((len(batch),), 0.5, dtype=torch.bfloat16), torch.ones(len(batch), dtype=torch.bool)))
    values = loaded(("half", 1.0, half)).score(make_batch(2))["half"].values
    assert values.dtype == torch.float32
    assert values.tolist() == [0.5, 0.5]


def test_load_reaches_every_reward_with_its_device_and_dtype() -> None:
    first, second = Planted(brightness), Planted(brightness)
    WeightedRewards([("first", 1.0, first), ("second", 1.0, second)]).load(CPU, torch.bfloat16)
    assert first.loaded == second.loaded == [(CPU, torch.bfloat16)]


# --- rewards that break


def test_a_reward_that_cannot_be_loaded_is_named() -> None:
    def fail(device: torch.device, dtype: torch.dtype) -> None:
        raise OSError("weights are missing")

    reward = Planted(brightness)
    reward.load = fail  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"^reward bright could not be loaded: OSError: weights are missing$") as caught:
        loaded(("bright", 1.0, reward))
    assert isinstance(caught.value.__cause__, OSError)


def test_a_reward_that_raises_is_named_with_the_first_prompt_that_fails_and_the_cause_is_chained() -> None:
    def fussy(batch: SampleBatch) -> Scores:
        if any(prompt.text in ("prompt 3", "prompt 4") for prompt in batch.prompts):
            raise KeyError("no such\nword")
        return brightness(batch)

    message = r"^reward fussy failed on the prompt 'prompt 3': KeyError: 'no such\\nword'; correct the reward, or let it return valid=False"
    with pytest.raises(UserError, match=message) as caught:
        loaded(("bright", 1.0, Planted(brightness)), ("fussy", 1.0, Planted(fussy, 64))).score(make_batch(5))
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_reward_that_only_raises_for_many_samples_at_once_is_named_with_the_first_prompt_of_the_batch() -> None:
    def crowded(batch: SampleBatch) -> Scores:
        if len(batch) > 1 and batch.prompts[0].text == "prompt 2":
            raise MemoryError("too many")
        return brightness(batch)

    with pytest.raises(UserError, match=r"^reward crowded failed on 2 samples together, the first with the prompt 'prompt 2': MemoryError: too many"):
        loaded(("crowded", 1.0, Planted(crowded, 2))).score(make_batch(5))


def test_a_reward_of_groups_that_raises_is_not_tried_on_single_samples() -> None:
    def fail(batch: SampleBatch) -> Scores:
        raise ValueError("bad group")

    reward = Planted(fail, scope="group")
    with pytest.raises(UserError, match=r"^reward grouped failed on 5 samples together, the first with the prompt 'prompt 0': ValueError: bad group"):
        loaded(("grouped", 1.0, reward)).score(make_batch(5))
    assert len(reward.calls) == 1


def test_a_message_that_a_reward_wrote_for_the_user_is_not_dressed_up() -> None:
    def fail(batch: SampleBatch) -> Scores:
        raise UserError("reward scene: not a scene caption")

    with pytest.raises(UserError, match=r"^reward scene failed on the prompt 'prompt 0': not a scene caption$"):
        loaded(("scene", 1.0, Planted(fail))).score(make_batch(1))


@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")])
def test_a_score_that_is_no_number_on_a_valid_sample_is_named_with_its_prompt(value: float) -> None:
    reward = Planted(lambda batch: scores_of([NAN, 1.0, value], [False, True, True]))
    with pytest.raises(UserError, match=f"^reward broken returned {value} for the prompt 'prompt 2'; return a finite score, or valid=False"):
        loaded(("broken", 1.0, reward)).score(make_batch(3))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(3), "returned Tensor for 3 samples, the first with the prompt 'prompt 0'; return flowrl.types.Scores"),
        (None, "returned NoneType for 3 samples"),
        (scores_of([1.0, 2.0]), r"returned values of shape \[2\] for 3 samples, .*'prompt 0'; return one entry per sample, shape \[3\]"),
        (scores_of([1.0, 2.0, 3.0, 4.0]), r"returned values of shape \[4\] for 3 samples"),
        (Scores(torch.zeros(3, 1), torch.ones(3, dtype=torch.bool)), r"returned values of shape \[3, 1\]"),
        (Scores(torch.zeros(3), torch.ones(1, dtype=torch.bool)), r"returned valid of shape \[1\]"),
        (Scores([0.0] * 3, torch.ones(3, dtype=torch.bool)), r"returned values as list .*; return a tensor \[3\]"),  # type: ignore[arg-type]
        (Scores(torch.zeros(3), None), "returned valid as NoneType"),  # type: ignore[arg-type]
        (Scores(torch.zeros(3), torch.ones(3)), r"returned .* valid of torch\.float32 .*; return torch\.float32 and torch\.bool"),
        (Scores(torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)), r"returned values of torch\.int64"),
        (Scores(torch.zeros(3), torch.ones(3, dtype=torch.bool), {"a": torch.zeros(2)}), r"returned raw 'a' of shape \[2\]"),
        (Scores(torch.zeros(3), torch.ones(3, dtype=torch.bool), {"values": [1]}), "returned raw 'values' as list"),  # type: ignore[dict-item]
        (Scores(torch.zeros(3), torch.ones(3, dtype=torch.bool), None), "returned raw as NoneType"),  # type: ignore[arg-type]
    ],
)
def test_an_output_of_the_wrong_type_or_length_is_named_with_the_first_prompt(result: object, message: str) -> None:
    with pytest.raises(UserError, match=f"^reward broken {message}") as caught:
        loaded(("broken", 1.0, Planted(lambda batch: result))).score(make_batch(3))
    assert "\n" not in str(caught.value)


def test_a_raw_column_that_a_batch_lacks_has_nothing_to_say_there() -> None:
    reward = Planted(lambda b: Scores(torch.zeros(2), torch.ones(2, dtype=torch.bool), {b.prompts[0].text: torch.zeros(2)}), 2)
    raw = loaded(("odd", 1.0, reward)).score(make_batch(4))["odd"].raw
    assert {name: column.isnan().tolist() for name, column in raw.items()} == {
        "prompt 0": [False, False, True, True],
        "prompt 2": [True, True, False, False],
    }


def test_long_prompts_are_cut_and_kept_on_one_line_in_messages() -> None:
    reward = Planted(lambda batch: scores_of([NAN]))
    with pytest.raises(UserError) as caught:
        loaded(("broken", 1.0, reward)).score(SampleBatch([Prompt("a\n" * 500)]))
    assert "\n" not in str(caught.value)
    assert "'a a a" in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_total_that_overflows_is_an_error() -> None:
    reward = Planted(lambda batch: scores_of([1.0, 1e30]))
    with pytest.raises(UserError, match=r"^the weighted sum of the rewards overflows for the prompt 'prompt 1'; use smaller weights$"):
        loaded(("large", 1e30, reward)).score(make_batch(2))


def test_an_empty_batch_parts_of_unequal_length_and_a_forgotten_load_are_refused() -> None:
    weighted = loaded(("bright", 1.0, Planted(brightness)))
    with pytest.raises(ValueError, match=r"cannot score an empty batch"):
        weighted.score(SampleBatch([], torch.zeros(0, 3, 4, 4)))
    with pytest.raises(ValueError, match=r"SampleBatch\.images has 3 entries for 2 prompts"):
        weighted.score(SampleBatch([Prompt("a"), Prompt("b")], torch.zeros(3, 3, 4, 4)))
    with pytest.raises(RuntimeError, match=r"load must be called before score"):
        WeightedRewards([("bright", 1.0, Planted(brightness))]).score(make_batch(1))


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([], "no reward is given; list at least one under `rewards`"),
        ([("a", 1.0), ("b", 1.0), ("a", 2.0)], "^reward a is listed 2 times; keep one entry with the sum of the weights, or give each a label"),
        ([("total", 1.0)], "cannot be called 'total'"),
        ([("a", NAN)], "^reward a has the weight nan; give a finite number"),
    ],
)
def test_a_list_of_rewards_that_makes_no_sense_is_refused(rewards: list[tuple[str, float]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        WeightedRewards([(name, weight, Planted(brightness)) for name, weight in rewards])


def test_a_batch_size_below_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"^reward a declares a batch size of 0; give 1 or more"):
        WeightedRewards([("a", 1.0, Planted(brightness, batch_size=0))])


# --- the total with its gradient


class Differentiable(Planted):
    """A planted reward that says it has a gradient."""

    def __init__(self, function: Callable[[SampleBatch], object], batch_size: int = 64) -> None:
        super().__init__(function, batch_size)
        self.info = dataclasses.replace(self.info, differentiable=True)


def contrast(batch: SampleBatch) -> Scores:
    """The mean square of the pixels."""
    assert batch.images is not None
    return Scores(batch.images.square().mean((1, 2, 3)), torch.ones(len(batch), dtype=torch.bool))


def leaf_batch(num: int = 5) -> tuple[SampleBatch, Tensor]:
    """A batch whose pictures require a gradient."""
    batch = make_batch(num)
    assert batch.images is not None
    return batch, batch.images.requires_grad_()


def test_the_differentiable_total_has_the_values_of_the_total_and_the_gradient_by_hand() -> None:
    batch, images = leaf_batch()
    weighted = loaded(("bright", 2.0, Differentiable(brightness)), ("contrast", -0.5, Differentiable(contrast)))
    total = weighted.differentiable_total(batch)
    assert (total.shape, total.dtype, total.device) == ((5,), torch.float32, CPU)
    assert torch.equal(total.detach(), weighted.score(batch)["total"].values)
    (slope,) = torch.autograd.grad((total * torch.arange(5)).sum(), images)
    expected = torch.arange(5).view(5, 1, 1, 1) * (2.0 - 0.5 * 2 * images.detach()) / 48
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batches_of_any_size_give_the_same_gradient(batch_size: int) -> None:
    batch, images = leaf_batch()
    total = loaded(("contrast", 1.0, Differentiable(contrast, batch_size))).differentiable_total(batch)
    torch.testing.assert_close(torch.autograd.grad(total.sum(), images)[0], images.detach() / 24)


def test_the_gradient_is_kept_inside_no_grad_and_autocast_is_left() -> None:
    seen = []

    def look(batch: SampleBatch) -> Scores:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return contrast(batch)

    batch, _ = leaf_batch()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert loaded(("look", 1.0, Differentiable(look))).differentiable_total(batch).requires_grad
    assert seen == [(True, False)]


def test_rewards_that_are_only_watched_need_no_gradient_and_are_not_called() -> None:
    watched = Planted(brightness)
    weighted = loaded(("watched", 0.0, watched), ("contrast", 1.0, Differentiable(contrast)))
    weighted.require_differentiable()
    batch, _ = leaf_batch()
    torch.testing.assert_close(weighted.differentiable_total(batch), contrast(batch).values)
    assert watched.calls == []


def test_the_first_reward_with_a_weight_and_without_a_gradient_is_named() -> None:
    watched, jpeg, late = Planted(brightness), Planted(brightness), Planted(brightness)
    weighted = WeightedRewards([("fine", 1.0, Differentiable(contrast)), ("watched", 0.0, watched), ("jpeg", 1.0, jpeg), ("late", 1.0, late)])
    with pytest.raises(UserError, match=r"^reward jpeg is not differentiable, which this objective needs; choose another reward \(such as ink\), give it"):
        weighted.require_differentiable()
    weighted.load(CPU, torch.float32)
    with pytest.raises(UserError, match=r"^reward jpeg is not differentiable"):
        weighted.differentiable_total(leaf_batch()[0])
    with pytest.raises(UserError, match=r"^every reward has the weight 0, so there is no reward to differentiate; give one a weight$"):
        WeightedRewards([("watched", 0.0, Differentiable(contrast))]).require_differentiable()


def test_every_built_in_reward_tells_the_truth_about_its_gradient() -> None:
    for info in list_rewards():
        weighted = WeightedRewards([(info.name, 1.0, load_reward(info.name))])
        if not info.differentiable:
            with pytest.raises(UserError, match=f"^reward {info.name} is not differentiable"):
                weighted.require_differentiable()
        if not info.differentiable or info.weights:  # the gradient of the others is tested with their weights
            continue
        weighted.load(CPU, torch.float32)
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        batch = SampleBatch([Prompt("a red circle"), Prompt("two blue squares")], images)
        (slope,) = torch.autograd.grad(weighted.differentiable_total(batch).sum(), images)
        assert slope.flatten(1).norm(dim=1).min() > 0
    assert load_reward("ink").info.differentiable


def test_values_without_the_gradient_that_was_promised_are_an_error() -> None:
    def forgetful(batch: SampleBatch) -> Scores:
        scores = contrast(batch)
        return Scores(scores.values.detach(), scores.valid)

    weighted = loaded(("fine", 1.0, Differentiable(contrast)), ("forgetful", 1.0, Differentiable(forgetful)))
    with pytest.raises(UserError, match=r"^reward forgetful calls itself differentiable, but its values carry no gradient; correct the reward"):
        weighted.differentiable_total(leaf_batch()[0])


def test_an_invalid_sample_is_nan_in_the_differentiable_total_and_leaves_the_others_their_gradient() -> None:
    def second_fails(batch: SampleBatch) -> Scores:
        return Scores(contrast(batch).values, torch.arange(len(batch)) != 1)

    batch, images = leaf_batch(3)
    total = loaded(("part", 1.0, Differentiable(second_fails)), ("bright", 1.0, Differentiable(brightness))).differentiable_total(batch)
    assert total.isnan().tolist() == [False, True, False]
    (slope,) = torch.autograd.grad(total[~total.isnan()].sum(), images)
    torch.testing.assert_close(slope, (2 * images.detach() + 1) / 48 * torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1, 1))


def test_a_reward_that_breaks_in_the_differentiable_total_is_named_as_in_score() -> None:
    def infinite(batch: SampleBatch) -> Scores:
        scores = contrast(batch)
        return Scores(scores.values / 0, scores.valid)

    with pytest.raises(UserError, match=r"^reward broken returned inf for the prompt 'prompt 0'"):
        loaded(("broken", 1.0, Differentiable(infinite))).differentiable_total(leaf_batch()[0])


def test_pictures_without_a_gradient_empty_batches_and_a_forgotten_load_are_refused_by_the_differentiable_total() -> None:
    weighted = loaded(("contrast", 1.0, Differentiable(contrast)))
    for batch in (make_batch(2), SampleBatch([Prompt("a")], texts=["a"])):
        with pytest.raises(ValueError, match=r"^SampleBatch\.images must be pictures that require a gradient$"):
            weighted.differentiable_total(batch)
    with pytest.raises(ValueError, match=r"cannot score an empty batch"):
        weighted.differentiable_total(SampleBatch([], torch.zeros(0, 3, 4, 4)))
    with pytest.raises(RuntimeError, match=r"load must be called before score"):
        WeightedRewards([("contrast", 1.0, Differentiable(contrast))]).differentiable_total(leaf_batch()[0])


# --- constant rewards


def test_a_reward_constant_over_all_iterations_is_reported_with_its_count_and_a_changing_one_is_not() -> None:
    monitor = ConstantRewardMonitor()
    for low in (0.0, 0.0, 1.0):  # "moves" is constant inside each iteration, and changes only in the third
        monitor.update({"stuck": scores_of([0.5] * 4), "moves": scores_of([low] * 4), "total": scores_of([0.5 + low] * 4)})
    assert monitor.constant() == {"stuck": 12}
    (line,) = monitor.warnings()
    assert re.match(r"^reward stuck gave the same score, 0\.5, to all 12 samples of the run and teaches nothing; check", line)


def test_a_total_is_reported_only_where_its_rewards_vary_and_cancel() -> None:
    alone, cancelling = ConstantRewardMonitor(), ConstantRewardMonitor()
    alone.update({"stuck": scores_of([0.5, 0.5]), "total": scores_of([0.5, 0.5])})
    assert alone.constant() == {"stuck": 2}
    cancelling.update({"up": scores_of([0.0, 1.0]), "down": scores_of([1.0, 0.0]), "total": scores_of([1.0, 1.0])})
    assert cancelling.constant() == {"total": 2}


def test_invalid_samples_neither_count_nor_vary_and_one_sample_is_not_a_constant() -> None:
    monitor = ConstantRewardMonitor()
    monitor.update({"a": scores_of([0.5, NAN], [True, False]), "never": scores_of([NAN], [False])})
    assert monitor.constant() == {}
    monitor.update({"a": scores_of([NAN, 0.5], [False, True]), "never": scores_of([NAN], [False])})
    assert monitor.constant() == {"a": 2}


def test_the_state_of_the_monitor_survives_json_and_continues_the_count() -> None:
    first, second = ConstantRewardMonitor(), ConstantRewardMonitor()
    first.update({"stuck": scores_of([0.1] * 3), "moves": scores_of([0.1, 0.2, 0.3])})
    state = first.state_dict()
    second.load_state_dict(json.loads(json.dumps(state)))
    second.update({"stuck": scores_of([0.1] * 2), "moves": scores_of([0.2, 0.2])})
    assert second.constant() == {"stuck": 5}
    first.update({"stuck": scores_of([0.1])})
    assert state["stuck"] == {"count": 3, "low": pytest.approx(0.1), "high": pytest.approx(0.1)}  # a copy, not a view


def test_scores_straight_from_the_weighted_rewards_feed_the_monitor() -> None:
    def flat(batch: SampleBatch) -> Tensor:
        return torch.zeros(len(batch))

    monitor, weighted = ConstantRewardMonitor(), loaded(("flat", 1.0, FunctionReward("flat", flat)))
    monitor.update(weighted.score(make_batch(4)))
    assert monitor.constant() == {"flat": 4}
