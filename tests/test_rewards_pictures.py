"""rewards/pictures.py and network.py: constants and pixels by hand, published processors, and what every reward with a network has from its base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as published
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reward_models import CPU, assert_reward_contract, batch_of, pictures
from torch import Tensor, nn

from flowrl.types import Prompt, RewardInfo, SampleBatch, UserError
from rewards.network import NetworkReward, check_choice
from rewards.pictures import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Preprocessing, pictures_of, to_pil, to_uint8

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
ROUNDING = 1.2 / 255  # Pillow rounds to 8 bits after each of two passes: half a level at the end, and half a level times the weights' absolute sum before


def plain(size: int, fit: Literal["shortest", "longest", "squash"], **options: Any) -> Preprocessing:
    """Preprocessing without normalisation."""
    return Preprocessing(size, fit, ZERO, ONE, **options)


# pictures


def test_constants_are_the_published_ones() -> None:
    assert CLIP_MEAN == (0.48145466, 0.4578275, 0.40821073)
    assert CLIP_STD == (0.26862954, 0.26130258, 0.27577711)
    assert IMAGENET_MEAN == (0.485, 0.456, 0.406)
    assert IMAGENET_STD == (0.229, 0.224, 0.225)


def test_pictures_are_float32_and_clamped() -> None:
    images = torch.tensor([-0.5, 0.25, 1.5], dtype=torch.float64).view(1, 3, 1, 1)
    got, valid = pictures_of("test", batch_of(images))
    assert got.dtype == torch.float32
    assert got.flatten().tolist() == [0, 0.25, 1]
    assert valid.tolist() == [True]


@pytest.mark.parametrize("pixel", [float("nan"), float("inf"), -float("inf")])
def test_a_picture_with_a_pixel_that_is_no_number_is_black_and_invalid(pixel: float) -> None:
    images = pictures(3)
    images[1, 2, 3, 4] = pixel
    got, valid = pictures_of("test", batch_of(images))
    assert valid.tolist() == [True, False, True]
    assert not got[1].any()
    assert torch.equal(got[[0, 2]], images[[0, 2]])
    assert not images[1, 2, 3, 4].isfinite(), "the input was changed"


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (None, "got none"),
        (torch.zeros(1, 1, 8, 8), r"\[1, 1, 8, 8\] torch.float32"),
        (torch.zeros(3, 8, 8), r"\[3, 8, 8\] torch.float32"),
        (torch.zeros(1, 3, 8, 8).byte(), "torch.uint8"),
    ],
)
def test_anything_but_rgb_pictures_in_floating_point_is_refused(images: Tensor | None, got: str) -> None:
    with pytest.raises(UserError, match=f"^reward test: needs pictures .*{got}; choose another reward"):
        pictures_of("test", SampleBatch([Prompt("x")], images))


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="reward test: cannot score an empty batch"):
        pictures_of("test", SampleBatch([], torch.zeros(0, 3, 8, 8)))


def test_pixels_are_rounded_to_the_nearest_level_and_never_wrap() -> None:
    levels = torch.tensor([-1.0, 0.0, 0.49 / 255, 0.51 / 255, 100.4 / 255, 254.6 / 255, 1.0, 2.0])
    images = levels.expand(1, 3, 1, 8)
    assert to_uint8(images)[0, 0, 0].tolist() == [0, 0, 0, 1, 100, 255, 255, 255]
    assert np.asarray(to_pil(images)[0])[0, :, 2].tolist() == [0, 0, 0, 1, 100, 255, 255, 255]


def test_pil_pictures_have_red_first_and_the_right_way_up() -> None:
    images = torch.zeros(2, 3, 2, 5)
    images[1, 0, 1, 4] = 1
    found = to_pil(images)
    assert [picture.size for picture in found] == [(5, 2), (5, 2)]
    assert found[1].mode == "RGB"
    assert found[1].getpixel((4, 1)) == (255, 0, 0)


# preprocessing


@pytest.mark.parametrize("backend", ["pil", "tensor"])
def test_white_and_black_become_the_published_numbers(backend: Literal["pil", "tensor"]) -> None:
    images = torch.stack([torch.ones(3, 10, 10), torch.zeros(3, 10, 10)])
    pixels = Preprocessing(4, "shortest", CLIP_MEAN, CLIP_STD, backend=backend)(images)
    white, black = [1.9303, 2.0749, 2.1459], [-1.7923, -1.7521, -1.4802]  # (1 - mean) / std and -mean / std, by hand
    torch.testing.assert_close(pixels[:, :, 0, 0], torch.tensor([white, black]), rtol=0, atol=1e-4)
    assert pixels.shape == (2, 3, 4, 4)
    assert pixels.dtype == torch.float32


@pytest.mark.parametrize("shape", [(48, 48), (40, 64), (65, 40), (40, 62), (30, 31)])
def test_shortest_is_what_the_transforms_of_openai_do(shape: tuple[int, int]) -> None:
    images = pictures(2, *shape)
    cubic = published.InterpolationMode.BICUBIC
    cut = [published.center_crop(published.resize(picture, 24, cubic), [24, 24]) for picture in to_pil(images)]
    assert torch.equal(plain(24, "shortest", backend="pil")(images), torch.stack([published.to_tensor(picture) for picture in cut]))


@pytest.mark.parametrize("shape", [(48, 48), (40, 64), (64, 40), (30, 31)])  # of an odd rest, such as 39 - 24, transformers may cut one more on the other side
def test_shortest_is_what_the_processor_of_clip_does(shape: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessorPil

    images = pictures(2, *shape)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    expected = torch.as_tensor(np.stack(processor(to_pil(images))["pixel_values"]))
    pil = Preprocessing(24, "shortest", CLIP_MEAN, CLIP_STD, backend="pil")(images)
    torch.testing.assert_close(pil, expected, rtol=0, atol=1e-5)
    tensor = Preprocessing(24, "shortest", CLIP_MEAN, CLIP_STD)(images)
    assert (tensor - expected).abs().max() < ROUNDING / min(CLIP_STD)


@pytest.mark.parametrize("shape", [(48, 48), (40, 64), (65, 40), (12, 20)])
def test_squash_is_what_the_processor_of_siglip_does(shape: tuple[int, int]) -> None:
    from transformers import SiglipImageProcessorPil

    images = pictures(2, *shape)
    processor = SiglipImageProcessorPil(size={"height": 24, "width": 24}, resample=Image.Resampling.BICUBIC)
    expected = torch.as_tensor(np.stack(processor(to_pil(images))["pixel_values"]))
    half = (0.5, 0.5, 0.5)
    torch.testing.assert_close(Preprocessing(24, "squash", half, half, backend="pil")(images), expected, rtol=0, atol=1e-5)
    assert (Preprocessing(24, "squash", half, half)(images) - expected).abs().max() < ROUNDING / 0.5


@pytest.mark.parametrize("shape", [(48, 48), (40, 64), (65, 40), (12, 19)])
def test_longest_is_resized_as_a_tensor_and_padded_with_black(shape: tuple[int, int]) -> None:
    images = pictures(2, *shape)
    height, width = (round(side * 24 / max(shape)) for side in shape)
    resized = published.resize(images, [height, width], published.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    down, right = 24 - height, 24 - width
    expected = published.pad(resized, [right // 2, down // 2, right - right // 2, down - down // 2], fill=0)
    torch.testing.assert_close(plain(24, "longest")(images), expected, rtol=0, atol=1e-6)
    pil = plain(24, "longest", backend="pil")(images)
    assert (pil - expected).abs().max() < ROUNDING
    assert torch.equal(pil == 0, expected == 0) or shape == (48, 48)


def test_a_larger_shorter_side_is_cut_from_the_middle() -> None:
    columns = torch.arange(16.0).expand(1, 3, 8, 16) / 16  # 8 x 16: the shorter side is 8 already
    cut = plain(4, "shortest", resize=8)(columns)
    assert torch.equal(cut, (columns * 255).round()[:, :, 2:6, 6:10] / 255)
    for wrong in (lambda: plain(8, "shortest", resize=7), lambda: plain(4, "squash", resize=8)):
        with pytest.raises(ValueError, match=r"resize \d must be"):
            wrong()


def test_bilinear_is_not_bicubic() -> None:
    images = pictures(1, 40)
    expected = published.resize(images, [16, 16], published.InterpolationMode.BILINEAR, antialias=True)
    torch.testing.assert_close(plain(16, "squash", filter="bilinear")(images), expected, rtol=0, atol=1e-6)
    pil = plain(16, "squash", filter="bilinear", backend="pil")(images)
    assert (pil - expected).abs().max() < ROUNDING
    assert (plain(16, "squash")(images) - expected).abs().max() > 0.01


@pytest.mark.parametrize("fit", ["shortest", "longest", "squash"])
def test_pictures_of_the_right_size_keep_their_8_bits_in_both_backends(fit: Literal["shortest", "longest", "squash"]) -> None:
    images = pictures(3, 24)
    for backend in ("pil", "tensor"):
        assert torch.equal(plain(24, fit, backend=backend)(images), images)
        assert torch.equal(plain(24, fit, backend=backend)(images + 0.3 / 255), images.clamp(max=1)), "not rounded to 8 bits"


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    fit=st.sampled_from(["shortest", "longest", "squash"]),
    backend=st.sampled_from(["pil", "tensor"]),
    size=st.integers(1, 30),
)
def test_any_size_becomes_a_square_of_numbers_in_range_and_a_picture_does_not_see_the_others(
    height: int, width: int, fit: Any, backend: Any, size: int
) -> None:
    images = pictures(3, height, width).round()  # of 0 and 1, so that bicubic interpolation overshoots
    steps = plain(size, fit, backend=backend)
    got = steps(images)
    assert got.shape == (3, 3, size, size)
    assert 0 <= got.min() <= got.max() <= 1
    torch.testing.assert_close(got[1:2], steps(images[1:2]), rtol=0, atol=1e-6)


# what rewards with a network have in common


class Brightness(NetworkReward):
    """Mean of the picture times a weight, with everything a network could do wrong if the base let it."""

    info = RewardInfo(name="brightness", description="mean pixel times a weight", low=0, high=2, source="this test", reads=("images",))

    def __init__(self) -> None:
        self.num_built = 0

    def build(self, dtype: torch.dtype) -> nn.Module:
        self.num_built += 1
        network = nn.Linear(1, 1, bias=False, dtype=dtype)
        nn.init.constant_(network.weight, 2.0)
        return network.train()

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.network is not None
        assert not self.network.training
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        weight = next(self.network.parameters())
        mean = images.mean((1, 2, 3))
        return self.network(mean[:, None].to(weight.dtype))[:, 0], {"mean": mean.double(), "length": torch.tensor([len(p.text) for p in prompts])}


def test_the_base_keeps_the_contract() -> None:
    assert_reward_contract(Brightness, batch_of(pictures()))


def test_the_network_is_built_once_in_evaluation_mode_without_gradients() -> None:
    reward = Brightness()
    reward.load(CPU, torch.bfloat16)
    reward.load(CPU, torch.float32)
    assert reward.num_built == 1
    assert reward.network is not None
    weight = next(reward.network.parameters())
    assert (weight.dtype, weight.requires_grad) == (torch.bfloat16, False)
    assert reward.score(batch_of(pictures())).values.dtype == torch.float32


def test_scores_are_ordinary_tensors_that_training_may_use() -> None:
    reward = Brightness()
    reward.load(CPU, torch.float32)
    scores = reward.score(batch_of(pictures(2)))
    assert scores.raw["length"].dtype == scores.raw["mean"].dtype == torch.float32
    for column in (scores.values, *scores.raw.values()):
        weight = torch.ones(2, requires_grad=True)
        (column * weight).sum().backward()
        column += 1
        assert weight.grad is not None


def test_a_picture_that_is_no_picture_is_invalid_and_the_others_keep_their_scores() -> None:
    reward = Brightness()
    reward.load(CPU, torch.float32)
    images = pictures(3)
    clean = reward.score(batch_of(images))
    images[1, 0, 0, 0] = torch.nan
    scores = reward.score(batch_of(images))
    assert scores.valid.tolist() == [True, False, True]
    assert torch.equal(scores.values[[0, 2]], clean.values[[0, 2]])
    assert scores.values[1].isnan()
    assert scores.raw["mean"].isnan().tolist() == [False, True, False]
    assert scores.problems == {1: "the picture has NaN or infinite pixels"}


def test_moving_before_loading_is_an_error_and_after_it_moves_the_network() -> None:
    reward = Brightness()
    with pytest.raises(RuntimeError, match="reward brightness: load must be called before to"):
        reward.to(CPU)
    reward.load(CPU, torch.float32)
    reward.to(torch.device("meta"))
    assert reward.device == torch.device("meta")
    assert reward.network is not None
    assert next(reward.network.parameters()).is_meta


def test_a_choice_is_checked() -> None:
    check_choice("test", "fit", "a", ("a", "b", "c"))
    with pytest.raises(UserError, match=r"^reward test: fit must be a, b or c, not 3$"):
        check_choice("test", "fit", 3, ("a", "b", "c"))
