"""The two towers of a CLIP: pictures and texts to unit vectors, by transformers or by open_clip, and open_clip's checkpoints in transformers' network.

    image, text -> features -> features / |features| in float32

Both libraries give features that are not of unit length (transformers 5 inside an object, 4 as a tensor), so they are made so here. Texts are tokenised whole,
cut to the network's length with the end token kept, and padded to it with zeros, which it does not see: its attention is causal and it reads the end token.

Verified by running: the conversion is exact to 1e-6 on random pairs, with gelu and quick_gelu; both tokenizers give the same numbers.
Letters: B pictures, N texts, D features, L tokens.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowrl.types import UserError
from rewards.checkpoints import load_network, load_pretrained, require
from rewards.pictures import CLIP_MEAN, CLIP_STD, Preprocessing

__all__ = [
    "ClipTowers",
    "clip_tokenizer",
    "convert_open_clip",
    "features_of",
    "open_clip_towers",
    "sizes_of",
    "square_side",
    "towers_from_open_clip_file",
    "transformers_towers",
]


def features_of(output: Any) -> Tensor:
    """The projected features [B, D] in what ``get_image_features`` or ``get_text_features`` returns: since transformers 5 an object that holds them."""
    return output if isinstance(output, Tensor) else output.pooler_output


class ClipTowers(nn.Module):
    """A CLIP with its tokenizer.

    Args:
        network: the CLIP of either library, in float32.
        dtype: what the towers are run in.
        image_features: pictures [B, 3, S, S] in the network's dtype -> [B, D].
        text_features: tokens [N, L] int64 -> [N, D].
        tokenize: a text -> its tokens, with the start and the end, never cut.
        image_size: S. context: the largest L.
    """

    scale: Tensor
    """[] float32, exp(logit_scale), what the model multiplies its cosines by; about 100 in a trained CLIP. In bfloat16 it would be wrong by a hundredth."""

    def __init__(
        self,
        network: nn.Module,
        dtype: torch.dtype,
        image_features: Callable[[Tensor], Tensor],
        text_features: Callable[[Tensor], Tensor],
        tokenize: Callable[[str], list[int]],
        image_size: int,
        context: int,
    ) -> None:
        super().__init__()
        logit_scale = network.logit_scale
        assert isinstance(logit_scale, Tensor)
        self.register_buffer("scale", logit_scale.detach().exp())
        self.network = network.to(dtype)
        self.image_size = image_size
        self._image_features, self._text_features, self._tokenize = image_features, text_features, tokenize
        self._context = context

    def fits(self, text: str) -> bool:
        """Whether the network reads the text to its end."""
        return len(self._tokenize(text)) <= self._context

    def truncated(self, texts: Sequence[str]) -> Tensor:
        """[N] float32, 1 where a text is cut."""
        cut = {text: 0.0 if self.fits(text) else 1.0 for text in dict.fromkeys(texts)}
        return torch.tensor([cut[text] for text in texts])

    def preprocess(self, images: Tensor, backend: Literal["tensor", "pil"], fit: Literal["shortest", "longest"] = "shortest") -> Tensor:
        """Pictures [B, 3, H, W] float in [0, 1] -> [B, 3, S, S] float32, by CLIP's constants."""
        return Preprocessing(self.image_size, fit, CLIP_MEAN, CLIP_STD, backend=backend)(images)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Unit vectors [B, D] float32 of preprocessed pictures [B, 3, S, S]."""
        dtype = next(self.network.parameters()).dtype
        return F.normalize(self._image_features(pixels.to(dtype)).float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [N, D] float32. A text that occurs many times, as in a group, is read once."""
        unique = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        rows = [self._tokenize(text) for text in unique]
        rows = [row if len(row) <= self._context else [*row[: self._context - 1], row[-1]] for row in rows]
        device = self.scale.device
        tokens = torch.tensor([row + [0] * (self._context - len(row)) for row in rows], device=device)
        features = F.normalize(self._text_features(tokens).float(), dim=-1)
        return features[torch.tensor([unique[text] for text in texts], device=device)]

    def cosines(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """The cosine [B] float32 of each preprocessed picture with its text."""
        return (self.embed_images(pixels) * self.embed_texts(texts)).sum(-1)


def transformers_towers(reward: str, source: str, dtype: torch.dtype, *, tokenizer: str | None = None) -> ClipTowers:
    """The CLIP in a folder or under a hub id, as transformers saves it; its tokenizer from there too, or from ``tokenizer``.

    Raises:
        UserError: either cannot be loaded, or they do not fit together.
    """
    from transformers import AutoTokenizer, CLIPModel

    network = load_network(reward, CLIPModel.from_pretrained, source, dtype=torch.float32)
    reader = load_pretrained(reward, AutoTokenizer.from_pretrained, tokenizer or source)
    text = network.config.text_config
    # a network whose end token is 2, a mistake in old configs, reads the token of the largest number instead
    if len(reader) > text.vocab_size or text.eos_token_id not in (2, reader.eos_token_id):
        raise UserError(
            f"reward {reward}: the tokenizer of {tokenizer or source} ({len(reader)} tokens, end {reader.eos_token_id}) does not fit {source} "
            f"({text.vocab_size} tokens, end {text.eos_token_id}); give the tokenizer that it was trained with"
        )

    def tokenize(words: str) -> list[int]:
        return reader(words, truncation=False, verbose=False)["input_ids"]

    return _of_transformers(reward, network, dtype, tokenize)


def _of_transformers(reward: str, network: Any, dtype: torch.dtype, tokenize: Callable[[str], list[int]]) -> ClipTowers:
    return ClipTowers(
        network,
        dtype,
        lambda pixels: features_of(network.get_image_features(pixel_values=pixels)),
        lambda tokens: features_of(network.get_text_features(input_ids=tokens)),
        tokenize,
        square_side(reward, network.config.vision_config.image_size),
        network.config.text_config.max_position_embeddings,
    )


def open_clip_towers(reward: str, model: str, pretrained: str | None, dtype: torch.dtype) -> ClipTowers:
    """A CLIP of open_clip.

    Args:
        model: an architecture of open_clip, or ``hf-hub:owner/name``, or ``local-dir:folder``.
        pretrained: with an architecture, the tag of its weights or a file with them.
    Raises:
        UserError: open_clip is missing or cannot load it, the weights want the other activation, or other preprocessing than CLIP's, or another tokenizer.
    """
    library = require(reward, "open_clip", "clip")
    what = model if pretrained is None else f"{model} with {pretrained}"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="QuickGELU mismatch")
            network = library.create_model(model, pretrained, require_pretrained=True)
        reader = library.get_tokenizer(model)
        steps = library.get_model_preprocess_cfg(network)
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"reward {reward}: open_clip could not load {what} ({line[:300]}); see open_clip.list_pretrained(), or give a file") from error
    clips = {"mean": CLIP_MEAN, "std": CLIP_STD, "resize_mode": "shortest", "interpolation": "bicubic"}
    other = [f"{key} {steps[key]}" for key, value in clips.items() if key in steps and steps[key] not in (value, list(value))]
    if not isinstance(reader, library.SimpleTokenizer) or other:
        raise UserError(
            f"reward {reward}: {what} does not have CLIP's tokenizer and preprocessing ({', '.join(other) or type(reader).__name__}); choose a CLIP"
        )
    return ClipTowers(
        network, dtype, network.encode_image, network.encode_text, _whole(reader), square_side(reward, network.visual.image_size), network.context_length
    )


def clip_tokenizer(reward: str) -> Callable[[str], list[int]]:
    """CLIP's tokenizer, whose vocabulary comes with open_clip: a text -> its tokens, with the start and the end, never cut.

    Raises:
        UserError: open_clip is missing.
    """
    return _whole(require(reward, "open_clip", "clip").SimpleTokenizer())


def _whole(reader: Any) -> Callable[[str], list[int]]:
    return lambda text: [reader.sot_token_id, *reader.encode(text), reader.eot_token_id]


def square_side(reward: str, size: Any) -> int:
    """The side of the pictures that a network takes.

    Args:
        size: a number, or two that must be equal.
    Raises:
        UserError: they are not.
    """
    sides = {int(side) for side in (size if isinstance(size, list | tuple) else [size])}
    if len(sides) != 1:
        raise UserError(f"reward {reward}: the network takes pictures of {size}; choose one that takes squares")
    return sides.pop()


_TOP = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = ("visual.proj", "text_projection")
_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.?(weight|bias)")
_INSIDE = {"ln_1.": "layer_norm1.", "ln_2.": "layer_norm2.", "mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2.", "attn.out_proj.": "self_attn.out_proj."}


def convert_open_clip(reward: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an open_clip CLIP with a ViT, by the names of transformers' CLIPModel. A mask of attention is dropped: it is a constant.

    Raises:
        UserError: there is a weight that such a network has not; the message names it.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "attn_mask":
            continue
        if name in _TOP:
            converted[_TOP[name]] = tensor.T.contiguous() if name in _TRANSPOSED else tensor
            continue
        match = _LAYER.fullmatch(name)
        if match is None or match[3] not in (*_INSIDE, "attn.in_proj_"):
            raise UserError(f"reward {reward}: the checkpoint has the weight {name}, which a CLIP of open_clip with a ViT has not; give the published file")
        layer = f"{'vision' if match[1] else 'text'}_model.encoder.layers.{match[2]}."
        if match[3] == "attn.in_proj_":
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"{layer}self_attn.{part}_proj.{match[4]}"] = rows.contiguous()
        else:
            converted[f"{layer}{_INSIDE[match[3]]}{match[4]}"] = tensor
    return converted


def towers_from_open_clip_file(
    reward: str, path: str, tensors: Mapping[str, Tensor], dtype: torch.dtype, *, heads: tuple[int, int], activation: str
) -> ClipTowers:
    """Towers from the weights of an open_clip CLIP with a ViT. All sizes but the number of heads are read off the weights.

    Args:
        path: where they come from, for messages.
        heads: of the image tower and of the text tower, which no shape tells.
        activation: "gelu", or "quick_gelu" for OpenAI's.
    Raises:
        UserError: a weight is missing, has another shape, or does not belong.
    """
    from transformers import CLIPConfig, CLIPModel

    state = convert_open_clip(reward, tensors)
    try:
        sizes = sizes_of(state, heads, activation)
    except (KeyError, ValueError) as error:
        raise UserError(f"reward {reward}: the weights in {path} are not those of a CLIP with {heads} heads ({error}); give the published file") from error
    config = CLIPConfig(**sizes)

    def load(_: str, **options: Any) -> Any:
        return CLIPModel.from_pretrained(None, config=config, state_dict=state, **options)

    return _of_transformers(reward, load_network(reward, load, path, dtype=torch.float32), dtype, clip_tokenizer(reward))


def sizes_of(state: Mapping[str, Tensor], heads: tuple[int, int], activation: str) -> dict[str, Any]:
    """The arguments of CLIPConfig that the weights have the shapes of."""
    towers: dict[str, dict[str, Any]] = {}
    for tower, num_heads in zip(("vision", "text"), heads, strict=True):
        layers = [name for name in state if re.fullmatch(rf"{tower}_model\.encoder\.layers\.\d+\.mlp\.fc1\.weight", name)]
        inner, width = state[f"{tower}_model.encoder.layers.0.mlp.fc1.weight"].shape
        if width % num_heads:
            raise ValueError(f"the {tower} tower is {width} wide")
        towers[tower] = {
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": len(layers),
            "num_attention_heads": num_heads,
            "hidden_act": activation,
        }
    patch = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    places = state["vision_model.embeddings.position_embedding.weight"].shape[0] - 1  # one is the class token's
    features = state["visual_projection.weight"].shape[0]
    vocabulary, context = (state[f"text_model.embeddings.{kind}_embedding.weight"].shape[0] for kind in ("token", "position"))
    towers["vision"] |= {"patch_size": patch, "image_size": patch * round(places**0.5), "projection_dim": features}
    towers["text"] |= {
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "projection_dim": features,
        "eos_token_id": vocabulary - 1,
        "bos_token_id": vocabulary - 2,
    }
    return {"vision_config": towers["vision"], "text_config": towers["text"], "projection_dim": features}
