"""TW-GRPO's weights of tokens: what a group's answers disagree about counts more.

Letters: B answers, G answers of a group, T tokens, H hidden size, V vocabulary, P groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl.core.token_weights import divergence_weights, position_divergence
from flowrl.policies.token_statistics import positions_at_once
from flowrl.text.answers import Answers
from flowrl.text.parts import Stateless

__all__ = ["Divergence"]


class Divergence(Stateless):
    """Weights 1 .. alpha by how much the distributions of a group's answers differ at each position, see `flowrl.core.token_weights.position_divergence`.

    The pass over all answers keeps their last hidden states, [B, T, H] float32 in host memory. The output head then makes distributions of a few positions of
    one group at a time, as many logits as in training: [B, T, V] never exists. It needs the head whole, so not with training.sharding.

    Args:
        alpha: >= 1, the most that a token weighs; 1 is GRPO.
    """

    needs = frozenset({"hidden"})

    def __init__(self, alpha: float = 1.4) -> None:
        if alpha < 1:
            raise ValueError(f"alpha is {alpha:g}, and the largest weight is at least 1")
        self.alpha = alpha

    @torch.no_grad()
    def __call__(self, answers: Answers, advantages: Tensor) -> Tensor:
        hidden, mask, policy = answers.token("hidden"), answers.mask, answers.policy
        head, weight = policy.network.head, policy.network.model.get_output_embeddings().weight
        divergence = torch.zeros(answers.num_groups, mask.shape[1])
        for g in range(answers.num_groups):
            rows = torch.nonzero(answers.group == g).squeeze(1)
            if not len(rows):
                continue
            size = max(1, positions_at_once(weight.shape[0]) // len(rows))
            for start in range(0, mask.shape[1], size):
                part = slice(start, start + size)
                if not bool(mask[rows, part].any()):
                    continue
                logits = head(hidden[rows, part].to(weight)).float() / answers.config.generation.temperature
                of_all = torch.zeros(len(rows), dtype=torch.int64, device=logits.device)
                found = position_divergence(logits.log_softmax(-1), mask[rows, part].to(logits.device), of_all, 1)
                divergence[g, part] = found[0].cpu()
        return divergence_weights(divergence, mask, answers.group, alpha=self.alpha)
