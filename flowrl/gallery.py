"""The samples of a run before and after training, prompt by prompt: pictures cut from the grids that it saved, or answers."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from flowrl.run_records import Run

__all__ = ["Pair", "data_uri", "load_pairs"]

MAX_TILE = 320
"""Pixels; larger samples are shrunk in the page, smaller ones are kept pixel for pixel."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The same prompt and seed before and after training, two pictures or two texts; scores are (reward, before, after)."""

    prompt: str
    before: Image.Image | str
    after: Image.Image | str
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


def _answers(folder: Path, split: str) -> tuple[list[str], dict[str, list[float | None]], list[str]]:
    """Prompts, scores and answers that were saved."""
    lines = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = {name: [line["scores"][name] for line in lines] for name in lines[0]["scores"]}
    return [line["prompt"] for line in lines], scores, [line["answer"] for line in lines]


def _samples(folder: Path, split: str) -> tuple[list[str], dict[str, list[float | None]], list[Any]]:
    return _answers(folder, split) if (folder / f"{split}.jsonl").is_file() else _tiles(folder, split)


def load_pairs(run: Run) -> tuple[dict[str, list[Pair]], list[str]]:
    """The gallery of each split, and notes on what is missing."""
    if not run.samples:
        return {}, ["No samples have been saved: the run stopped before its first evaluation, or evaluation.grid_images is 0."]
    first, last = min(run.samples), max(run.samples)
    if first == last:
        return {}, [f"Samples were saved at iteration {first} only, so there is nothing to compare yet."]
    notes = [] if first == 0 else [f"Samples of the untrained model are missing: “before” is iteration {first}."]
    gallery: dict[str, list[Pair]] = {}
    names = [{path.stem for path in run.samples[iteration].glob("*.json*")} for iteration in (first, last)]
    order = {split: rank for rank, split in enumerate(["trained", "train", *run.setting("data.eval", {})])}
    for split in sorted(names[0] | names[1], key=lambda split: (order.get(split, len(order)), split)):
        try:
            prompts, before_scores, before = _samples(run.samples[first], split)
            after_prompts, after_scores, after = _samples(run.samples[last], split)
            if prompts != after_prompts:
                raise ValueError("the prompts differ between the first and the last iteration")
            shared = [name for name in before_scores if name in after_scores]
            gallery[split] = [
                Pair(prompt, a, b, [(name, before_scores[name][k], after_scores[name][k]) for name in shared])
                for k, (prompt, a, b) in enumerate(zip(prompts, before, after, strict=True))
            ]
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            notes.append(f"The samples of “{split}” cannot be shown: {error}.")
    return gallery, notes


def data_uri(image: Image.Image) -> str:
    """An image as the text of an ``src`` attribute: PNG up to `MAX_TILE` pixels, otherwise shrunk and JPEG."""
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
