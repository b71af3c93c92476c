"""rewards/hps.py: a tiny checkpoint in the published layout, against open_clip's own cosine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from reward_models import CPU, assert_reward_contract, batch_of, go_offline, pictures, rank_correlation, spread_weights

from flowrl.types import UserError
from rewards.clip_towers import ClipTowers, convert_open_clip, sizes_of
from rewards.hps import HumanPreference, hpsv2, hpsv2_1
from rewards.pictures import CLIP_MEAN, CLIP_STD

HEADS = (2, 4)
LONG = "a red cat sits on a mat. " * 20


def network() -> Any:
    image = open_clip.CLIPVisionCfg(layers=2, width=32, head_width=16, mlp_ratio=2.0, patch_size=8, image_size=32)
    text = open_clip.CLIPTextCfg(layers=2, width=32, heads=4, context_length=77, vocab_size=49408, mlp_ratio=1.5)
    return spread_weights(open_clip.model.CLIP(16, image, text))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both versions as published, with what a training run saves beside the weights."""
    place = tmp_path_factory.mktemp("hps")
    for name in ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"):
        torch.save({"epoch": 1, "name": "run", "state_dict": network().state_dict() | {"attn_mask": torch.zeros(77, 77)}}, place / name)
    return place


def loaded(reward: HumanPreference, dtype: torch.dtype = torch.float32) -> HumanPreference:
    reward.load(CPU, dtype)
    return reward


@pytest.mark.parametrize("make", [hpsv2, hpsv2_1])
def test_hps_keeps_the_contract(make: Callable[..., HumanPreference], folder: Path) -> None:
    assert_reward_contract(lambda: make(str(folder), heads=HEADS), batch_of(pictures(4, 40, 56)))


def test_the_score_is_open_clips_cosine_without_the_logit_scale(folder: Path) -> None:
    batch = batch_of(pictures(3, 32), ["a red cat", "two dogs", LONG])
    slow = network()
    slow.logit_scale.data.fill_(9.0)  # makes no difference
    pixels = (batch.images - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        expected = [
            torch.dot(slow.encode_image(image[None], normalize=True)[0], slow.encode_text(open_clip.tokenize([prompt.text]), normalize=True)[0])
            for image, prompt in zip(pixels, batch.prompts, strict=True)
        ]
    scores = loaded(hpsv2_1(str(folder), heads=HEADS)).score(batch)
    torch.testing.assert_close(scores.values, torch.stack(expected), rtol=0, atol=1e-6)
    assert scores.values.std() > 0.05, "all samples score the same, so the test shows nothing"
    assert scores.raw["hpsv2.1_truncated"].tolist() == [0, 0, 1]


def test_each_version_reads_its_own_file_from_a_folder_or_the_file_given(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(monkeypatch, tmp_path / "cache")
    assert (hpsv2().info.name, hpsv2_1().info.name) == ("hpsv2", "hpsv2.1")
    assert (hpsv2().info.weights, hpsv2_1().info.weights) == (("xswu/HPSv2:HPS_v2_compressed.pt",), ("xswu/HPSv2:HPS_v2.1_compressed.pt",))
    (tmp_path / "HPS_v2_compressed.pt").hardlink_to(folder / "HPS_v2_compressed.pt")
    assert loaded(hpsv2(str(tmp_path), heads=HEADS)).network is not None
    assert loaded(hpsv2_1(str(tmp_path / "HPS_v2_compressed.pt"), heads=HEADS)).network is not None
    with pytest.raises(UserError, match=r"^reward hpsv2\.1: the folder .* has no file HPS_v2\.1_compressed\.pt"):
        loaded(hpsv2_1(str(tmp_path), heads=HEADS))
    with pytest.raises(UserError, match=r"^reward hpsv2: HPS_v2_compressed\.pt of xswu/HPSv2 was neither found"):
        loaded(hpsv2(heads=HEADS))


def test_the_published_architecture_is_read_off_its_shapes() -> None:
    from transformers import CLIPConfig, CLIPModel

    config = open_clip.get_model_config("ViT-H-14")
    with torch.device("meta"):
        theirs = open_clip.model.CLIP(config["embed_dim"], open_clip.CLIPVisionCfg(**config["vision_cfg"]), open_clip.CLIPTextCfg(**config["text_cfg"]))
        converted = convert_open_clip("hpsv2", theirs.state_dict())
        sizes = sizes_of(converted, (16, 16), "gelu")
        ours = CLIPModel(CLIPConfig(**sizes))
    assert {name: weight.shape for name, weight in ours.state_dict().items()} == {name: weight.shape for name, weight in converted.items()}
    assert sum(weight.numel() for weight in ours.parameters()) == hpsv2().info.parameters
    vision, text = sizes["vision_config"], sizes["text_config"]
    assert (vision["image_size"], vision["patch_size"], vision["hidden_size"] // vision["num_attention_heads"]) == (224, 14, config["vision_cfg"]["head_width"])
    assert (text["num_attention_heads"], text["max_position_embeddings"], text["eos_token_id"]) == (config["text_cfg"]["heads"], 77, 49407)


def test_the_longer_side_is_fitted_and_the_rest_is_black(folder: Path) -> None:
    towers = loaded(hpsv2(str(folder), heads=HEADS)).network
    assert isinstance(towers, ClipTowers)
    white = torch.ones(1, 3, 32, 64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    padded = towers.preprocess(white, "tensor", "longest")[0] * std + mean
    expected = torch.zeros(3, 32, 32)
    expected[:, 8:24] = 1
    torch.testing.assert_close(padded, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(towers.preprocess(white, "tensor", "shortest")[0] * std + mean, torch.ones(3, 32, 32), rtol=0, atol=1e-6)


def test_fit_matters_for_wide_pictures_and_not_for_squares(folder: Path) -> None:
    longest, shortest = loaded(hpsv2(str(folder), heads=HEADS)), loaded(hpsv2(str(folder), "shortest", heads=HEADS))
    square, wide = batch_of(pictures(3, 48)), batch_of(pictures(3, 32, 64))
    assert torch.equal(longest.score(square).values, shortest.score(square).values)
    assert (longest.score(wide).values - shortest.score(wide).values).abs().min() > 1e-3


def test_pil_and_tensor_agree_nearly(folder: Path) -> None:
    batch = batch_of(pictures(3, 64, 80))
    tensor, pil = (loaded(hpsv2(str(folder), preprocessing=backend, heads=HEADS)).score(batch).values for backend in ("tensor", "pil"))
    assert 0 < (tensor - pil).abs().max() < 0.02


def test_half_precision_keeps_the_order(folder: Path) -> None:
    batch = batch_of(pictures(48, 32))
    exact = loaded(hpsv2(str(folder), heads=HEADS)).score(batch).values
    for dtype in (torch.float16, torch.bfloat16):
        assert rank_correlation(exact, loaded(hpsv2(str(folder), heads=HEADS), dtype).score(batch).values) > 0.99


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02broken", "cannot be read as weights"),
        ({"state_dict": {"ln_final.weight": torch.zeros(2)}}, "are not those of a CLIP"),
        ({"state_dict": [1, 2]}, "holds no table of tensors"),
    ],
)
def test_a_damaged_file_is_an_error_of_one_line(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "HPS_v2_compressed.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=f"^reward hpsv2: [^\n]*{message}[^\n]*$"):
        loaded(hpsv2(str(tmp_path), heads=HEADS))


def test_without_open_clip_there_is_no_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"^reward hpsv2: needs the package open_clip.*install flowrl-diffusion\[clip\]"):
        loaded(hpsv2(str(folder), heads=HEADS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fit": "squash"}, "fit must be longest or shortest"),
        ({"preprocessing": "cv2"}, "preprocessing must be tensor or pil"),
        ({"heads": (16,)}, r"heads must be two numbers of 1 or more, .* not \(16,\)"),
        ({"heads": [16, 0]}, "heads must be two numbers"),
        ({"heads": 16}, "heads must be two numbers"),
    ],
)
def test_arguments_that_are_wrong_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^reward hpsv2: {message}"):
        hpsv2(**arguments)
