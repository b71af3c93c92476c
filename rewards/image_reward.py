"""ImageReward: human preference learned on comparisons of pictures for a prompt. BLIP-large with a head, from the published checkpoint.

h     = first token of the text encoder, which attends to the picture by cross-attention
value = (MLP(h) - 0.16717362830052426) / 1.0333394966054072

The MLP (768-1024-128-64-16-1) has no activation functions, and its dropout acts in training only: it is affine, and is folded here into one vector and one
number.

Source: ImageReward, arXiv:2304.05977. Verified in its authors' code (THUDM/ImageReward at 0f5fa3e): preprocessing, at most 35 tokens, the two constants, the
head, the first token, float32 in the head; they pad every prompt to 35 tokens, we pad to the longest, which is the same because padding is masked (tested).
Not verified: the text of the paper, and scores of the real weights. Letters: B samples, L tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowrl.types import Prompt, RewardInfo, UserError
from rewards.aesthetic import fold_layers
from rewards.checkpoints import load_pretrained, load_tensors, locate_file
from rewards.network import NetworkReward, check_choice
from rewards.pictures import CLIP_MEAN, CLIP_STD, Preprocessing
from rewards.vision_language import model_of_tensors

__all__ = ["MAX_TOKENS", "MEAN", "STD", "ImageReward", "vision_key"]

MEAN = 0.16717362830052426
STD = 1.0333394966054072
MAX_TOKENS = 35
_UNUSED = ("blip.vision_proj.", "blip.text_proj.")  # BLIP's heads for contrastive search
_LAYERS = ("0", "2", "4", "6", "7")  # the linear layers of the MLP; dropout is between them
_NEEDED = (  # what the sizes are read from; the rest is checked where it is loaded
    "blip.visual_encoder.pos_embed",
    "blip.visual_encoder.patch_embed.proj.weight",
    "blip.visual_encoder.blocks.0.mlp.fc1.weight",
    "blip.text_encoder.embeddings.word_embeddings.weight",
)
_SETTINGS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps")
_VISION = (  # timm's names in BLIP's vision tower -> those of transformers
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)


class ImageReward(NetworkReward):
    """Human preference for a picture, given its prompt; about -2.3 to 2.0.

    Args:
        model: hub id or folder with ``ImageReward.pt`` and ``med_config.json``.
        tokenizer: hub id or folder of BERT's tokenizer, uncased.
        preprocessing: "pil" = as in the published code, "tensor" = on the device, for speed; see ``Preprocessing``.
    Raises:
        UserError: another preprocessing.
    """

    info = RewardInfo(
        name="image_reward",
        description="ImageReward: human preference for a picture, given its prompt",
        low=float("-inf"),
        high=float("inf"),
        source="ImageReward, arXiv:2304.05977",
        weights=("THUDM/ImageReward:ImageReward.pt", "THUDM/ImageReward:med_config.json", "bert-base-uncased"),
        weights_license="Apache-2.0",
        parameters=446_000_000,
        batch_size=64,
    )

    def __init__(self, model: str = "THUDM/ImageReward", tokenizer: str = "bert-base-uncased", preprocessing: Literal["tensor", "pil"] = "tensor") -> None:
        check_choice("image_reward", "preprocessing", preprocessing, ("tensor", "pil"))
        self._model, self._tokenizer, self._backend = model, tokenizer, preprocessing

    def build(self, dtype: torch.dtype) -> nn.Module:
        """Vision tower and text encoder in ``dtype``, the folded head in float32."""
        from transformers import BertTokenizer, BlipTextModel, BlipVisionModel

        name = self.info.name
        settings = _read_settings(name, locate_file(name, self._model, "med_config.json"))
        path = locate_file(name, self._model, "ImageReward.pt")
        vision, text, head = _parts(name, load_tensors(name, path), path)
        rows = len(text["embeddings.word_embeddings.weight"])
        self.tokenizer = load_pretrained(name, BertTokenizer.from_pretrained, self._tokenizer)
        self.tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # unused in scoring, but a prompt may hold them
        if len(self.tokenizer) != rows:
            raise UserError(
                f"reward {name}: {self._tokenizer} and two tokens more are {len(self.tokenizer)}, the checkpoint has {rows}; give bert-base-uncased"
            )
        vision_config = _vision_config(vision)
        text_config = _text_config(name, settings, rows, vision_config.hidden_size)
        self.preprocessing = Preprocessing(vision_config.image_size, "shortest", CLIP_MEAN, CLIP_STD, backend=self._backend)
        return _Network(
            model_of_tensors(name, BlipVisionModel, vision_config, vision, dtype, path),
            model_of_tensors(name, BlipTextModel, text_config, text, dtype, path, add_pooling_layer=False),
            *fold_layers(name, str(path), head, _LAYERS),
        )

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """Values [B] float32; raw["image_reward_truncated"] [B] is 1 where the prompt was cut."""
        assert self.network is not None
        texts = [prompt.text for prompt in prompts]
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt").to(images.device)
        truncated = torch.tensor([float(len(ids) > MAX_TOKENS) for ids in self.tokenizer(texts, verbose=False)["input_ids"]])
        return self.network(self.preprocessing(images), tokens["input_ids"], tokens["attention_mask"]), {"image_reward_truncated": truncated}


class _Network(nn.Module):
    """Pixels [B, 3, S, S] float32, tokens and mask [B, L] -> values [B] float32."""

    weight: Tensor
    bias: Tensor

    def __init__(self, vision: nn.Module, text: nn.Module, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.vision, self.text = vision, text
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        patches = self.vision(pixels).last_hidden_state
        states = self.text(tokens, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
        return (states[:, 0].float() @ self.weight + self.bias - MEAN) / STD


def _read_settings(name: str, path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not text at all
        raise UserError(
            f"reward {name}: {path} cannot be read as the text encoder's settings ({type(error).__name__}); give the folder with both files"
        ) from error
    if not isinstance(settings, dict):
        raise UserError(f"reward {name}: {path} holds no settings of a text encoder; give the folder with both files")
    return settings


def _parts(name: str, tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The states of the vision tower and the text encoder, under the names of transformers, and of the head.

    Raises:
        UserError: there are tensors of another part, or those that sizes are read from are missing.
    """
    missing = [key for key in _NEEDED if key not in tensors]
    if missing:
        raise UserError(f"reward {name}: {path} is not the published checkpoint: it lacks {missing[0]}")
    vision: dict[str, Tensor] = {}
    text: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.startswith("blip.visual_encoder."):
            vision[vision_key(key.removeprefix("blip.visual_encoder."))] = tensor
        elif key.startswith("blip.text_encoder."):
            text[key.removeprefix("blip.text_encoder.")] = tensor
        elif key.startswith("mlp.layers."):
            head[key.removeprefix("mlp.layers.")] = tensor
        elif not key.startswith(_UNUSED):
            raise UserError(f"reward {name}: {path} is not the published checkpoint: it holds {key}")
    text.pop("embeddings.position_ids", None)  # a constant that old versions stored
    return vision, text, head


def vision_key(key: str) -> str:
    """The name in BlipVisionModel of a tensor of BLIP's vision tower."""
    for pattern, name in _VISION:
        key = re.sub(pattern, name, key)
    return key


def _vision_config(vision: dict[str, Tensor]) -> Any:
    """Sizes from the shapes. BLIP's towers have 64 channels a head; their layer norm adds 1e-6, where the default of transformers is 1e-5."""
    from transformers import BlipVisionConfig

    width, _, patch, _ = vision["embeddings.patch_embedding.weight"].shape
    side = math.isqrt(vision["embeddings.position_embedding"].shape[1] - 1)
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(vision["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=len({key.split(".")[2] for key in vision if key.startswith("encoder.layers.")}),
        num_attention_heads=max(1, width // 64),
        image_size=side * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )


def _text_config(name: str, settings: dict[str, Any], rows: int, vision_width: int) -> Any:
    from transformers import BlipTextConfig

    missing = [key for key in _SETTINGS if key not in settings]
    if missing:
        raise UserError(f"reward {name}: med_config.json has no {missing[0]}; take the file that is published beside ImageReward.pt")
    return BlipTextConfig(vocab_size=rows, encoder_hidden_size=vision_width, **{key: settings[key] for key in _SETTINGS})
