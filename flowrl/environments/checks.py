"""Checks that several environments share."""

from __future__ import annotations

from flowrl.types import UserError

__all__ = ["check_whole"]


def check_whole(environment: str, name: str, value: object, least: int) -> int:
    """The value, if it is a whole number from ``least`` on.

    Raises:
        UserError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"environment {environment}: {name} must be a whole number from {least} on, not {value!r}")
    return value
