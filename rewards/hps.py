"""HPS v2 and v2.1: human preference of a picture for its prompt, by a CLIP ViT-H/14 trained on ranked pictures.

    value = <image, text> / (|image| |text|), without CLIP's factor of 100

Source: HPS v2, arXiv:2306.09341. Verified in the authors' package hpsv2 1.2.0: the formula, the names of the files, the weights under ``state_dict`` without
prefix, gelu, and the preprocessing: the longer side becomes 224, the rest is black; resized as a tensor, so ``preprocessing="tensor"`` is theirs, but that
we clamp what bicubic interpolation overshoots. There a picture of exactly 224 on its longer side stays as it is; here it is padded too.
Not verified: the paper's text, and the files themselves. The weights are converted for transformers (see rewards/clip_towers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from flowrl.types import Prompt, RewardInfo, UserError
from rewards.checkpoints import load_tensors, locate_file
from rewards.clip_towers import ClipTowers, towers_from_open_clip_file
from rewards.network import NetworkReward, check_choice

__all__ = ["HumanPreference", "hpsv2", "hpsv2_1"]

_FILES = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}
_HEADS = (16, 16)  # of the ViT-H/14's image tower, 80 wide each, and text tower


class HumanPreference(NetworkReward):
    """HPS of one of its versions. See the module's text.

    Args:
        name: "hpsv2" or "hpsv2.1".
        model: a hub id, a folder with the published file, or the file.
        fit: "longest" = as published; "shortest" = the middle is cut out, as for other CLIPs.
        preprocessing: how pictures are resized, see `rewards.pictures.Preprocessing`.
        heads: attention heads of the image tower and of the text tower; only for other checkpoints than the published ones.
    Raises:
        UserError: an argument that is none of the choices, or heads that are not two numbers of 1 or more.
    """

    def __init__(
        self,
        name: Literal["hpsv2", "hpsv2.1"],
        model: str = "xswu/HPSv2",
        fit: Literal["longest", "shortest"] = "longest",
        preprocessing: Literal["tensor", "pil"] = "tensor",
        heads: Sequence[int] = _HEADS,
    ) -> None:
        check_choice(name, "fit", fit, ("longest", "shortest"))
        check_choice(name, "preprocessing", preprocessing, ("tensor", "pil"))
        if not isinstance(heads, list | tuple) or len(heads) != 2 or not all(isinstance(number, int) and number > 0 for number in heads):
            raise UserError(f"reward {name}: heads must be two numbers of 1 or more, of the image tower and of the text tower, not {heads!r}")
        self._model, self._fit, self._backend, self._heads = model, fit, preprocessing, (heads[0], heads[1])
        self.info = RewardInfo(
            name=name,
            description=f"human preference by {name.upper().replace('HPS', 'HPS ')}, a cosine",
            low=-1.0,
            high=1.0,
            source="HPS v2, arXiv:2306.09341, and the authors' package hpsv2 1.2.0",
            weights=(f"{model}:{_FILES[name]}",),
            weights_license="Apache-2.0",
            parameters=986_109_441,
            batch_size=32,
            dtype="float16",
            extra="clip",
        )

    def build(self, dtype: torch.dtype) -> nn.Module:
        name = self.info.name
        path = locate_file(name, self._model, _FILES[name])
        return towers_from_open_clip_file(name, str(path), load_tensors(name, path), dtype, heads=self._heads, activation="gelu")

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cosines [B]; raw["NAME_truncated"] [B], 1 where the prompt was cut."""
        towers, texts = self.network, [prompt.text for prompt in prompts]
        assert isinstance(towers, ClipTowers)
        cosines = towers.cosines(towers.preprocess(images, self._backend, self._fit), texts)
        return cosines, {f"{self.info.name}_truncated": towers.truncated(texts)}


def hpsv2(
    model: str = "xswu/HPSv2",
    fit: Literal["longest", "shortest"] = "longest",
    preprocessing: Literal["tensor", "pil"] = "tensor",
    heads: Sequence[int] = _HEADS,
) -> HumanPreference:
    """HPS v2."""
    return HumanPreference("hpsv2", model, fit, preprocessing, heads)


def hpsv2_1(
    model: str = "xswu/HPSv2",
    fit: Literal["longest", "shortest"] = "longest",
    preprocessing: Literal["tensor", "pil"] = "tensor",
    heads: Sequence[int] = _HEADS,
) -> HumanPreference:
    """HPS v2.1, the authors' later checkpoint."""
    return HumanPreference("hpsv2.1", model, fit, preprocessing, heads)
