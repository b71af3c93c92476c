"""rewards/disk_cache.py: keys, atomic entries, damaged entries, several processes, and disks that refuse."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowrl.types import UserError
from rewards import disk_cache
from rewards.disk_cache import DiskCache

KEY = DiskCache.key("a", b"picture")
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_what_was_put_is_got_also_by_another_object(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "new" / "cache")
    assert cache.get(KEY) is None
    cache.put(KEY, {"score": 0.1, "text": "größer\n", "list": [1, None, True]})
    assert DiskCache(tmp_path / "new" / "cache").get(bytes.fromhex(KEY)) == {"score": 0.1, "text": "größer\n", "list": [1, None, True]}
    cache.put(KEY, {"score": 0.2})
    assert cache.get(KEY) == {"score": 0.2}
    assert [path.relative_to(cache.folder).as_posix() for path in cache.folder.rglob("*") if path.is_file()] == [f"{KEY[:2]}/{KEY}.json"]


@given(value=st.dictionaries(st.text(), JSON_VALUES, max_size=4))
@settings(deadline=None, max_examples=50)
def test_every_json_object_survives(tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any]) -> None:
    cache = DiskCache(tmp_path_factory.getbasetemp() / "cache-of-everything")
    cache.put(KEY, value)
    assert cache.get(KEY) == value


def test_a_key_is_the_sha256_of_the_parts_each_behind_its_length() -> None:
    by_hand = hashlib.sha256(b"\0\0\0\0\0\0\0\1a" + b"\0\0\0\0\0\0\0\2\xc3\xbc").hexdigest()
    assert DiskCache.key("a", "ü") == DiskCache.key(b"a", b"\xc3\xbc") == by_hand
    assert len({DiskCache.key(*parts) for parts in [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("", "abc")]}) == 5
    assert DiskCache.key("\ud800") != DiskCache.key("?")  # half a character, which prompts can hold


@pytest.mark.parametrize("key", ["", "../../x", "a" * 63, "A" * 64, b"short", KEY + "\n"])
def test_a_key_that_is_no_hash_is_refused(tmp_path: Path, key: bytes | str) -> None:
    cache = DiskCache(tmp_path)
    with pytest.raises(ValueError, match="a cache key is a sha256"):
        cache.put(key, {})
    with pytest.raises(ValueError, match="a cache key is a sha256"):
        cache.get(key)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [{"a": float("nan")}, {"a": float("inf")}])
def test_numbers_that_json_does_not_know_are_refused(tmp_path: Path, value: dict[str, Any]) -> None:
    cache = DiskCache(tmp_path)
    with pytest.raises(ValueError, match="JSON compliant"):
        cache.put(KEY, value)
    assert cache.get(KEY) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: b"\xff\xfe" + data,
        lambda data: data.replace(b"0.25", b"0.75"),
        lambda data: b"[1]",
        lambda data: b"7",
        lambda data: b"{}",
        lambda data: json.dumps({"value": 3, "sha256": ""}).encode(),
        lambda data: b"[" * 100_000,
    ],
)
def test_a_damaged_entry_is_absent_with_a_warning_and_can_be_replaced(tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    cache = DiskCache(tmp_path)
    cache.put(KEY, {"score": 0.25})
    path = tmp_path / KEY[:2] / f"{KEY}.json"
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert cache.get(KEY) is None
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    cache.put(KEY, {"score": 0.5})
    assert cache.get(KEY) == {"score": 0.5}


def test_an_entry_that_cannot_be_read_is_absent_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / KEY[:2] / f"{KEY}.json").mkdir(parents=True)
    assert DiskCache(tmp_path).get(KEY) is None
    assert "Is a directory" in caplog.text


def test_a_disk_that_refuses_is_one_warning_and_leaves_nothing_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = DiskCache(tmp_path)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    cache.put(KEY, {"score": 1})
    cache.put(KEY, {"score": 1})
    assert caplog.text.count("No space left on device") == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    monkeypatch.undo()
    elsewhere = DiskCache(tmp_path)
    (tmp_path / KEY[:2]).rmdir()
    (tmp_path / KEY[:2]).write_text("a file where a folder should be")
    elsewhere.put(KEY, {"score": 1})
    assert "File exists" in caplog.text
    assert elsewhere.get(KEY) is None


def test_clear_removes_entries_and_what_interrupted_writers_left(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    for i in range(5):
        cache.put(DiskCache.key(str(i)), {"i": i})
    (tmp_path / KEY[:2]).mkdir(exist_ok=True)
    (tmp_path / KEY[:2] / "half.part").write_text("{")
    (tmp_path / "notes.txt").write_text("not ours")
    assert cache.clear() == 5
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["notes.txt"]
    assert cache.get(DiskCache.key("0")) is None
    cache.put(KEY, {"i": 7})
    assert cache.clear() == 1


def test_a_folder_that_cannot_be_used_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the cache folder .*file.deeper cannot be made \(Not a directory\); choose another one"):
        DiskCache(tmp_path / "file" / "deeper")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # permissions do not bind the user that containers run as
    with pytest.raises(UserError, match="cannot be written to; choose another one"):
        DiskCache(tmp_path)


WRITER = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("disk_cache", sys.argv[1])  # the file alone: the package would import torch
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
cache = module.DiskCache(pathlib.Path(sys.argv[2]))
for i in range(200):
    cache.put(module.DiskCache.key(str(i % 10)), {"writer": sys.argv[3] * 2000})
"""


def test_readers_see_whole_entries_while_processes_and_threads_write_the_same_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = DiskCache(tmp_path)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(disk_cache.__file__), str(tmp_path), str(i)]) for i in range(2)]
    found: set[str] = set()

    def write() -> None:
        for i in range(200):
            cache.put(DiskCache.key(str(i % 10)), {"writer": "t" * 2000})

    thread = threading.Thread(target=write)
    thread.start()
    while any(writer.poll() is None for writer in writers):
        for i in range(10):
            entry = cache.get(DiskCache.key(str(i)))
            if entry is not None:
                assert len(entry["writer"]) == 2000
                assert len(set(entry["writer"])) == 1
                found.add(entry["writer"][0])
    thread.join()
    assert [writer.wait() for writer in writers] == [0, 0]
    assert found >= {"t"}
    assert found & {"0", "1"}
    assert caplog.records == []
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".json"] == []
