"""The memory of a run, predicted without weights, is what the allocator sees in a real one; nothing but configs and tokenizers is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from families import BUILDERS
from loading import load_script
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from toys import make_config

from flowrl.config import Config
from flowrl.memory_estimate import _FLOAT32, _FLOAT32_RESULT, LiveBytes, MemoryEstimate, _CudaAutocast, estimate_memory, memory_lines
from flowrl.policies.weightless import weightless
from flowrl.trainer import Trainer
from flowrl.types import UserError

Configure = Callable[..., Config]
CPU = torch.device("cpu")
WITHIN = 0.15  # what flowrl promises
TINY = ["model.path=flowrl:tiny-sd3", "model.max_sequence_length=null"]
CASES = {
    "lora": [],
    "full in bfloat16": ["model.adapter=full", "model.dtype=bfloat16"],
    "gradient checkpointing": ["model.gradient_checkpointing=true", "training.rows_per_forward=4"],
    "micro-batches, reference, guidance": ["model.adapter=full", "kl.weight=0.1", "training.rows_per_backward=5", "rollout.guidance_scale=2"],
    "a slow copy": ["method=awm", "matching={num_times: 2, times: uniform}", "ema=null", "rollout.plan=chain"],
    "pairs, another size": ["method=flow_dpo", "model.adapter=full", "model.height=64", "model.width=48", "rollout.group_size=2"],
}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script("benchmarks/gpu.py")


def measured(bench: ModuleType, config: Config, expected: MemoryEstimate) -> float:
    """Predicted over measured peak of the second iteration of a real run: what stays, by the tensors, and what comes and goes, by the allocator."""
    trainer = Trainer(config)
    trainer.iterate(1)
    peak = bench.resident_bytes(trainer) + bench.allocator_peak(lambda: trainer.iterate(2), CPU)
    return max(size for name, size in expected.phases.items() if name in ("rollout", "decoding", "training", "update")) / peak


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_predicted_peak_is_the_measured_one(bench: ModuleType, configure: Configure, case: str) -> None:
    config = configure(*TINY, *CASES[case])
    assert measured(bench, config, estimate_memory(config)) == pytest.approx(1, abs=WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_so_it_is_for_other_families(bench: ModuleType, tmp_path: Path, family: str) -> None:
    if family not in BUILDERS:
        from unets import build_sdxl

        settings, more, path = {"height": 8, "width": 16}, ["rollout.kernel=ddim"], build_sdxl(tmp_path / "model")
    else:
        settings, more, path = dict(BUILDERS[family].model), [], BUILDERS[family].build(tmp_path / "model")
    model = {"path": str(path), "adapter": "lora", **settings, "lora": {"rank": 4, "alpha": 8}}
    config = make_config(tmp_path, path, f"model={json.dumps(model)}", *more)
    assert measured(bench, config, estimate_memory(config)) == pytest.approx(1, abs=WITHIN)


def test_checkpointing_and_a_low_precision_take_less_and_full_training_more(configure: Configure) -> None:
    def training(*overrides: str) -> int:
        expected = estimate_memory(configure(*TINY, *overrides), "cuda")
        return expected.phases["training"]

    plain = training()
    assert training("model.gradient_checkpointing=true", "model.dtype=bfloat16") < training("model.gradient_checkpointing=true") < 0.6 * plain
    assert training("model.adapter=full") > plain


def test_what_is_kept_follows_the_config(configure: Configure) -> None:
    lora = estimate_memory(configure("ema=null"), "cuda")
    assert (lora.averages, lora.reference, lora.moments, lora.gradients) == (0, 0, 2 * lora.trainable, lora.trainable)
    full = estimate_memory(
        configure("model.adapter=full", "kl.weight=0.1", "model.text_encoders=free", "model.prompt_storage=host", "training.offload_rollouts=true"), "cuda"
    )
    assert full.averages == full.gradients == full.trainable
    assert (full.reference, full.text_encoders, full.prompts, full.latents) == (full.network, 0, 0, 0)
    assert lora.text_encoders > 0
    assert full.phases["prompts"] > full.resident  # encoders are there for their prompts
    assert full.phases["update"] == full.resident + 2 * full.gradients  # AdamW on CUDA takes the roots of all second moments at once
    eight_bit = estimate_memory(configure("model.adapter=full", "optimizer.name=adamw_8bit"), "cuda")
    assert eight_bit.moments <= full.moments


def test_it_reads_no_weights(tmp_path: Path, pipeline: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(pipeline, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list(bare.rglob("*.safetensors"))
    assert estimate_memory(make_config(tmp_path, bare)) == estimate_memory(make_config(tmp_path, pipeline))


def test_a_model_that_cannot_be_reached_is_one_line(configure: Configure, tmp_path: Path, pipeline: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path: .* does not exist"):
        estimate_memory(configure(f"model.path={tmp_path / 'nowhere'}"))
    broken = tmp_path / "broken"
    shutil.copytree(pipeline, broken)
    (broken / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"model\.path: the configs of .*broken could not be read") as caught:
        estimate_memory(make_config(tmp_path, broken))
    assert "\n" not in str(caught.value)


def test_the_table_names_the_peak_and_what_is_not_in_it(configure: Configure) -> None:
    expected = estimate_memory(configure(), "cuda")
    rows, notes = memory_lines(expected)
    assert {row[0] for row in rows} >= {"network", "optimiser", "peak: training", "peak: update"}
    assert "in: training" in notes[0]
    assert "rewards" in notes[0]
    assert json.loads(json.dumps(expected.as_dict()))["peak"] == expected.peak


def test_live_bytes_are_those_of_storages_that_are_alive() -> None:
    with LiveBytes() as live:
        first = torch.zeros(100)
        view = first[:50]
        assert live.now == 400
        del first
        assert live.now == 400
        del view
        assert live.now == 0
        assert live.peak_of(lambda: torch.zeros(10) + torch.zeros(10)) == 120
        kept = torch.ones(4, requires_grad=True)
        out = kept.exp().exp()  # each saves its result
        assert live.now == 48
        out.sum().backward()
        assert live.peak_of(lambda: None) == 0


def test_outside_of_it_torch_is_as_before(configure: Configure) -> None:
    apply, dtype = torch.nn.Module._apply, torch.get_default_dtype()
    with pytest.raises(ZeroDivisionError), weightless():
        raise ZeroDivisionError
    assert (torch.nn.Module._apply, torch.get_default_dtype()) == (apply, dtype)
    assert Trainer(configure()).iterate(1)[0]["nfe/used"] > 0


@pytest.mark.parametrize("name", sorted(_FLOAT32 | _FLOAT32_RESULT))
def test_what_a_cuda_device_computes_in_float32_is_so_here(name: str) -> None:
    arguments = {
        "layer_norm": ((8,),),
        "group_norm": (2,),
        "pow": (2,),
        "__pow__": (2,),
        "__rpow__": (2,),
        "softmax": (-1,),
        "log_softmax": (-1,),
        "cumsum": (-1,),
    }
    if name == "sum":
        arguments["sum"] = (-1,)

    def call(x: torch.Tensor) -> torch.Tensor:
        found = getattr(torch.Tensor, name, None) or getattr(F, name)
        pair = (x, x.clone()) if name in ("mse_loss", "cosine_similarity") else (x,)
        return found(*pair, *arguments.get(name, ()))

    cuda = torch.device("cuda")
    with FakeTensorMode():
        before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            theirs = call(torch.randn(4, 8, dtype=torch.bfloat16, device=cuda)).dtype
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])
        with _CudaAutocast(), torch.autocast("cpu", torch.bfloat16):
            ours = call(torch.randn(4, 8, dtype=torch.bfloat16)).dtype
    assert ours == theirs == torch.float32
