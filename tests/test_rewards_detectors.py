"""rewards/detectors.py and the whole of GenEval: tiny models of the real classes against slow computations, and files that are missing or damaged."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reward_models import assert_reward_contract, batch_of, go_offline, pictures, save_clip

from flowrl.types import UserError
from rewards import detectors
from rewards.detectors import COCO_CLASSES, COLORS, ClipColors, Detection, Mask2FormerDetector, SsdDetector, geneval_name
from rewards.geneval import GenEvalReward

CPU = torch.device("cpu")
OLD_NAMES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}


def build_mask2former(folder: Path, names: Sequence[str] = COCO_CLASSES, seed: int = 0) -> str:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(seed)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_features=stages),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=6,
        id2label={i: OLD_NAMES.get(name, name) for i, name in enumerate(names)},
    )
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():  # far from uniform, so that scores pass thresholds
        model.class_predictor.weight.mul_(40)
        model.model.transformer_module.queries_features.weight.mul_(3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_mask2former(tmp_path_factory.mktemp("mask2former"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def found(mask2former: str) -> list[dict[str, list[Detection]]]:
    with torch.inference_mode():
        return Mask2FormerDetector(mask2former, 64).eval().detect(pictures(3, 40, 60))


def test_the_random_detector_finds_something(found: list[dict[str, list[Detection]]]) -> None:
    assert all(any(thing.score > 0.3 for things in objects.values() for thing in things) for objects in found)
    assert {name for objects in found for name in objects} <= set(COCO_CLASSES)


def test_the_whole_reward_keeps_the_contract_with_real_classes(mask2former: str, clip: str, found: list[dict[str, list[Detection]]]) -> None:
    names = [max(objects, key=lambda name: objects[name][0].score) for objects in found]
    data = [{"tag": "colors", "include": [{"class": name, "count": 1, "color": "red"}]} for name in names]
    assert_reward_contract(lambda: GenEvalReward(model=mask2former, clip=clip, detector_side=64), batch_of(pictures(3, 40, 60), metadata=data))
    reward = GenEvalReward(model=mask2former, clip=clip, detector_side=64)
    reward.load(CPU, torch.bfloat16)  # stays in float32
    assert {weight.dtype for weight in reward.network.parameters()} == {torch.float32}
    assert reward.score(batch_of(pictures(3, 40, 60), metadata=data)).values.max() > 0
    assert "mask2former" in GenEvalReward().info.weights[0]


def test_what_mask2former_sees_is_resized_normalised_and_filled_up_with_zeros(mask2former: str) -> None:
    detector = Mask2FormerDetector(mask2former, 800)
    assert detector.prepare(torch.zeros(1, 3, 512, 512)).shape == (1, 3, 800, 800)
    wide = detector.prepare(torch.ones(1, 3, 100, 400))  # 1333 / 400 = 3.3325: 333 x 1333, filled up to 352 x 1344
    assert wide.shape == (1, 3, 352, 1344)
    torch.testing.assert_close(wide[0, :, 332, 1332], torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]))
    assert (wide[0, :, 333:].abs().sum() + wide[0, :, :, 1333:].abs().sum()) == 0
    image = pictures(1, 120, 90)
    small = Mask2FormerDetector(mask2former, 60).prepare(image)[0, :, :80, :60]
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    pixels = Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy()).resize((60, 80), Image.Resampling.BILINEAR)
    torch.testing.assert_close(small * std + mean, torch.from_numpy(np.asarray(pixels).copy()).permute(2, 0, 1) / 255, atol=1.5 / 255, rtol=0)


def test_objects_are_those_of_a_slow_computation(mask2former: str) -> None:
    detector = Mask2FormerDetector(mask2former, 64).eval()
    image = pictures(1, 40, 50)  # becomes 64 x 80, filled up to 64 x 96
    with torch.inference_mode():
        (objects,) = detector.detect(image)
        output = detector.model(pixel_values=detector.prepare(image))
    expected: list[tuple[float, str, tuple[int, ...], int]] = []
    for query in range(6):
        probabilities = output.class_queries_logits[0, query].softmax(-1)[:80]
        whole = F.interpolate(output.masks_queries_logits[0, query][None, None], size=(64, 96), mode="bilinear")
        logits = F.interpolate(whole[:, :, :, :80], size=(40, 50), mode="bilinear")[0, 0]
        inside = [(y, x) for y in range(40) for x in range(50) if logits[y, x] > 0]
        if not inside:
            continue
        sure = sum(1 / (1 + math.exp(-logits[y, x].item())) for y, x in inside) / len(inside)
        ys, xs = [y for y, _ in inside], [x for _, x in inside]
        for label in range(80):
            if probabilities[label] > 0.05:
                expected.append((probabilities[label].item() * sure, COCO_CLASSES[label], (min(xs), min(ys), max(xs) + 1, max(ys) + 1), len(inside)))
    got = [(thing.score, name, thing.box, int(thing.mask.sum())) for name, things in objects.items() for thing in things if thing.mask is not None]
    assert len(got) == len(expected) > 0
    for (score, *facts), (slow, *slow_facts) in zip(sorted(got), sorted(expected), strict=True):
        assert score == pytest.approx(slow, abs=1e-5)
        assert [facts[0], list(facts[1]), facts[2]] == [slow_facts[0], list(slow_facts[1]), slow_facts[2]]
    assert all([thing.score for thing in things] == sorted((thing.score for thing in things), reverse=True) for things in objects.values())


def test_empty_masks_are_no_objects(mask2former: str) -> None:
    detector = Mask2FormerDetector(mask2former, 64)
    classes = torch.zeros(2, 80)
    classes[0, 3], classes[1, 5] = 0.9, 0.8
    masks = torch.stack([torch.full((16, 24), -5.0), torch.full((16, 24), 5.0)])
    objects = detector._objects(classes, masks, torch.Size((64, 96)), torch.Size((40, 60)))
    assert list(objects) == [COCO_CLASSES[5]]
    assert objects[COCO_CLASSES[5]][0].box == (0, 0, 60, 40)
    assert objects[COCO_CLASSES[5]][0].score == pytest.approx(0.8 / (1 + math.exp(-5)))


def test_the_colour_is_the_nearest_of_ten_by_cut_grey_picture_and_averaged_templates(clip: str) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    colors = ClipColors(clip).eval()
    image = pictures(1, 40, 60)[0]
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[5:20, 10:30] = True
    things = [Detection(0.9, (10, 5, 30, 20), mask), Detection(0.8, (20.4, 0, 59.6, 40.0)), Detection(0.7, (59.9, 39.9, 60, 40))]
    cut = colors.cut(image, things[0])
    assert torch.equal(cut, image[:, 5:20, 10:30])
    mask[7, 12] = False
    torch.testing.assert_close(colors.cut(image, things[0])[:, 2, 2], torch.full((3,), 0.6))  # #999999
    assert torch.equal(colors.cut(image, things[1]), image[:, :, 20:60])
    assert colors.cut(image, things[2]).shape == (3, 1, 1)
    with torch.inference_mode():
        got = colors(image, "cow", things)
        model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
        rows = []
        for color in COLORS:
            lines = [f"a photo of a {color} cow", f"a photo of a {color}-colored cow", f"a photo of a {color} object"]
            parts = [model.get_text_features(**tokenizer(line, return_tensors="pt")).pooler_output[0] for line in lines]
            mean = sum(part / part.norm() for part in parts) / 3
            rows.append(mean / mean.norm())
        torch.testing.assert_close(colors.texts("cow"), torch.stack(rows), atol=1e-6, rtol=0)
        assert colors.texts("cow") is colors.texts("cow")
        for thing, name in zip(things, got, strict=True):
            feature = colors.towers.embed_images(colors.towers.preprocess(colors.cut(image, thing)[None], "pil"))[0]
            assert name == COLORS[max(range(10), key=lambda k: float(feature @ rows[k]))]


def test_a_missing_or_damaged_or_foreign_model_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mask2former: str, clip: str) -> None:
    go_offline(monkeypatch, tmp_path / "cache")

    def load(**options: Any) -> None:
        GenEvalReward(**options).load(CPU, torch.float32)

    with pytest.raises(UserError, match=r"^reward geneval: there is no file or folder .*absent"):
        load(model=str(tmp_path / "absent"), clip=clip)
    with pytest.raises(UserError, match=r"^reward geneval: there is no file or folder .*absent"):
        load(model=mask2former, clip=str(tmp_path / "absent"))
    with pytest.raises(UserError, match="^reward geneval: facebook/mask2former-swin-small-coco-instance was neither found in the hub's cache"):
        load(clip=clip)
    with pytest.raises(UserError, match=r"^reward geneval: .* lacks \d+ weights"):
        load(model=clip, clip=clip)
    damaged = Path(build_mask2former(tmp_path / "damaged"))
    (damaged / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"^reward geneval: .*damaged could not be loaded"):
        load(model=str(damaged), clip=clip)
    other = build_mask2former(tmp_path / "other", ["cat", "unicorn"])
    with pytest.raises(UserError, match="has the class 'unicorn', which is none of COCO's 80"):
        load(model=other, clip=clip)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, mask2former: str) -> None:
    real = importlib.import_module

    def gone(name: str, *args: Any) -> Any:
        if name in ("scipy", "cv2"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", gone)
    with pytest.raises(UserError, match=r"reward geneval: needs the package scipy.*flowrl-diffusion\[geneval\]"):
        GenEvalReward(model=mask2former).load(CPU, torch.float32)
    with pytest.raises(UserError, match=r"reward geneval: needs the package cv2"):
        GenEvalReward(detector="ssd").load(CPU, torch.float32)


# --- the detector of OpenCV -----------------------------------------------------------------------------------------------------------------------


def test_the_ssd_turns_rows_into_boxes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Net:
        def setInput(self, blob: np.ndarray) -> None:
            self.blob = blob

        def forward(self) -> np.ndarray:
            rows = [
                [0, 17, 0.6, 0.1, 0.2, 0.5, 1.2],
                [0, 17, 0.9, 0.0, 0.0, 0.5, 0.5],
                [0, 90, 0.4, 0, 0, 1, 1],
                [0, 1, 0.05, 0, 0, 1, 1],
                [0, 12, 0.9, 0, 0, 1, 1],
            ]
            return np.array(rows, dtype=np.float64)[None, None]

    net = Net()
    monkeypatch.setattr("cv2.dnn.readNetFromTensorflow", lambda graph, text: net)
    for name in ("frozen_inference_graph.pb", "ssd_mobilenet_v2_coco_2018_03_29.pbtxt"):
        (tmp_path / name).touch()
    image = pictures(1, 300, 300)
    (objects,) = SsdDetector(str(tmp_path)).detect(image)
    assert set(objects) == {"cat", "toothbrush"}
    assert [thing.score for thing in objects["cat"]] == [0.9, 0.6]
    assert objects["cat"][1].box == pytest.approx((30, 60, 150, 300))
    assert objects["cat"][0].mask is None
    torch.testing.assert_close(torch.from_numpy(net.blob), image * 255)  # red first, 0 to 255


def test_ssd_files_that_are_absent_or_damaged_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reward geneval: there is no file .*frozen_inference_graph.pb"):
        GenEvalReward(detector="ssd", model=str(tmp_path), clip=None).load(CPU, torch.float32)
    for name in ("frozen_inference_graph.pb", "ssd_mobilenet_v2_coco_2018_03_29.pbtxt"):
        (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(UserError, match="reward geneval: OpenCV cannot read .*frozen_inference_graph.pb as a network"):
        SsdDetector(str(tmp_path))


def test_class_names() -> None:
    assert len(set(COCO_CLASSES)) == 80
    assert [geneval_name(name) for name in ("mouse", "sofa", "cat")] == ["computer mouse", "couch", "cat"]
    assert detectors._COCO_IDS[1] == "person"
    assert (detectors._COCO_IDS[17], detectors._COCO_IDS[47], detectors._COCO_IDS[51], detectors._COCO_IDS[67]) == ("cat", "cup", "bowl", "dining table")
    assert detectors._COCO_IDS[90] == "toothbrush"
