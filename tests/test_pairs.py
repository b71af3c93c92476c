"""Preference data: reading pairs from files and tables, making them from rollouts, and the commands around them."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from loading import load_script
from PIL import Image
from safetensors.torch import load_file, save_file
from test_rollout_log import scores

from flowrl.cli import main
from flowrl.config import Config
from flowrl.pairing import PairCounts, best_against_worst, make_pairs, sample_rollouts
from flowrl.pairs import PairSet, load_pairs
from flowrl.rollout_log import load_rollouts, save_rollout
from flowrl.trainer import Trainer
from flowrl.types import Prompt, UserError

ROOT = Path(__file__).parent.parent
RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 255, 0)
SIZE, LATENT = (4, 6), (2, 3, 3)  # height, width; channels, height, width


def picture(color: tuple[int, ...], *, width: int = 6, height: int = 4, mode: str = "RGB", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height), color if len(color) > 1 else color[0]).save(file, format=kind)
    return file.getvalue()


def write_lines(folder: Path, *lines: dict[str, Any]) -> Path:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def pair_of_pictures(folder: Path) -> dict[str, Any]:
    (folder / "a.png").write_bytes(picture(RED))
    (folder / "b.png").write_bytes(picture(BLUE))
    return {"prompt": "a red circle", "chosen": "a.png", "rejected": "b.png"}


def pair_of_latents(folder: Path) -> dict[str, Any]:
    save_file({"latent": torch.full(LATENT, 1.0)}, folder / "a.safetensors")
    np.save(folder / "b.npy", np.full(LATENT, 2.0))
    return {"prompt": "a red circle", "chosen": "a.safetensors", "rejected": "b.npy"}


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read(pairs: PairSet) -> torch.Tensor:
    return pairs.load(range(len(pairs)), SIZE, LATENT)


# --- files --------------------------------------------------------------------------------------------------------------------------------------


def test_pictures_are_read_relative_to_the_list_with_the_chosen_one_first(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.JPG").write_bytes(picture(GREEN, kind="JPEG"))
    (tmp_path / "d.webp").write_bytes(picture(BLUE, kind="WEBP"))
    first = pair_of_pictures(tmp_path) | {"source": "x", "metadata": {"count": 1}}
    pairs = load_pairs(write_lines(tmp_path, first, {"prompt": " two cats ", "chosen": "sub/c.JPG", "rejected": str(tmp_path / "d.webp")}))
    assert (len(pairs), pairs.is_latent, pairs.dropped) == (2, False, 0)
    assert pairs.prompts == [Prompt("a red circle", {"source": "x", "count": 1}), Prompt("two cats")]
    images = read(pairs)
    assert images.shape == (2, 2, 3, *SIZE)
    assert images.dtype == torch.float32
    assert torch.equal(images[0, 0], torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, *SIZE))
    assert torch.equal(images[0, 1], torch.tensor([0.0, 0.0, 1.0])[:, None, None].expand(3, *SIZE))
    assert images[1].mean((2, 3)).tolist() == [pytest.approx([0, 1, 0], abs=0.02), pytest.approx([0, 0, 1], abs=0.03)]  # jpg and webp lose a little
    assert torch.equal(pairs.load([1, 0, 1], SIZE, LATENT), images[[1, 0, 1]])
    pairs.check(SIZE, LATENT)


def test_a_picture_of_another_shape_is_cut_around_its_centre_and_resized(tmp_path: Path) -> None:
    # 12 x 4: the middle 4 x 4, columns 4..7, is white; a stretched picture would be grey, one cut elsewhere black.
    wide = np.zeros((4, 12, 3), dtype=np.uint8)
    wide[:, 4:8] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    tall = np.full((16, 8, 3), 255, dtype=np.uint8)
    tall[4:12] = 0
    Image.fromarray(tall).save(tmp_path / "tall.png")
    pairs = load_pairs(write_lines(tmp_path, {"prompt": "a", "chosen": "wide.png", "rejected": "tall.png"}))
    images = pairs.load([0], (8, 8), LATENT)
    assert images.shape == (1, 2, 3, 8, 8)
    assert torch.equal(images[0, 0], torch.ones(3, 8, 8))  # twice as large
    assert torch.equal(images[0, 1], torch.zeros(3, 8, 8))
    # Of the same aspect ratio, so nothing is cut: PIL's own reduction by two, whose ringing at the edge of black and white is Lanczos'.
    half = Image.open(tmp_path / "wide.png").resize((6, 2), Image.Resampling.LANCZOS)
    expected = torch.from_numpy(np.asarray(half, dtype=np.float32) / 255).permute(2, 0, 1)
    assert torch.equal(pairs.load([0], (2, 6), LATENT)[0, 0], expected)


def test_a_photograph_stands_upright_and_grey_palette_and_alpha_become_rgb(tmp_path: Path) -> None:
    turned = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8))  # red left of blue
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise, so red is above blue
    turned.save(tmp_path / "turned.png", exif=exif)
    (tmp_path / "grey.png").write_bytes(picture((51,), mode="L"))
    Image.new("RGB", (6, 4), RED).convert("P").save(tmp_path / "palette.png")
    (tmp_path / "alpha.png").write_bytes(picture((0, 255, 0, 255), mode="RGBA"))
    lines = [{"prompt": "a", "chosen": "turned.png", "rejected": "grey.png"}, {"prompt": "a", "chosen": "palette.png", "rejected": "alpha.png"}]
    pairs = load_pairs(write_lines(tmp_path, *lines))
    upright = pairs.load([0], (2, 1), LATENT)[0]
    assert upright[0, :, :, 0].T.tolist() == [[1, 0, 0], [0, 0, 1]]
    images = read(pairs)
    assert torch.allclose(images[0, 1], torch.tensor(0.2))  # 51 / 255
    assert images[1].mean((2, 3)).tolist() == [[1, 0, 0], [0, 1, 0]]


def test_latents_are_read_from_both_formats_and_a_folder_stands_for_its_list(tmp_path: Path) -> None:
    write_lines(tmp_path, pair_of_latents(tmp_path))
    pairs = load_pairs(tmp_path)
    assert pairs.is_latent
    latents = read(pairs)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, torch.stack([torch.full(LATENT, 1.0), torch.full(LATENT, 2.0)])[None])
    assert refusal(lambda: pairs.check(SIZE, (16, 3, 3))) == (
        f"pairs {tmp_path / 'pairs.jsonl'}: line 1: chosen {tmp_path / 'a.safetensors'} has the shape (2, 3, 3), the model's latents (16, 3, 3); "
        "use pairs made for this model"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a", "chosen": "a.png"}, "line 2 has no `rejected`; every pair needs prompt, chosen and rejected"),
        ({"prompt": "a", "chosen": "a.png", "rejeted": "b.png"}, "line 2 has no `rejected`; did you mean rejeted? write `rejected`"),
        ({"prompt": 7, "chosen": "a.png", "rejected": "b.png"}, "line 2 needs a non-empty text under `prompt`"),
        ({"prompt": "", "chosen": "a.png", "rejected": "b.png"}, "line 2 needs a non-empty text under `prompt`"),
        ({"prompt": "a", "chosen": "a.png", "rejected": 3}, "line 2: `rejected` is not the name of a file"),
        ({"prompt": "a", "chosen": "a.png", "rejected": "none.png"}, "none.png: no such file"),
        ({"prompt": "a", "chosen": "a.png", "rejected": "."}, "is neither a picture"),
        ({"prompt": "a", "chosen": "a.pt", "rejected": "b.png"}, "a.pt is neither a picture (.png, .jpg, .jpeg, .webp) nor a latent (.safetensors, .npy)"),
        ({"prompt": "a", "chosen": "a.png", "rejected": "a.png"}, "line 2: chosen and rejected are the same file; remove the pair"),
        ({"prompt": "a", "chosen": "a.png", "rejected": "x/../a.png"}, "line 2: chosen and rejected are the same file; remove the pair"),
        ({"prompt": "a", "chosen": "a.png", "rejected": "copy.png"}, "line 2: chosen and rejected have the same content; remove the pair"),
        ({"prompt": "a", "chosen": "a.png", "rejected": "text.png"}, "text.png is not a readable picture (cannot identify image file"),
        ({"prompt": "a", "chosen": "deep.png", "rejected": "b.png"}, "deep.png has pixels of the kind I;16, which would lose their range"),
        ({"prompt": "a", "chosen": "a.safetensors", "rejected": "b.png"}, "line 2: chosen "),
        ({"prompt": "a", "chosen": "a.png", "rejected": "b.npy"}, "b.npy is a latent among pictures; use two files of pairs, one for each kind"),
    ],
)
def test_a_wrong_line_of_pictures_is_refused_when_it_is_loaded(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    first = pair_of_pictures(tmp_path)
    pair_of_latents(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "copy.png").write_bytes(picture(RED))
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "deep.png").write_bytes(picture((40000,), mode="I;16"))
    file = write_lines(tmp_path, first, line)
    said = refusal(lambda: load_pairs(file))
    assert "pairs.jsonl: line 2" in said
    assert message in said


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("c.safetensors", lambda file: save_file({"x0": torch.zeros(LATENT)}, file), "holds x0; it needs one tensor, called latent"),
        ("c.safetensors", lambda file: file.write_bytes(b"\x10"), "is not a readable latent ("),
        ("c.npy", lambda file: file.write_bytes(b"\x93NUMPY"), "is not a readable latent ("),
        ("c.npy", lambda file: np.save(file, np.array([{}], dtype=object), allow_pickle=True), "is not a readable latent ("),
        ("c.npy", lambda file: np.save(file, np.zeros((2, 3))), "has the shape (2, 3), those before (2, 3, 3); latents of one file of pairs have one shape"),
        ("c.png", lambda file: file.write_bytes(picture(RED)), "is a picture among latents; use two files of pairs, one for each kind"),
    ],
)
def test_a_wrong_latent_is_refused_when_it_is_loaded(tmp_path: Path, name: str, write: Callable[[Path], object], message: str) -> None:
    first = pair_of_latents(tmp_path)
    write(tmp_path / name)
    file = write_lines(tmp_path, first, {"prompt": "b", "chosen": "a.safetensors", "rejected": name})
    assert f"pairs {file}: line 2: rejected {tmp_path / name} {message}" in refusal(lambda: load_pairs(file))


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path.joinpath("sprung").touch, ())

    pairs_of = pair_of_latents(tmp_path)
    np.save(tmp_path / "b.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    assert "is not a readable latent" in refusal(lambda: load_pairs(write_lines(tmp_path, pairs_of)))
    assert not (tmp_path / "sprung").exists()


def test_what_only_the_content_shows_is_refused_by_check_and_by_load(tmp_path: Path) -> None:
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(noise, format="JPEG")
    whole = noise.getvalue()
    cases: dict[str, tuple[bytes, bytes, str]] = {
        "cut.png": (picture(RED), picture(BLUE, width=64, height=64)[:70], "cut.png is not a readable picture ("),
        "cut.jpg": (picture(RED), whole[: len(whole) // 2], "cut.jpg is not a readable picture ("),
        "same.webp": (picture(RED), picture(RED, kind="BMP"), "line 1: chosen and rejected are the same picture; remove the pair"),
        "larger.png": (picture(RED), picture(RED, width=12, height=8), "line 1: chosen and rejected are the same picture; remove the pair"),
    }
    for name, (chosen, rejected, message) in cases.items():
        (tmp_path / "a.png").write_bytes(chosen)
        (tmp_path / name).write_bytes(rejected)
        pairs = load_pairs(write_lines(tmp_path, {"prompt": "a", "chosen": "a.png", "rejected": name}))
        assert message in refusal(lambda pairs=pairs: pairs.check(SIZE, LATENT))
        assert message in refusal(lambda pairs=pairs: pairs.load([0], SIZE, LATENT))


def test_check_looks_at_the_pairs_that_it_is_told_to(tmp_path: Path) -> None:
    good = pair_of_pictures(tmp_path)
    (tmp_path / "c.png").write_bytes(picture(RED, width=12))
    pairs = load_pairs(write_lines(tmp_path, good, {"prompt": "a", "chosen": "a.png", "rejected": "c.png"}))
    pairs.check(SIZE, LATENT, [0])
    assert "line 2" in refusal(lambda: pairs.check(SIZE, LATENT, [1]))


def test_a_latent_that_is_not_finite_or_whole_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(LATENT))
    np.save(tmp_path / "b.npy", np.full(LATENT, np.nan))
    pairs = load_pairs(write_lines(tmp_path, {"prompt": "a", "chosen": "a.npy", "rejected": "b.npy"}))
    assert "b.npy holds NaN or infinity; remove the pair" in refusal(lambda: read(pairs))
    np.save(tmp_path / "b.npy", np.zeros(LATENT, dtype=np.float32))
    assert "chosen and rejected are the same latent; remove the pair" in refusal(lambda: read(pairs))
    (tmp_path / "b.npy").write_bytes((tmp_path / "b.npy").read_bytes()[:-4])
    assert "b.npy is not a readable latent" in refusal(lambda: read(pairs))
    (tmp_path / "b.npy").unlink()
    assert "b.npy cannot be read (No such file or directory)" in refusal(lambda: read(pairs))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "pairs none.jsonl: no such file"),
        ("empty.jsonl", "pairs empty.jsonl: is empty; give one pair a line"),
        ("none.parquet", "pairs none.parquet: no such file or folder; give a .jsonl or .parquet file, a folder that `datasets` saved, or a hub id"),
        ("none", "pairs none: no such file or folder"),
        ("./none/there", "pairs ./none/there: no such file or folder"),
        ("list.csv", "pairs list.csv: give a .jsonl or .parquet file"),
        ("folder", "pairs folder: cannot be loaded by `datasets` ("),
        ("bad.parquet", "pairs bad.parquet: cannot be loaded by `datasets` ("),
    ],
)
def test_what_is_no_file_of_pairs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("\n")
    Path("list.csv").write_text("a,b\n")
    Path("folder").mkdir()
    Path("bad.parquet").write_bytes(b"PAR1")
    assert refusal(lambda: load_pairs(name)).startswith(message)


# --- datasets -----------------------------------------------------------------------------------------------------------------------------------


def pick_a_pic(labels: list[object], **columns: list[Any]) -> Any:
    n = len(labels)
    table = {"caption": [f" prompt {i} " for i in range(n)], "jpg_0": [picture(RED, width=6 + i) for i in range(n)], "jpg_1": [picture(BLUE)] * n}
    return datasets.Dataset.from_dict(table | {"label_0": labels} | columns)


def colors(pairs: PairSet) -> list[str]:
    names = {(1, 0, 0): "red", (0, 0, 1): "blue"}
    return ["/".join(names[tuple(side.mean((1, 2)).tolist())] for side in pair) for pair in read(pairs)]


@pytest.mark.parametrize("stored", ["folder", "split folder", "parquet"])
def test_pick_a_pic_rows_are_ordered_by_their_label_and_ties_are_dropped(tmp_path: Path, stored: str, capfd: pytest.CaptureFixture[str]) -> None:
    rows = pick_a_pic([1.0, 0.0, 0.5, None, 1.0], has_label=[True, True, True, True, False], jpg_0=[picture(RED)] * 5, ranking_id=list(range(5)))
    path = tmp_path / ("pairs.parquet" if stored == "parquet" else "pairs")
    if stored == "parquet":
        rows.to_parquet(path)
    else:
        (datasets.DatasetDict({"test": rows.select([0]), "train": rows}) if stored == "split folder" else rows).save_to_disk(path)
    capfd.readouterr()
    pairs = load_pairs(path)
    assert capfd.readouterr().err == ""  # no progress bar
    assert (len(pairs), pairs.dropped, pairs.is_latent) == (2, 3, False)
    assert pairs.prompts == [Prompt("prompt 0"), Prompt("prompt 1")]
    assert colors(pairs) == ["red/blue", "blue/red"]


@pytest.mark.parametrize("feature", ["image", "struct", "binary"])
def test_columns_of_pictures_may_be_stored_in_every_way_that_is_usual(tmp_path: Path, feature: str) -> None:
    red, blue = ({"bytes": picture(color), "path": None} for color in (RED, BLUE))
    table: dict[str, list[Any]] = {"prompt": ["a"], "chosen": [red], "rejected": [blue]}
    rows = datasets.Dataset.from_dict(table)
    if feature == "image":
        rows = rows.cast_column("chosen", datasets.Image()).cast_column("rejected", datasets.Image())
    if feature == "binary":
        rows = datasets.Dataset.from_dict({"prompt": ["a"], "chosen": [red["bytes"]], "rejected": [blue["bytes"]]})
    rows.save_to_disk(tmp_path / "rows")
    assert colors(load_pairs(tmp_path / "rows")) == ["red/blue"]


def test_pictures_that_a_table_only_names_are_read_from_their_files(tmp_path: Path) -> None:
    names = {name: str(tmp_path / f"{name}.png") for name in ("chosen", "rejected")}
    Path(names["chosen"]).write_bytes(picture(RED))
    Path(names["rejected"]).write_bytes(picture(BLUE))
    table = {name: [{"bytes": None, "path": path}] for name, path in names.items()}
    kind = {name: {"bytes": datasets.Value("binary"), "path": datasets.Value("string")} for name in names}
    datasets.Dataset.from_dict({"prompt": ["a"]} | table, features=datasets.Features({"prompt": datasets.Value("string")} | kind)).to_parquet(
        tmp_path / "rows.parquet"
    )
    pairs = load_pairs(tmp_path / "rows.parquet")
    assert colors(pairs) == ["red/blue"]
    Path(names["chosen"]).unlink()
    assert "row 0: chosen holds no picture; remove the row" in refusal(lambda: read(pairs))


def test_a_hub_id_is_downloaded_and_its_only_split_used(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pick_a_pic([1, 0])
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict({"validation": rows}) if name == "someone/pick" else None)
    assert colors(load_pairs("someone/pick")) == ["red/blue", "blue/red"]
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict({"a": rows, "b": rows}))
    assert refusal(lambda: load_pairs("someone/pick")) == "pairs someone/pick: no split is called train; it has a, b; save one of them as a folder of its own"

    def missing(name: str) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist\nor cannot be accessed")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    assert refusal(lambda: load_pairs("someone/pick")) == "pairs someone/pick: cannot be loaded by `datasets` (Dataset 'someone/pick' doesn't exist)"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda: pick_a_pic([1.0]).rename_column("label_0", "label"), "no column `label_0`; did you mean label?"),
        (lambda: pick_a_pic([1.0]).remove_columns("caption"), "no column `caption`; it has ['jpg_0', 'jpg_1', 'label_0']"),
        (lambda: datasets.Dataset.from_dict({"prompt": ["a"], "chosen": ["a.png"], "rejected": ["b.png"]}), "column `chosen` holds Value('string')"),
        (lambda: pick_a_pic([1.0, 0.25]), "row 1: label_0 is 0.25; it says 1 (the first won), 0 (the second) or 0.5 (a tie)"),
        (lambda: pick_a_pic([1.0], caption=[" "]), "row 0: `caption` is not a text; remove the row"),
        (lambda: pick_a_pic([0.5, 0.5]), "all 2 pairs are undecided"),
        (lambda: pick_a_pic([1.0, 1.0], jpg_1=[picture(BLUE), b""]), "row 1: jpg_1 holds no picture; remove the row"),
        (lambda: pick_a_pic([1.0, 1.0], jpg_1=[picture(BLUE), None]), "row 1: jpg_1 holds no picture; remove the row"),
        (lambda: pick_a_pic([1.0, 1.0], jpg_1=[picture(BLUE), b"GIF89a......"]), "row 1: jpg_1 is not a png, jpg or webp picture; remove the row"),
        (lambda: pick_a_pic([1.0, 1.0], jpg_1=[picture(BLUE), picture(RED, width=7)]), "row 1: jpg_0 and jpg_1 are the same picture; remove the row"),
    ],
)
def test_a_wrong_table_is_refused_when_it_is_loaded(tmp_path: Path, rows: Callable[[], Any], message: str) -> None:
    rows().save_to_disk(tmp_path / "rows")
    said = refusal(lambda: load_pairs(tmp_path / "rows"))
    assert said.startswith(f"pairs {tmp_path / 'rows'}: {message}")


def test_a_row_is_named_by_its_number_in_the_whole_table(tmp_path: Path) -> None:
    heads = [b"\xff\xd8\xff" + bytes(i % 7) for i in range(2500)]  # enough of a picture for what is looked at when a table is opened
    pick_a_pic([1.0] * 2500, jpg_0=heads, jpg_1=[*heads[1:2300], b"none", *heads[2301:], heads[0]]).save_to_disk(tmp_path / "rows")
    assert "row 2299: jpg_1 is not a png, jpg or webp picture; remove the row" in refusal(lambda: load_pairs(tmp_path / "rows"))


def test_a_table_without_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda name: pick_a_pic([]))
    assert refusal(lambda: load_pairs("someone/pick")) == "pairs someone/pick: has no rows"


def test_rows_that_are_dropped_may_hold_anything_and_a_broken_picture_is_named(tmp_path: Path) -> None:
    whole = picture(BLUE, width=64, height=64)
    pick_a_pic([0.5, 1.0], jpg_1=[b"", whole[:70]]).save_to_disk(tmp_path / "rows")
    pairs = load_pairs(tmp_path / "rows")
    assert f"pairs {tmp_path / 'rows'}: row 1: rejected (jpg_1) is not a readable picture (" in refusal(lambda: pairs.check(SIZE, LATENT))


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pick_a_pic([1.0]).to_parquet(tmp_path / "rows.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    said = refusal(lambda: load_pairs(tmp_path / "rows.parquet"))
    assert "needs the `datasets` library: run `pip install 'flowrl-diffusion[data]'`, or give a .jsonl file" in said
    assert len(load_pairs(write_lines(tmp_path, pair_of_latents(tmp_path)))) == 1


# --- pairs from rollouts ------------------------------------------------------------------------------------------------------------------------


def test_best_meets_worst_and_next_best_meets_next_worst() -> None:
    values = [0.5, 0.9, 0.1, 0.3, 0.7]
    assert best_against_worst(values, margin=0, per_group=1) == [(1, 2)]
    assert best_against_worst(values, margin=0, per_group=9) == [(1, 2), (4, 3)]  # the middle one is left
    assert best_against_worst(values, margin=0.5, per_group=9) == [(1, 2)]  # 0.8 > 0.5, but 0.4 is not
    assert best_against_worst([0.25, 0.75], margin=0.5, per_group=1) == []  # exactly the margin
    assert best_against_worst([1.0, 1.0, 1.0], margin=0, per_group=3) == []
    assert best_against_worst([1.0, 1.0, 0.0, 0.0], margin=0, per_group=3) == [(0, 3), (1, 2)]
    assert best_against_worst([1.0], margin=0, per_group=1) == best_against_worst([], margin=0, per_group=1) == []


def test_the_order_of_the_samples_does_not_matter() -> None:
    values = torch.randn(9, generator=torch.Generator().manual_seed(0)).tolist()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = best_against_worst([values[i] for i in order], margin=0.1, per_group=4)
    assert [(order[a], order[b]) for a, b in shuffled] == best_against_worst(values, margin=0.1, per_group=4)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two iterations of three groups: rewards differ, are tied, and one cannot be scored. Latent i of an iteration is 100 iteration + i throughout."""
    folder = tmp_path / "run"
    for iteration in (1, 2):
        latents = (100.0 * iteration + torch.arange(8.0))[:, None, None, None].expand(8, *LATENT)
        total = scores([0.0, 1.0, 0.5, 0.5, 0.5, 0.2, 0.0, 0.4], [True] * 6 + [False, True])
        other = scores([3.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0])
        prompts = [Prompt(f"prompt {number}", {"count": number, "chosen": "old"}) for number in (0, 0, 0, 1, 1, 2, 2, 2)]
        group = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
        save_rollout(folder, iteration, prompts=prompts, latents=latents, group=group, scores={"other": other, "total": total})
    return folder


def chosen_and_rejected(folder: Path) -> list[list[float]]:
    return load_pairs(folder).load(range(len(load_pairs(folder))), SIZE, LATENT)[:, :, 0, 0, 0].tolist()


def test_pairs_are_written_as_they_are_read(tmp_path: Path, run: Path) -> None:
    out = tmp_path / "deep" / "pairs"
    # Group 0: 1.0 against 0.0; group 1 is a tie; group 2: 0.4 against 0.2, as the third could not be scored.
    assert make_pairs(run, out) == PairCounts(groups=6, samples=16, invalid=2, without_pair=2, found=4, written=4)
    assert chosen_and_rejected(out) == [[101, 100], [107, 105], [201, 200], [207, 205]]
    assert sorted(path.name for path in out.iterdir()) == ["latents", "pairs.jsonl"]
    facts = {"iteration": 1, "group": 2, "reward": "total", "chosen": pytest.approx(0.4), "rejected": pytest.approx(0.2)}
    assert load_pairs(out).prompts[1] == Prompt("prompt 2", {"count": 2, "pair": facts})
    assert load_file(out / "latents" / "000001_chosen.safetensors")["latent"].shape == LATENT


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"margin": 0.5}, [[101, 100], [201, 200]]),
        ({"reward": "other"}, [[100, 101], [200, 201]]),
        ({"reward": "other", "per_group": 2}, [[100, 101], [200, 201]]),
        ({"max_pairs": 2}, [[101, 100], [201, 200]]),
        ({"max_pairs": 3}, [[101, 100], [107, 105], [201, 200]]),
        ({"max_pairs": 9}, [[101, 100], [107, 105], [201, 200], [207, 205]]),
    ],
)
def test_reward_margin_and_counts_choose_the_pairs(tmp_path: Path, run: Path, choice: dict[str, Any], expected: list[list[float]]) -> None:
    counts = make_pairs(run, tmp_path / "out", **choice)
    assert chosen_and_rejected(tmp_path / "out") == expected
    assert counts.written == len(expected)
    assert counts.found == (4 if "max_pairs" in choice else len(expected))


def test_equal_pictures_with_different_rewards_are_no_pair(tmp_path: Path) -> None:
    latents, group = torch.zeros(2, *LATENT), torch.tensor([0, 0])
    save_rollout(tmp_path, 1, prompts=[Prompt("a")] * 2, latents=latents, group=group, scores={"total": scores([0.0, 1.0])})
    assert "none of the 1 groups has two samples whose total differs by more than 0" in refusal(lambda: make_pairs(tmp_path, tmp_path / "out"))


def test_pictures_are_written_beside_the_latents_under_their_names(tmp_path: Path, run: Path) -> None:
    make_pairs(run, tmp_path / "out", max_pairs=1, decode=lambda latents: (latents[:, :1, :2, :2] - 100).expand(-1, 3, -1, -1))
    files = sorted((tmp_path / "out" / "images").iterdir())
    assert [file.name for file in files] == ["000000_chosen.png", "000000_rejected.png"]
    assert [np.asarray(Image.open(file)).flatten().tolist() for file in files] == [[255] * 12, [0] * 12]  # latents 101 and 100


def test_what_makes_no_pairs_is_refused_and_writes_nothing(tmp_path: Path, run: Path) -> None:
    out = tmp_path / "out"
    assert refusal(lambda: make_pairs(run, out, reward="ohter")) == "--reward ohter: not among the scores of iteration 1; did you mean other?"
    assert "lower --margin, or use another --reward" in refusal(lambda: make_pairs(run, out, margin=1.0))
    assert "has no saved rollouts; train it with logging.rollouts_every=1" in refusal(lambda: make_pairs(tmp_path, out))
    assert not out.exists()
    for choice in ({"margin": -0.1}, {"per_group": 0}, {"max_pairs": 0}):
        with pytest.raises(ValueError, match="needs margin >= 0 and counts >= 1"):
            make_pairs(run, out, **choice)  # type: ignore[arg-type]
    out.mkdir()
    (out / "mine.txt").touch()
    assert refusal(lambda: make_pairs(run, out)) == f"{out} is not an empty folder; choose another --out"


def test_the_groups_sampled_from_a_config_are_those_that_training_would_sample(tmp_path: Path, configure: Callable[..., Config]) -> None:
    trainer = Trainer(configure())
    sample_rollouts(trainer, tmp_path / "saved", 5)
    saved = list(load_rollouts(tmp_path / "saved"))
    assert [len(rollout.prompts) for rollout in saved] == [12, 8]  # 3 groups of 4 an iteration, so 3 and 2
    fresh = Trainer(configure())
    for rollout in saved:
        indices = fresh.engine.groups(rollout.iteration)
        prompts = [fresh.prompts[index] for index in indices]
        expected, futures = fresh.engine.sample(fresh.engine.plan(rollout.iteration), prompts, [0, 1, 2], rollout.iteration)
        count = len(rollout.prompts)
        assert torch.allclose(rollout.latents, expected.leaves[:count], atol=1e-5)  # the number of rows in a batch moves the last bits
        assert rollout.group.tolist() == expected.leaf_group[:count].tolist()
        assert [prompt.text for prompt in rollout.prompts] == [prompts[g].text for g in expected.leaf_group[:count].tolist()]
        values = torch.cat([future.result()["total"].values for future in futures])
        assert torch.allclose(rollout.scores["total"].values, values[:count], atol=1e-5)


ON_PAIRS = ["likelihood=matching", "objective.name=dpo", "matching={times: uniform, num_times: 2}", "rollout.group_size=2"]


# --- commands -----------------------------------------------------------------------------------------------------------------------------------


def test_pairs_of_a_config_come_from_its_base_model(tmp_path: Path, config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "pairs"
    command = ["pairs", str(config_file), "seed=3", "data.pairs=not/yet", "--groups", "5", "--per-group", "2", "--images", "--out", str(out)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "20 samples in 5 groups, of which 0 have no two that differ by more than 0\n" in shown
    assert f"10 pairs in {out / 'pairs.jsonl'}\nnext: flowrl prefer CONFIG --pairs {out}\n" in shown
    pairs = load_pairs(out)
    assert (len(pairs), pairs.is_latent) == (10, True)
    pairs.check((8, 8), (4, 4, 4))
    assert all(prompt.metadata["pair"]["chosen"] > prompt.metadata["pair"]["rejected"] for prompt in pairs.prompts)
    for number, prompt in enumerate(pairs.prompts):  # the reward is the mean pixel, and the pictures have 8 bits
        with Image.open(out / "images" / f"{number:06d}_chosen.png") as image:
            assert np.asarray(image).mean() / 255 == pytest.approx(prompt.metadata["pair"]["chosen"], abs=0.002)
    assert [path.name for path in out.parent.iterdir()] == ["pairs"]  # no temporary folder is left
    assert not (tmp_path / "run").exists()


def test_pairs_of_a_run_come_from_its_rollouts(tmp_path: Path, run: Path, config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.yaml").write_text(config_file.read_text())
    out = tmp_path / "out"
    assert main(["pairs", str(run), "--out", str(out), "--max-pairs", "1"]) == 0
    said = "16 samples, 2 of which could not be scored, in 6 groups, of which 2 have no two that differ by more than 0\n1 of 4 pairs in "
    assert capsys.readouterr().out.startswith(said)
    assert chosen_and_rejected(out) == [[101, 100]]


def test_pairs_of_a_run_are_decoded_with_its_model(tmp_path: Path, config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "run"
    save_rollout(saved, 1, prompts=[Prompt("a")] * 2, latents=torch.randn(2, 4, 4, 4), group=torch.tensor([0, 0]), scores={"total": scores([0.0, 1.0])})
    (saved / "config.yaml").write_text(config_file.read_text())
    assert main(["pairs", str(saved), "--out", str(tmp_path / "out"), "--images"]) == 0
    with Image.open(tmp_path / "out" / "images" / "000000_chosen.png") as image:
        assert image.size == (8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pairs", "RUN", "--groups", "3"], "--groups and KEY=VALUE are for a CONFIG; the rollouts of a RUN have been sampled"),
        (["pairs", "RUN", "seed=1"], "--groups and KEY=VALUE are for a CONFIG; the rollouts of a RUN have been sampled"),
        (["pairs", "RUN", "--out", "full"], "full is not an empty folder; choose another --out"),
        (["pairs", "RUN", "--out", "full", "--images"], "full is not an empty folder; choose another --out"),
        (["pairs", "RUN", "--reward", "totl"], "--reward totl: not among the scores of iteration 1; did you mean total?"),
        (["pairs", "CONFIG", "--out", "full"], "full is not an empty folder; choose another --out"),
        (["pairs", "CONFIG", "--reward", "totl"], "--reward totl: not among the rewards of the config; did you mean total?"),
        (["pairs", "none.yaml"], "config none.yaml: no such file"),
        (["prefer"], "give a CONFIG to start a run, or --resume RUN to continue one (see flowrl prefer --help)"),
        (["prefer", "CONFIG"], "data.pairs: not set; give --pairs FILE, which `flowrl pairs` can make, or use flowrl train"),
        (["prefer", "CONFIG", "--pairs", "none.jsonl", "run_dir=other", *ON_PAIRS], "pairs none.jsonl: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path,
    run: Path,
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (run / "config.yaml").write_text(config_file.read_text())
    Path("full").mkdir()
    Path("full/mine.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    assert main([{"RUN": str(run), "CONFIG": str(config_file)}.get(word, word) for word in arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {message}\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_several_processes_do_not_write_one_folder(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flowrl import pairing

    monkeypatch.setattr(pairing, "Trainer", lambda config: SimpleNamespace(accelerator=SimpleNamespace(num_processes=2)))
    assert main(["pairs", str(config_file), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: flowrl pairs samples in one process; start it without accelerate launch\n"


@pytest.mark.parametrize("command", ["pairs", "prefer"])
def test_the_commands_are_listed_and_have_help_with_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main(["--help"]) == 0
    assert f"│ {command} " in capsys.readouterr().out
    assert main([command, "--help"]) == 0
    assert f"flowrl {command}" in capsys.readouterr().out.split("Examples")[1]


def recorded_training(monkeypatch: pytest.MonkeyPatch, run: Path) -> list[tuple[Config, Path | None]]:
    calls: list[tuple[Config, Path | None]] = []

    def train(config: Config, resume: Path | None) -> Path:
        calls.append((config, resume))
        return run

    monkeypatch.setitem(sys.modules, "flowrl.run", SimpleNamespace(train=train))
    return calls


def test_prefer_is_training_on_the_given_pairs(config_file: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = recorded_training(monkeypatch, run)
    assert main(["prefer", str(config_file), "seed=5", "--pairs", "my: pairs/é😀 #1.jsonl", *ON_PAIRS]) == 0
    assert main(["prefer", str(config_file), "data.pairs=other.jsonl", *ON_PAIRS]) == 0
    (first, none), (second, _) = calls
    assert (first.data.pairs, first.seed, none) == ("my: pairs/é😀 #1.jsonl", 5, None)
    assert second.data.pairs == "other.jsonl"
    assert f"next: flowrl report {run}" in capsys.readouterr().out


def test_prefer_resumes_with_the_pairs_of_the_run(config_file: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = recorded_training(monkeypatch, run)
    (run / "config.yaml").write_text(config_file.read_text().replace("data:\n", "data:\n  pairs: kept.jsonl\n"))
    assert main(["prefer", "--resume", str(run), "training.iterations=9", *ON_PAIRS]) == 0
    ((config, resume),) = calls
    assert (config.data.pairs, config.training.iterations, resume) == ("kept.jsonl", 9, run)


@pytest.fixture
def script() -> ModuleType:
    return load_script("scripts/preference_alignment.py")


def test_the_script_hands_over_to_prefer(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(script, "flowrl", lambda arguments: calls.append(arguments) or 7)
    assert script.main(["dpo", "--pairs", "p.jsonl", "seed=1"]) == 7
    assert script.main(["rwr", "seed=1", "--config", "mine.yaml", "--pairs", "p"]) == 7
    assert script.main(["sft", "--resume", "runs/a"]) == 7
    assert calls == [
        ["prefer", str(ROOT / "configs" / "tiny_flow_dpo.yaml"), "method=flow_dpo", *script.STORED, "--pairs", "p.jsonl", "seed=1"],
        ["prefer", "mine.yaml", "method=flow_rwr", *script.STORED, "seed=1", "--pairs", "p"],
        ["prefer", "--resume", "runs/a"],
    ]
    assert script.main(["--help"]) == 0
    assert all(f"\n    {method} " in script.__doc__ for method in script.METHODS)
    assert script.__doc__ in capsys.readouterr().out
    assert script.main(["ppo"]) == 2
    assert capsys.readouterr().err == "error: unknown method ppo; known: dpo, ipo, simpo, rpo, sft, rwr\n"


@pytest.mark.parametrize("method", ["dpo", "ipo", "simpo", "rpo", "sft", "rwr"])
def test_the_config_of_every_method_of_the_script_fits_stored_pairs(
    script: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    calls = recorded_training(monkeypatch, run)
    assert method in script.METHODS
    assert script.main([method, "--pairs", "p.jsonl", "run_dir=runs/mine"]) == 0
    ((config, _),) = calls
    assert (config.method, config.data.pairs, config.run_dir) == (f"flow_{method}", "p.jsonl", "runs/mine")
