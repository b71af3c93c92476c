"""rewards/ink.py: rendered and sampled scenes, the value by hand, gradients by finite differences, and bad input."""

from __future__ import annotations

import pickle
import random

import pytest
import torch
from torch import Tensor

from flowrl.types import Prompt, Reward, SampleBatch, UserError
from rewards.ink import InkReward, score_ink
from rewards.scene_world import BACKGROUND, COLORS, PALETTE, SHAPES, Scene, caption, place, render

ALL = torch.eye(4, dtype=torch.bool)


def scenes(count: int, seed: int = 0) -> tuple[list[Scene], Tensor]:
    """Scenes of one to three objects, and their pictures."""
    rng = random.Random(seed)
    kinds = [(c, s) for c in range(len(COLORS)) for s in range(len(SHAPES))]
    drawn = []
    for _ in range(count):
        first, second = rng.sample(kinds, 2)
        drawn.append(rng.choice([Scene((first,) * rng.randint(1, 3)), Scene((first, second)), Scene((first, second), rng.randrange(4))]))
    return drawn, render(drawn, place(drawn, torch.Generator().manual_seed(seed)))


def colors(drawn: list[Scene]) -> Tensor:
    return torch.tensor([[any(c == kind[0] for kind in scene.kinds) for c in range(4)] for scene in drawn])


def batch_of(images: Tensor, text: str = "a red circle") -> SampleBatch:
    return SampleBatch([Prompt(text)] * len(images), images)


def plain(color: Tensor, size: int = 8, count: int = 4) -> Tensor:
    return color.view(1, 3, 1, 1).expand(count, 3, size, size)


# --- what it says of pictures


def test_true_scenes_are_near_1_and_the_same_pictures_with_other_colours_named_near_0() -> None:
    drawn, images = scenes(300)
    right, area = score_ink(images, colors(drawn))
    wrong, _ = score_ink(images, ~colors(drawn))
    assert right.min() > 0.94
    assert wrong.mean() < 0.08
    assert wrong.max() < 0.15
    objects = torch.tensor([float(len(scene.kinds)) for scene in drawn])
    torch.testing.assert_close(area, objects * 85 / 1024, rtol=0.15, atol=0)  # an object covers about 85 pixels


def test_the_captions_of_all_scenes_name_their_colours() -> None:
    drawn, images = scenes(100, seed=1)
    for form in range(4):
        scores = InkReward().score(SampleBatch([Prompt(caption(scene, form)) for scene in drawn], images))
        torch.testing.assert_close(scores.values, score_ink(images, colors(drawn))[0])
        assert scores.valid.all()


def test_half_of_the_objects_in_a_named_colour_is_worth_about_one_half() -> None:
    drawn = [Scene(((0, 1), (2, 1))), Scene(((3, 0), (1, 0)))]
    images = render(drawn, place(drawn, torch.Generator().manual_seed(0)))
    both = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]], dtype=torch.bool)
    first = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    torch.testing.assert_close(score_ink(images, first)[0] / score_ink(images, both)[0], torch.tensor([0.5, 0.5]), rtol=0, atol=0.06)


def test_paint_of_one_palette_colour_is_that_colour_and_no_other() -> None:
    images = PALETTE.view(4, 1, 3, 1, 1).expand(4, 4, 3, 8, 8).reshape(16, 3, 8, 8)
    table = score_ink(images, ALL.repeat(4, 1))[0].view(4, 4)
    assert table.diagonal().min() > 0.99
    assert (table - table.diagonal().diag()).max() < 0.04


def test_empty_grey_and_black_pictures_are_worth_little() -> None:
    assert score_ink(plain(BACKGROUND), ALL)[0].abs().max() < 1e-6
    noisy = (plain(BACKGROUND, 32) + 0.02 * torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert score_ink(noisy, ALL)[0].max() < 0.1
    assert score_ink(plain(torch.zeros(3)), ALL)[0].max() < 0.05
    assert score_ink(plain(torch.full((3,), 0.5)), ALL)[0].max() < 0.25


def test_a_mixture_with_the_background_keeps_its_colour() -> None:
    half = (PALETTE + BACKGROUND) / 2
    images = half.view(4, 3, 1, 1).expand(4, 3, 8, 8)
    assert score_ink(images, ALL)[0].min() > 0.98


def test_the_value_by_hand() -> None:
    # a quarter of the picture is blue; o = (-0.79, -0.65, -0.07): q = 1.0515; red is named: a = (-0.07, -0.79, -0.79), |a|^2 = 1.2531
    image = plain(BACKGROUND, 2, 1).clone()
    image[0, :, 0, 0] = PALETTE[2]
    q = 0.79**2 + 0.65**2 + 0.07**2
    drawn = q**2 / (q**2 + 0.01)
    dot, square = 0.79 * 0.07 + 0.65 * 0.79 + 0.07 * 0.79, 0.07**2 + 2 * 0.79**2
    near = (0.05 / (0.05 + q - dot**2 / square)) ** 2
    expected = drawn / 4 * near / (drawn / 4 + 1 / 256)
    ink, area = score_ink(image.double(), ALL[:1])
    assert ink.item() == pytest.approx(expected, rel=1e-5)
    assert area.item() == pytest.approx(drawn / 4, rel=1e-6)
    own = score_ink(image.double(), ALL[2:3])[0]
    assert own.item() == pytest.approx(drawn / 4 / (drawn / 4 + 1 / 256), rel=1e-6)


def test_a_brighter_red_is_near_the_ray_and_what_points_away_from_every_colour_is_as_far_as_it_is_long() -> None:
    # pure red: o = (0.07, -0.93, -0.93), o.a = 1.4645 with |a|^2 = 1.2531; white: o = (0.07, 0.07, 0.07) has a negative product with red, green and blue
    def value(q: float, distance: float) -> float:
        drawn = q**2 / (q**2 + 0.01)
        return drawn * (0.05 / (0.05 + distance)) ** 2 / (drawn + 1 / 256)

    q, dot, square = 0.07**2 + 2 * 0.93**2, -(0.07**2) + 2 * 0.93 * 0.79, 0.07**2 + 2 * 0.79**2
    red = score_ink(plain(torch.tensor([1.0, 0.0, 0.0]), count=1).double(), ALL[:1])[0]
    assert red.item() == pytest.approx(value(q, q - dot**2 / square), rel=1e-5)
    white = score_ink(plain(torch.ones(3), count=3).double(), ALL[:3])[0]
    assert white.tolist() == pytest.approx([value(3 * 0.07**2, 3 * 0.07**2)] * 3, rel=1e-5)


def test_more_named_colours_never_lower_the_score_and_colours_have_no_order() -> None:
    images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    one, two = ALL.repeat(4, 1), ALL.repeat(4, 1) | ALL[0]
    assert (score_ink(images, two)[0] >= score_ink(images, one)[0]).all()
    texts = ("a red circle and a blue square", "a blue circle above a red triangle", "Blue, RED.")
    values = [InkReward().score(batch_of(images, text)).values for text in texts]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


def test_only_whole_words_name_colours() -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    embedded = InkReward().score(batch_of(images, "a hundred blue squares, bored")).values
    assert torch.equal(embedded, InkReward().score(batch_of(images, "a blue square")).values)


def test_a_picture_says_the_same_in_any_size_place_and_company() -> None:
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    reward = InkReward()
    values = reward.score(batch_of(images)).values
    assert values.unique().numel() == 6
    torch.testing.assert_close(torch.cat([reward.score(batch_of(image[None])).values for image in images]), values)
    torch.testing.assert_close(reward.score(batch_of(images.repeat_interleave(2, 2).repeat_interleave(3, 3))).values, values)
    torch.testing.assert_close(reward.score(batch_of(images.roll((3, 2), (2, 3)).flip(3))).values, values)


def test_pictures_of_the_base_model_lie_between_wrong_and_right() -> None:
    from flowrl.policies.sd3 import Sd3Policy
    from flowrl.sections import ModelConfig
    from samplers.rollout import sample_ode
    from samplers.schedules import sigma_grid

    policy = Sd3Policy(ModelConfig(path="flowrl:tiny-sd3"), torch.device("cpu"))
    prompts = [Prompt(f"a {color} {shape}") for color in COLORS for shape in SHAPES] * 2
    noise = torch.randn(24, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    latents = sample_ode(policy.velocity(), noise, sigma_grid("shifted", 10, 3.0), policy.prompt_rows([prompt.text for prompt in prompts]))
    images = policy.decode(latents)
    right = InkReward().score(SampleBatch(prompts, images)).values
    shifted = [Prompt(f"a {COLORS[(COLORS.index(prompt.text.split()[1]) + 1) % 4]} circle") for prompt in prompts]
    wrong = InkReward().score(SampleBatch(shifted, images)).values
    assert 0.6 < right.mean() < 0.99
    assert wrong.mean() < 0.2
    assert right.quantile(0.1) < 0.9  # some miss their colour: there is something to learn


# --- the gradient


def test_the_gradient_equals_a_finite_difference() -> None:
    # pixels at random, pixels on the rays, and the background itself
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images[0, :, 0, :] = PALETTE.double().T
    images[0, :, 1, :] = BACKGROUND.double()[:, None]
    images[0, :, 2, :] = (1.2 * PALETTE - 0.2 * BACKGROUND).double().T
    wanted = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda x: score_ink(x, wanted), images.requires_grad_(), eps=1e-6, atol=1e-6, rtol=1e-4)


def test_following_the_gradient_gives_the_named_colour() -> None:
    images = plain(PALETTE[2], count=1).clone().requires_grad_()
    before = score_ink(images, ALL[:1])[0].item()
    for _ in range(400):
        (slope,) = torch.autograd.grad(score_ink(images, ALL[:1])[0].sum(), images)
        images = (images + 0.03 * slope / slope.abs().max()).clamp(0, 1).detach().requires_grad_()
    assert before < 0.02
    assert score_ink(images, ALL[:1])[0].item() > 0.9
    assert score_ink(images, ~ALL[:1])[0].item() < 0.2
    red, green, blue = images.detach().mean((0, 2, 3)).tolist()
    assert red > max(green, blue) + 0.3


def test_scores_carry_the_gradient_of_the_pictures_also_beside_a_broken_one() -> None:
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[1, 0, 2, 2] = float("nan")
    images.requires_grad_()
    scores = InkReward().score(batch_of(images))
    assert scores.valid.tolist() == [True, False, True]
    assert scores.problems == {1: "the picture has NaN or infinite pixels"}
    assert scores.values.isnan().tolist() == scores.raw["ink_area"].isnan().tolist() == [False, True, False]
    assert not scores.raw["ink_area"].requires_grad
    (slope,) = torch.autograd.grad(scores.values[scores.valid].sum(), images)
    assert slope.isfinite().all()
    assert slope[1].eq(0).all()
    assert slope[[0, 2]].flatten(1).norm(dim=1).min() > 0


# --- the protocol, and bad input


def test_the_reward_keeps_the_protocol_its_stated_range_and_survives_pickling() -> None:
    reward, batch = InkReward(), batch_of(torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert isinstance(reward, Reward)
    assert reward.info.differentiable
    reward.load(torch.device("cpu"), torch.float32)
    values = reward.score(batch).values
    assert values.dtype == torch.float32
    assert (values > reward.info.low).all()
    assert (values < reward.info.high).all()
    assert torch.equal(pickle.loads(pickle.dumps(reward)).score(batch).values, values)


def test_half_precision_pictures_are_scored_in_single_precision() -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(InkReward().score(batch_of(images)).values, InkReward().score(batch_of(images.float())).values)


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
    with pytest.raises(UserError, match=f"^reward ink: needs pictures .*{got}"):
        InkReward().score(SampleBatch([Prompt("a red circle")], images))


def test_a_prompt_without_a_colour_is_refused() -> None:
    line = r"^reward ink: the prompt 'a hundred squares' names none of the colours red, green, blue, yellow; use prompts that do, or another reward$"
    with pytest.raises(UserError, match=line):
        InkReward().score(batch_of(torch.zeros(1, 3, 8, 8), "a hundred squares"))
    with pytest.raises(UserError, match=line):
        InkReward().check_prompts([Prompt("a red circle"), Prompt("a hundred squares")])
