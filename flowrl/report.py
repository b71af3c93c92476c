"""One self-contained HTML page about a run, and the two figures of a README.

The page loads nothing: styles, SVG curves and images are inside it, so it can be mailed, archived and opened offline, in light and in
dark mode. Curves are drawn by matplotlib with placeholder colours that become CSS variables; the same code draws the README figure.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import yaml
from markupsafe import Markup
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from flowrl.tracking import explain_full_disk, read_records, replace_file
from flowrl.types import UserError

__all__ = ["write_readme_figures", "write_report"]

Record = Mapping[str, Any]
Points = tuple[list[float], list[float]]

RATIO_TOLERANCE = 1e-6
"""Largest |log ratio| on the first update of an iteration that counts as exactly 1."""
ZERO_STD_SHARE = 0.25
"""Share of groups without a signal above which the report warns."""
MAX_TILE = 320
"""Pixels; larger samples are shrunk in the page, smaller ones are kept pixel for pixel."""

_PRINT = {"ink": "#1f2933", "muted": "#69757f", "grid": "#e3e7eb", "c1": "#1769aa", "c2": "#d9730d", "c3": "#0f8a6a", "c4": "#8a4fc7"}
_PAGE = {name: f"#fe00{number:02x}" for number, name in enumerate(_PRINT, start=1)}
_SERIES = ("c1", "c2", "c3", "c4")


# --- what a run directory holds ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Run:
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
        node: Any = self.config
        for key in dotted.split("."):
            node = node.get(key) if isinstance(node, Mapping) else None
        return default if node is None else node

    @property
    def iteration(self) -> int:
        return int(self.metrics[-1]["iteration"]) if self.metrics else 0

    def points(self, key: str, records: Sequence[Record] | None = None) -> Points:
        rows = self.metrics if records is None else records
        known = [(float(row["iteration"]), float(row[key])) for row in rows if isinstance(row.get(key), (int, float))]
        return [x for x, _ in known], [y for _, y in known]

    def total(self, key: str) -> float:
        return math.fsum(self.points(key)[1])


def _load(path: Path) -> _Run:
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
    return _Run(path, config, text, versions, files["metrics"][0], files["timings"][0], files["evals"][0], samples, torn)


# --- evaluations ------------------------------------------------------------------------------------------------------------------------


class _Policy(NamedTuple):
    """A row of the results: which weights, sampled with which guidance."""

    name: str
    guidance: float


def _policy(record: Record) -> _Policy:
    is_base = record.get("policy") == "base" or record["iteration"] == 0
    return _Policy("base" if is_base else "tuned", float(record.get("guidance_scale") or 1.0))


def _is_evaluated(record: Record) -> bool:
    return isinstance(record.get("mean"), (int, float)) and "reward" in record and "split" in record


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _half(record: Record) -> float:
    return float(record["ci95"]) if isinstance(record.get("ci95"), (int, float)) else math.nan


@dataclass(frozen=True, slots=True)
class _Change:
    value: float
    half: float
    apart: bool


def _results(run: _Run) -> list[dict[str, Any]]:
    """One table per reward: policies down, splits across; each cell is the latest evaluation of that policy on that split."""
    evaluated = [record for record in run.evals if _is_evaluated(record)]
    guidance = float(run.setting("evaluation.guidance_scale", 1.0))
    splits = _unique(record["split"] for record in evaluated)
    tables = []
    for reward in _unique(record["reward"] for record in evaluated):
        cells = {(_policy(record), record["split"]): record for record in evaluated if record["reward"] == reward}
        changes: dict[str, _Change] = {}
        for split in splits:
            base, tuned = cells.get((_Policy("base", guidance), split)), cells.get((_Policy("tuned", guidance), split))
            if base and tuned:
                value, halves = tuned["mean"] - base["mean"], (_half(base), _half(tuned))
                changes[split] = _Change(value, math.hypot(*halves), abs(value) > sum(halves))
        policies = sorted({policy for policy, _ in cells})
        tables.append({"reward": reward, "splits": splits, "policies": policies, "cells": cells, "changes": changes, "guidance": guidance})
    return tables


# --- checks -----------------------------------------------------------------------------------------------------------------------------


def _checks(run: _Run) -> Iterator[tuple[str, str]]:
    """What can silently go wrong in a run: pairs of ("ok" or "warn", sentence)."""
    count = len(run.metrics)
    for name in run.torn:
        yield "warn", f"The last line of {name} was cut off while it was written and is left out; resuming the run repairs it."
    if not count:
        return

    for name in ["total", *_reward_names(run)]:
        means = run.points(f"reward/{name}/mean")[1]
        spreads = run.points(f"reward/{name}/std")[1]
        constant = sum(spread == 0 for spread in spreads)
        if (spreads and constant == len(spreads)) or (not spreads and len(means) > 1 and len(set(means)) == 1):
            yield "warn", f"Reward {name} was constant in all {len(means)} iterations (value {means[0]:.4g}): it teaches nothing."
        elif constant:
            yield "warn", f"Reward {name} was the same for all images in {constant} of {len(spreads)} iterations."
        elif name == "total" and means:
            yield "ok", f"The reward varied in all {len(means)} iterations."

    groups = len(run.points("reward/zero_std_groups")[1]) * int(run.setting("rollout.groups_per_iteration", 0))
    if groups:
        silent = int(run.total("reward/zero_std_groups"))
        share = f"{silent} of {groups} groups ({silent / groups:.1%}) had equal rewards for all their images and gave no signal"
        yield ("warn", f"{share}: use a finer reward or larger groups.") if silent / groups > ZERO_STD_SHARE else ("ok", f"{share}.")

    ratios = run.points("ratio/max_abs_log_first")[1]
    off = [ratio for ratio in ratios if not abs(ratio) < RATIO_TOLERANCE]
    if off:
        where = f"in {len(off)} of {len(ratios)} iterations (max |log ratio| {max(map(abs, off)):.2e})"
        yield "warn", f"The ratio of the first update was not 1 {where}: sampling and training see different networks."
    elif ratios:
        yield "ok", f"The ratio of every first update was 1 (max |log ratio| {max(map(abs, ratios)):.1g})."

    pairs = [(row["nfe/used"], row["nfe/minimum"]) for row in run.metrics if row.get("nfe/used") and row.get("nfe/minimum")]
    wasteful = [(used, minimum) for used, minimum in pairs if used != minimum]
    if wasteful:
        used, minimum = (sum(column) for column in zip(*wasteful, strict=True))
        excess = f"{_thousands(used)} evaluations for a minimum of {_thousands(minimum)}"
        yield "warn", f"NFE differed from the minimum in {len(wasteful)} of {len(pairs)} iterations: {excess}."
    elif pairs:
        yield "ok", "The network evaluations (NFE) of every iteration were the minimum for this method."

    invalid = int(run.total("reward/invalid"))
    if invalid:
        yield "warn", f"{invalid} images could not be scored and were left out of training."
    elif run.points("reward/invalid")[0]:
        yield "ok", "Every image could be scored."

    lost = _unique(key for row in run.metrics for key, value in row.items() if value is None)
    if lost:
        yield "warn", f"Not finite in at least one iteration: {', '.join(lost[:6])}{' and others' if len(lost) > 6 else ''}."


def _reward_names(run: _Run) -> list[str]:
    keys = _unique(key for row in run.metrics for key in row)
    return [name for key in keys if (name := key.removeprefix("reward/").removesuffix("/mean")) != "total" and key == f"reward/{name}/mean"]


# --- curves -----------------------------------------------------------------------------------------------------------------------------

_Draw = Callable[[Axes, Mapping[str, str]], None]
_RC: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.handlelength": 1.4,
}


def _figure(draw: _Draw, colors: Mapping[str, str], size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.grid(axis="y", color=colors["grid"], linewidth=0.8)
    axes.tick_params(colors=colors["muted"], length=0, labelsize=8.5)
    for spine in axes.spines.values():
        spine.set_color(colors["grid"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    draw(axes, colors)
    if axes.get_yscale() == "linear":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
        axes.yaxis.set_offset_position("right")  # the left corner belongs to the legend
        axes.yaxis.get_offset_text().set_color(colors["muted"])
    axes.set_xlabel("iteration", color=colors["muted"])
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        style: dict[str, Any] = {"labelcolor": colors["ink"], "fontsize": 8.5, "columnspacing": 1.2, "borderaxespad": 0.2}
        axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=5, **style)
    return figure


def _svg(key: str, draw: _Draw) -> Markup:
    """An inline SVG without fixed colours, fixed size, metadata or addresses, whose ids start with ``key``."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**_RC, "svg.hashsalt": key}):
        figure = _figure(draw, _PAGE, (5.6, 2.7))
        FigureCanvasSVG(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::xlink)?|width|height|version)="[^"]*"', "", text[: text.index(">")]) + text[text.index(">") :]
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", text)
    for name, placeholder in _PAGE.items():
        text = text.replace(placeholder, f"var(--{name})")
    return Markup(text)  # matplotlib has escaped every label


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average; the window shrinks at both ends."""
    half = window // 2
    cuts = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return [math.fsum(cut) / len(cut) for cut in cuts]


def _window(count: int) -> int:
    return max(1, count // 16) | 1


def _plot(axes: Axes, points: Points, *, smooth: bool = True, show_all: bool = True, **style: Any) -> None:
    xs, ys = points
    window = _window(len(ys)) if smooth else 1
    if window > 1 and show_all:
        axes.plot(xs, ys, color=style["color"], alpha=0.28, linewidth=0.8)
    axes.plot(xs, _smooth(ys, window), marker="o" if len(xs) == 1 else None, markersize=4, **style)


def _train_reward(run: _Run) -> _Draw:
    def draw(axes: Axes, colors: Mapping[str, str]) -> None:
        names = _reward_names(run)
        shown = ["total", *names] if len(names) > 1 else ["total"]
        for name, color in zip(shown, itertools.cycle(_SERIES), strict=False):
            _plot(axes, run.points(f"reward/{name}/mean"), color=colors[color], label=name if len(shown) > 1 else None)

    return draw


def _eval_curves(run: _Run, reward: str) -> dict[str, list[Record]]:
    guidance = float(run.setting("evaluation.guidance_scale", 1.0))
    curves: dict[str, dict[int, Record]] = {}
    for record in run.evals:
        is_on_curve = _policy(record).name == "tuned" or record["iteration"] == 0
        if _is_evaluated(record) and record["reward"] == reward and is_on_curve and _policy(record).guidance == guidance:
            curves.setdefault(record["split"], {})[record["iteration"]] = record
    order = [*(split for split in run.setting("data.eval", {}) if split in curves), *curves]
    return {split: [curves[split][iteration] for iteration in sorted(curves[split])] for split in _unique(order)}


def _eval_reward(curves: Mapping[str, Sequence[Record]]) -> _Draw:
    def draw(axes: Axes, colors: Mapping[str, str]) -> None:
        for (split, records), name in zip(curves.items(), itertools.cycle(_SERIES), strict=False):
            xs = [record["iteration"] for record in records]
            ys = [record["mean"] for record in records]
            halves = [0.0 if math.isnan(_half(record)) else _half(record) for record in records]
            style: dict[str, Any] = {"color": colors[name], "label": str(split), "marker": "o", "markersize": 3}
            if len(records) > 2:
                low, high = [y - h for y, h in zip(ys, halves, strict=True)], [y + h for y, h in zip(ys, halves, strict=True)]
                axes.fill_between(xs, low, high, color=colors[name], alpha=0.16, linewidth=0)
                axes.plot(xs, ys, **style)
            else:  # measured at the ends only: nothing is known in between
                axes.errorbar(xs, ys, halves, **style, linestyle=":", linewidth=1.2, elinewidth=1.4, capsize=3)

    return draw


def _per_step(run: _Run, suffix: str, offset: float) -> _Draw:
    found = (re.fullmatch(rf"ratio/step_(\d+)/{suffix}", key) for row in run.metrics for key in row)
    steps = sorted({int(match[1]) for match in found if match})

    def draw(axes: Axes, colors: Mapping[str, str]) -> None:
        shades = matplotlib.colormaps["plasma"]
        labelled = {steps[0], steps[len(steps) // 2], steps[-1]} if len(steps) > 5 else set(steps)
        for rank, step in enumerate(steps):
            xs, ys = run.points(f"ratio/step_{step}/{suffix}")
            shade = matplotlib.colors.to_hex(shades(0.12 + 0.7 * rank / max(1, len(steps) - 1)))
            label = f"step {step}" if step in labelled else None
            _plot(axes, (xs, [y - offset for y in ys]), show_all=False, color=shade, linewidth=1.2, label=label)
        if not steps:
            xs, ys = run.points(f"ratio/{suffix}")
            _plot(axes, (xs, [y - offset for y in ys]), color=colors["c1"], label="all steps")

    return draw


def _lines(run: _Run, records: Sequence[Record], series: Sequence[tuple[str, str, str, Any]], *, log: bool = False, smooth: bool = True) -> _Draw:
    """Series are (key, label, colour name, line style)."""

    def draw(axes: Axes, colors: Mapping[str, str]) -> None:
        drawn = [(points, label, color, style) for key, label, color, style in series if (points := run.points(key, records))[0]]
        for points, label, color, style in drawn:
            _plot(axes, points, smooth=smooth, color=colors[color], linestyle=style, label=label if len(series) > 1 else None)
        if log:
            axes.set_yscale("log")
        elif min((min(points[1]) for points, *_ in drawn), default=0) >= 0:
            axes.set_ylim(0, 1.08 * max((max(points[1]) for points, *_ in drawn), default=0) or 1)

    return draw


def _charts(run: _Run) -> Iterator[dict[str, Any]]:
    """Title, caption and either an SVG or the note why there is none."""
    both = [("clip/low", "too low", "c1", "-"), ("clip/high", "too high", "c2", "-")]
    nfe: list[tuple[str, str, str, Any]] = [("nfe/used", "used", "c1", "-"), ("nfe/minimum", "minimum", "c2", (0, (2, 3)))]
    labels = (("rollout", "c1"), ("reward_wait", "c2"), ("train", "c3"), ("total", "c4"))
    seconds = [(f"seconds/{name}", name.replace("_", " "), color, "-") for name, color in labels]
    kl, norm = run.points("kl/mean")[1], run.points("grad_norm")[1]
    wide = bool(norm) and min(norm) > 0 and max(norm) > 30 * min(norm)
    clip_range = f"outside 1 − {run.setting('objective.clip_low', '?')} … 1 + {run.setting('objective.clip_high', '?')}"
    silent = [("reward/zero_std_groups", "", "c2", "-")]

    def chart(title: str, caption: str, draw: _Draw, *needs: str, records: Sequence[Record] | None = None) -> dict[str, Any]:
        known = any(run.points(key, records)[0] for key in needs)
        key = re.sub(r"\W+", "-", title.lower())
        return {"title": title, "caption": caption, "svg": _svg(key, draw) if known else None, "note": f"Not recorded: {', '.join(needs)}."}

    yield chart("Training reward", "weighted sum, mean over the images of an iteration", _train_reward(run), "reward/total/mean")
    rewards = _unique(record["reward"] for record in run.evals if _is_evaluated(record))
    for number, reward in enumerate(rewards):
        caption = f"fixed prompts and seeds, guidance {run.setting('evaluation.guidance_scale', 1.0):g}; bands are 95 % intervals"
        svg = _svg(f"eval-{number}", _eval_reward(_eval_curves(run, reward)))
        yield {"title": f"Evaluation: {reward}", "caption": caption, "svg": svg, "note": ""}
    if not rewards:
        yield {"title": "Evaluation", "caption": "", "svg": None, "note": "No evaluation has been recorded."}
    yield chart("Ratio: mean − 1 per step", "new over old likelihood; step 0 is the noisiest", _per_step(run, "mean", 1.0), "ratio/mean")
    yield chart("Ratio: spread per step", "standard deviation over the decisions of a step", _per_step(run, "std", 0.0), "ratio/std")
    yield chart("Clip fraction", f"share of decisions with a ratio {clip_range}", _lines(run, run.metrics, both), "clip/low", "clip/high")
    if any(kl) or float(run.setting("kl.weight", 0.0)) > 0:
        form = f"to the reference, form {run.setting('kl.form', '?')}, weight {run.setting('kl.weight', 0):g}"
        yield chart("KL divergence", form, _lines(run, run.metrics, [("kl/mean", "", "c1", "-")]), "kl/mean")
    clipped = f"before clipping at {run.setting('optimizer.max_grad_norm', '?')}"
    yield chart("Gradient norm", clipped, _lines(run, run.metrics, [("grad_norm", "", "c1", "-")], log=wide), "grad_norm")
    yield chart("Groups without a signal", "all images of the group got the same reward", _lines(run, run.metrics, silent), silent[0][0])
    caption = "network evaluations per iteration, forward and backward rows"
    yield chart("NFE", caption, _lines(run, run.metrics, nfe, smooth=False), "nfe/used", "nfe/minimum")
    needs = [key for key, *_ in seconds]
    yield chart("Seconds", "wall-clock time of an iteration", _lines(run, run.timings, seconds), *needs, records=run.timings)


# --- samples ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pair:
    """The same prompt and seed before and after training; scores are (reward, before, after)."""

    prompt: str
    before: Image.Image
    after: Image.Image
    scores: list[tuple[str, float | None, float | None]]


def _tiles(folder: Path, split: str) -> tuple[list[str], dict[str, list[float | None]], list[Image.Image]]:
    """Prompts, scores and single images of a saved grid: ``tile`` pixels wide each, ``pad`` pixels around and between them."""
    info = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))
    prompts, columns, width, pad = list(info["prompts"]), int(info["columns"]), int(info["tile"]), int(info["pad"])
    with Image.open(folder / f"{split}.png") as file:
        grid = file.convert("RGB")
    rows = math.ceil(len(prompts) / columns)
    height = (grid.height - pad) // rows - pad
    expected = (columns * (width + pad) + pad, rows * (height + pad) + pad)
    if grid.size != expected:
        raise ValueError(f"the grid of {folder.name} does not have the size that its JSON says")
    corners = [(pad + k % columns * (width + pad), pad + k // columns * (height + pad)) for k in range(len(prompts))]
    return prompts, dict(info["scores"]), [grid.crop((x, y, x + width, y + height)) for x, y in corners]


def _pairs(run: _Run) -> tuple[dict[str, list[_Pair]], list[str]]:
    """The gallery of each split, and notes on what is missing."""
    if not run.samples:
        return {}, ["No samples have been saved: the run stopped before its first evaluation, or evaluation.grid_images is 0."]
    first, last = min(run.samples), max(run.samples)
    if first == last:
        return {}, [f"Samples were saved at iteration {first} only, so there is nothing to compare yet."]
    notes = [] if first == 0 else [f"Samples of the untrained model are missing: “before” is iteration {first}."]
    gallery: dict[str, list[_Pair]] = {}
    names = [{path.stem for path in run.samples[iteration].glob("*.json")} for iteration in (first, last)]
    order = {split: rank for rank, split in enumerate(["trained", "train", *run.setting("data.eval", {})])}
    for split in sorted(names[0] | names[1], key=lambda split: (order.get(split, len(order)), split)):
        try:
            prompts, before_scores, before = _tiles(run.samples[first], split)
            after_prompts, after_scores, after = _tiles(run.samples[last], split)
            if prompts != after_prompts:
                raise ValueError("the prompts differ between the first and the last iteration")
            shared = [name for name in before_scores if name in after_scores]
            gallery[split] = [
                _Pair(prompt, a, b, [(name, before_scores[name][k], after_scores[name][k]) for name in shared])
                for k, (prompt, a, b) in enumerate(zip(prompts, before, after, strict=True))
            ]
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            notes.append(f"The samples of “{split}” cannot be shown: {error}.")
    return gallery, notes


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    if max(image.size) > MAX_TILE:
        image = image.copy()
        image.thumbnail((MAX_TILE, MAX_TILE), Image.Resampling.LANCZOS)
        image.save(buffer, format="JPEG", quality=90)
        kind = "jpeg"
    else:
        image.save(buffer, format="PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --- the page ---------------------------------------------------------------------------------------------------------------------------


def _thousands(value: float) -> str:
    return f"{round(value):,}".replace(",", "\u202f")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _score(value: Any, signed: bool = False) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    digits = 3 if abs(value) < 100 else 1
    return f"{value:+.{digits}f}".replace("-", "−") if signed else f"{value:.{digits}f}".replace("-", "−")


def _facts(run: _Run) -> list[tuple[str, str]]:
    get = run.setting
    rank = get("model.lora.rank") if get("model.adapter") == "lora" else None
    rewards = [reward for reward in get("rewards", []) if isinstance(reward, Mapping)]
    versions = [f"{name} {run.versions[name]}" for name in ("flowrl", "torch", "diffusers", "python") if name in run.versions]
    machine = [str(run.versions[name]) for name in ("device", "machine", "platform") if name in run.versions]
    facts = [
        ("Method", [get("method")]),
        ("Model", [get("model.path"), get("model.dtype")]),
        ("Trained weights", [f"LoRA, rank {rank}" if rank else get("model.adapter")]),
        ("Reward", [" + ".join(f"{reward.get('weight', 1.0):g} × {reward.get('name')}" for reward in rewards)]),
        ("Rollout", [get("rollout.plan"), f"{get('rollout.num_steps', '?')} steps", get("rollout.kernel")]),
        ("Noise level", [get("rollout.noise_level")]),
        ("Batch", [f"{get('rollout.groups_per_iteration', '?')} prompts × {get('rollout.group_size', '?')} images"]),
        ("Updates per iteration", [get("objective.updates_per_iteration")]),
        ("Objective", [get("objective.name"), f"clip −{get('objective.clip_low', '?')} +{get('objective.clip_high', '?')}"]),
        ("Advantage", [get("advantage.name")]),
        ("Learning rate", [get("optimizer.learning_rate")]),
        ("Guidance", [f"rollout {get('rollout.guidance_scale', '?')}", f"evaluation {get('evaluation.guidance_scale', '?')}"]),
        ("Seed", [get("seed")]),
        ("Versions", versions),
        ("Machine", machine),
    ]
    return [(label, text) for label, parts in facts if (text := ", ".join(str(part) for part in parts if part not in (None, "")))]


def _tiles_of_numbers(run: _Run, tables: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """The headline numbers: (label, value, small print)."""
    tiles = []
    for table in tables[:1]:
        for split in sorted(table["changes"], key=lambda split: split != "eval")[:1]:
            change, cells, guidance = table["changes"][split], table["cells"], table["guidance"]
            before, after = (_score(cells[_Policy(name, guidance), split]["mean"]) for name in ("base", "tuned"))
            small = f"{_score(change.value, signed=True)} ± {_score(change.half)}"
            tiles.append((f"{table['reward']} reward, {split} prompts", f"{before} → {after}", small))
    elapsed = run.points("elapsed", run.timings)[1] or [math.fsum(run.points("seconds/total", run.timings)[1])]
    images = run.points("images")[1]
    total = run.setting("training.iterations", "?")
    forward, backward = _thousands(run.total("nfe/forward")), _thousands(run.total("nfe/backward"))
    tiles.append(("Iterations", _thousands(run.iteration), f"of {total}" + ("" if run.iteration == total else ", not finished")))
    tiles.append(("Wall-clock", _duration(elapsed[-1]) if run.timings else "–", "" if run.timings else "not recorded"))
    tiles.append(("Images", _thousands(images[-1]) if images else "–", "sampled and scored"))
    tiles.append(("NFE", _thousands(run.total("nfe/used")) if run.metrics else "–", f"{forward} forward, {backward} backward"))
    return tiles


def write_report(run: Path) -> Path:
    """Writes ``run/report.html``, one page without external resources; missing pieces of an unfinished run are named in the page.

    Args:
        run: a run directory.

    Returns:
        The path of the page.

    Raises:
        UserError: when the folder is not a run directory, when its records are damaged, or when the disk is full.
    """
    run = Path(run)
    loaded = _load(run)
    tables, checks = _results(loaded), list(_checks(loaded))
    gallery, notes = _pairs(loaded)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(score=_score, uri=_data_uri)
    page = environment.from_string(_TEMPLATE).render(
        style=Markup(_STYLE),
        name=run.resolve().name,
        facts=_facts(loaded),
        tiles=_tiles_of_numbers(loaded, tables),
        tables=tables,
        checks=checks,
        warnings=sum(state == "warn" for state, _ in checks),
        gallery=gallery,
        gallery_notes=notes,
        before=min(loaded.samples, default=0),
        after=max(loaded.samples, default=0),
        charts=list(_charts(loaded)) if loaded.metrics or loaded.evals else [],
        config_text=loaded.config_text,
        versions=loaded.versions,
        window=_window(len(loaded.metrics)),
        half=_half,
    )
    path = run / "report.html"
    with explain_full_disk(run, next_step=f"run: flowrl report {run}"):
        replace_file(path, page.encode())
    return path


_STYLE = """
:root { color-scheme: light dark; --bg: #f6f7f9; --card: #fff; --ink: #1f2933; --muted: #69757f; --grid: #e3e7eb; --soft: #f0f3f6;
  --c1: #1769aa; --c2: #d9730d; --c3: #0f8a6a; --c4: #8a4fc7; --good: #0b7a4b; --bad: #b3261e; --warn: #8a5300; --warn-bg: #fff4df; }
@media (prefers-color-scheme: dark) { :root { --bg: #12161b; --card: #1a2027; --ink: #e4e9ee; --muted: #98a4af; --grid: #2d3640;
  --soft: #212932; --c1: #62aef0; --c2: #f5a04c; --c3: #46c9a2; --c4: #c39bf0; --good: #5bd39b; --bad: #ff8a80; --warn: #ffc66b;
  --warn-bg: #33291a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 48px 0 14px; letter-spacing: -.01em; }
h3 { font-size: 14px; margin: 0; font-weight: 600; }
.eyebrow, .label, th { color: var(--muted); font-size: 12.5px; font-weight: 500; }
.eyebrow { margin: 0 0 4px; }
.card, figure { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; }
.numbers { display: flex; flex-wrap: wrap; margin-top: 24px; overflow: hidden; }
.numbers div { flex: 1 1 158px; padding: 16px 20px; box-shadow: -1px -1px 0 var(--grid); }
.numbers div.lead { flex: 1.6 1 230px; }
.value { font-size: 22px; font-weight: 650; letter-spacing: -.02em; font-variant-numeric: tabular-nums; white-space: nowrap; }
.small { color: var(--muted); font-size: 12.5px; font-weight: 400; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 12px 28px; margin: 22px 0 0; }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 9px 20px; border-top: 1px solid var(--grid); white-space: nowrap; }
thead th { border-top: 0; } th:first-child, td:first-child { text-align: left; }
tr.main td { font-weight: 600; } tr.change td { background: var(--soft); }
.table { overflow: hidden; } .table + .table { margin-top: 14px; } .table h3 { padding: 14px 20px 4px; }
.plus { color: var(--good); font-weight: 650; } .minus { color: var(--bad); font-weight: 650; }
.checks { list-style: none; margin: 0; padding: 10px 20px; } .checks li { padding: 4px 0 4px 26px; position: relative; }
.checks li::before { position: absolute; left: 0; font-weight: 700; content: "✓"; color: var(--good); }
.checks li.warn::before { content: "!"; left: 4px; color: var(--warn); } .checks li.warn { color: var(--warn); }
.note { background: var(--warn-bg); color: var(--warn); border-radius: 8px; padding: 10px 16px; margin: 0 0 12px; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(262px, 1fr)); gap: 14px; margin: 10px 0 26px; }
.pair { padding: 12px; display: flex; flex-direction: column; } .pair p { margin: 0 0 10px; flex: 1; font-size: 13.5px; line-height: 1.35; }
.images { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; }
.images img { width: 100%; display: block; border-radius: 5px; image-rendering: auto; }
.images img.small-image { image-rendering: pixelated; }
.images span { display: block; font-size: 12.5px; color: var(--muted); margin-top: 4px; font-variant-numeric: tabular-nums; }
.images b { color: var(--ink); font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 14px; }
figure { margin: 0; padding: 14px 16px 8px; } figcaption { margin-bottom: 8px; }
figure svg { width: 100%; height: auto; display: block; } figure svg text { font-family: inherit !important; }
details { padding: 0 20px; margin-bottom: 10px; } summary { cursor: pointer; padding: 12px 0; font-weight: 600; }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 0 0 16px; }
details table { margin-bottom: 16px; } details td { white-space: normal; overflow-wrap: anywhere; }
@media print { .pair, figure { break-inside: avoid; } }
"""

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }} · flowrl report</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">flowrl run report</p>
<h1>{{ name }}</h1>
<div class="card numbers">
{% for label, value, small in tiles %}
<div{% if "→" in value %} class="lead"{% endif %}><span class="label">{{ label }}</span><br><span class="value">{{ value }}</span><br>
<span class="small">{{ small }}</span></div>
{% endfor %}
</div>
<dl>
{% for label, text in facts %}
<div><dt class="label">{{ label }}</dt><dd>{{ text }}</dd></div>
{% endfor %}
</dl>
</header>

<h2 id="results">Results</h2>
{% for table in tables %}
<section class="card table">
<h3>{{ table.reward }}</h3>
<div class="scroll"><table>
<thead><tr><th>mean ± 95 % interval</th>{% for split in table.splits %}<th>{{ split }}</th>{% endfor %}</tr></thead>
<tbody>
{% for policy in table.policies %}
<tr{% if policy.guidance == table.guidance %} class="main"{% endif %}>
<td>{{ policy.name | capitalize }}{{ ", guidance %g" | format(policy.guidance) if policy.guidance != 1 else "" }}</td>
{% for split in table.splits %}
{% set cell = table.cells.get((policy, split)) %}
{% if cell %}
<td>{{ cell.mean | score }} ± {{ half(cell) | score }}<br><span class="small">{{ "n = %s" | format(cell.n) if cell.n else "" }}
{%- if policy.name == "tuned" %}, iteration {{ cell.iteration }}{% endif %}</span></td>
{% else %}<td>–</td>
{% endif %}
{% endfor %}
</tr>
{% endfor %}
{% if table.changes %}
<tr class="change"><td>Change</td>
{% for split in table.splits %}
{% set change = table.changes.get(split) %}
{% if change %}
<td><span{% if change.apart %} class="{{ "plus" if change.value > 0 else "minus" }}"{% endif %}>{{ change.value | score(true) }}</span>
± {{ change.half | score }}<br>
<span class="small">{{ "intervals do not overlap" if change.apart else "intervals overlap" }}</span></td>
{% else %}<td>–</td>
{% endif %}
{% endfor %}
</tr>
{% endif %}
</tbody>
</table></div>
</section>
{% if not table.changes %}
<p class="note">The tuned model and its base have not both been evaluated, so there is no change to report.</p>
{% endif %}
{% else %}
<p class="note">No evaluation has been recorded: the run stopped before the first one.</p>
{% endfor %}

<h2 id="checks">Checks{% if warnings %}: {{ warnings }} to look at{% endif %}</h2>
{% if checks %}
<ul class="card checks">
{% for state, text in checks | sort(attribute="0", reverse=true) %}
<li class="{{ state }}">{{ text }}</li>
{% endfor %}
</ul>
{% else %}
<p class="note">No training iteration has been recorded, so there is nothing to check.</p>
{% endif %}

<h2 id="gallery">Before and after</h2>
{% for note in gallery_notes %}
<p class="note">{{ note }}</p>
{% endfor %}
{% for split, pairs in gallery.items() %}
<h3>{{ split }} <span class="label">same prompts and seeds at iteration {{ before }} and {{ after }}, in their fixed order</span></h3>
<div class="pairs">
{% for pair in pairs %}
<article class="card pair"><p>{{ pair.prompt }}</p>
<div class="images">
{% for image, title in ((pair.before, "before"), (pair.after, "after")) %}
{% set side = loop.index %}
<div>{% if pair.scores | length != 1 %}<span>{{ title }}</span>{% endif %}
<img{% if image.width <= 128 %} class="small-image"{% endif %} alt="{{ title }}: {{ pair.prompt }}" src="{{ image | uri }}">
{% for row in pair.scores %}
<span>{{ title if pair.scores | length == 1 else row[0] }} <b>{{ row[side] | score }}</b></span>
{% endfor %}
</div>
{% endfor %}
</div>
</article>
{% endfor %}
</div>
{% endfor %}

<h2 id="curves">Curves</h2>
{% if charts %}
{% if window > 1 %}
<p class="small">Faint lines show every iteration, strong lines the centred mean of {{ window }}; evaluations, NFE and checks are never smoothed.</p>
{% endif %}
<div class="charts">
{% for chart in charts %}
<figure><figcaption><h3>{{ chart.title }}</h3><span class="small">{{ chart.caption }}</span></figcaption>
{% if chart.svg %}{{ chart.svg }}{% else %}<p class="note">{{ chart.note }}</p>{% endif %}
</figure>
{% endfor %}
</div>
{% else %}
<p class="note">No training iteration has been recorded, so there are no curves.</p>
{% endif %}

<h2 id="details">Details</h2>
<details class="card"><summary>Resolved config</summary><pre>{{ config_text }}</pre></details>
<details class="card"><summary>Versions and machine</summary>
{% if versions %}
<table>{% for key, value in versions.items() %}<tr><td>{{ key }}</td><td>{{ value }}</td></tr>{% endfor %}</table>
{% else %}
<p class="note">versions.json is missing.</p>
{% endif %}
</details>
</main>
</body>
</html>
"""


# --- figures for a README ---------------------------------------------------------------------------------------------------------------


def write_readme_figures(run: Path, out: Path, *, split: str | None = None, reward: str | None = None) -> tuple[Path, Path]:
    """Writes before_after.png and reward_curve.png, on white.

    before_after.png shows the first eight prompts of a split in their fixed order, nothing chosen: small images four times their size,
    pixel for pixel, with caption and scores. reward_curve.png shows a reward in training and on each evaluated split, with 95 %
    intervals.

    Args:
        run: a run directory with evaluations and samples of at least two iterations.
        out: folder, created when missing.
        split: split of before_after.png; None = ``eval`` when there is one, otherwise the first.
        reward: evaluated reward of reward_curve.png; None = the first.

    Returns:
        (before_after.png, reward_curve.png).

    Raises:
        UserError: when the folder is not a run directory, or lacks what a figure needs.
    """
    loaded = _load(Path(run))
    gallery, notes = _pairs(loaded)
    name = split or ("eval" if "eval" in gallery else next(iter(gallery), None))
    if name not in gallery:
        reason = notes[0] if notes else f"there is no split {name}, only {', '.join(gallery)}"
        raise UserError(f"{run}: no before/after picture can be made: {reason}")
    rewards = _unique(record["reward"] for record in loaded.evals if _is_evaluated(record))
    reward = reward or next(iter(rewards), None)
    if reward not in rewards:
        known = f"only {', '.join(rewards)}" if rewards else "nor any other"
        raise UserError(f"{run}: no reward curve can be drawn: no evaluation of reward {reward} is recorded, {known}")
    curves = _eval_curves(loaded, str(reward))

    def draw(axes: Axes, colors: Mapping[str, str]) -> None:
        training = loaded.points(f"reward/{reward}/mean")
        if training[0]:
            _plot(axes, training, color=colors["muted"], linewidth=1.2, label="training")
        _eval_reward(curves)(axes, colors)
        axes.set_ylabel(f"{reward} reward", color=colors["muted"])

    with matplotlib.rc_context(_RC):
        figure = _figure(draw, _PRINT, (7.2, 3.4))
        figure.patch.set(alpha=1, facecolor="white")
        FigureCanvasAgg(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    paths = Path(out) / "before_after.png", Path(out) / "reward_curve.png"
    with explain_full_disk(Path(out), next_step="try again"):
        Path(out).mkdir(parents=True, exist_ok=True)
        replace_file(paths[0], _before_after(gallery[name][:8]))
        replace_file(paths[1], buffer.getvalue())
    return paths


def _before_after(pairs: Sequence[_Pair], columns: int = 4) -> bytes:
    """A PNG of cards: caption, the two images, their scores."""
    regular, small = (ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size) for size in (13, 12))
    tile = pairs[0].before.width
    side = 4 * tile if tile <= 64 else 256
    gap, space, line = 6, 28, 17
    width = 2 * side + gap
    captions = [textwrap.wrap(pair.prompt, max(12, width // 8), max_lines=3, placeholder=" …") for pair in pairs]
    lines = max(map(len, captions))
    height = lines * line + 8 + side + 24
    rows, columns = math.ceil(len(pairs) / columns), min(columns, len(pairs))
    canvas = Image.new("RGB", (columns * (width + space) + space, rows * (height + space) + space), "white")
    pen = ImageDraw.Draw(canvas)
    for index, (pair, caption) in enumerate(zip(pairs, captions, strict=True)):
        left, top = space + index % columns * (width + space), space + index // columns * (height + space)
        for number, text in enumerate(caption, start=lines - len(caption)):
            pen.text((left, top + number * line), text, font=regular, fill=_PRINT["ink"])
        for number, (title, image) in enumerate((("before", pair.before), ("after", pair.after))):
            x, y = left + number * (side + gap), top + lines * line + 8
            method = Image.Resampling.NEAREST if side >= tile else Image.Resampling.LANCZOS
            canvas.paste(image.resize((side, side), method), (x, y))
            score = _score(pair.scores[0][1 + number]) if pair.scores else ""
            pen.text((x, y + side + 5), f"{title}  {score}", font=small, fill=_PRINT["muted"])
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
