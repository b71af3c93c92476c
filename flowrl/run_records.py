"""Reading a run directory: config, versions, JSON lines, evaluations, and where the samples are; unfinished runs included."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from flowrl.tracking import read_records
from flowrl.types import UserError

__all__ = ["EvaluatedPolicy", "Points", "Record", "Run", "eval_curves", "evaluated_policy", "half_width", "is_evaluated", "load_run", "reward_names", "unique"]

Record = Mapping[str, Any]
Points = tuple[list[float], list[float]]


@dataclass(frozen=True, slots=True)
class Run:
    """What a run directory holds, as written: missing files are empty, lines cut off at the end are left out and listed in ``torn``.

    ``samples`` maps an iteration to its folder of sample grids, in ascending order.
    """

    path: Path
    config: Record
    config_text: str
    versions: Record
    metrics: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    samples: dict[int, Path]
    torn: list[str] = field(default_factory=list)

    def setting(self, dotted: str, default: Any = None) -> Any:
        """A value of the config by its dotted name; ``default`` when it is absent or null."""
        node: Any = self.config
        for key in dotted.split("."):
            node = node.get(key) if isinstance(node, Mapping) else None
        return default if node is None else node

    @property
    def is_text(self) -> bool:
        """Whether it trained a language model."""
        return bool(self.setting("likelihood") == "token")

    @property
    def samples_are(self) -> str:
        """What its samples are called."""
        return "answers" if self.is_text else "images"

    @property
    def iteration(self) -> int:
        """The last recorded iteration, 0 = none."""
        return int(self.metrics[-1]["iteration"]) if self.metrics else 0

    def points(self, key: str, records: Sequence[Record] | None = None) -> Points:
        """(iterations, values) of the lines of ``records`` (None = the metrics) in which ``key`` is a number."""
        rows = self.metrics if records is None else records
        known = [(float(row["iteration"]), float(row[key])) for row in rows if isinstance(row.get(key), (int, float))]
        return [x for x, _ in known], [y for _, y in known]

    def total(self, key: str) -> float:
        """The sum of a metric over the iterations."""
        return math.fsum(self.points(key)[1])


def load_run(path: Path) -> Run:
    """Reads a run directory, of a finished run or not.

    Raises:
        UserError: when the folder is not a run directory, or its config, versions or records are damaged.
    """
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is not a run directory (it has no config.yaml): give the folder that `flowrl train` made")
    text = (path / "config.yaml").read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(text)
        versions = json.loads((path / "versions.json").read_text(encoding="utf-8")) if (path / "versions.json").is_file() else {}
    except (yaml.YAMLError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: config.yaml or versions.json cannot be read ({reason}); restore that file") from error
    if not isinstance(config, Mapping) or not isinstance(versions, Mapping):
        raise UserError(f"{path}: config.yaml and versions.json must hold a mapping; restore them")
    files = {name: read_records(path / f"{name}.jsonl") for name in ("metrics", "timings", "evals")}
    folders = [folder for folder in (path / "samples").glob("iteration_*") if folder.name.removeprefix("iteration_").isdigit()]
    samples = {int(folder.name.removeprefix("iteration_")): folder for folder in sorted(folders)}
    torn = [f"{name}.jsonl" for name, (_, is_torn) in files.items() if is_torn]
    return Run(path, config, text, versions, files["metrics"][0], files["timings"][0], files["evals"][0], samples, torn)


class EvaluatedPolicy(NamedTuple):
    """A row of the results: which weights, sampled with which guidance."""

    name: str
    guidance: float


def evaluated_policy(record: Record) -> EvaluatedPolicy:
    """The policy of a line of evals.jsonl; at iteration 0 every policy is the base."""
    is_base = record.get("policy") == "base" or record["iteration"] == 0
    return EvaluatedPolicy("base" if is_base else "tuned", float(record.get("guidance_scale") or 1.0))


def is_evaluated(record: Record) -> bool:
    """Whether a line of evals.jsonl holds a finite mean of a reward on a split."""
    return isinstance(record.get("mean"), (int, float)) and "reward" in record and "split" in record


def unique(values: Iterable[Any]) -> list[Any]:
    """The values without repetitions, in the order of their first occurrence."""
    return list(dict.fromkeys(values))


def half_width(record: Record) -> float:
    """Half the width of an evaluation's 95 % interval, in units of the reward; NaN when unknown."""
    return float(record["ci95"]) if isinstance(record.get("ci95"), (int, float)) else math.nan


def reward_names(run: Run) -> list[str]:
    """The rewards that metrics.jsonl names, without their total."""
    keys = unique(key for row in run.metrics for key in row)
    return [name for key in keys if (name := key.removeprefix("reward/").removesuffix("/mean")) != "total" and key == f"reward/{name}/mean"]


def eval_curves(run: Run, reward: str) -> dict[str, list[Record]]:
    """Split -> evaluations of a reward from the base to the last, by iteration, all at ``evaluation.guidance_scale``."""
    guidance = float(run.setting("evaluation.guidance_scale", 1.0))
    curves: dict[str, dict[int, Record]] = {}
    for record in run.evals:
        is_on_curve = evaluated_policy(record).name == "tuned" or record["iteration"] == 0
        if is_evaluated(record) and record["reward"] == reward and is_on_curve and evaluated_policy(record).guidance == guidance:
            curves.setdefault(record["split"], {})[record["iteration"]] = record
    order = [*(split for split in run.setting("data.eval", {}) if split in curves), *curves]
    return {split: [curves[split][iteration] for iteration in sorted(curves[split])] for split in unique(order)}
