"""What a run is and what it achieved: evaluations in tables, headline numbers, settings, all as text for a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowrl.run_records import EvaluatedPolicy, Run, evaluated_policy, half_width, is_evaluated, unique

__all__ = ["headline_tiles", "result_tables", "run_facts", "score_text", "thousands"]


@dataclass(frozen=True, slots=True)
class _Change:
    value: float
    half: float
    apart: bool


def result_tables(run: Run) -> list[dict[str, Any]]:
    """One table per reward: policies down, splits across; each cell is the latest evaluation of that policy on that split."""
    evaluated = [record for record in run.evals if is_evaluated(record)]
    guidance = float(run.setting("evaluation.guidance_scale", 1.0))
    splits = unique(record["split"] for record in evaluated)
    tables = []
    for reward in unique(record["reward"] for record in evaluated):
        cells = {(evaluated_policy(record), record["split"]): record for record in evaluated if record["reward"] == reward}
        changes: dict[str, _Change] = {}
        for split in splits:
            base, tuned = cells.get((EvaluatedPolicy("base", guidance), split)), cells.get((EvaluatedPolicy("tuned", guidance), split))
            if base and tuned:
                value, halves = tuned["mean"] - base["mean"], (half_width(base), half_width(tuned))
                changes[split] = _Change(value, math.hypot(*halves), abs(value) > sum(halves))
        policies = sorted({policy for policy, _ in cells})
        tables.append({"reward": reward, "splits": splits, "policies": policies, "cells": cells, "changes": changes, "guidance": guidance})
    return tables


def headline_tiles(run: Run, tables: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """The headline numbers: (label, value, small print)."""
    tiles = []
    for table in tables[:1]:
        for split in sorted(table["changes"], key=lambda split: split != "eval")[:1]:
            change, cells, guidance = table["changes"][split], table["cells"], table["guidance"]
            before, after = (score_text(cells[EvaluatedPolicy(name, guidance), split]["mean"]) for name in ("base", "tuned"))
            small = f"{score_text(change.value, signed=True)} ± {score_text(change.half)}"
            tiles.append((f"{table['reward']} reward, {split} prompts", f"{before} → {after}", small))
    elapsed = run.points("elapsed", run.timings)[1] or [math.fsum(run.points("seconds/total", run.timings)[1])]
    images = run.points(run.samples_are)[1]
    total = run.setting("training.iterations", "?")
    forward, backward = thousands(run.total("nfe/forward")), thousands(run.total("nfe/backward"))
    tiles.append(("Iterations", thousands(run.iteration), f"of {total}" + ("" if run.iteration == total else ", not finished")))
    tiles.append(("Wall-clock", _duration(elapsed[-1]) if run.timings else "–", "" if run.timings else "not recorded"))
    tiles.append((run.samples_are.capitalize(), thousands(images[-1]) if images else "–", "sampled and scored"))
    tiles.append(
        ("Network tokens" if run.is_text else "NFE", thousands(run.total("nfe/used")) if run.metrics else "–", f"{forward} forward, {backward} backward")
    )
    return tiles


def run_facts(run: Run) -> list[tuple[str, str]]:
    """(label, text) of the settings, versions and machine that are known."""
    get = run.setting
    rank = get("model.lora.rank") if get("model.adapter") == "lora" else None
    rewards = [reward for reward in get("rewards", []) if isinstance(reward, Mapping)]
    versions = [
        f"{name} {run.versions[name]}" for name in ("flowrl", "torch", "transformers" if run.is_text else "diffusers", "python") if run.versions.get(name)
    ]
    machine = [run.versions.get("device"), f"{run.versions['threads']} threads" if run.versions.get("threads") else None]
    plan, pairs = get("rollout.plan"), get("data.pairs")
    rollout = (
        [f"stored pairs: {pairs}"] if pairs else [plan, f"{get('rollout.num_steps', '?')} steps", get("rollout.solver" if plan == "ode" else "rollout.kernel")]
    )
    if run.is_text and not pairs:
        rollout = [f"at most {get('generation.max_new_tokens', '?')} tokens", f"temperature {get('generation.temperature', '?')}"]
    has_clip = get("objective.name", "clipped_surrogate") == "clipped_surrogate"
    facts = [
        ("Method", [get("method")]),
        ("Model", [get("model.path"), get("model.dtype")]),
        ("Trained weights", [f"LoRA, rank {rank}" if rank else get("model.adapter")]),
        ("Reward", [" + ".join(f"{reward.get('weight', 1.0):g} × {reward.get('label') or reward.get('name')}" for reward in rewards)]),
        ("Rollout", rollout),
        ("Noise level", [get("rollout.noise_level") if plan != "ode" and not run.is_text else None]),
        ("Likelihood", [get("likelihood")]),
        ("Batch", [f"{get('rollout.groups_per_iteration', '?')} prompts × {get('rollout.group_size', '?')} {run.samples_are}"]),
        ("Updates per iteration", [get("objective.updates_per_iteration")]),
        ("Objective", [get("objective.name"), f"clip −{get('objective.clip_low', '?')} +{get('objective.clip_high', '?')}" if has_clip else None]),
        ("Advantage", [f"centre {get('advantage.centre', '?')}", f"scale {get('advantage.scale', '?')}"]),
        ("Credit", [get("token_credit.name"), *_names(get("shaping")), *_names(get("tokens.weights"))] if run.is_text and not pairs else []),
        ("Allocation", [get("allocation.name"), *_names(get("allocation.samples"))] if run.is_text and not pairs else []),
        ("Ratio", [get("objective.ratio"), f"reduction {get('objective.reduction', '?')}"] if run.is_text and not pairs else []),
        ("Learning rate", [get("optimizer.learning_rate")]),
        ("Guidance", [] if run.is_text else [f"rollout {get('rollout.guidance_scale', '?')}", f"evaluation {get('evaluation.guidance_scale', '?')}"]),
        ("Seed", [get("seed")]),
        ("Versions", versions),
        ("Machine", machine),
    ]
    return [(label, text) for label, parts in facts if (text := ", ".join(str(part) for part in parts if part not in (None, "")))]


def _names(parts: Any) -> list[str]:
    """Of parts of a method, as a config lists them."""
    return [str(part.get("name")) for part in parts or () if isinstance(part, Mapping)]


def thousands(value: float) -> str:
    """A rounded number with narrow spaces between the thousands."""
    return f"{round(value):,}".replace(",", "\u202f")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def score_text(value: Any, signed: bool = False) -> str:
    """A score with three decimals (one from 100 on); a dash for what is not a finite number."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    digits = 3 if abs(value) < 100 else 1
    return f"{value:+.{digits}f}".replace("-", "−") if signed else f"{value:.{digits}f}".replace("-", "−")
