"""What can silently go wrong in a run, found in its records; the rules that the trainer applies as well live here."""

from __future__ import annotations

from collections.abc import Iterator

from flowrl.results import thousands
from flowrl.run_records import Record, Run, reward_names, unique
from flowrl.sections import ObjectiveConfig

__all__ = ["check_run", "ratio_is_off"]

ZERO_STD_SHARE = 0.25
"""Share of groups without a signal above which the report warns."""
UNFINISHED_SHARE = 0.5
"""Share of cut answers above which it does."""


def ratio_is_off(max_abs_log_ratio: float, clip_low: float, clip_high: float) -> bool:
    """Whether the first update of an iteration did not start at ratio 1: rollout and training then see different networks.

    The one rule of the trainer's warning and the report's check. What matters is the size of the error beside the clip range, so the
    bound is a tenth of the smaller clip bound.

    Args:
        max_abs_log_ratio: largest |log ratio| of the first update, >= 0; NaN is off.
        clip_low, clip_high: > 0, the bounds of the objective.
    """
    return not max_abs_log_ratio <= 0.1 * min(clip_low, clip_high)


def check_run(run: Run) -> Iterator[tuple[str, str]]:
    """What was looked at and what was found: pairs of ("ok" or "warn", sentence); nothing when nothing is recorded."""
    count = len(run.metrics)
    for name in run.torn:
        yield "warn", f"The last line of {name} was cut off while it was written and is left out; resuming the run repairs it."
    if not count:
        return

    for name in ["total", *reward_names(run)]:
        means = run.points(f"reward/{name}/mean")[1]
        spreads = run.points(f"reward/{name}/std")[1]
        constant = sum(spread == 0 for spread in spreads)
        if (spreads and constant == len(spreads)) or (not spreads and len(means) > 1 and len(set(means)) == 1):
            yield "warn", f"Reward {name} was constant in all {len(means)} iterations (value {means[0]:.4g}): it teaches nothing."
        elif constant:
            yield "warn", f"Reward {name} was the same for all {run.samples_are} in {constant} of {len(spreads)} iterations."
        elif name == "total" and means:
            yield "ok", f"The reward varied in all {len(means)} iterations."

    groups = len(run.points("reward/zero_std_groups")[1]) * int(run.setting("rollout.groups_per_iteration", 0))
    if groups:
        silent = int(run.total("reward/zero_std_groups"))
        share = f"{silent} of {groups} groups ({silent / groups:.1%}) had equal rewards for all their {run.samples_are} and gave no signal"
        yield ("warn", f"{share}: use a finer reward or larger groups.") if silent / groups > ZERO_STD_SHARE else ("ok", f"{share}.")

    ratios = run.points("ratio/max_abs_log_first")[1]
    default = ObjectiveConfig()
    clip_low, clip_high = (float(run.setting(f"objective.{name}", getattr(default, name))) for name in ("clip_low", "clip_high"))
    off = [ratio for ratio in ratios if ratio_is_off(abs(ratio), clip_low, clip_high)]
    if off:
        where = f"in {len(off)} of {len(ratios)} iterations (max |log ratio| {max(map(abs, off)):.2e})"
        yield "warn", f"The ratio of the first update was not 1 {where}: sampling and training see different networks."
    elif ratios:
        yield "ok", f"The ratio of every first update was 1 (max |log ratio| {max(map(abs, ratios)):.1g})."

    pairs = [(row["nfe/used"], row["nfe/minimum"]) for row in run.metrics if row.get("nfe/used") and row.get("nfe/minimum")]
    wasteful = [(used, minimum) for used, minimum in pairs if used != minimum]
    if wasteful:
        used, minimum = (sum(column) for column in zip(*wasteful, strict=True))
        name, unit = ("The tokens through the network", "tokens") if run.is_text else ("NFE", "evaluations")
        excess = f"{thousands(used)} {unit} for a minimum of {thousands(minimum)}"
        yield "warn", f"{name} differed from the minimum in {len(wasteful)} of {len(pairs)} iterations: {excess}."
    elif pairs:
        what = "tokens through the network" if run.is_text else "network evaluations (NFE)"
        yield "ok", f"The {what} of every iteration were the minimum for this method."

    invalid = int(max(run.total("reward/invalid"), run.total("trained/reward/invalid")))  # an expert's answers are among the second only
    if invalid:
        yield "warn", f"{invalid} {run.samples_are} could not be scored and were left out of training."
    elif run.points("reward/invalid")[0]:
        yield "ok", f"Every {run.samples_are.removesuffix('s')} could be scored."

    cut = run.points("answer/unfinished")[1]
    if cut and cut[-1] > UNFINISHED_SHARE:
        most = run.setting("generation.max_new_tokens", "?")
        yield "warn", f"{cut[-1]:.0%} of the answers of the last iteration were cut at {most} tokens: raise generation.max_new_tokens, or shape their length."
    elif cut:
        yield "ok", f"{1 - cut[-1]:.0%} of the answers of the last iteration came to an end."

    lost = unique(key for row in run.metrics for key, value in row.items() if value is None and not _is_unsampled(row, key))
    if lost:
        yield "warn", f"Not finite in at least one iteration: {', '.join(lost[:6])}{' and others' if len(lost) > 6 else ''}."


def _is_unsampled(row: Record, key: str) -> bool:
    """Whether a metric of samples has no value because the iteration sampled none: it trained what earlier ones have left."""
    return row.get("tokens/sampled") == 0 and key.startswith(("reward/", "answer/"))
