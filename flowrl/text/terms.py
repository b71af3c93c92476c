"""Terms that are added to the loss of every token: divergences, entropy, supervised answers. A new term is a class and a line in `make_terms`.

Letters: n answers of a micro-batch, T tokens.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.core.regularizers import EntropyController, categorical_kl_estimate, entropy_bonus
from flowrl.text.answers import Answers
from flowrl.text.objectives import Batch
from flowrl.text.parts import Part, Stateless

__all__ = ["Term", "make_terms"]


class Term(Part, Protocol):
    """A loss [n, T] that is added, and what is measured of it.

    Attributes:
        columns: what is asked of `CausalLmPolicy.token_output` with gradient, beside log_prob.
        name: of its measure in metrics.
    """

    columns: ClassVar[frozenset[str]]
    name: ClassVar[str]

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss, measure), [n, T] each."""
        ...

    def finish(self, answers: Answers) -> None:
        """After the updates of an iteration."""
        ...


class _Base(Stateless):
    columns: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Config) -> None:
        self.config = config

    def finish(self, answers: Answers) -> None:
        pass


class KlTerm(_Base):
    """`kl.weight` times an estimate of the divergence from the model before training, see `categorical_kl_estimate`."""

    name: ClassVar[str] = "kl/mean"
    needs = frozenset({"reference"})

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        kl = categorical_kl_estimate(self.config.kl.form, batch.decisions.log_prob, batch.token("reference"))  # type: ignore[arg-type]
        return self.config.kl.weight * kl, kl.detach()


class EntropyTerm(_Base):
    """A bonus for the entropy of every token's distribution; with a target, see `EntropyController`."""

    name: ClassVar[str] = "entropy/mean"
    columns = frozenset({"entropy"})

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        e = config.entropy
        self.controller = None if e.target is None else EntropyController(target=e.target, coefficient=e.weight, **e.args)
        self._seen: list[Tensor] = []

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        entropy = batch.out.columns["entropy"]
        counted = torch.where(batch.decisions.mask, entropy.detach().double(), 0.0)
        self._seen.append(torch.stack([counted.sum(), batch.decisions.mask.sum().double()]))
        weight = self.config.entropy.weight if self.controller is None else self.controller.weight
        return entropy_bonus(entropy, weight=weight), entropy.detach()

    def finish(self, answers: Answers) -> None:
        total, count = (answers.add(value) for value in (torch.stack(self._seen).sum(0).tolist() if self._seen else (0.0, 0.0)))
        self._seen = []
        if self.controller is not None and count:
            self.controller = self.controller.updated(total / count)

    def state_dict(self) -> dict[str, object]:
        return {} if self.controller is None else self.controller.state_dict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        if self.controller is not None and state:
            self.controller = EntropyController(**state)  # type: ignore[arg-type]


def make_terms(config: Config) -> list[Term]:
    """The terms that a config asks for."""
    terms: list[Term] = []
    if config.kl.weight > 0 and config.kl.place == "loss":
        terms.append(KlTerm(config))
    if config.entropy.weight != 0 or config.entropy.target is not None:
        terms.append(EntropyTerm(config))
    return terms
