"""Values of tokens: a head on the policy's hidden states, and the advantages that PPO, VAPO and T-PPO make with it.

Letters: B answers, T tokens, H hidden size, N tokens that count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from flowrl.config import Config
from flowrl.core.token_advantages import gae, length_lambda, masked_moments, truncated_masks, value_loss
from flowrl.estimation import Estimator
from flowrl.seeds import generator
from flowrl.text.answers import Answers
from flowrl.text.credit_base import sample_advantages, summed_moments, token_rewards, whitened
from flowrl.text.parts import Stateless
from flowrl.text_sections import ValueConfig
from flowrl.types import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Fresh", "GaeCredit", "ValueHead", "ValueTargets"]

_TOKENS_AT_ONCE = 16384


@dataclass(frozen=True, slots=True)
class ValueTargets:
    """What a head learns: [B, T] float32 values when the iteration began, what they should have been, and [B, T] bool which tokens count."""

    old: Tensor
    returns: Tensor
    mask: Tensor


class ValueHead:
    """Values from hidden states: one hidden layer, its own AdamW. It is equal on all processes, and the policy's body does not learn from it.

    Before its first update every value is 0. The last hidden states, which belong to what is known before a token, are those of `Answers.token("hidden")`.

    Args:
        hidden: H. seed: of the run.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, config: ValueConfig, hidden: int, accelerator: Accelerator, seed: int) -> None:
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        first, last = nn.Linear(hidden, config.hidden), nn.Linear(config.hidden, 1)
        with torch.no_grad():
            first.weight.normal_(0, 1 / math.sqrt(hidden), generator=generator(seed, "value"))
            first.bias.zero_()
            last.weight.zero_()
            last.bias.zero_()
        self.network = nn.Sequential(nn.LayerNorm(hidden, elementwise_affine=False), first, nn.Tanh(), last).to(self.device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=config.learning_rate, weight_decay=0.0)

    @torch.no_grad()
    def values(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[B, T] float32 on the CPU, 0 where masked. hidden: [B, T, H]; mask: [B, T] bool."""
        parts = [self.network(part.to(self.device))[:, 0].cpu() for part in hidden[mask].split(_TOKENS_AT_ONCE)]
        values = torch.zeros(mask.shape)
        values[mask] = torch.cat(parts)
        return values

    def learn(self, answers: Answers) -> None:
        """Some updates towards the targets that the credit left; every process must call it. Without a token anywhere, none."""
        targets: ValueTargets = answers.extra["value_targets"]
        mask, world = targets.mask, self.accelerator.num_processes
        add = summed_moments(answers)
        count = answers.add(float(mask.sum()))
        moments = [masked_moments(value.double(), mask, ddof=0, add=add) for value in (targets.returns - targets.old, targets.returns)]
        unexplained, spread = float(moments[0].std), float(moments[1].std)
        answers.metrics["value/explained_variance"] = 1 - (unexplained / spread) ** 2 if spread else 0.0
        loss = 0.0
        columns = [answers.token("hidden")[mask], targets.old[mask], targets.returns[mask]]
        for _ in range(self.config.updates_per_iteration if count else 0):
            loss = 0.0
            for hidden, old, returns in zip(*(column.split(_TOKENS_AT_ONCE) for column in columns), strict=True):
                hidden, old, returns = (part.to(self.device) for part in (hidden, old, returns))
                found = self.network(hidden)[:, 0]
                part = value_loss(found, old, returns, torch.ones_like(found, dtype=torch.bool), clip=self.config.clip).sum() / count
                part.backward()
                loss += float(part.detach())
            loss = answers.add(loss)
            if not math.isfinite(loss):
                raise UserError("value: its loss is not finite; lower value.learning_rate or look at the rewards")
            self._average(self.network.parameters(), world)
            self.optimizer.step()
            self.optimizer.zero_grad()
        answers.metrics["value/loss"] = loss

    def _average(self, parameters: Iterable[nn.Parameter], world: int) -> None:
        """Gradients summed over processes: each divided by the number of all tokens."""
        if world == 1:
            return
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.accelerator.reduce(gradient, "sum")

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer."""
        return {"network": {name: value.cpu() for name, value in self.network.state_dict().items()}, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            UserError: the head has another size.
        """
        try:
            self.network.load_state_dict(state["network"])
        except RuntimeError as error:
            raise UserError("value.hidden: the checkpoint's value head has another size; leave it as it was") from error
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate  # the config may have been changed on purpose


class GaeCredit(Stateless):
    """PPO: generalised advantages of tokens with the run's `value`, see `flowrl.core.token_advantages.gae`.

    The answer's advantage by centre and scale (none and none: its reward) stands at its last token, and with `kl.place: reward` each token pays for its
    distance to the reference. In the first `value.warmup_iterations` only the value learns. Of an answer that goes on in a later iteration (`partial`) the
    last value is taken to stay what it is (T-PPO), and the value learns nothing from it.

    Args:
        gamma: discount, in (0, 1]. lam: lambda of the policy in [0, 1], or "length": 1 - 1 / (alpha n), n the answer's tokens (VAPO).
        value_lam: lambda of the value's targets, null = lam. alpha: of lam: length.
        whitened: divide by the spread of all tokens and subtract their mean.
    """

    needs = frozenset({"hidden", "log_prob"})
    takes_price: ClassVar[bool] = True

    def __init__(
        self, gamma: float = 1.0, lam: float | Literal["length"] = 0.95, value_lam: float | None = None, alpha: float = 0.05, whitened: bool = True
    ) -> None:
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma is {gamma:g}, and a discount is in (0, 1]")
        for name, value in (("lam", lam), ("value_lam", value_lam)):
            if isinstance(value, str) and not (name == "lam" and value == "length"):
                raise ValueError(f"{name} is {value}; give a number from 0 to 1" + (", or length" if name == "lam" else ""))
            if isinstance(value, int | float) and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value:g}, and must be from 0 to 1")
        if not alpha > 0:
            raise ValueError(f"alpha is {alpha:g}, and must be positive")
        self.gamma, self.lam, self.value_lam, self.alpha, self.whitened = gamma, lam, value_lam, alpha, whitened

    def __call__(self, answers: Answers, estimator: Estimator) -> Tensor:
        head: ValueHead = answers.extra["value"]
        counted = answers.mask & answers.valid[:, None]
        done: Tensor | None = answers.extra.get("done")
        outcome = sample_advantages(answers, estimator)
        if done is not None:
            outcome = torch.where(done, outcome, 0.0)  # what is not over has no reward yet
        rewards, values = token_rewards(answers, outcome), head.values(answers.token("hidden"), answers.mask).double()
        lam = length_lambda(counted, alpha=self.alpha, dtype=rewards.dtype) if isinstance(self.lam, str) else self.lam
        found = gae(rewards, values, counted, gamma=self.gamma, lam=lam, done=done)
        returns = found.returns if self.value_lam is None else gae(rewards, values, counted, gamma=self.gamma, lam=self.value_lam, done=done).returns
        learns = counted if done is None else counted & done[:, None]
        answers.extra["value_targets"] = ValueTargets(values.float(), returns.float(), learns)
        config = answers.config.value
        if config is not None and answers.iteration <= config.warmup_iterations:
            answers.train = torch.zeros_like(answers.train)
        return whitened(answers, found.advantages) if self.whitened else found.advantages


class Fresh(Stateless):
    """T-PPO: of answers that were continued (`partial`), only the tokens of this iteration train the policy.

    Args:
        tail: last tokens of an unfinished answer that wait for what follows them, >= 0.
    """

    def __init__(self, tail: int = 0) -> None:
        if tail < 0:
            raise ValueError(f"tail is {tail}, and must not be negative")
        self.tail = tail

    def __call__(self, answers: Answers, advantages: Tensor) -> Tensor:
        everything = torch.ones_like(answers.mask)
        done = answers.extra.get("done", everything[:, 0])
        return truncated_masks(answers.mask, done, answers.extra.get("fresh", everything), tail=self.tail).policy


def make_value(config: Config, hidden: int, accelerator: Accelerator) -> ValueHead | None:
    """The value head of a run; None where the config has none."""
    return None if config.value is None else ValueHead(config.value, hidden, accelerator, config.seed)
