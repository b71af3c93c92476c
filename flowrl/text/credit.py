"""From rewards of answers to advantages of tokens: the table. A new credit is a class in a file of its own, and a line in the table.

Letters: B answers, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from flowrl.core.token_advantages import token_returns
from flowrl.estimation import Estimator
from flowrl.text.answers import Answers
from flowrl.text.branches import BranchCredit
from flowrl.text.bundles import ConsistencyCredit, RiskCredit
from flowrl.text.credit_base import Credit, sample_advantages, summed_moments, token_rewards, whitened
from flowrl.text.parts import Stateless
from flowrl.text.segments import SegmentCredit
from flowrl.text.soft_values import SoftValueCredit
from flowrl.text.steps import StepGate
from flowrl.text.trees import TreeCredit
from flowrl.text.turns import GigpoCredit, IgpoCredit, SaltCredit, TurnCredit
from flowrl.text.value import GaeCredit

__all__ = ["CREDITS", "Credit", "sample_advantages", "summed_moments"]


class AnswerCredit(Stateless):
    """All tokens of an answer share its advantage: GRPO and most others."""

    def __call__(self, answers: Answers, estimator: Estimator) -> Tensor:
        return sample_advantages(answers, estimator)


class TokenReturns(Stateless):
    """REINFORCE++: the return of each token, rewards of later tokens times powers of gamma, whitened over all tokens of the iteration (arXiv:2501.03262).

    The answer's advantage by centre and scale stands at its last token, as its reward; with `kl.place: reward` each token pays for its distance to the
    reference. centre none, scale none is REINFORCE++; centre group, scale none its variant with a baseline.

    Args:
        gamma: discount, in (0, 1]. whitened: divide by the spread of all tokens and subtract their mean.
    """

    takes_price: ClassVar[bool] = True

    def __init__(self, gamma: float = 1.0, whitened: bool = True) -> None:
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma is {gamma:g}, and a discount is in (0, 1]")
        self.gamma, self.whitened = gamma, whitened

    def __call__(self, answers: Answers, estimator: Estimator) -> Tensor:
        rewards = token_rewards(answers, sample_advantages(answers, estimator))
        returns = token_returns(rewards, answers.mask & answers.valid[:, None], gamma=self.gamma)
        return whitened(answers, returns) if self.whitened else returns


CREDITS: dict[str, Callable[..., Credit]] = {
    "answer": AnswerCredit,
    "token_returns": TokenReturns,
    "gae": GaeCredit,
    "risk": RiskCredit,
    "consistency": ConsistencyCredit,
    "step_gate": StepGate,
    "gigpo": GigpoCredit,
    "igpo": IgpoCredit,
    "salt": SaltCredit,
    "turns": TurnCredit,
    "tree": TreeCredit,
    "segments": SegmentCredit,
    "branches": BranchCredit,
    "soft_values": SoftValueCredit,
}
