"""OREO: the policy and the value of every token are fitted to each other by squares, without ratios and without pairs. See `Oreo`.

Letters: B answers, T tokens.
"""

from __future__ import annotations

from inspect import signature

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.core.soft_values import oreo
from flowrl.estimation import Estimator
from flowrl.objective_names import arguments
from flowrl.text.answers import Answers
from flowrl.text.batch import Batch, ObjectiveBase
from flowrl.text.credit_base import sample_advantages
from flowrl.text.parts import Stateless
from flowrl.text.value import ValueHead, ValueTargets
from flowrl.types import Objective

__all__ = ["Oreo", "SoftValueCredit"]


def _beta(config: Config) -> float:
    return float(arguments(config.objective).get("beta", signature(oreo).parameters["beta"].default))


class SoftValueCredit(Stateless):
    """Values that are soft: what is to be had from a token on, less beta times how far the policy will have gone from the reference (OREO's critic).

    The run's `value` learns R - beta times the log-ratio of the policy to the reference over this and all later tokens, whose square with it is
    `flowrl.core.soft_values.oreo_critic`. The objective `oreo` gets the reward as the advantage of every token, and the values as they were when the iteration
    began. Both are fitted to the reward within `advantage.clip`. In the first `value.warmup_iterations` only the value learns.
    """

    needs = frozenset({"hidden", "log_prob", "reference"})

    def __call__(self, answers: Answers, estimator: Estimator) -> Tensor:
        head: ValueHead = answers.extra["value"]
        rewards, counted = sample_advantages(answers, estimator), answers.mask & answers.valid[:, None]
        ratio = torch.where(counted, answers.token("log_prob").double() - answers.token("reference").double(), 0.0)
        clip = answers.config.advantage.clip
        returns = rewards.clamp(-clip, clip)[:, None] - _beta(answers.config) * ratio.flip(1).cumsum(1).flip(1)
        values = head.values(answers.token("hidden"), answers.mask)
        answers.extra["soft_values"] = values
        answers.extra["value_targets"] = ValueTargets(values, returns.float(), counted)
        config = answers.config.value
        if config is not None and answers.iteration <= config.warmup_iterations:
            answers.train = torch.zeros_like(answers.train)
        return rewards


class Oreo(ObjectiveBase):
    """OREO's policy loss with a state at every token, see `flowrl.core.soft_values.oreo`; it takes the credit `soft_values`."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.needs, self.beta = frozenset({"reference"}), _beta(config)

    def __call__(self, batch: Batch) -> Objective:
        value = batch.of(batch.answers.extra["soft_values"])
        return oreo(batch.decisions, value=value, ref_log_prob=batch.token("reference"), beta=self.beta)
