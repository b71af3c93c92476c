"""Tiny vision-language models of real classes in the real layout, for tests: Qwen2-VL with a byte-level tokenizer, and LLaVA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["CHAT", "SPECIAL", "enlarge", "qwen_config", "qwen_processor", "save_llava", "save_qwen"]

WORDS = ("Yes", "yes", "No", "no", "excellent", "good", "fair", "poor", "bad")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CHAT = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}{% if part['type'] == 'image' %}PICTURE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(words: Sequence[str] = WORDS, special: Sequence[str] = SPECIAL) -> Any:
    """Bytes, and the given words with and without a space before them as single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in words:
        for head, tail in [(word[:i], word[i]) for i in range(1, len(word))] + [("Ġ", word)]:
            if head + tail not in vocabulary:
                vocabulary[head + tail] = len(vocabulary)
                merges.append((head, tail))
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=special[0], eos_token=special[2], additional_special_tokens=list(special[1:]))


def qwen_processor(pixels: int = 4 * 28 * 28, chat: str | None = CHAT.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>")) -> Any:
    from transformers import Qwen2VLImageProcessorPil, Qwen2VLProcessor, Qwen2VLVideoProcessor

    return Qwen2VLProcessor(Qwen2VLImageProcessorPil(min_pixels=pixels, max_pixels=pixels), tokenizer(), Qwen2VLVideoProcessor(), chat_template=chat)


def qwen_config(tokens: Any, rows: int, tied: bool = False) -> Any:
    from transformers import Qwen2VLConfig

    ids = {name: tokens.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end", "im_end", "endoftext")}
    text = {
        "vocab_size": rows,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "bos_token_id": ids["endoftext"],
        "eos_token_id": ids["im_end"],
        "pad_token_id": ids["endoftext"],
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    }
    return Qwen2VLConfig(
        text_config=text,
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=tied,
    )


def enlarge(network: nn.Module, scale: float = 0.2) -> nn.Module:
    """Weights large enough for the picture, the words and their places to matter; norms keep theirs."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape) * (1.0 if "embed" in name and "patch" not in name else scale))
    return network.eval()


def save_qwen(folder: Path, seed: int = 0, tied: bool = False) -> Path:
    """A Qwen2-VL of two layers with its processor; tied = the output layer has the weights of the embeddings, and the file has them once."""
    from transformers import Qwen2VLForConditionalGeneration

    torch.manual_seed(seed)
    processor = qwen_processor()
    processor.save_pretrained(folder)
    enlarge(Qwen2VLForConditionalGeneration(qwen_config(processor.tokenizer, len(processor.tokenizer) + 5, tied))).save_pretrained(folder)
    return folder


def save_llava(folder: Path, seed: int = 0) -> Path:
    """A LLaVA with a CLIP tower and a Llama of one layer each, with its processor."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    torch.manual_seed(seed)
    tokens = tokenizer(special=("<pad>", "<s>", "</s>", "<image>"))
    pictures = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        pictures,
        tokens,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("PICTURE", "<image>"),
    ).save_pretrained(folder)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, projection_dim=32)
    text = LlamaConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, pad_token_id=tokens.pad_token_id
    )
    image = tokens.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image, vision_feature_layer=-2, pad_token_id=tokens.pad_token_id)
    enlarge(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    return folder
