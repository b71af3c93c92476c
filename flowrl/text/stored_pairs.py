"""Stored preference pairs in a model's tokens, and as the groups of two that an iteration trains on.

Letters: n pairs, P of an iteration, T tokens of the longest answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowrl.text_pairs import TextPairs
from flowrl.types import Completions, Scores, UserError

if TYPE_CHECKING:
    from flowrl.policies.causal_lm import CausalLmPolicy

__all__ = ["StoredPairs"]

_SIDES = ("chosen", "rejected")


class StoredPairs:
    """Preference pairs with their tokens: the answer's text as it is, then the token that ends an answer.

    Attributes:
        preference: [n] float32, the chance that the chosen answer is the better one; None where the data has none.
        has_scores: the data has rewards of its own.
    Raises:
        UserError: an answer has no tokens, the two of a pair have the same, or one does not fit into the model's context.
    """

    def __init__(self, pairs: TextPairs, policy: CausalLmPolicy) -> None:
        self.policy, self.dropped, self.preference = policy, pairs.dropped, pairs.preference
        self.has_scores = pairs.chosen_reward is not None
        self.prompts = policy.encode(pairs.prompts)
        self.texts = list(zip(pairs.chosen, pairs.rejected, strict=True))
        end = [] if not policy.ends else [policy.ending]
        tokens = [policy.tokenizer([text[side] for text in self.texts], add_special_tokens=False)["input_ids"] for side in (0, 1)]
        self.tokens = [tuple([*numbers, *end] for numbers in pair) for pair in zip(*tokens, strict=True)]
        if pairs.chosen_reward is not None and pairs.rejected_reward is not None:
            self.rewards = torch.stack([pairs.chosen_reward, pairs.rejected_reward], 1)
        else:
            self.rewards = torch.tensor([[1.0, 0.0]]).repeat(len(pairs), 1)
        for number, answers in enumerate(self.tokens):
            self._check(number, answers, len(end))

    def _check(self, number: int, answers: Sequence[Sequence[int]], ended: int) -> None:
        where, prompt, context = f"data.pairs: pair {number + 1}", len(self.prompts[number]), self.policy.context
        for side, answer in zip(_SIDES, answers, strict=True):
            if len(answer) == ended:
                raise UserError(f"{where}: the tokenizer of {self.policy.config.path} finds nothing in the {side} answer; remove the pair")
            if context is not None and prompt + len(answer) > context:
                raise UserError(
                    f"{where}: the prompt and the {side} answer have {prompt + len(answer)} tokens, and the model's context is {context}; remove the pair"
                )
        if answers[0] == answers[1]:
            raise UserError(f"{where}: the chosen and the rejected answer are the same tokens; remove the pair")

    def longest(self) -> int:
        """Tokens of the longest answer."""
        return max(len(answer) for pair in self.tokens for answer in pair)

    def read(self, indices: Sequence[int]) -> tuple[Completions, dict[str, Scores]]:
        """Pairs as groups of two, the chosen answer first, and their scores: those of the data, or 1 and 0."""
        said = [answer for index in indices for answer in self.tokens[index]]
        length = torch.tensor([len(answer) for answer in said], dtype=torch.int64)
        longest = int(length.max()) if said else 1
        completions = Completions(
            prompt_tokens=tuple(self.prompts[index] for index in indices),
            tokens=torch.tensor([answer + [self.policy.pad] * (longest - len(answer)) for answer in said], dtype=torch.int64).view(-1, longest),
            mask=torch.arange(longest) < length[:, None],
            length=length,
            group=torch.arange(len(indices)).repeat_interleave(2),
            finished=torch.ones(len(said), dtype=torch.bool),
            log_prob=torch.zeros(len(said), longest),
            texts=tuple(text for index in indices for text in self.texts[index]),
        )
        rewards = self.rewards[torch.tensor(list(indices), dtype=torch.int64)].flatten()
        return completions, {"total": Scores(rewards, torch.ones(len(rewards), dtype=torch.bool))}

    def preferences(self, indices: Tensor) -> Tensor | None:
        """[P] float32, or None where the data has none."""
        return None if self.preference is None else self.preference[indices]
