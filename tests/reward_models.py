"""What the tests of rewards share: batches of pictures, tiny models in the published layouts, and the contract that every reward keeps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowrl.types import Prompt, Reward, SampleBatch, Scores

__all__ = ["assert_reward_contract", "batch_of", "go_offline", "part_of", "pictures", "rank_correlation", "save_clip", "save_clip_tokenizer", "spread_weights"]

CPU = torch.device("cpu")


def pictures(num: int = 5, height: int = 40, width: int | None = None, seed: int = 0) -> Tensor:
    """[num, 3, height, width] float32 on the 8-bit grid: coarse noise with fine noise on it, so that resizing changes them but leaves them different."""
    width = width or height
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.nn.functional.interpolate(torch.rand(num, 3, 5, 5, generator=generator), size=(height, width), mode="bilinear")
    return (0.85 * coarse + 0.15 * torch.rand(num, 3, height, width, generator=generator)).mul(255).round() / 255


def batch_of(images: Tensor | None, texts: Sequence[str] | None = None, metadata: Sequence[dict[str, object]] | None = None) -> SampleBatch:
    """Pictures with prompts: the given texts, or one each."""
    texts = texts or [f"a photo of {i} {'red cats' if i % 2 else 'blue dogs on a table'}" for i in range(0 if images is None else len(images))]
    return SampleBatch([Prompt(text, data) for text, data in zip(texts, metadata or [{} for _ in texts], strict=True)], images)


def part_of(batch: SampleBatch, indices: Sequence[int]) -> SampleBatch:
    """The samples of these indices, in this order."""
    index = torch.tensor(list(indices), dtype=torch.int64)
    return SampleBatch(
        [batch.prompts[i] for i in indices],
        None if batch.images is None else batch.images[index],
        None if batch.texts is None else [batch.texts[i] for i in indices],
        None if batch.group is None else batch.group[index],
    )


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of values [B] without ties."""
    return float(torch.corrcoef(torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double())[0, 1])


def go_offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Make the hub unreachable, with an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))


def spread_weights(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights large enough that different inputs give clearly different outputs, which a fresh network's do not."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        if weight.ndim == 0:
            continue
        noise = torch.randn(weight.shape, generator=generator)
        is_scale = weight.ndim == 1 and name.endswith("weight")
        weight.data = 1 + 0.2 * noise if is_scale else 1.3 * noise / max(1, weight[0].numel()) ** 0.5 if weight.ndim > 1 else 0.1 * noise
    return network.eval()


def save_clip_tokenizer(folder: Path) -> Path:
    """CLIP's own tokenizer, 49408 tokens, as transformers saves it."""
    import open_clip
    from transformers import CLIPTokenizer

    reader = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    merges = sorted(reader.bpe_ranks, key=reader.bpe_ranks.get)
    CLIPTokenizer(vocab={names.get(token, token): number for token, number in reader.encoder.items()}, merges=merges).save_pretrained(folder)
    return folder


def save_clip(folder: Path, *, size: int = 32, activation: str = "quick_gelu", seed: int = 0, **text: Any) -> Path:
    """A tiny random CLIP of transformers with CLIP's tokenizer, as the hub has it."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 16, "hidden_act": activation}
    config = CLIPConfig(text_config=tower | text, vision_config=tower | {"image_size": size, "patch_size": 8}, projection_dim=16)
    spread_weights(CLIPModel(config), seed).save_pretrained(folder)
    return save_clip_tokenizer(folder)


def assert_reward_contract(make: Callable[[], Reward], batch: SampleBatch, *, atol: float = 1e-5, needs_load: bool = True) -> None:
    """Check what every reward promises, on the CPU in float32.

    Args:
        make: a new reward, not loaded.
        batch: two samples or more, of which one at least can be scored; for a reward of groups or pairs, two groups or more.
        atol: largest difference that batching may make in a value or a raw column.
        needs_load: False for a reward without anything to load, which may score at once.
    """
    reward = make()
    _check_info(reward)
    assert isinstance(reward, Reward)
    if needs_load:
        with pytest.raises(RuntimeError, match=r"load must be called before score"):
            reward.score(batch)
    reward.load(CPU, torch.float32)
    before = copy.deepcopy(batch)

    whole = reward.score(batch)
    _check_scores(reward, whole, len(batch))
    assert whole.valid.any(), "no sample of the test's batch can be scored"
    network = getattr(reward, "network", None)
    reward.load(CPU, torch.float32)
    assert getattr(reward, "network", None) is network, "a second load built the network again"
    _same(whole, reward.score(batch), 0.0, "scored twice")

    units = [[i] for i in range(len(batch))] if reward.info.scope == "sample" else _groups(batch)
    assert len(units) > 1, "the test's batch needs two samples or groups"
    for unit in units:
        _same(_part(whole, unit), reward.score(part_of(batch, unit)), atol, f"samples {unit} alone")
    first = max(1, 2 * len(units) // 3)
    for some in (units[:first], units[first:]):
        order = [i for unit in some for i in unit]
        _same(_part(whole, order), reward.score(part_of(batch, order)), atol, "ragged micro-batches")
    order = [i for unit in reversed(units) for i in reversed(unit)]
    _same(_part(whole, order), reward.score(part_of(batch, order)), atol, "another order")

    with torch.autocast("cpu", torch.bfloat16):
        _same(whole, reward.score(batch), 0.0, "inside autocast")
    if batch.images is not None and not reward.info.differentiable:
        tracked = SampleBatch(batch.prompts, batch.images.clone().requires_grad_(), batch.texts, batch.group)
        with torch.enable_grad():
            scores = reward.score(tracked)
        assert not any(column.requires_grad for column in (scores.values, *scores.raw.values())), "scores carry a gradient"
    _same_batch(before, batch)

    with pytest.raises(ValueError, match="empty batch"):
        reward.score(part_of(batch, []))


def _check_info(reward: Reward) -> None:
    info = reward.info
    assert info.name
    assert info.description
    assert info.description[0] != " "
    assert info.low < info.high
    assert info.source, "where does it come from?"
    assert info.batch_size >= 1
    assert info.reads or info.name in ("remote", "ensemble", "win_rate"), "what does it look at?"
    assert set(info.reads) <= {"prompt", "images", "texts", "metadata"}
    assert bool(info.metadata) <= ("metadata" in info.reads)
    if info.weights:
        assert info.weights_license, "weights without a licence"


def _check_scores(reward: Reward, scores: Scores, num: int) -> None:
    assert isinstance(scores, Scores)
    assert scores.values.shape == (num,)
    assert scores.values.dtype == torch.float32
    assert scores.valid.shape == (num,)
    assert scores.valid.dtype == torch.bool
    assert scores.values.device == scores.valid.device == CPU
    assert torch.equal(scores.values.isfinite(), scores.valid), "finite exactly where valid"
    assert scores.values[~scores.valid].isnan().all()
    assert set(scores.problems) <= set(torch.nonzero(~scores.valid).flatten().tolist())
    assert all(reason and "\n" not in reason for reason in scores.problems.values())
    for name, column in scores.raw.items():
        assert column.shape == (num,), f"raw column {name}"
        assert column.device == CPU, f"raw column {name}"
        assert not column.requires_grad, f"raw column {name}"
    slack = 1e-4 * max(1.0, *(abs(bound) for bound in (reward.info.low, reward.info.high) if math.isfinite(bound)), 0.0)
    within = (scores.values >= reward.info.low - slack) & (scores.values <= reward.info.high + slack)
    assert within[scores.valid].all(), f"outside of the range that info gives: {scores.values.tolist()}"


def _groups(batch: SampleBatch) -> list[list[int]]:
    keys = [prompt.text for prompt in batch.prompts] if batch.group is None else batch.group.tolist()
    return [[i for i, other in enumerate(keys) if other == key] for key in dict.fromkeys(keys)]


def _part(scores: Scores, indices: Sequence[int]) -> Scores:
    index = torch.tensor(list(indices))
    return Scores(scores.values[index], scores.valid[index], {name: column[index] for name, column in scores.raw.items()})


def _same(expected: Scores, got: Scores, atol: float, what: str) -> None:
    assert torch.equal(expected.valid, got.valid), what
    assert expected.raw.keys() == got.raw.keys(), what
    pairs = {"values": (expected.values, got.values)} | {name: (expected.raw[name], got.raw[name]) for name in expected.raw}
    for name, (left, right) in pairs.items():
        torch.testing.assert_close(right, left, rtol=0, atol=atol, equal_nan=True, msg=lambda text, name=name: f"{what}, {name}: {text}")


def _same_batch(expected: SampleBatch, got: SampleBatch) -> None:
    assert list(expected.prompts) == list(got.prompts), "the prompts were changed"
    assert expected.texts == got.texts, "the texts were changed"
    for left, right in ((expected.images, got.images), (expected.group, got.group)):
        if left is not None and right is not None:
            torch.testing.assert_close(right, left, rtol=0, atol=0, equal_nan=True, msg="the batch was changed")
