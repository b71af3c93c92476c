"""The command that says what a run will cost. Part of `flowrl.cli`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowrl.cli_parts import Overrides, examples, print_noted

if TYPE_CHECKING:
    from flowrl.config import Config

__all__ = ["app"]

app = typer.Typer()


@app.command(
    epilog=examples(
        "flowrl estimate configs/tiny_flow_grpo.yaml",
        "flowrl estimate configs/tiny_text.yaml method=gspo",
        "flowrl estimate configs/tiny_flow_grpo.yaml rollout.same_noise=false --no-measure --json",
    )
)
def estimate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run's YAML file.")],
    overrides: Overrides = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Time a few iterations on this machine, about 20 s.")] = True,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Predict the peak memory on a GPU, without weights, in seconds to a minute.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say what a run will cost before it starts: network rows beside those of the method's released code, or tokens at most; seconds and memory.

    Nothing is written.
    """
    from flowrl.config import load_config

    loaded = load_config(config, list(overrides or []))
    expected: Any = _counted(loaded, quiet=as_json)
    predicted = _predicted(loaded, quiet=as_json, needed=measure) if memory else None
    measured = None
    if measure:
        from flowrl.measure import TIME_HEAD, time_lines
        from flowrl.measure import measure as time_iterations

        measured = time_iterations(loaded, expected)
        if not as_json:
            typer.echo("")
            print_noted(TIME_HEAD, *time_lines(measured))
    if as_json:
        typer.echo(
            json.dumps(expected.as_dict() | {"memory": predicted.as_dict() if predicted else None, "measured": measured.as_dict() if measured else None})
        )


def _counted(config: Config, *, quiet: bool) -> Any:
    """`Estimate`, or `TextEstimate` of a language model."""
    if config.likelihood == "token":
        from flowrl.text_estimate import TOKEN_HEAD, estimate_text, token_lines

        of_text = estimate_text(config)
        if not quiet:
            print_noted(TOKEN_HEAD, *token_lines(of_text))
        return of_text
    from flowrl.estimate import HEAD, cost_lines
    from flowrl.estimate import estimate as count

    expected = count(config)
    if not quiet:
        print_noted(HEAD, *cost_lines(expected))
    return expected


def _predicted(config: Config, *, quiet: bool, needed: bool) -> Any:
    """`MemoryEstimate`, or None with a line that says why. needed: a model that cannot be read is an error."""
    from flowrl.memory_estimate import MEMORY_HEAD, estimate_memory, memory_lines
    from flowrl.types import UserError

    try:
        predicted = estimate_memory(config)
    except UserError as error:  # a hub that cannot be reached must not hide the rest, but a measurement needs the model too
        if needed:
            raise
        typer.echo(f"memory: not predicted: {error}", err=quiet)
        return None
    if not quiet:
        typer.echo("")
        print_noted(MEMORY_HEAD, *memory_lines(predicted))
    return predicted
