"""Which method teaches the embedded language model most with the same number of generated tokens?

    python benchmarks/text.py --seeds 3 --tokens 60000        train everything that is missing, one after another, and write the table
    python benchmarks/text.py --only dapo:1                     train one and stop, so that several processes share the work
    python benchmarks/text.py --share 0/2                       every second run, for two processes side by side
    python benchmarks/text.py --table                           write benchmarks/text.md from the results present

Every run is configs/tiny_text.yaml with the method's published values, the overrides of `OVERRIDES` (which say why), and a seed of 0, 1, 2. It ends with the
first iteration that reaches the budget; what counts are tokens that the policy sampled while it trained, whatever for: answers, continuations, hinted second
tries. Accuracy is that of sampled answers at temperature 1 on fixed random numbers, before and after, on prompts of the same kinds (`eval`) and of kinds and
sizes that no training prompt has (`unseen`). Nothing is chosen afterwards.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from flowrl.config import list_methods, load_config
from flowrl.tracking import replace_file
from flowrl.trainer import Trainer
from flowrl.types import UserError
from flowrl.versions import cpu_name, versions

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "tiny_text.yaml"
BASELINE = "grpo"
EVALUATED = {"eval": 512, "unseen": 512}
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571)

_FOUR = "objective.updates_per_iteration=4"  # published: 16 or 8 updates of at least 32 prompts each; an iteration has 16 prompts here
OVERRIDES: dict[str, list[str]] = {
    "copo": [_FOUR],
    "mdpo": [_FOUR],
    # the punishment is of the length that the run allows, as the method's page says
    "dapo": [_FOUR, "shaping={overlong: {max_length: 48, cache: 10}}"],
    # published: 50, 100 and 50 iterations before the method begins; the budget is about 25
    # and its lambda, 1 - 1 / (alpha length), is below 0 for 19 tokens with the published alpha of 0.05
    "vapo": [_FOUR, "value.warmup_iterations=5", "token_credit={name: gae, args: {gamma: 1.0, lam: length, alpha: 1.0, value_lam: 1.0}}"],
    "kimi_length": ["shaping=[{name: relative_length, args: {weight: 1.0, warmup: 5}}]"],
    "scaf_grpo": ["allocation.samples=[{name: hints, args: {rule: scaf, levels: 12, warmup: 5}}]"],
    # published: forks every 64 or 512 tokens, a window of 8192; an answer has about 19 here, at most 48
    "refuel": ["tree.segment=8"],
    "tree_po": ["tree.segment=8"],
    "spo_tree": ["tree.segment=8"],
    "t_ppo": ["partial.window=16"],
    # the method needs a reward of the reasoning; here the share of true equations among those that the answer writes down
    "posterior_grpo": ["shaping=[{name: gate_product, args: {outcome: arithmetic, quality: arithmetic/arithmetic_work}}]"],
}
"""Method -> what it needs on the embedded model beside configs/tiny_text.yaml."""


def methods() -> list[str]:
    """Those of language models."""
    return [name for name, method in list_methods().items() if method.config.get("likelihood") == "token"]


def evaluate(trainer: Trainer) -> dict[str, tuple[float, float]]:
    """Split -> (accuracy, half width of the 95 % interval clustered by prompt)."""
    found = {}
    for split, number in EVALUATED.items():
        mean, half, _ = trainer.engine.evaluate(split, number, 1.0, 0).summary(len(trainer.splits[split]))["arithmetic"]
        found[split] = (mean, half)
    return found


_untrained: dict[str, dict[str, tuple[float, float]]] = {}


def evaluate_untrained(trainer: Trainer) -> dict[str, tuple[float, float]]:
    """The same, of a model no step has changed: methods that ask it in the same way share one evaluation."""
    config = trainer.config
    key = repr((config.model, config.data, config.generation, config.environment, config.evaluation))
    if key not in _untrained:
        _untrained[key] = evaluate(trainer)
    return _untrained[key]


def train_one(method: str, seed: int, runs: Path, tokens: int) -> None:
    """Train a seed of a method, or find it done."""
    file = runs / f"{method}-{seed}.json"
    if file.exists():
        return
    torch.set_num_threads(1)
    settings = [f"method={method}", f"seed={seed}", f"run_dir={runs / 'none'}", "evaluation.rewards=[arithmetic]"]
    settings += ["training.rows_per_backward=32", *OVERRIDES.get(method, [])]  # fits a core's cache: a fifth faster, and the same but for rounding
    started = time.perf_counter()
    trainer = Trainer(load_config(CONFIG, settings))
    before = evaluate_untrained(trainer)
    rewards, wasted, iteration, sampled = [], 0, 0, 0
    while sampled < tokens:
        iteration += 1
        metrics, _ = trainer.iterate(iteration)
        sampled += metrics["tokens/sampled"]
        rewards.append(metrics["reward/total/mean"])
        wasted += metrics["nfe/used"] - metrics["nfe/minimum"]
    after = evaluate(trainer)
    trainer.close()
    facts = {"method": method, "seed": seed, "budget": tokens, "tokens": sampled, "iterations": iteration, "before": before, "after": after, "rewards": rewards}
    facts |= {
        "rows": trainer.rows_total,
        "wasted": wasted,
        "seconds": round(time.perf_counter() - started, 1),
        "commit": versions(torch.device("cpu")).get("commit"),
    }
    runs.mkdir(parents=True, exist_ok=True)
    replace_file(file, json.dumps(facts).encode())
    typer.echo(f"{method}-{seed}: eval {before['eval'][0]:.3f} -> {after['eval'][0]:.3f} in {iteration} iterations, {facts['seconds']} s")


# --- the table ----------------------------------------------------------------------------------------------------------------------------------


def _interval(values: list[float]) -> str:
    """Mean and half of the 95 % interval over seeds."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = _T_975[min(len(values), 6) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.3f} ± {half:.3f}"


def _gain(run: Mapping[str, Any], split: str) -> float:
    return float(run["after"][split][0] - run["before"][split][0])


def _same(run: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
    return other is not None and all(run[key] == other[key] for key in ("after", "tokens", "rewards"))


def table(runs: Path) -> str:
    """The page."""
    found: dict[str, dict[int, Any]] = {}
    for file in sorted(runs.glob("*.json")):
        run = json.loads(file.read_text())
        found.setdefault(run["method"], {})[run["seed"]] = run
    order = sorted(found, key=lambda name: -statistics.fmean(_gain(run, "eval") for run in found[name].values()))
    some = next(iter(found[order[0]].values()))
    most = max(len(seeds) for seeds in found.values())
    short = sum(len(seeds) < most for seeds in found.values())
    missing = ["", f"**Not complete**: {short} of {len(found)} methods have fewer than {most} seeds."] if short else []
    commits = ", ".join(sorted({run["commit"][:7] for seeds in found.values() for run in seeds.values()}))
    lines = [
        "# Methods of language models, side by side",
        "",
        f"`python benchmarks/text.py --seeds {most} --tokens {some['budget']}`: the embedded model (flowrl:tiny-lm), {some['budget']:,} generated tokens",
        f"a run, one thread of {cpu_name()}, code of {commits}. Accuracy of sampled answers at temperature 1, {EVALUATED['eval']} on each",
        "prompt set; gains are after less before, mean ± half of the 95 % interval over seeds. `against grpo` compares gains seed by seed: + or - if all",
        "seeds agree, = if they do not.",
        "Recipes are the published ones with 16 prompts of 8 answers an iteration and one learning rate for all; what else differs is said in",
        "`OVERRIDES` of the script. Agents (agent_flow, gigpo, igpo, salt, step_grpo) have a calculator, so they begin higher. A method far below may only",
        "want another learning rate.",
        *missing,
        "",
        "| method | seeds | before | after | gain eval | gain unseen | against grpo | iterations | tokens through the network, millions | s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in order:
        seeds = found[name]
        both = [seed for seed in seeds if seed in found.get(BASELINE, {})]
        against = [_gain(seeds[seed], "eval") - _gain(found[BASELINE][seed], "eval") for seed in both]
        sign = "" if name == BASELINE or not against else "+" if min(against) > 0 else "-" if max(against) < 0 else "="
        mean = {key: statistics.fmean(float(run[key]) for run in seeds.values()) for key in ("iterations", "rows", "seconds")}
        before, after = (statistics.fmean(run[key]["eval"][0] for run in seeds.values()) for key in ("before", "after"))
        gains = [_interval([_gain(run, split) for run in seeds.values()]) for split in EVALUATED]
        cells = [
            name,
            str(len(seeds)),
            f"{before:.3f}",
            f"{after:.3f}",
            *gains,
            sign,
            f"{mean['iterations']:.0f}",
            f"{mean['rows'] / 1e6:.2f}",
            f"{mean['seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    same = [name for name in order if name != BASELINE and all(_same(run, found[BASELINE].get(seed)) for seed, run in found[name].items())]
    if same:
        lines += [
            "",
            f"The same as {BASELINE} to the last token, in every run: {', '.join(same)}. No prompt is drawn twice within the budget, so what some of",
            "these remember of earlier visits never acts; others look for something that no answer here has (several rewards, a marker of code).",
        ]
    wasted = {name for name, seeds in found.items() if any(run["wasted"] for run in seeds.values())}
    lines += [
        "",
        "In every iteration of every run the tokens through the network are the least that the method needs."
        if not wasted
        else f"Above the minimum: {wasted}.",
    ]
    return "\n".join(lines) + "\n"


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Generated tokens a run.")] = 60_000,
    runs: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("runs/benchmark_text"),
    only: Annotated[str | None, typer.Option(metavar="METHOD:SEED")] = None,
    share: Annotated[str, typer.Option(metavar="I/N", help="Every N-th run, from the I-th on.")] = "0/1",
    only_table: Annotated[bool, typer.Option("--table")] = False,
) -> None:
    """Train what is missing and write benchmarks/text.md."""
    known = methods()
    jobs: Iterable[tuple[str, int]] = [(name, seed) for seed in range(seeds) for name in sorted(known, key=lambda name: name != BASELINE)]
    if only is not None:
        name, _, number = only.partition(":")
        if name not in known or not number.isdecimal():
            raise typer.BadParameter(f"{only} is not METHOD:SEED", param_hint="--only")
        jobs = [(name, int(number))]
    first, _, step = share.partition("/")
    failed: list[str] = []
    if not only_table:
        for name, seed in list(jobs)[int(first) :: int(step)]:
            try:
                train_one(name, seed, runs, tokens)
            except UserError as error:
                failed.append(f"{name}-{seed}: {error}")
    if only is None and share == "0/1":
        replace_file(ROOT / "benchmarks" / "text.md", table(runs).encode())
    for line in failed:
        typer.echo(line, err=True)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
