"""What the modules of the command line share: examples in help texts, tables, completion of rewards' names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import typer

__all__ = ["Overrides", "complete_reward", "examples", "print_noted", "print_table"]


def examples(*lines: str) -> str:
    """The last part of a command's help."""
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"  [cyan]{line}[/cyan]" for line in lines)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers_from: int | None = None, whole: int = 0, stderr: bool = False) -> None:
    """A table without lines.

    Args:
        numbers_from: the first column that is aligned on the right; None = none.
        whole: so many columns from the left are never broken into lines.
        stderr: where to print it.
    """
    from rich.console import Console
    from rich.table import Table

    table: Table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        right = numbers_from is not None and index >= numbers_from
        table.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=index < whole)
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False, stderr=stderr).print(table)


def print_noted(columns: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str]) -> None:
    """A table of numbers with its notes below."""
    print_table(columns, rows, numbers_from=1)
    for note in notes:
        typer.echo(note)


def _complete_override(incomplete: str) -> list[str]:
    from flowrl.config import Config
    from flowrl.mistakes import leaf_keys

    return [f"{key}=" for key in leaf_keys(Config) if key.startswith(incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings on top of the file, values in YAML.", autocompletion=_complete_override),
]


def complete_reward(incomplete: str) -> list[str]:
    """Names of built-in rewards and installed plug-ins that begin so."""
    from rewards.plugins import installed_plugins
    from rewards.table import REWARDS

    return [name for name in [*REWARDS, *(plugin.name for plugin in installed_plugins())] if name.startswith(incomplete)]
