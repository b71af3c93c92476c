"""Reward models of text: a language model with one output, trained on human preferences, reads prompt and completion as a chat and gives a number.

    value = w . h_last + b      h_last: state of the last token of the chat, in float32

Trained by Bradley-Terry: the probability that people prefer completion a to b of the same prompt is sigmoid(value_a - value_b), so only differences count, the
scale is the model's own, and values of different prompts do not compare.

Source: InstructGPT, arXiv:2203.02155, and the reward models on the hub with transformers' AutoModelForSequenceClassification and num_labels = 1. Verified on
tiny models of the real class: equal to transformers' own logits without padding. Ours: the chat is cut to ``max_length`` from the left of the prompt, so that
the completion and the marks of the chat template stay whole; one whose completion alone is too long is invalid. Sequences are padded on the right, with the
pad token, or, where the tokenizer has none, with its end-of-text token; either way the last token is found by length, so an end-of-text token inside the chat
is never taken for padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.types import Prompt, RewardInfo, SampleBatch, Scores, UserError
from rewards.checkpoints import load_network, load_pretrained, require
from rewards.network import NetworkReward
from rewards.text_match import texts_of

__all__ = ["RewardModel"]


class RewardModel(NetworkReward):
    """The number that a sequence-classification model gives to a chat of prompt and completion. See the module's text.

    Args:
        model: hub id or folder of a model with one label and its tokenizer, which must have a chat template.
        max_length: tokens of a chat, at least 16.
        system: text of a system message before the prompt; empty = none.
        batch_size: completions at once.
    Raises:
        UserError: an argument is out of its range.
    """

    tokenizer: Any = None

    def __init__(self, model: str = "Skywork/Skywork-Reward-V2-Qwen3-0.6B", max_length: int = 2048, system: str = "", batch_size: int = 8) -> None:
        for name, value, low in (("max_length", max_length, 16), ("batch_size", batch_size, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise UserError(f"reward reward_model: {name} must be a whole number from {low} on, not {value!r}")
        self.model, self.max_length, self.system = model, max_length, system
        self.info = RewardInfo(
            name="reward_model",
            description="the score of a language model with one output, trained on preferences between completions",
            low=-math.inf,
            high=math.inf,
            source="InstructGPT, arXiv:2203.02155; transformers AutoModelForSequenceClassification",
            weights=(model,),
            weights_license="see the model's page",
            parameters=596_000_000,
            batch_size=batch_size,
            reads=("prompt", "texts"),
            dtype="bfloat16",
        )

    def build(self, dtype: torch.dtype) -> nn.Module:
        """The model in ``dtype`` with its head in float32, and the tokenizer.

        Raises:
            UserError: it cannot be loaded, has more than one label, is no causal language model with a linear head, or its tokenizer cannot write chats or pad.
        """
        transformers = require("reward_model", "transformers", "dev")
        tokenizer = load_pretrained("reward_model", transformers.AutoTokenizer.from_pretrained, self.model)
        if not tokenizer.chat_template:
            raise UserError(f"reward reward_model: the tokenizer of {self.model} has no chat template; choose a model that was trained on chats")
        if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
            raise UserError(f"reward reward_model: the tokenizer of {self.model} has neither a pad token nor an end-of-text token; set pad_token in its folder")
        config = load_pretrained("reward_model", transformers.AutoConfig.from_pretrained, self.model)
        if config.num_labels != 1:
            raise UserError(f"reward reward_model: {self.model} has {config.num_labels} labels where a reward model has one; choose a reward model")
        network: nn.Module = load_network("reward_model", transformers.AutoModelForSequenceClassification.from_pretrained, self.model, dtype=dtype)
        if not isinstance(getattr(network, "score", None), nn.Linear):
            raise UserError(f"reward reward_model: {type(network).__name__} has no linear head `score` on its last token; choose a causal language model")
        network.score.float()
        self.tokenizer = tokenizer
        return network

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """This reward reads texts: always a UserError."""
        raise UserError("reward reward_model: needs texts (completions), got only pictures; choose another reward")

    def score(self, batch: SampleBatch) -> Scores:
        """values [B] float32; raw["reward_model_tokens"] [B] float32, of the chat as it was read.

        Invalid where the completion alone is longer than ``max_length``.

        Raises:
            UserError: no texts.
            ValueError: B = 0.
            RuntimeError: ``load`` was not called.
        """
        if self.network is None:
            raise RuntimeError("reward reward_model: load must be called before score")
        texts = texts_of("reward_model", batch)
        chats = [self._chat(prompt.text, text) for prompt, text in zip(batch.prompts, texts, strict=True)]
        kept = [i for i, chat in enumerate(chats) if chat is not None]
        values, tokens = torch.full((len(chats),), torch.nan), torch.full((len(chats),), torch.nan)
        if kept:
            read = [chat for chat in chats if chat is not None]
            with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
                values[kept] = self._read(self.network, read)
            tokens[kept] = torch.tensor([float(len(chat)) for chat in read])
        valid = torch.tensor([chat is not None for chat in chats])
        problems = {i: f"the completion alone is longer than {self.max_length} tokens" for i in range(len(chats)) if i not in kept}
        return Scores(values, valid, {"reward_model_tokens": tokens}, problems)

    def _read(self, network: nn.Module, chats: list[list[int]]) -> Tensor:
        """Values [b] float32 on the CPU of chats of any lengths."""
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        longest = max(map(len, chats))
        ids = torch.tensor([chat + [pad] * (longest - len(chat)) for chat in chats], device=self.device)
        lengths = torch.tensor([len(chat) for chat in chats], device=self.device)
        mask = (torch.arange(longest, device=self.device) < lengths[:, None]).long()
        base: Any = getattr(network, "base_model", None)
        head: Any = network.score
        states = base(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = states[torch.arange(len(chats), device=self.device), lengths - 1]
        values: Tensor = head(last.float())[:, 0]
        return values.cpu()

    def _chat(self, prompt: str, completion: str) -> list[int] | None:
        """Tokens of the chat, at most ``max_length``, cut from the left of the prompt; None if that is not enough."""
        ids = self._ids(prompt, completion)
        words: list[int] = self.tokenizer.encode(prompt, add_special_tokens=False)
        while len(ids) > self.max_length and words:
            words = words[len(ids) - self.max_length :]
            ids = self._ids(self.tokenizer.decode(words), completion)  # which may differ by a token or two from what was cut, hence the loop
        return ids if len(ids) <= self.max_length else None

    def _ids(self, prompt: str, completion: str) -> list[int]:
        chat = [{"role": "system", "content": self.system}] if self.system else []
        chat += [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids
