"""rewards/checkpoints.py: what is found is loaded, and what is missing, damaged or dangerous is one line."""

from __future__ import annotations

import importlib.metadata
import pickle
from logging import getLogger as named
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_models import go_offline, save_clip
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPModel, CLIPVisionModelWithProjection
from transformers.utils import logging

from flowrl.types import UserError
from rewards.checkpoints import load_network, load_pretrained, load_tensors, locate_file, packaged_file, require


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def test_a_package_is_imported_or_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert require("test", "json", "none").dumps([1]) == "[1]"
    with pytest.raises(UserError, match=r"^reward test: needs the package no_such_package, .*No module named.*; install flowrl-diffusion\[some\]$"):
        require("test", "no_such_package", "some")
    (tmp_path / "broken_package_of_a_test.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="needs the package broken_package_of_a_test, which cannot be imported"):
        require("test", "broken_package_of_a_test", "some")


def test_a_file_is_found_in_a_folder_by_itself_and_under_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.pt").write_text("x")
    assert locate_file("test", str(tmp_path), "a.pt") == tmp_path / "a.pt"
    assert locate_file("test", str(tmp_path / "a.pt"), "b.pt") == tmp_path / "a.pt"
    assert locate_file("test", "~/a.pt", "b.pt") == tmp_path / "a.pt"
    with pytest.raises(UserError, match=r"^reward test: the folder .* has no file b\.pt$"):
        locate_file("test", str(tmp_path), "b.pt")


def test_the_hub_clients_lines_about_each_try_are_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(source: str, filename: str = "") -> None:
        named("huggingface_hub.utils").warning("Retrying in 1s")
        raise OSError("no way")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    level = named("huggingface_hub").level
    for load in (lambda: locate_file("test", "owner/name", "a.pt"), lambda: load_pretrained("test", fail, "owner/name")):
        with pytest.raises(UserError, match="no way"):
            load()
    assert "Retrying" not in caplog.text
    assert named("huggingface_hub").level == level


def test_a_file_of_the_hub_is_asked_for_by_id_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda source, filename: f"/cache/{source}/{filename}")
    assert locate_file("test", "owner/name", "a.pt") == Path("/cache/owner/name/a.pt")


@pytest.mark.parametrize("source", ["/no/such/place", "./no/such/place", "~/no/such/place"])
def test_a_path_that_is_not_there_is_never_taken_for_an_id(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match=r"^reward test: there is no file or folder .*no/such/place$"):
        locate_file("test", source, "a.pt")
    with pytest.raises(UserError, match=r"^reward test: there is no file or folder .*no/such/place$"):
        load_pretrained("test", lambda *_: pytest.fail("the hub was asked"), source)


def test_an_id_that_cannot_be_reached_is_one_line_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(monkeypatch, tmp_path)
    for load in (lambda: locate_file("test", "owner/name", "a.pt"), lambda: load_pretrained("test", CLIPModel.from_pretrained, "owner/name")):
        with pytest.raises(UserError) as caught:
            load()
        message = str(caught.value)
        assert message.startswith("reward test: ")
        assert "owner/name was neither found in the hub's cache on this machine nor could it be downloaded" in message
        assert message.endswith("log in if it is gated, or download it elsewhere and give the folder instead of the id")
        assert "\n" not in message
        assert len(message) < 500
        assert caught.value.__cause__ is not None


def test_a_folder_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    def load(source: str, **options: Any) -> None:
        raise KeyError("two\nlines " + "long " * 100)

    with pytest.raises(UserError, match=rf"^reward test: {tmp_path} could not be loaded \(KeyError: [^\n]*\.\.\.\)$"):
        load_pretrained("test", load, str(tmp_path))


def test_options_and_the_path_reach_the_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert load_pretrained("test", lambda source, **options: (source, options), "~/model", dtype=1) == (str(tmp_path / "model"), {"dtype": 1})
    assert load_pretrained("test", lambda source: source, "owner/name") == "owner/name"


def test_a_network_is_loaded_whole_or_in_the_part_that_is_wanted_without_noise(clip: Path, caplog: pytest.LogCaptureFixture) -> None:
    level = logging.get_verbosity()
    logging.get_logger().propagate = True
    try:
        whole = load_network("test", CLIPModel.from_pretrained, str(clip), dtype=torch.float32)
        part = load_network("test", CLIPVisionModelWithProjection.from_pretrained, str(clip), dtype=torch.bfloat16)
    finally:
        logging.get_logger().propagate = False
    assert torch.equal(whole.visual_projection.weight, CLIPModel.from_pretrained(clip).visual_projection.weight)
    assert torch.equal(part.visual_projection.weight, whole.visual_projection.weight.bfloat16())
    assert "text_model" not in caplog.text
    assert logging.get_verbosity() == level


def test_a_network_with_a_weight_missing_or_of_another_shape_is_refused_instead_of_made_up(clip: Path, tmp_path: Path) -> None:
    network = CLIPModel.from_pretrained(clip)
    tensors = dict(network.state_dict())
    del tensors["visual_projection.weight"]
    network.save_pretrained(tmp_path / "missing", state_dict=tensors)
    with pytest.raises(
        UserError, match=r"^reward test: .*missing lacks 1 weights of a CLIPModel, or has them in another shape, visual_projection\.weight for one"
    ):
        load_network("test", CLIPModel.from_pretrained, str(tmp_path / "missing"))
    network.text_projection = nn.Linear(32, 7, bias=False)
    network.save_pretrained(tmp_path / "shape")
    with pytest.raises(UserError, match=r"in another shape, text_projection\.weight for one"):
        load_network("test", CLIPModel.from_pretrained, str(tmp_path / "shape"))


@pytest.mark.parametrize("nested", [False, True])
def test_tensors_come_from_torch_files_flat_or_nested_and_from_safetensors(nested: bool, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.float16)}
    torch.save({"epoch": 3, "state_dict": tensors} if nested else tensors, tmp_path / "x.pt")
    save_file(tensors, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        found = load_tensors("test", tmp_path / name)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensors[key]) and found[key].dtype == tensors[key].dtype for key in tensors)


class Trap:
    """What a malicious checkpoint holds: reading it with pickle calls a function."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}, "trap": Trap(tmp_path / "sprung")}, tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(pickle.dumps({"trap": Trap(tmp_path / "sprung")}, protocol=2))
    for name in ("x.pt", "y.pt"):
        with pytest.raises(UserError, match=r"^reward test: [^\n]*\.pt cannot be read as weights \([^\n]*\)$"):
            load_tensors("test", tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 1}, {"state_dict": [1]}, {"state_dict": {"a": "b"}}])
def test_a_file_of_something_else_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"^reward test: .*x\.pt holds no table of tensors$"):
        load_tensors("test", tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_damaged_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x00damaged")
    with pytest.raises(UserError, match=rf"^reward test: [^\n]*{name} cannot be read as weights \([^\n]*\)$"):
        load_tensors("test", tmp_path / name)


def test_a_file_of_a_package_is_found_without_importing_it() -> None:
    assert packaged_file("test", "torch", "torch/version.py", "install it").is_file()
    with pytest.raises(UserError, match=r"^reward test: needs the package no-such-dist; install it so$"):
        packaged_file("test", "no-such-dist", "x", "install it so")
    version = importlib.metadata.version("torch").replace("+", r"\+")
    with pytest.raises(UserError, match=rf"^reward test: torch {version} holds no file torch/none\.onnx; install the version that the reward's page names$"):
        packaged_file("test", "torch", "torch/none.onnx", "")
