"""rewards/image_reward.py on a tiny random checkpoint with the published names: vision against timm, the head by hand, padding, and bad input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reward_models import CPU, assert_reward_contract, batch_of, pictures
from torch import Tensor, nn

from flowrl.types import UserError
from rewards.image_reward import MEAN, STD, ImageReward, vision_key

FP32 = {"rtol": 1e-5, "atol": 1e-5}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "red", "cats", "blue", "dogs", "on", "table", *"0123456789"]
SETTINGS = {  # the published file has these names, the sizes 768, 3072, 12, 12, gelu and 1e-12
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "relu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 24,
    "intermediate_size": 48,
    "layer_norm_eps": 1e-3,
    "max_position_embeddings": 64,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "type_vocab_size": 2,
    "vocab_size": len(WORDS) + 2,
    "encoder_width": 768,
    "add_cross_attention": True,
}


def vision_tower() -> nn.Module:
    """timm's transformer, whose names BLIP's vision tower has; norms add 1e-6."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2, mlp_ratio=2, qkv_bias=True, num_classes=0, norm_layer=partial(nn.LayerNorm, eps=1e-6)
    ).eval()


def text_encoder() -> nn.Module:
    from transformers import BlipTextConfig, BlipTextModel

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    names += ("hidden_act", "layer_norm_eps")
    config = BlipTextConfig(encoder_hidden_size=128, **{name: SETTINGS[name] for name in names})
    return BlipTextModel(config, add_pooling_layer=False).eval()


def head() -> nn.Module:
    return nn.Sequential(
        nn.Linear(24, 12), nn.Dropout(0.2), nn.Linear(12, 10), nn.Dropout(0.2), nn.Linear(10, 8), nn.Dropout(0.1), nn.Linear(8, 6), nn.Linear(6, 1)
    ).eval()


@pytest.fixture(scope="module")
def parts() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    made = {"vision": vision_tower(), "text": text_encoder(), "head": head()}
    with torch.no_grad():
        for module in made.values():  # large enough for the picture, the words and the layer norm's constant to matter
            for name, parameter in module.named_parameters():
                parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 0.1) + ("norm" in name.lower() and name.endswith("weight")))
        made["vision"].patch_embed.proj.weight.mul_(1e-3)
        made["vision"].patch_embed.proj.bias.zero_()
        made["vision"].cls_token.mul_(1e-2)
        made["vision"].pos_embed.mul_(1e-2)
        made["text"].embeddings.word_embeddings.weight.mul_(4)
    return made


def published(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The state under the published names, with tensors that the authors' class holds and scoring does not use."""
    state = {f"blip.visual_encoder.{key}": tensor for key, tensor in parts["vision"].state_dict().items()}
    state |= {f"blip.text_encoder.{key}": tensor for key, tensor in parts["text"].state_dict().items()}
    state |= {f"mlp.layers.{key}": tensor for key, tensor in parts["head"].state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    state |= {"blip.vision_proj.weight": torch.zeros(4, 128), "blip.vision_proj.bias": torch.zeros(4)}
    return state | {"blip.text_proj.weight": torch.zeros(4, 24), "blip.text_proj.bias": torch.zeros(4)}


def save(folder: Path, state: dict[str, Any], settings: object = SETTINGS, words: list[str] = WORDS) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(settings))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


@pytest.fixture(scope="module")
def folder(parts: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("image_reward"), published(parts))


def reward_of(folder: Path, **options: Any) -> ImageReward:
    return ImageReward(str(folder), tokenizer=str(folder), **options)


def loaded(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> ImageReward:
    reward = reward_of(folder, **options)
    reward.load(CPU, dtype)
    return reward


BATCH = batch_of(pictures(5, 32), ["a red cats", "a photo of 2 blue dogs on a table", "dogs", "a photo of a table", ""])


def test_it_keeps_the_contract(folder: Path) -> None:
    assert_reward_contract(lambda: reward_of(folder), BATCH)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 50), (70, 40)])
def test_a_score_is_that_of_the_authors_formula_step_by_step(folder: Path, parts: dict[str, nn.Module], height: int, width: int) -> None:
    batch = batch_of(pictures(3, height, width), ["a red cats", "a photo of 2 blue dogs", "[ENC] zebra dogs"])
    ids = {word: i for i, word in enumerate([*WORDS, "[DEC]", "[ENC]"])}
    expected = []
    for prompt, picture in zip(batch.prompts, batch.images, strict=True):
        image = Image.fromarray((picture.numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8))
        short = min(height, width)
        image = image.resize((32 * width // short, 32 * height // short), Image.Resampling.BICUBIC)
        left, top = round((image.width - 32) / 2), round((image.height - 32) / 2)
        pixels = np.asarray(image.crop((left, top, left + 32, top + 32))) / 255
        pixels = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
        tokens = [ids["[CLS]"], *(ids.get(word, ids["[UNK]"]) for word in prompt.text.split()), ids["[SEP]"]]
        mask = torch.tensor([[1] * len(tokens) + [0] * (35 - len(tokens))])
        padded = torch.tensor([tokens + [0] * (35 - len(tokens))])
        with torch.no_grad():
            patches = parts["vision"].forward_features(torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32))
            states = parts["text"](padded, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
            expected.append((parts["head"](states[:, 0]).item() - 0.16717362830052426) / 1.0333394966054072)
    scores = loaded(folder, preprocessing="pil").score(batch)
    torch.testing.assert_close(scores.values, torch.tensor(expected), **FP32)
    assert scores.values.std() > 1e-2


def test_the_vision_tower_equals_timms_and_needs_the_small_constant_of_its_norms(folder: Path, parts: dict[str, nn.Module]) -> None:
    reward, pixels = loaded(folder), pictures(2, 32) - 0.5
    with torch.no_grad():
        expected = parts["vision"].forward_features(pixels)
        torch.testing.assert_close(reward.network.vision(pixels).last_hidden_state, expected, **FP32)
        for module in reward.network.vision.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5
        assert (reward.network.vision(pixels).last_hidden_state - expected).abs().max() > 1e-3


def test_the_names_of_the_vision_tower_are_translated() -> None:
    assert {key: vision_key(key) for key in ("cls_token", "pos_embed", "norm.bias", "patch_embed.proj.weight", "blocks.11.norm2.weight")} == {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "norm.bias": "post_layernorm.bias",
        "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
        "blocks.11.norm2.weight": "encoder.layers.11.layer_norm2.weight",
    }
    assert vision_key("blocks.3.attn.qkv.bias") == "encoder.layers.3.self_attn.qkv.bias"
    assert vision_key("blocks.3.attn.proj.bias") == "encoder.layers.3.self_attn.projection.bias"
    assert vision_key("blocks.3.mlp.fc1.weight") == "encoder.layers.3.mlp.fc1.weight"


def test_the_folded_head_is_the_head(folder: Path, parts: dict[str, nn.Module]) -> None:
    network, states = loaded(folder).network, torch.randn(9, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layers = {key: tensor.double() for key, tensor in parts["head"].state_dict().items()}
    expected = states
    for i in (0, 2, 4, 6, 7):
        expected = expected @ layers[f"{i}.weight"].T + layers[f"{i}.bias"]
    torch.testing.assert_close(states @ network.weight.double() + network.bias.double(), expected[:, 0], rtol=0, atol=1e-6)
    assert (MEAN, STD) == (0.16717362830052426, 1.0333394966054072)


def test_words_beyond_35_tokens_are_cut_off_and_shorter_prompts_are_not(folder: Path) -> None:
    reward, picture = loaded(folder), pictures(1, 32).expand(4, -1, -1, -1)
    long = " ".join(["dogs"] * 33)  # and [CLS], [SEP]
    values = reward.score(batch_of(picture, [long, long + " red", long + " blue cats", long[:-5] + " red"])).values
    torch.testing.assert_close(values[1:3], values[:1].expand(2), **FP32)
    assert (values[3] - values[0]).abs() > 1e-4
    assert reward.score(batch_of(picture, [long, long + " red", long[:-5], "a"])).raw["image_reward_truncated"].tolist() == [0, 1, 0, 0]


def test_the_picture_and_the_prompt_both_matter(folder: Path) -> None:
    reward, images = loaded(folder), pictures(2, 32)
    values = reward.score(batch_of(images[[0, 0, 1]], ["red cats", "blue dogs", "red cats"])).values
    assert (values[0] - values[1]).abs() > 1e-3
    assert (values[0] - values[2]).abs() > 1e-3


def test_resizing_by_tensors_is_close_to_resizing_by_pillow_and_equal_where_none_is_needed(folder: Path) -> None:
    tensor, pil = loaded(folder), loaded(folder, preprocessing="pil")
    torch.testing.assert_close(tensor.score(BATCH).values, pil.score(BATCH).values, rtol=0, atol=0)
    larger = batch_of(pictures(4, 70, 50))
    torch.testing.assert_close(tensor.score(larger).values, pil.score(larger).values, rtol=0, atol=0.05)  # 1/255 in a pixel, seen by a steep tower


def test_bfloat16_is_close_and_its_head_stays_in_float32(folder: Path) -> None:
    whole, half = loaded(folder), loaded(folder, torch.bfloat16)
    assert half.network.vision.dtype == half.network.text.dtype == torch.bfloat16
    assert half.network.weight.dtype == torch.float32
    batch = batch_of(pictures(16, 32))
    expected = whole.score(batch).values
    torch.testing.assert_close(half.score(batch).values, expected, rtol=0, atol=0.1 * float(expected.max() - expected.min()) + 0.02)


def test_it_moves_as_a_whole(folder: Path) -> None:
    reward = loaded(folder)
    reward.to(torch.device("meta"))
    assert all(tensor.device.type == "meta" for tensor in reward.network.state_dict().values())


def test_a_picture_with_a_pixel_that_is_no_number_is_invalid(folder: Path) -> None:
    reward, images = loaded(folder), pictures(3, 32)
    clean = reward.score(batch_of(images)).values
    images[1, 0, 0, 0] = torch.nan
    scores = reward.score(batch_of(images))
    assert scores.valid.tolist() == [True, False, True]
    torch.testing.assert_close(scores.values[[0, 2]], clean[[0, 2]], **FP32)


def spoilt(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, nn.Module], Path], Path]:
    def make(parts: dict[str, nn.Module], path: Path) -> Path:
        state = published(parts)
        change(state)
        return save(path / "spoilt", state)

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda parts, path: path / "nowhere", "there is no file or folder"),
        (spoilt(lambda state: state.pop("blip.visual_encoder.pos_embed")), "it lacks blip.visual_encoder.pos_embed"),
        (spoilt(lambda state: state.pop("mlp.layers.6.bias")), "is not the published head: 6.bias is missing"),
        (spoilt(lambda state: state.update({"logit_scale": torch.zeros(1)})), "it holds logit_scale"),
        (
            spoilt(lambda state: state.pop("blip.visual_encoder.blocks.1.norm1.bias")),
            "lacks 1 weights of a BlipVisionModel, .*encoder.layers.1.layer_norm1.bias",
        ),
        (spoilt(lambda state: state.update({"blip.text_encoder.pooler": torch.zeros(1)})), "1 tensors are unknown, pooler for one"),
        (
            spoilt(lambda state: state.update({"blip.text_encoder.encoder.layer.0.output.dense.bias": torch.zeros(5)})),
            "lacks 1 weights of a BlipTextModel, or has",
        ),
        (spoilt(lambda state: state.update({"mlp.layers.0.bias": "no tensor"})), "holds no table of tensors"),
        (lambda parts, path: save(path, published(parts), {"hidden_size": 24}), "med_config.json has no intermediate_size"),
        (lambda parts, path: save(path, published(parts), [1, 2]), "holds no settings of a text encoder"),
        (lambda parts, path: save(path, published(parts), words=WORDS[:-3]), r"and two tokens more are 23, the checkpoint has 26; give bert-base-uncased"),
        (lambda parts, path: save(path, published(parts)) / "ImageReward.pt", "cannot be read as the text encoder's settings"),
    ],
)
def test_a_checkpoint_that_is_not_the_published_one_is_refused(
    parts: dict[str, nn.Module], tmp_path: Path, make: Callable[[dict[str, nn.Module], Path], Path], message: str
) -> None:
    source = make(parts, tmp_path)
    with pytest.raises(UserError, match=rf"^reward image_reward: .*{message}") as caught:
        ImageReward(str(source), tokenizer=str(source)).load(CPU, torch.float32)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_and_a_missing_tokenizer_are_named(parts: dict[str, nn.Module], tmp_path: Path) -> None:
    source = save(tmp_path / "damaged", published(parts))
    with pytest.raises(UserError, match=r"^reward image_reward: there is no file or folder .*/no/tokenizer"):
        ImageReward(str(source), tokenizer=str(tmp_path) + "/no/tokenizer").load(CPU, torch.float32)
    file = source / "ImageReward.pt"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match=rf"^reward image_reward: {re.escape(str(file))} cannot be read as weights"):
        reward_of(source).load(CPU, torch.float32)


def test_an_id_that_cannot_be_reached_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(source: str, filename: str) -> str:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match=r"^reward image_reward: med_config.json of THUDM/ImageReward was neither found .* give the folder instead"):
        ImageReward().load(CPU, torch.float32)


def test_another_preprocessing_is_refused() -> None:
    with pytest.raises(UserError, match="^reward image_reward: preprocessing must be tensor or pil, not 'gpu'"):
        ImageReward(preprocessing="gpu")
