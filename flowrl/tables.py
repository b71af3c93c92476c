"""Where data lies: lines of a file, and rows that Hugging Face `datasets` reads (a folder, a .parquet file, a hub id).

Every message begins with ``what``, such as ``prompts p.jsonl``.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from flowrl.mistakes import did_you_mean
from flowrl.types import UserError

__all__ = ["TABLES", "nearest", "open_table", "parse_line", "plain_columns", "read_lines", "table_rows"]

TABLES = "give a .jsonl or .parquet file, a folder that `datasets` saved, or a hub id"
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([\w.+-]+))?(?:@([\w.+-]+))?")
_SHOWN_LINES = 5
_ROWS_AT_ONCE = 1000


# --- lines --------------------------------------------------------------------------------------------------------------------------------------


def read_lines(file: Path, what: str, unit: str) -> list[str]:
    """The lines of a text file, without white space at their ends; none is blank.

    Args:
        unit: what a line holds, for messages: "prompt" or "pair".
    Raises:
        UserError: the file is missing, unreadable, not UTF-8, empty, or has blank lines.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{what}: no such file") from error
    except OSError as error:
        raise UserError(f"{what}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: is not UTF-8 text") from error
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    if not any(lines):
        raise UserError(f"{what}: is empty; give one {unit} a line")
    if blank := [number for number, line in enumerate(lines, 1) if not line]:
        raise UserError(f"{what}: {_line_numbers(blank)} blank; remove empty lines")
    return lines


def _line_numbers(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN_LINES]))
    more = f" and {len(numbers) - _SHOWN_LINES} more" if len(numbers) > _SHOWN_LINES else ""
    return f"line {shown} is" if len(numbers) == 1 else f"lines {shown}{more} are"


def parse_line(line: str, where: str) -> Any:
    """What a line of JSON says.

    Raises:
        UserError: it is not JSON.
    """
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise UserError(f"{where} is not usable JSON (nested too deeply)") from error


def nearest(wanted: Sequence[str], names: Collection[str]) -> str:
    """``did you mean promt? write `prompt``` where one of the names looks like one of those wanted, else nothing."""
    for name in wanted:
        if near := difflib.get_close_matches(name, [str(other) for other in names], n=1):
            return f"did you mean {near[0]}? write `{name}`"
    return ""


# --- tables -------------------------------------------------------------------------------------------------------------------------------------


def open_table(name: str, what: str, accepted: str = TABLES) -> Any:
    """The rows of a folder, a .parquet file or a hub id, as a `datasets.Dataset` with at least one row.

    Args:
        name: a hub id may name a configuration and a split: ``openai/gsm8k:main@test``. Without a split it is train, or the only one.
        accepted: what could have been given, for messages.
    Raises:
        UserError: nothing is there, it is something else or has no rows, `datasets` is not installed or cannot load it, or no split is meant.
    """
    path, hub = Path(name), _HUB_ID.fullmatch(name)
    if not path.exists() and (path.suffix == ".parquet" or hub is None):
        raise UserError(f"{what}: no such file or folder; {accepted}")
    if path.is_file() and path.suffix != ".parquet":
        raise UserError(f"{what}: {accepted}")
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{what}: needs the `datasets` library: run `pip install 'flowrl-diffusion[data]'`, or give a .jsonl file") from error
    wanted: str | None = None
    try:
        if hub is None or path.exists():
            with _without_progress_bars(datasets):
                loaded = datasets.load_from_disk(name) if path.is_dir() else datasets.Dataset.from_parquet(name)
        else:
            wanted = hub[3]
            loaded = datasets.load_dataset(*filter(None, (hub[1], hub[2])))
    except (OSError, ValueError, IndexError, datasets.exceptions.DatasetsError) as error:  # IndexError: a folder of no rows
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{what}: cannot be loaded by `datasets` ({reason})") from error
    if isinstance(loaded, dict):
        loaded = loaded[_split_of(loaded, wanted, what)]
    if not len(loaded):
        raise UserError(f"{what}: has no rows")
    return loaded


def _split_of(splits: dict[str, Any], wanted: str | None, what: str) -> str:
    if wanted is not None:
        if wanted not in splits:
            raise UserError(f"{what}: no split is called {wanted}; {did_you_mean(wanted, splits)}")
        return wanted
    split = "train" if "train" in splits else next(iter(splits), "")
    if not split or (split != "train" and len(splits) > 1):
        raise UserError(f"{what}: no split is called train; it has {', '.join(splits) or 'none'}; save one of them as a folder of its own")
    return split


@contextlib.contextmanager
def _without_progress_bars(datasets: Any) -> Iterator[None]:
    """Within it, `datasets` draws no progress bars: only a download shows progress."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def plain_columns(table: Any) -> list[str]:
    """The columns that hold texts, numbers, true or false, or lists and structs of these; not pictures, sound, bytes or dates."""
    schema = table.features.arrow_schema
    return [name for name in table.column_names if _is_plain(schema.field(name).type)]


def table_rows(table: Any, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows in order, as plain Python values of these columns."""
    for batch in table.select_columns(list(columns)).with_format(None).iter(batch_size=_ROWS_AT_ONCE):
        yield from (dict(zip(columns, values, strict=True)) for values in zip(*(batch[name] for name in columns), strict=True))


def _is_plain(kind: Any) -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(kind.field(i).type) for i in range(kind.num_fields))
    checks = (types.is_string, types.is_large_string, types.is_boolean, types.is_integer, types.is_floating, types.is_null)
    return any(check(kind) for check in checks)
