"""What is logged of the rewards of an iteration, and when samples without one stop the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flowrl.config import Config
from flowrl.reward_weights import RewardWeights
from flowrl.types import Scores, UserError
from rewards.composite import join_scores as join_parts

__all__ = ["check_valid", "join_scores", "reward_metrics"]


def join_scores(parts: Sequence[dict[str, Scores]]) -> dict[str, Scores]:
    """Scores of several batches, reward by reward, as one."""
    return {name: join_parts([part[name] for part in parts]) for name in parts[0]}


def reward_metrics(config: Config, scores: Mapping[str, Scores], weights: RewardWeights) -> dict[str, Any]:
    """Means and spreads of all rewards and of their raw columns, counts of samples without a score, shares that keep a constraint, changing weights.

    Args:
        scores: of all processes, "total" among them.
    """
    metrics: dict[str, Any] = {}
    for name, score in scores.items():
        values = score.values[score.valid].double()
        metrics[f"reward/{name}/mean"] = values.mean().item() if len(values) else None
        metrics[f"reward/{name}/std"] = values.std(correction=0).item() if len(values) else None
        for column, numbers in score.raw.items():
            known = numbers[numbers.isfinite()].double()
            metrics[f"reward/{name}/{column}"] = known.mean().item() if len(known) else None
    if len(scores) > 2:
        metrics |= {f"reward/{name}/invalid": int((~score.valid).sum()) for name, score in scores.items() if name != "total"}
    for reward in config.rewards:
        if reward.minimum is not None and reward.key in scores:
            known = scores[reward.key].values[scores[reward.key].valid]
            metrics[f"reward/{reward.key}/satisfied"] = (known >= reward.minimum).double().mean().item() if len(known) else None
    if config.reward_weights.kind == "gradient":
        metrics |= {f"reward/{name}/weight": weight for name, weight in weights.weights.items()}
    elif config.reward_weights.kind == "hypervolume":
        metrics["advantage/factor"] = weights.factor
    metrics["reward/invalid"] = int((~scores["total"].valid).sum())
    return metrics


def check_valid(config: Config, total: Scores, iteration: int) -> None:
    """Too many samples without a score stop the run.

    Args:
        total: of all processes, so that all of them stop.
    Raises:
        UserError: their share is above the config's; the message has the first sample's prompt and reason.
    """
    lost, limit = int((~total.valid).sum()), config.training.max_invalid_share
    if lost <= limit * len(total.valid) and bool(total.valid.any()):
        return
    first = f" The first: {total.problems[min(total.problems)]}." if total.problems else ""
    raise UserError(
        f"{lost} of the {len(total.valid)} samples of iteration {iteration} could not be scored, more than training.max_invalid_share = {limit:g} allows."
        f"{first} The last checkpoint is kept; mend the reward, or mark it `required: false` where another one can stand in"
    )
