"""The command line. Every command is a thin layer over a function of the package, and imports what is heavy only when it runs.

Exit codes: 0 done; 1 a failure of the program or the machine; 2 a mistake in what the user gave, one line each on stderr; 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from flowrl import __version__, cli_estimate, cli_export, cli_methods, cli_rewards
from flowrl.cli_parts import Overrides, complete_reward, examples, print_table

if TYPE_CHECKING:
    from flowrl.config import Config

__all__ = ["main"]

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer brings its own click and exports only some of its exceptions


app = typer.Typer(
    name="flowrl",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "flowrl train configs/tiny_flow_grpo.yaml run_dir=runs/first",
        "flowrl report runs/first",
        "flowrl sample --run runs/first 'a red circle above a blue square'",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None = those of the process.
    Returns:
        The exit code. A failure that is a bug of ours is raised, so that its traceback is shown.
    """
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="flowrl", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped", code=130)
    except _UsageError as error:
        context = getattr(error, "ctx", None)
        message = " ".join(error.format_message().split()) if hasattr(error, "format_message") else str(error)
        return _fail(f"{message.rstrip('.')} (see {context.command_path if context else 'flowrl'} --help)")
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(f"no space left on the disk ({error.filename or 'while writing'}); free some and run the command again", code=1)
        from flowrl.memory import shortage
        from flowrl.types import UserError

        if isinstance(error, UserError):
            return _fail(str(error))
        if said := shortage(error):
            return _fail(said, code=1)
        raise


def _fail(message: str, code: int = 2) -> int:
    for line in message.splitlines():
        typer.echo(f"error: {line}", err=True)
    return code


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flowrl {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def flowrl(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Fine-tune image generators with reinforcement learning."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(
    epilog=examples(
        "flowrl train configs/tiny_flow_grpo.yaml",
        "flowrl train configs/tiny_flow_grpo.yaml run_dir=runs/b seed=1 rollout.num_steps=8 'rewards={scene: 1.0}'",
        "flowrl train --resume runs/b training.iterations=400",
        "accelerate launch --num_processes 2 -m flowrl.cli train configs/tiny_flow_grpo.yaml",
    )
)
def train(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="A run's YAML file. With --resume: the run's own by default.")] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Continue this run directory from its last good checkpoint, bit for bit.")] = None,
) -> None:
    """Fine-tune a model. Everything about the run is written to its run directory.

    Ctrl-C finishes the step, saves a checkpoint and exits with code 130.
    """
    _train(_config_to_train("train", config, list(overrides or []), resume), resume)


@app.command(
    epilog=examples(
        "flowrl pairs configs/tiny_flow_grpo.yaml --groups 500 --out pairs/base",
        "flowrl prefer configs/tiny_flow_dpo.yaml --pairs pairs/base run_dir=runs/dpo rollout.group_size=2 old_policy=null",
        "flowrl prefer --resume runs/dpo",
    )
)
def prefer(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="A run's YAML file. With --resume: the run's own by default.")] = None,
    overrides: Overrides = None,
    pairs: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Pairs: a .jsonl or .parquet file, a folder, or a hub id of `datasets`.", show_default="the config's data.pairs"),
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Continue this run directory from its last good checkpoint, bit for bit.")] = None,
) -> None:
    """Fine-tune a model on preference pairs: `train` for runs whose data is data.pairs."""
    from flowrl.types import UserError

    settings = list(overrides or [])
    if pairs is not None:
        settings.append(f"data.pairs={json.dumps(pairs, ensure_ascii=False)}")
    if resume is None:  # what every run on stored pairs needs, below what the user says
        settings = ["rollout.group_size=2", "old_policy=null", *settings]
    run_config = _config_to_train("prefer", config, settings, resume)
    if run_config.data.pairs is None:
        raise UserError("data.pairs: not set; give --pairs FILE, which `flowrl pairs` can make, or use flowrl train")
    _train(run_config, resume)


def _config_to_train(command: str, config: Path | None, settings: list[str], resume: Path | None) -> Config:
    """The resolved run of `train` and `prefer`: what stands in CONFIG's place may be the first KEY=VALUE."""
    from flowrl.types import UserError

    if config is not None and "=" in str(config) and not config.exists():
        settings = [str(config), *settings]
        config = None
    if config is None and resume is None:
        raise UserError(f"give a CONFIG to start a run, or --resume RUN to continue one (see flowrl {command} --help)")
    return _run_config(resume, config, settings) if resume else _load(config or Path(), settings)


def _train(run_config: Config, resume: Path | None) -> None:
    from flowrl.run import train as run_training

    try:
        run = run_training(run_config, resume)
    except KeyboardInterrupt:
        saved = any(Path(run_config.run_dir, "checkpoints").glob("step_*"))
        then = f"continue with: flowrl train --resume {run_config.run_dir}" if saved else "before the first checkpoint"
        raise typer.Exit(_fail(f"stopped; {then}", code=130)) from None
    from flowrl.processes import leave_processes

    leave_processes()
    if os.environ.get("RANK", "0") == "0":  # one voice under accelerate launch
        from flowrl.tracking import read_records

        _print_evaluations(read_records(run / "evals.jsonl")[0], guided=run_config.likelihood != "token")
        typer.echo(f"run:  {run}\nnext: flowrl report {run}")


@app.command(
    epilog=examples(
        "flowrl sample 'a red circle' 'a blue square' --out pictures",
        "flowrl sample --run runs/first --prompts flowrl:tiny-sd3/unseen --images-per-prompt 4",
        "flowrl sample --model flowrl:tiny-lm 'Tom has 7 apples. He loses 3. How many apples does he have now?' --answers-per-prompt 4",
    )
)
def sample(
    texts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw, or to answer.", show_default=False)] = None,
    prompts: Annotated[str | None, typer.Option(metavar="FILE", help="A .txt or .jsonl file of prompts, or an embedded set.")] = None,
    run: Annotated[Path | None, typer.Option(metavar="RUN", help="Use the tuned weights of this run directory.")] = None,
    checkpoint: Annotated[str, typer.Option(help="Which checkpoint of the run: last, or a number of iterations.")] = "last",
    model: Annotated[str | None, typer.Option(help="Base model.", show_default="the run's, or flowrl:tiny-sd3")] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the PNG files, or answers.jsonl, go; must be new or empty.")] = Path("samples"),
    num_steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps of pictures.", show_default="the run's, or 20")] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=1, help="Of pictures; 1 = off.", show_default="the run's, or 1")] = None,
    images_per_prompt: Annotated[int, typer.Option("--images-per-prompt", "--answers-per-prompt", min=1, help="Pictures, or answers, of each.")] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="float32, bfloat16, float16.", show_default="the run's, or by the device")] = None,
) -> None:
    """Draw pictures, or let a language model answer, with a base model or with a run's tuned weights."""
    from flowrl.data import load_prompts
    from flowrl.sections import EvaluationConfig, ModelConfig
    from flowrl.types import UserError

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: use float32, bfloat16 or float16")
    every_text = list(texts or []) + ([prompt.text for prompt in load_prompts(prompts)] if prompts else [])
    if not every_text:
        raise UserError("give a PROMPT or --prompts FILE (see flowrl sample --help)")
    config = _run_config(run) if run else None
    from flowrl.tracking import refuse_full_folder

    refuse_full_folder(out)
    from flowrl.sampling import sample_to_folder

    defaults = config.evaluation if config else EvaluationConfig()
    files = sample_to_folder(
        model or (config.model.path if config else ModelConfig().path),
        every_text,
        out,
        run,
        checkpoint,
        num_steps or defaults.num_steps,
        guidance_scale or defaults.guidance_scale,
        seed,
        images_per_prompt,
        cast("Any", dtype),
    )
    if files[0].suffix == ".jsonl":
        for line in files[0].read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            typer.echo(f"{found['prompt']}\n  {found['answer']}" + ("" if found["finished"] else " ..."))
        typer.echo(f"answers in {files[0]}")
    else:
        typer.echo(f"{len(files)} pictures in {out}")


@app.command(
    epilog=examples(
        "flowrl pairs runs/first --out pairs/first --margin 0.2 --images",
        "flowrl pairs configs/tiny_flow_grpo.yaml --groups 500 --out pairs/base",
    )
)
def pairs(
    target: Annotated[Path, typer.Argument(metavar="RUN|CONFIG", help="A run with saved rollouts, or a config whose base model samples.")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where pairs.jsonl and its latents go; must be new or empty.")] = Path("pairs"),
    groups: Annotated[int | None, typer.Option(min=1, help="With a CONFIG: prompts to sample a group for.", show_default="one iteration's")] = None,
    reward: Annotated[str, typer.Option("--reward", "-r", help="The reward that decides; total = the weighted sum.", autocompletion=complete_reward)] = "total",
    margin: Annotated[float, typer.Option(min=0, help="Rewards of a pair differ by more than this.")] = 0.0,
    max_pairs: Annotated[int | None, typer.Option(min=1, help="Keep so many, evenly spread.", show_default="all")] = None,
    per_group: Annotated[int, typer.Option(min=1, help="Best against worst, next best against next worst, ...: so many from each group.")] = 1,
    images: Annotated[bool, typer.Option("--images", help="Also write the pictures of the pairs as PNG files.")] = False,
) -> None:
    """Make preference pairs from scored samples: in each group the best against the worst.

    A RUN gives the rollouts that it saved (logging.rollouts_every); a CONFIG samples from its base model.
    """
    from flowrl.types import UserError

    is_run = target.is_dir()
    if is_run and (overrides or groups is not None):
        raise UserError("--groups and KEY=VALUE are for a CONFIG; the rollouts of a RUN have been sampled")
    config = _run_config(target) if is_run else _load(target, [*(overrides or []), "data.pairs=null"])  # the pairs that it names may be yet to be made
    from flowrl.pairing import PairChoice, pairs_from_base, pairs_from_run

    choice = PairChoice(reward=reward, margin=margin, max_pairs=max_pairs, per_group=per_group)
    if is_run:
        counts = pairs_from_run(config, out, images=images, **choice)
    else:
        counts = pairs_from_base(config, out, groups or config.rollout.groups_per_iteration, images=images, **choice)
    invalid = f", {counts.invalid} of which could not be scored," if counts.invalid else ""
    typer.echo(f"{counts.samples} samples{invalid} in {counts.groups} groups, of which {counts.without_pair} have no two that differ by more than {margin:g}")
    kept = f" of {counts.found}" if counts.written < counts.found else ""
    typer.echo(f"{counts.written}{kept} pairs in {out / 'pairs.jsonl'}\nnext: flowrl prefer CONFIG --pairs {out}")


@app.command(
    "eval",
    epilog=examples(
        "flowrl eval runs/first",
        "flowrl eval runs/first --reward scene_strict --reward jpeg_compressibility --split unseen --num-images 1024",
        "flowrl eval configs/tiny_flow_grpo.yaml --guidance-scale 1 --guidance-scale 3",
    ),
)
def evaluate(
    target: Annotated[Path, typer.Argument(metavar="RUN|CONFIG", help="A run directory, or a config to evaluate its base model.")],
    rewards: Annotated[
        list[str] | None,
        typer.Option("--reward", "-r", help="Repeatable.", show_default="the run's evaluation rewards", autocompletion=complete_reward),
    ] = None,
    splits: Annotated[list[str] | None, typer.Option("--split", "-s", help="Prompt set, repeatable.", show_default="all of data.eval")] = None,
    num_images: Annotated[
        int | None, typer.Option("--num-images", "--num-answers", "-n", min=2, help="Per prompt set.", show_default="final_num_images")
    ] = None,
    num_steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps.", show_default="the run's")] = None,
    guidance_scales: Annotated[list[float] | None, typer.Option("--guidance-scale", "-g", min=1, help="Repeatable, 1 = off.", show_default="the run's")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed gives the same samples.", show_default="the run's")] = None,
    checkpoint: Annotated[str, typer.Option(help="Which checkpoint of the run: last, or a number of iterations.")] = "last",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line instead of a table.")] = False,
) -> None:
    """Score a run's base model and its checkpoint on the same prompts and seeds, with 95 % confidence intervals."""
    from flowrl.mistakes import did_you_mean
    from flowrl.types import UserError

    run = target if target.is_dir() else None
    config = _run_config(target) if run else _load(target, [])
    for split in splits or []:
        if split not in config.data.eval:
            raise UserError(f"--split {split}: no such prompt set; {did_you_mean(split, config.data.eval)}")
    if guidance_scales and config.likelihood == "token":
        raise UserError("--guidance-scale: language models are sampled without guidance; leave it out")
    from flowrl.evaluation import evaluate_run

    settings = config.evaluation
    rows = evaluate_run(
        run,
        None if run else config,
        list(rewards or []),
        num_images or settings.final_num_images,
        num_steps or settings.num_steps,
        list(guidance_scales or [settings.guidance_scale]),
        list(splits or config.data.eval),
        settings.seed if seed is None else seed,
        checkpoint,
    )
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row))
    else:
        _print_evaluations(rows, guided=config.likelihood != "token")


@app.command(epilog=examples("flowrl report runs/first"))
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, finished or not.")]) -> None:
    """Write RUN/report.html, one file with all curves and the samples before and after, and print its path."""
    from flowrl.report import write_report

    typer.echo(write_report(run))


app.add_typer(cli_estimate.app)
app.add_typer(cli_export.app)
app.add_typer(cli_methods.app)
app.add_typer(cli_rewards.app)


def _load(path: Path, overrides: Sequence[str]) -> Config:
    from flowrl.config import load_config

    return load_config(path, overrides)


def _run_config(run: Path, config: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The config of an existing run directory, also when it has been moved since."""
    from flowrl.types import UserError

    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run directory: it has no config.yaml")
    loaded = _load(config or run / "config.yaml", overrides)
    return loaded if Path(loaded.run_dir).resolve() == run.resolve() else loaded.model_copy(update={"run_dir": str(run)})


def _print_evaluations(rows: Iterable[Mapping[str, Any]], *, guided: bool) -> None:
    """Base beside tuned for every prompt set, reward and, where there is one, guidance scale; `*` where the 95 % confidence intervals do not overlap."""
    pairs: dict[tuple[str, str, float], dict[str, Mapping[str, Any]]] = {}
    for row in rows:  # a later row replaces an earlier one, so of many evaluations the last remains
        policy = "base" if row["iteration"] == 0 else row["policy"]
        pairs.setdefault((row["split"], row["reward"], row["guidance_scale"]), {})[policy] = row

    def interval(row: Mapping[str, Any] | None) -> str:
        return "-" if row is None or row["mean"] is None else f"{row['mean']:.3f} ± {row['ci95'] or 0:.3f}"

    lines = []
    for (split, reward, guidance_scale), pair in pairs.items():
        base, tuned = pair.get("base"), pair.get("tuned")
        change = "-"
        if base and tuned and None not in (base["mean"], tuned["mean"]):
            difference = tuned["mean"] - base["mean"]
            apart = abs(difference) > (base["ci95"] or 0) + (tuned["ci95"] or 0)
            change = f"{difference:+.3f}{'*' if apart else ' '}"
        count = (tuned or base or {}).get("n", "")
        lines.append((split, reward, *([f"{guidance_scale:g}"] if guided else []), interval(base), interval(tuned), change, str(count)))
    print_table(("prompts", "reward", *(["CFG"] if guided else []), "base", "tuned", "change", "images" if guided else "answers"), lines, numbers_from=2)
    typer.echo("mean ± half of the 95 % confidence interval; * = the intervals of base and tuned do not overlap")


if __name__ == "__main__":
    sys.exit(main())
