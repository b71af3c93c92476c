"""PickScore: which of two pictures people would pick for a prompt, by a CLIP ViT-H/14 trained on half a million such choices.

    s = exp(logit_scale) <image, text> / (|image| |text|),  value = s / 26,  P(a before b) = sigmoid(s_a - s_b)

Source: Pick-a-Pic, arXiv:2305.01569. The value is s / 26, as in Flow-GRPO and Flow-Factory; s itself is logged as ``pickscore_raw``. We know the formula, the
two checkpoints and the 26 from public code, not from the paper's text. Each picture is compared with its own prompt only; the tokenizer is that of
the LAION CLIP which PickScore was tuned from, as in the authors' example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from flowrl.types import Prompt, RewardInfo
from rewards.clip_towers import ClipTowers, transformers_towers
from rewards.network import NetworkReward, check_choice

__all__ = ["PickScore"]

_UNIT = 26.0


class PickScore(NetworkReward):
    """Human preference of a picture for its prompt. See the module's text.

    Args:
        model: a folder or a hub id, a CLIP as transformers saves it.
        tokenizer: a folder or a hub id.
        preprocessing: how pictures are resized, see `rewards.pictures.Preprocessing`.
    Raises:
        UserError: another preprocessing.
    """

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        preprocessing: Literal["tensor", "pil"] = "tensor",
    ) -> None:
        check_choice("pickscore", "preprocessing", preprocessing, ("tensor", "pil"))
        self._model, self._tokenizer, self._backend = model, tokenizer, preprocessing
        self.info = RewardInfo(
            name="pickscore",
            description="human preference by PickScore, divided by 26",
            low=-100 / _UNIT,
            high=100 / _UNIT,
            source="Pick-a-Pic, arXiv:2305.01569; divided by 26 as in Flow-GRPO",
            weights=(model, tokenizer),
            weights_license="MIT",
            parameters=986_109_441,
            batch_size=32,
            dtype="float16",
        )

    def build(self, dtype: torch.dtype) -> nn.Module:
        return transformers_towers("pickscore", self._model, dtype, tokenizer=self._tokenizer)

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores s / 26 [B]; raw["pickscore_raw"] [B] is s, raw["pickscore_truncated"] [B] 1 where the prompt was cut."""
        towers, texts = self.network, [prompt.text for prompt in prompts]
        assert isinstance(towers, ClipTowers)
        score = towers.scale * towers.cosines(towers.preprocess(images, self._backend), texts)
        return score / _UNIT, {"pickscore_raw": score, "pickscore_truncated": towers.truncated(texts)}
