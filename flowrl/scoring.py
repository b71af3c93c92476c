"""`flowrl score`: which pictures or texts, with which prompts, in what batches, and the rows that come out, in the order of the input and as they come.

Letters: B samples, H and W pixels.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from flowrl.data import load_prompts
from flowrl.picture_files import find_pictures, picture_size, read_picture
from flowrl.types import Prompt, Reward, SampleBatch, Scores, UserError
from rewards.composite import Entry, WeightedRewards
from rewards.registry import load_reward

__all__ = ["Item", "Row", "Summary", "make_rewards", "pick_device", "picture_items", "progress_bar", "score_items", "text_items", "write_scores"]

_BATCH_SIZE = 32  # pictures of 1024 x 1024 take 12 MB each
_OWN_COLUMNS = ("file", "prompt", "valid", "problem")


@dataclass(frozen=True, slots=True)
class Item:
    """One sample to be scored.

    Attributes:
        file: the picture, or the file of texts with the line: ``answers.jsonl:3``.
        prompt: its text is empty where none was given.
        text: the completion; None = a picture.
    """

    file: str
    prompt: Prompt
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """What became of an item.

    Attributes:
        values: reward -> score; None where it could not be scored.
        raw: ``reward/column`` -> further columns of the rewards; None = the item never reached a reward.
        problem: why a score is missing.
    """

    item: Item
    values: Mapping[str, float | None]
    valid: bool
    raw: Mapping[str, float | None] | None = None
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The columns of the output."""
        return {"file": self.item.file, "prompt": self.item.prompt.text, **self.values, "valid": self.valid, **(self.raw or {}), "problem": self.problem}


@dataclass(slots=True)
class Summary:
    """Scores of one reward over all items, as they come."""

    reward: str
    values: list[float] = field(default_factory=list)
    invalid: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Count, mean, least and greatest score; None where there is none."""
        values = self.values
        low, mean, high = (min(values), statistics.fmean(values), max(values)) if values else (None, None, None)
        return {"reward": self.reward, "scored": len(values), "not_scored": self.invalid, "mean": mean, "min": low, "max": high}


def picture_items(places: Sequence[Path], text: str | None, prompts: Path | None) -> list[Item]:
    """The pictures with their prompts.

    Args:
        places: files and folders, see `flowrl.picture_files.find_pictures`.
        text: one prompt for all.
        prompts: a file of prompts, see `flowrl.data.load_prompts`: one for every picture in their order, or, where its lines have a key ``file``, by the
            picture's path or name.
    Raises:
        UserError: no pictures, both kinds of prompts, or the file does not fit the pictures.
    """
    if text is not None and prompts is not None:
        raise UserError("--prompt and --prompts exclude each other; give one of them")
    files = find_pictures(places)
    if prompts is None:
        return [Item(str(file), Prompt(text or "")) for file in files]
    read = load_prompts(prompts)
    if any("file" in prompt.metadata for prompt in read):
        return [Item(str(file), _prompt_of(file, read, prompts)) for file in files]
    if len(read) != len(files):
        raise UserError(f"prompts {prompts}: {len(read)} prompts for {len(files)} pictures; give one for each, in their order, or a `file` key on every line")
    return [Item(str(file), prompt) for file, prompt in zip(files, read, strict=True)]


def text_items(file: Path) -> list[Item]:
    """Texts to be scored: a .jsonl file whose lines have ``prompt``, ``completion`` and, beside them, the prompt's metadata.

    Raises:
        UserError: the file cannot be read, or a line has no completion.
    """
    if file.suffix != ".jsonl":
        raise UserError(f"texts {file}: give a .jsonl file whose lines have `prompt` and `completion`")
    items = []
    for number, prompt in enumerate(load_prompts(file), 1):
        metadata = dict(prompt.metadata)
        completion = metadata.pop("completion", None)
        if not isinstance(completion, str):
            raise UserError(f'texts {file}: line {number} needs a text under `completion`, for example {{"prompt": "2 + 2?", "completion": "4"}}')
        items.append(Item(f"{file}:{number}", Prompt(prompt.text, metadata), completion))
    return items


def make_rewards(wanted: Sequence[tuple[str, Mapping[str, Any]]], items: Sequence[Item], batch_size: int | None) -> WeightedRewards:
    """The rewards by name with their arguments, checked against the items; no weights are loaded yet.

    Raises:
        UserError: an unknown reward, arguments that do not fit, or items that a reward cannot score for lack of pictures, texts, prompts or metadata.
    """
    made = [(name, load_reward(name, args)) for name, args in wanted]
    for name, reward in made:
        if name in _OWN_COLUMNS:
            raise UserError(f"reward {name} has the name of a column of the output; name it by its import string")
        _check_reads(name, reward, items)
    rewards = WeightedRewards([Entry(name, 0.0, reward, batch_size=batch_size) for name, reward in made])
    rewards.check_prompts([item.prompt for item in items])
    return rewards


def pick_device(name: str) -> torch.device:
    """The device of this name; ``auto`` is the accelerator that torch sees, or the CPU.

    Raises:
        UserError: torch knows no such device, or sees none here.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--device {name}: torch cannot use it ({first}); use auto, cpu, or a device such as cuda:0") from error
    return device


def write_scores(
    rewards: WeightedRewards,
    items: Sequence[Item],
    out: Path | None,
    stdout: TextIO,
    as_json: bool,
    device: torch.device,
    dtype: torch.dtype | None,
    batch_size: int | None,
    skip_damaged: bool,
    advance: Callable[[int], None],
) -> list[Summary]:
    """Load the rewards, score the items and write a row for each: to a .csv or .jsonl file, or to ``stdout`` as CSV or, with ``as_json``, JSON lines.

    Rows are written as they come, so those of an interrupted call remain.

    Args:
        batch_size: pictures that are held in memory together; None = 32. A reward gets no more at a time than it says itself.
        skip_damaged: a file that cannot be read gets a row without scores instead of ending the call.
        advance: told how many items are done.
    Raises:
        UserError: the output cannot be written, a reward cannot be loaded or fails, or a file is damaged.
    """
    as_json = as_json if out is None else out.suffix == ".jsonl"
    sizes, damaged = _sizes(items, skip_damaged)
    summaries = {name: Summary(name) for name in rewards.names}
    with _opened(out, stdout) as stream, closing(rewards):
        rewards.load(device, dtype)
        rewards.check_prompts([item.prompt for item in items])  # again: a remote reward learns what it is when it is loaded
        plan = _plan(items, sizes, batch_size or _BATCH_SIZE, rewards.compares)
        if out is not None:
            stream.truncate(0)  # only now: a mistake must not cost an earlier output
        with closing(_Writer(stream, as_json, rewards.names)) as writer:

            def write(row: Row) -> None:
                for name, value in row.values.items():
                    if value is None:
                        summaries[name].invalid += 1
                    else:
                        summaries[name].values.append(value)
                writer.write(row)
                advance(1)

            with closing(_InOrder(write)) as rows:
                for index, row in score_items(rewards, items, plan, damaged, skip_damaged):
                    rows.put(index, row)
    return list(summaries.values())


@contextmanager
def progress_bar(total: int, *, enabled: bool, console: Console | None = None) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told how many more items are done; a bar on standard error shows it, if that is a terminal."""
    console = console or Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("scored"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (enabled and console.is_terminal)) as progress:
        task = progress.add_task("", total=total)
        yield lambda done: progress.advance(task, done)


def score_items(
    rewards: WeightedRewards, items: Sequence[Item], plan: Sequence[Sequence[int]], damaged: Mapping[int, str], skip_damaged: bool
) -> Iterator[tuple[int, Row]]:
    """(index, row) for every item, in the order in which they are done.

    Args:
        plan: the indices of each batch. damaged: index -> why an item that is in no batch cannot be read.
    Raises:
        UserError: as `write_scores`.
    """

    def unread(index: int, reason: str) -> tuple[int, Row]:
        return index, Row(items[index], dict.fromkeys(rewards.names), valid=False, problem=reason)

    yield from (unread(index, reason) for index, reason in damaged.items())
    for batch in plan:
        pictures: dict[int, Tensor] = {}
        for index in batch:
            if items[index].text is None:
                try:
                    pictures[index] = read_picture(Path(items[index].file))
                except UserError as error:
                    if not skip_damaged:
                        raise
                    yield unread(index, _reason(items[index], error))
        readable = [index for index in batch if index in pictures or items[index].text is not None]
        for same in _by_size(readable, pictures, items, rewards.compares):
            images = torch.stack([pictures[index] for index in same]).float() / 255 if pictures else None
            texts = None if pictures else [items[index].text or "" for index in same]
            scores = rewards.score(SampleBatch([items[index].prompt for index in same], images, texts))
            yield from ((index, _row(items[index], {name: scores[name] for name in rewards.names}, k)) for k, index in enumerate(same))


def _prompt_of(file: Path, prompts: Sequence[Prompt], source: Path) -> Prompt:
    found = [prompt for prompt in prompts if prompt.metadata.get("file") in (str(file), file.name)]
    exact = [prompt for prompt in found if prompt.metadata["file"] == str(file)] or found
    if len(exact) != 1:
        raise UserError(f"prompts {source}: {len(exact) or 'no'} lines whose `file` is {file} or {file.name}; give one for every picture")
    return Prompt(exact[0].text, {key: value for key, value in exact[0].metadata.items() if key != "file"})


def _check_reads(name: str, reward: Reward, items: Sequence[Item]) -> None:
    reads = reward.info.reads
    if "images" in reads and items[0].text is not None:
        raise UserError(f"reward {name} scores pictures; give IMAGES instead of --texts")
    if "texts" in reads and "images" not in reads and items[0].text is None:
        raise UserError(f"reward {name} scores texts; give --texts FILE.jsonl instead of IMAGES")
    if "prompt" in reads and not items[0].prompt.text:
        raise UserError(
            f"reward {name} reads the prompt; give --prompt TEXT or --prompts FILE (a reward of your own that does not: reads=('images',) in its info)"
        )


def _sizes(items: Sequence[Item], skip_damaged: bool) -> tuple[dict[int, object], dict[int, str]]:
    """Of every item, what its picture says is its size (None for texts); and of files that are no pictures, why."""
    sizes: dict[int, object] = {}
    damaged: dict[int, str] = {}
    for index, item in enumerate(items):
        try:
            sizes[index] = picture_size(Path(item.file)) if item.text is None else None
        except UserError as error:
            if not skip_damaged:
                raise
            damaged[index] = _reason(item, error)
    return sizes, damaged


def _plan(items: Sequence[Item], sizes: Mapping[int, object], batch_size: int, together: bool) -> list[list[int]]:
    """Batches of items of one size, or, where rewards compare samples with each other, of all items of a prompt; by their first item."""
    batches: list[list[int]] = []
    open_batches: dict[object, list[int]] = {}
    for index, size in sizes.items():
        key = items[index].prompt.text if together else size
        batch = open_batches.setdefault(key, [])
        if not batch:
            batches.append(batch)
        batch.append(index)
        if len(batch) == batch_size and not together:
            del open_batches[key]
    return batches


def _by_size(indices: Sequence[int], pictures: Mapping[int, Tensor], items: Sequence[Item], together: bool) -> list[list[int]]:
    """Parts whose pictures, now upright, have one size."""
    parts: dict[object, list[int]] = {}
    for index in indices:
        parts.setdefault(pictures[index].shape if index in pictures else None, []).append(index)
    if together and len(parts) > 1:
        one, other, *_ = (f"{items[part[0]].file} ({pictures[part[0]].shape[2]} x {pictures[part[0]].shape[1]})" for part in parts.values())
        raise UserError(f"{one} and {other} have one prompt and are compared with each other, but differ in size; make them equal")
    return list(parts.values())


def _row(item: Item, scores: Mapping[str, Scores], k: int) -> Row:
    """Row number k of the scores of a batch."""
    missing = [name for name in scores if not scores[name].valid[k]]
    return Row(
        item,
        {name: _number(score.values[k]) for name, score in scores.items()},
        valid=not missing,
        raw={f"{name}/{column}": _number(values[k]) for name, score in scores.items() for column, values in score.raw.items()},
        problem="; ".join(f"{name}: {scores[name].problems[k]}" for name in missing),
    )


def _number(value: Tensor) -> float | None:
    """The shortest decimal that is this float32; None where it is not finite."""
    number = value.item()
    return float(str(np.float32(number))) + 0.0 if math.isfinite(number) else None  # + 0.0: no -0


def _reason(item: Item, error: UserError) -> str:
    return str(error).removeprefix(f"{item.file}: ")


@contextmanager
def _opened(out: Path | None, stdout: TextIO) -> Iterator[TextIO]:
    if out is None:
        with nullcontext(stdout) as stream:
            yield stream
        return
    if out.suffix not in (".csv", ".jsonl"):
        raise UserError(f"--out {out}: give a name that ends in .csv or .jsonl")
    try:
        stream = out.open("a", encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error})") from error
    with stream:
        yield stream


class _InOrder:
    """Passes rows on in the order of their numbers, each as soon as all before it are there; at the end, whatever is left."""

    def __init__(self, write: Callable[[Row], None]) -> None:
        self._write, self._next, self._waiting = write, 0, dict[int, Row]()

    def put(self, index: int, row: Row) -> None:
        self._waiting[index] = row
        while self._next in self._waiting:
            self._write(self._waiting.pop(self._next))
            self._next += 1

    def close(self) -> None:
        for index in sorted(self._waiting):
            self._write(self._waiting.pop(index))


class _Writer:
    """Rows as CSV or JSON lines. The columns of a CSV are known with the first row that reached a reward; rows before it wait."""

    def __init__(self, stream: TextIO, as_json: bool, names: Sequence[str]) -> None:
        self._stream, self._as_json, self._names = stream, as_json, names
        self._table: csv.DictWriter[str] | None = None
        self._early: list[Row] = []

    def write(self, row: Row) -> None:
        if self._as_json:
            self._stream.write(json.dumps(row.as_dict(), ensure_ascii=False) + "\n")
        elif self._table is None and row.raw is None:
            self._early.append(row)
        else:
            self._write_csv(row)
        self._stream.flush()

    def close(self) -> None:
        """Write the rows that still wait: none has reached a reward."""
        early, self._early = self._early, []
        for row in early:
            self._write_csv(row)
        self._stream.flush()

    def _write_csv(self, row: Row) -> None:
        if self._table is None:
            self._table = csv.DictWriter(self._stream, ["file", "prompt", *self._names, "valid", *(row.raw or ()), "problem"], lineterminator="\n")
            self._table.writeheader()
            early, self._early = self._early, []
            for waiting in early:
                self._write_csv(waiting)
        columns = {**row.as_dict(), "valid": str(row.valid).lower()}
        if unknown := columns.keys() - set(self._table.fieldnames):
            raise UserError(f"the raw column {min(unknown)} came after the first rows, whose columns are written; use a .jsonl file or correct the reward")
        self._table.writerow(columns)
