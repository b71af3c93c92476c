"""rewards/clip_towers.py, clip_score.py and pick_score.py: against open_clip, against slow loops, and with what can be wrong in a checkpoint."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reward_models import CPU, assert_reward_contract, batch_of, go_offline, pictures, rank_correlation, save_clip, save_clip_tokenizer, spread_weights
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel

from flowrl.types import SampleBatch, UserError
from rewards.clip_score import ClipScore, split_prompt
from rewards.clip_towers import ClipTowers, clip_tokenizer, convert_open_clip, features_of, square_side, towers_from_open_clip_file
from rewards.network import NetworkReward
from rewards.pick_score import PickScore
from rewards.pictures import CLIP_MEAN, CLIP_STD

LONG = "a red cat sits on a mat. " * 20  # 7 words and a stop each: 162 tokens with the start and the end


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def open_clip_network(quick_gelu: bool, seed: int = 0) -> Any:
    tower = {"layers": 2, "width": 32}
    image = open_clip.CLIPVisionCfg(**tower, head_width=16, mlp_ratio=2.0, patch_size=8, image_size=32)
    text = open_clip.CLIPTextCfg(**tower, heads=4, context_length=77, vocab_size=49408, mlp_ratio=1.5)
    return spread_weights(open_clip.model.CLIP(16, image, text, quick_gelu=quick_gelu), seed)


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in the layout of open_clip's own checkpoints, and the same weights as a bare file."""
    folder = tmp_path_factory.mktemp("open_clip")
    tower = {"layers": 2, "width": 32}
    vision = tower | {"head_width": 16, "mlp_ratio": 2.0, "patch_size": 8, "image_size": 32}
    text = tower | {"heads": 4, "context_length": 77, "vocab_size": 49408, "mlp_ratio": 1.5}
    config = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    steps = {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": steps}))
    (folder / "tiny-test-clip.json").write_text(json.dumps(config))
    torch.save(open_clip_network(True).state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def plain(clip: Path) -> Any:
    """CLIPScore with nothing but defaults, loaded."""
    return loaded(ClipScore(str(clip)))


def loaded(reward: NetworkReward, dtype: torch.dtype = torch.float32) -> Any:
    reward.load(CPU, dtype)
    return reward


def slow_cosines(network: CLIPModel, tokenizer: Any, batch: SampleBatch, texts: list[str]) -> Tensor:
    """One sample at a time in float64 by the published tokenizer call, pictures of the network's own size."""
    assert batch.images is not None
    mean, std = (torch.tensor(values).view(3, 1, 1).double() for values in (CLIP_MEAN, CLIP_STD))
    cosines = []
    for image, words in zip(batch.images.double(), texts, strict=True):
        tokens = tokenizer([words], padding=True, truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            found = network.double()(pixel_values=((image - mean) / std)[None], **tokens)
        a, b = found.image_embeds[0].tolist(), found.text_embeds[0].tolist()
        cosines.append(sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b)))
    return torch.tensor(cosines)


# towers


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_weights_of_open_clip_give_the_same_features_in_the_network_of_transformers(activation: str) -> None:
    network = open_clip_network(activation == "quick_gelu")
    tensors = dict(network.state_dict()) | {"attn_mask": torch.zeros(77, 77)}
    towers = towers_from_open_clip_file("test", "file.pt", tensors, torch.float32, heads=(2, 4), activation=activation)
    assert towers.image_size == 32
    images, texts = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)), ["a red cat", "", LONG]
    with torch.no_grad():
        expected = network.encode_image(images, normalize=True), network.encode_text(open_clip.SimpleTokenizer()(texts), normalize=True)
        torch.testing.assert_close(towers.embed_images(images), expected[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(towers.embed_texts(texts), expected[1], rtol=0, atol=1e-6)
        torch.testing.assert_close(towers.scale, network.logit_scale.exp())
        wrong = towers_from_open_clip_file("test", "file.pt", tensors, torch.float32, heads=(2, 4), activation={"gelu": "quick_gelu"}.get(activation, "gelu"))
        assert (wrong.embed_images(images) - expected[0]).abs().max() > 1e-3, "the activation makes no difference, so the test shows nothing"


def test_the_conversion_takes_every_weight_once_and_loses_no_number() -> None:
    tensors = open_clip_network(False).state_dict()
    converted = convert_open_clip("test", tensors)
    assert sum(tensor.numel() for tensor in converted.values()) == sum(tensor.numel() for tensor in tensors.values())
    assert torch.equal(converted["visual_projection.weight"], tensors["visual.proj"].T)
    merged = tensors["transformer.resblocks.1.attn.in_proj_weight"]
    assert torch.equal(converted["text_model.encoder.layers.1.self_attn.k_proj.weight"], merged[32:64])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors | {"visual.attnpool.weight": torch.zeros(1)}, r"has the weight visual\.attnpool\.weight, which"),
        (lambda tensors: tensors | {"transformer.resblocks.0.ls_1.weight": torch.zeros(1)}, r"has the weight transformer\.resblocks\.0\.ls_1\.weight, which"),
        (
            lambda tensors: {k: v for k, v in tensors.items() if k != "ln_final.bias"},
            r"file\.pt lacks 1 weights of a CLIPModel.*text_model\.final_layer_norm\.bias",
        ),
        (lambda tensors: tensors | {"logit_scale": torch.zeros(2)}, r"in another shape, logit_scale"),
        (lambda tensors: {k: v for k, v in tensors.items() if k != "visual.proj"}, r"not those of a CLIP with \(2, 4\) heads .*visual_projection"),
        (lambda tensors: {}, r"not those of a CLIP"),
    ],
)
def test_weights_that_are_not_those_of_a_clip_are_refused_by_name(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str) -> None:
    tensors = change(dict(open_clip_network(False).state_dict()))
    with pytest.raises(UserError, match=f"^reward test: .*{message}"):
        towers_from_open_clip_file("test", "file.pt", tensors, torch.float32, heads=(2, 4), activation="gelu")


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(UserError, match=r"^reward test: the weights in file\.pt are not those of a CLIP with \(5, 4\) heads"):
        towers_from_open_clip_file("test", "file.pt", dict(open_clip_network(False).state_dict()), torch.float32, heads=(5, 4), activation="gelu")


def test_both_tokenizers_give_the_same_numbers(clip: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(clip), clip_tokenizer("test")
    for text in ("A Photo of 2 cats, don't!", "", "naïve  café\nXYZ 12345 <b> 😀", LONG):
        assert theirs(text, truncation=False, verbose=False)["input_ids"] == ours(text)
    assert ours("a cat") == [49406, 320, 2368, 49407]


def test_a_text_of_77_tokens_is_read_to_its_end_and_one_of_78_is_cut(plain: Any) -> None:
    towers = plain.network
    full, longer, same = "cat " * 75, "cat " * 76, "cat " * 75 + "dog"
    assert towers.truncated([full, longer, full]).tolist() == [0, 1, 0]
    features = towers.embed_texts([full, longer, same, "cat " * 74 + "dog"])
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0], features[2])
    assert (features[0] - features[3]).abs().max() > 1e-3


def test_features_are_found_in_what_either_version_of_transformers_returns() -> None:
    class Output:
        pooler_output = torch.ones(2, 3)

    assert features_of(Output()) is Output.pooler_output
    assert features_of(Output.pooler_output) is Output.pooler_output


def test_the_side_of_a_square_is_read_and_another_shape_refused() -> None:
    assert [square_side("test", size) for size in (224, (336, 336), [14, 14])] == [224, 336, 14]
    with pytest.raises(UserError, match=r"^reward test: the network takes pictures of \(224, 336\); choose one that takes squares"):
        square_side("test", (224, 336))


def test_a_prompt_of_many_samples_is_read_once(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    towers = plain.network
    seen: list[int] = []
    read = towers._text_features
    monkeypatch.setattr(towers, "_text_features", lambda tokens: seen.append(len(tokens)) or read(tokens))
    texts = ["a cat", "a dog", "a cat", "a cat"]
    features = towers.embed_texts(texts)
    assert seen == [2]
    assert torch.equal(features[0], features[2])
    torch.testing.assert_close(features[1], towers.embed_texts(["a dog"])[0], rtol=0, atol=1e-6)


# clipscore


def test_clipscore_keeps_the_contract(clip: Path) -> None:
    batch = batch_of(pictures(5, 40, 56))
    for preprocessing in ("tensor", "pil"):
        assert_reward_contract(lambda p=preprocessing: ClipScore(str(clip), preprocessing=p, long_prompts="average"), batch)


def test_clipscore_by_open_clip_keeps_the_contract(open_clip_folder: Path) -> None:
    assert_reward_contract(lambda: ClipScore(f"local-dir:{open_clip_folder}", library="open_clip"), batch_of(pictures(5, 40, 56)))


def test_the_score_is_the_cosine_of_the_published_embeddings(plain: Any, clip: Path) -> None:
    batch = batch_of(pictures(4, 32), ["a red cat", "two dogs", LONG, ""])
    expected = slow_cosines(CLIPModel.from_pretrained(clip), AutoTokenizer.from_pretrained(clip), batch, [prompt.text for prompt in batch.prompts])
    scores = plain.score(batch)
    torch.testing.assert_close(scores.values, expected.float(), rtol=0, atol=1e-6)
    assert expected.std() > 0.05, "all samples score the same, so the test shows nothing"
    assert scores.raw["clip_truncated"].tolist() == [0, 0, 1, 0]


def test_the_score_by_open_clip_is_its_own_cosine(open_clip_folder: Path) -> None:
    batch = batch_of(pictures(3, 32), ["a red cat", "two dogs", LONG])
    network = open_clip_network(True)
    pixels = (batch.images - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        text = open_clip.SimpleTokenizer()([prompt.text for prompt in batch.prompts])
        expected = (network.encode_image(pixels, normalize=True) * network.encode_text(text, normalize=True)).sum(-1)
    scores = loaded(ClipScore(f"local-dir:{open_clip_folder}", library="open_clip")).score(batch)
    torch.testing.assert_close(scores.values, expected, rtol=0, atol=1e-6)
    assert scores.raw["clip_truncated"].tolist() == [0, 0, 1]


def test_an_architecture_of_open_clip_takes_its_weights_from_a_file(open_clip_folder: Path) -> None:
    open_clip.add_model_config(open_clip_folder / "tiny-test-clip.json")
    batch = batch_of(pictures(3))
    by_file = loaded(ClipScore("tiny-test-clip", "open_clip", pretrained=str(open_clip_folder / "open_clip_pytorch_model.bin")))
    by_folder = loaded(ClipScore(f"local-dir:{open_clip_folder}", "open_clip"))
    assert torch.equal(by_file.score(batch).values, by_folder.score(batch).values)


def test_variants_are_the_cosine_scaled_cut_at_zero_and_with_the_prefix(plain: Any, clip: Path) -> None:
    batch = batch_of(pictures(12, 32))
    cosine = plain.score(batch).values
    assert cosine.min() < 0 < cosine.max()
    torch.testing.assert_close(loaded(ClipScore(str(clip), variant="x100")).score(batch).values, 100 * cosine.clamp_min(0))
    prefixed = batch_of(batch.images, [f"A photo depicts {prompt.text}" for prompt in batch.prompts])
    expected = 2.5 * plain.score(prefixed).values.clamp_min(0)
    torch.testing.assert_close(loaded(ClipScore(str(clip), variant="hessel")).score(batch).values, expected)
    assert (expected > 0).any()


def test_a_text_nearer_to_the_picture_scores_higher(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = plain
    image = pictures(1, 32)
    with torch.no_grad():
        embedding = reward.network.embed_images(reward.network.preprocess(image, "tensor"))[0]
    noise = nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(3)), dim=0)
    shares = torch.linspace(0, 1, 9)
    texts = nn.functional.normalize(torch.stack([a * embedding + (1 - a) * noise for a in shares]), dim=-1)
    monkeypatch.setattr(ClipTowers, "embed_texts", lambda self, texts_: texts)
    values = reward.score(batch_of(image.expand(9, -1, -1, -1), ["x"] * 9)).values
    assert (values.diff() > 0).all()
    assert values[-1].item() == pytest.approx(1, abs=1e-6)


def test_a_long_prompt_is_averaged_over_pieces_that_are_read_whole(plain: Any, clip: Path) -> None:
    batch = batch_of(pictures(2, 32), [LONG + "A blue dog sleeps.", "two dogs"])
    reward = loaded(ClipScore(str(clip), long_prompts="average"))
    scores = reward.score(batch)
    sentence = "a red cat sits on a mat."  # 8 tokens: nine of them fill 72 of the 75 places
    pieces = [" ".join([sentence] * 9), " ".join([sentence] * 9), f"{sentence} {sentence} A blue dog sleeps."]
    short = plain
    parts = short.score(batch_of(batch.images[:1].expand(3, -1, -1, -1), pieces))
    assert parts.raw["clip_truncated"].tolist() == [0, 0, 0]
    assert scores.values[0].item() == pytest.approx(parts.values.mean().item(), abs=1e-6)
    assert scores.values[1].item() == pytest.approx(short.score(batch).values[1].item(), abs=1e-6)
    assert scores.raw["clip_truncated"].tolist() == [0, 0]
    assert short.score(batch).raw["clip_truncated"].tolist() == [1, 0]


def test_a_word_too_long_for_the_network_is_cut_and_said_to_be(clip: Path) -> None:
    batch = batch_of(pictures(3, 32), ["x7" * 60, "two dogs", "x7" * 60 + " " + "x7" * 70])
    assert loaded(ClipScore(str(clip), long_prompts="average")).score(batch).raw["clip_truncated"].tolist() == [1, 0, 1]


def test_the_prefix_takes_its_part_of_every_piece(clip: Path) -> None:
    reward = loaded(ClipScore(str(clip), variant="hessel", long_prompts="average"))
    batch = batch_of(pictures(2, 32), ["cat " * 200, "cat " * 74])
    assert reward.score(batch).raw["clip_truncated"].tolist() == [0, 0]


@given(st.lists(st.text("ab. \n", max_size=40)), st.integers(3, 12))
def test_pieces_of_a_prompt_hold_its_words_in_order_and_fit(parts: list[str], limit: int) -> None:
    text = " ".join(parts)
    pieces = split_prompt(text, lambda piece: len(piece) <= limit)
    assert " ".join(pieces).split() == text.split()
    assert len(pieces) >= 1
    assert all(len(piece) <= limit or len(piece.split()) == 1 for piece in pieces)
    assert all(len(f"{a} {b}") > limit for a, b in itertools.pairwise(pieces) if "." not in a + b)


def test_pieces_end_where_sentences_end() -> None:
    assert split_prompt("One two. Three four! Five", lambda piece: len(piece) <= 20) == ["One two. Three four!", "Five"]
    assert split_prompt("One two. Three four! Five", lambda piece: len(piece) <= 12) == ["One two.", "Three four!", "Five"]
    assert split_prompt("", lambda piece: True) == [""]


def test_half_precision_keeps_the_order_and_gives_float32(plain: Any, clip: Path) -> None:
    batch = batch_of(pictures(64, 32))
    exact = plain.score(batch).values
    for dtype, least in ((torch.float16, 0.999), (torch.bfloat16, 0.99)):
        reward = loaded(ClipScore(str(clip)), dtype)
        assert {weight.dtype for weight in reward.network.parameters()} == {dtype}
        for features in (reward.network.embed_images(batch.images), reward.network.embed_texts(["a cat"])):
            assert features.dtype == torch.float32
            torch.testing.assert_close(features.square().sum(-1), torch.ones(len(features)), rtol=0, atol=1e-5)
        values = reward.score(batch).values
        assert values.dtype == torch.float32
        assert rank_correlation(values, exact) > least


def test_all_weights_move_to_the_device(clip: Path) -> None:
    for reward in (ClipScore(str(clip)), PickScore(str(clip), str(clip))):
        with pytest.raises(RuntimeError, match="load must be called before to"):
            reward.to(CPU)
        loaded(reward).to(torch.device("meta"))
        assert all(weight.is_meta for weight in (*reward.network.parameters(), *reward.network.buffers()))


def test_pil_and_tensor_agree_without_resizing_and_nearly_with_it(plain: Any, clip: Path) -> None:
    tensor, pil = plain, loaded(ClipScore(str(clip), preprocessing="pil"))
    same, other = batch_of(pictures(4, 32)), batch_of(pictures(4, 64, 80))
    torch.testing.assert_close(pil.score(same).values, tensor.score(same).values, rtol=0, atol=1e-6)
    difference = (pil.score(other).values - tensor.score(other).values).abs().max()
    assert 0 < difference < 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"library": "clip"}, "library must be transformers or open_clip, not 'clip'"),
        ({"variant": "logit"}, "variant must be cosine, hessel or x100, not 'logit'"),
        ({"long_prompts": "split"}, "long_prompts must be truncate or average"),
        ({"preprocessing": "cv2"}, "preprocessing must be tensor or pil"),
        ({"pretrained": "openai"}, "pretrained is for library: open_clip"),
        ({"library": "open_clip"}, "takes as model an architecture such as ViT-L-14-quickgelu"),
        ({"library": "open_clip", "pretrained": "openai"}, "takes as model an architecture"),
        ({"library": "open_clip", "model": "ViT-L-14"}, "takes as model an architecture"),
        ({"library": "open_clip", "model": "hf-hub:a/b", "pretrained": "openai"}, "takes as model an architecture"),
    ],
)
def test_arguments_that_are_wrong_are_refused_before_anything_is_loaded(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^reward clipscore: .*{re.escape(message)}"):
        ClipScore(**arguments)


def test_facts_are_those_of_the_model_that_is_asked_for() -> None:
    assert ClipScore().info.parameters == 427_616_513
    assert ClipScore("ViT-L-14-quickgelu", "open_clip", pretrained="openai").info.weights == ("ViT-L-14-quickgelu:openai",)
    assert ClipScore("ViT-L-14-quickgelu", "open_clip", pretrained="openai").info.extra == "clip"
    assert (ClipScore(variant="hessel").info.low, ClipScore(variant="hessel").info.high) == (0, 2.5)


# what can be wrong with a checkpoint


def test_open_clip_weights_of_openai_need_the_architecture_with_their_activation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "x.pt"))
    with pytest.raises(UserError, match=r"^reward clipscore: open_clip could not load ViT-B-32 with openai .*QuickGELU mismatch"):
        loaded(ClipScore("ViT-B-32", "open_clip", pretrained="openai"))


def test_open_clip_that_is_missing_or_finds_nothing_is_an_error_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^reward clipscore: open_clip could not load ViT-B-32 with nothing \([^\n]*\); see open_clip\.list_pretrained"):
        loaded(ClipScore("ViT-B-32", "open_clip", pretrained="nothing"))
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"^reward clipscore: needs the package open_clip.*install flowrl-diffusion\[clip\]"):
        loaded(ClipScore("ViT-B-32", "open_clip", pretrained="openai"))


@pytest.mark.parametrize(
    ("steps", "message"),
    [({"mean": [0.5, 0.5, 0.5]}, r"mean \[0\.5, 0\.5, 0\.5\]"), ({"resize_mode": "squash"}, "resize_mode squash"), ({}, "dict")],
)
def test_a_network_of_open_clip_with_other_preprocessing_or_another_tokenizer_is_refused(
    open_clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: dict[str, Any], message: str
) -> None:
    config = json.loads((open_clip_folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"] |= steps
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_pytorch_model.bin").hardlink_to(open_clip_folder / "open_clip_pytorch_model.bin")
    if not steps:
        monkeypatch.setattr(open_clip, "get_tokenizer", lambda _: {})
    with pytest.raises(UserError, match=rf"does not have CLIP's tokenizer and preprocessing \({message}\)"):
        loaded(ClipScore(f"local-dir:{tmp_path}", "open_clip"))


@pytest.mark.parametrize("make", [lambda path: ClipScore(path), lambda path: PickScore(path, path)])
def test_a_missing_damaged_or_unreachable_checkpoint_is_an_error_of_one_line(
    make: Callable[[str], NetworkReward], clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_offline(monkeypatch, tmp_path / "cache")
    (tmp_path / "config.json").write_text((clip / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"\x07" * 100)
    name = make("x").info.name
    for path, message in (
        ("/does/not/exist", "there is no file or folder"),
        (str(tmp_path), "could not be loaded"),
        ("nobody/nothing", "nobody/nothing was neither found in the hub's cache"),
    ):
        with pytest.raises(UserError, match=f"^reward {name}: [^\n]*{message}[^\n]*$"):
            loaded(make(path))


@pytest.mark.parametrize(("vocabulary", "end"), [(1000, 999), (1000, 2), (50000, 49999)])
def test_a_tokenizer_of_another_network_is_refused(vocabulary: int, end: int, clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPConfig

    config = CLIPConfig.from_pretrained(clip)
    config.text_config.vocab_size, config.text_config.eos_token_id = vocabulary, end
    CLIPModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^reward pickscore: the tokenizer of .*49408 tokens, end 49407\) does not fit .*{vocabulary} tokens, end {end}"):
        loaded(PickScore(str(tmp_path), str(clip)))


def test_a_network_whose_config_has_the_old_end_token_reads_the_same(plain: Any, tmp_path: Path) -> None:
    old = save_clip(tmp_path, eos_token_id=2)
    batch = batch_of(pictures(3, 32))
    assert torch.equal(loaded(ClipScore(str(old))).score(batch).values, plain.score(batch).values)


# pickscore


def test_pickscore_keeps_the_contract(clip: Path) -> None:
    assert_reward_contract(lambda: PickScore(str(clip), str(clip)), batch_of(pictures(5, 40, 56)))


def test_pickscore_is_the_scaled_cosine_divided_by_26(clip: Path, tmp_path: Path) -> None:
    network = CLIPModel.from_pretrained(clip)
    network.logit_scale.data.fill_(math.log(100))
    network.save_pretrained(tmp_path / "model")
    words = save_clip_tokenizer(tmp_path / "words")
    batch = batch_of(pictures(4, 32), ["a red cat", "two dogs", LONG, "two dogs"])
    expected = 100 * slow_cosines(network, AutoTokenizer.from_pretrained(words), batch, [prompt.text for prompt in batch.prompts])
    scores = loaded(PickScore(str(tmp_path / "model"), str(words))).score(batch)
    torch.testing.assert_close(scores.raw["pickscore_raw"], expected.float(), rtol=0, atol=1e-4)
    torch.testing.assert_close(scores.values, (expected / 26).float(), rtol=0, atol=1e-5)
    assert scores.raw["pickscore_truncated"].tolist() == [0, 0, 1, 0]


def test_the_scale_is_exact_whatever_the_towers_run_in(clip: Path, tmp_path: Path) -> None:
    network = CLIPModel.from_pretrained(clip)
    network.logit_scale.data.fill_(math.log(100))
    network.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        reward = loaded(PickScore(str(tmp_path), str(clip)), dtype)
        assert reward.network.scale.item() == pytest.approx(100, rel=1e-6)
        assert reward.network.network.visual_projection.weight.dtype == dtype


def test_the_logit_scale_does_not_change_the_order(clip: Path) -> None:
    reward, batch = loaded(PickScore(str(clip), str(clip))), batch_of(pictures(8, 32))
    before = reward.score(batch).values
    reward.network.scale.fill_(math.exp(1))
    after = reward.score(batch).values
    assert torch.equal(before.argsort(), after.argsort())
    torch.testing.assert_close(after / before, torch.full((8,), math.exp(1) / (1 / 0.07)), rtol=1e-4, atol=0)


def test_pickscore_reads_the_tokenizer_from_its_own_source(clip: Path, tmp_path: Path) -> None:
    CLIPModel.from_pretrained(clip).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^reward pickscore: "):
        loaded(PickScore(str(tmp_path), str(tmp_path)))
    assert loaded(PickScore(str(tmp_path), str(clip))).score(batch_of(pictures(2))).valid.all()
    with pytest.raises(UserError, match="preprocessing must be"):
        PickScore(preprocessing="none")  # type: ignore[arg-type]
