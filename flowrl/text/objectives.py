"""Objectives on tokens: what the loss of a micro-batch of answers is, and what it asks of policies beside log-probabilities.

`OBJECTIVES` of flowrl/core needs nothing but decisions. An objective that needs more is a class of flowrl/text, and a line in the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from flowrl.config import Config
from flowrl.core.group_gates import GROUP_OBJECTIVES
from flowrl.core.list_losses import LIST_OBJECTIVES
from flowrl.core.objectives import OBJECTIVES
from flowrl.core.preference import PAIR_OBJECTIVES
from flowrl.objective_names import arguments
from flowrl.text.batch import Batch, ObjectiveBase, TokenObjective, renumbered
from flowrl.text.bundles import blended
from flowrl.text.covariance import ClipCov, KlCov
from flowrl.text.gated import AnnealedMdpo, Capo, Drpo, LpReg, Rover, TokenNft
from flowrl.text.lists import ListObjective
from flowrl.text.mixed import Chord, Remix, RlPlus
from flowrl.text.pairs import PairObjective
from flowrl.text.searched_clip import Bapo
from flowrl.text.soft_values import Oreo
from flowrl.types import Objective

__all__ = ["TOKEN_OBJECTIVES", "Batch", "GateObjective", "GroupObjective", "ObjectiveBase", "TokenObjective", "make_objective", "renumbered"]


class GateObjective(ObjectiveBase):
    """An objective of flowrl/core/objectives.py, at the run's ratio level."""

    def __call__(self, batch: Batch) -> Objective:
        o = self.config.objective
        args: dict[str, Any] = {"clip_low": o.clip_low, "clip_high": o.clip_high, **arguments(o)}
        if o.name == "clipped_surrogate":
            args |= {"dual_clip": o.dual_clip, "ratio_max": o.ratio_max}
        return blended(batch, lambda decisions: OBJECTIVES[o.name](self.leveled(decisions), **args))


class GroupObjective(ObjectiveBase):
    """An objective of flowrl/core/group_gates.py, which couples the answers of a group."""

    whole_groups: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.needs = frozenset({"reference"} if config.objective.name == "gvpo" else ())

    def __call__(self, batch: Batch) -> Objective:
        o = self.config.objective
        args: dict[str, Any] = {"group": batch.group, "num_groups": batch.num_groups, **arguments(o)}
        if o.name == "gvpo":
            args["ref_log_prob"] = batch.token("reference")
        return GROUP_OBJECTIVES[o.name](batch.decisions, **args)


TOKEN_OBJECTIVES: dict[str, Callable[[Config], TokenObjective]] = {
    **dict.fromkeys(OBJECTIVES, GateObjective),
    **dict.fromkeys(GROUP_OBJECTIVES, GroupObjective),
    **dict.fromkeys((*LIST_OBJECTIVES, "a_star_po"), ListObjective),
    **dict.fromkeys(PAIR_OBJECTIVES, PairObjective),
    "drpo": Drpo,
    "annealed_mdpo": AnnealedMdpo,
    "rover": Rover,
    "token_nft": TokenNft,
    "lp_reg": LpReg,
    "capo": Capo,
    "clip_cov": ClipCov,
    "kl_cov": KlCov,
    "bapo": Bapo,
    "oreo": Oreo,
    "rl_plus_off_policy": RlPlus,
    "chord": Chord,
    "remix": Remix,
}
"""Name -> class, made with the config."""


def make_objective(config: Config) -> TokenObjective:
    """The objective of a run on tokens; the config's check has seen its name."""
    return TOKEN_OBJECTIVES[config.objective.name](config)
