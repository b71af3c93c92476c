"""The curves of a run, drawn by matplotlib: inline SVG whose placeholder colours become the CSS variables of the page."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flowrl.likelihood_agreement import DIRECT_NAMES
from flowrl.run_records import Points, Record, Run, eval_curves, half_width, is_evaluated, reward_names, unique

__all__ = ["PRINT", "RC", "Draw", "draw_charts", "draw_eval_reward", "make_figure", "plot", "smoothing_window"]

PRINT = {"ink": "#1f2933", "muted": "#69757f", "grid": "#e3e7eb", "c1": "#1769aa", "c2": "#d9730d", "c3": "#0f8a6a", "c4": "#8a4fc7"}
_PAGE = {name: f"#fe00{number:02x}" for number, name in enumerate(PRINT, start=1)}
_SERIES = ("c1", "c2", "c3", "c4")

Draw = Callable[[Axes, Mapping[str, str]], None]
RC: Any = {
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


def make_figure(draw: Draw, colors: Mapping[str, str], size: tuple[float, float]) -> Figure:
    """A transparent figure of ``size`` inches with one pair of axes over iterations, and a legend where there are labels."""
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


def _svg(key: str, draw: Draw) -> Markup:
    """An inline SVG without fixed colours, fixed size, metadata or addresses, whose ids start with ``key``."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**RC, "svg.hashsalt": key}):
        figure = make_figure(draw, _PAGE, (5.6, 2.7))
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


def smoothing_window(count: int) -> int:
    """Iterations, odd, over which a curve of ``count`` points is averaged; 1 = shown as it is."""
    return max(1, count // 16) | 1


def plot(axes: Axes, points: Points, *, smooth: bool = True, show_all: bool = True, **style: Any) -> None:
    """Draws a metric: smoothed, with every iteration faintly behind it (``show_all``); a single point becomes a dot."""
    xs, ys = points
    window = smoothing_window(len(ys)) if smooth else 1
    if window > 1 and show_all:
        axes.plot(xs, ys, color=style["color"], alpha=0.28, linewidth=0.8)
    axes.plot(xs, _smooth(ys, window), marker="o" if len(xs) == 1 else None, markersize=4, **style)


def _train_reward(run: Run) -> Draw:
    def draw(axes: Axes, colors: Mapping[str, str]) -> None:
        names = reward_names(run)
        shown = ["total", *names] if len(names) > 1 else ["total"]
        for name, color in zip(shown, itertools.cycle(_SERIES), strict=False):
            plot(axes, run.points(f"reward/{name}/mean"), color=colors[color], label=name if len(shown) > 1 else None)

    return draw


def draw_eval_reward(curves: Mapping[str, Sequence[Record]]) -> Draw:
    """Means and 95 % intervals of the evaluations of each split (see `eval_curves`)."""

    def draw(axes: Axes, colors: Mapping[str, str]) -> None:
        for (split, records), name in zip(curves.items(), itertools.cycle(_SERIES), strict=False):
            xs = [record["iteration"] for record in records]
            ys = [record["mean"] for record in records]
            halves = [0.0 if math.isnan(half_width(record)) else half_width(record) for record in records]
            style: dict[str, Any] = {"color": colors[name], "label": str(split), "marker": "o", "markersize": 3}
            if len(records) > 2:
                low, high = [y - h for y, h in zip(ys, halves, strict=True)], [y + h for y, h in zip(ys, halves, strict=True)]
                axes.fill_between(xs, low, high, color=colors[name], alpha=0.16, linewidth=0)
                axes.plot(xs, ys, **style)
            else:  # measured at the ends only: nothing is known in between
                axes.errorbar(xs, ys, halves, **style, linestyle=":", linewidth=1.2, elinewidth=1.4, capsize=3)

    return draw


def _per_step(run: Run, suffix: str, offset: float, every: str = "all steps") -> Draw:
    """every: what the line is of where there are no steps."""
    found = [match for row in run.metrics for key in row if (match := re.fullmatch(rf"ratio/(step|time)_(\d+)/{suffix}", key))]
    steps, kind = sorted({int(match[2]) for match in found}), found[0][1] if found else "step"

    def draw(axes: Axes, colors: Mapping[str, str]) -> None:
        shades = matplotlib.colormaps["plasma"]
        labelled = {steps[0], steps[len(steps) // 2], steps[-1]} if len(steps) > 5 else set(steps)
        for rank, step in enumerate(steps):
            xs, ys = run.points(f"ratio/{kind}_{step}/{suffix}")
            shade = matplotlib.colors.to_hex(shades(0.12 + 0.7 * rank / max(1, len(steps) - 1)))
            label = f"{kind} {step}" if step in labelled else None
            plot(axes, (xs, [y - offset for y in ys]), show_all=False, color=shade, linewidth=1.2, label=label)
        if not steps:
            xs, ys = run.points(f"ratio/{suffix}")
            plot(axes, (xs, [y - offset for y in ys]), color=colors["c1"], label=every)

    return draw


def _lines(run: Run, records: Sequence[Record], series: Sequence[tuple[str, str, str, Any]], *, log: bool = False, smooth: bool = True) -> Draw:
    """Series are (key, label, colour name, line style)."""

    def draw(axes: Axes, colors: Mapping[str, str]) -> None:
        drawn = [(points, label, color, style) for key, label, color, style in series if (points := run.points(key, records))[0]]
        for points, label, color, style in drawn:
            plot(axes, points, smooth=smooth, color=colors[color], linestyle=style, label=label if len(series) > 1 else None)
        if log:
            axes.set_yscale("log")
        elif min((min(points[1]) for points, *_ in drawn), default=0) >= 0:
            axes.set_ylim(0, 1.08 * max((max(points[1]) for points, *_ in drawn), default=0) or 1)

    return draw


_JUDGED: tuple[tuple[str, str, list[tuple[str, str, str, Any]]], ...] = (
    ("Matching error", "minus the log-probability of finished samples; its size depends on matching.weighting", [("matching/error", "", "c1", "-")]),
    ("Distance to the old policy", "mean squared difference of the velocities", [("anchor/mean", "", "c1", "-")]),
    (
        "Critic",
        "share of the variance of rewards that the value explains, and how much of the advantages counts",
        [("critic/explained_variance", "explained variance", "c1", "-"), ("critic/strength", "strength", "c2", "-")],
    ),
    ("Preferences", "share of pairs whose chosen sample the policy favours more than the reference does", [("pair/accuracy", "", "c1", "-")]),
    ("Preference margin", "beta times the difference of the log-ratios", [("pair/margin", "", "c1", "-")]),
    ("Differentiated reward", "of the pictures that carry a gradient", [("direct/reward", "", "c1", "-")]),
)
"""Charts of methods that judge finished samples: title, caption, series."""


def _has_ratios(run: Run) -> bool:
    """Whether the run's objective looks at ratios; then their charts are shown even where nothing has been recorded."""
    stepwise = run.setting("likelihood", "transition") == "transition" and run.setting("objective.name", "") not in DIRECT_NAMES
    return stepwise or any("ratio/mean" in row for row in run.metrics)


def _ratio_charts(run: Run, chart: Callable[..., dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield chart("Ratio: mean − 1 per step", "new over old likelihood; step 0 is the noisiest", _per_step(run, "mean", 1.0), "ratio/mean")
    yield chart("Ratio: spread per step", "standard deviation over the decisions of a step", _per_step(run, "std", 0.0), "ratio/std")
    caption = "of the plain ratio; one that drifts below 1 leaves good samples unclipped"
    yield chart("Log-ratio: mean per step", caption, _per_step(run, "log_mean", 0.0), "ratio/mean")
    if any(key.endswith("/norm_mean") for row in run.metrics for key in row):
        yield chart("Normalised log-ratio: mean per step", "GRPO-Guard's, which the objective clips", _per_step(run, "norm_mean", 0.0), "ratio/mean")
    for suffix, side in (("clip_low", "low"), ("clip_high", "high")):
        yield chart(f"Clipped {side} per step", "share of the decisions of a step", _per_step(run, suffix, 0.0), f"clip/{side}")
    yield _clip_chart(run, chart, "decisions")


def _clip_chart(run: Run, chart: Callable[..., dict[str, Any]], what: str) -> dict[str, Any]:
    clip_range = f"outside 1 − {run.setting('objective.clip_low', '?')} … 1 + {run.setting('objective.clip_high', '?')}"
    both: list[tuple[str, str, str, Any]] = [("clip/low", "too low", "c1", "-"), ("clip/high", "too high", "c2", "-")]
    return chart("Clip fraction", f"share of {what} with a ratio {clip_range}", _lines(run, run.metrics, both), "clip/low", "clip/high")


def _token_charts(run: Run, chart: Callable[..., dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What runs of language models have."""
    length: list[tuple[str, str, str, Any]] = [("answer/length", "", "c1", "-")]
    yield chart("Length of answers", "sampled tokens, mean of an iteration", _lines(run, run.metrics, length), "answer/length")
    if any(run.points("answer/unfinished")[1]):
        cut: list[tuple[str, str, str, Any]] = [("answer/unfinished", "", "c2", "-")]
        yield chart("Answers that were cut", "share of an iteration's at the length limit", _lines(run, run.metrics, cut), "answer/unfinished")
    if run.points("entropy/mean")[0]:
        entropy: list[tuple[str, str, str, Any]] = [("entropy/mean", "", "c1", "-")]
        yield chart("Entropy", "of the next token, mean over the trained tokens", _lines(run, run.metrics, entropy), "entropy/mean")
    if not run.points("ratio/mean")[0]:
        return
    yield chart("Ratio: mean − 1", "new over old likelihood of the trained tokens", _per_step(run, "mean", 1.0, "all tokens"), "ratio/mean")
    yield chart("Ratio: spread", "standard deviation over the trained tokens", _per_step(run, "std", 0.0, "all tokens"), "ratio/std")
    yield _clip_chart(run, chart, "tokens")


def draw_charts(run: Run) -> Iterator[dict[str, Any]]:
    """Title, caption and either an SVG or the note why there is none."""
    nfe: list[tuple[str, str, str, Any]] = [("nfe/used", "used", "c1", "-"), ("nfe/minimum", "minimum", "c2", (0, (2, 3)))]
    labels = (("rollout", "c1"), ("reward_wait", "c2"), ("train", "c3"), ("total", "c4"))
    seconds = [(f"seconds/{name}", name.replace("_", " "), color, "-") for name, color in labels]
    kl, norm = run.points("kl/mean")[1], run.points("grad_norm")[1]
    wide = bool(norm) and min(norm) > 0 and max(norm) > 30 * min(norm)
    silent = [("reward/zero_std_groups", "", "c2", "-")]

    def chart(title: str, caption: str, draw: Draw, *needs: str, records: Sequence[Record] | None = None) -> dict[str, Any]:
        known = any(run.points(key, records)[0] for key in needs)
        key = re.sub(r"\W+", "-", title.lower())
        return {"title": title, "caption": caption, "svg": _svg(key, draw) if known else None, "note": f"Not recorded: {', '.join(needs)}."}

    yield chart("Training reward", f"weighted sum, mean over the {run.samples_are} of an iteration", _train_reward(run), "reward/total/mean")
    rewards = unique(record["reward"] for record in run.evals if is_evaluated(record))
    for number, reward in enumerate(rewards):
        guidance = "" if run.is_text else f", guidance {run.setting('evaluation.guidance_scale', 1.0):g}"
        caption = f"fixed prompts and seeds{guidance}; bands are 95 % intervals"
        svg = _svg(f"eval-{number}", draw_eval_reward(eval_curves(run, reward)))
        yield {"title": f"Evaluation: {reward}", "caption": caption, "svg": svg, "note": ""}
    if not rewards:
        yield {"title": "Evaluation", "caption": "", "svg": None, "note": "No evaluation has been recorded."}
    if run.is_text:
        yield from _token_charts(run, chart)
    elif _has_ratios(run):
        yield from _ratio_charts(run, chart)
    for title, caption, series in _JUDGED:
        if any(run.points(key)[0] for key, *_ in series):
            yield chart(title, caption, _lines(run, run.metrics, series), *(key for key, *_ in series))
    if any(kl) or float(run.setting("kl.weight", 0.0)) > 0:
        form = f"to the reference, form {run.setting('kl.form', '?')}, weight {run.setting('kl.weight', 0):g}"
        yield chart("KL divergence", form, _lines(run, run.metrics, [("kl/mean", "", "c1", "-")]), "kl/mean")
    if run.points("tuning/grad_share")[0]:
        both = [("tuning/grad_share", "of the gradient", "c1", "-"), ("tuning/rows", "of the rows", "c2", "-")]
        yield chart(
            "Supervised term",
            "share of LayerTuning-RL in the gradient at the output, and of the rows that it acts on",
            _lines(run, run.metrics, both),
            "tuning/rows",
        )
    clipped = f"before clipping at {run.setting('optimizer.max_grad_norm', '?')}"
    yield chart("Gradient norm", clipped, _lines(run, run.metrics, [("grad_norm", "", "c1", "-")], log=wide), "grad_norm")
    yield chart("Groups without a signal", f"all {run.samples_are} of the group got the same reward", _lines(run, run.metrics, silent), silent[0][0])
    caption = "through the network per iteration, forward and backward" if run.is_text else "network evaluations per iteration, forward and backward rows"
    yield chart("Tokens" if run.is_text else "NFE", caption, _lines(run, run.metrics, nfe, smooth=False), "nfe/used", "nfe/minimum")
    needs = [key for key, *_ in seconds]
    yield chart("Seconds", "wall-clock time of an iteration", _lines(run, run.timings, seconds), *needs, records=run.timings)
