"""Preference data of texts: a chosen and a rejected answer to a prompt, from the formats that are in use (docs/text_data.md).

Letters: n pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from flowrl.data import metadata_of, only_one
from flowrl.messages import Message, read_messages, read_transcript, shared_beginning
from flowrl.tables import nearest, open_table, parse_line, plain_columns, read_lines, table_rows
from flowrl.types import Prompt, UserError

__all__ = ["TextPairs", "load_text_pairs"]

_Side = Literal["chosen", "rejected"]
_NAMED = ("chosen", "rejected")
_NUMBERED = ("response_0", "response_1")
_PROMPTS = ("prompt", "question", "problem", "messages")
_LABELS = ("preference", "label", "better_response_id", "label_0")
"""Which of the numbered responses is the better one; ``label_0`` is 1 where the first is, the others are its number."""
_SCORES = (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"), ("chosen_reward", "rejected_reward"))


@dataclass(frozen=True, slots=True)
class TextPairs:
    """Preference pairs of texts; made by `load_text_pairs`.

    Attributes:
        prompts: length n. Where the data is a conversation, ``metadata["messages"]`` is all of it before the answer, and ``text`` the last that the user said.
        chosen, rejected: length n, the answers, not empty and different.
        chosen_reward, rejected_reward: [n] float32, finite; None where the data has none.
        preference: [n] float32 in [0, 1], the chance that the chosen one is the better; None where the data has none.
        dropped: ties that were left out.
    """

    prompts: list[Prompt]
    chosen: list[str]
    rejected: list[str]
    chosen_reward: Tensor | None = None
    rejected_reward: Tensor | None = None
    preference: Tensor | None = None
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.prompts)


class _Pair(NamedTuple):
    prompt: Prompt
    chosen: str
    rejected: str
    rewards: tuple[float, float] | None
    preference: float | None


def load_text_pairs(path: str | Path) -> TextPairs:
    r"""Read preference pairs in the order of the file or table.

    | keys | meaning |
    | --- | --- |
    | prompt, chosen, rejected | texts; ``prompt`` may be a conversation, and be called ``question`` or ``problem`` |
    | chosen, rejected | whole conversations (lists of messages, or ``\n\nHuman: ...\n\nAssistant: ...``): what they share is the prompt, the rest one answer |
    | chosen, rejected | other texts: what they share, up to the last white space in it, is the prompt |
    | response_0, response_1 and one of | with a prompt, or conversations as above |
    | preference, label, better_response_id | 0 = response_0 is the better one, 1 = response_1, 0.5, "tie" or nothing = a tie |
    | label_0 | the other way round, as in Pick-a-Pic: 1 = response_0 is the better one |
    | chosen_score, rejected_score | rewards; also score_chosen and score_rejected, chosen_reward and rejected_reward, or score_0 and score_1 of numbered ones |
    | margin | reward of the chosen one over the rejected one: without scores they have the rewards margin and 0 |
    | preference (beside chosen) | chance in [0, 1] that the chosen one is the better; 1/2 is kept |

    All other keys become the prompt's metadata. A column ``messages`` that repeats an answer's conversation is left out.

    Args:
        path: a ``.jsonl`` file, a folder with a ``pairs.jsonl``, a folder that `datasets` saved, a ``.parquet`` file or a hub id, see `load_prompts`.
    Raises:
        UserError: nothing is there, or it is unreadable, empty or only ties, or a line or row lacks a key, has two that mean the same, an empty answer, two
            equal answers, or conversations without a shared beginning; one line that names it.
    """
    pairs: list[_Pair] = []
    dropped = 0
    for where, entry in _entries(path):
        pair = _pair_of(entry, where)
        if pair is None:
            dropped += 1
            continue
        if pairs:
            _check_like(pairs[0], pair, where)
        pairs.append(pair)
    if not pairs:
        raise UserError(f"pairs {path}: all {dropped} pairs are ties")
    rewards = [pair.rewards for pair in pairs if pair.rewards is not None]
    preference = [pair.preference for pair in pairs if pair.preference is not None]
    chosen_reward, rejected_reward = torch.tensor(rewards, dtype=torch.float32).unbind(1) if rewards else (None, None)
    return TextPairs(
        prompts=[pair.prompt for pair in pairs],
        chosen=[pair.chosen for pair in pairs],
        rejected=[pair.rejected for pair in pairs],
        chosen_reward=chosen_reward,
        rejected_reward=rejected_reward,
        preference=torch.tensor(preference, dtype=torch.float32) if preference else None,
        dropped=dropped,
    )


def _entries(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place in words, keys and values) of each pair."""
    file, what = Path(path), f"pairs {path}"
    file = file / "pairs.jsonl" if file.is_dir() and (file / "pairs.jsonl").is_file() else file
    if file.suffix == ".jsonl":
        for number, line in enumerate(read_lines(file, what, "pair"), 1):
            entry = parse_line(line, where := f"{what}: line {number}")
            if not isinstance(entry, dict):
                raise UserError(f'{where} is no object, for example {{"prompt": "2+3=", "chosen": "5", "rejected": "6"}}')
            yield where, entry
        return
    table = open_table(str(path), what)
    columns = plain_columns(table)
    for name in (*_NAMED, *_NUMBERED):
        if name in table.column_names and name not in columns:
            raise UserError(f"{what}: column `{name}` holds {table.features[name]}; texts or conversations are needed")
    for number, row in enumerate(table_rows(table, columns)):
        yield f"{what}: row {number}", row


def _check_like(first: _Pair, pair: _Pair, where: str) -> None:
    for name, some, none in (("rewards", "scores or a margin", "no scores or margin"), ("preference", "a `preference`", "no `preference`")):
        before, here = getattr(first, name) is not None, getattr(pair, name) is not None
        if before != here:
            raise UserError(f"{where} has {some if here else none}, unlike the first pair; give it for all pairs or for none")


# --- one pair -----------------------------------------------------------------------------------------------------------------------------------


def _pair_of(entry: dict[str, Any], where: str) -> _Pair | None:
    """None = a tie."""
    rest = dict(entry)
    numbered = _layout(rest, where) is _NUMBERED
    names = _NUMBERED if numbered else _NAMED
    is_swapped = False
    if numbered:
        better = _better(rest, where)
        if better is None:
            return None
        is_swapped = better == 1
    values = [rest.pop(name) for name in names]
    rewards = _rewards(rest, numbered, where)
    preference = None if numbered else _number(rest, "preference", where)
    if preference is not None and not 0 <= preference <= 1:
        raise UserError(f"{where}: `preference` is {preference:g}; it is the chance that the chosen answer is the better one, from 0 to 1")
    if is_swapped:
        values, rewards = values[::-1], None if rewards is None else (rewards[1], rewards[0])
    if "messages" in rest and rest["messages"] in (None, *values):
        del rest["messages"]  # UltraFeedback has the chosen conversation a second time
    column = only_one(_PROMPTS, rest, where)
    prompt = None if column is None else rest.pop(column)
    if column is not None and not prompt:
        raise UserError(f"{where}: `{column}` is empty; give a text or a list of messages")
    metadata = metadata_of(rest, where)
    text, messages, chosen, rejected = _texts(prompt, column or "", values[0], values[1], where)
    for side, answer in zip(get_args(_Side), (chosen, rejected), strict=True):
        if not answer.strip():
            raise UserError(f"{where}: the {side} answer is empty; remove the pair")
    if chosen.strip() == rejected.strip():
        raise UserError(f"{where}: the chosen and the rejected answer are the same; remove the pair")
    if messages and "messages" in metadata:
        raise UserError(f"{where}: `metadata` has messages too; keep one")
    return _Pair(Prompt(text, metadata | ({"messages": messages} if messages else {})), chosen, rejected, rewards, preference)


def _layout(entry: dict[str, Any], where: str) -> tuple[str, str]:
    """The names of the two answers."""
    numbered = not any(name in entry for name in _NAMED) and any(name in entry for name in _NUMBERED)
    if not numbered and all(name in entry for name in (*_NAMED, *_NUMBERED)):
        raise UserError(f"{where} has chosen and rejected, and response_0 and response_1; keep one of the two forms")
    names = _NUMBERED if numbered else _NAMED
    for name in names:
        if entry.get(name) is None:
            others = [other for other in entry if other not in (*names, *_PROMPTS)]
            need = "every pair needs response_0, response_1 and a label" if numbered else "every pair needs chosen and rejected"
            raise UserError(f"{where} has no `{name}`; {nearest((name,), others) or need}")
    return names


def _better(rest: dict[str, Any], where: str) -> int | None:
    """0 or 1, the number of the better response; None = a tie. Takes the label out of ``rest``."""
    column = only_one(_LABELS, rest, where, "the label")
    if column is None:
        hint = nearest(_LABELS, [name for name in rest if name not in (*_PROMPTS, *_NUMBERED)])
        raise UserError(f"{where} has no label; {hint or 'give `preference`: 0 where response_0 is the better one, 1 where response_1 is, 0.5 for a tie'}")
    label = rest.pop(column)
    if label is None or label in (0.5, "tie"):
        return None
    if isinstance(label, str) and label in _NUMBERED and column != "label_0":
        return _NUMBERED.index(label)
    if isinstance(label, bool) or label not in (0, 1):
        raise UserError(f"{where}: `{column}` is {label!r}; it is 0, 1, or 0.5 for a tie")
    return 1 - int(label) if column == "label_0" else int(label)


def _rewards(rest: dict[str, Any], numbered: bool, where: str) -> tuple[float, float] | None:
    """Rewards of the two answers in their order; takes them out of ``rest``, but leaves a margin beside scores."""
    columns = (("score_0", "score_1"),) if numbered else _SCORES
    found = [names for names in columns if any(rest.get(name) is not None for name in names)]
    if len(found) > 1:
        raise UserError(f"{where} has {' and '.join(names[0] for names in found)}; keep the scores that are meant")
    if found:
        first, second = (_number(rest, name, where) for name in found[0])
        if first is None or second is None:
            raise UserError(f"{where} has no `{found[0][first is not None]}` beside `{found[0][first is None]}`; give both scores or none")
        return first, second
    for name in (name for names in columns for name in names):
        rest.pop(name, None)  # columns without a value
    margin = None if numbered else _number(rest, "margin", where)
    return None if margin is None else (margin, 0.0)


def _number(rest: dict[str, Any], name: str, where: str) -> float | None:
    value = rest.pop(name, None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: `{name}` is {value!r}; give a finite number")
    return float(value)


# --- prompt and answers -------------------------------------------------------------------------------------------------------------------------


def _texts(prompt: object, column: str, chosen: object, rejected: object, where: str) -> tuple[str, list[Message], str, str]:
    """(text of the prompt, conversation before the answer or [], chosen, rejected)."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            first, second = read_transcript(chosen), read_transcript(rejected)
            return _of_conversations([], first, second, where) if first and second else _of_common_text(chosen, rejected, where)
        if isinstance(prompt, str) and column != "messages":
            return _not_blank(prompt, column, where), [], chosen, rejected
        messages = read_messages(prompt, where, column)
        return _asked(messages, where), messages, chosen, rejected
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise UserError(f"{where}: chosen is {_kind(chosen)}, rejected {_kind(rejected)}; both are texts, or both are lists of messages")
    conversations = read_messages(chosen, where, "chosen"), read_messages(rejected, where, "rejected")
    if isinstance(prompt, str) and column != "messages":
        text = _not_blank(prompt, column, where)
        found = _of_conversations([], *conversations, where, asked=text)
        return text, *found[1:]
    return _of_conversations([] if prompt is None else read_messages(prompt, where, column), *conversations, where)


def _of_conversations(
    given: list[Message], chosen: list[Message], rejected: list[Message], where: str, asked: str | None = None
) -> tuple[str, list[Message], str, str]:
    """Of two conversations that contain the prompt, or follow after it.

    Args:
        given: the prompt as messages, [] = none. asked: the prompt as a text, which the conversations may leave out; None = none.
    """
    if chosen == rejected:
        raise UserError(f"{where}: the chosen and the rejected answer are the same; remove the pair")
    count = shared_beginning(chosen, rejected)
    shared = chosen[:count]
    if given and shared[: len(given)] != given:
        if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
            raise UserError(f"{where}: chosen and rejected neither begin with the messages of the prompt nor follow after them")
        history = given + shared
    elif asked is not None and not shared:
        history = [{"role": "user", "content": asked}]
    else:
        history = shared
    if not history:
        raise UserError(f"{where}: chosen and rejected share no beginning; give a `prompt`")
    for side, rest in (("chosen", chosen[count:]), ("rejected", rejected[count:])):
        if len(rest) != 1 or rest[0]["role"] != "assistant" or rest[0].get("tool_calls"):
            roles = ", ".join(message["role"] for message in rest)
            raise UserError(f"{where}: after the shared history {side} has {len(rest)} messages ({roles}); one text of the assistant is needed")
    text = _asked(history, where)
    if asked is not None and text != asked:
        raise UserError(f"{where}: the prompt is not what the user said last in chosen and rejected; remove the column, or the pair")
    return text, history, chosen[count]["content"], rejected[count]["content"]


def _of_common_text(chosen: str, rejected: str, where: str) -> tuple[str, list[Message], str, str]:
    """The prompt ends before the last white space of what the two have in common, so that no word is cut."""
    common = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    end = max((i for i in range(common) if chosen[i].isspace()), default=0)
    prompt = chosen[:end].rstrip()
    if chosen == rejected:
        raise UserError(f"{where}: the chosen and the rejected answer are the same; remove the pair")
    if not prompt.strip():
        raise UserError(f"{where} has no `prompt`, and chosen and rejected share no beginning; give a `prompt`")
    return prompt.strip(), [], chosen[len(prompt) :], rejected[len(prompt) :]


def _asked(history: list[Message], where: str) -> str:
    """What the user said last, which ends the history."""
    if history[-1]["role"] != "user":
        raise UserError(f"{where}: the last message before the answer is of the role {history[-1]['role']}; it must be the user's")
    text: str = history[-1]["content"]
    return text.strip()


def _not_blank(text: str, column: str, where: str) -> str:
    if not text.strip():
        raise UserError(f"{where}: `{column}` is empty; give a text or a list of messages")
    return text.strip()


def _kind(value: object) -> str:
    return "a text" if isinstance(value, str) else "a list" if isinstance(value, list) else type(value).__name__
