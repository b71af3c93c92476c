"""What is known of rewards before they are used: for `flowrl rewards` and `flowrl rewards show NAME`. Loads no weights and no optional package."""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowrl.types import RewardInfo, UserError
from rewards.plugins import BUILT_IN, YOURS, find, installed_plugins, rewards_in_folder
from rewards.registry import FunctionReward, arguments, load_reward
from rewards.table import REWARDS

__all__ = ["EXTRAS", "describe_reward", "every_reward", "needs", "range_of"]

EXTRAS = {
    "clip": ("open_clip", "torchvision"),
    "geneval": ("scipy",),
    "math": ("math_verify",),
    "nsfw": ("onnxruntime",),
    "ocr": ("onnxruntime", "rapidfuzz", "rapidocr"),
    "remote": ("httpx",),
    "server": ("fastapi", "httpx", "prometheus_client", "uvicorn"),
}
"""Extra of this package -> the modules that a reward imports from it."""

_DOCS = Path(__file__).parent.parent / "docs" / "rewards"
_SCOPES = {"sample": "each sample alone", "pair": "samples of a prompt in pairs", "group": "all samples of a prompt together"}


def every_reward(folder: Path) -> list[dict[str, Any]]:
    """Every reward that can be named here, JSON-ready: those of this package with all their facts, installed plug-ins, and what looks like one in the folder.

    Of the last two nothing is executed, so their facts are only ``name``, ``target``, ``origin``, ``description`` and ``problem``.
    """
    return [*(_built_in(name, target) for name, target in REWARDS.items()), *(asdict(source) for source in [*installed_plugins(), *rewards_in_folder(folder)])]


def describe_reward(name: str, args: Mapping[str, Any]) -> Iterator[str]:
    """Lines with all facts of one reward and its arguments. A plug-in or a file is imported; no weights are loaded.

    Raises:
        UserError: there is no such reward, or its import fails.
    """
    source, parameters = find(name), arguments(name)
    try:
        reward = load_reward(name, args)
    except UserError as error:
        if args:
            raise
        yield f"{source.name}: its facts are known once it has its arguments, here --arg KEY=VALUE"
        yield f"  {'without':<12}{error}"
    else:
        yield f"{source.name}: {reward.info.description}"
        facts = [("facts", "a plain function declares none")] if isinstance(reward, FunctionReward) else _facts(reward.info)
        yield from (f"  {key:<12}{value}" for key, value in facts)
    where = {BUILT_IN: "built in", YOURS: "your own"}.get(source.origin, f"plug-in of {source.origin}")
    yield f"  {'from':<12}{where}" + (f", {source.target}" if source.target != source.name else "")
    if source.origin == BUILT_IN and (page := _page(source.name)):
        yield f"  {'page':<12}{page}"
    yield ""
    yield "Arguments (`args` in a config, --arg in a shell):" if parameters else "It takes no arguments."
    yield from (f"  {_written(parameter)}" for parameter in parameters)


def needs(info: Mapping[str, Any]) -> str:
    """In a few words: extra, memory of its networks in float32, and what it wants of the samples; from its facts as `every_reward` gives them."""
    found = [f"[{info['extra']}]"] if info["extra"] else []
    if info["weights"]:
        found.append(f"weights {_size(info['parameters'], 4)}" if info["parameters"] else "weights")
    if info["runs_on"] == "network":
        found.append("network")
    if info["metadata"]:
        found.append(f"metadata {', '.join(info['metadata'])}")
    if "texts" in info["reads"]:
        found.append("texts")
    if info["scope"] != "sample":
        found.append(f"whole {info['scope']}s")
    return "; ".join(found)


def range_of(info: Mapping[str, Any]) -> str:
    """``0 .. 1``, from a reward's facts as `every_reward` gives them."""
    low, high = info["low"], info["high"]
    return f"{'-inf' if low is None else f'{low:.3g}'} .. {'inf' if high is None else f'{high:.3g}'}"


def _built_in(name: str, target: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": name, "target": target, "origin": BUILT_IN}
    try:
        return {**facts, **_plain(load_reward(name).info), "name": name, "problem": ""}
    except UserError as error:  # one that is broken must not hide the others
        return {**facts, "description": "", "problem": str(error)}


def _facts(info: RewardInfo) -> Iterator[tuple[str, str]]:
    yield (
        "range",
        range_of(_plain(info))
        + ", higher is better"
        + ("; the negative of the published measure, of which lower is better" if info.direction == "lower" else ""),
    )
    yield (
        "reads",
        (", ".join(info.reads) or "it does not say") + (f"; without {', '.join(info.metadata)} in the metadata it cannot score" if info.metadata else ""),
    )
    yield "compares", _SCOPES[info.scope]
    yield "gradient", "yes" if info.differentiable else "no"
    if info.weights:
        yield "weights", ", ".join(info.weights)
        yield "licence", (info.weights_license or "not stated") + " (of the weights)"
    if info.parameters:
        yield (
            "parameters",
            f"{info.parameters / 1e6:,.1f} million: {_size(info.parameters, 4)} in float32"
            + (f", {_size(info.parameters, 2)} in bfloat16" if info.runs_on == "device" else ""),
        )
    places = {"device": f"where the config says, in {info.dtype} on an accelerator", "cpu": "the CPU", "network": "another process or machine"}
    yield "runs on", f"{places[info.runs_on]}, {info.batch_size} samples a call"
    if info.extra:
        yield "needs", f"flowrl-diffusion[{info.extra}]{_installed(info.extra)}"
    if info.source:
        yield "source", info.source


def _installed(extra: str) -> str:
    if extra not in EXTRAS:
        return ""
    missing = [module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None]
    return f" (not installed: {', '.join(missing)})" if missing else " (installed)"


def _page(name: str) -> str:
    """The page of a reward as the index of the documentation has it, which only a checkout holds; several rewards may share one."""
    index = _DOCS / "README.md"
    found = re.search(rf"^\| \[`{re.escape(name)}`\]\(([^)]+)\)", index.read_text(encoding="utf-8"), re.MULTILINE) if index.is_file() else None
    return f"docs/rewards/{found[1]}" if found else ""


def _plain(info: RewardInfo) -> dict[str, Any]:
    """JSON-ready; an infinite bound is None."""
    facts = asdict(info) | {key: value if math.isfinite(value) else None for key, value in (("low", info.low), ("high", info.high))}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in facts.items()}


def _size(parameters: int, bytes_each: int) -> str:
    mib = parameters * bytes_each / 2**20
    return f"{mib / 1024:.1f} GiB" if mib >= 1000 else f"{mib:.0f} MiB"


def _written(parameter: inspect.Parameter) -> str:
    stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**" if parameter.kind is parameter.VAR_KEYWORD else ""
    kind = parameter.annotation
    annotation = "" if kind is parameter.empty else f": {kind if isinstance(kind, str) else inspect.formatannotation(kind)}"
    default = f" = {parameter.default!r}" if parameter.default is not parameter.empty else "" if stars else " (must be given)"
    return f"{stars}{parameter.name}{annotation}{default}"
