"""Does it learn, whatever the seed? Runs a config once per seed, one after another, and tabulates base, tuned and the gain with 95 % intervals.

    python benchmarks/seeds.py configs/tiny_flow_grpo.yaml --out benchmarks/demo.md

The gain of a seed is the tuned minus the base mean on the same prompts and start noise. Nothing is chosen afterwards: the seeds are 0, 1, 2.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from flowrl.config import load_config
from flowrl.run import train
from flowrl.tracking import read_records
from flowrl.versions import cpu_name


def last_rows(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the first and of the last evaluation of a run."""
    rows, _ = read_records(run / "evals.jsonl")
    last = max(row["iteration"] for row in rows)
    return [r for r in rows if r["iteration"] == 0], [r for r in rows if r["iteration"] == last]


def table(runs: list[Path]) -> list[str]:
    lines = ["| seed | prompts | reward | guidance | base | tuned | gain |", "| --- | --- | --- | --- | --- | --- | --- |"]
    gains: dict[tuple[str, str, float], list[float]] = {}
    for seed, run in enumerate(runs):
        base, tuned = last_rows(run)
        for b, t in zip(base, tuned, strict=True):
            gain = t["mean"] - b["mean"]
            gains.setdefault((b["split"], b["reward"], b["guidance_scale"]), []).append(gain)
            lines.append(
                f"| {seed} | {b['split']} | {b['reward']} | {b['guidance_scale']} | {b['mean']:.3f} ± {b['ci95']:.3f} "
                f"| {t['mean']:.3f} ± {t['ci95']:.3f} | {gain:+.3f} |"
            )
    lines += ["", "| prompts | reward | guidance | least gain | mean gain |", "| --- | --- | --- | --- | --- |"]
    for (split, reward, scale), values in gains.items():
        lines.append(f"| {split} | {reward} | {scale} | {min(values):+.3f} | {sum(values) / len(values):+.3f} |")
    return lines


def main(
    config: Annotated[Path, typer.Argument(help="a run's YAML file")],
    out: Annotated[Path, typer.Option(help="the table to write")],
    seeds: Annotated[int, typer.Option(help="seeds 0 .. seeds - 1")] = 3,
    runs: Annotated[Path, typer.Option(help="folder of the run directories")] = Path("runs/seeds"),
    only: Annotated[int | None, typer.Option(help="train this seed and stop: several processes can share the work")] = None,
) -> None:
    """Train with every seed and write the table; run directories that are complete are used as they are."""
    folders = []
    for seed in range(seeds) if only is None else [only]:
        run = runs / f"{config.stem}-{seed}"
        loaded = load_config(config, [f"run_dir={run}", f"seed={seed}"])
        if not (run / "report.html").exists():
            train(loaded, run if run.exists() else None)
        folders.append(run)
    if only is not None:
        return
    metrics, _ = read_records(folders[0] / "metrics.jsonl")
    versions = [json.loads((run / "versions.json").read_text()) for run in folders]
    elapsed = [read_records(run / "timings.jsonl")[0][-1]["elapsed"] for run in folders]
    each = [f"{t:.0f} s with {v['threads']} thread(s) at commit {(v['commit'] or 'none')[:7]}" for t, v in zip(elapsed, versions, strict=True)]
    head = [
        f"# {config.name}: {seeds} seeds",
        "",
        f"{cpu_name()}, {os.cpu_count()} cores; torch {torch.__version__}.",
        f"Each run: {metrics[-1]['iteration']} iterations, {metrics[-1]['images']:,} images, {metrics[-1]['nfe/total']:,} network rows (forward and backward).",
        f"Training, evaluations not counted: {'; '.join(each)}.",
        "Means over at least 512 images per prompt set, ± 95 % interval clustered by prompt; guidance 1.0 means no classifier-free guidance.",
        "",
    ]
    out.write_text("\n".join(head + table(folders)) + "\n", encoding="utf-8")
    typer.echo(out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    typer.run(main)
