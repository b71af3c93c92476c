"""The command that lists methods. Part of `flowrl.cli`."""

from __future__ import annotations

from typing import Annotated

import typer

from flowrl.cli_parts import examples, print_table

__all__ = ["app"]

app = typer.Typer()


def _complete_method(incomplete: str) -> list[str]:
    from flowrl.config import list_methods

    return [name for name in list_methods() if name.startswith(incomplete)]


@app.command(epilog=examples("flowrl methods", "flowrl methods flow_grpo", "flowrl methods dapo"))
def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", autocompletion=_complete_method, show_default=False)] = None,
) -> None:
    """List the training methods, or show one: its paper, the parts that it is made of, its defaults, and where ours differs."""
    from omegaconf import OmegaConf

    from flowrl.config import list_methods
    from flowrl.method_parts import parts_of
    from flowrl.mistakes import did_you_mean
    from flowrl.types import UserError

    known = list_methods()
    if name is None:
        of_text = {key: method for key, method in known.items() if method.config.get("likelihood") == "token"}
        of_pictures = {key: method for key, method in known.items() if key not in of_text}
        for number, (title, group) in enumerate((("image generators", of_pictures), ("language models", of_text))):
            typer.echo(("\n" if number else "") + f"Methods of {title} ({len(group)})\n")
            print_table(("method", "what it does"), [(key, method.summary) for key, method in group.items()])
        return
    if name not in known:
        raise UserError(f"unknown method {name}; {did_you_mean(name, known)}")
    method = known[name]
    lines = [f"{name}: {method.summary}", method.paper]
    lines += ["", "Parts:", *(f"- {part}: {value}" for part, value in parts_of(method).items())]
    for title, notes in (("Checked against the source", method.verified), ("Where ours differs", method.deviations)):
        lines += ["", f"{title}:", *(f"- {note}" for note in notes)]
    typer.echo("\n".join([*lines, "", "Defaults:", OmegaConf.to_yaml(OmegaConf.create(method.config)).rstrip()]))
