"""rewards/aesthetic.py and aesthetic_siglip.py: heads against their layers run one after another, towers against slow embeddings."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_models import CPU, assert_reward_contract, batch_of, go_offline, pictures, rank_correlation, spread_weights
from torch import Tensor, nn

from flowrl.types import UserError
from rewards.aesthetic import AestheticReward, LinearScorer, aesthetic_v1, aesthetic_v2, fold_layers
from rewards.aesthetic_siglip import AestheticSiglip
from rewards.pictures import CLIP_MEAN, CLIP_STD

V2_LAYERS = [f"layers.{i}" for i in (0, 2, 4, 6, 7)]


def head_of_v2(width: int, prefix: str = "layers", places: tuple[int, ...] = (0, 2, 4, 6, 7)) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """The published stack with narrower layers, and its file."""
    sizes = [width, 24, 12, 8, 4, 1]
    stack: list[nn.Module] = [nn.Dropout(0.2) for _ in range(places[-1] + 1)]
    for place, (size_in, size_out) in zip(places, itertools.pairwise(sizes), strict=True):
        stack[place] = nn.Linear(size_in, size_out)
    torch.manual_seed(0)
    head = nn.Sequential(*stack)
    spread_weights(head, 5)
    return head.double(), {f"{prefix}.{name}": weight.float() for name, weight in head.state_dict().items()}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP, of which only the image tower is wanted."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 16}
    config = CLIPConfig(text_config=tower, vision_config=tower | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    folder = tmp_path_factory.mktemp("clip")
    spread_weights(CLIPModel(config)).save_pretrained(folder)
    torch.save(head_of_v2(16)[1], folder / "v2.pth")
    torch.save({"weight": torch.arange(16.0)[None] / 8, "bias": torch.tensor([0.25])}, folder / "v1.pth")
    return folder


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import SiglipConfig, SiglipModel

    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = SiglipConfig(text_config=tower | {"vocab_size": 50}, vision_config=tower | {"image_size": 24, "patch_size": 8})
    folder = tmp_path_factory.mktemp("siglip")
    spread_weights(SiglipModel(config)).save_pretrained(folder)
    torch.save(head_of_v2(32, "scoring_head", (0, 2, 4, 6, 8))[1], folder / "head.pth")
    return folder


@pytest.fixture
def make(request: pytest.FixtureRequest, clip: Path, siglip: Path) -> Callable[..., AestheticReward]:
    return makers(clip, siglip)[request.param]


def makers(clip: Path, siglip: Path) -> dict[str, Callable[..., AestheticReward]]:
    return {
        "v1": lambda **options: aesthetic_v1(**{"model": str(clip), "head": str(clip / "v1.pth")} | options),
        "v2": lambda **options: aesthetic_v2(**{"model": str(clip), "head": str(clip / "v2.pth")} | options),
        "v2.5": lambda **options: AestheticSiglip(**{"model": str(siglip), "head": str(siglip / "head.pth")} | options),
    }


each = pytest.mark.parametrize("make", ["v1", "v2", "v2.5"], indirect=True)


def loaded(reward: AestheticReward, dtype: torch.dtype = torch.float32) -> AestheticReward:
    reward.load(CPU, dtype)
    return reward


def slow_embedding(network: Any, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Features of unit length, float64, one picture at a time."""
    pixels = (images.double() - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)
    with torch.no_grad():
        features = torch.cat([network.double().get_image_features(pixel_values=picture[None]).pooler_output for picture in pixels])
    return features / features.square().sum(-1, keepdim=True).sqrt()


def test_folded_layers_are_the_layers_one_after_another() -> None:
    head, tensors = head_of_v2(16)
    weight, bias = fold_layers("test", "head.pth", {name: tensor.double() for name, tensor in tensors.items()}, V2_LAYERS)
    assert weight.dtype == bias.dtype == torch.float64
    inputs = torch.randn(20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rounded = nn.Sequential(*head).eval()
    rounded.load_state_dict({name.removeprefix("layers."): tensor.double() for name, tensor in tensors.items()})
    with torch.no_grad():
        torch.testing.assert_close(inputs @ weight + bias, rounded(inputs)[:, 0], rtol=0, atol=1e-14)


def test_two_layers_folded_by_hand() -> None:
    tensors = {
        "a.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "a.bias": torch.tensor([5.0, 6.0]),
        "b.weight": torch.tensor([[7.0, 8.0]]),
        "b.bias": torch.tensor([9.0]),
    }
    weight, bias = fold_layers("test", "head.pth", tensors, ["a", "b"])
    assert weight.tolist() == [7 * 1 + 8 * 3, 7 * 2 + 8 * 4]
    assert bias.item() == 7 * 5 + 8 * 6 + 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"layers.9.weight": torch.zeros(1, 1)}, r"layers\.9\.weight is missing or has no place"),
        (lambda t: {k: v for k, v in t.items() if k != "layers.4.bias"}, r"layers\.4\.bias is missing or has no place"),
        (lambda t: t | {"layers.4.weight": torch.zeros(8, 13)}, r"layers\.2\.weight has the shape \[12, 24\] where 13 rows are needed"),
        (lambda t: t | {"layers.7.weight": torch.zeros(2, 4), "layers.7.bias": torch.zeros(2)}, r"layers\.7\.weight has the shape \[2, 4\] where 1 rows"),
        (lambda t: t | {"layers.7.bias": torch.zeros(3)}, r"layers\.7\.weight has the shape"),
        (lambda t: t | {"layers.7.weight": torch.zeros(1)}, r"layers\.7\.weight has the shape \[1\]"),
    ],
)
def test_a_head_of_another_shape_is_refused(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str) -> None:
    with pytest.raises(UserError, match=f"^reward test: head.pth is not the published head: {message}"):
        fold_layers("test", "head.pth", change(head_of_v2(16)[1]), V2_LAYERS)


@each
def test_aesthetics_keep_the_contract(make: Callable[..., AestheticReward]) -> None:
    assert_reward_contract(make, batch_of(pictures(4, 40, 56)))


def test_v2_is_the_published_stack_on_the_embedding_of_unit_length(clip: Path, siglip: Path) -> None:
    from transformers import CLIPModel

    images = pictures(4, 32)
    embedding = slow_embedding(CLIPModel.from_pretrained(clip), images, CLIP_MEAN, CLIP_STD)
    head, _ = head_of_v2(16)
    with torch.no_grad():
        expected = head.eval()(embedding)[:, 0].float()
    values = loaded(makers(clip, siglip)["v2"]()).score(batch_of(images)).values
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.01, "all pictures score the same, so the test shows nothing"
    linear = loaded(makers(clip, siglip)["v1"]()).score(batch_of(images)).values
    torch.testing.assert_close(linear, (embedding @ (torch.arange(16.0).double() / 8) + 0.25).float(), rtol=0, atol=1e-5)


def test_v2_5_is_the_published_stack_on_the_pooled_output_of_unit_length(siglip: Path) -> None:
    from transformers import SiglipModel

    images = pictures(4, 24)
    embedding = slow_embedding(SiglipModel.from_pretrained(siglip), images, (0.5,) * 3, (0.5,) * 3)
    head, _ = head_of_v2(32, "scoring_head", (0, 2, 4, 6, 8))
    with torch.no_grad():
        expected = head.eval()(embedding)[:, 0].float()
    values = loaded(AestheticSiglip(str(siglip), str(siglip / "head.pth"))).score(batch_of(images)).values
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.01, "all pictures score the same, so the test shows nothing"


def test_v2_5_squashes_and_the_others_cut_the_middle_out(clip: Path, siglip: Path) -> None:
    halves = torch.zeros(1, 3, 24, 48)
    halves[..., 24:] = 1  # black and white halves: both stay, in either way, but only squashed is the left edge of a 2:1 stripe seen
    halves[..., :12] = 1
    squashed = AestheticSiglip(str(siglip)).preprocess(24)(halves) * 0.5 + 0.5
    assert squashed[0, 0, 12].round().tolist() == [1] * 6 + [0] * 6 + [1] * 12
    std, mean = torch.tensor(CLIP_STD)[0], torch.tensor(CLIP_MEAN)[0]
    cut = aesthetic_v2(str(clip)).preprocess(24)(halves)[0, 0, 12] * std + mean
    assert cut.round().tolist() == [0] * 12 + [1] * 12


@each
def test_the_prompt_makes_no_difference(make: Callable[..., AestheticReward]) -> None:
    reward, images = loaded(make()), pictures(2, 32)
    assert reward.info.reads == ("images",)
    assert torch.equal(reward.score(batch_of(images, ["a", "b"])).values, reward.score(batch_of(images, ["", "c" * 900])).values)


@each
def test_only_the_image_tower_is_in_memory_and_the_head_stays_float32(make: Callable[..., AestheticReward]) -> None:
    reward = loaded(make(), torch.bfloat16)
    network = reward.network
    assert isinstance(network, LinearScorer)
    assert not any("text" in name for name, _ in network.named_parameters())
    assert {weight.dtype for weight in network.tower.parameters()} == {torch.bfloat16}
    assert network.weight.dtype == network.bias.dtype == torch.float32
    reward.to(torch.device("meta"))
    assert network.weight.is_meta
    assert network.bias.is_meta


@each
def test_half_precision_keeps_the_order(make: Callable[..., AestheticReward]) -> None:
    batch = batch_of(pictures(48, 32))
    exact = loaded(make()).score(batch).values
    for dtype, least in ((torch.float16, 0.999), (torch.bfloat16, 0.98)):
        assert rank_correlation(exact, loaded(make(), dtype).score(batch).values) > least


@each
def test_pil_and_tensor_agree_nearly(make: Callable[..., AestheticReward]) -> None:
    batch = batch_of(pictures(3, 64, 80))
    tensor, pil = (loaded(make(preprocessing=backend)).score(batch).values for backend in ("tensor", "pil"))
    assert 0 < (tensor - pil).abs().max() < 0.1 * max(1, tensor.std().item())
    with pytest.raises(UserError, match="preprocessing must be tensor or pil"):
        make(preprocessing="cv2")


@each
def test_what_can_be_wrong_with_the_files_is_an_error_of_one_line(
    make: Callable[..., AestheticReward], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_offline(monkeypatch, tmp_path / "cache")
    name = make().info.name
    (tmp_path / "broken.pth").write_bytes(b"broken")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "config.json").write_text("{}")
    for options, message in (
        ({"model": "/does/not/exist"}, "there is no file or folder"),
        ({"model": "nobody/nothing"}, "nobody/nothing was neither found"),
        ({"model": str(tmp_path)}, "could not be loaded"),
        ({"head": str(tmp_path / "broken.pth")}, "cannot be read as weights"),
        ({"head": str(tmp_path / "other.pth")}, "is not the published head"),
        ({"head": str(tmp_path / "absent.pth")}, "head is neither a file nor owner/name:file"),
        ({"head": "nobody/nothing:head.pth"}, r"head\.pth of nobody/nothing was neither found"),
        ({"head": None}, r"needs the file of its head as args\.head, which is not downloaded by itself; it is .*(MIT|Apache|AGPL).*github\.com"),
    ):
        with pytest.raises(UserError, match=f"^reward {name}: [^\n]*{message}[^\n]*$"):
            loaded(make(**options))


def test_a_head_for_another_tower_is_refused(clip: Path, tmp_path: Path) -> None:
    torch.save(head_of_v2(20)[1], tmp_path / "v2.pth")
    with pytest.raises(UserError, match=r"is for 20 features, .* gives 16; give the two that belong together"):
        loaded(aesthetic_v2(str(clip), str(tmp_path / "v2.pth")))


def test_a_tower_whose_weights_are_not_all_there_is_refused(clip: Path, siglip: Path) -> None:
    with pytest.raises(UserError, match=r"^reward aesthetic: .* lacks \d+ weights of a CLIPVisionModelWithProjection"):
        loaded(aesthetic_v2(str(siglip), str(clip / "v2.pth")))


def test_a_head_may_be_on_the_hub_and_nothing_is_downloaded_before_it_is_loaded(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def download(source: str, filename: str) -> str:
        asked.append((source, filename))
        return str(clip / "v2.pth")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    reward = aesthetic_v2(str(clip))
    aesthetic_v1(), AestheticSiglip()
    assert asked == []
    loaded(reward)
    assert asked == [("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")]
    for needs_a_file in (aesthetic_v1(str(clip)), AestheticSiglip()):
        with pytest.raises(UserError, match="not downloaded by itself"):
            loaded(needs_a_file)
    assert len(asked) == 1


def test_the_modules_import_nothing_heavy() -> None:
    imports = "import sys, rewards.aesthetic_siglip, rewards.hps, rewards.clip_score, rewards.pick_score"
    source = f"{imports}\nprint('transformers' in sys.modules, 'open_clip' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
