"""Scene reward: does a picture of the embedded world show what its caption asks for? In the manner of GenEval, but exact and in microseconds.

Detection is a matched filter: every pixel gets a soft membership in each palette colour, and each colour's map is compared with each shape's
template by soft intersection over union (IoU) at every position. Local maxima are candidate objects. A caption's objects are assigned to candidates
by the best of all assignments, so the score does not depend on any order.

graded, in [0, 1]: every quantity enters through a smooth margin, so small improvements of a picture always raise the score a little.
strict, 0 or 1: exactly the asked objects, in the asked relation, and nothing else.

Source: the idea is GenEval's (arXiv:2310.11513: detect, then check objects, counts, colours, positions); detector, margins and weights are ours.
Letters: B images, C = 4 colours, S = 3 shapes, N = 6 candidates, K = 3 requested objects.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flowrl.types import Prompt, RewardInfo, SampleBatch, Scores, UserError
from rewards.pictures import not_finite
from rewards.scene_world import BACKGROUND, COLORS, PALETTE, SHAPES, SIZE, Scene, parse_caption, shape_coverage

__all__ = ["SceneReward", "detect", "score_scenes"]

_PATCH = 15  # pixels, odd; a template with the empty ring around it
_PAD = 2  # centres are looked for from pixel 5 to pixel 26: nearer to the edge no whole object fits
_NUM_CANDIDATES = 6
_COLOR_SOFTNESS = 0.010  # squared RGB distance
_OBJECT_IOU, _OBJECT_SOFTNESS = 0.55, 0.04
_KIND_SOFTNESS = 0.025  # IoU difference between kinds (colour and shape)
_RELATION_SOFTNESS = 1.5  # pixels
_EXTENT, _EXTENT_SOFTNESS = 9.2, 0.4  # pixels from a centre that belong to an object
_CLUTTER_SOFTNESS = 6.0  # squared RGB distance, summed over pixels, at half of its effect; an object has about 60


@cache
def _templates() -> Tensor:
    """[S, 1, 15, 15] coverage of each shape, centred on the middle pixel."""
    axis = torch.arange(_PATCH) - _PATCH // 2 + 0.0
    dy, dx = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([shape_coverage(dx, dy, k) for k in range(len(SHAPES))])[:, None]


@cache
def _assignments() -> Tensor:
    """[A, K] every ordered choice of K of the N candidates."""
    return torch.tensor(list(itertools.permutations(range(_NUM_CANDIDATES), 3)))


def detect(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find candidate objects.

    Args:
        images: [B, 3, 32, 32] float in [0, 1].
    Returns:
        presence [B, N] in [0, 1], probabilities of each kind [B, N, C, S], centres [B, N, 2] (x right, y down, in fractions of pixels),
        and clutter [B] >= 0: squared RGB distance from the background, summed over the pixels that are near no present object.
    """
    b, _, h, w = images.shape
    colors = torch.cat([PALETTE, BACKGROUND[None]]).to(images)
    flat = images.flatten(2).transpose(1, 2)  # [B, HW, 3]
    distance = flat.square().sum(-1, keepdim=True) - 2 * flat @ colors.T + colors.square().sum(-1)
    member = torch.softmax(-distance / (2 * _COLOR_SOFTNESS), dim=-1)[..., :-1].transpose(1, 2).reshape(b * len(COLORS), 1, h, w)

    template = _templates().to(images)
    filters = torch.cat([template, torch.ones_like(template[:1])])
    found = F.conv2d(member, filters, padding=_PAD)  # [BC, S + 1, H', W']: overlap with each shape, and the mass in the patch
    overlap, mass = found[:, :-1], found[:, -1:]
    h, w = found.shape[-2:]
    iou = (overlap / (mass + template.sum((1, 2, 3))[None, :, None, None] - overlap)).view(b, len(COLORS) * len(SHAPES), h, w)
    best = iou.amax(1, keepdim=True)
    # the strongest response within a radius of 5 pixels, over all kinds, is an object; weaker ones in its shadow are not. A ramp finer than float32
    # decides between equal neighbours: an object centred on the border of two pixels is one object
    ramp = torch.arange(h * w, device=best.device, dtype=torch.float64).view(h, w) * 1e-12
    ranked = best.double() - ramp
    peak = F.max_pool2d(F.max_pool2d(ranked, (1, 11), stride=1, padding=(0, 5)), (11, 1), stride=1, padding=(5, 0))
    response = torch.where(ranked == peak, best, torch.zeros_like(best))
    value, place = response.flatten(1).topk(_NUM_CANDIDATES, dim=1)
    presence = torch.sigmoid((value - _OBJECT_IOU) / _OBJECT_SOFTNESS) * (value > 0)
    row, column = place // w, place % w
    # a kind is judged by its best response within 2 pixels, so that nothing jumps when the strongest response moves from one pixel to the next
    shift = torch.arange(-2, 3, device=images.device)
    near = (row[..., None, None] + shift[:, None]).clamp(0, h - 1) * w + (column[..., None, None] + shift).clamp(0, w - 1)  # [B, N, 5, 5]
    close = iou.flatten(2).gather(2, near.flatten(1)[:, None].expand(-1, iou.shape[1], -1)).unflatten(2, (_NUM_CANDIDATES, 25)).amax(3)
    kinds = torch.softmax(close / _KIND_SOFTNESS, dim=1).transpose(1, 2).unflatten(2, (len(COLORS), len(SHAPES)))
    offset = torch.stack([_vertex(best, row, column, 0, 1), _vertex(best, row, column, 1, 0)], dim=-1)
    centres = torch.stack([column, row], dim=-1) + (0.5 + _PATCH // 2 - _PAD) + offset
    return presence, kinds, centres, _clutter(distance[..., -1].clamp_min(0), presence, centres)


def _clutter(off_background: Tensor, presence: Tensor, centres: Tensor) -> Tensor:
    """Sum [B] of off_background [B, HW] over the pixels further than an object's extent from every candidate, by smooth weights."""
    axis = torch.arange(SIZE, device=centres.device, dtype=centres.dtype) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    distance = torch.cdist(torch.stack([x, y], -1).view(1, -1, 2).expand(len(centres), -1, -1), centres)  # [B, HW, N]
    free = torch.sigmoid((distance + 12 * (1 - presence)[:, None] - _EXTENT) / _EXTENT_SOFTNESS).amin(-1)
    return (off_background * free).sum(1)


def _vertex(response: Tensor, row: Tensor, column: Tensor, down: int, right: int) -> Tensor:
    """Offset [B, N] in [-0.5, 0.5] of the parabola through a peak of response [B, 1, H', W'] and its two neighbours along an axis."""
    height, width = response.shape[-2:]
    flat = response.flatten(1)

    def at(sign: int) -> Tensor:
        y, x = row + sign * down, column + sign * right
        y, x = torch.where((y < 0) | (y >= height), 2 * row - y, y), torch.where((x < 0) | (x >= width), 2 * column - x, x)  # mirrored at the edge
        return flat.gather(1, y * width + x)

    before, here, after = at(-1), at(0), at(1)
    return (0.5 * (after - before) / (2 * here - before - after).clamp_min(1e-9)).clamp(-0.5, 0.5)


def _encode(scenes: list[Scene], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    table = [[(c, s) for c, s in scene.kinds] + [(0, 0)] * (3 - len(scene.kinds)) for scene in scenes]
    kinds = torch.tensor(table, device=device)
    count = torch.tensor([len(scene.kinds) for scene in scenes], device=device)
    relation = torch.tensor([-1 if scene.relation is None else scene.relation for scene in scenes], device=device)
    return kinds[..., 0], kinds[..., 1], count, relation


def score_scenes(images: Tensor, scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Score pictures against the scenes they should show.

    Each requested object is worth ``presence * (0.1 + 0.2 colour + 0.2 shape + 0.5 kind)``, of which kind is colour and shape together;
    a relation takes 0.4 of the score and counts as far as both of its objects do; every object too many divides the score by (1 + 0.5 presence).

    Args:
        images: [B, 3, 32, 32] float in [0, 1].
        scenes: length B.
    Returns:
        graded [B] float32 in [0, 1] and strict [B] float32, 0 or 1.
    """
    presence, kinds, centres, clutter = detect(images)
    want_color, want_shape, count, relation = _encode(scenes, images.device)
    b, k = want_color.shape
    same_color = torch.gather(kinds.sum(3), 2, want_color[:, None].expand(b, _NUM_CANDIDATES, k))  # [B, N, K]
    same_shape = torch.gather(kinds.sum(2), 2, want_shape[:, None].expand(b, _NUM_CANDIDATES, k))
    want = (want_color * len(SHAPES) + want_shape)[:, None].expand(b, _NUM_CANDIDATES, k)
    same_kind = torch.gather(kinds.flatten(2), 2, want)
    match = presence[:, :, None] * (0.1 + 0.2 * same_color + 0.2 * same_shape + 0.5 * same_kind)
    used = torch.arange(k, device=images.device)[None] < count[:, None]  # [B, K]

    choice = _assignments().to(images.device)  # [A, K]
    slot = torch.arange(k, device=images.device)
    picked = match[:, choice, slot] * used[:, None]  # [B, A, K]
    objects = picked.sum(-1) / count[:, None]

    first, second = centres[:, choice[:, 0]], centres[:, choice[:, 1]]  # [B, A, 2]
    delta = first - second
    horizontal = (relation < 2)[:, None]
    sign = torch.where(relation % 2 == 0, -1.0, 1.0).to(images.dtype)[:, None]
    along = torch.where(horizontal, delta[..., 0], delta[..., 1]) * sign
    across = torch.where(horizontal, delta[..., 1], delta[..., 0]).abs()
    holds = torch.sigmoid((along - across) / _RELATION_SOFTNESS)
    both = picked[..., 0] * picked[..., 1]
    related = (relation >= 0)[:, None]
    quality = torch.where(related, 0.6 * objects + 0.4 * both * holds, objects)
    chosen = torch.stack([presence[:, choice[:, j]] * used[:, None, j] for j in range(k)]).sum(0)
    extra = (presence.sum(1, keepdim=True) - chosen).clamp_min(0)
    graded = (quality / (1 + 0.5 * extra)).amax(1) / (1 + clutter / (clutter + _CLUTTER_SOFTNESS))

    exact = (presence > 0.5)[:, :, None] & (kinds.flatten(2).argmax(-1)[:, :, None] == want)
    all_found = (exact[:, choice, slot] | ~used[:, None]).all(-1)
    right_place = ~related | (along > across)
    nothing_else = ((presence > 0.5).sum(1) == count)[:, None]
    strict = (all_found & right_place & nothing_else).any(1)
    return graded.float(), strict.float()


@cache
def _parse(text: str) -> Scene:
    return parse_caption(text)


def _scene(prompt: Prompt) -> Scene:
    try:
        return _parse(prompt.text)
    except ValueError as error:
        raise UserError(f"reward scene: {error}") from error


class SceneReward:
    """How well pictures of the embedded world show their captions. See the module's text.

    Args:
        form: "graded" in [0, 1] for training, "strict" 0 or 1 for evaluation.
    """

    def __init__(self, form: Literal["graded", "strict"] = "graded") -> None:
        if form not in ("graded", "strict"):
            raise UserError(f"reward scene: form must be graded or strict, not {form!r}")
        self.form = form
        self.info = RewardInfo(
            name="scene" if form == "graded" else "scene_strict",
            description=f"{form} check of objects, colours, counts and relations in the embedded world",
            low=0.0,
            high=1.0,
            source="GenEval-like (arXiv:2310.11513), programmatic",
            batch_size=512,
        )

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing to load: there are no weights."""

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises a UserError for the first prompt that is outside the grammar."""
        for prompt in prompts:
            _scene(prompt)

    def score(self, batch: SampleBatch) -> Scores:
        """Scores in [0, 1] for pictures [B, 3, 32, 32] float in [0, 1]; a picture that holds NaN is invalid.

        Raises:
            UserError: the pictures have another size or a caption is outside the grammar.
        """
        if batch.images is None or batch.images.shape[1:] != (3, 32, 32):
            shape = None if batch.images is None else tuple(batch.images.shape[1:])
            raise UserError(f"reward scene: needs pictures of 3 x 32 x 32 from the embedded model, got {shape}; use another reward for this model")
        graded, strict = score_scenes(batch.images.float(), [_scene(p) for p in batch.prompts])
        valid = torch.isfinite(graded)
        strict = torch.where(valid, strict, torch.nan)
        values, raw = (graded, {"strict": strict}) if self.form == "graded" else (strict, {})
        return Scores(values, valid, raw, not_finite(valid))
