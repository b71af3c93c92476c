"""Advantages of whole samples, of pictures and of text: the `advantage` section over all processes of a run. The formulas are in core/estimators.py.

Letters: B samples of this process, P groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from flowrl.core.estimators import Beta, CentreKind, RewardAverage, ScaleKind, centre, fit_beta, group_success, scale
from flowrl.core.history import PromptHistory
from flowrl.sections import AdvantageConfig
from flowrl.types import Scores, UserError

__all__ = ["Estimator", "batch_spread"]


def batch_spread(everywhere: Scores, ddof: int, counted: Tensor | None = None) -> float:
    """Standard deviation of the rewards of the iteration; 0 where there are too few. counted: [B everywhere] bool, those that enter; None = all."""
    rewards = everywhere.values[everywhere.valid if counted is None else everywhere.valid & counted].double()
    return float(rewards.std(correction=ddof)) if len(rewards) > ddof else 0.0


class Estimator:
    """Centre and scale of rewards. Groups are whole on a process; what is a statistic of all samples is one of all processes.

    State: the last rewards of each prompt (`history`), and an average of each reward (centre `ema`).

    Args:
        add: a number summed over processes.
        bounds: lowest and highest reward that there can be, of the centre virtual_max (the highest) and the scale beta (both).
    Raises:
        UserError: the bounds that the config needs are not known, or not finite.
    """

    def __init__(self, config: AdvantageConfig, add: Callable[[float], float] = float, bounds: tuple[float, float] | None = None) -> None:
        self.config, self.add = config, add
        low, high = self.bounds = bounds or (-math.inf, math.inf)
        if config.centre == "virtual_max" and not math.isfinite(high):
            raise UserError("advantage.centre: virtual_max adds rewards of the highest value, and these rewards have no highest value; use another centre")
        if config.scale == "beta" and not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UserError("advantage.scale: beta takes rewards as success rates, and these rewards have no lowest and highest value; use another scale")
        remembers = "history" in (config.centre, config.scale)
        self.history = PromptHistory(config.history_size, config.history_least) if remembers else None
        self.averages: dict[str, RewardAverage] = {}

    def __call__(
        self,
        score: Scores,
        everywhere: Scores,
        group: Tensor,
        num_groups: int,
        *,
        prompts: tuple[Tensor, Tensor],
        name: str = "total",
        valid: Tensor | None = None,
        lengths: Tensor | None = None,
        stats_mask: tuple[Tensor, Tensor] | None = None,
        eps: float | None = None,
    ) -> Tensor:
        """Advantages [B] float64, not clamped; 0 where not valid. Call it once an iteration for each reward: it remembers what it has seen.

        Args:
            score: of this process's samples; ``everywhere``: of all processes, in any fixed order.
            group: [B] int64 in 0..P-1, what a sample is compared with.
            prompts: the prompt of each sample as a number, here and everywhere; equal texts have equal numbers in every run. Only a history reads it.
            name: of the reward, for messages and averages.
            valid: [B] bool, samples that count; None = those that have a score.
            lengths: [B], decisions of each sample, of the centre length_weighted.
            stats_mask: [B] bool, samples that enter statistics, here and everywhere; None = all. A history takes all.
            eps: None = that of the config.
        Raises:
            UserError: no sample of any process has a score.
            ValueError: a centre needs ``lengths`` and there are none.
        """
        a, rewards = self.config, score.values.double()
        valid = score.valid if valid is None else valid
        if not bool(everywhere.valid.any()):
            raise UserError(f"reward {name} could score no sample of the iteration; see its own messages")
        mean = std = 0.0 * rewards
        if self.history is not None:
            here, there = prompts
            self.history.update(there, everywhere.values.double(), everywhere.valid)
            mean, std = self.history.statistics(here)
        own, others = (None, None) if stats_mask is None else stats_mask
        counted = valid if own is None else valid & own
        baseline: float | Tensor | None = mean if a.centre == "history" else None
        batch_mean = None
        if a.centre in ("batch", "ema"):
            known = everywhere.values[everywhere.valid if others is None else everywhere.valid & others].double()
            batch_mean = float(known.mean()) if len(known) else 0.0
            if a.centre == "ema":
                average = self.averages.get(name, RewardAverage(a.decay))
                baseline = average.value(batch_mean)
                self.averages[name] = average.update(batch_mean) if len(known) else average
        virtual = (a.virtual, self.bounds[1]) if a.centre == "virtual_max" else (0, 0.0)
        kind: CentreKind = "given" if a.centre == "history" else a.centre
        centred = centre(
            kind,
            rewards,
            group,
            valid,
            num_groups,
            stats_mask=own,
            singleton=a.singleton,
            batch_mean=batch_mean,
            lengths=lengths,
            virtual=virtual,
            baseline=baseline,
        )
        spread: float | Tensor | None = None
        if a.scale == "history":
            spread = std
        elif a.scale == "batch_std":
            spread = batch_spread(everywhere, a.ddof, others)
        elif a.scale == "batch_std_centred":
            spread = self._moments(centred, counted, a.ddof)[1]
        divisor: ScaleKind = "given" if a.scale == "history" else a.scale
        return scale(
            divisor,
            centred,
            rewards,
            group,
            valid,
            num_groups,
            eps=a.eps if eps is None else eps,
            ddof=a.ddof,
            stats_mask=own,
            virtual=virtual,
            batch_std=spread,
            bounds=self.bounds,
            beta=self._beta(rewards, group, counted, num_groups) if a.scale == "beta" else None,
        )

    def _beta(self, rewards: Tensor, group: Tensor, counted: Tensor, num_groups: int) -> Beta:
        success, known = group_success(rewards, group, counted, num_groups, self.bounds)
        mean, std = self._moments(success, known, 1)
        return fit_beta(mean, std, int(self.add(float(known.sum()))))

    def _moments(self, value: Tensor, counted: Tensor, ddof: int) -> tuple[float, float]:
        """Mean and standard deviation over all processes; 0 where there are too few."""
        known = value[counted].double()
        count = self.add(float(len(known)))
        mean = self.add(float(known.sum())) / max(count, 1.0)
        square = self.add(float((known - mean).square().sum()))
        return mean, math.sqrt(square / (count - ddof)) if count > ddof else 0.0

    def state_dict(self) -> dict[str, Any] | None:
        """Plain Python, fit for JSON; None where nothing is remembered."""
        if self.history is None and self.config.centre != "ema":
            return None
        averages = {name: average.state_dict() for name, average in self.averages.items()}
        return {"history": None if self.history is None else self.history.state_dict(), "averages": averages}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """
        Raises:
            UserError: the checkpoint remembers rewards and the config does not, or the other way round.
        """
        own = self.state_dict()
        if (own is None) != (state is None) or (own is not None and state is not None and (own["history"] is None) != (state["history"] is None)):
            raise UserError("the checkpoint and the config disagree on whether rewards are remembered (advantage.centre and scale: history, ema)")
        if state is None:
            return
        if self.history is not None:
            self.history.load_state_dict(state["history"])
        decay = self.config.decay  # the config may have been changed on purpose
        self.averages = {name: RewardAverage(**{**average, "decay": decay}) for name, average in state["averages"].items()}
