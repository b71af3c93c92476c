"""Conversations: lists of {role, content}, and the transcripts of "Human:" and "Assistant:" that some preference data has instead."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from flowrl.mistakes import did_you_mean
from flowrl.types import UserError

__all__ = ["ROLES", "Message", "read_messages", "read_transcript", "shared_beginning"]

Message = dict[str, Any]
"""``role``, ``content`` and what else the data says, such as tool calls."""
ROLES = ("system", "developer", "user", "assistant", "tool")
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def read_messages(value: object, where: str, column: str) -> list[Message]:
    """A conversation as it stands in the data; keys without a value (None) are left out.

    Args:
        where: place in words, which begins each message. column: the key under which the conversation stands.
    Raises:
        UserError: it is not a list of messages, a role is unknown, or a text is missing or empty. Only an assistant with tool calls may say nothing.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f'{where}: `{column}` is not a list of messages, for example [{{"role": "user", "content": "What is 2 + 3?"}}]')
    return [_message(entry, f"{where}: message {number} of `{column}`") for number, entry in enumerate(value, 1)]


def _message(entry: object, where: str) -> Message:
    if not isinstance(entry, dict) or "role" not in entry or not ("content" in entry or "tool_calls" in entry):
        has = f"has {', '.join(map(str, entry)) or 'nothing'}" if isinstance(entry, dict) else f"is {type(entry).__name__}"
        raise UserError(f"{where} {has}; it needs `role` and `content`")
    role = entry["role"]
    if role not in ROLES:
        raise UserError(f"{where} has the role {role!r}; {did_you_mean(str(role), ROLES)}")
    message = {str(key): part for key, part in entry.items() if part is not None}
    is_call = role == "assistant" and bool(message.get("tool_calls"))
    content = message.setdefault("content", "" if is_call else None)
    if not isinstance(content, str):
        raise UserError(f"{where} has a content that is {type(content).__name__}, not text")
    if not content.strip() and not is_call:
        raise UserError(f"{where} ({role}) is empty")
    return message


def read_transcript(text: str) -> list[Message] | None:
    r"""The turns of ``\n\nHuman: ...\n\nAssistant: ...``, without white space at the ends of what is said; None = the text has not this form."""
    parts = _SPEAKER.split(text)
    if parts[0].strip() or len(parts) < 3 or parts[1] != "Human" or "Assistant" not in parts[3::2]:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[speaker], "content": said.strip()} for speaker, said in zip(parts[1::2], parts[2::2], strict=True)]


def shared_beginning(first: Sequence[Message], second: Sequence[Message]) -> int:
    """How many messages two conversations have in common at their beginning, the last of each apart."""
    limit = min(len(first), len(second)) - 1
    return next((i for i in range(limit) if first[i] != second[i]), max(limit, 0))
