"""Mistakes in a config, told in the words of the file: ``rollout.group_sise: unknown key; did you mean group_size?``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

__all__ = ["DISAGREEMENT", "did_you_mean", "explain", "leaf_keys"]

DISAGREEMENT = "disagreement"
"""Type of a custom error whose context has ``lines``: finished lines, one for each pair of values that do not go together."""

_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "model_type": "a mapping of keys",
    "string_type": "text",
    "tuple_type": "a list",
}
_LIMITS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
_OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean NAME?` when a known name is near, else `known: A, B, C`."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def leaf_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key below a schema class, such as ``rollout.window.size``; lists and open mappings count as leaves."""
    keys: list[str] = []
    for name, field in schema.model_fields.items():
        section = None if get_origin(field.annotation) is tuple else _section_of(field.annotation)
        keys += [prefix + name] if section is None else leaf_keys(section, f"{prefix}{name}.")
    return keys


def explain(error: ValidationError, schema: type[BaseModel], data: Mapping[str, Any]) -> list[str]:
    """One line for each mistake.

    Args:
        error: what ``schema.model_validate(data)`` raised.
        schema: the outermost section.
        data: what the user wrote.
    """
    return [line for detail in error.errors() for line in _explain(detail, schema, data)]


def _explain(detail: ErrorDetails, schema: type[BaseModel], data: Mapping[str, Any]) -> list[str]:
    kind, value, loc = detail["type"], detail["input"], detail["loc"]
    section, field = _locate(loc, schema)
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    if kind == DISAGREEMENT:
        return list(detail["ctx"]["lines"])
    if kind == "too_short" and value:
        return []  # its entries are wrong, and each has a line of its own
    if kind == "extra_forbidden":
        message = f"unknown key; {_known_key(str(loc[-1]), section, schema)}"
    elif kind == "missing":
        message = "missing" if field is None or field.description is None else f"missing; give {field.description}"
    elif kind == "literal_error" and field is not None:
        message = f"{shown} is not a choice; {did_you_mean(str(value), map(str, get_args(field.annotation)))}"
    elif kind in _OUT_OF_RANGE:
        message = f"{shown} is out of range; allowed: {' and '.join(_bounds(field))}"
    elif kind in ("too_short", "string_too_short"):
        message = "is empty"
    elif kind == "string_pattern_mismatch":
        message = f"{shown} is not a name; use letters, digits, _ and -"
    elif value is None and kind in _EXPECTED:
        message = f"is empty; give {_EXPECTED[kind]} or remove the line"
    elif kind in _EXPECTED:
        quotes = "; put it in quotes" if kind == "string_type" and isinstance(value, int | float) else ""
        message = f"{shown} is not {_EXPECTED[kind]}{quotes}"
    else:
        message = detail["msg"]
    return [f"{_written(loc, data)}: {message}"]


def _locate(loc: Sequence[int | str], schema: type[BaseModel]) -> tuple[type[BaseModel], FieldInfo | None]:
    """The innermost section around a location, and the last field on the way."""
    section, field = schema, None
    for part in loc:
        if isinstance(part, str) and part in section.model_fields:
            field = section.model_fields[part]
            section = _section_of(field.annotation) or section
    return section, field


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section_of(arg))), None)


def _known_key(key: str, section: type[BaseModel], schema: type[BaseModel]) -> str:
    """The nearest key of the section, else the same key in another section, else all keys of the section."""
    if not difflib.get_close_matches(key, section.model_fields, n=1):
        for path in leaf_keys(schema):
            if path.endswith(f".{key}"):
                return f"did you mean {path}?"
    return did_you_mean(key, section.model_fields)


def _bounds(node: Any) -> list[str]:
    """The limits in a field's annotation, in words: ``["above 0", "at most 1"]``."""
    parts = [*node.metadata, node.annotation] if isinstance(node, FieldInfo) else get_args(node)
    found: list[str] = []
    for part in parts:
        limits = [f"{word} {getattr(part, name)}" for name, word in _LIMITS.items() if getattr(part, name, None) is not None]
        found += limits or _bounds(part)
    return list(dict.fromkeys(found))


def _written(loc: Sequence[int | str], data: Any) -> str:
    """The dotted key as the user wrote it: an entry of a mapping of rewards goes by its name, a single reward without a number."""
    parts: list[str] = []
    for part in loc:
        key: Any = part
        if isinstance(part, int) and isinstance(data, int | float):
            continue  # a lone number where a list may stand
        if isinstance(part, int) and isinstance(data, Mapping) and part not in data and part < len(data):
            if isinstance(data.get("name"), str):
                continue
            key = list(data)[part]
        if key != "[key]":
            parts.append(str(key))
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):
            data = None
    return ".".join(parts)
