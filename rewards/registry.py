"""Rewards by name: a table of import strings, so that a run imports only the rewards it asks for.

A config names a reward by a key of ``REWARDS``, by the name that an installed plug-in gave it, or by an import string: ``rewards.plugins`` finds it.
What is found decides how it is used, in this order:

1. a class is called with the config's ``args``;
2. an object with ``info``, ``load`` and ``score`` is a finished reward; it takes no ``args``;
3. a function whose first parameter is called ``batch``, or annotated ``SampleBatch``, is a scoring function: its ``args`` are bound once
   and the batch is passed at every call;
4. any other function is a factory, called with the ``args``.

A class or a factory must give a finished reward or a scoring function. Nothing here calls ``load``: no weights are touched.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowrl.types import Reward, RewardInfo, SampleBatch, Scores, UserError
from rewards.plugins import describe_error, find, import_target, suggest
from rewards.table import REWARDS

__all__ = ["FunctionReward", "arguments", "describe_error", "list_rewards", "load_reward", "scene_strict"]

ScoringFunction = Callable[[SampleBatch], Tensor | Scores | Sequence[float]]


def load_reward(name: str, args: Mapping[str, Any] | None = None) -> Reward:
    """Make the reward that a config asks for; its ``load`` is still to be called.

    Args:
        name: a registered name (``-`` and ``_``, and upper and lower case are the same), that of an installed plug-in, ``module:attribute``, or
            ``path/to/file.py:attribute``; see the module's text for what the attribute may be.
        args: keyword arguments of the class or function.
    Raises:
        UserError: the name is unknown or taken twice, the import fails, the arguments do not fit, or the result is not a reward.
    """
    found, args = import_target(name, find(name)), dict(args or {})
    if inspect.isclass(found) or not (isinstance(found, Reward) or _takes_batch(found)):
        found, args = _call(name, found, args), {}
    return _as_reward(name, found, args)


def arguments(name: str) -> list[inspect.Parameter]:
    """What ``args`` may hold for a reward: the parameters of its class or function, without the batch. This imports its module, but makes nothing.

    Raises:
        UserError: as `load_reward`, for the name and the import.
    """
    found = import_target(name, find(name))
    if not callable(found) or (isinstance(found, Reward) and not inspect.isclass(found)):
        return []
    parameters = _parameters(found)
    return parameters[1:] if not inspect.isclass(found) and _takes_batch(found) else parameters


def list_rewards() -> list[RewardInfo]:
    """What every registered reward says of itself, in the order of ``REWARDS``. Loads no weights."""
    return [load_reward(name).info for name in REWARDS]


def scene_strict() -> Reward:
    """The strict form of the scene reward, 0 or 1, for evaluation."""
    from rewards.scene import SceneReward

    return SceneReward(form="strict")


class FunctionReward:
    """A plain function as a reward.

    Args:
        name: for metrics and messages.
        function: called with a SampleBatch of B samples; returns Scores, or B finite numbers (a tensor [B], an array or a sequence), higher
            is better. Only Scores can mark a sample as invalid.
        source: where the function comes from.
    """

    def __init__(self, name: str, function: ScoringFunction, source: str = "") -> None:
        self.function = function
        plain = function.func if isinstance(function, functools.partial) else function
        description = (inspect.getdoc(plain) or "a function without a docstring").splitlines()[0]
        self.info = RewardInfo(name=name, description=description, low=float("-inf"), high=float("inf"), source=source, reads=())

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing to load."""

    def score(self, batch: SampleBatch) -> Scores:
        """The function's Scores, or its numbers as float32 with every sample valid.

        Raises:
            UserError: the function returned something that is not numbers.
        """
        result = self.function(batch)
        if isinstance(result, Scores):
            return result
        try:
            values = torch.as_tensor(result, dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"reward {self.info.name}: the function returned {type(result).__name__} that is no list of numbers ({describe_error(error)}); "
                "return a tensor [B], a sequence of B floats or flowrl.types.Scores"
            ) from error
        return Scores(values, torch.ones_like(values, dtype=torch.bool))


def _call(name: str, factory: object, args: dict[str, Any]) -> object:
    if not callable(factory):
        lacking = [member for member in ("info", "load", "score") if not hasattr(factory, member)]
        raise UserError(f"reward '{name}' is {type(factory).__name__} without {', '.join(lacking)}; a reward has info, load and score")
    hint = "" if inspect.isclass(factory) else " (a scoring function calls its first parameter `batch`)"
    _check_args(name, _parameters(factory), args, hint)
    try:
        return factory(**args)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"reward '{name}' could not be made with args {args}: {describe_error(error)}") from error


def _as_reward(name: str, found: object, args: dict[str, Any]) -> Reward:
    if not inspect.isclass(found) and isinstance(found, Reward):
        if args:
            raise UserError(f"reward '{name}' is a finished object and takes no args; remove {', '.join(args)}, or name its class")
        if not isinstance(found.info, RewardInfo):
            raise UserError(f"reward '{name}': info is {type(found.info).__name__}; make it a flowrl.types.RewardInfo")
        return found
    if not inspect.isclass(found) and callable(found) and _takes_batch(found):
        _check_args(name, _parameters(found)[1:], args)
        function = functools.partial(found, **args) if args else found
        return FunctionReward(name.rpartition(":")[2], function, source=name)
    raise UserError(f"reward '{name}' gave {type(found).__name__}; give an object with info, load and score, or a function of `batch`")


def _parameters(function: Callable[..., object]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature: let the call itself complain
        return [inspect.Parameter("args", inspect.Parameter.VAR_KEYWORD)]


def _takes_batch(function: object) -> bool:
    parameters = _parameters(function) if callable(function) else []
    if not parameters or parameters[0].kind not in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
        return False
    annotation = parameters[0].annotation
    if isinstance(annotation, str):  # postponed annotations are text, perhaps quoted or with a module in front
        annotation = SampleBatch if annotation.strip("'\"").rpartition(".")[2] == "SampleBatch" else None
    return parameters[0].name == "batch" or annotation is SampleBatch


def _check_args(name: str, parameters: list[inspect.Parameter], args: Mapping[str, Any], hint: str = "") -> None:
    named = {p.name for p in parameters if p.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)}
    is_open = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    for unknown in (key for key in args if key not in named and not is_open):
        known = f"it takes {', '.join(sorted(named))}" if named else "it takes none"
        raise UserError(f"reward '{name}' has no argument '{unknown}'{suggest(unknown, named)}; {known}")
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    for needed in (p.name for p in parameters if p.default is p.empty and p.kind not in variable and p.name not in args):
        raise UserError(f"reward '{name}' needs the argument '{needed}'; set it under `args`{hint}")
