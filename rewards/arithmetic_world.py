"""The world of the embedded language model: word problems of one to three steps, with the working that solves them. Python's standard library only.

A kind is a sequence of pieces, "boxes+loss+more": one start (a plain number, or boxes), steps that change it, and an end that asks. Its level is the number
of equations that solve it, 1 to 3. Some kinds and a range of numbers are held out for the split `unseen`. The grammar, its solution and its answer live
here so that the data of pre-training, the prompts and the reward can never disagree.

    prompt    Tom has 7 apples. He loses 3. Ann has 5 more than Tom. How many apples does Ann have?
    solution  7-3=4 4+5=9 #9
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

__all__ = ["MARKER", "Problem", "Step", "calculate", "hints_of", "is_unseen", "kinds", "make_problem", "make_split", "result", "unseen_kinds", "write"]

MARKER = "#"  # stands before the final answer
LARGEST = 199  # no result is larger
UNSEEN_START = range(41, 50)  # first numbers that only the split `unseen` contains
MEN, WOMEN = ("Tom", "Ben", "Sam", "Max", "Leo", "Jim"), ("Ann", "Mia", "Eva", "Zoe", "Kim", "Amy")
THINGS = ("apples", "pens", "coins", "cards", "eggs", "stamps", "shells", "books")
HOLDERS = ("boxes", "bags", "baskets")
GAINS, LOSSES = ("buys", "finds", "gets"), ("loses", "sells", "uses")
CHANGES = ("gain", "loss", "gain_boxes")
ENDS = ("more", "fewer", "twice", "together", "more_together", "fewer_together", "twice_together")
STEPS_OF = {"boxes": 1, "gain": 1, "loss": 1, "gain_boxes": 2, "more": 1, "fewer": 1, "twice": 1, "together": 1}
STEPS_OF |= {"more_together": 2, "fewer_together": 2, "twice_together": 2}

Draw = Callable[[int, int], int]


@dataclass(frozen=True, slots=True)
class Step:
    """One equation. An operand >= 0 is a number of the problem, -k the result of the k-th step (from 1)."""

    left: int
    sign: str
    right: int
    piece: str  # what it works out: a piece of the kind, or one half of a piece of two steps


@dataclass(frozen=True, slots=True)
class Problem:
    """A word problem.

    Attributes:
        level: number of steps, 1 to 3. kind: pieces joined by "+". start: the first number of the text.
        answer: the result of the last step, 0 to LARGEST.
    """

    prompt: str
    kind: str
    level: int
    start: int
    steps: tuple[Step, ...]
    answer: int

    @property
    def solution(self) -> str:
        """The right working and answer: "7-3=4 4+5=9 #9"."""
        return write(calculate(self.steps))

    def metadata(self) -> dict[str, object]:
        """What a prompt file says of the problem beside its prompt."""
        return {"answer": self.answer, "level": self.level, "kind": self.kind, "solution": self.solution, "hints": hints_of(self.solution)}


def result(left: int, sign: str, right: int) -> int:
    """The value of ``left sign right``; the signs are + - *."""
    return left + right if sign == "+" else left - right if sign == "-" else left * right


def calculate(steps: tuple[Step, ...]) -> list[tuple[int, str, int, int]]:
    """The equations of the steps as (left, sign, right, result), all numbers."""
    equations: list[tuple[int, str, int, int]] = []
    for step in steps:
        left, right = (value if value >= 0 else equations[-value - 1][3] for value in (step.left, step.right))
        equations.append((left, step.sign, right, result(left, step.sign, right)))
    return equations


def write(equations: list[tuple[int, str, int, int]]) -> str:
    """Working and answer as the model writes them; the answer is the last result."""
    return " ".join([f"{a}{sign}{b}={c}" for a, sign, b, c in equations] + [f"{MARKER}{equations[-1][3]}"])


def hints_of(solution: str) -> list[str]:
    """Growing beginnings of a solution: up to each equals sign, then with its result; without the marker. To be put behind the prompt and a space."""
    return [solution[:end] for match in re.finditer(r"=\d*", solution) for end in (match.start() + 1, match.end())]


@cache
def kinds(level: int) -> tuple[str, ...]:
    """All kinds of a level, in a fixed order."""
    changes = [some for n in range(4) for some in itertools.product(CHANGES, repeat=n)]
    found = ((*start, *change, *end) for start in ((), ("boxes",)) for change in changes for end in ((), *((end,) for end in ENDS)))
    return tuple("+".join(pieces) for pieces in found if sum(STEPS_OF[piece] for piece in pieces) == level)


@cache
def unseen_kinds() -> frozenset[str]:
    """Kinds that only the split `unseen` contains: every fifth of levels 2 and 3. Each of their pieces is in other kinds."""
    return frozenset(kind for level in (2, 3) for kind in kinds(level)[3::5])


def is_unseen(problem: Problem) -> bool:
    """Whether a problem must be in no prompt and no answer of training."""
    return problem.start in UNSEEN_START or problem.kind in unseen_kinds()


def make_problem(rng: random.Random, kind: str, start: int | None = None) -> Problem:
    """A random problem of a kind; ``start`` is its first number, where the kind begins with a plain number.

    Raises:
        ValueError: no such kind, or none that stays between 0 and LARGEST was found.
    """
    pieces = kind.split("+")
    if kind not in kinds(sum(STEPS_OF.get(piece, 9) for piece in pieces)):
        raise ValueError(f"no kind of problem is called {kind!r}")
    for _ in range(1000):
        problem = _attempt(rng, kind, pieces, start)
        if problem is not None:
            return problem
    raise ValueError(f"no problem of kind {kind} that starts with {start} stays between 0 and {LARGEST}")


def _attempt(rng: random.Random, kind: str, pieces: list[str], start: int | None) -> Problem | None:
    """One draw; None where a result leaves the range."""
    first, second = rng.sample((rng.choice(MEN), rng.choice(WOMEN)), 2)
    he, thing, holder = "He" if first in MEN else "She", rng.choice(THINGS), rng.choice(HOLDERS)
    steps: list[Step] = []
    value, now = 0, ""

    def add(left: int, sign: str, right: int, piece: str) -> int:
        steps.append(Step(left, sign, right, piece))
        return -len(steps)

    def small() -> int:
        return rng.randint(2, 9)

    def number() -> int:
        return rng.randint(2, 20) if rng.random() < 0.6 else rng.randint(21, 60)

    if pieces[0] == "boxes":
        begin, per = small(), small()
        text = f"{first} has {begin} {holder} with {per} {thing} each."
        value = add(begin, "*", per, "boxes")
    else:
        begin = number() if start is None else start
        text, value = f"{first} has {begin} {thing}.", begin
    for piece in pieces:
        if piece in CHANGES:
            now = " now"
        if piece == "gain":
            n = number()
            text += f" {rng.choice((he, f'Then {he.lower()}'))} {rng.choice(GAINS)} {n} more."
            value = add(value, "+", n, piece)
        elif piece == "loss":
            n = rng.randint(2, 9) if rng.random() < 0.5 else rng.randint(10, 40)
            text += f" {rng.choice((he, f'Then {he.lower()}'))} {rng.choice(LOSSES)} {n}{rng.choice(('', ' of them'))}."
            value = add(value, "-", n, piece)
        elif piece == "gain_boxes":
            n, per = small(), small()
            text += f" {he} {rng.choice(GAINS)} {n} {holder} with {per} {thing} each."
            value = add(value, "+", add(n, "*", per, piece), "gain")
        elif piece in ENDS:
            value, said = _end(piece, value, rng.randint(2, 30), add)
            text += f" {second} has {said.format(thing=thing, first=first)}"
    asked = f"do they have together{now}" if pieces[-1].endswith("together") else f"does {second if pieces[-1] in ENDS else he.lower()} have{now}"
    results = [equation[3] for equation in calculate(tuple(steps))]
    if not all(0 <= found <= LARGEST for found in results):
        return None
    return Problem(f"{text} How many {thing} {asked}?", kind, len(steps), begin, tuple(steps), results[-1])


def _end(piece: str, value: int, n: int, add: Callable[[int, str, int, str], int]) -> tuple[int, str]:
    """The steps of the second person; the new value, and what is said of what that person has."""
    if piece == "together":
        return add(value, "+", n, piece), f"{n} {{thing}}."
    how = piece.removesuffix("_together")
    if how == "twice":
        n = 2 + n % 2
        said = ("twice" if n == 2 else "three times") + " as many as {first}."
    else:
        said = f"{n} {how} than {{first}}."
    other = add(value, {"more": "+", "fewer": "-", "twice": "*"}[how], n, how)
    return (add(value, "+", other, "together") if piece.endswith("_together") else other), said


def make_split(name: str, count: int, seed: int, taken: set[str]) -> Iterator[Problem]:
    """``count`` problems of a split, the levels in turn, none of them in ``taken`` (prompts), to which theirs are added.

    Of `unseen`, level 1 and every other problem of levels 2 and 3 has a first number that training never has; the rest are of kinds that it never has.
    """
    rng = random.Random(f"{name}/{seed}")
    hidden = unseen_kinds()
    known = {level: [kind for kind in kinds(level) if kind not in hidden] for level in (1, 2, 3)}
    made = 0
    while made < count:
        level, turn = made % 3 + 1, made // 3
        if name != "unseen":
            problem = make_problem(rng, rng.choice(known[level]))
        elif level == 1 or turn % 2:
            problem = make_problem(rng, rng.choice([kind for kind in known[level] if not kind.startswith("boxes")]), rng.choice(UNSEEN_START))
        else:
            problem = make_problem(rng, rng.choice([kind for kind in kinds(level) if kind in hidden]))
        if problem.prompt not in taken and is_unseen(problem) == (name == "unseen"):
            taken.add(problem.prompt)
            made += 1
            yield problem
