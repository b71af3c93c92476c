"""DINO similarity: is the picture about the same thing as a reference picture?

value = cos(f(x), f(x0)),   f = the class token of DINOv2

Source: DINOv2, arXiv:2304.07193; the cosine to reference pictures as a measure of subject fidelity is DreamBooth's, arXiv:2208.12242, which takes the
first DINO (facebook/dino-vits16, loadable here too). Verified: the preprocessing against the published constants by hand, the formula against
transformers' own model and image processor on a random model. Not verified: a score of the real weights, which are on the model hub only.
Letters: B samples, D numbers of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from flowrl.types import Prompt, RewardInfo
from rewards.features import DINO, build_features
from rewards.network import NetworkReward, check_choice
from rewards.references import References

__all__ = ["DinoSimilarity"]


class DinoSimilarity(NetworkReward):
    """Cosine between the DINO features of a picture and of the prompt's reference picture. See the module's text.

    Args:
        model: hub id or folder of a Dinov2Model, or of the ViTModel of a first DINO.
        folder: where relative paths of references start.
        preprocessing: of the preprocessing: "pil" is what the published processor does, "tensor" is faster.
    Raises:
        UserError: another preprocessing.
    """

    def __init__(self, model: str = DINO, folder: str = ".", preprocessing: Literal["tensor", "pil"] = "tensor") -> None:
        check_choice("dino", "preprocessing", preprocessing, ("tensor", "pil"))
        self.model = model
        self.preprocessing: Literal["tensor", "pil"] = preprocessing
        self.references = References("dino", folder)
        self._known: dict[Path, Tensor] = {}  # feature [D] of each reference that was met, on the CPU
        self.info = RewardInfo(
            name="dino",
            description="cosine between the DINOv2 features of the picture and of the prompt's reference picture",
            low=-1.0,
            high=1.0,
            source="DreamBooth, arXiv:2208.12242; DINOv2, arXiv:2304.07193",
            weights=(model,),
            weights_license="Apache-2.0",
            parameters=86_580_480,
            reads=("images", "metadata"),
            metadata=("reference",),
            batch_size=64,
            dtype="bfloat16",
        )

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Every prompt has a reference that can be opened.

        Raises:
            UserError: the first that has not.
        """
        self.references.check(prompts)

    def build(self, dtype: torch.dtype) -> nn.Module:
        """The network in ``dtype``; the cosine is float32.

        Raises:
            UserError: the weights cannot be found, or are of another kind of model.
        """
        self._known.clear()
        return build_features("dino", "dinov2", self.model, dtype, self.preprocessing)

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cosines [B]."""
        references = torch.stack([self._reference(prompt) for prompt in prompts]).to(images.device)
        assert self.network is not None, "score has checked it"
        return (self.network(images) * references).sum(1), {}

    def _reference(self, prompt: Prompt) -> Tensor:
        path = self.references.path(prompt)
        if path not in self._known:
            assert self.network is not None, "score has checked it"
            self._known[path] = self.network(self.references.read(prompt)[None].to(self.device))[0].cpu()
        return self._known[path]
