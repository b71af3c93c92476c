"""Steps of an answer, and EMPG's credit of them.

Letters: B answers, T tokens, S steps of the longest answer.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flowrl.core.token_advantages import gate_steps, step_entropy, steps_to_decisions
from flowrl.estimation import Estimator
from flowrl.text.answers import Answers
from flowrl.text.credit_base import sample_advantages
from flowrl.text.parts import Stateless

__all__ = ["StepGate", "step_numbers"]


def step_numbers(answers: Answers, by: Literal["line", "turn"] | int) -> Tensor:
    """The step of each sampled token, [B, T] int64 from 0, none left out within an answer; 0 where masked.

    Args:
        by: a step is a line (it ends with a token that has a line break in it), a turn of an agent, or so many tokens.
    """
    mask, c = answers.mask, answers.completions
    if by == "turn":
        found = torch.zeros_like(c.tokens) if c.turn is None else c.turn
    elif by == "line":
        said = torch.unique(c.tokens[mask])
        breaks = ["\n" in text for text in answers.policy.decode([[token] for token in said.tolist()])]
        ends = torch.isin(c.tokens, said[torch.tensor(breaks, dtype=torch.bool)]) & mask
        found = ends.cumsum(1) - ends.long()
    else:
        found = (mask.cumsum(1) - 1) // by
    return torch.where(mask, found, 0)


class StepGate(Stateless):
    """EMPG (arXiv:2509.09265): sure steps learn more, unsure ones less, and steps that lead to sure ones are favoured, see `gate_steps`.

    All trained steps of all processes make one batch. Advantages of answers are those of `advantage`.

    Args:
        step: "line", "turn" or a number of tokens, see `step_numbers`. gate, clarity, bonus: k, k' and zeta, >= 0.
    """

    needs = frozenset({"entropy"})

    def __init__(self, step: Literal["line", "turn"] | int = "line", gate: float = 1.0, clarity: float = 1.0, bonus: float = 0.05) -> None:
        if step not in ("line", "turn") and (isinstance(step, str) or step < 1):
            raise ValueError(f"step is {step}; give line, turn or a number of tokens")
        if min(gate, clarity, bonus) < 0:
            raise ValueError("gate, clarity and bonus must not be negative")
        self.step, self.gate, self.clarity, self.bonus = step, gate, clarity, bonus

    def __call__(self, answers: Answers, estimator: Estimator) -> Tensor:
        step = step_numbers(answers, self.step)
        num_steps = int(step.max()) + 1
        entropy, present = step_entropy(answers.token("entropy").double(), step, answers.mask, num_steps)
        present = present & (answers.valid & answers.train)[:, None]
        parts = answers.gather((answers.numbers[0], sample_advantages(answers, estimator), entropy, present))
        width = max(part[2].shape[1] for part in parts)
        wide = [torch.nn.functional.pad(part[2], (0, width - part[2].shape[1])) for part in parts]
        there = [torch.nn.functional.pad(part[3], (0, width - part[3].shape[1])) for part in parts]
        every = gate_steps(torch.cat([part[1] for part in parts]), torch.cat(wide), torch.cat(there), gate=self.gate, clarity=self.clarity, bonus=self.bonus)
        start = sum(len(part[1]) for part in parts if part[0] < answers.numbers[0])
        return steps_to_decisions(every[start : start + len(answers), :num_steps], step, answers.mask)
