"""The optimal value of a prompt from answers of the reference, drawn once: what A*-PO takes off rewards.

Letters: B answers, P groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowrl.core.soft_values import soft_value
from flowrl.seeds import generator
from flowrl.text.evaluation import on_cpu
from flowrl.text.parts import Stateless
from flowrl.text.samples import sampling_tokens

if TYPE_CHECKING:
    from flowrl.text.answers import Answers
    from flowrl.types import Completions, Prompt, Scores

__all__ = ["ReferenceValue"]


class ReferenceValue(Stateless):
    """A shaper: each reward less V*(prompt) = temperature log mean exp(R / temperature) over answers of the model before training (A*-PO, arXiv:2505.20686).

    A prompt is asked when it is met for the first time, in any iteration, and never again. One without a scored answer has the value 0.

    Args:
        samples: >= 1, answers of the reference to a prompt. temperature: > 0, beta_1 of the paper.
    State: the values of the prompts that have been met.
    """

    needs = frozenset({"reference"})

    def __init__(self, samples: int = 8, temperature: float = 0.5) -> None:
        if samples < 1 or not temperature > 0:
            raise ValueError(f"samples {samples} must be at least 1, and temperature {temperature:g} above 0")
        self.samples, self.temperature = samples, temperature
        self.values: dict[int, float] = {}

    def rewards(self, answers: Answers) -> None:
        indices = answers.indices.tolist()
        new = {index: prompt for index, prompt in zip(indices, answers.prompts, strict=True) if index not in self.values}
        found = self._ask(answers, new)
        for values in answers.gather(found):
            self.values |= values
        value = torch.tensor([self.values[index] for index in indices], dtype=torch.float64)
        answers.rewards = answers.rewards - value[answers.group]

    def _ask(self, answers: Answers, new: dict[int, Prompt]) -> dict[int, float]:
        """Values of some prompts of this process, and what they cost."""
        policy, config, prompts = answers.policy, answers.config, list(new.values())
        completions: Completions | None = None
        with policy.reference():
            if prompts:
                settings = config.generation.model_copy(update={"engine": "transformers"})
                draws = [generator(config.seed, "reference_value", index) for index in new]
                completions = on_cpu(policy.generate(policy.encode(prompts), [self.samples] * len(prompts), settings, draws))
        if completions is None:
            return {}
        score: Callable[[Any, Completions, Tensor], dict[str, Scores]] = answers.extra["scored"]
        total = score(prompts, completions, completions.group)["total"]
        value, _ = soft_value(total.values.double(), completions.group, total.valid, len(prompts), temperature=self.temperature)
        answers.extra["measured_tokens"] = answers.extra.get("measured_tokens", 0) + sampling_tokens(completions, answers.policy.rows_per_forward)
        return dict(zip(new, value.tolist(), strict=True))

    def advantages(self, answers: Answers, advantages: Tensor) -> Tensor:
        return advantages

    def state_dict(self) -> dict[str, Any]:
        return {"values": dict(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = dict(state["values"])
