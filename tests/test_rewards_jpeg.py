"""rewards/jpeg.py: sizes against files on the disk, order of flat and noisy pictures, and bad input."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flowrl.types import Prompt, Reward, SampleBatch, UserError
from rewards.jpeg import JpegReward, jpeg_compressibility, jpeg_incompressibility


def batch_of(images: Tensor) -> SampleBatch:
    return SampleBatch([Prompt(f"picture {i}") for i in range(len(images))], images)


def pictures(num: int = 7, size: int = 24) -> Tensor:
    """[num, 3, size, size] in [0, 1]: noise of growing strength on a ramp, so that every picture has its own size."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0.2, 0.8, size).expand(num, 3, size, size)
    strength = torch.linspace(0, 0.5, num)[:, None, None, None]
    return (ramp + strength * torch.randn(num, 3, size, size, generator=generator)).clamp(0, 1)


def test_the_score_is_the_size_in_thousands_of_bytes_of_a_quality_95_file(tmp_path: Path) -> None:
    images = pictures()
    sizes = []
    for i, image in enumerate(images):
        array = np.round(image.numpy().transpose(1, 2, 0) * np.float32(255)).astype(np.uint8)
        Image.fromarray(array).save(tmp_path / f"{i}.jpg", quality=95)  # Pillow's defaults: what the DDPO code does
        sizes.append((tmp_path / f"{i}.jpg").stat().st_size)
    expected = torch.tensor(sizes) / 1000
    large, small = jpeg_incompressibility().score(batch_of(images)), jpeg_compressibility().score(batch_of(images))
    assert torch.equal(large.values, expected)
    assert torch.equal(small.values, -expected)
    assert large.values.dtype == torch.float32
    assert large.valid.all()
    torch.testing.assert_close(large.raw["bits_per_pixel"], 8 * torch.tensor(sizes) / (24 * 24))
    torch.testing.assert_close(small.raw["bits_per_pixel"], large.raw["bits_per_pixel"])


def test_noise_is_less_compressible_than_a_ramp_and_a_ramp_less_than_a_flat_picture() -> None:
    flat = torch.full((3, 64, 64), 0.5)
    ramp = torch.linspace(0, 1, 64).expand(3, 64, 64)
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))
    batch = batch_of(torch.stack([noise, flat, ramp]))
    assert jpeg_incompressibility().score(batch).values.argsort().tolist() == [1, 2, 0]
    assert jpeg_compressibility().score(batch).values.argsort().tolist() == [0, 2, 1]


def test_a_batch_scores_as_its_pictures_one_by_one_and_in_any_order() -> None:
    images, reward = pictures(), jpeg_incompressibility()
    together = reward.score(batch_of(images)).values
    assert together.unique().numel() == len(images)
    assert torch.equal(together, torch.cat([reward.score(batch_of(image[None])).values for image in images]))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(2))
    assert torch.equal(together[order], reward.score(batch_of(images[order])).values)


def test_scoring_twice_gives_the_same_and_leaves_the_pictures_as_they_were() -> None:
    images, reward = pictures() * 1.5 - 0.2, jpeg_incompressibility()
    before = images.clone()
    first = reward.score(batch_of(images)).values
    assert torch.equal(first, reward.score(batch_of(images)).values)
    assert torch.equal(images, before)


def test_pixels_outside_0_to_1_are_clamped_not_wrapped() -> None:
    images = pictures() * 3 - 1
    reward = jpeg_incompressibility()
    assert torch.equal(reward.score(batch_of(images)).values, reward.score(batch_of(images.clamp(0, 1))).values)


def test_a_lower_quality_gives_a_smaller_file() -> None:
    batch = batch_of(pictures(2, 64))
    assert (jpeg_incompressibility(quality=50).score(batch).values < jpeg_incompressibility().score(batch).values).all()


@pytest.mark.parametrize("pixel", [float("nan"), float("inf")])
def test_a_picture_with_a_pixel_that_is_no_number_is_invalid_and_the_others_are_not(pixel: float) -> None:
    images = pictures(3)
    clean = jpeg_compressibility().score(batch_of(images)).values
    images[1, 0, 3, 3] = pixel
    scores = jpeg_compressibility().score(batch_of(images))
    assert scores.valid.tolist() == [True, False, True]
    assert scores.values.isnan().tolist() == [False, True, False]
    assert scores.raw["bits_per_pixel"].isnan().tolist() == [False, True, False]
    assert scores.problems == {1: "the picture has NaN or infinite pixels"}
    assert torch.equal(scores.values[[0, 2]], clean[[0, 2]])


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="jpeg_compressibility: cannot score an empty batch"):
        jpeg_compressibility().score(batch_of(torch.zeros(0, 3, 8, 8)))


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (None, "got none"),
        (torch.zeros(1, 1, 8, 8), r"\[1, 1, 8, 8\]"),
        (torch.zeros(3, 8, 8), r"\[3, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8"),
    ],
)
def test_anything_but_rgb_pictures_in_floating_point_is_refused(images: Tensor | None, got: str) -> None:
    with pytest.raises(UserError, match=f"^reward jpeg_incompressibility: needs pictures .*{got}"):
        jpeg_incompressibility().score(SampleBatch([Prompt("x")], images))


@pytest.mark.parametrize("quality", [0, 101, 95.0, True])
def test_a_quality_that_is_not_a_whole_number_from_1_to_100_is_refused(quality: object) -> None:
    with pytest.raises(UserError, match="reward jpeg_compressibility: quality must be"):
        jpeg_compressibility(quality)  # type: ignore[arg-type]


def test_an_unknown_direction_is_refused() -> None:
    with pytest.raises(UserError, match="direction must be compressibility or incompressibility, not 'down'"):
        JpegReward("down")  # type: ignore[arg-type]


def test_the_reward_keeps_the_protocol_its_stated_range_and_survives_pickling() -> None:
    batch = batch_of(pictures())
    for name, reward in {"jpeg_compressibility": jpeg_compressibility(), "jpeg_incompressibility": jpeg_incompressibility()}.items():
        assert isinstance(reward, Reward)
        assert reward.info.name == name
        reward.load(torch.device("cpu"), torch.float32)
        values = reward.score(batch).values
        assert (values > reward.info.low).all()
        assert (values < reward.info.high).all()
        assert torch.equal(pickle.loads(pickle.dumps(reward)).score(batch).values, values)
