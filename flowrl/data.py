"""Prompts: reading them from files and tables, and which of them an iteration samples."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flowrl.messages import read_messages
from flowrl.mistakes import did_you_mean
from flowrl.tables import nearest, open_table, parse_line, plain_columns, read_lines, table_rows
from flowrl.types import Prompt, UserError

__all__ = ["GroupSampler", "load_prompts", "metadata_of", "only_one"]

_EMBEDDED = Path(__file__).parent / "assets" / "prompts"
_ACCEPTED = "give a .txt file with one prompt a line or a .jsonl file with a `prompt` key, a .parquet file, a folder that `datasets` saved, or a hub id"
_COLUMNS = ("prompt", "question", "problem", "messages")
_ANSWERS = ("solution", "ground_truth", "final_answer", "gold_answer", "reference_answer")
"""What data sets call the right answer, where nothing is called ``answer``."""
_EXAMPLES = {"prompt": '"a red circle"', "question": '"What is 2 + 3?"', "problem": '"What is 2 + 3?"'}


def load_prompts(path: str | Path) -> list[Prompt]:
    """Read prompts in the order of the file or table.

    A text stands under one of ``prompt``, ``question``, ``problem``, or as the last message, which is the user's, of ``messages`` (or of a list under
    ``prompt``): the whole list is then the metadata ``messages``. All other keys, and those inside ``metadata``, become the prompt's metadata unchanged.
    Without an ``answer``, a ``solution``, ``ground_truth``, ``final_answer``, ``gold_answer`` or ``reference_answer`` is repeated as the metadata ``answer``.

    Args:
        path: a ``.txt`` file with one prompt a line; a ``.jsonl`` file with one object a line; an embedded set: ``flowrl:tiny-sd3/train``; or, by the
            `datasets` library, a folder that it saved, a ``.parquet`` file, or a hub id, with its configuration and split where it has several:
            ``openai/gsm8k:main@test``. Columns of pictures, sound, bytes and dates are left out.

    Raises:
        UserError: it is missing, unreadable, empty or of another kind, has blank lines, or a line or row has no text, two that could be it, or a wrong
            conversation; one line that names it.
    """
    if not str(path).startswith("flowrl:") and Path(path).suffix not in (".txt", ".jsonl"):
        return _from_table(str(path))
    file = _embedded(str(path)) if str(path).startswith("flowrl:") else Path(path)
    lines = read_lines(file, f"prompts {path}", "prompt")
    if file.suffix == ".txt":
        return [Prompt(line) for line in lines]
    return [_prompt_of(parse_line(line, where := f"prompts {path}: line {number}"), where) for number, line in enumerate(lines, 1)]


def _embedded(name: str) -> Path:
    known = {f"flowrl:{file.parent.name}/{file.stem}": file for file in sorted(_EMBEDDED.glob("*/*.jsonl"))}
    if name not in known:
        raise UserError(f"prompts {name}: no such embedded set; {did_you_mean(name, known)}")
    return known[name]


def _from_table(name: str) -> list[Prompt]:
    what = f"prompts {name}"
    table = open_table(name, what, _ACCEPTED)
    column = only_one(_COLUMNS, table.column_names, f"{what}: the table")
    if column is None:
        hint = nearest(_COLUMNS, table.column_names) or f"it has {', '.join(table.column_names)}"
        raise UserError(f"{what}: no column `prompt`, `question`, `problem` or `messages`; {hint}")
    columns = plain_columns(table)
    if column not in columns:
        raise UserError(f"{what}: column `{column}` holds {table.features[column]}, not text")
    return [_prompt_of(row, f"{what}: row {number}") for number, row in enumerate(table_rows(table, columns))]


def _prompt_of(entry: Any, where: str) -> Prompt:
    column = only_one(_COLUMNS, entry, where) if isinstance(entry, dict) else None
    value = entry[column] if column is not None else None
    if column == "messages" or (column == "prompt" and isinstance(value, list)):
        messages = read_messages(value, where, column)
        if messages[-1]["role"] != "user":
            raise UserError(f"{where}: the last message of `{column}` is of the role {messages[-1]['role']}; a prompt ends with the user's")
        text, conversation = messages[-1]["content"], {"messages": messages}
    elif isinstance(value, str) and value.strip():
        text, conversation = value, {}
    else:
        column = column or "prompt"
        hint = nearest(_COLUMNS, entry) if isinstance(entry, dict) and column not in entry else ""
        raise UserError(f'{where} needs a non-empty text under `{column}`, for example {{"{column}": {_EXAMPLES[column]}}}{"; " * bool(hint)}{hint}')
    metadata = metadata_of({key: other for key, other in entry.items() if key != column}, where)
    if conversation.keys() & metadata.keys():
        raise UserError(f"{where}: `metadata` has messages too; keep one")
    if "answer" not in metadata:
        name = only_one(_ANSWERS, metadata, where, "the right answer, and call it `answer`")
        metadata |= {} if name is None else {"answer": metadata[name]}
    return Prompt(text.strip(), metadata | conversation)


def only_one(names: tuple[str, ...], keys: Any, where: str, meaning: str = "the prompt") -> str | None:
    """The one of these names that is among the keys, None if none is.

    Raises:
        UserError: two are.
    """
    found = [name for name in names if name in keys]
    if len(found) > 1:
        raise UserError(f"{where} has {' and '.join(f'`{name}`' for name in found)}; keep the one that is {meaning}")
    return found[0] if found else None


def metadata_of(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys of an entry and those inside its ``metadata``, which may be missing or None, side by side.

    Raises:
        UserError: ``metadata`` is not an object, or a key stands in both.
    """
    nested = {} if entry.get("metadata") is None else entry["metadata"]
    if not isinstance(nested, dict):
        raise UserError(f"{where}: `metadata` is not an object")
    own = {key: value for key, value in entry.items() if key != "metadata"}
    if both := sorted(own.keys() & nested.keys()):
        raise UserError(f"{where}: {', '.join(both)} stands both beside and inside `metadata`; keep one")
    return own | nested


class GroupSampler:
    """Which prompts each iteration samples: epoch by epoch, every prompt once per epoch, in a new random order each.

    The prompts of one iteration are distinct; where it has more groups than there are prompts, their numbers differ by one at most.
    Everything follows from the arguments, so a resumed run needs no state.

    Args:
        num_prompts: at least 1.
        groups_per_iteration: at least 1.
        seed: any integer.

    Raises:
        ValueError: a count is below 1.
    """

    def __init__(self, num_prompts: int, groups_per_iteration: int, seed: int) -> None:
        if num_prompts < 1 or groups_per_iteration < 1:
            raise ValueError(f"needs at least one prompt and one group, got {num_prompts} and {groups_per_iteration}")
        self.num_prompts = num_prompts
        self.seed = seed
        # Every iteration takes all prompts `_whole` times, and `_part` more from the endless sequence of epochs.
        self._whole, self._part = divmod(groups_per_iteration, num_prompts)
        self._remembered: tuple[int, list[int]] = (-1, [])

    def groups(self, iteration: int) -> list[int]:
        """Prompt indices in 0..num_prompts-1 of the groups of an iteration (>= 0). Always the same for the same iteration."""
        if iteration < 0:
            raise ValueError(f"iteration {iteration} is below 0")
        indices = list(range(self.num_prompts)) * self._whole
        start = iteration * self._part
        while start < (iteration + 1) * self._part:
            epoch, offset = divmod(start, self.num_prompts)
            taken = self._order(epoch)[offset : offset + (iteration + 1) * self._part - start]
            indices += taken
            start += len(taken)
        return indices

    def met(self, iterations: int) -> set[int]:
        """The prompts of the first so many iterations. They come epoch by epoch, so nothing new comes after all have been met."""
        last = min(iterations, math.ceil(self.num_prompts / (self._whole * self.num_prompts + self._part)) + 1)
        return {index for iteration in range(last) for index in self.groups(iteration)}

    def _order(self, epoch: int) -> list[int]:
        """The order of an epoch. An iteration that began in the epoch before took that one's tail: this one begins with other prompts.

        So an order depends on the one before, back to the last epoch that began together with an iteration.
        """
        period = self._part // math.gcd(self._part, self.num_prompts)
        known, order = self._remembered
        first = epoch - epoch % period
        if not first <= known <= epoch:
            known, order = first, self._shuffled(first)
        for e in range(known + 1, epoch + 1):
            carried = e * self.num_prompts % self._part  # of the iteration under way, taken from epoch e - 1
            tail = set(order[self.num_prompts - carried :])
            shuffled = self._shuffled(e)
            head = [index for index in shuffled if index not in tail][: self._part - carried] if carried else []
            started = set(head)
            order = head + [index for index in shuffled if index not in started]
        self._remembered = (epoch, order)
        return order

    def _shuffled(self, epoch: int) -> list[int]:
        digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        order: list[int] = torch.randperm(self.num_prompts, generator=generator).tolist()
        return order
