"""flowrl/scoring.py and flowrl/picture_files.py: files of every kind become the right pixels, rows keep the order of the input, nothing is lost on the way."""

from __future__ import annotations

import csv
import io
import json
import re
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from flowrl.picture_files import find_pictures, picture_size, read_picture
from flowrl.scoring import (
    Item,
    _InOrder,
    _plan,
    make_rewards,
    pick_device,
    picture_items,
    progress_bar,
    text_items,
    write_scores,
)
from flowrl.types import Prompt, RewardInfo, SampleBatch, Scores, UserError
from rewards.composite import Entry, WeightedRewards

CPU = torch.device("cpu")
RED = (255, 0, 0)


class Brightness:
    """Mean pixel; the mean red as a raw column; what is darker than `least` cannot be scored."""

    def __init__(self, least: float = 0.0, scope: Literal["sample", "group"] = "sample", fail_at: int | None = None, error: type[BaseException] = ValueError):
        self.info = RewardInfo("brightness", "mean pixel", 0.0, 1.0, scope=scope, reads=("images",))
        self.least, self.fail_at, self.error = least, fail_at, error
        self.calls: list[tuple[int, ...]] = []
        self.prompts: list[str] = []
        self.loaded: list[object] = []
        self.closed = False

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        self.loaded.append(dtype)

    def close(self) -> None:
        self.closed = True

    def score(self, batch: SampleBatch) -> Scores:
        assert batch.images is not None
        if self.fail_at is not None and len(self.calls) >= self.fail_at:
            raise self.error("planted")
        self.calls.append(tuple(batch.images.shape))
        self.prompts += [prompt.text for prompt in batch.prompts]
        values = batch.images.mean((1, 2, 3))
        valid = values >= self.least
        return Scores(
            values.where(valid, torch.nan), valid, {"red": batch.images[:, 0].mean((1, 2))}, {i: "too dark" for i in range(len(batch)) if not valid[i]}
        )


def save(path: Path, level: int = 128, size: tuple[int, int] = (8, 6), mode: str = "L") -> Path:
    Image.new(mode, size, level).save(path)
    return path


def run(
    rewards: WeightedRewards | Brightness,
    items: Sequence[Item],
    out: Path | None = None,
    as_json: bool = True,
    batch_size: int | None = None,
    skip_damaged: bool = False,
    stdout: io.StringIO | None = None,
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The rows that were written, and the summaries."""
    made = WeightedRewards([Entry("b", 0.0, rewards)]) if isinstance(rewards, Brightness) else rewards
    stream = stdout or io.StringIO()
    summaries = write_scores(made, items, out, stream, as_json, CPU, None, batch_size, skip_damaged, lambda done: None)
    return rows_of(stream.getvalue() if out is None else out.read_text(), as_json if out is None else out.suffix == ".jsonl"), summaries


def rows_of(text: str, as_json: bool) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()] if as_json else list(csv.DictReader(io.StringIO(text)))


# --- pictures


def test_a_folder_stands_for_its_pictures_sorted_by_name_and_a_file_for_itself(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    (folder / "below.png").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "c.webp", "d.bmp", "e.jpeg", ".hidden.png", "notes.txt"):
        (folder / name).touch()
    (folder / "below.png" / "x.png").touch()
    single = tmp_path / "z.png"
    single.touch()
    assert find_pictures([single, folder]) == [single, *(folder / name for name in ("a.JPG", "b.png", "c.webp", "d.bmp", "e.jpeg"))]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("none", r"none: no such file or folder$"),
        ("empty", r"empty: no pictures in this folder; they end in \.png, .*\.bmp, and folders inside it must be given by themselves$"),
        ("notes.txt", r"notes\.txt: is no picture that can be read; give \.png,"),
    ],
)
def test_a_place_without_pictures_is_named(tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=message):
        find_pictures([tmp_path / place])


def pixel(path: Path) -> list[int]:
    """The upper left pixel."""
    picture = read_picture(path)
    assert picture.dtype == torch.uint8
    assert picture.is_contiguous()
    return picture[:, 0, 0].tolist()


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    ("make", "suffix", "expected"),
    [
        (lambda: Image.new("RGB", (4, 4), RED), "png", [255, 0, 0]),
        (lambda: Image.new("L", (4, 4), 7), "png", [7, 7, 7]),
        (lambda: Image.new("1", (4, 4), 1), "png", [255, 255, 255]),
        (lambda: Image.new("RGB", (4, 4), RED), "bmp", [255, 0, 0]),
        (lambda: Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "png", [255, 255, 255]),  # nothing there: white
        (lambda: Image.new("RGBA", (4, 4), (255, 0, 0, 51)), "png", [255, 204, 204]),  # 0.2 red on 0.8 white
        (lambda: Image.new("LA", (4, 4), (0, 51)), "png", [204, 204, 204]),
        (lambda: Image.new("P", (4, 4), 0), "png", [0, 0, 0]),
        (palette_with_transparency, "png", [255, 255, 255]),
        (lambda: Image.fromarray(np.full((4, 4), 65535, np.uint16)), "png", [255, 255, 255]),
        (lambda: Image.fromarray(np.full((4, 4), 1000, np.uint16)), "png", [4, 4, 4]),  # 1000 / 257 = 3.89
        (lambda: Image.new("RGB", (4, 4), RED), "webp", None),
        (lambda: Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "jpg", None),
    ],
)
def test_a_picture_of_any_mode_becomes_the_right_rgb(tmp_path: Path, make: Callable[[], Image.Image], suffix: str, expected: list[int] | None) -> None:
    path = tmp_path / f"a.{suffix}"
    make().save(path)
    assert read_picture(path).shape == (3, 4, 4)
    if expected is not None:
        assert pixel(path) == expected
    else:  # lossy: red all the same
        red, green, blue = pixel(path)
        assert red > 240
        assert max(green, blue) < 15


def test_levels_beyond_16_bit_are_refused(tmp_path: Path) -> None:
    from flowrl.picture_files import _rgb

    with pytest.raises(UserError, match=r"^a\.png: has grey levels beyond 16 bit; convert it to 8 bit$"):
        _rgb(Path("a.png"), Image.fromarray(np.full((2, 2), 65536, np.int32)))
    assert _rgb(Path("a.png"), Image.fromarray(np.full((2, 2), 257, np.int32))).getpixel((0, 0)) == (1, 1, 1)


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    image = Image.new("L", (6, 4), 0)
    image.putpixel((0, 3), 255)  # lower left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    image.save(tmp_path / "a.png", exif=exif)
    picture = read_picture(tmp_path / "a.png")
    assert picture.shape == (3, 6, 4)
    assert picture[0].nonzero().tolist() == [[0, 0]]  # lower left has become upper left
    assert picture_size(tmp_path / "a.png") == (6, 4)


def huge_png() -> bytes:
    """A PNG of 200 bytes that says it has 10^10 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: b"", r"is no PNG, JPEG, WebP or BMP picture, or its beginning is damaged$"),
        (lambda whole: b"GIF89a" + whole, r"is no PNG, JPEG, WebP or BMP picture, or its beginning is damaged$"),
        (lambda whole: whole[:70], r"cannot be read as a picture \(.*\)$"),
        (lambda whole: huge_png(), r"cannot be read as a picture \(DecompressionBombError: .*\)$"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: {message}") as caught:
        read_picture(path)
    assert "\n" not in str(caught.value)


def test_an_animation_is_refused_and_a_camera_file_with_a_preview_is_not(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4))
    first.save(tmp_path / "a.webp", save_all=True, append_images=[second])
    with pytest.raises(UserError, match=r"a\.webp: is an animation of 2 frames; give still pictures$"):
        read_picture(tmp_path / "a.webp")
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    assert pixel(tmp_path / "a.jpg")[0] > 240


# --- prompts and texts


def test_prompts_go_to_the_pictures_in_their_order_with_their_metadata(tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        save(tmp_path / name)
    (tmp_path / "p.jsonl").write_text('{"prompt": "first", "tag": 1}\n{"prompt": "second"}\n')
    assert picture_items([tmp_path], None, tmp_path / "p.jsonl") == [
        Item(str(tmp_path / "a.png"), Prompt("first", {"tag": 1})),
        Item(str(tmp_path / "b.png"), Prompt("second")),
    ]
    assert [item.prompt.text for item in picture_items([tmp_path], "one for all", None)] == ["one for all"] * 2
    assert [item.prompt.text for item in picture_items([tmp_path], None, None)] == ["", ""]


def test_a_key_file_assigns_prompts_by_name_or_path_whatever_the_order(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for name in ("a.png", "b.png", "x/a.png"):
        save(tmp_path / name)
    lines = [{"prompt": "of b", "file": "b.png"}, {"prompt": "of x/a", "file": str(tmp_path / "x/a.png")}, {"prompt": "of a", "file": "a.png", "tag": 1}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    items = picture_items([tmp_path, tmp_path / "x"], None, tmp_path / "p.jsonl")
    assert [(item.prompt.text, dict(item.prompt.metadata)) for item in items] == [("of a", {"tag": 1}), ("of b", {}), ("of x/a", {})]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": "a"}'], r"1 prompts for 2 pictures; give one for each, in their order, or a `file` key on every line$"),
        (['{"prompt": "a", "file": "a.png"}', '{"prompt": "b"}'], r"no lines whose `file` is .*b\.png or b\.png; give one for every picture$"),
        (['{"prompt": "a", "file": "a.png"}'] * 2, r"2 lines whose `file` is .*a\.png or a\.png;"),
    ],
)
def test_prompts_that_do_not_fit_the_pictures_are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    for name in ("a.png", "b.png"):
        save(tmp_path / name)
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        picture_items([tmp_path], None, tmp_path / "p.jsonl")
    with pytest.raises(UserError, match=r"^--prompt and --prompts exclude each other"):
        picture_items([tmp_path], "a", tmp_path / "p.jsonl")


def test_texts_are_read_with_their_prompts_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "2 + 2?", "completion": "4", "answer": "4"}\n{"prompt": "x", "completion": ""}\n')
    assert text_items(path) == [Item(f"{path}:1", Prompt("2 + 2?", {"answer": "4"}), "4"), Item(f"{path}:2", Prompt("x"), "")]
    path.write_text('{"prompt": "2 + 2?", "completion": "4"}\n{"prompt": "x", "completion": 4}\n')
    with pytest.raises(UserError, match=r"t\.jsonl: line 2 needs a text under `completion`, for example"):
        text_items(path)
    with pytest.raises(UserError, match=r"^texts a\.txt: give a \.jsonl file"):
        text_items(Path("a.txt"))


# --- what fits what


class Reads(Brightness):
    def __init__(self, *reads: Any, metadata: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.info = RewardInfo("reads", "", 0.0, 1.0, reads=reads, metadata=metadata)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Name -> what the registry gives for it in flowrl.scoring."""
    table: dict[str, object] = {}
    monkeypatch.setattr("flowrl.scoring.load_reward", lambda name, args: table[name])
    return table


@pytest.mark.parametrize(
    ("name", "reward", "item", "message"),
    [
        ("p", Reads("images"), Item("t:1", Prompt("a"), "text"), r"^reward p scores pictures; give IMAGES instead of --texts$"),
        ("t", Reads("prompt", "texts"), Item("a.png", Prompt("a")), r"^reward t scores texts; give --texts FILE\.jsonl instead of IMAGES$"),
        ("c", Reads("prompt", "images"), Item("a.png", Prompt("")), r"^reward c reads the prompt; give --prompt TEXT or --prompts FILE"),
        ("m", Reads("prompt", metadata=("tag",)), Item("a.png", Prompt("a")), r"^reward m needs `tag` in the metadata of every prompt; 1 of 1 prompts lack it"),
        ("file", Reads("images"), Item("a.png", Prompt("a")), r"^reward file has the name of a column of the output"),
    ],
)
def test_a_reward_that_cannot_score_the_input_says_so_before_it_is_loaded(
    planted: dict[str, object], name: str, reward: Reads, item: Item, message: str
) -> None:
    planted[name] = reward
    with pytest.raises(UserError, match=message):
        make_rewards([(name, {})], [item], None)
    assert reward.loaded == []


def test_a_function_may_score_pictures_without_prompts_and_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    (tmp_path / "planted_score.py").write_text(
        "def size(batch): return [float(len(t)) for t in batch.texts] if batch.texts else batch.images.mean((1, 2, 3))\n"
    )
    save(tmp_path / "a.png", 255)
    rows, _ = run(make_rewards([("planted_score:size", {})], items := picture_items([tmp_path], None, None), None), items)
    assert rows == [{"file": str(tmp_path / "a.png"), "prompt": "", "planted_score:size": 1.0, "valid": True, "problem": ""}]
    items = [Item("t:1", Prompt("p"), "four"), Item("t:2", Prompt("q"), "")]
    rows, _ = run(make_rewards([("planted_score:size", {})], items, 1), items, as_json=False)
    assert [(row["file"], row["planted_score:size"]) for row in rows] == [("t:1", "4.0"), ("t:2", "0.0")]


# --- rows


def test_rows_keep_the_input_order_while_equal_sizes_are_scored_together(tmp_path: Path) -> None:
    sizes = [(8, 6), (4, 4), (8, 6), (4, 4), (8, 6), (8, 6)]
    items = [Item(str(save(tmp_path / f"{i}.png", 40 * i, size)), Prompt(f"p{i}")) for i, size in enumerate(sizes)]
    reward = Brightness()
    rows, (summary,) = run(reward, items, batch_size=3)
    assert reward.calls == [(3, 3, 6, 8), (2, 3, 4, 4), (1, 3, 6, 8)]
    assert [(row["file"], row["prompt"]) for row in rows] == [(item.file, item.prompt.text) for item in items]
    assert [row["b"] for row in rows] == pytest.approx([40 * i / 255 for i in range(6)], abs=1e-6)
    assert [row["b/red"] for row in rows] == pytest.approx([row["b"] for row in rows])
    assert summary.as_dict() == {"reward": "b", "scored": 6, "not_scored": 0, "mean": pytest.approx(100 / 255), "min": 0.0, "max": pytest.approx(200 / 255)}
    assert reward.loaded == [torch.float32]
    assert reward.closed


def test_csv_and_json_lines_hold_the_same_and_a_missing_score_is_empty(tmp_path: Path) -> None:
    items = [Item(str(save(tmp_path / f"{level}.png", level)), Prompt('with, comma and "quotes"\nü')) for level in (0, 51)]
    reward = Brightness(least=0.1)
    as_json, (summary,) = run(reward, items)
    assert as_json == [
        {"file": items[0].file, "prompt": items[0].prompt.text, "b": None, "valid": False, "b/red": 0.0, "problem": "b: too dark"},
        {"file": items[1].file, "prompt": items[1].prompt.text, "b": 0.2, "valid": True, "b/red": pytest.approx(0.2), "problem": ""},
    ]
    as_csv, _ = run(reward, items, out=tmp_path / "s.csv")
    assert as_csv == [
        {key: "" if value is None else str(value).lower() if value is not items[0].prompt.text else value for key, value in row.items()} for row in as_json
    ]
    assert run(reward, items, out=tmp_path / "s.jsonl", as_json=False)[0] == as_json
    assert (summary.as_dict()["scored"], summary.as_dict()["not_scored"]) == (1, 1)


def test_several_rewards_have_their_columns_and_all_their_reasons(tmp_path: Path) -> None:
    items = [Item(str(save(tmp_path / "a.png", 51)), Prompt(""))]
    rewards = WeightedRewards([Entry("x", 0.0, Brightness(least=0.5)), Entry("y", 0.0, Brightness()), Entry("z", 0.0, Brightness(least=0.9))])
    (row,), summaries = run(rewards, items)
    assert (row["x"], row["y"], row["z"], row["valid"]) == (None, 0.2, None, False)
    assert row["problem"] == "x: too dark; z: too dark"
    assert {"x/red", "y/red", "z/red"} <= row.keys()
    assert [(summary.reward, summary.as_dict()["mean"]) for summary in summaries] == [("x", None), ("y", 0.2), ("z", None)]


def test_a_negative_zero_is_written_as_zero(tmp_path: Path) -> None:
    class Minus(Brightness):
        def score(self, batch: SampleBatch) -> Scores:
            return Scores(torch.tensor([-0.0]), torch.tensor([True]))

    written = io.StringIO()
    run(Minus(), [Item(str(save(tmp_path / "a.png")), Prompt(""))], stdout=written)
    assert '"b": 0.0' in written.getvalue()


def test_a_sample_without_a_reason_says_that_there_is_none(tmp_path: Path) -> None:
    class Silent(Brightness):
        def score(self, batch: SampleBatch) -> Scores:
            return Scores(torch.tensor([torch.nan]), torch.tensor([False]), {"odd": torch.tensor([torch.inf])})

    (row,), _ = run(Silent(), [Item(str(save(tmp_path / "a.png")), Prompt(""))])
    assert (row["problem"], row["b/odd"]) == ("b: it gave no reason", None)


@pytest.mark.parametrize("as_json", [True, False])
def test_damaged_files_stop_the_call_or_get_a_row_with_the_reason(tmp_path: Path, as_json: bool) -> None:
    items = [Item(str(save(tmp_path / f"{i}.png", 51 * i, (16, 16), "L")), Prompt("")) for i in range(5)]
    Path(items[0].file).write_bytes(b"nothing")  # the first bytes say so
    whole = Path(items[3].file)
    whole.write_bytes(whole.read_bytes()[:50])  # only the reading finds out
    reward = Brightness()
    with pytest.raises(UserError, match=r"0\.png: is no PNG"):
        run(reward, items)
    assert reward.loaded == []
    rows, (summary,) = run(reward, items, as_json=as_json, skip_damaged=True, batch_size=2)
    assert [row["file"] for row in rows] == [item.file for item in items]
    assert [bool(row["problem"]) for row in rows] == [True, False, False, True, False]
    assert [row["valid"] in (True, "true") for row in rows] == [False, True, True, False, True]
    assert rows[0]["problem"] == "is no PNG, JPEG, WebP or BMP picture, or its beginning is damaged"
    assert rows[3]["problem"].startswith("cannot be read as a picture (")
    assert (summary.as_dict()["scored"], summary.as_dict()["not_scored"]) == (3, 2)
    written = io.StringIO()
    with pytest.raises(UserError, match=r"3\.png: cannot be read as a picture"):
        run(reward, items[1:], batch_size=1, stdout=written)
    assert len(written.getvalue().splitlines()) == 2  # those before it


def test_when_nothing_can_be_read_every_row_says_why(tmp_path: Path) -> None:
    items = [Item(str(tmp_path / f"{i}.png"), Prompt("")) for i in range(2)]
    for item in items:
        Path(item.file).write_bytes(b"nothing")
    rows, (summary,) = run(Brightness(), items, as_json=False, skip_damaged=True)
    assert [(row["b"], row["valid"], bool(row["problem"])) for row in rows] == [("", "false", True)] * 2
    assert summary.as_dict()["mean"] is None


@pytest.mark.parametrize(("error", "raised"), [(KeyboardInterrupt, KeyboardInterrupt), (ValueError, UserError)])
def test_an_interrupted_call_keeps_every_row_that_was_scored(tmp_path: Path, error: type[BaseException], raised: type[BaseException]) -> None:
    sizes = [(8, 6), (4, 4), (8, 6), (8, 6)]  # batches: 0 and 2, 1, 3
    items = [Item(str(save(tmp_path / f"{i}.png", i, size)), Prompt("")) for i, size in enumerate(sizes)]
    reward = Brightness(fail_at=1, error=error)
    out = tmp_path / "s.csv"
    with pytest.raises(raised):
        run(reward, items, out=out, batch_size=2)
    assert [row["file"] for row in rows_of(out.read_text(), False)] == [items[0].file, items[2].file]
    assert reward.closed


def test_photographs_that_lie_on_their_side_are_batched_apart(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (8, 6), 255).save(tmp_path / "a.jpg")
    Image.new("L", (8, 6), 0).save(tmp_path / "b.jpg", exif=exif)
    reward = Brightness()
    rows, _ = run(reward, picture_items([tmp_path], None, None))
    assert reward.calls == [(1, 3, 6, 8), (1, 3, 8, 6)]
    assert [row["b"] for row in rows] == [1.0, 0.0]


def test_a_group_reward_gets_all_pictures_of_a_prompt_and_wants_one_size(tmp_path: Path) -> None:
    prompts = ["a", "b", "a", "b", "a"]
    items = [Item(str(save(tmp_path / f"{i}.png", i)), Prompt(prompt)) for i, prompt in enumerate(prompts)]
    reward = Brightness(scope="group")
    rows, _ = run(reward, items, batch_size=2)
    assert [call[0] for call in reward.calls] == [3, 2]
    assert reward.prompts == ["a", "a", "a", "b", "b"]
    assert [row["file"] for row in rows] == [item.file for item in items]
    save(tmp_path / "4.png", 0, (4, 4))
    with pytest.raises(UserError, match=r"0\.png \(8 x 6\) and .*4\.png \(4 x 4\) have one prompt and are compared with each other, but differ in size"):
        run(reward, items)
    texts = [Item(f"t:{i}", Prompt(prompt), "x") for i, prompt in enumerate(prompts)]
    assert _plan(texts, dict.fromkeys(range(5)), 2, True) == [[0, 2, 4], [1, 3]]
    assert _plan(texts, dict.fromkeys(range(5)), 2, False) == [[0, 1], [2, 3], [4]]


def test_a_reward_that_learns_when_it_is_loaded_that_it_compares_gets_whole_groups(tmp_path: Path) -> None:
    class Remote(Brightness):
        def load(self, device: torch.device, dtype: torch.dtype) -> None:
            self.info = RewardInfo("remote", "", 0.0, 1.0, scope="group", metadata=self.wants)

        wants: tuple[str, ...] = ()

    reward = Remote()
    items = [Item(str(save(tmp_path / f"{i}.png", i)), Prompt("a")) for i in range(3)]
    run(reward, items, batch_size=1)
    assert [call[0] for call in reward.calls] == [3]
    reward.wants = ("tag",)
    with pytest.raises(UserError, match="^reward b needs `tag` in the metadata of every prompt; 3 of 3 prompts lack it"):
        run(reward, items)


@pytest.mark.parametrize("name", ["s.txt", "s"])
def test_an_output_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    item = Item(str(save(tmp_path / "a.png")), Prompt(""))
    with pytest.raises(UserError, match=rf"^--out .*{name}: give a name that ends in \.csv or \.jsonl$"):
        run(Brightness(), [item], out=tmp_path / name)


def test_an_output_that_cannot_be_written_is_found_before_loading_and_a_failure_to_load_keeps_the_old_one(tmp_path: Path) -> None:
    item = Item(str(save(tmp_path / "a.png")), Prompt(""))
    reward = Brightness()
    with pytest.raises(UserError, match=r"^--out .*none/s\.csv: cannot be written \(No such file or directory\)$"):
        run(reward, [item], out=tmp_path / "none" / "s.csv")
    assert reward.loaded == []

    class Heavy(Brightness):
        def load(self, device: torch.device, dtype: torch.dtype) -> None:
            raise UserError("reward heavy: no weights")

    old = tmp_path / "s.csv"
    old.write_text("old\n")
    with pytest.raises(UserError, match="no weights"):
        run(Heavy(), [item], out=old)
    assert old.read_text() == "old\n"
    rows, _ = run(reward, [item], out=old)
    assert [row["file"] for row in rows] == [item.file]


def test_raw_columns_that_come_late_are_an_error_in_a_csv_and_none_in_json_lines(tmp_path: Path) -> None:
    class Fickle(Brightness):
        def score(self, batch: SampleBatch) -> Scores:
            scores = super().score(batch)
            return Scores(scores.values, scores.valid, dict(scores.raw) if len(self.calls) > 1 else {})

    items = [Item(str(save(tmp_path / f"{i}.png", i)), Prompt("")) for i in range(2)]
    with pytest.raises(UserError, match=r"^the raw column b/red came after the first rows"):
        run(Fickle(), items, as_json=False, batch_size=1)
    rows, _ = run(Fickle(), items, batch_size=1)
    assert ["b/red" in row for row in rows] == [False, True]


@given(order=st.permutations(range(8)), done=st.integers(0, 8))
def test_rows_in_any_order_come_out_in_order_each_as_soon_as_it_can(order: list[int], done: int) -> None:
    written: list[int] = []
    rows = _InOrder(written.append)  # type: ignore[arg-type]
    seen: set[int] = set()
    for index in order[:done]:
        rows.put(index, index)  # type: ignore[arg-type]
        seen.add(index)
        assert written == list(range(next(i for i in range(9) if i not in seen)))
    rows.close()
    assert written == sorted(seen)


def test_devices_are_named_as_torch_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == CPU
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert pick_device("auto") == CPU
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    assert pick_device("auto") == torch.device("cuda")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=rf"^--device {name}: torch cannot use it \(.*\); use auto, cpu, or a device such as cuda:0$"):
            pick_device(name)


@pytest.mark.parametrize(("terminal", "enabled", "shown"), [(True, True, True), (True, False, False), (False, True, False)])
def test_the_bar_is_shown_on_terminals_only(terminal: bool, enabled: bool, shown: bool) -> None:
    stream = io.StringIO()
    with progress_bar(4, enabled=enabled, console=Console(file=stream, force_terminal=terminal, width=80)) as advance:
        advance(3)
    assert ("3/4" in stream.getvalue()) == shown


def test_the_metadata_of_prompts_reaches_the_reward(tmp_path: Path) -> None:
    seen: list[Mapping[str, Any]] = []

    class Watching(Brightness):
        def score(self, batch: SampleBatch) -> Scores:
            seen.extend(prompt.metadata for prompt in batch.prompts)
            return super().score(batch)

    run(Watching(), [Item(str(save(tmp_path / "a.png")), Prompt("p", {"tag": "two"}))])
    assert seen == [{"tag": "two"}]
