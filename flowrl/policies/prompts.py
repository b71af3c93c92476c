"""Embeddings of prompts: every distinct text is encoded once, and a prompt is a row number from then on.

Where they are kept is a choice: on the device, in the host's memory, or in files that are mapped into memory and outlive the run. A file is named by a hash
of the text and of everything that the encoders' answer depends on, so a folder may be shared by runs, models and processes.

Letters: n prompts, R rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowrl.types import UserError

__all__ = ["PromptCache"]


class PromptCache:
    """Embeddings by row number.

    Args:
        embed: texts -> columns [len(texts), ...], always the same names, one of them ``pooled``.
        device: where `take` puts them.
        storage: device = all of them there; host = in this machine's memory; disk = in files of ``folder``.
        folder: of the files; needed for disk.
        identity: what the embeddings depend on beside the text; part of the files' names.
    """

    def __init__(
        self,
        embed: Callable[[Sequence[str]], Mapping[str, Tensor]],
        *,
        device: torch.device,
        storage: Literal["device", "host", "disk"] = "device",
        folder: Path | None = None,
        identity: str = "",
    ) -> None:
        if storage == "disk" and folder is None:
            raise ValueError("embeddings on disk need a folder")
        self._embed, self._device, self._storage, self._folder, self._identity = embed, device, storage, folder, identity
        self._row_of: dict[str, int] = {}
        self._columns: dict[str, Tensor] = {}  # of storage device
        self._entries: list[dict[str, Tensor] | str] = []  # of the others: a row's columns, or on disk its text
        self._pooled: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._row_of)

    @property
    def pooled(self) -> Tensor:
        """[n, D] on the device."""
        return self._columns["pooled"] if self._storage == "device" else torch.stack(self._pooled).to(self._device)

    def rows(self, texts: Sequence[str], *, batch: int) -> Tensor:
        """Row numbers [len(texts)] int64; new texts are encoded, ``batch`` at a time.

        Raises:
            UserError: the folder cannot be written.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._row_of]
        if self._storage == "device":
            self._extend(new, batch)
        else:
            self._store(new, batch)
        return torch.tensor([self._row_of[text] for text in texts], dtype=torch.int64)

    def take(self, rows: Tensor) -> dict[str, Tensor]:
        """The embeddings at rows [R] int64: [R, ...] each, on the device. A row that occurs twice is moved there once."""
        if self._storage == "device":
            index = rows.to(self._device)
            return {name: column[index] for name, column in self._columns.items()}
        distinct, place = torch.unique(rows.cpu(), return_inverse=True)
        entries, place = [self._entry(row) for row in distinct.tolist()], place.to(self._device)
        return {name: torch.stack([entry[name] for entry in entries]).to(self._device)[place] for name in entries[0]}

    def _entry(self, row: int) -> dict[str, Tensor]:
        """From memory, or mapped from its file for as long as it is needed: a process may map only so many files at a time."""
        entry = self._entries[row]
        if isinstance(entry, dict):
            return entry
        found = self._read(entry)
        if found is None:
            where = f"the embedding of '{entry}' has gone from {self._folder}, or is damaged"
            raise UserError(f"model.prompt_folder: {where}; leave the folder alone while a run uses it")
        return found

    def _extend(self, new: Sequence[str], batch: int) -> None:
        found = [dict(self._embed(new[start : start + batch])) for start in range(0, len(new), batch)]
        if found:
            parts = [self._columns, *found] if self._columns else found
            self._columns = {name: torch.cat([part[name] for part in parts]) for name in found[0]}
            self._row_of |= {text: len(self._row_of) + offset for offset, text in enumerate(new)}

    def _store(self, new: Sequence[str], batch: int) -> None:
        missing = [text for text in new if self._read(text) is None]
        made: dict[str, dict[str, Tensor]] = {}
        for start in range(0, len(missing), batch):
            texts = missing[start : start + batch]
            columns = {name: column.cpu() for name, column in self._embed(texts).items()}
            for offset, text in enumerate(texts):
                entry = {name: column[offset].clone() for name, column in columns.items()}
                if self._storage == "disk":
                    self._write(text, entry)
                else:
                    made[text] = entry
        for text in new:
            entry = made[text] if text in made else self._read(text) or {}
            self._row_of[text] = len(self._row_of)
            self._entries.append(text if self._storage == "disk" else entry)
            self._pooled.append(entry["pooled"].clone())

    def _file(self, text: str) -> Path:
        assert self._folder is not None
        name = hashlib.sha256(f"{self._identity}\n{text}".encode()).hexdigest()
        return self._folder / name[:2] / f"{name}.safetensors"

    def _read(self, text: str) -> dict[str, Tensor] | None:
        """From its file, mapped into memory; None where there is none, or a damaged one, which is then made anew."""
        if self._storage != "disk":
            return None
        file = self._file(text)
        try:
            return load_file(file) if file.is_file() else None
        except SafetensorError:
            return None

    def _write(self, text: str, entry: dict[str, Tensor]) -> None:
        file = self._file(text)
        temporary = file.with_suffix(f".{uuid.uuid4().hex}.tmp")  # processes on other machines may have this one's number
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(entry, temporary)
            temporary.replace(file)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise UserError(f"model.prompt_folder: embeddings cannot be written to {self._folder} ({error}); free space, or choose another folder") from error
