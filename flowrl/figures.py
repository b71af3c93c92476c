"""The two figures of a README: before and after, and the reward curve."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image, ImageDraw, ImageFont

from flowrl.curves import PRINT, RC, draw_eval_reward, make_figure, plot
from flowrl.gallery import Pair, load_pairs
from flowrl.results import score_text
from flowrl.run_records import Run, eval_curves, is_evaluated, load_run, unique
from flowrl.tracking import explain_full_disk, replace_file
from flowrl.types import UserError

__all__ = ["write_readme_figures", "write_reward_curve"]


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
    loaded = load_run(Path(run))
    gallery, notes = load_pairs(loaded)
    name = split or ("eval" if "eval" in gallery else next(iter(gallery), None))
    if name not in gallery:
        reason = notes[0] if notes else f"there is no split {name}, only {', '.join(gallery)}"
        raise UserError(f"{run}: no before/after picture can be made: {reason}")
    if isinstance(gallery[name][0].before, str):
        raise UserError(f"{run}: no before/after picture can be made of a language model's answers; flowrl report shows them")
    curve = _reward_curve(loaded, reward)
    paths = Path(out) / "before_after.png", Path(out) / "reward_curve.png"
    with explain_full_disk(Path(out), next_step="try again"):
        Path(out).mkdir(parents=True, exist_ok=True)
        replace_file(paths[0], _before_after(gallery[name][:8]))
        replace_file(paths[1], curve)
    return paths


def write_reward_curve(run: Path, out: Path, *, reward: str | None = None) -> Path:
    """Writes reward_curve.png alone, which runs of language models have too; arguments and errors as of `write_readme_figures`."""
    curve, path = _reward_curve(load_run(Path(run)), reward), Path(out) / "reward_curve.png"
    with explain_full_disk(Path(out), next_step="try again"):
        Path(out).mkdir(parents=True, exist_ok=True)
        replace_file(path, curve)
    return path


def _reward_curve(loaded: Run, reward: str | None) -> bytes:
    """A PNG."""
    rewards = unique(record["reward"] for record in loaded.evals if is_evaluated(record))
    reward = reward or next(iter(rewards), None)
    if reward not in rewards:
        known = f"only {', '.join(rewards)}" if rewards else "nor any other"
        raise UserError(f"{loaded.path}: no reward curve can be drawn: no evaluation of reward {reward} is recorded, {known}")
    curves = eval_curves(loaded, str(reward))

    def draw(axes: Axes, colors: Mapping[str, str]) -> None:
        training = loaded.points(f"reward/{reward}/mean")
        if training[0]:
            plot(axes, training, color=colors["muted"], linewidth=1.2, label="training")
        draw_eval_reward(curves)(axes, colors)
        axes.set_ylabel(f"{reward} reward", color=colors["muted"])

    with matplotlib.rc_context(RC):
        figure = make_figure(draw, PRINT, (7.2, 3.4))
        figure.patch.set(alpha=1, facecolor="white")
        FigureCanvasAgg(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def _picture(sample: Image.Image | str) -> Image.Image:
    assert isinstance(sample, Image.Image)  # a run has samples of one kind
    return sample


def _before_after(pairs: Sequence[Pair], columns: int = 4) -> bytes:
    """A PNG of cards: caption, the two images, their scores."""
    regular, small = (ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size) for size in (13, 12))
    tile = _picture(pairs[0].before).width
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
            pen.text((left, top + number * line), text, font=regular, fill=PRINT["ink"])
        for number, (title, image) in enumerate((("before", pair.before), ("after", pair.after))):
            x, y = left + number * (side + gap), top + lines * line + 8
            method = Image.Resampling.NEAREST if side >= tile else Image.Resampling.LANCZOS
            canvas.paste(_picture(image).resize((side, side), method), (x, y))
            score = score_text(pair.scores[0][1 + number]) if pair.scores else ""
            pen.text((x, y + side + 5), f"{title}  {score}", font=small, fill=PRINT["muted"])
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
