"""What rewards by vision-language models share: weights into a class of transformers, a question about a picture, the probabilities of the answer's first
token.

A question is one user turn, the picture first and then the text, written by the chat template of the model; the answer is never sampled. One forward pass
gives the distribution of the token that would come first, and the probability of an answer is the sum over its spellings:

p(answer) = sum_t softmax(logits at the last position)_t,   t in the first tokens of "word" and " word" for each spelling of the answer

Source: VQAScore (arXiv:2404.01291) and DeQA-Score (arXiv:2501.11561) read answers in this way. Not verified: the texts of the papers. The sum over spellings
and the refusal of tokens that two answers share are ours. Letters: B samples, L tokens, V vocabulary, A answers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.types import Prompt, UserError
from rewards.checkpoints import load_network, load_pretrained, require
from rewards.network import NetworkReward
from rewards.pictures import to_pil

__all__ = ["DEFAULT_MODEL", "FirstTokenReward", "encode", "first_tokens", "known_weights", "load_processor", "model_of_tensors", "picture_turn"]

DEFAULT_MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
_KNOWN = {
    DEFAULT_MODEL: ("Qwen Research License, not for commercial use", 3_755_000_000),
    "Qwen/Qwen2.5-VL-7B-Instruct": ("Apache-2.0", 8_292_000_000),
}


def known_weights(model: str) -> dict[str, Any]:
    """The fields ``weights``, ``weights_license`` and ``parameters`` of a RewardInfo; empty for a model that this file does not know."""
    if model not in _KNOWN:
        return {}
    license_name, parameters = _KNOWN[model]
    return {"weights": (model,), "weights_license": license_name, "parameters": parameters}


def model_of_tensors(reward: str, cls: Any, config: Any, tensors: dict[str, Tensor], dtype: torch.dtype, path: Path, **options: Any) -> nn.Module:
    """A model of transformers with exactly these weights, on the CPU in ``dtype``; nothing is drawn at random.

    Args:
        cls: a PreTrainedModel. config: its configuration. tensors: its state, complete and without anything else. path: where they come from, for messages.
        options: further arguments of the class.
    Raises:
        UserError: a tensor is missing, unknown or of another shape.
    """
    names = set(tensors)  # the loader takes the table apart
    place = str(path.absolute())
    model: nn.Module = load_network(
        reward, lambda _, **keywords: cls.from_pretrained(None, **keywords), place, config=config, state_dict=tensors, dtype=dtype, **options
    )
    unknown = sorted(names - set(model.state_dict()))
    if unknown:
        raise UserError(f"reward {reward}: {place} is not the published checkpoint: {len(unknown)} tensors are unknown, {unknown[0]} for one")
    return model


def load_processor(reward: str, source: str, padding_side: str) -> Any:
    """The processor of a vision-language model: tokenizer, chat template and preparation of pictures.

    Raises:
        UserError: torchvision is missing, which processors of transformers need; the source cannot be reached; there is no chat template.
    """
    require(reward, "torchvision", "clip")
    from transformers import AutoProcessor

    processor = load_pretrained(reward, AutoProcessor.from_pretrained, source)
    if not getattr(processor, "chat_template", None):
        raise UserError(f"reward {reward}: {source} has no chat template; choose a vision-language model that was tuned to follow instructions")
    processor.tokenizer.padding_side = padding_side
    return processor


def picture_turn(processor: Any, text: str) -> str:
    """One user turn with a picture and then ``text``, up to where the model's answer begins."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)


def encode(reward: str, processor: Any, images: Tensor, prompts: Sequence[Prompt], turns: Sequence[str], dtype: torch.dtype) -> Any:
    """Tokens and patches of one picture and one turn a sample, padded to the longest, on the device of the pictures.

    Args:
        images: [B, 3, H, W] float in [0, 1]; the processor sees 8-bit RGB.
        prompts: those whose texts are inside the turns.
        dtype: of the patches.
    Returns:
        what the model takes by keyword: ``input_ids`` and ``attention_mask`` [B, L], the pictures as the model wants them.
    Raises:
        UserError: a prompt holds a control token of the model, which would change who speaks or where the picture is.
    """
    control = [str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special]
    for prompt in prompts:
        found = [token for token in control if token in prompt.text]
        if found:
            raise UserError(f"reward {reward}: the prompt {prompt.text[:60]!r} holds {found[0]}, a control token of the model; take it out")
    return processor(text=list(turns), images=[[picture] for picture in to_pil(images)], padding=True, return_tensors="pt").to(images.device, dtype)


def first_tokens(reward: str, tokenizer: Any, answers: Sequence[Sequence[str]]) -> list[list[int]]:
    """For each answer the tokens that its spellings begin with, with and without a space before them.

    Raises:
        UserError: two answers begin with the same token, so that it tells nothing.
    """
    found: list[list[int]] = []
    for spellings in answers:
        heads = [tokenizer.encode(space + word, add_special_tokens=False)[:1] for word in spellings for space in ("", " ")]
        found.append(sorted({head[0] for head in heads if head and tokenizer.decode(head).strip()}))  # a lone space says nothing of the word
    for i, tokens in enumerate(found):
        for j in range(i):
            if set(tokens) & set(found[j]):
                raise UserError(f"reward {reward}: {answers[j][0]!r} and {answers[i][0]!r} begin with the same token for this model; choose other words")
    return found


class FirstTokenReward(NetworkReward):
    """A reward that asks a vision-language model one question about each picture. Gives ``info``, ``answers``, ``question`` and ``verdict``.

    Positions are counted by the model. Padding is on the left and masked, so it moves nothing in models with rotary positions, which all current ones have.

    Attributes:
        model: a hub id or folder of any model that AutoModelForImageTextToText and AutoProcessor of transformers can load, with a chat template.
        answers: the spellings of each answer. stem: how the model's answer begins, before the token that is read.
    """

    model: str
    answers: Sequence[Sequence[str]]
    stem: str = ""

    @abstractmethod
    def question(self, prompt: Prompt) -> str:
        """What is asked about a picture."""

    @abstractmethod
    def verdict(self, log_p: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Values [B] and raw columns from the log-probabilities [B, A] float32 of the answers."""

    def build(self, dtype: torch.dtype) -> nn.Module:
        """The model in ``dtype``; its logits are made float32 before the softmax."""
        self.processor = load_processor(self.info.name, self.model, "left")
        self.tokens = first_tokens(self.info.name, self.processor.tokenizer, self.answers)
        from transformers import AutoModelForImageTextToText

        network: nn.Module = load_network(self.info.name, AutoModelForImageTextToText.from_pretrained, self.model, dtype=dtype)
        return network

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``verdict``."""
        assert self.network is not None
        turns = [picture_turn(self.processor, self.question(prompt)) + self.stem for prompt in prompts]
        asked = prompts if "prompt" in self.info.reads else ()
        inputs = encode(self.info.name, self.processor, images, asked, turns, next(self.network.parameters()).dtype)
        logits = self.network(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
        log_p = logits.float().log_softmax(-1)
        return self.verdict(torch.stack([log_p[:, tokens].logsumexp(-1) for tokens in self.tokens], dim=1))
