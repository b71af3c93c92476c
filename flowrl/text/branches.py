"""SPO-tree: the branches of a tree of answers are compared with those that leave the same place. See `BranchCredit` and `Once`.

Letters: B answers, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl.core.branches import branch_advantages
from flowrl.estimation import Estimator
from flowrl.text.answers import Answers
from flowrl.text.parts import Stateless

__all__ = ["BranchCredit", "Once"]


class BranchCredit(Stateless):
    """SPO's tree form (arXiv:2505.23564): each segment of an answer is judged beside the other ways that the tree goes on from where it begins, see
    `flowrl.core.branches.branch_advantages`; eps is that of `advantage`.

    Args:
        normalize: divide by the spread of the siblings.
    """

    def __init__(self, normalize: bool = True) -> None:
        self.normalize = normalize

    def __call__(self, answers: Answers, estimator: Estimator) -> Tensor:
        ancestors, config = answers.completions.ancestors, answers.config
        assert ancestors is not None and config.tree is not None  # the config's check has seen it
        found, sharing = branch_advantages(answers.rewards, ancestors, answers.valid, normalize=self.normalize, eps=config.advantage.eps)
        last = (ancestors >= 0).sum(1, keepdim=True) - 1
        segment = torch.minimum(torch.arange(answers.mask.shape[1]) // config.tree.segment, last)
        answers.extra["sharing"] = sharing.gather(1, segment)
        return found.gather(1, segment)


class Once(Stateless):
    """A token that several answers of a tree share is trained once: each of them gives it its share of the weight. For the credit `branches`."""

    def __call__(self, answers: Answers, advantages: Tensor) -> Tensor:
        sharing: Tensor = answers.extra["sharing"]
        return 1 / sharing.float()
