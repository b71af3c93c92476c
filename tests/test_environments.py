"""Environments of several turns, and the loop that plays them: by hand with scripted policies, and with the credit functions that read the result."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowrl.core.advantage_shaping import position_bonus
from flowrl.core.agent_credit import gigpo, merged_advantages, turn_gains
from flowrl.core.token_advantages import steps_to_decisions
from flowrl.environments import ENVIRONMENTS, Actions, Environment, Episodes, Step, load_environment, run_episodes
from flowrl.environments.calculator import Calculator, evaluate
from flowrl.environments.guess import Guess
from flowrl.types import Prompt, UserError
from rewards.arithmetic_world import make_split

GAME = Prompt("find it")
PROBLEM = Prompt("Tom has 9 boxes with 4 pens each. How many pens does he have?", {"answer": 36})
LETTERS = sorted("abcdefghijklmnopqrstuvwxyz0123456789+-*=# .?_")
END = len(LETTERS)


def encode(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text.lower()]


def encode_answer(text: str) -> list[int]:
    return encode(f" {text} ")


def decode(tokens: Sequence[int]) -> str:
    return "".join(LETTERS[token] for token in tokens if token != END)


def scripted(*scripts: list[str], contexts: list[list[str]] | None = None, cut: Sequence[str] = ()) -> Callable[[list[Tensor]], Actions]:
    """A policy that says the texts of script i in episode i, each with an end token behind it, but for those in ``cut``; a script ends with its episode."""
    turns = [iter(script) for script in scripts]
    live = list(range(len(scripts)))

    def act(given: list[Tensor]) -> Actions:
        if contexts is not None:
            contexts.append([decode(context.tolist()) for context in given])
        said = []
        for i in list(live):
            text = next(turns[i], None)
            if text is None:
                live.remove(i)
            else:
                said.append(text)
        assert len(said) == len(given)
        tokens = [torch.tensor(encode(text) + [END] * (text not in cut)) for text in said]
        return Actions(tokens, [torch.full((len(row),), -0.5) for row in tokens], [text not in cut for text in said])

    return act


def hidden(seed: int = 0, **args: Any) -> int:
    environment = Guess(**args)
    environment.reset(GAME, seed)
    return int(environment.answer)


def play(make: Callable[[], Environment], prompts: list[Prompt], counts: list[int], *scripts: list[str], **settings: Any) -> Episodes:
    policy = scripted(*scripts, contexts=settings.pop("contexts", None), cut=settings.pop("cut", ()))
    settings = {"max_turns": 6, "seed": 0} | settings
    return run_episodes(make, prompts, counts, settings.pop("act", policy), encode_answer, decode, **settings)


# --- guess --------------------------------------------------------------------------------------------------------------------------------------


def test_a_guess_is_answered_with_higher_or_lower_and_the_state_is_what_is_known() -> None:
    environment = Guess(1, 9, turns=4)
    seed = next(seed for seed in range(100) if hidden(seed) == 6)
    assert environment.reset(GAME, seed) == "1 to 9"
    assert environment.step("is it 3?") == Step("higher", 0.0, False, (1, 9))
    assert environment.step("no 3, but 8") == Step("lower", 0.0, False, (4, 9))
    assert environment.step("well") == Step("no number", 0.0, False, (4, 7))
    assert not environment.success
    assert environment.step("6") == Step("", 1.0, True, (4, 7))
    assert environment.success
    with pytest.raises(RuntimeError, match="call reset"):
        environment.step("6")
    environment.reset(GAME, seed)
    assert not environment.success
    assert [environment.step("9").done for _ in range(4)] == [False, False, False, True]
    assert not environment.success


def test_a_number_outside_the_range_or_what_is_known_teaches_nothing_wrong() -> None:
    environment = Guess(1, 9, turns=9)
    environment.reset(GAME, next(seed for seed in range(100) if hidden(seed) == 6))
    for action, answer, known in (("0", "higher", (1, 9)), ("12", "lower", (1, 9)), ("4", "higher", (1, 9)), ("2", "higher", (5, 9)), ("007", "lower", (5, 9))):
        step = environment.step(action)
        assert (step.observation, step.key) == (answer, known)
    assert environment.step("5").key == (5, 6)


def test_the_hidden_number_follows_from_the_seed_and_covers_the_range() -> None:
    found = [hidden(seed, low=3, high=6) for seed in range(60)]
    assert set(found) == {3, 4, 5, 6}
    assert found == [hidden(seed, low=3, high=6) for seed in range(60)]
    environment = Guess(1, 9)
    assert environment.reset(Prompt("a", {"low": 50, "high": 51}), 0) == "50 to 51"
    assert int(environment.answer) in (50, 51)


# --- calculator ---------------------------------------------------------------------------------------------------------------------------------


def test_the_calculator_answers_calls_and_judges_the_final_answer() -> None:
    environment = Calculator(turns=4)
    assert environment.reset(PROBLEM, 0) == ""
    assert environment.answer == "#36"
    assert environment.step("calc 9*4") == Step("36", 0.0, False, (), tool=True)
    assert environment.step("so 9*4=36 36-1=") == Step("35", 0.0, False, (36,), tool=True)
    assert environment.step("hm") == Step("error", 0.0, False, (36, 35))
    assert environment.step("calc 9*4= #35 no, #36") == Step("", 1.0, True, (36, 35))
    assert environment.success
    environment.reset(PROBLEM, 0)
    assert environment.step("#35") == Step("", 0.0, True, ())
    assert not environment.success
    environment.reset(PROBLEM, 0)
    assert [environment.step("hm").done for _ in range(4)] == [False, False, False, True]
    with pytest.raises(RuntimeError, match="call reset"):
        environment.step("#36")


@pytest.mark.parametrize(
    ("expression", "value"),
    [("12*3", 36), ("2+3*4", 14), ("(2+3) * 4", 20), ("20-3-4", 13), ("24/4/2", 3), ("-3+5", 2), ("2*-3", -6), ("7/2", None), ("1/0", None), ("3", None)]
    + [("", None), ("1++", None), ("2*(3", None), ("(1)(2)", None), ("1 2+3", None), ("2**3", None), ("9" * 40 + "*2", None), ("1+" * 40 + "1", None)]
    + [("x+1", None), ("1e9+1", None), ("١+٢", None), ("999999*999999", 999998000001), ("1000000*1000000", None), ("(" * 30 + "1+1" + ")" * 30, 2)],
)
def test_expressions_by_hand(expression: str, value: int | None) -> None:
    assert evaluate(expression) == value


@given(st.lists(st.tuples(st.sampled_from("+-*"), st.integers(0, 99)), min_size=1, max_size=8), st.integers(0, 99))
@settings(derandomize=True, max_examples=100, deadline=None)
def test_expressions_have_the_value_that_python_gives_them(parts: list[tuple[str, int]], first: int) -> None:
    expression = str(first) + "".join(f"{sign}{number}" for sign, number in parts)
    expected: int = eval(expression)
    assert evaluate(expression) == (expected if abs(expected) < 10**12 else None)


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (36, "#36", True),
        (36, "# 36 pens", True),
        (36, "#36.", True),
        (36, "#36.0", True),
        (36, "####36", True),
        (36, "#36 or #37", False),
        (36, "#3 6", False),
        (36, "#", False),
        (36, "#pens", False),
        (1234, "#1,234", True),
        ("so 2+2\n#### 1,234", "#1234", True),
        (-2.5, "#-2.5", True),
        ("0.1", "#0.10", True),
        (36, "#" + "9" * 5000, False),
    ],
)
def test_final_answers_are_compared_as_numbers(gold: object, answer: str, right: bool) -> None:
    environment = Calculator()
    environment.reset(Prompt("p", {"answer": gold}), 0)
    assert environment.step(answer).reward == float(right)
    assert environment.success is right
    environment.reset(Prompt("p", {"answer": gold}), 0)
    assert environment.step(environment.answer).reward == 1.0


def test_the_working_of_the_embedded_world_solves_its_problems_with_and_without_the_tool() -> None:
    for problem in make_split("train", 30, 0, set()):
        prompt = Prompt(problem.prompt, problem.metadata())
        environment = Calculator()
        environment.reset(prompt, 0)
        assert environment.step(problem.solution).reward == 1.0
        environment.reset(prompt, 0)
        working = ""
        for equation in problem.solution.split(" ")[:-1]:
            asked, _, value = equation.partition("=")
            working += f"{asked}="
            assert environment.step(working).observation == value  # a turn that ends at "="
            working += f"{value} "
        assert environment.step(f"#{problem.answer}").reward == 1.0


# --- both ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Guess, Calculator])
@given(actions=st.lists(st.text(max_size=40) | st.sampled_from(["5", "calc 2*3", "1+1=", "#4", "#", "\ud800", "٣", "=", "calc"]), min_size=4, max_size=4))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_any_text_is_answered_the_same_way_every_time_and_a_copy_goes_on_alone(make: type[Guess] | type[Calculator], actions: list[str]) -> None:
    first, second = make(turns=6), make(turns=6)
    assert first.reset(PROBLEM, 3) == second.reset(PROBLEM, 3)
    for action in actions[:2]:
        step = first.step(action)
        assert second.step(action) == step
        assert hash(step.key) is not None
        if step.done:
            return
    branch, rest = first.copy(), actions[2:]
    wanted = []
    for action in rest:
        wanted.append(second.step(action))
        if wanted[-1].done:
            break
    for environment in (branch, first):  # playing the copy to its end leaves the original where it was
        assert [environment.step(action) for action in rest[: len(wanted)]] == wanted
        assert environment.success is second.success


@pytest.mark.parametrize("make", [Guess, Calculator])
@pytest.mark.parametrize("piece", ["9", "(", "1+", "calc ", "#", "=", " ", "\n", "é\U0001f600", "1 ", "-", "٣", "calc 1+"])
def test_a_million_characters_are_answered_within_a_second(make: type[Guess] | type[Calculator], piece: str) -> None:
    environment = make()
    environment.reset(PROBLEM, 0)
    for end in ("", "="):
        start = time.perf_counter()
        step = environment.step(piece * (10**6 // len(piece)) + end)
        assert time.perf_counter() - start < 1
        if step.done:
            environment.reset(PROBLEM, 0)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("gess", {}, "unknown environment 'gess'; did you mean guess?, or give your own as module:attribute"),
        ("guess", {"hgih": 3}, "environment 'guess' has no argument 'hgih'; did you mean high?"),
        ("guess", {"low": 5, "high": 5}, "environment guess: low is 5 and high 5; low must be smaller"),
        ("guess", {"high": 10**9}, "high below 10^9"),
        ("guess", {"turns": 0}, "environment guess: turns must be a whole number from 1 on, not 0"),
        ("calculator", {"turns": True}, "environment calculator: turns must be a whole number from 1 on, not True"),
        ("no_such_module:Thing", {}, "environment 'no_such_module:Thing': no module 'no_such_module'"),
        ("flowrl.environments.guess:Gess", {}, "has no attribute 'Gess'"),
        ("flowrl.environments.guess:__all__", {}, "environment 'flowrl.environments.guess:__all__' is list; give a class, or a function"),
        ("builtins:dict", {}, "environment 'builtins:dict' gave dict without reset, step, success; an environment has reset, step, copy and success"),
        ("{file}:Mine", {}, "environment '{file}:Mine' needs the argument 'size'; set it under `args`"),
        ("{file}:Mine", {"size": 0}, "environment '{file}:Mine' could not be made with args {{'size': 0}}: ZeroDivisionError: division by zero"),
    ],
)
def test_a_wrong_environment_is_refused_in_one_line(tmp_path: Path, name: str, args: dict[str, Any], message: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text("class Mine:\n    def __init__(self, size):\n        self.size = 1 / size\n")
    with pytest.raises(UserError) as caught:
        load_environment(name.format(file=file), args)
    assert message.format(file=file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_environments_are_found_by_name_and_by_import_string() -> None:
    assert set(ENVIRONMENTS) == {"guess", "calculator"}
    make = load_environment("guess", {"high": 4, "higher": "more"})
    first, second = make(), make()
    assert isinstance(first, Environment) and first is not second
    assert first.reset(GAME, 0) == "1 to 4"
    assert isinstance(load_environment("flowrl.environments.calculator:Calculator", {"turns": 2})(), Calculator)


def test_prompts_that_an_environment_cannot_work_with_are_named_before_any_work() -> None:
    Calculator().check_prompts([PROBLEM, Prompt("p", {"answer": "#### 7"})])
    for answer in (None, "many", True, [3], float("nan")):
        with pytest.raises(UserError, match="environment calculator: the prompt 'p' has the metadata answer .*; a number is needed"):
            Calculator().check_prompts([PROBLEM, Prompt("p", {"answer": answer})])
    Guess().check_prompts([GAME, Prompt("p", {"high": 3})])
    with pytest.raises(UserError, match="environment guess: low must be a whole number from 0 on, not '1'"):
        Guess().check_prompts([GAME, Prompt("p", {"low": "1"})])


# --- episodes -----------------------------------------------------------------------------------------------------------------------------------


def test_the_tokens_of_policy_and_environment_alternate() -> None:
    contexts: list[list[str]] = []
    episodes = play(Calculator, [PROBLEM], [2], ["calc 9*4", "#36"], ["#35"], contexts=contexts, pad_token=END)
    text = PROBLEM.text.lower()
    assert contexts == [[f" {text} "] * 2, [f" {text} calc 9*4 36 "]]
    done = episodes.completions
    first = encode("calc 9*4") + [END] + encode(" 36 ") + encode("#36") + [END]  # 9 + 4 + 4 tokens
    assert done.tokens.tolist() == [first, encode("#35") + [END] * 14]
    assert done.mask.tolist() == [[True] * 9 + [False] * 4 + [True] * 4, [True] * 4 + [False] * 13]
    assert done.turn is not None and done.turn.tolist() == [[0] * 13 + [1] * 4, [0] * 17]
    assert torch.equal(done.log_prob, torch.where(done.mask, -0.5, 0.0))
    assert (done.length.tolist(), done.finished.tolist(), done.group.tolist()) == ([17, 4], [True, True], [0, 0])
    assert done.texts == ("calc 9*4 36 #36", "#35")
    assert [decode(row.tolist()).strip() for row in done.prompt_tokens] == [text]
    assert (done.tokens.dtype, done.log_prob.dtype, done.length.dtype, done.group.dtype) == (torch.int64, torch.float32, torch.int64, torch.int64)
    assert episodes.step_rewards.tolist() == [[0, 1], [0, 0]]
    assert episodes.present.tolist() == [[True, True], [True, False]]
    assert (episodes.rewards.tolist(), episodes.success.tolist()) == ([1, 0], [True, False])
    assert episodes.turn_start.tolist() == [[0, 13], [0, 0]]
    assert episodes.tool_start.tolist() == [0, -1]
    assert episodes.keys == [[(), (36,)], [()]]
    assert episodes.actions == [["calc 9*4", "#36"], ["#35"]]
    assert episodes.observations == [["", "36", ""], ["", ""]]
    assert episodes.answers == ("#36", "#36")


def test_all_that_are_not_over_are_asked_in_one_call_a_turn() -> None:
    asked: list[int] = []
    scripts = [["hm"] * turns + ["#36"] for turns in (2, 0, 1)]
    policy = scripted(*scripts)

    def act(contexts: list[Tensor]) -> tuple[Any, Any, Any]:
        asked.append(len(contexts))
        return tuple(policy(contexts))[:3]

    episodes = play(Calculator, [PROBLEM, PROBLEM], [1, 2], act=act)
    assert asked == [3, 2, 1]
    assert episodes.present.sum(1).tolist() == [3, 1, 2]
    assert episodes.completions.group.tolist() == [0, 1, 1]
    assert len(episodes.completions.prompt_tokens) == 2


def test_the_first_observation_stands_in_the_prompt_and_a_group_shares_its_start() -> None:
    episodes = play(Guess, [GAME, GAME], [2, 1], ["no"], ["no"], ["no"], max_turns=1)
    assert [decode(row.tolist()) for row in episodes.completions.prompt_tokens] == [" find it 1 to 9 "] * 2
    assert episodes.answers[0] == episodes.answers[1]
    many = play(Guess, [GAME] * 30, [1] * 30, *[["no"]] * 30, max_turns=1)
    assert len(set(many.answers)) > 3  # but every prompt its own
    assert many.answers == play(Guess, [GAME] * 30, [1] * 30, *[["no"]] * 30, max_turns=1).answers
    assert many.answers != play(Guess, [GAME] * 30, [1] * 30, *[["no"]] * 30, max_turns=1, seed=1).answers
    own = play(Guess, [GAME], [1], ["no"], max_turns=1, encode_prompt=lambda prompt, said: [1, 2, len(prompt.text), len(said)])
    assert own.completions.prompt_tokens[0].tolist() == [1, 2, 7, 6]


@pytest.mark.parametrize(
    ("settings", "scripts", "finished", "length", "turns"),
    [
        ({"max_turns": 2}, ["hm", "hm", "#36"], False, 3 + 7 + 3, 2),  # its last answer is not appended
        ({"cut": ["hm"]}, ["hm", "#36"], False, 2, 1),  # the policy was cut
        ({"cut": ["#36"]}, ["#36"], False, 3, 1),  # judged, yet unfinished
        ({"max_tokens": 10}, ["hm", "#36"], False, 3, 1),  # 3 + 7 leaves no room
        ({"max_tokens": 11}, ["hm", "#36"], False, 11, 2),  # room for one token of "#36"
        ({"max_tokens": 14}, ["hm", "#36"], True, 14, 2),
        ({"max_tokens": 2}, ["hm"], False, 2, 1),  # the end token is cut
    ],
)
def test_an_episode_that_a_limit_ends_is_unfinished(settings: dict[str, Any], scripts: list[str], finished: bool, length: int, turns: int) -> None:
    episodes = play(Calculator, [PROBLEM], [1], scripts, **settings)
    done = episodes.completions
    assert (done.finished.tolist(), done.length.tolist(), episodes.present.sum().item()) == ([finished], [length], turns)
    assert done.tokens.shape[1] == length
    judged = episodes.actions[0][-1] == "#36"
    assert (episodes.success.tolist(), episodes.rewards.tolist()) == ([judged], [float(judged)])


def test_an_empty_action_is_a_turn_without_tokens() -> None:
    def act(contexts: list[Tensor]) -> Actions:
        return Actions([torch.empty(0, dtype=torch.int64)] * len(contexts), [torch.empty(0)] * len(contexts), [True] * len(contexts))

    episodes = play(Calculator, [PROBLEM], [1], act=act, max_turns=1)
    assert episodes.completions.length.tolist() == [0]
    assert episodes.completions.tokens.shape == (1, 1) and not episodes.completions.mask.any()
    assert episodes.present.tolist() == [[True]] and episodes.actions == [[""]]


def test_an_episode_played_to_a_turn_goes_on_from_there_without_training_on_what_was_played() -> None:
    whole = play(Calculator, [PROBLEM], [1], ["calc 9*4", "calc 36-1", "#35"])
    turns = [torch.tensor(encode("calc 9*4") + [END])]
    contexts: list[list[str]] = []
    branch = play(Calculator, [PROBLEM], [2], ["calc 36-1", "#35"], ["#36"], played=[turns, turns], contexts=contexts)
    assert len(contexts) == 2 and len(set(contexts[0])) == 1
    assert torch.equal(branch.completions.tokens[0], whole.completions.tokens[0])
    assert branch.keys[0] == whole.keys[0]
    assert not branch.completions.mask[:, :13].any() and (branch.completions.log_prob[:, :13] == 0).all()
    assert branch.completions.mask[0, 13:].tolist() == whole.completions.mask[0, 13:].tolist()
    assert branch.step_rewards[:, 1:].sum(1).tolist() == [0, 1]  # REFUEL's rewards to go of the two continuations


def test_gigpo_compares_the_steps_that_start_from_the_same_state() -> None:
    secret = int(play(Guess, [GAME], [1], ["no"], max_turns=1).answers[0])
    other = secret + 1 if secret < 9 else secret - 1
    # The first guesses of two episodes are the same wrong one, so that their second turns start from the same state; one of them is right then.
    episodes = play(Guess, [GAME], [3], [f"{other}", f"{secret}"], [f"{other}", f"{other}"], ["no", f"{secret}"], max_turns=2)
    assert episodes.rewards.tolist() == [1, 0, 1]
    anchor, count = episodes.states()
    keys = episodes.keys
    assert keys[0] == keys[1] and keys[0][0] == (1, 9) == keys[2][0] == keys[2][1]
    assert (anchor[0] == anchor[1]).all() and anchor[2, 0] == anchor[2, 1] == anchor[0, 0] and count == 2
    valid, group = torch.ones(3, dtype=torch.bool), episodes.completions.group
    got = gigpo(episodes.rewards, episodes.step_rewards, group, valid, episodes.present, anchor, 1, count, gamma=1.0)
    # Episode part R - 2/3. Returns from (1, 9): 1, 0, 1, 1 with mean 3/4; from the narrowed state: 1, 0 with mean 1/2.
    expected = torch.tensor([[1 / 3 + 1 / 4, 1 / 3 + 1 / 2], [-2 / 3 - 3 / 4, -2 / 3 - 1 / 2], [1 / 3 + 1 / 4, 1 / 3 + 1 / 4]])
    assert torch.allclose(got, expected)
    turn = episodes.completions.turn
    assert turn is not None
    spread = steps_to_decisions(got, turn, episodes.completions.mask)
    assert (spread[~episodes.completions.mask] == 0).all()
    assert torch.allclose(spread[0, 0], expected[0, 0]) and torch.allclose(spread[0, episodes.turn_start[0, 1]], expected[0, 1])


def test_salt_merges_equal_actions_after_equal_histories_and_aspo_and_igpo_find_their_places() -> None:
    episodes = play(Calculator, [PROBLEM, PROBLEM], [2, 1], ["calc 9*4", "#36"], ["calc 9*4", "#35"], ["calc 9*4", "#36"])
    key, count = episodes.shared_steps()
    assert key.tolist() == [[0, 1], [0, 2], [3, 4]] and count == 5  # groups share nothing
    valid = torch.ones(3, dtype=torch.bool)
    assert merged_advantages(torch.tensor([1.0, -1.0, 0.5]), key, episodes.present, valid, count).tolist() == [[0, 1], [0, -1], [0.5, 0.5]]
    other = dataclasses.replace(episodes, observations=[["", "36", ""], ["", "37", ""], ["", "36", ""]], actions=[["calc 9*4", "#36"]] * 3)
    assert other.shared_steps()[0].tolist() == [[0, 1], [0, 2], [3, 4]]  # what was heard belongs to the history
    late = play(Calculator, [PROBLEM], [2], ["calc 9*4", "calc 9+1", "#36"], ["hm", "calc 9*4", "#36"])
    assert late.tool_start.tolist() == [0, 3 + 7]
    eligible = late.success & (late.tool_start >= 0)
    length = late.completions.length.float()
    bonus = position_bonus(torch.ones(2), late.tool_start.float(), length, eligible, late.completions.group, torch.ones(2, dtype=torch.bool), 1)
    assert bonus[0] > 1 > bonus[1]  # an early call is favoured
    # IGPO: the contexts before each turn are prompt and tokens[: turn_start]; its gains telescope over an episode's turns.
    for i, turns in enumerate(late.present.sum(1).tolist()):
        heads = [decode(late.completions.tokens[i, :start].tolist()) for start in late.turn_start[i, :turns].tolist()]
        assert heads == ["".join(f"{a} {o} " for a, o in zip(late.actions[i][:s], late.observations[i][1 : s + 1], strict=True)) for s in range(turns)]
    gains = turn_gains(torch.log(torch.tensor([[0.2, 0.6, 1.0], [0.2, 0.3, 0.8]])), late.present)
    assert torch.allclose(gains.sum(1), torch.tensor([1.0 - 0.2, 0.8 - 0.2]))


class Broken:
    """An environment whose step does what it is told."""

    def __init__(self, does: Callable[[], Step], begins: Callable[[], str] = lambda: "") -> None:
        self.does, self.begins, self.success = does, begins, False

    def reset(self, prompt: Prompt, seed: int) -> str:
        return self.begins()

    def step(self, action: str) -> Step:
        return self.does()

    def copy(self) -> Broken:
        return self


def test_an_environment_that_fails_is_named() -> None:
    key: Hashable = 0
    with pytest.raises(UserError, match=r"^environment Broken: step failed with ZeroDivisionError: division by zero$"):
        play(lambda: Broken(lambda: Step("", 1 / int(key == 1), True, key)), [GAME], [1], ["a"])
    with pytest.raises(UserError, match="environment Broken: step gave the reward nan; it must be finite"):
        play(lambda: Broken(lambda: Step("", float("nan"), True, key)), [GAME], [1], ["a"])
    starts = iter("ab")
    with pytest.raises(UserError, match="environment Broken: reset says 'b' and 'a' for one prompt and seed"):
        play(lambda: Broken(lambda: Step("", 0.0, True, key), lambda: next(starts)), [GAME], [2], ["a"], ["a"])
    with pytest.raises(UserError, match="the metadata answer None; a number is needed"):
        play(Calculator, [GAME], [1], ["a"])
    assert play(lambda: Broken(lambda: Step("", 0.5, True, key)), [GAME], [1], ["a"]).answers == ("",)


def test_arguments_and_actions_that_do_not_fit_are_refused() -> None:
    for counts, limits in (([0], {}), ([1, 1], {}), ([], {}), ([1], {"max_turns": 0}), ([1], {"max_tokens": 0})):
        with pytest.raises(ValueError, match="each must be at least 1"):
            play(Calculator, [PROBLEM], counts, ["a"], **limits)
    with pytest.raises(ValueError, match="played has 2 entries for 1 episodes"):
        play(Calculator, [PROBLEM], [1], ["a"], played=[[], []])
    row, value = torch.tensor([1, 2]), torch.zeros(2)
    for actions, message in (
        (([row, row], [value, value], [True, True]), r"\(2, 2, 2\) tokens, log-probabilities and finished for 1 contexts"),
        (([row], [value], torch.tensor([True, True])), r"\(1, 1, 2\)"),
        (([row], [value[:1]], [True]), r"tokens \(2,\) torch.int64 with log-probabilities \(1,\)"),
        (([row.float()], [value], [True]), "torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            play(Calculator, [PROBLEM], [1], act=lambda contexts, actions=actions: actions)
