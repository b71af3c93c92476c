"""Several rewards as one that is harder to deceive: their mean, median or minimum, or the mean less a penalty on their disagreement.

lcb = mean_k s_k - penalty std_k s_k,  s_k = (value_k - shift_k) scale_k,  std with K in the denominator

A policy that exploits an error of one reward rarely exploits the same error of another, so a score on which the members disagree is believed less.
Source: reward ensembles with worst-case and uncertainty-weighted objectives against over-optimisation, arXiv:2310.02743 (formulas as described there; the text
of the paper was not checked). Members have different units, so each is shifted and scaled first: give typical means and inverse spreads. That is our choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from flowrl.types import Prompt, RewardInfo, SampleBatch, Scores, UserError
from rewards.composite import WeightedRewards
from rewards.registry import load_reward

__all__ = ["Ensemble"]

_KEYS = ("name", "label", "args", "shift", "scale")


class Ensemble:
    """Members scored together. A sample that one of them cannot score is invalid.

    Args:
        members: mappings with ``name`` and, where wanted, ``label``, ``args``, ``shift`` (0) and ``scale`` (1); at least two for anything but a listing.
        reduce: how the members' scores become one.
        penalty: of lcb, at least 0.
    Raises:
        UserError: a member or an argument makes no sense.
    """

    def __init__(self, members: Sequence[Mapping[str, Any]] = (), reduce: Literal["mean", "median", "min", "lcb"] = "lcb", penalty: float = 1.0) -> None:
        if reduce not in ("mean", "median", "min", "lcb"):
            raise UserError(f"reward ensemble: reduce must be mean, median, min or lcb, not {reduce!r}")
        if not math.isfinite(penalty) or penalty < 0:
            raise UserError(f"reward ensemble: penalty must be at least 0, not {penalty}")
        self.reduce, self.penalty = reduce, penalty
        found = [_member(member) for member in members]
        self._shift = torch.tensor([shift for _, _, shift, _ in found], dtype=torch.float64)
        self._scale = torch.tensor([scale for *_, scale in found], dtype=torch.float64)
        self._members = WeightedRewards([(label, 1.0, load_reward(name, args)) for (label, (name, args), _, _) in found]) if found else None
        infos = [] if self._members is None else [self._members.entry_of(name).reward.info for name in self._members.names]
        self.info = RewardInfo(
            name="ensemble",
            description="mean, median or minimum of several rewards, or their mean less a penalty on their disagreement",
            low=float("-inf"),
            high=float("inf"),
            source="reward ensembles, arXiv:2310.02743",
            scope="group" if any(info.scope != "sample" for info in infos) else "sample",
            weights=tuple(dict.fromkeys(weight for info in infos for weight in info.weights)),
            weights_license="; ".join(dict.fromkeys(info.weights_license for info in infos if info.weights_license)),
            parameters=sum(info.parameters for info in infos),
            reads=tuple(dict.fromkeys(part for info in infos for part in info.reads)) if all(info.reads for info in infos) else (),
            metadata=tuple(dict.fromkeys(key for info in infos for key in info.metadata)),
            batch_size=min((info.batch_size for info in infos), default=64),
        )

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """As of the members."""
        if self._members is not None:
            self._members.check_prompts(prompts)

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the members: in float32, which this reward asks for, each in the precision that it asks for itself; in another one, all in that.

        Raises:
            UserError: there are fewer than two, or one cannot be loaded.
        """
        if self._members is None or len(self._members.names) < 2:
            raise UserError("reward ensemble: needs at least two members; list them under args, such as members: [{name: pickscore}, {name: image_reward}]")
        self._members.load(device, None if dtype == torch.float32 else dtype)

    def to(self, device: torch.device) -> None:
        """Move the members' networks."""
        for name in () if self._members is None else self._members.names:
            move = getattr(self._members.entry_of(name).reward, "to", None) if self._members is not None else None
            if move is not None:
                move(device)

    def close(self) -> None:
        """Close the members."""
        if self._members is not None:
            self._members.close()

    def score(self, batch: SampleBatch) -> Scores:
        """Values [B] float32; raw: each member's shifted and scaled score under its label, and their standard deviation as ``spread``.

        Raises:
            UserError: a member failed; the message names it.
            RuntimeError: ``load`` was not called.
        """
        if self._members is None:
            raise RuntimeError("Ensemble.load must be called before score")
        found = self._members.score(batch)
        names = self._members.names
        scores = (torch.stack([found[name].values.double() for name in names], 1) - self._shift) * self._scale
        spread = scores.std(1, correction=0)
        reduced = {"mean": scores.mean(1), "min": scores.amin(1), "lcb": scores.mean(1) - self.penalty * spread}
        values = scores.quantile(0.5, dim=1) if self.reduce == "median" else reduced[self.reduce]
        raw = {name: column.float() for name, column in zip(names, scores.unbind(1), strict=True)}
        return Scores(values.float(), found["total"].valid, {**raw, "spread": spread.float()}, found["total"].problems)


def _member(member: object) -> tuple[str, tuple[str, dict[str, Any]], float, float]:
    """(label, (name, args), shift, scale)."""
    if isinstance(member, str):
        member = {"name": member}
    if not isinstance(member, Mapping) or not isinstance(member.get("name"), str):
        raise UserError(f"reward ensemble: a member is {{name: ..., args: ..., shift: ..., scale: ...}}, not {member!r}")
    if unknown := [str(key) for key in member if key not in _KEYS]:
        raise UserError(f"reward ensemble: a member has no {unknown[0]}; it takes {', '.join(_KEYS)}")
    shift, scale = member.get("shift", 0.0), member.get("scale", 1.0)
    for key, value in (("shift", shift), ("scale", scale)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"reward ensemble: {key} of {member['name']} must be a finite number, not {value!r}")
    if scale == 0:
        raise UserError(f"reward ensemble: {member['name']} with scale 0 says nothing; leave it out")
    return str(member.get("label") or member["name"]), (member["name"], dict(member.get("args") or {})), float(shift), float(scale)
