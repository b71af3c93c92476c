"""Environments by name, or by an import string."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flowrl.environments.base import Environment
from flowrl.environments.calculator import Calculator
from flowrl.environments.guess import Guess
from flowrl.mistakes import did_you_mean
from flowrl.types import UserError
from rewards.plugins import YOURS, Source, describe_error, import_target

__all__ = ["ENVIRONMENTS", "load_environment"]

ENVIRONMENTS: dict[str, Callable[..., Environment]] = {"guess": Guess, "calculator": Calculator}


def load_environment(name: str, args: Mapping[str, Any] | None = None) -> Callable[[], Environment]:
    """What makes an environment for each episode. One is made at once, so that mistakes show before any work starts.

    Args:
        name: a key of `ENVIRONMENTS`, ``module:attribute`` or ``path/to/file.py:attribute``: a class, or a function that makes an environment.
        args: its keyword arguments.
    Raises:
        UserError: the name is unknown, the import fails, the arguments do not fit, or what is made is no environment.
    """
    args = dict(args or {})
    factory = _find(name)
    if not callable(factory):
        raise UserError(f"environment '{name}' is {type(factory).__name__}; give a class, or a function that makes an environment")
    _check_args(name, factory, args)

    def make() -> Any:
        try:
            return factory(**args)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"environment '{name}' could not be made with args {args}: {describe_error(error)}") from error

    made = make()
    if not isinstance(made, Environment) or inspect.isclass(made):
        lacking = ", ".join(member for member in ("reset", "step", "copy", "success") if not hasattr(made, member))
        raise UserError(f"environment '{name}' gave {type(made).__name__} without {lacking}; an environment has reset, step, copy and success")
    return make


def _find(name: str) -> object:
    if ":" not in name:
        if name not in ENVIRONMENTS:
            raise UserError(f"unknown environment '{name}'; {did_you_mean(name, ENVIRONMENTS)}, or give your own as module:attribute")
        return ENVIRONMENTS[name]
    try:
        return import_target(name, Source(name, name, YOURS))
    except UserError as error:
        raise UserError(f"environment{str(error).removeprefix('reward')}") from error


def _check_args(name: str, factory: Callable[..., object], args: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some builtins have none: the call itself complains
        return
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [parameter.name for parameter in signature.parameters.values() if parameter.kind in kinds]
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        for unknown in (key for key in args if key not in known):
            raise UserError(f"environment '{name}' has no argument '{unknown}'; {did_you_mean(unknown, known) if known else 'it takes none'}")
    for needed in (key for key in known if signature.parameters[key].default is inspect.Parameter.empty and key not in args):
        raise UserError(f"environment '{name}' needs the argument '{needed}'; set it under `args`")
