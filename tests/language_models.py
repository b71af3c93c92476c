"""Random causal language models of a few thousand parameters of real classes, with a small tokenizer, saved as real ones are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from flowrl.policies.causal_lm import CausalLmPolicy
from flowrl.sections import GenerationConfig, ModelConfig
from flowrl.types import Prompt

CPU = torch.device("cpu")
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
CONTEXT = 64
TEXTS = ("what is 2 + 3?", "a much longer question, of 12 words or so", "7?")
PROMPTS = tuple(Prompt(text) for text in TEXTS)


def build_tokenizer(*, pad: bool = True, end: bool = True, template: bool = True) -> PreTrainedTokenizerFast:
    """One token for every byte, beside the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate([*SPECIAL, *letters])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    named = ({"pad_token": "<|pad|>"} if pad else {}) | ({"eos_token": "<|end|>"} if end else {})
    found = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=list(SPECIAL), **named)
    if template:
        found.chat_template = TEMPLATE
    return found


def _llama(vocabulary: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=CONTEXT, **sizes))


def _qwen3(vocabulary: int) -> Qwen3ForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, max_position_embeddings=CONTEXT, tie_word_embeddings=True, **sizes))


def _gpt2(vocabulary: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4))


BUILDERS: dict[str, Callable[[int], Any]] = {"llama": _llama, "qwen3": _qwen3, "gpt2": _gpt2}


def build_language_model(folder: Path, kind: str = "llama", *, seed: int = 0, ends: Sequence[int] | None = None, **tokenizer: bool) -> Path:
    """A folder with random weights, large enough that what is likely depends on what was said."""
    words = build_tokenizer(**tokenizer)
    torch.manual_seed(seed)
    model = BUILDERS[kind](len(words))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(0, 0.35 if "embed" in name or "wte" in name or "lm_head" in name else 0.25)
    end = words.eos_token_id if ends is None else list(ends)
    for settings in (model.config, model.generation_config):
        settings.eos_token_id, settings.pad_token_id, settings.bos_token_id = end, words.pad_token_id, None
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def make_policy(folder: Path | str, rows_per_forward: int = 64, *, keep_reference: bool = False, moved: bool = False, **settings: Any) -> CausalLmPolicy:
    """Of a folder; ``moved`` = every trainable weight changed, as a training does."""
    torch.manual_seed(0)
    config = ModelConfig(**{"path": str(folder), "lora": {"rank": 4, "alpha": 6.0}, **settings})
    policy = CausalLmPolicy(config, CPU, rows_per_forward=rows_per_forward, keep_reference=keep_reference)
    if moved:
        generator = torch.Generator().manual_seed(5)
        for p in policy.trainable():
            p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return policy


def answers_to(policy: CausalLmPolicy, counts: Sequence[int] = (2, 3, 1), *, seed: int = 0, **more: Any) -> Any:
    """Completions of `PROMPTS`; further settings of the generation, and ``prefix``, ``prefix_log_prob``, ``greedy``."""
    named = {name: more.pop(name) for name in ("prefix", "prefix_log_prob", "greedy") if name in more}
    settings = GenerationConfig(**{"max_new_tokens": 12, **more})
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(counts))]
    return policy.generate(policy.encode(PROMPTS[: len(counts)], settings), counts, settings, generators, **named)
