"""Terms that are added to the loss of every token: divergences, entropy, supervised answers. A new term is a class and a line in `make_terms`.

Letters: n answers of a micro-batch, T tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.core.regularizers import EntropyController, EntropyHistory, categorical_kl_estimate, entropy_band, entropy_bonus
from flowrl.text.answers import Answers
from flowrl.text.batch import Batch
from flowrl.text.lists import AnchorTerm
from flowrl.text.mixed import KlConvexTerm
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


class BandTerm(_Base):
    """EPO's price of an entropy outside of the band around its history, entropy.weight times entropy.band times the distance; see `entropy_band`.

    The history has a mean for each turn of an agent, the last of them for all later turns; it learns after the updates of an iteration.

    Args of ``entropy.args``:
        low, high: of the band, times the mean. form: hinge, or step as released, which has no gradient. start: share of training.iterations before it begins.
    State: sums and counts of the entropies of each turn.
    """

    name: ClassVar[str] = "entropy/band"
    columns = frozenset({"entropy"})

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.low, self.high, self.form, self.start = band_arguments(**config.entropy.args)
        self.history = EntropyHistory.empty(NUM_TURNS)
        self._seen: EntropyHistory | None = None

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        entropy, mask, turns = batch.out.columns["entropy"], batch.decisions.mask, batch.answers.completions.turn
        turn = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device) if turns is None else batch.of(turns).clamp(0, NUM_TURNS - 1)
        seen = self._seen or EntropyHistory(*(torch.zeros(NUM_TURNS, dtype=torch.float64, device=mask.device) for _ in range(2)))
        self._seen = seen.updated(entropy, turn, mask)
        e, started = self.config.entropy, batch.answers.iteration > self.start * self.config.training.iterations
        mean = self.history.means().to(mask.device)[turn] if started else torch.zeros_like(entropy)
        penalty = entropy_band(entropy, mean, low=self.low, high=self.high, weight=e.band, form=self.form)
        return e.weight * penalty, penalty.detach()

    def finish(self, answers: Answers) -> None:
        seen = self._seen or EntropyHistory.empty(NUM_TURNS)
        totals, counts = (torch.tensor([answers.add(value) for value in part.tolist()], dtype=torch.float64) for part in (seen.totals, seen.counts))
        self.history = EntropyHistory(self.history.totals + totals, self.history.counts + counts)
        self._seen = None

    def state_dict(self) -> dict[str, object]:
        return {**self.history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = EntropyHistory(state["totals"], state["counts"])


NUM_TURNS = 16
"""Turns with an entropy history of their own."""


def band_arguments(
    low: float = 0.8, high: float = 1.2, form: Literal["hinge", "step"] = "hinge", start: float = 0.5
) -> tuple[float, float, Literal["hinge", "step"], float]:
    """What ``entropy.args`` holds with ``entropy.band``, see `BandTerm`.

    Raises:
        ValueError: bounds that are no band about 1, an unknown form, or a share that is none.
    """
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"the band {low} to {high} times the mean does not hold the mean")
    if form not in ("hinge", "step"):
        raise ValueError(f"unknown form {form}; use hinge or step")
    if not 0 <= start < 1:
        raise ValueError(f"start is {start}, and the share of the iterations before the band is in [0, 1)")
    return low, high, form, start


def make_terms(config: Config) -> list[Term]:
    """The terms that a config asks for."""
    terms: list[Term] = []
    if config.kl.weight > 0 and config.kl.place == "loss":
        terms.append(KlConvexTerm(config) if config.objective.name == "remix" else KlTerm(config))
    if config.entropy.weight != 0 or config.entropy.target is not None:
        terms.append(EntropyTerm(config))
    if config.entropy.band > 0:
        terms.append(BandTerm(config))
    if config.anchor.weight > 0:
        terms.append(AnchorTerm(config))
    return terms
