"""Level judge in the manner of DeQA-Score: the technical quality of a picture as the expected level that a vision-language model would name. The prompt is
not read.

question:     How would you rate the quality of this image?
answer:       The quality of the image is <level>
deqa_score  = sum_k k p(level_k) / sum_k p(level_k),   excellent = 5, good = 4, fair = 3, poor = 2, bad = 1
value       = deqa_score / 5                           [0.2, 1]

p(level) is the probability of the first token of the word after the answer's beginning; see rewards/vision_language.py.

Source: DeQA-Score, arXiv:2501.11561, and Flow-GRPO, arXiv:2505.05470, which divides by 5. Verified in the code of DeQA-Score (at 4768965): question, beginning
of the answer, the five words, the softmax over the logits of their first tokens, the expectation. Not verified: the texts of the papers, and the division in
Flow-GRPO's code. The published weights (zhiyuanyou/DeQA-Score-Mix3) need custom code for an old transformers, so they are served from an environment of their
own (docs/rewards/deqa.md); here the same reading is taken of a general model, whose scores are not DeQA's, and "word" and " word" are added up. Letters: B
samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowrl.types import Prompt, RewardInfo, UserError
from rewards.vision_language import DEFAULT_MODEL, FirstTokenReward, known_weights

__all__ = ["Deqa"]

_LEVELS = ("excellent", "good", "fair", "poor", "bad")


class Deqa(FirstTokenReward):
    """Expected level of technical quality, divided by five.

    Args:
        model: hub id or folder of a vision-language model that follows instructions.
        question: what is asked about the picture.
        answer: how the model's answer begins, up to the level.
        levels: five words from best to worst; no two may begin with the same token.
    Raises:
        UserError: not five different words, or an empty question or answer.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        question: str = "How would you rate the quality of this image?",
        answer: str = "The quality of the image is",
        levels: Sequence[str] = _LEVELS,
    ) -> None:
        if isinstance(levels, str) or len(levels) != 5 or len(set(levels)) != 5 or not all(isinstance(word, str) and word.strip() for word in levels):
            raise UserError(f"reward deqa: levels must be five different words from best to worst, not {levels!r}")
        if not question.strip() or not answer.strip():
            raise UserError("reward deqa: the question or the answer's beginning is empty; give both, or leave them out")
        self.model, self.asked, self.stem = model, question, answer
        self.answers = [(word,) for word in levels]
        self.info = RewardInfo(
            name="deqa",
            description="technical quality: expected level, from bad to excellent, that a vision-language model would name",
            low=0.2,
            high=1.0,
            source="DeQA-Score, arXiv:2501.11561; on another model, so not comparable with published numbers",
            reads=("images",),
            batch_size=8,
            dtype="bfloat16",
            extra="clip",
            **known_weights(model),
        )

    def question(self, prompt: Prompt) -> str:
        """The same for all pictures."""
        return self.asked

    def verdict(self, log_p: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Values [B] in [0.2, 1]; raw["deqa_score"] [B] in [1, 5]; raw["deqa_named"] [B] in [0, 1], the probability of all five words together."""
        marks = torch.arange(5, 0, -1, device=log_p.device, dtype=log_p.dtype)
        expected = log_p.softmax(1) @ marks
        return expected / 5, {"deqa_score": expected, "deqa_named": log_p.exp().sum(1)}
