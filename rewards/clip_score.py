"""CLIPScore: how well a picture fits its prompt, as the cosine of their CLIP embeddings.

    cosine:  c = <image, text> / (|image| |text|)
    hessel:  2.5 max(c, 0), with "A photo depicts " before the text
    x100:    100 max(c, 0)

Source: CLIP, arXiv:2103.00020; CLIPScore, arXiv:2104.08718 (the factor 2.5 and the prefix). "cosine" is CLIP's logit divided by 100, which DiffusionNFT
trains on; "x100" is the convention of torchmetrics. We know the factor, the prefix and both conventions from public code, not from the papers' text.
Our own: for prompts beyond the 77 tokens that CLIP reads, ``long_prompts="average"`` takes the mean cosine of pieces that fit.
Letters: B pictures, N pieces of text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from flowrl.types import Prompt, RewardInfo, UserError
from rewards.clip_towers import ClipTowers, open_clip_towers, transformers_towers
from rewards.network import NetworkReward, check_choice

__all__ = ["ClipScore", "split_prompt"]

_KNOWN = {  # parameters
    "openai/clip-vit-large-patch14": 427_616_513,
    "openai/clip-vit-base-patch32": 151_277_313,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": 986_109_441,
}
_RANGES = {"cosine": (-1.0, 1.0), "hessel": (0.0, 2.5), "x100": (0.0, 100.0)}
_PREFIX = "A photo depicts "


class ClipScore(NetworkReward):
    """Cosine of a picture and its prompt by CLIP. See the module's text.

    Args:
        model: for transformers a folder or a hub id; for open_clip an architecture, ``hf-hub:owner/name`` or ``local-dir:folder``.
        library: which loads and runs the network.
        variant: the formula.
        long_prompts: "truncate" = the end of a long prompt is not read; "average" = it is read in pieces.
        preprocessing: how pictures are resized, see `rewards.pictures.Preprocessing`.
        pretrained: for an architecture of open_clip, the tag of its weights or a file with them.
    Raises:
        UserError: an argument that is none of the choices, or does not go with the library.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        library: Literal["transformers", "open_clip"] = "transformers",
        variant: Literal["cosine", "hessel", "x100"] = "cosine",
        long_prompts: Literal["truncate", "average"] = "truncate",
        preprocessing: Literal["tensor", "pil"] = "tensor",
        pretrained: str | None = None,
    ) -> None:
        check_choice("clipscore", "library", library, ("transformers", "open_clip"))
        check_choice("clipscore", "variant", variant, tuple(_RANGES))
        check_choice("clipscore", "long_prompts", long_prompts, ("truncate", "average"))
        check_choice("clipscore", "preprocessing", preprocessing, ("tensor", "pil"))
        if library == "transformers" and pretrained is not None:
            raise UserError("reward clipscore: pretrained is for library: open_clip; for transformers give the folder or the hub id as model")
        if library == "open_clip":
            whole = model.startswith(("hf-hub:", "local-dir:"))
            if whole == (pretrained is not None) or (not whole and "/" in model):
                raise UserError(
                    f"reward clipscore: library: open_clip takes as model an architecture such as ViT-L-14-quickgelu and its weights as pretrained, "
                    f"or hf-hub:owner/name or local-dir:folder alone; got model {model!r}, pretrained {pretrained!r}"
                )
        self._model, self._library, self._pretrained = model, library, pretrained
        self._variant, self._long_prompts, self._backend = variant, long_prompts, preprocessing
        low, high = _RANGES[variant]
        self.info = RewardInfo(
            name="clipscore",
            description=f"cosine of picture and prompt by CLIP, {variant}",
            low=low,
            high=high,
            source="CLIP, arXiv:2103.00020; CLIPScore, arXiv:2104.08718",
            weights=(model if pretrained is None else f"{model}:{pretrained}",),
            weights_license="MIT for OpenAI's and LAION's; its card advises against deployment of OpenAI's" if model in _KNOWN else "of the model given",
            parameters=_KNOWN.get(model, 0),
            dtype="float16",
            extra="clip" if library == "open_clip" else "",
        )

    def build(self, dtype: torch.dtype) -> nn.Module:
        if self._library == "open_clip":
            return open_clip_towers("clipscore", self._model, self._pretrained, dtype)
        return transformers_towers("clipscore", self._model, dtype)

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores [B]; raw["clip_truncated"] [B], 1 where not all of the prompt was read."""
        towers = self.network
        assert isinstance(towers, ClipTowers)
        pieces = [self._pieces(prompt.text, towers.fits) for prompt in prompts]
        texts = [piece for parts in pieces for piece in parts]
        owner = torch.tensor([i for i, parts in enumerate(pieces) for _ in parts], device=images.device)  # [N]
        pictures = towers.embed_images(towers.preprocess(images, self._backend))
        cosines = (pictures[owner] * towers.embed_texts(texts)).sum(-1)
        total = torch.zeros(len(prompts), device=images.device).index_add(0, owner, cosines)
        mean = total / torch.tensor([len(parts) for parts in pieces], device=images.device)
        cut = torch.zeros(len(prompts)).index_add(0, owner.cpu(), towers.truncated(texts)).clamp(max=1)
        values = {"cosine": mean, "hessel": 2.5 * mean.clamp_min(0), "x100": 100 * mean.clamp_min(0)}[self._variant]
        return values, {"clip_truncated": cut}

    def _pieces(self, text: str, fits: Callable[[str], bool]) -> list[str]:
        prefix = _PREFIX if self._variant == "hessel" else ""
        if self._long_prompts == "truncate" or fits(prefix + text):
            return [prefix + text]
        return [prefix + piece for piece in split_prompt(text, lambda piece: fits(prefix + piece))]


def split_prompt(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Pieces of a text that fit, as few as come from filling them in order with whole sentences, or with words where a sentence alone does not fit.

    A word that does not fit is a piece of its own. No word is lost or moved; an empty text is one empty piece.
    """
    parts: list[str] = []
    for sentence in re.split(r"(?<=[.!?;])\s+|\n+", text.strip()):
        parts += [sentence] if fits(sentence) else sentence.split()
    pieces: list[str] = []
    for part in parts:
        joined = f"{pieces[-1]} {part}" if pieces else part
        if pieces and fits(joined):
            pieces[-1] = joined
        else:
            pieces.append(part)
    return pieces
