"""Allocators of text methods: which prompts, how many answers of each, what is trained, and what is remembered."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from text_runs import assert_trains, assign_rewards, text_config

from flowrl.allocation import ALLOCATORS, Allocator, Budget, Group, Outcomes
from flowrl.core.allocation import knapsack
from flowrl.text.parts import make_part
from flowrl.trainer import Trainer
from flowrl.types import UserError

PRESETS = {
    "dapo": ["generation.max_new_tokens=8", "shaping={overlong: {max_length: 8, cache: 2}}", "objective.updates_per_iteration=1"],
    "ngrpo": [],
    "knapsack_rl": ["allocation.args.warmup=1"],
    "xrpo": [],
    "vade": [],
    "vas": ["allocation.args.every=1"],
    "pcl": [],
    "kimi_length": [],
    "remix": [],
}
REWARD = """
import torch
from flowrl.types import Scores
from letters import Vowels

class Varied(Vowels):
    def score(self, batch):
        values = [sum(place * ord(letter) for place, letter in enumerate(text, 1)) % 97 / 97 for text in batch.texts]
        return Scores(torch.tensor(values), torch.ones(len(values), dtype=torch.bool))
"""
VARIED = "rewards=['varied:Varied']"
SMALL = "rollout={groups_per_iteration: 3, group_size: 4}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("allocation")
    (folder / "varied.py").write_text(REWARD)
    return folder


@pytest.fixture(autouse=True)
def rewards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)


def allocator(name: str, num_prompts: int = 8, groups: int = 2, size: int = 4, bounds: tuple[float, float] = (0.0, 1.0), **args: object) -> Allocator:
    made = make_part("allocation", ALLOCATORS, name, args)
    made.begin(Budget(num_prompts, groups, size, 0, *bounds))
    return made


def outcomes(**rates: Sequence[float]) -> Outcomes:
    """p3=[0, 1] = two samples of prompt 3."""
    prompt = torch.tensor([int(name[1:]) for name, values in rates.items() for _ in values])
    rewards = torch.tensor([value for values in rates.values() for value in values], dtype=torch.float64)
    return Outcomes(prompt, rewards, torch.ones(len(rewards), dtype=torch.bool))


def group(*rewards: float, prompt: int = 0, age: int = 0) -> Group:
    return Group(prompt, torch.tensor(rewards, dtype=torch.float64), torch.ones(len(rewards), dtype=torch.bool), age)


# --- runs ---


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_and_evaluates_no_token_twice(name: str, folder: Path) -> None:
    trainer, metrics = assert_trains(text_config(folder, f"method={name}", SMALL, *PRESETS[name], reward="even"))
    assert metrics[-1]["groups/singletons"] == 0
    resumed = Trainer(trainer.config)
    resumed.load_state(deepcopy(trainer.state()))
    first, _ = trainer.iterate(3)
    again, _ = resumed.iterate(3)
    assert again == first  # which prompts, how many answers, all that was remembered


@pytest.mark.parametrize("args", ["{name: ramp, args: {start: 0.25, iterations: 2}}", "{name: drop}", "{name: dynamic, args: {carry: true, factor: 3}}"])
def test_an_allocator_without_a_preset_trains(args: str, folder: Path) -> None:
    assert_trains(text_config(folder, f"allocation={args}", reward="even"), 3)


def test_an_allocator_with_nothing_to_do_changes_nothing(folder: Path) -> None:
    """All groups differ in their rewards: the filter drops none, and dynamic sampling is content with its first round."""
    found = [assert_trains(text_config(folder, f"allocation={{name: {name}}}", VARIED))[1] for name in ("uniform", "drop", "dynamic")]
    plain = [[{key: value for key, value in metrics.items() if not key.startswith(("groups/", "trained/"))} for metrics in run] for run in found]
    assert plain[0] == plain[1] == plain[2]


def test_dropped_groups_are_not_trained(folder: Path) -> None:
    trainer = Trainer(text_config(folder, "allocation={name: drop}"))
    assigned = assign_rewards(trainer, [0.0, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0])
    assert assigned.mask.any(1).tolist() == [True] * 4 + [False] * 8
    solved = Trainer(text_config(folder, "allocation={name: drop, args: {drop: all_best}}"))
    assert assign_rewards(solved, [0.0, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0]).mask.any(1).tolist() == [True] * 4 + [False] * 4 + [True] * 4


def test_carried_groups_keep_the_log_probabilities_that_they_were_sampled_with(folder: Path) -> None:
    config = text_config(folder, "allocation={name: dynamic, args: {carry: true, factor: 3}}", VARIED)  # 9 groups, 3 of them needed
    trainer = Trainer(config)
    trainer.iterate(1)
    indices = trainer.engine.groups(2)
    prompts, numbers = [trainer.prompts[i] for i in indices], [0, 1, 2]
    rolled_out, _ = trainer.engine.roll_out(prompts, indices, numbers, 2)
    assert rolled_out.num_sampled == 0  # 6 groups were waiting
    samples = rolled_out.drawn.samples
    assert bool(samples.known.all())
    now = trainer.policy.token_output(samples.completions, torch.arange(12)).log_prob.detach()
    away = (torch.where(samples.completions.mask, now - samples.old, 0.0)).abs().max()
    assert 1e-6 < float(away) < 1.0  # the policy has moved since
    assert len(trainer.engine.rounds.stored) == 3


def test_groups_of_one_answer_are_counted(folder: Path) -> None:
    config = text_config(folder, "allocation={name: knapsack, args: {least: 1, most: 10, warmup: 0}}", "data.train=" + str(folder / "prompts.txt"))
    trainer = Trainer(config)
    trainer.engine.rounds.allocator.observe(outcomes(p0=[0.5], p1=[1.0], p2=[1.0], p3=[1.0]))  # all that is gained, is gained from prompt 0
    for iteration in range(1, 3):
        if 0 in trainer.engine.rounds.allocator.sampler.groups(iteration - 1):
            break
    metrics, _ = trainer.iterate(iteration)
    assert metrics["groups/singletons"] == 2  # 10, 1 and 1 answers
    assert metrics["nfe/used"] == metrics["nfe/minimum"]


def test_a_checkpoint_of_another_allocator_is_refused(folder: Path) -> None:
    state = Trainer(text_config(folder)).state()
    with pytest.raises(UserError, match="written with uniform, and the config says priority"):
        Trainer(text_config(folder, "allocation={name: priority}")).load_state(state)


# --- allocators by hand ---


def test_dynamic_sampling_asks_until_enough_groups_are_useful_and_then_no_more() -> None:
    a = allocator("dynamic", max_rounds=3)
    assert len(a.ask(1, 0, []).prompts) == 2
    useless, useful = group(1, 1), group(0, 1)
    assert a.ask(1, 1, [useless, useful]).prompts
    assert not a.ask(1, 2, [useless, useful, useful]).prompts
    assert a.choose(1, [useless, useful, useful, useful], 1).train == [1, 2]  # the oldest; the surplus is thrown away
    assert not a.ask(1, 3, [useless]).prompts  # the last round was made
    short = a.choose(1, [useless, useful, useless], 2)
    assert (list(short.train), list(short.idle)) == ([1], [0])  # one group is trained; the second process only keeps in step
    assert a.metrics()["groups/short"] == 1


def test_dynamic_sampling_goes_on_where_it_was() -> None:
    a = allocator("dynamic")
    first = [a.ask(1, 0, []).prompts, a.ask(1, 1, []).prompts]
    assert sorted([*first[0], *first[1]]) == sorted(set(first[0]) | set(first[1]))  # rounds of an epoch ask different prompts
    b = allocator("dynamic")
    b.ask(1, 0, [])
    c = allocator("dynamic")
    c.load_state_dict(b.state_dict())
    assert c.ask(1, 1, []).prompts == first[1]


def test_surplus_is_kept_only_where_asked() -> None:
    groups = [group(0, 1)] * 3
    assert list(allocator("dynamic").choose(1, groups, 1).store) == []
    assert list(allocator("dynamic", carry=True).choose(1, groups, 1).store) == [2]


def test_past_groups_are_trained_for_a_window_of_iterations() -> None:
    a = allocator("past", groups=4, share=0.9, window=1)
    assert len(a.ask(1, 0, []).prompts) == 4  # nothing is stored yet
    fresh = [group(0, 1)] * 4
    choice = a.choose(1, fresh, 1)
    assert list(choice.train) == list(choice.store) == [0, 1, 2, 3]
    old = [group(0, 1, age=1)] * 4
    asked = len(a.ask(2, 0, old).prompts)
    assert 1 <= asked < 4
    choice = a.choose(2, old + [group(0, 1)] * asked, 1)
    assert len(choice.train) == 4
    assert list(choice.store) == list(range(4, 4 + asked))  # what is one iteration old is forgotten
    assert allocator("past", groups=4, share=0.9, until=1).ask(2, 0, old).prompts != []
    assert len(allocator("past", groups=4, share=0.9, until=1).ask(2, 0, old).prompts) == 4


def test_xrpo_spends_the_budget_where_rewards_differ() -> None:
    a = allocator("xrpo", groups=2, size=8, rounds=2, exploration=0.0)
    first = a.ask(1, 0, [])
    assert list(first.counts) == [4, 4]
    second = a.ask(1, 1, [group(1, 1, 1, 1), group(0, 1, 0, 1)])
    assert (list(second.extends or []), list(second.counts)) == ([1], [8])  # an interval of width 0 cannot be narrowed
    assert not a.ask(1, 2, [group(*[1.0] * 4), group(*[0.0, 1.0] * 6)]).prompts


def test_the_knapsack_follows_the_rates_of_all_processes() -> None:
    a = allocator("knapsack", num_prompts=2, size=4, least=2, most=6, warmup=1)
    assert list(a.ask(1, 0, []).counts) == [4, 4]
    assert list(a.ask(2, 0, []).counts) == [4, 4]  # nothing is known
    a.observe(outcomes(p0=[0, 1], p1=[1, 1]))
    order = a.ask(2, 0, [])
    assert dict(zip(order.prompts, order.counts, strict=True)) == {0: 6, 1: 2}
    assert list(order.counts) == knapsack([[0.5, 1.0][p] for p in order.prompts], 8, least=2, most=6)


def test_rates_are_relative_to_the_rewards_bounds() -> None:
    a = allocator("curriculum", bounds=(-1.0, 3.0), momentum=0.5)
    a.observe(outcomes(p0=[1.0], p1=[3.0]))
    a.observe(outcomes(p0=[3.0]))
    assert a.table.rates[:2].tolist() == [0.75, 1.0]  # (0.5 + 1) / 2


def test_the_curriculum_asks_what_is_solved_half_of_the_time() -> None:
    a = allocator("curriculum", num_prompts=4, groups=1, pool=4, momentum=0.0)
    a.observe(outcomes(p0=[0, 0], p1=[1, 1], p2=[0, 1], p3=[1, 1, 1, 0]))
    assert [a.ask(i, 0, []).prompts for i in range(1, 4)] == [[2]] * 3


def test_priority_never_asks_what_never_fails_while_others_do() -> None:
    a = allocator("priority", num_prompts=4, groups=2)
    a.observe(outcomes(p0=[1, 1], p1=[1], p2=[0], p3=[0]))
    assert all(sorted(a.ask(i, 0, []).prompts) == [2, 3] for i in range(1, 20))


def test_thompson_sampling_prefers_what_is_believed_to_teach() -> None:
    a = allocator("thompson", num_prompts=3, groups=1, global_decay=1.0, sample_decay=1.0)
    a.observe(outcomes(p0=[1] * 300, p1=[1] * 100 + [0] * 200, p2=[0] * 300))  # the gain p (1 - p)^2 is largest at 1/3
    assert [a.ask(i, 0, []).prompts for i in range(1, 6)] == [[1]] * 5
    assert a.beta.successes.tolist() == [300, 100, 0]


def test_variance_aware_sampling_draws_by_variance_once_scores_are_due() -> None:
    a = allocator("variance", num_prompts=4, groups=2, share=1.0, every=2)
    a.observe(outcomes(p0=[1, 1], p1=[0, 0]))
    assert a.scores.tolist() == [0.25] * 4  # not yet
    a.observe(outcomes(p2=[0, 1], p3=[0, 0]))
    assert a.scores.tolist() == [0, 0, 0.25, 0]
    assert [a.ask(i, 0, []).prompts for i in range(1, 4)] == [[2, 2]] * 3


def test_the_ramp_opens_the_data_from_the_start() -> None:
    a = allocator("ramp", num_prompts=8, groups=4, start=0.25, end=1.0, iterations=10)
    assert sorted(a.ask(1, 0, []).prompts) == [0, 0, 1, 1]
    assert len({prompt for i in range(11, 40) for prompt in a.ask(i, 0, []).prompts}) == 8


@pytest.mark.parametrize("name", [name for name in ALLOCATORS if name not in ("past", "dynamic", "xrpo")])
def test_what_is_remembered_comes_back(name: str) -> None:
    """Two iterations, a copy of the state, and the same third one."""
    a = allocator(name)
    for iteration in (1, 2):
        a.ask(iteration, 0, [])
        a.observe(outcomes(p0=[0, 1], p1=[1, 1], p5=[0, 0]))
    b = allocator(name)
    b.load_state_dict(a.state_dict())
    assert b.state_dict() == a.state_dict()
    for iteration in (3, 4):
        assert b.ask(iteration, 0, []) == a.ask(iteration, 0, [])


# --- what cannot be ---


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("drop", {"drop": "half"}, "known: equal, all_best"),
        ("dynamic", {"max_rounds": 0}, "at least 1"),
        ("past", {"share": 1.0}, r"share must be in \[0, 1\)"),
        ("xrpo", {"level": 1.0}, "level must be"),
        ("knapsack", {"least": 5, "most": 4}, "least <= most"),
        ("knapsack", {"momentum": 1.0}, "momentum must be"),
        ("thompson", {"power": 3}, "power must be 1 or 2"),
        ("variance", {"every": 0}, "every at least 1"),
        ("curriculum", {"target": 2}, "target must be"),
        ("ramp", {"start": 0.0}, "start and end"),
        ("ramp", {"base": 0.0}, "base must be above 0"),
        ("knapsac", {}, "did you mean knapsack"),
        ("drop", {"kind": "equal"}, "no argument kind"),
    ],
)
def test_a_wrong_argument_is_one_line(name: str, args: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told) as found:
        make_part("allocation", ALLOCATORS, name, args)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("priority", {"bounds": (0.0, float("inf"))}, "no lowest and highest value"),
        ("drop", {"bounds": (0.0, float("inf")), "drop": "all_best"}, "no highest value"),
        ("curriculum", {"num_prompts": 1}, "chooses 2 different prompts .* there are 1"),
        ("knapsack", {"most": 3}, "rollout.group_size: 4 is not within"),
    ],
)
def test_an_allocator_says_what_it_cannot_work_with(name: str, changes: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        allocator(name, **changes)  # type: ignore[arg-type]


def test_rates_of_other_prompts_are_refused() -> None:
    with pytest.raises(UserError, match="rates of 8 prompts, and there are 9"):
        allocator("priority", num_prompts=9).load_state_dict(allocator("priority").state_dict())


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("allocation={name: dynamic, args: {max_rounds: 0}}", "allocation: dynamic: max_rounds"),
        ("allocation={name: nowhere}", "allocation: unknown nowhere"),
        ("allocation={samples: [nobody]}", "allocation.samples: unknown nobody"),
    ],
)
def test_a_wrong_allocation_is_told_when_the_config_is_read(override: str, told: str, folder: Path) -> None:
    with pytest.raises(UserError, match=told):
        text_config(folder, override)
