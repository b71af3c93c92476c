"""When memory runs out: parts are halved, nothing is counted or trained twice, and where latents and embeddings wait changes no number."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drills import RowCount, begin, difference, weights
from torch._subclasses.fake_tensor import FakeTensorMode
from toys import PROMPTS

from flowrl.cli import main
from flowrl.config import Config
from flowrl.memory import halved
from flowrl.optimizers import make_optimizer
from flowrl.policies.families import make_policy
from flowrl.policies.prompts import PromptCache
from flowrl.sections import ModelConfig, OptimizerConfig
from flowrl.trainer import Trainer
from flowrl.types import UserError

Configure = Callable[..., Config]
CPU = torch.device("cpu")


class Tight:
    """A network that fits only so many rows: what it is asked for, and when it refuses."""

    def __init__(self, trainer: Trainer, forward: float = math.inf, backward: float = math.inf) -> None:
        self.sizes: list[tuple[bool, int]] = []
        self.limits = {False: forward, True: backward}
        trainer.policy.network.register_forward_pre_hook(self._check, with_kwargs=True)

    def _check(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        grad, rows = torch.is_grad_enabled(), len(kwargs["hidden_states"])
        self.sizes.append((grad, rows))
        if rows > self.limits[grad]:
            raise torch.OutOfMemoryError("out of memory")


def test_half_is_rounded_up_and_one_cannot_be_halved(caplog: pytest.LogCaptureFixture) -> None:
    assert halved("training.rows_per_forward", 7, CPU, help="") == 4
    assert "training.rows_per_forward: 7 do not fit into the memory of cpu; from now on 4" in caplog.text
    with pytest.raises(UserError, match="training.rows_per_forward: the memory of cpu does not hold even 1; use less"):
        halved("training.rows_per_forward", 1, CPU, help="use less")


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_rollout_that_does_not_fit_goes_on_in_halves_and_counts_each_row_once(configure: Configure, guidance: float) -> None:
    plain, tight = Trainer(configure(f"rollout.guidance_scale={guidance}")), Trainer(configure(f"rollout.guidance_scale={guidance}"))
    expected, _ = plain.iterate(1)
    hook = Tight(tight, forward=3)
    found, _ = tight.iterate(1)
    assert tight.policy.rows_per_forward == 3
    refused = [rows for grad, rows in hook.sizes if not grad and rows > 3]
    # once, and never again in a rollout; the unconditional half of a training row is evaluated without gradient too
    assert refused == [12, 6] + ([24, 12, 6] if guidance > 1 else [])
    assert found["nfe/used"] == found["nfe/minimum"] == expected["nfe/used"]
    assert found["reward/total/mean"] == pytest.approx(expected["reward/total/mean"], abs=1e-4)


def test_an_update_that_does_not_fit_is_made_again_in_halves_and_is_the_same(configure: Configure) -> None:
    plain, tight = Trainer(configure()), Trainer(configure())
    expected, _ = plain.iterate(1)
    rows = RowCount(tight)
    Tight(tight, backward=5)
    found, _ = tight.iterate(1)
    assert tight.rows_per_backward == 3  # 24 rows, 12, 6, 3
    assert found["nfe/used"] == found["nfe/minimum"] == expected["nfe/used"]
    assert rows.backward == found["nfe/backward"] + 24 + 12 + 6  # the network really was asked again
    for name in ("loss", "ratio/mean", "ratio/std", "grad_norm", "clip/low"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-7), name
    assert difference(weights(tight), weights(plain)) < 2e-4


def test_a_part_that_fails_late_leaves_no_gradient_and_no_measurement_behind(configure: Configure) -> None:
    trainer = Trainer(configure("training.rows_per_backward=4"))
    drill = begin(trainer)
    expected = drill.gradient()
    calls = [0]

    def fail_once(_module: Any, _args: Any, _kwargs: dict[str, Any]) -> None:
        calls[0] += torch.is_grad_enabled()
        if calls[0] == 3:
            calls[0] += 1
            raise torch.OutOfMemoryError("out of memory")

    trainer.policy.network.register_forward_pre_hook(fail_once, with_kwargs=True)
    found = drill.gradient()
    assert trainer.rows_per_backward == 2
    scale = max(g.abs().max().item() for g in expected)
    assert difference(found, expected) < 1e-3 * scale


def test_what_was_found_to_fit_is_remembered_in_checkpoints(configure: Configure) -> None:
    trainer, other = Trainer(configure()), Trainer(configure())
    trainer.policy.rows_per_forward, trainer.rows_per_backward = 7, 5
    state = trainer.state()
    other.load_state(state)
    assert (other.policy.rows_per_forward, other.rows_per_backward) == (7, 5)
    smaller = Trainer(configure("training.rows_per_backward=2"))
    smaller.load_state(state)
    assert smaller.rows_per_backward == 2
    old = {key: value for key, value in state.items() if key != "fitting"}
    fresh = Trainer(configure())
    fresh.load_state(old)
    assert fresh.rows_per_backward == 256


def test_what_never_fits_says_what_would(configure: Configure) -> None:
    trainer = Trainer(configure())
    Tight(trainer, backward=0)
    with pytest.raises(UserError, match=r"training.rows_per_backward: the memory of cpu does not hold even 1; set model.gradient_checkpointing: true"):
        trainer.iterate(1)
    trainer = Trainer(configure())
    Tight(trainer, forward=0)
    with pytest.raises(UserError, match=r"training.rows_per_forward: the memory of cpu does not hold even 1; set model.dtype: bfloat16"):
        trainer.iterate(1)


def test_pictures_are_decoded_in_halves_too(configure: Configure) -> None:
    policy = Trainer(configure()).policy
    latents = torch.randn(5, *policy.latent_shape)
    expected = policy.decode(latents)
    real, sizes = policy._pixels, []

    def pixels(part: torch.Tensor) -> torch.Tensor:
        sizes.append(len(part))
        if len(part) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(part)

    policy._pixels = pixels  # type: ignore[method-assign]
    torch.testing.assert_close(policy.decode(latents), expected, rtol=0, atol=1.01 / 255)
    assert sizes == [5, 3, 2, 2, 1]
    assert policy.rows_per_forward == 256


# --- where things wait


@pytest.mark.parametrize("method", ["flow_grpo_fast", "awm", "flow_dpo", "dynamic_treerpo", "grpo_guard"])
def test_rollouts_in_host_memory_train_the_same(configure: Configure, method: str) -> None:
    base = [f"method={method}", "rollout.num_steps=4", "ema=null"]
    base += ["rollout={plan: ode}", "matching.num_times=2"] if method in ("awm", "flow_dpo") else []
    base += ["rollout={plan: tree, group_size: 4, tree: {splits: [0, 1], branching: 2}}"] if method == "dynamic_treerpo" else []
    base += ["rollout={plan: window, kernel: flow_sde, window: {size: 2, high: 3}}"] if method == "grpo_guard" else []
    here, waiting = Trainer(configure(*base)), Trainer(configure(*base, "training.offload_rollouts=true"))
    a, _ = here.iterate(1)
    b, _ = waiting.iterate(1)
    assert a == b
    assert difference(weights(here), weights(waiting)) == 0


def embed(texts: list[str]) -> dict[str, torch.Tensor]:
    rows = [[float(len(text)), float(sum(map(ord, text)))] for text in texts]
    return {"embeds": torch.tensor(rows)[:, None].expand(-1, 3, -1) * 0.5, "pooled": torch.tensor(rows)}


@pytest.mark.parametrize("storage", ["device", "host", "disk"])
def test_every_storage_gives_the_same_embeddings_and_encodes_each_text_once(tmp_path: Path, storage: Any) -> None:
    seen: list[str] = []

    def counted(texts: Any) -> dict[str, torch.Tensor]:
        seen.extend(texts)
        return embed(list(texts))

    cache = PromptCache(counted, device=CPU, storage=storage, folder=tmp_path, identity="x")
    assert cache.rows(["a", "bb", "a"], batch=1).tolist() == [0, 1, 0]
    assert cache.rows(["ccc", "bb", ""], batch=2).tolist() == [2, 1, 3]
    assert seen == ["a", "bb", "ccc", ""]
    assert len(cache) == 4
    found, expected = cache.take(torch.tensor([2, 0, 2, 3])), embed(["ccc", "a", "ccc", ""])
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name])
    assert torch.equal(cache.pooled, embed(["a", "bb", "ccc", ""])["pooled"])


def test_embeddings_on_disk_outlive_the_run_and_belong_to_their_encoder(tmp_path: Path) -> None:
    def refuse(texts: Any) -> dict[str, torch.Tensor]:
        raise AssertionError(texts)

    PromptCache(embed, device=CPU, storage="disk", folder=tmp_path, identity="x").rows(["a", "bb"], batch=8)
    again = PromptCache(refuse, device=CPU, storage="disk", folder=tmp_path, identity="x")
    assert again.rows(["bb"], batch=8).tolist() == [0]
    assert torch.equal(again.take(torch.tensor([0]))["embeds"], embed(["bb"])["embeds"])
    with pytest.raises(AssertionError, match="bb"):
        PromptCache(refuse, device=CPU, storage="disk", folder=tmp_path, identity="y").rows(["bb"], batch=8)
    file = next(tmp_path.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:20])  # a damaged file is made anew
    other = PromptCache(embed, device=CPU, storage="disk", folder=tmp_path, identity="x")
    other.rows(["a", "bb"], batch=8)
    assert torch.equal(other.take(torch.tensor([0, 1]))["pooled"], embed(["a", "bb"])["pooled"])
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_file_that_goes_away_during_a_run_is_named(tmp_path: Path) -> None:
    cache = PromptCache(embed, device=CPU, storage="disk", folder=tmp_path, identity="x")
    cache.rows(["a red cat"], batch=1)
    next(tmp_path.rglob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="model.prompt_folder: the embedding of 'a red cat' has gone from"):
        cache.take(torch.tensor([0]))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = PromptCache(embed, device=CPU, storage="disk", folder=tmp_path / "file", identity="x")
    with pytest.raises(UserError, match="model.prompt_folder: embeddings cannot be written to"):
        cache.rows(["a"], batch=1)
    with pytest.raises(ValueError, match="need a folder"):
        PromptCache(embed, device=CPU, storage="disk")


@pytest.mark.parametrize("storage", ["host", "disk"])
def test_training_does_not_depend_on_where_embeddings_are(configure: Configure, tmp_path: Path, storage: str) -> None:
    plain, other = Trainer(configure()), Trainer(configure(f"model.prompt_storage={storage}", f"model.prompt_folder={tmp_path / 'prompts'}"))
    a, _ = plain.iterate(1)
    b, _ = other.iterate(1)
    assert a == b
    assert difference(weights(plain), weights(other)) == 0
    assert len(list((tmp_path / "prompts").rglob("*.safetensors"))) == (len(other.policy.prompts) if storage == "disk" else 0)


def test_storage_on_disk_needs_a_folder(configure: Configure) -> None:
    with pytest.raises(UserError, match="model.prompt_storage: disk needs model.prompt_folder"):
        configure("model.prompt_storage=disk")


def test_freed_encoders_have_encoded_every_prompt_of_the_run(configure: Configure) -> None:
    trainer = Trainer(configure("model.text_encoders=free"))
    assert trainer.policy.text_encoders == []
    assert trainer.policy.prompts.rows([""], batch=1).tolist() == [0]
    metrics, _ = trainer.iterate(1)
    assert metrics["nfe/used"] == metrics["nfe/minimum"]
    trainer.engine.evaluator("eval", 4, 1.0, 0)
    with pytest.raises(UserError, match="model.text_encoders: free, and the prompt 'something new' was not among those of the run's prompt sets; use offload"):
        trainer.policy.prompt_rows(["something new"])


def test_offloaded_encoders_come_back_for_new_prompts(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(configure("model.text_encoders=offload").model, CPU)
    moves: list[str] = []
    encoder = policy.text_encoders[0]
    monkeypatch.setattr(encoder, "to", lambda device: moves.append(str(device)))
    policy.prompt_rows([PROMPTS[0]])
    assert moves == ["cpu", "cpu"]
    policy.prompt_rows([PROMPTS[0]])
    assert len(moves) == 2


# --- optimisers, attention


def test_optimisers_and_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    plain = make_optimizer(OptimizerConfig(learning_rate=0.5, weight_decay=0.0), [parameter])
    assert isinstance(plain, torch.optim.AdamW)
    parameter.grad = torch.tensor([1.0, -2.0])
    plain.step()
    torch.testing.assert_close(parameter.data, torch.tensor([0.5, 1.5]))
    with pytest.raises(UserError, match="optimizer.name: adamw_8bit needs a CUDA device; use adamw"):
        make_optimizer(OptimizerConfig(name="adamw_8bit"), [parameter])


def test_8_bits_without_the_package_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        device = torch.device("cuda")

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"needs bitsandbytes, which cannot be imported .*; install flowrl-diffusion\[8bit\]"):
        make_optimizer(OptimizerConfig(name="adamw_8bit"), [OnCuda()])  # type: ignore[list-item]


def test_an_attention_backend_that_cannot_be_used_is_named(configure: Configure) -> None:
    with pytest.raises(UserError, match="model.attention_backend: telepathy cannot be used"):
        make_policy(configure("model.attention_backend=telepathy").model, CPU)
    make_policy(configure("model.attention_backend=native", "model.vae_slicing=true", "model.vae_channels_last=true").model, CPU)


def test_memory_that_runs_out_where_nothing_can_be_halved_is_one_line(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139 GiB")

    monkeypatch.setattr("flowrl.trainer.make_policy", refuse)
    assert main(["train", str(config_file)]) == 1
    found = capsys.readouterr().err
    assert found.count("\n") == 1
    assert found.startswith("error: a device's memory ran out (CUDA out of memory), where no smaller part would help; set model.text_encoders: offload")


def test_embeddings_on_disk_belong_to_the_precision_of_the_encoders(pipeline: Path, tmp_path: Path) -> None:
    """The encoders are in model.dtype, whatever is trained and in whatever precision."""
    settings = {"path": str(pipeline), "prompt_storage": "disk", "prompt_folder": str(tmp_path / "prompts"), "max_sequence_length": 0}
    found = []
    for dtype, adapter in (("bfloat16", "lora"), ("bfloat16", "full"), ("float32", "lora")):
        policy = make_policy(ModelConfig(**settings, dtype=dtype, adapter=adapter), CPU)
        embeds = policy.prompts.take(policy.prompt_rows([PROMPTS[0]]))["embeds"]
        found.append((embeds.dtype, len(list((tmp_path / "prompts").rglob("*.safetensors")))))
        assert next(policy.network.parameters()).dtype == (torch.float32 if adapter == "full" or dtype == "float32" else torch.bfloat16)
    assert found == [(torch.bfloat16, 2), (torch.bfloat16, 2), (torch.float32, 4)]  # the prompt and the empty one


def test_what_is_said_of_rollouts_in_host_memory_waits_there_too(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without memory know their device, whether this machine has it or not."""
    policy = make_policy(configure().model, CPU)
    policy.rows_per_forward = 2
    monkeypatch.setattr(policy, "_forward", lambda x, sigma, prompt_row: torch.empty(x.shape, device="cuda"))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for place in ("cpu", "cuda:0"):
            x = torch.empty(3, *policy.latent_shape, device=place)
            assert str(policy.velocity(2.0)(x, torch.full((3,), 0.5), torch.zeros(3, dtype=torch.int64)).device) == place
