"""The command that writes a run's weights for others. Part of `flowrl.cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flowrl.cli_parts import examples

__all__ = ["app"]

app = typer.Typer()


@app.command(
    epilog=examples(
        "flowrl export runs/first --out exports/first",
        "flowrl export runs/first --out exports/merged --form merged --dtype bfloat16",
        "flowrl export runs/first --out exports/raw --checkpoint 100 --weights raw --form pipeline",
    )
)
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory with a checkpoint, finished or not.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where it goes; must be new or empty.")],
    checkpoint: Annotated[str, typer.Option(help="Which checkpoint of the run: last, or a number of iterations.")] = "last",
    weights: Annotated[Literal["ema", "raw"] | None, typer.Option(help="The average, or as trained.", show_default="ema, where the run keeps one")] = None,
    form: Annotated[
        Literal["lora", "merged", "transformer", "network", "pipeline"] | None,
        typer.Option(
            help="A LoRA; the network with the LoRA merged; the network of full fine-tuning (network: of a language model); everything.",
            show_default="lora, or transformer or network",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Of the files.", show_default="float32 for a LoRA, else model.dtype")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty; what has the same name is replaced, the rest stays.")] = False,
) -> None:
    """Write a run's weights as plain diffusers, of a language model transformers and peft, load them, with a model card: README.md and its pictures."""
    from flowrl.exporting import export_run

    iteration = export_run(run, out, checkpoint=checkpoint, weights=weights, form=form, dtype=dtype, force=force)
    typer.echo(f"iteration {iteration} in {out}; how to load it: {out / 'README.md'}")
