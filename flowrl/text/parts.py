"""Parts of a method that a config names, with their arguments: credit, factors, shaping, terms. A table gives the class; its arguments are checked here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from flowrl.mistakes import did_you_mean
from flowrl.types import UserError

__all__ = ["Part", "make_part", "part_problems"]

P = TypeVar("P")


class Part(Protocol):
    """What all parts have in common.

    Attributes:
        needs: what `Answers.token` must know before the part is called, so that one pass evaluates it all.
    """

    needs: frozenset[str]

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Stateless:
    """A part without a state."""

    needs: frozenset[str] = frozenset()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def part_problems(where: str, table: Mapping[str, Callable[..., Any]], name: str, args: Mapping[str, Any]) -> Iterator[str]:
    """One line for an unknown name or argument; ``where``: the key of the config."""
    if name not in table:
        yield f"{where}: unknown {name}; {did_you_mean(name, table)}"
        return
    known = list(inspect.signature(table[name]).parameters)
    for argument in args:
        if argument not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes no arguments"
            yield f"{where}: {name} has no argument {argument}; {did_you_mean(argument, known) if known else takes}"


def make_part(where: str, table: Mapping[str, Callable[..., P]], name: str, args: Mapping[str, Any]) -> P:
    """The part of that name.

    Raises:
        UserError: the name, an argument or its value is wrong.
    """
    for problem in part_problems(where, table, name, args):
        raise UserError(problem)
    try:
        return table[name](**args)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {name}: {error}") from error
