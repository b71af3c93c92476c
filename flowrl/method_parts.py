"""What a method is made of, in words: for `flowrl methods NAME` and the page of all text methods."""

from __future__ import annotations

from collections.abc import Sequence

from flowrl.config import Config, Method
from flowrl.core.preference import PAIR_OBJECTIVES
from flowrl.text_sections import EntropyConfig, PluginConfig

__all__ = ["PLAIN", "parts_of"]

PLAIN = {
    "credit": "answer",
    "aggregate": "rewards",
    "reward weights": "fixed",
    "shaping": "none",
    "token weights": "none",
    "allocation": "uniform",
    "from elsewhere": "none",
    "answers": "one by one",
    "pairs": "none",
    "value": "none",
    "entropy": "none",
}
"""Parts of a text method that leave things as they are."""

_MODEL = "flowrl:tiny-lm"


def parts_of(method: Method) -> dict[str, str]:
    """The axes on which methods differ -> their values in a run of this method that says nothing else. Of text, all of `PLAIN` are among them."""
    model = {"model": {"path": _MODEL, **method.config.get("model", {})}} if method.config.get("likelihood") == "token" else {}
    config = Config.model_validate({"run_dir": "run", "rewards": ["any"], **method.config, **model})
    a, o, kl = config.advantage, config.objective, config.kl
    found = {"likelihood": config.likelihood, "centre": a.centre, "scale": a.scale, "ratio": o.ratio, "objective": o.name, "reduction": o.reduction}
    found["KL"] = f"{kl.weight:g} {kl.form} in the {kl.place}" if kl.weight > 0 else "none"
    if config.likelihood != "token":
        return found | {"plan": config.rollout.plan, "kernel": config.rollout.kernel, "credit": config.credit.normalize}
    ways = [name for name in ("environment", "tree", "partial") if getattr(config, name) is not None]
    return found | {
        "credit": config.token_credit.name,
        "aggregate": a.aggregate,
        "reward weights": config.reward_weights.kind,
        "shaping": _named(config.shaping),
        "token weights": _named(config.tokens.weights),
        "allocation": config.allocation.name,
        "from elsewhere": _named(config.allocation.samples),
        "answers": ", ".join(ways) or PLAIN["answers"],
        "pairs": config.pairing.rule if o.name in PAIR_OBJECTIVES else PLAIN["pairs"],
        "value": PLAIN["value"] if config.value is None else f"a head of {config.value.hidden}",
        "entropy": PLAIN["entropy"] if config.entropy == EntropyConfig() else _entropy(config.entropy),
    }


def _named(parts: Sequence[PluginConfig]) -> str:
    return ", ".join(part.name for part in parts) or "none"


def _entropy(e: EntropyConfig) -> str:
    bonus = f"{'price' if e.weight < 0 else 'bonus'} of weight {abs(e.weight):g}" if e.weight else ""
    band = f"band of weight {e.band:g}" if e.band else ""
    target = "" if e.target is None else f"target {e.target:g}"
    return ", ".join(part for part in (bonus, band, target) if part)
