"""The command that lists methods. Part of `flowrl.cli`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

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
    lines += ["", "Parts:", *(f"- {part}: {value}" for part, value in _parts_of(method.config))]
    for title, notes in (("Checked against the source", method.verified), ("Where ours differs", method.deviations)):
        lines += ["", f"{title}:", *(f"- {note}" for note in notes)]
    typer.echo("\n".join([*lines, "", "Defaults:", OmegaConf.to_yaml(OmegaConf.create(method.config)).rstrip()]))


def _parts_of(defaults: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The axes on which methods differ, with their values in a run of this method that says nothing else."""
    from flowrl.config import Config

    config = Config.model_validate({"run_dir": "run", "rewards": ["any"], **defaults})
    a, o = config.advantage, config.objective
    found = [("likelihood", config.likelihood), ("centre", a.centre), ("scale", a.scale), ("ratio", o.ratio), ("objective", o.name), ("reduction", o.reduction)]
    if config.likelihood == "token":
        found.append(("credit", config.token_credit.name))
        found.append(("shaping", _named(config.shaping)))
        found.append(("token weights", _named(config.tokens.weights)))
        found.append(("allocation", config.allocation.name + (f" with {_named(config.allocation.samples)}" if config.allocation.samples else "")))
        ways = [name for name in ("environment", "tree", "partial") if getattr(config, name) is not None]
        found.append(("answers", ", ".join(ways) or "one by one"))
    else:
        found += [("plan", config.rollout.plan), ("kernel", config.rollout.kernel), ("credit", config.credit.normalize)]
    if config.kl.weight > 0:
        found.append(("KL", f"{config.kl.form}, weight {config.kl.weight:g}, in the {config.kl.place}"))
    return found


def _named(parts: Any) -> str:
    return ", ".join(part.name for part in parts) or "none"
