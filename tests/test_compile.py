"""`model.compile`: the compiled network is the one that samples and trains, and it computes what the plain one does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch._dynamo.utils import counters

from flowrl.config import Config
from flowrl.policies.base import DiffusionPolicy
from flowrl.policies.families import make_policy
from flowrl.sections import ModelConfig
from flowrl.trainer import Trainer
from flowrl.types import UserError

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares"]
FP32 = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What was compiled before does not count."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of calls of compiled graphs; in place of inductor's kernels, whose compilation takes minutes, the captured graph itself runs."""
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            calls.append(1)
            return graph.forward(*arguments)

        return run

    plain = torch.compile

    def compile_with_it(model: Any = None, **settings: Any) -> Any:
        return plain(model, **(settings | {"backend": backend}))

    monkeypatch.setattr(torch, "compile", compile_with_it)
    return calls


def policy_of(path: Path | str, mode: str, adapter: str, keep_reference: bool = False) -> DiffusionPolicy:
    torch.manual_seed(0)
    settings = {"path": str(path), "compile": mode, "adapter": adapter, "lora": {"rank": 4, "alpha": 8.0}}
    extra = {} if str(path).startswith("flowrl:") else {"max_sequence_length": 0}
    policy = make_policy(ModelConfig(**settings, **extra), CPU, keep_reference=keep_reference)
    generator = torch.Generator().manual_seed(5)
    for p in policy.trainable():
        p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    return policy


def rows(policy: DiffusionPolicy, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(count, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(0.9, 0.2, count, dtype=torch.float64), policy.prompt_rows([PROMPTS[i % 2] for i in range(count)])


def gradient(policy: DiffusionPolicy) -> list[Tensor]:
    velocity = policy.velocity(2.0)(*rows(policy))
    weights = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(2))
    (velocity * weights).sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.trainable()]


def assert_same(compiled: DiffusionPolicy, plain: DiffusionPolicy) -> None:
    """Predictions with and without gradient, those of the reference, and gradients."""
    with torch.no_grad():
        torch.testing.assert_close(compiled.velocity(2.0)(*rows(compiled)), plain.velocity(2.0)(*rows(plain)), **FP32)
    with compiled.reference(), plain.reference():
        reference = plain.velocity()(*rows(plain))
        torch.testing.assert_close(compiled.velocity()(*rows(compiled)), reference, **FP32)
    with torch.no_grad():
        tuned = compiled.velocity()(*rows(compiled))
        torch.testing.assert_close(tuned, plain.velocity()(*rows(plain)), **FP32)  # the adapter is on again
        assert (tuned - reference).abs().max() > 1e-3  # and changes something
    for ours, theirs in zip(gradient(compiled), gradient(plain), strict=True):
        scale = theirs.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(ours / scale, theirs / scale, **FP32)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "adapter"), [("blocks", "lora"), ("blocks", "full"), ("whole", "lora")])
def test_the_captured_graphs_compute_what_the_network_does(pipeline: Path, graphs: list[int], mode: str, adapter: str) -> None:
    plain = policy_of(pipeline, "off", adapter, keep_reference=True)
    gradient(plain)
    assert graphs == []
    plain.network.zero_grad()
    compiled = policy_of(pipeline, mode, adapter, keep_reference=True)
    assert_same(compiled, plain)
    assert len(graphs) > 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["blocks", "whole"])
def test_one_compiled_network_samples_and_trains_so_ratios_are_1(configure: Callable[..., Config], graphs: list[int], mode: str) -> None:
    trainer = Trainer(configure(f"model.compile={mode}"))
    metrics, _ = trainer.iterate(1)
    assert len(graphs) > 0
    assert metrics["ratio/max_abs_log_first"] < 1e-5
    assert metrics["grad_norm"] > 0
    plain, _ = Trainer(configure()).iterate(1)
    assert metrics["loss"] == pytest.approx(plain["loss"], abs=1e-5)


def test_tf32_is_off_unless_asked_for(pipeline: Path) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for tf32, name in ((True, "high"), (False, "highest")):
            make_policy(ModelConfig(path=str(pipeline), max_sequence_length=0, tf32=tf32), CPU)
            assert torch.get_float32_matmul_precision() == name
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_network_without_known_blocks_is_one_line(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SD3Transformer2DModel, "_no_split_modules", None)
    with pytest.raises(UserError, match=r"model\.compile: diffusers names no repeated blocks of SD3Transformer2DModel; use whole"):
        policy_of(pipeline, "blocks", "lora")


@pytest.mark.parametrize("mode", ["blocks", "whole"])
def test_the_frozen_copy_of_full_fine_tuning_is_compiled_too(pipeline: Path, graphs: list[int], mode: str) -> None:
    policy = policy_of(pipeline, mode, "full", keep_reference=True)
    asked = rows(policy)
    with policy.reference():
        policy.velocity()(*asked)
    assert len(graphs) > 0


def test_the_frozen_copy_has_the_attention_backend_of_the_trained_network(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[int, str]] = []
    monkeypatch.setattr(SD3Transformer2DModel, "set_attention_backend", lambda self, name: chosen.append((id(self), name)))
    settings = ModelConfig(path=str(pipeline), max_sequence_length=0, adapter="full", attention_backend="flash")
    policy = make_policy(settings, CPU, keep_reference=True)
    assert chosen == [(id(policy.network), "flash"), (id(policy.reference_network), "flash")]


@pytest.mark.slow
def test_no_block_falls_back_for_the_number_of_its_graphs(pipeline: Path, graphs: list[int]) -> None:
    """Kinds of blocks, batch sizes, with and without gradient, with and without adapters: more than the 8 graphs that torch allows by itself."""
    policy = policy_of(pipeline, "blocks", "lora")
    counters.clear()
    for count in (3, 5):
        with torch.no_grad():
            policy.velocity()(*rows(policy, count))
        policy.velocity()(*rows(policy, count))
        with policy.reference():
            policy.velocity()(*rows(policy, count))
    blocks = len(policy.network.transformer_blocks)
    graphs.clear()
    policy.velocity()(*rows(policy, 5))
    assert len(graphs) == blocks
    assert counters["frames"]["total"] == counters["frames"]["ok"] > 8


def test_filled_rows_change_nothing_but_the_number_of_shapes(pipeline: Path) -> None:
    settings = {"path": str(pipeline), "adapter": "lora", "lora": {"rank": 4, "alpha": 8.0}, "max_sequence_length": 0}
    torch.manual_seed(0)
    plain = make_policy(ModelConfig(**settings), CPU)
    torch.manual_seed(0)
    filled = make_policy(ModelConfig(**settings, pad_rows=True), CPU)
    shapes: set[int] = set()
    filled.network.register_forward_pre_hook(lambda module, args, kwargs: shapes.add(len(kwargs["hidden_states"])), with_kwargs=True)
    for count in (1, 3, 4, 5, 7):
        x, sigma = torch.randn(count, *plain.latent_shape), torch.rand(count, dtype=torch.float64)
        ours, theirs = (policy.velocity()(x, sigma, policy.prompt_rows(PROMPTS)[torch.arange(count) % 2]) for policy in (plain, filled))
        torch.testing.assert_close(ours, theirs, **FP32)
        assert len(theirs) == count
        grads = [torch.autograd.grad(ours.square().sum(), plain.trainable()), torch.autograd.grad(theirs.square().sum(), filled.trainable())]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, **FP32)
    assert shapes == {1, 4, 8}
    assert (filled.rows.forward, filled.rows.padding, plain.rows.padding) == (20, 0 + 1 + 0 + 3 + 1, 0)
