"""What a run's method brings, and what the run asks for beyond it. A part of `flowrl.agreement`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowrl.config import Config

__all__ = ["are_known", "asked"]


def are_known(method: str) -> bool:
    """Whether a method, and all modifiers behind a +, ship with flowrl."""
    from flowrl.config import list_methods  # which reads this file

    return all(name in list_methods() for name in method.split("+"))


def asked(config: Config, section: str) -> frozenset[str]:
    """Keys of a section, such as "advantage", whose values are not those of the run's method, or not the default where the method has none.

    A value that comes with the method was not asked for, so nobody has to be told that it has no effect; the resolved config of a run, in which every key
    stands, asks for no more than the file that it was resolved from.
    """
    from flowrl.config import list_methods  # which reads this file

    part = getattr(config, section)
    method = list_methods().get(config.method.partition("+")[0])
    brought = type(part).model_validate({} if method is None else method.config.get(section, {}))
    return frozenset(name for name in type(part).model_fields if getattr(part, name) != getattr(brought, name))
