"""The commands about rewards: list and show them, score files, serve one to other machines. Part of `flowrl.cli`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flowrl.cli_parts import complete_reward, examples, print_table

if TYPE_CHECKING:
    from flowrl.scoring import Summary

__all__ = ["app"]

app = typer.Typer()
rewards_app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode="rich",
    epilog=examples("flowrl rewards", "flowrl rewards show pickscore", "flowrl rewards show my_file:my_function"),
)
app.add_typer(rewards_app, name="rewards")

Arguments = Annotated[list[str] | None, typer.Option("--arg", metavar="KEY=VALUE", help="An argument of the reward, value in YAML; repeatable.")]
DType = Literal["float32", "bfloat16", "float16"]


@rewards_app.callback()
def list_all_rewards(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line with all facts instead of tables.")] = False,
) -> None:
    """List the rewards that a config can name: built in, of installed plug-ins, and in the Python files of this folder."""
    if context.invoked_subcommand is not None:
        return
    from flowrl.reward_facts import every_reward, needs, range_of
    from rewards.plugins import BUILT_IN, YOURS

    found = every_reward(Path.cwd())
    if as_json:
        for facts in found:
            typer.echo(json.dumps(facts, ensure_ascii=False))
        return
    built_in = [facts for facts in found if facts["origin"] == BUILT_IN]
    rows = [
        (facts["name"], "", facts["problem"], "") if facts["problem"] else (facts["name"], range_of(facts), facts["description"], needs(facts))
        for facts in built_in
    ]
    print_table(("reward", "range", "what it scores", "needs"), rows, whole=2)
    if plugins := [facts for facts in found if facts["origin"] not in (BUILT_IN, YOURS)]:
        typer.echo("\nof installed plug-ins:")
        print_table(("reward", "from", "is", "problem"), [(facts["name"], facts["origin"], facts["target"], facts["problem"]) for facts in plugins], whole=1)
    if yours := [facts for facts in found if facts["origin"] == YOURS]:
        typer.echo("\nin this folder, by the look of it:")
        print_table(("reward", "what it scores"), [(facts["name"], facts["description"]) for facts in yours], whole=1)
    typer.echo("\none in full: flowrl rewards show NAME; your own: module:attribute, or path/to/file.py:attribute")


@rewards_app.command("show", epilog=examples("flowrl rewards show ocr", "flowrl rewards show my_file:Sharpness --arg radius=2"))
def show_reward(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A reward, or module:attribute.", autocompletion=complete_reward)],
    arg: Arguments = None,
) -> None:
    """Show all facts of one reward: range, weights and their licence, memory, what it needs, its arguments."""
    from flowrl.reward_facts import describe_reward

    ((_, args),) = _with_args([name], arg)
    for line in describe_reward(name, args):
        typer.echo(line)


@app.command(
    epilog=examples(
        "flowrl score -r jpeg_compressibility pictures",
        "flowrl score -r clipscore -r pickscore --prompts prompts.txt --out scores.csv pictures",
        "flowrl score -r math --texts answers.jsonl --json",
    )
)
def score(
    images: Annotated[list[Path] | None, typer.Argument(metavar="IMAGES", help="Pictures, and folders of pictures.", show_default=False)] = None,
    rewards: Annotated[list[str] | None, typer.Option("--reward", "-r", help="Repeatable.", autocompletion=complete_reward, show_default=False)] = None,
    arg: Annotated[
        list[str] | None, typer.Option("--arg", metavar="KEY=VALUE", help="An argument of the reward, value in YAML; of several rewards: REWARD.KEY=VALUE.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The prompt of all pictures.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A .txt or .jsonl file of prompts: one a picture in their order, or with a key `file`. Other keys are metadata."),
    ] = None,
    texts: Annotated[Path | None, typer.Option(metavar="FILE", help="Score texts instead: a .jsonl file with `prompt` and `completion`.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    dtype: Annotated[DType | None, typer.Option(help="Of the networks.", show_default="the reward's own; float32 on a CPU")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples a call.", show_default="the reward's own, at most 32")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="A .csv or .jsonl file to write to.", show_default="standard output")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines: the rows, or, with --out, the summary.")] = False,
    skip_damaged: Annotated[bool, typer.Option("--skip-damaged", help="Give a file that cannot be read a row without score instead of stopping.")] = False,
) -> None:
    """Score pictures or texts, one row each in the order given: file, prompt, scores, valid, raw columns, problem.

    Ctrl-C keeps the rows that are done.
    """
    from flowrl.types import UserError

    if not rewards:
        raise UserError("give at least one --reward NAME; see `flowrl rewards`")
    if bool(images) == (texts is not None):
        raise UserError("give either IMAGES or --texts FILE (see flowrl score --help)")
    if texts is not None and (prompt is not None or prompts is not None):
        raise UserError("--texts has the prompts beside the texts; remove --prompt and --prompts")
    if out is not None and out.suffix not in (".csv", ".jsonl"):
        raise UserError(f"--out {out}: give a name that ends in .csv or .jsonl")
    wanted = _with_args(rewards, arg)
    import torch

    from flowrl.scoring import make_rewards, pick_device, picture_items, progress_bar, text_items, write_scores

    items = text_items(texts) if texts is not None else picture_items(images or [], prompt, prompts)
    made = make_rewards(wanted, items, batch_size)
    where = pick_device(device)
    kind = getattr(torch, dtype) if dtype else None
    try:
        with progress_bar(len(items), enabled=out is not None or not sys.stdout.isatty()) as advance:
            summaries = write_scores(made, items, out, sys.stdout, as_json, where, kind, batch_size, skip_damaged, advance)
    except KeyboardInterrupt:
        typer.echo(f"error: stopped; the rows that were done are in {out or 'the output'}", err=True)
        raise typer.Exit(130) from None
    _print_summaries(summaries, out, as_json)


@app.command("serve-reward", epilog=examples("flowrl serve-reward pickscore --port 8101", "flowrl serve-reward judge --arg model=qwen --token-env TOKEN"))
def serve_reward(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A reward, or module:attribute.", autocompletion=complete_reward)],
    arg: Arguments = None,
    host: Annotated[str, typer.Option(help="Address to listen on; any but this machine's own wants a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = any that is free.")] = 8100,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    dtype: Annotated[DType | None, typer.Option(help="Of the networks.", show_default="the reward's own; float32 on a CPU")] = None,
    token_env: Annotated[str | None, typer.Option(metavar="VARIABLE", help="Environment variable with the bearer token that clients must send.")] = None,
    open_to_all: Annotated[bool, typer.Option("--open-to-all", help="Listen beyond this machine without a token.")] = False,
    max_batch: Annotated[int, typer.Option(min=1, help="Samples that are scored together, from several requests.")] = 64,
    max_wait_ms: Annotated[float, typer.Option(min=0, help="How long a request waits for others to share its batch.")] = 2.0,
    max_body_mib: Annotated[float, typer.Option(min=0.001, help="Largest request.")] = 64.0,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests inside at a time; further ones are told to come back.")] = 64,
) -> None:
    """Serve a reward over HTTP to runs elsewhere, which name it `remote`. Needs flowrl-diffusion[server]."""
    ((_, args),) = _with_args([name], arg)
    from flowrl.serving import serve_reward as serve

    serve(
        name,
        args,
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        token_env=token_env,
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        max_body_mib=max_body_mib,
        max_queue=max_queue,
        open_to_all=open_to_all,
    )


def _with_args(names: Sequence[str], given: Sequence[str] | None) -> list[tuple[str, dict[str, Any]]]:
    """Each reward with its arguments. Of several rewards an argument says which it is for: REWARD.KEY=VALUE."""
    import yaml

    from flowrl.types import UserError

    found: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in names]
    for text in given or []:
        owner = next((entry for entry in sorted(found, key=lambda entry: -len(entry[0])) if text.startswith(f"{entry[0]}.")), None)
        if owner is None and len(found) > 1:
            raise UserError(f"--arg {text}: say which reward it is for: --arg {names[0]}.{text}")
        name, args = owner or found[0]
        key, equals, value = (text.removeprefix(f"{name}.") if owner else text).partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--arg {text}: write KEY=VALUE")
        if key in args:
            raise UserError(f"--arg {text}: {key} is given twice")
        try:
            args[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--arg {text}: the value is no YAML ({' '.join(str(error).split())})") from error
    return found


def _print_summaries(summaries: Sequence[Summary], out: Path | None, as_json: bool) -> None:
    """To standard output, or, where the rows went there, to standard error."""
    records: list[Mapping[str, Any]] = [summary.as_dict() for summary in summaries]
    if as_json:
        for record in records:
            typer.echo(json.dumps(record), err=out is None)
        return
    numbers = ("mean", "min", "max")
    rows = [
        (record["reward"], str(record["scored"]), str(record["not_scored"]), *("-" if record[key] is None else f"{record[key]:.4g}" for key in numbers))
        for record in records
    ]
    print_table(("reward", "scored", "not scored", *numbers), rows, numbers_from=1, stderr=out is None)
    if out is not None:
        typer.echo(f"rows in {out}")
