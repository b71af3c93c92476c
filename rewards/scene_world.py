"""The world of the embedded model: coloured shapes on light grey, described in words and drawn as pixels.

A scene is one to three objects of equal size on a 32 x 32 canvas; a caption names kinds (colour and shape), counts and a spatial relation.
The grammar, its parser and the renderer live here so that the training data, the prompts and the reward can never disagree.

Letters: B scenes, K = 3 object slots, H = W = 32 pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "BACKGROUND",
    "COLORS",
    "FORMS",
    "NUMBERS",
    "PALETTE",
    "RELATIONS",
    "SHAPES",
    "SIZE",
    "Scene",
    "caption",
    "parse_caption",
    "place",
    "render",
    "shape_coverage",
]

SIZE = 32
COLORS = ("red", "green", "blue", "yellow")
PALETTE = torch.tensor([[0.86, 0.14, 0.14], [0.10, 0.62, 0.22], [0.14, 0.28, 0.86], [0.96, 0.78, 0.08]])
BACKGROUND = torch.tensor([0.93, 0.93, 0.93])
SHAPES = ("circle", "square", "triangle")
NUMBERS = {1: "one", 2: "two", 3: "three"}
RELATIONS = ("left of", "right of", "above", "below")
FORMS = ("{}", "there is {}", "an image of {}")
OBJECT_RADIUS = 5.2  # pixels; all shapes cover about the same area


@dataclass(frozen=True, slots=True)
class Scene:
    """What a caption asks for.

    Attributes:
        kinds: (colour, shape) of each object, 1 to 3 entries, as indices into COLORS and SHAPES. Counted objects repeat their kind.
        relation: index into RELATIONS between the first and the second object, or None.
    """

    kinds: tuple[tuple[int, int], ...]
    relation: int | None = None


def _noun(kind: tuple[int, int]) -> str:
    return f"{COLORS[kind[0]]} {SHAPES[kind[1]]}"


def caption(scene: Scene, form: int = 0) -> str:
    """The sentence of a scene. ``form`` 0..2 frames it as in FORMS; 3 names the second object first (relations) or equals form 0.

    Raises:
        ValueError: the grammar has no sentence for the scene: three objects of different kinds, or a relation between equal ones.
    """
    kinds = scene.kinds
    if not 1 <= len(kinds) <= 3 or (len(set(kinds)) > 1 and len(kinds) > 2) or (scene.relation is not None and len(set(kinds)) != 2):
        raise ValueError(f"no sentence describes {scene}; a scene is one kind one to three times, or two different kinds with or without a relation")
    if len(set(kinds)) == 1:
        n = len(kinds)
        text = f"a {_noun(kinds[0])}" if n == 1 else f"{NUMBERS[n]} {_noun(kinds[0])}s"
        if n == 1 and form == 3:
            return f"one {_noun(kinds[0])}"
    elif scene.relation is None:
        text = f"a {_noun(kinds[0])} and a {_noun(kinds[1])}"
    elif form == 3:
        return f"a {_noun(kinds[1])} with a {_noun(kinds[0])} {RELATIONS[scene.relation]} it"
    else:
        text = f"a {_noun(kinds[0])} {RELATIONS[scene.relation]} a {_noun(kinds[1])}"
    frame = FORMS[form % len(FORMS)]
    if len(set(kinds)) == 1 and len(kinds) > 1:
        frame = frame.replace("there is", "there are")
    return frame.format(text)


_KIND = rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_REL = f"({'|'.join(RELATIONS)})"
_FRAME = r"^(?:there is |there are |an image of )?"
_PATTERNS = (
    (re.compile(rf"{_FRAME}an? {_KIND} {_REL} an? {_KIND}$"), "relation"),
    (re.compile(rf"{_FRAME}an? {_KIND} with an? {_KIND} {_REL} it$"), "with"),
    (re.compile(rf"{_FRAME}an? {_KIND} and an? {_KIND}$"), "pair"),
    (re.compile(rf"{_FRAME}({'|'.join(NUMBERS.values())}) {_KIND}s?$"), "count"),
    (re.compile(rf"{_FRAME}an? {_KIND}$"), "single"),
)


def parse_caption(text: str) -> Scene:
    """The scene that a caption asks for; the inverse of `caption` for every form.

    Raises:
        ValueError: the text is not a sentence of this grammar.
    """
    for pattern, form in _PATTERNS:
        match = pattern.match(text.strip().lower().rstrip("."))
        if match is None:
            continue
        words = match.groups()

        def kind(i: int, words: tuple[str, ...] = words) -> tuple[int, int]:
            return COLORS.index(words[i]), SHAPES.index(words[i + 1])

        if form == "relation":
            return Scene((kind(0), kind(3)), RELATIONS.index(words[2]))
        if form == "with":
            return Scene((kind(2), kind(0)), RELATIONS.index(words[4]))
        if form == "pair":
            return Scene((kind(0), kind(2)))
        if form == "count":
            return Scene((kind(1),) * (list(NUMBERS.values()).index(words[0]) + 1))
        return Scene((kind(0),))
    raise ValueError(f"not a scene caption: {text!r}; expected a sentence such as 'a red circle above a blue square' or 'two green triangles'")


def shape_coverage(dx: Tensor, dy: Tensor, shape: int) -> Tensor:
    """Antialiased coverage in [0, 1] of a shape centred at the origin, at pixel offsets (dx right, dy down) in pixels."""
    r = OBJECT_RADIUS
    if shape == 0:
        distance = (dx.square() + dy.square()).sqrt() - r
    elif shape == 1:
        distance = torch.maximum(dx.abs(), dy.abs()) - r * 0.886
    else:
        half, height = r * 1.25, r * 2.4  # upright isosceles triangle, centroid a third above its base
        top, base = -height * 0.58, height * 0.42
        slope = half / height
        side = (dx.abs() - slope * (dy - top)) / (1 + slope**2) ** 0.5
        distance = torch.maximum(side, dy - base)
    return (0.5 - distance).clamp(0, 1)


def place(scenes: Sequence[Scene], generator: torch.Generator) -> Tensor:
    """Centres [B, 3, 2] (x right, y down, pixels) that satisfy each scene: objects apart, relations clear. Unused slots are 0."""
    b = len(scenes)
    count = torch.tensor([len(s.kinds) for s in scenes])
    relation = torch.tensor([-1 if s.relation is None else s.relation for s in scenes])
    out = torch.zeros(b, 3, 2)
    todo = torch.arange(b)
    low, high = 6.9, SIZE - 6.9
    while len(todo):
        xy = torch.rand(len(todo), 3, 2, generator=generator) * (high - low) + low
        n, rel = count[todo], relation[todo]
        gap = torch.cdist(xy, xy)
        d01 = gap[:, 0, 1] >= 12.5
        d2 = (gap[:, 0, 2] >= 12.5) & (gap[:, 1, 2] >= 12.5)
        ok = (n == 1) | (d01 & ((n == 2) | d2))
        delta = xy[:, 0] - xy[:, 1]
        along = torch.where(rel < 2, delta[:, 0], delta[:, 1]) * torch.where(rel % 2 == 0, -1.0, 1.0)
        across = torch.where(rel < 2, delta[:, 1], delta[:, 0]).abs()
        ok &= (rel < 0) | (along >= across + 5)
        out[todo[ok]] = xy[ok]
        todo = todo[~ok]
    used = torch.arange(3)[None] < count[:, None]
    return out * used[..., None]


def render(scenes: Sequence[Scene], centres: Tensor) -> Tensor:
    """Draw scenes.

    Args:
        centres: [B, 3, 2] float, object centres in pixels (x right, y down).
    Returns:
        [B, 3, 32, 32] float32 in [0, 1].
    """
    b = len(scenes)
    color = torch.zeros(b, 3, dtype=torch.long)
    shape = torch.full((b, 3), -1, dtype=torch.long)
    for i, s in enumerate(scenes):
        for j, (c, k) in enumerate(s.kinds):
            color[i, j], shape[i, j] = c, k
    axis = torch.arange(SIZE) + 0.5
    image = BACKGROUND[None, :, None, None].repeat(b, 1, SIZE, SIZE)
    for j in range(3):
        dx = axis[None, None, :] - centres[:, j, 0, None, None]
        dy = axis[None, :, None] - centres[:, j, 1, None, None]
        dx, dy = torch.broadcast_tensors(dx, dy)
        cover = torch.zeros(b, SIZE, SIZE)
        for k in range(len(SHAPES)):
            pick = shape[:, j] == k
            if pick.any():
                cover[pick] = shape_coverage(dx[pick], dy[pick], k)
        rgb = PALETTE[color[:, j]][:, :, None, None]
        image = image + cover[:, None] * (rgb - image)
    return image
