"""Preference data: pairs of a chosen and a rejected picture (or clean latent) for a prompt, read from files or through Hugging Face `datasets`.

Letters: n pairs, L... latent axes.
"""

from __future__ import annotations

import filecmp
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from flowrl.data import load_prompts
from flowrl.mistakes import did_you_mean
from flowrl.tables import open_table
from flowrl.types import Prompt, UserError

__all__ = ["PairSet", "load_pairs"]

SIDES = ("chosen", "rejected")
_IMAGES = (".png", ".jpg", ".jpeg", ".webp")
_LATENTS = (".safetensors", ".npy")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Pixel formats that PIL turns into 8-bit RGB faithfully; 16-bit and float ones would be clipped without a word."""
_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")
_LAYOUTS = (("prompt", "chosen", "rejected"), ("caption", "jpg_0", "jpg_1", "label_0"))
_DAMAGED = (OSError, ValueError, SyntaxError, KeyError, Image.DecompressionBombError, SafetensorError)
"""What PIL, numpy and safetensors raise for a file that is not what it should be."""


class _Source(Protocol):
    """Where the samples of a set lie."""

    def where(self, index: int) -> str:
        """The pair's place in words: ``pairs p.jsonl: line 3``."""

    def read(self, index: int, side: int) -> tuple[str, bytes]:
        """Name and bytes of the chosen (0) or the rejected (1) sample."""


class PairSet:
    """Preference pairs, whose pictures or latents are read when they are needed; made by `load_pairs`.

    Attributes:
        prompts: length n.
        is_latent: True where the samples are clean latents, False where they are pictures.
        dropped: ties that were left out.
    """

    def __init__(self, prompts: Sequence[Prompt], source: _Source, *, is_latent: bool, dropped: int = 0) -> None:
        self.prompts = list(prompts)
        self.is_latent = is_latent
        self.dropped = dropped
        self._source = source

    def __len__(self) -> int:
        return len(self.prompts)

    def load(self, indices: Sequence[int], size: tuple[int, int], latent_shape: Sequence[int]) -> Tensor:
        """The samples of some pairs, [:, 0] chosen and [:, 1] rejected, on the CPU.

        Args:
            indices: n numbers in 0..len - 1.
            size: (height, width) in pixels; pictures are cut to its aspect ratio around their centre and resized with PIL's Lanczos filter.
                Latents do not read it.
            latent_shape: L..., which latents must have. Pictures do not read it.
        Returns:
            Pictures [n, 2, 3, height, width] float32 in [0, 1], or latents [n, 2, L...] float32.
        Raises:
            UserError: a sample cannot be read, has another shape, is not finite, or the two of a pair are the same; the message names it.
        """
        shape = tuple(latent_shape) if self.is_latent else (3, *size)
        out = torch.empty(len(indices), 2, *shape)
        for i, index in enumerate(indices):
            for side in range(2):
                name, data = self._source.read(index, side)
                where = f"{self._source.where(index)}: {SIDES[side]} {name}"
                out[i, side] = _latent(data, shape, where) if self.is_latent else _picture(data, size, where)
            if torch.equal(out[i, 0], out[i, 1]):
                raise UserError(f"{self._source.where(index)}: chosen and rejected are the same {'latent' if self.is_latent else 'picture'}; remove the pair")
        return out

    def check(self, size: tuple[int, int], latent_shape: Sequence[int], indices: Sequence[int] | None = None) -> None:
        """Read pairs (None = all) once, one at a time, so that a bad sample is found before training and not in its middle.

        Raises:
            UserError: as `load`.
        """
        for index in range(len(self)) if indices is None else indices:
            self.load([index], size, latent_shape)


def load_pairs(path: str | Path) -> PairSet:
    """Open preference data and check all that can be checked without decoding a picture.

    Args:
        path: one of
            a ``.jsonl`` file with one object a line: ``prompt``, ``chosen``, ``rejected``; its other keys become the prompt's metadata, as in
            `load_prompts`. Chosen and rejected are files, relative to the folder of the .jsonl: pictures (png, jpg, webp) or clean latents
            (.safetensors with one tensor ``latent``, or .npy). A folder with a ``pairs.jsonl``, as `flowrl pairs` writes it, stands for that file;
            a folder that `datasets` saved, a ``.parquet`` file, or a hub id, whose split ``train`` (or only split) is used. Columns: ``prompt``,
            ``chosen``, ``rejected`` with pictures; or those of Pick-a-Pic: ``caption``, ``jpg_0``, ``jpg_1`` and ``label_0`` (1: the first won, 0: the
            second, 0.5, empty or a false ``has_label``:
            undecided, which is dropped and counted).
    Raises:
        UserError: nothing is there, or it is unreadable, empty, mixes pictures and latents, or a line or row is wrong; one line that names it.
    """
    file = Path(path)
    if file.is_dir() and (file / "pairs.jsonl").is_file():
        file = file / "pairs.jsonl"
    if file.suffix == ".jsonl":
        return _from_lines(file)
    return _from_table(str(path))


# --- .jsonl and files ---------------------------------------------------------------------------------------------------------------------------


class _Files:
    """Pairs of files; pair i stands in line i + 1."""

    def __init__(self, listing: Path, files: Sequence[tuple[Path, Path]]) -> None:
        self.listing, self.files = listing, files

    def where(self, index: int) -> str:
        return f"pairs {self.listing}: line {index + 1}"

    def read(self, index: int, side: int) -> tuple[str, bytes]:
        file = self.files[index][side]
        try:
            return str(file), file.read_bytes()
        except OSError as error:
            raise UserError(f"{self.where(index)}: {SIDES[side]} {file} cannot be read ({error.strerror or error})") from error


def _from_lines(listing: Path) -> PairSet:
    if listing.is_file() and not listing.read_bytes().strip():
        raise UserError(f"pairs {listing}: is empty; give one pair a line")
    try:
        entries = load_prompts(listing)
    except UserError as error:
        raise UserError(f"pairs{str(error).removeprefix('prompts')}") from error
    files: list[tuple[Path, Path]] = []
    for number, entry in enumerate(entries, 1):
        where = f"pairs {listing}: line {number}"
        files.append((_named_file(entry, 0, listing, where), _named_file(entry, 1, listing, where)))
        if files[-1][0] == files[-1][1]:
            raise UserError(f"{where}: chosen and rejected are the same file; remove the pair")
    is_latent = files[0][0].suffix.lower() in _LATENTS
    shape: tuple[int, ...] | None = None
    for number, pair in enumerate(files, 1):
        where = f"pairs {listing}: line {number}"
        for side, file in zip(SIDES, pair, strict=True):
            if (file.suffix.lower() in _LATENTS) != is_latent:
                mixed = "a picture among latents" if is_latent else "a latent among pictures"
                raise UserError(f"{where}: {side} {file} is {mixed}; use two files of pairs, one for each kind")
            if not is_latent:
                _picture_header(file, f"{where}: {side} {file}")
                continue
            found = _latent_header(file, f"{where}: {side} {file}")
            shape = shape or found
            if found != shape:
                raise UserError(f"{where}: {side} {file} has the shape {found}, those before {shape}; latents of one file of pairs have one shape")
        if pair[0].stat().st_size == pair[1].stat().st_size and filecmp.cmp(*pair, shallow=False):
            raise UserError(f"{where}: chosen and rejected have the same content; remove the pair")
    prompts = [Prompt(entry.text, {key: value for key, value in entry.metadata.items() if key not in SIDES}) for entry in entries]
    return PairSet(prompts, _Files(listing, files), is_latent=is_latent)


def _named_file(entry: Prompt, side: int, listing: Path, where: str) -> Path:
    key = SIDES[side]
    if key not in entry.metadata:
        raise UserError(f"{where} has no `{key}`; {_nearest(key, [name for name in entry.metadata if name not in SIDES])}")
    name = entry.metadata[key]
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: `{key}` is not the name of a file")
    file = listing.parent / name
    if file.suffix.lower() not in _IMAGES + _LATENTS:
        raise UserError(f"{where}: {key} {file} is neither a picture ({', '.join(_IMAGES)}) nor a latent ({', '.join(_LATENTS)})")
    if not file.is_file():
        raise UserError(f"{where}: {key} {file}: no such file")
    return file.resolve()


def _nearest(wanted: str, names: Sequence[str]) -> str:
    """What to do about a missing key: look at the nearest one, or add it."""
    hint = did_you_mean(wanted, names)
    return f"{hint} write `{wanted}`" if hint.startswith("did you mean") else "every pair needs prompt, chosen and rejected"


# --- Hugging Face datasets ----------------------------------------------------------------------------------------------------------------------


class _Table:
    """Rows of a dataset.

    Args:
        rows: the row of each pair.
        columns: names of the chosen and the rejected column of each pair.
    """

    def __init__(self, name: str, dataset: Any, rows: Sequence[int], columns: Sequence[tuple[str, str]]) -> None:
        self.name, self.dataset, self.rows, self.columns = name, dataset, rows, columns
        self._last: tuple[int, Any] = (-1, None)  # both samples of a pair come from one row, which is read once

    def where(self, index: int) -> str:
        return f"pairs {self.name}: row {self.rows[index]}"

    def read(self, index: int, side: int) -> tuple[str, bytes]:
        column = self.columns[index][side]
        if self._last[0] != self.rows[index]:
            self._last = (self.rows[index], self.dataset[self.rows[index]])
        value = self._last[1][column]
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None and isinstance(value, dict) and value["path"] and Path(value["path"]).is_file():
            data = Path(value["path"]).read_bytes()
        if not data:
            raise UserError(f"{self.where(index)}: {column} holds no picture; remove the row")
        return f"({column})", data


def _from_table(name: str) -> PairSet:
    dataset = open_table(name, f"pairs {name}")
    columns = list(dataset.column_names)
    layout = min(_LAYOUTS, key=lambda names: len(set(names) - set(columns)))
    for wanted in layout:
        if wanted not in columns:
            others = [column for column in columns if column not in layout]
            raise UserError(f"pairs {name}: no column `{wanted}`; {did_you_mean(wanted, others) if others else f'it has {columns}'}")
    from datasets import Image as ImageColumn
    from datasets import Value

    first, second = layout[1:3]
    for column in (first, second):
        feature = dataset.features[column]
        if isinstance(feature, ImageColumn) or (isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()):
            dataset = dataset.cast_column(column, ImageColumn(decode=False))
        elif not (isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")):
            raise UserError(f"pairs {name}: column `{column}` holds {feature}; pictures are needed, as `datasets` stores them")
    texts: list[object] = list(dataset[layout[0]])
    labels: list[object] = list(dataset[layout[3]]) if len(layout) == 4 else [1] * len(texts)
    decided: list[object] = list(dataset["has_label"]) if len(layout) == 4 and "has_label" in columns else [True] * len(texts)
    prompts, rows, sides, dropped = [], [], [], 0
    for row, (text, label, is_decided) in enumerate(zip(texts, labels, decided, strict=True)):
        if not is_decided or label is None or label == 0.5:
            dropped += 1
            continue
        if label not in (0, 1):
            raise UserError(f"pairs {name}: row {row}: label_0 is {label}; it says 1 (the first won), 0 (the second) or 0.5 (a tie)")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"pairs {name}: row {row}: `{layout[0]}` is not a text; remove the row")
        prompts.append(Prompt(text.strip()))
        rows.append(row)
        sides.append((first, second) if label == 1 else (second, first))
    if not prompts:
        raise UserError(f"pairs {name}: all {dropped} pairs are undecided")
    used = set(rows)
    for row, problem in _bad_rows(dataset, first, second):
        if row in used:
            raise UserError(f"pairs {name}: row {row}: {problem}; remove the row")
    return PairSet(prompts, _Table(name, dataset.select_columns([first, second]), rows, sides), is_latent=False, dropped=dropped)


def _bad_rows(dataset: Any, first: str, second: str) -> Iterator[tuple[int, str]]:
    """Rows whose pictures are missing, of another kind, or the same; only the first bytes are read, and all where two have the same length."""
    import pyarrow
    from pyarrow import compute

    def stored(table: Any, column: str) -> tuple[Any, list[bool]]:
        """(the bytes of each row, whether they lie in a file of their own)."""
        values = table.column(column)
        if not pyarrow.types.is_struct(values.type):
            return values, [False] * len(values)
        data = compute.struct_field(values, "bytes")
        outside = compute.and_(compute.is_null(data), compute.is_valid(compute.struct_field(values, "path")))
        return data, outside.to_pylist()

    start = 0
    for table in dataset.select_columns([first, second]).with_format("arrow").iter(batch_size=1000):
        sides = {column: stored(table, column) for column in (first, second)}
        for column, (data, outside) in sides.items():
            for i, head in enumerate(compute.binary_slice(data, 0, 12).to_pylist()):
                if not head and not outside[i]:
                    yield start + i, f"{column} holds no picture"
                elif head and not head.startswith(_SIGNATURES):
                    yield start + i, f"{column} is not a png, jpg or webp picture"
        (a, _), (b, _) = sides.values()
        for i, equal in enumerate(compute.equal(compute.binary_length(a), compute.binary_length(b)).to_pylist()):
            if equal and a[i] == b[i]:
                yield start + i, f"{first} and {second} are the same picture"
        start += len(table)


# --- one sample ---------------------------------------------------------------------------------------------------------------------------------


def _picture_header(file: Path, where: str) -> None:
    try:
        with Image.open(file) as image:
            _check_mode(image, where)
    except _DAMAGED as error:
        raise UserError(f"{where} is not a readable picture ({error})") from error


def _check_mode(image: Image.Image, where: str) -> None:
    if image.mode not in _MODES:
        raise UserError(f"{where} has pixels of the kind {image.mode}, which would lose their range; save it with 8 bits a channel")


def _picture(data: bytes, size: tuple[int, int], where: str) -> Tensor:
    """[3, height, width] float32 in [0, 1]."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_mode(image, where)
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except _DAMAGED as error:
        raise UserError(f"{where} is not a readable picture ({error})") from error
    scale = min(upright.width / size[1], upright.height / size[0])
    width, height = max(1, round(size[1] * scale)), max(1, round(size[0] * scale))
    left, top = (upright.width - width) // 2, (upright.height - height) // 2
    fitted = upright.crop((left, top, left + width, top + height)).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255).permute(2, 0, 1)


def _latent_header(file: Path, where: str) -> tuple[int, ...]:
    """The shape of a stored latent."""
    try:
        if file.suffix.lower() == ".npy":
            return np.load(file, mmap_mode="r", allow_pickle=False).shape
        with safetensors.safe_open(file, framework="pt") as tensors:
            _only_latent(list(tensors.keys()), where)
            return tuple(tensors.get_slice("latent").get_shape())
    except _DAMAGED as error:
        raise UserError(f"{where} is not a readable latent ({error})") from error


def _only_latent(names: Sequence[str], where: str) -> None:
    if names != ["latent"]:
        raise UserError(f"{where} holds {', '.join(sorted(names)) or 'nothing'}; it needs one tensor, called latent")


def _latent(data: bytes, shape: tuple[int, ...], where: str) -> Tensor:
    """[L...] float32."""
    try:
        if data.startswith(b"\x93NUMPY"):
            latent = torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False).astype(np.float32))
        else:
            tensors = load_tensors(data)
            _only_latent(list(tensors), where)
            latent = tensors["latent"].float()
    except _DAMAGED as error:
        raise UserError(f"{where} is not a readable latent ({error})") from error
    if tuple(latent.shape) != shape:
        raise UserError(f"{where} has the shape {tuple(latent.shape)}, the model's latents {shape}; use pairs made for this model")
    if not bool(torch.isfinite(latent).all()):
        raise UserError(f"{where} holds NaN or infinity; remove the pair")
    return latent
