"""TGDPO's guide: a second model that has been trained with DPO, asked for the log-probabilities of its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.types import Completions, UserError

if TYPE_CHECKING:
    from flowrl.policies.causal_lm import CausalLmPolicy

__all__ = ["Guide"]


class Guide:
    """A frozen language model beside the policy; what it evaluates is counted as `pair/guide_tokens`, not among the policy's.

    Raises:
        UserError: the model cannot be loaded, or has another tokenizer than the policy.
    """

    def __init__(self, config: Config, policy: CausalLmPolicy) -> None:
        section = config.pairing.guide
        assert section is not None
        model = config.model.model_copy(update={"path": section.path or config.model.path, "adapter": "full"})
        self.policy = type(policy)(model, policy.device, rows_per_forward=config.training.rows_per_forward)
        self.policy.network.requires_grad_(False)
        if self.policy.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            raise UserError(f"pairing.guide.path: {section.path} has another tokenizer than {config.model.path}; use a model that was trained from it")
        self.temperature = config.generation.temperature

    @torch.no_grad()
    def __call__(self, completions: Completions, rows: Tensor) -> Tensor:
        """[len(rows), T] float32 on the CPU."""
        return self.policy.token_output(completions, rows, temperature=self.temperature).log_prob.float().cpu()

    @property
    def tokens(self) -> int:
        """Evaluated so far."""
        return self.policy.rows.forward
