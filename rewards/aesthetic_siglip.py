"""Aesthetic predictor v2.5: how much people like the look of a picture, on a scale of 1 to 10, by SigLIP; ignores the prompt.

    value = w . e / |e| + b,  e = the pooled output of the image tower of SigLIP so400m/14 at 384 pixels

The head is five linear layers (1152, 1024, 128, 64, 16, 1) with nothing but dropout between them, multiplied out as in rewards/aesthetic.py.

Source: github.com/discus0434/aesthetic-predictor-v2-5, no paper. Layers, names, the unit length and the file are known from public copies of its code; the file
was not at hand. Its licence is AGPL-3.0, so the user gives it: nothing of it is here, and it is never downloaded by itself. The author runs the tower in
bfloat16.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from flowrl.types import RewardInfo
from rewards.aesthetic import AestheticReward
from rewards.checkpoints import load_network
from rewards.pictures import Preprocessing

__all__ = ["AestheticSiglip"]

_HALF = (0.5, 0.5, 0.5)
_WHERE = "it is models/aesthetic_predictor_v2_5.pth (AGPL-3.0: read what that asks of you) in github.com/discus0434/aesthetic-predictor-v2-5"


class AestheticSiglip(AestheticReward):
    """Aesthetic predictor v2.5. See the module's text.

    Args:
        model: a folder or a hub id, a SigLIP as transformers saves it, whole or its image tower alone.
        head: the file aesthetic_predictor_v2_5.pth, or ``owner/name:file`` on the hub.
        preprocessing: how pictures are resized, see `rewards.pictures.Preprocessing`.
    Raises:
        UserError: another preprocessing.
    """

    def __init__(self, model: str = "google/siglip-so400m-patch14-384", head: str | None = None, preprocessing: Literal["tensor", "pil"] = "tensor") -> None:
        info = RewardInfo(
            name="aesthetic_v2.5",
            description="how much people like the look of the picture, by aesthetic predictor v2.5 (SigLIP); ignores the prompt",
            low=float("-inf"),
            high=float("inf"),
            source="github.com/discus0434/aesthetic-predictor-v2-5",
            weights=(model, "aesthetic_predictor_v2_5.pth"),
            weights_license="Apache-2.0 for the tower, AGPL-3.0 for the head",
            parameters=428_225_600,
            reads=("images",),
            batch_size=32,
            dtype="bfloat16",
        )
        super().__init__(info, model, head, [f"scoring_head.{i}" for i in (0, 2, 4, 6, 8)], _WHERE, preprocessing)

    def tower(self, source: str, dtype: torch.dtype) -> tuple[nn.Module, str, int]:
        from transformers import SiglipVisionModel

        network = load_network(self.info.name, SiglipVisionModel.from_pretrained, source, dtype=dtype)
        return network, "pooler_output", network.config.hidden_size

    def preprocess(self, size: int) -> Preprocessing:
        return Preprocessing(size, "squash", _HALF, _HALF, backend=self.backend)
