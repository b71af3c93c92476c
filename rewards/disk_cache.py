"""A cache on disk by the hash of the content: sha256 key -> a small JSON object in a file of its own.

Safe for several threads, processes and machines that share the folder: an entry is written beside its place and renamed into it, so a reader sees all of it
or nothing. Each entry holds a checksum of itself; a damaged one counts as absent, with a warning. The size is not limited; `DiskCache.clear` empties it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from flowrl.types import UserError

__all__ = ["DiskCache"]

_log = logging.getLogger(__name__)
_DIGEST = re.compile(r"[0-9a-f]{64}")


class DiskCache:
    """Small JSON objects by content hash.

    Args:
        folder: is made, with its parents, if it is not there.
    Raises:
        UserError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder).expanduser()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the cache folder {self.folder} cannot be made ({error.strerror}); choose another one") from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise UserError(f"the cache folder {self.folder} cannot be written to; choose another one")
        self._write_failed = False

    @staticmethod
    def key(*parts: bytes | str) -> str:
        """The sha256 of the parts, 64 hexadecimal digits. Where one part ends and the next begins counts: ("ab", "c") is not ("a", "bc")."""
        digest = hashlib.sha256()
        for part in parts:
            data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8, "big"))
            digest.update(data)
        return digest.hexdigest()

    def get(self, key: bytes | str) -> dict[str, Any] | None:
        """The object stored under a key of `key`, or None; None with a warning where the entry is damaged or cannot be read.

        Raises:
            ValueError: the key is no sha256.
        """
        path = self._path(key)
        try:
            entry = json.loads(path.read_bytes())
            value, checksum = entry["value"], entry["sha256"]
            if isinstance(value, dict) and checksum == _checksum(value):
                return value
            reason = "its checksum does not fit"
        except FileNotFoundError:
            return None
        except OSError as error:
            reason = str(error.strerror)
        except (ValueError, KeyError, TypeError, RecursionError):
            reason = "it is no entry of a cache"
        _log.warning("the cache entry %s is ignored: %s", path, reason)
        return None

    def put(self, key: bytes | str, value: dict[str, Any]) -> None:
        """Store an object of JSON values under a key of `key`, in place of what was there. If the disk refuses, the first time is logged as a warning.

        Raises:
            ValueError: the key is no sha256, or a number is NaN or infinite.
            TypeError: a value that JSON does not know.
        """
        path = self._path(key)
        data = json.dumps({"value": value, "sha256": _checksum(value)}, allow_nan=False).encode()
        temporary = ""
        try:
            path.parent.mkdir(exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=path.stem[:16], suffix=".part", dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, path)  # noqa: PTH105 - `temporary` is a plain string
        except OSError as error:
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            if not self._write_failed:
                self._write_failed = True
                _log.warning("the cache in %s cannot be written to (%s); replies are no longer kept", self.folder, error.strerror)

    def clear(self) -> int:
        """Remove all entries, and what interrupted writers left behind; returns the number of entries."""
        entries = list(self.folder.glob("[0-9a-f][0-9a-f]/*.json"))
        for path in [*entries, *self.folder.glob("[0-9a-f][0-9a-f]/*.part")]:
            path.unlink(missing_ok=True)
        return len(entries)

    def _path(self, key: bytes | str) -> Path:
        name = key.hex() if isinstance(key, bytes) else key
        if not _DIGEST.fullmatch(name):
            raise ValueError(f"a cache key is a sha256, 32 bytes or 64 hexadecimal digits, not {name!r}")
        return self.folder / name[:2] / f"{name}.json"


def _checksum(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
