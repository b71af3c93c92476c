"""LAION's aesthetic predictors v1 and v2: how much people like the look of a picture, on a scale of about 1 to 10, whatever the prompt.

    value = w . e / |e| + b,  e = the image embedding of OpenAI's CLIP ViT-L/14

v1 is that one linear layer. v2 is five linear layers (768, 1024, 128, 64, 16, 1) with nothing but dropout between them, so they too are one vector and one
bias: they are multiplied out in float64 when they are loaded, and used in float32. The tower needs no text.

Source: github.com/LAION-AI/aesthetic-predictor (v1), github.com/christophschuhmann/improved-aesthetic-predictor (v2), and the copy of v2 that TRL's DDPO
script names, trl-lib/ddpo-aesthetic-predictor. Layers and file names are known from public code that loads them; the files were not at hand. There is no paper
but LAION-5B, arXiv:2210.08402, whose data v1 was made to filter.
Letters: B pictures, D features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowrl.types import Prompt, RewardInfo, UserError
from rewards.checkpoints import load_network, load_tensors, locate_file
from rewards.clip_towers import square_side
from rewards.network import NetworkReward, check_choice
from rewards.pictures import CLIP_MEAN, CLIP_STD, Preprocessing

__all__ = ["AestheticReward", "LaionAesthetic", "LinearScorer", "aesthetic_v1", "aesthetic_v2", "fold_layers"]

_CLIP = "openai/clip-vit-large-patch14"
_V1_HEAD = "it is sa_0_4_vit_l_14_linear.pth (MIT) in github.com/LAION-AI/aesthetic-predictor"
_V2_HEAD = "it is sac+logos+ava1-l14-linearMSE.pth (Apache-2.0) in github.com/christophschuhmann/improved-aesthetic-predictor"


def fold_layers(reward: str, path: str, tensors: Mapping[str, Tensor], layers: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Linear layers with nothing between them as one.

    Args:
        path: where the layers come from, for messages.
        tensors: NAME.weight [out, in] and NAME.bias [out] of each layer, and nothing else.
        layers: their names, in their order; "" = the tensors are called weight and bias.
    Returns:
        w [D] and b [], float64: the layers give w . e + b.
    Raises:
        UserError: a layer is missing, there is another one, or they do not fit together.
    """
    names = [(f"{layer}.weight", f"{layer}.bias") if layer else ("weight", "bias") for layer in layers]
    wrong = sorted({name for pair in names for name in pair} ^ tensors.keys())
    if wrong:
        raise UserError(f"reward {reward}: {path} is not the published head: {wrong[0]} is missing or has no place; give the file that the reward's page names")
    row, bias = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for weight_name, bias_name in reversed(names):
        weight, offset = tensors[weight_name].double(), tensors[bias_name].double()
        if weight.ndim != 2 or offset.shape != weight.shape[:1] or len(weight) != row.shape[1]:
            raise UserError(
                f"reward {reward}: {path} is not the published head: {weight_name} has the shape {list(weight.shape)} "
                f"where {row.shape[1]} rows are needed; give the file that the reward's page names"
            )
        bias, row = bias + row @ offset, row @ weight
    return row[0], bias[0]


class LinearScorer(nn.Module):
    """An image tower and a linear layer on its features of unit length, in float32 whatever the tower's dtype.

    Args:
        tower: gives an object with the attribute ``output``, features [B, D].
        weight: [D]. bias: []. size: side of the pictures that the tower takes.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, tower: nn.Module, output: str, weight: Tensor, bias: Tensor, size: int) -> None:
        super().__init__()
        self.tower, self.output, self.size = tower, output, size
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores [B] float32 of preprocessed pictures [B, 3, S, S]."""
        dtype = next(self.tower.parameters()).dtype
        features: Tensor = getattr(self.tower(pixel_values=pixels.to(dtype)), self.output)
        return (F.normalize(features.float(), dim=-1) * self.weight).sum(-1) + self.bias


class AestheticReward(NetworkReward):
    """What the aesthetic predictors have in common.

    Args:
        info: of the reward.
        model: a folder or a hub id, the network that the tower is taken from.
        head: a file, or ``owner/name:file`` on the hub.
        layers: names of the head's linear layers.
        where: where the head is to be had, and its licence, for messages.
        preprocessing: how pictures are resized, see `rewards.pictures.Preprocessing`.
    Raises:
        UserError: another preprocessing.
    """

    def __init__(self, info: RewardInfo, model: str, head: str | None, layers: Sequence[str], where: str, preprocessing: Literal["tensor", "pil"]) -> None:
        check_choice(info.name, "preprocessing", preprocessing, ("tensor", "pil"))
        self.info = info
        self.backend = preprocessing
        self._model, self._head, self._layers, self._where = model, head, layers, where

    @abstractmethod
    def tower(self, source: str, dtype: torch.dtype) -> tuple[nn.Module, str, int]:
        """The image tower, the attribute of its output that holds the features, and their number D."""

    @abstractmethod
    def preprocess(self, size: int) -> Preprocessing:
        """What the tower wants, for pictures of this side."""

    def build(self, dtype: torch.dtype) -> nn.Module:
        name = self.info.name
        path = self._head_file()
        weight, bias = fold_layers(name, str(path), load_tensors(name, path), self._layers)
        tower, output, width = self.tower(self._model, dtype)
        if len(weight) != width:
            raise UserError(f"reward {name}: the head {path} is for {len(weight)} features, {self._model} gives {width}; give the two that belong together")
        config: Any = tower.config
        return LinearScorer(tower, output, weight, bias, square_side(name, config.image_size))

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores [B]; no raw columns."""
        scorer = self.network
        assert isinstance(scorer, LinearScorer)
        return scorer(self.preprocess(scorer.size)(images)), {}

    def _head_file(self) -> Path:
        name = self.info.name
        if self._head is None:
            raise UserError(f"reward {name}: needs the file of its head as args.head, which is not downloaded by itself; {self._where}")
        place = Path(self._head).expanduser()
        if place.is_file():
            return place
        source, colon, filename = self._head.rpartition(":")
        if not colon:
            raise UserError(f"reward {name}: head is neither a file nor owner/name:file, but {self._head!r}; {self._where}")
        return locate_file(name, source, filename)


class LaionAesthetic(AestheticReward):
    """A linear layer on the image embedding of OpenAI's CLIP ViT-L/14. See the module's text."""

    def tower(self, source: str, dtype: torch.dtype) -> tuple[nn.Module, str, int]:
        from transformers import CLIPVisionModelWithProjection

        network = load_network(self.info.name, CLIPVisionModelWithProjection.from_pretrained, source, dtype=dtype)
        return network, "image_embeds", network.config.projection_dim

    def preprocess(self, size: int) -> Preprocessing:
        return Preprocessing(size, "shortest", CLIP_MEAN, CLIP_STD, backend=self.backend)


def _info(name: str, version: str, head: str, license_: str, source: str) -> RewardInfo:
    return RewardInfo(
        name=name,
        description=f"how much people like the look of the picture, by LAION's aesthetic predictor {version}; ignores the prompt",
        low=float("-inf"),
        high=float("inf"),
        source=source,
        weights=(_CLIP, head),
        weights_license=f"MIT for the tower, whose card advises against deployment; {license_} for the head",
        parameters=303_966_208,
        reads=("images",),
        dtype="float16",
    )


def aesthetic_v1(model: str = _CLIP, head: str | None = None, preprocessing: Literal["tensor", "pil"] = "tensor") -> LaionAesthetic:
    """LAION's aesthetic predictor v1: one linear layer. The head is a file that the user gives."""
    info = _info("aesthetic_v1", "v1", "sa_0_4_vit_l_14_linear.pth", "MIT", "github.com/LAION-AI/aesthetic-predictor; LAION-5B, arXiv:2210.08402")
    return LaionAesthetic(info, model, head, [""], _V1_HEAD, preprocessing)


def aesthetic_v2(
    model: str = _CLIP, head: str | None = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth", preprocessing: Literal["tensor", "pil"] = "tensor"
) -> LaionAesthetic:
    """LAION's aesthetic predictor v2 (sac+logos+ava1-l14-linearMSE), as in DDPO and Flow-GRPO."""
    info = _info("aesthetic", "v2", head or "sac+logos+ava1-l14-linearMSE.pth", "Apache-2.0", "github.com/christophschuhmann/improved-aesthetic-predictor")
    return LaionAesthetic(info, model, head, [f"layers.{i}" for i in (0, 2, 4, 6, 7)], _V2_HEAD, preprocessing)
