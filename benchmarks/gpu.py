"""How fast, and in how much memory, do the published architectures roll out and train? Full-size networks with random weights; nothing is downloaded.

    python benchmarks/gpu.py --out benchmarks/gpu.md                       on a GPU: all cases that fit, about an hour
    python benchmarks/gpu.py --only "sd3.5-medium lora" --size 512         some of them
    python benchmarks/gpu.py --tiny                                        on a CPU: the same architectures a thousand times smaller

Rollout and training are those of this package's trainer, on the config printed by --show; "bare" is the same network called on the same rows in batches of the
same size, forward only and forward + backward, timed in turn with ours (A B A B ...), median of the ratios. Images per second count sampling and decoding,
without rewards. FLOPs are counted by torch on the network without compilation, a forward with its backward as it is made (gradient checkpointing counts what
it recomputes; without it, LoRA has no gradients of the frozen weights), and divided by time and by what the device's largest matrix product reaches in the
same dtype. Memory is the allocator's peak over rollout, decoding, training and update; "predicted" is `flowrl.memory_estimate` on the same config, of the
network without compilation. "ratio - 1" is the greatest over the decisions of the first update.
"""

from __future__ import annotations

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flowrl.assignment import Assignment
from flowrl.config import Config, dump_config, load_config
from flowrl.core.advantages import edge_advantages
from flowrl.engines.diffusion import Sampled
from flowrl.memory_estimate import estimate_memory
from flowrl.policies.base import DiffusionPolicy
from flowrl.policies.families import make_policy
from flowrl.policies.weightless import Loader, pipelines_from, weightless
from flowrl.seeds import generator
from flowrl.trainer import Trainer
from flowrl.types import UserError
from flowrl.versions import versions
from samplers.forest import concatenate
from samplers.rollout import execute

RATIO_BOUND = {"float32": 1e-4, "bfloat16": 1e-2}
"""Of the first update: rollout and training evaluate the same rows in batches of other sizes, whose matrix products may be summed in another order."""


# --- architectures ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """A published model, from the config files of its repository.

    Attributes:
        network, vae, scheduler: settings of diffusers' classes.
        tokens: of a prompt. width, pooled: of its embeddings.
        targets: LoRA rank.
    """

    family: str
    kind: str
    network: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    tokens: int
    width: int
    pooled: int
    rank: int


_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_SD3_VAE, _FLUX_VAE = _VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609}, _VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}
_TINY_VAE = {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 64}

SD3_MEDIUM = Architecture(
    family="sd3",
    kind="SD3Transformer2DModel",
    network={
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    vae=_SD3_VAE,
    scheduler={"shift": 3.0},
    tokens=77 + 256,
    width=4096,
    pooled=2048,
    rank=32,
)
FLUX_DEV = Architecture(
    family="flux",
    kind="FluxTransformer2DModel",
    network={
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    vae=_FLUX_VAE,
    scheduler={"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
    tokens=512,
    width=4096,
    pooled=768,
    rank=64,
)
ARCHITECTURES = {"sd3.5-medium": SD3_MEDIUM, "flux.1-dev": FLUX_DEV}


def tiny(of: Architecture) -> Architecture:
    """The same blocks, few and narrow."""
    small = {"num_layers": 3, "attention_head_dim": 32, "num_attention_heads": 4, "joint_attention_dim": 64, "pooled_projection_dim": 48}
    if of.family == "sd3":
        small |= {"sample_size": 16, "caption_projection_dim": 128, "pos_embed_max_size": 24, "dual_attention_layers": (0, 1)}
    else:
        small |= {"num_single_layers": 6, "axes_dims_rope": (8, 12, 12)}
    return replace(of, network=of.network | small, vae=of.vae | _TINY_VAE, tokens=24, width=64, pooled=48, rank=4)


def loader_of(architecture: Architecture, device: torch.device) -> Loader:
    """Loads pipelines with random weights and no text encoders, whose embeddings of prompts are random too."""

    def load(path: str, classes: Sequence[str], title: str, example: str, dtypes: Mapping[str, torch.dtype]) -> Any:
        def build(kind: str, settings: dict[str, Any], dtype: torch.dtype) -> Any:
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                with torch.device(device):
                    return getattr(diffusers, kind).from_config(settings)
            finally:
                torch.set_default_dtype(before)

        absent = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
        pipeline = getattr(diffusers, classes[0])(
            transformer=build(architecture.kind, architecture.network, dtypes["transformer"]),
            vae=build("AutoencoderKL", architecture.vae, torch.float32),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**architecture.scheduler),
            **dict.fromkeys(absent if architecture.family == "sd3" else [name for name in absent if not name.endswith("3")]),
        )

        def encode_prompt(prompt: list[str], **_: Any) -> tuple[Any, ...]:
            embeds = torch.randn(len(prompt), architecture.tokens, architecture.width, device=device).to(dtypes["default"])
            pooled = torch.randn(len(prompt), architecture.pooled, device=device).to(dtypes["default"])
            return (embeds, None, pooled, None) if architecture.family == "sd3" else (embeds, pooled, None)

        pipeline.encode_prompt = encode_prompt
        return pipeline

    return load


# --- cases --------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    model: str
    adapter: str
    size: int
    compile: str
    dtype: str
    checkpointing: bool
    images: int
    """Sampled at once, and trained in micro-batches of as many rows."""

    @property
    def name(self) -> str:
        parts = [self.model, self.adapter, f"{self.size} px", "" if self.compile == "off" else f"compile {self.compile}"]
        return " ".join(filter(None, [*parts, "checkpointing" if self.checkpointing else ""]))


def full_cases() -> list[Case]:
    """Of a device of 80 GB or more; what does not fit is reported as such."""
    found = []
    for size, images in ((512, 8), (1024, 4)):
        for compiled in ("off", "blocks", "whole"):
            found.append(Case("sd3.5-medium", "lora", size, compiled, "bfloat16", False, images))
            found.append(Case("flux.1-dev", "lora", size, compiled, "bfloat16", True, images // 2))
        found.append(Case("sd3.5-medium", "full", size, "off", "bfloat16", True, images))
        found.append(Case("sd3.5-medium", "full", size, "blocks", "bfloat16", True, images))
        found.append(Case("flux.1-dev", "full", size, "off", "bfloat16", True, images // 2))
    return found


def tiny_cases() -> list[Case]:
    """For a CPU."""
    return [
        Case(model, adapter, size, "off", dtype, checkpointing, 4)
        for model in ARCHITECTURES
        for adapter, size, dtype, checkpointing in (
            ("lora", 128, "float32", False),
            ("lora", 128, "float32", True),
            ("lora", 256, "float32", False),
            ("full", 128, "float32", False),
            ("full", 128, "bfloat16", False),
        )
    ]


def config_of(case: Case, rank: int, family: str, folder: Path, device: str) -> Config:
    """Flow-GRPO-Fast on one group: the two noisiest of ten steps are trained, no guidance."""
    text = f"""
method: flow_grpo_fast
run_dir: {folder / "run"}
model:
  path: {folder / "random"}
  family: {family}
  dtype: {case.dtype}
  adapter: {case.adapter}
  lora: {{rank: {rank}, alpha: {2 * rank}}}
  height: {case.size}
  width: {case.size}
  compile: {case.compile if case.compile != "off" else "'off'"}
  gradient_checkpointing: {str(case.checkpointing).lower()}
data: {{train: "flowrl:tiny-sd3/train"}}
rewards: [jpeg_compressibility]
rollout: {{num_steps: 10, window: {{size: 2, low: 0, high: 2}}, groups_per_iteration: 1, group_size: {case.images}, guidance_scale: 1, same_noise: false}}
objective: {{updates_per_iteration: 1}}
kl: {{weight: 0}}
ema: null
training: {{iterations: 1, device: {device}, rows_per_forward: {case.images}, rows_per_backward: {case.images}}}
evaluation: {{num_images: {case.images}, final_num_images: {case.images}}}
"""
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


# --- measuring ----------------------------------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def allocator_peak(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that ``work`` holds above those before it, as the allocator of the device saw them."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    assert profile.profiler is not None
    events = [(event.start_ns(), event.nbytes()) for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        now += size
        most = max(most, now)
    return most


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of the best of 10 products of two square matrices."""
    n = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(10))


def flops_of_row(config: Config, loader: Loader) -> tuple[int, int]:
    """(forward, forward + backward) of one row, counted on tensors without memory."""
    plain = config.model.model_copy(update={"compile": "off"})
    found = []
    with weightless(loader):
        policy = make_policy(plain, torch.device("cpu"))
        x, sigma = torch.randn(1, *policy.latent_shape), torch.full((1,), 0.5, dtype=torch.float64)
        for grad in (False, True):
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
                out = policy.velocity()(x, sigma, torch.zeros(1, dtype=torch.int64))
                if grad:
                    out.mean().backward()
            found.append(counter.get_total_flops())
    return found[0], found[1]


def resident_bytes(trainer: Trainer) -> int:
    """Bytes of all that stays from iteration to iteration, by the tensors themselves; what this script keeps beside them is not counted."""
    policy = trainer.policy
    networks = [policy.network, policy.vae, *policy.text_encoders, *([policy.reference_network] if policy.reference_network is not None else [])]
    tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    tensors += [t for state in trainer.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    tensors += [t for copy in (trainer.ema, trainer.old_policy) if copy is not None for t in copy.average]
    tensors += policy.prompts.take(torch.arange(len(policy.prompts))).values()
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Bench:
    """One case: its rollout and training phase, and the bare network on the same rows."""

    def __init__(self, config: Config) -> None:
        self.trainer = Trainer(config)
        trainer = self.trainer
        self.policy: DiffusionPolicy = trainer.policy
        self.prompts = [trainer.prompts[i] for i in trainer.engine.sampler.groups(0)]
        self.prompt_rows = self.policy.prompt_rows([p.text for p in self.prompts])
        self.plan = trainer.engine.plan(1)
        self.velocity = self.policy.velocity(config.rollout.guidance_scale)
        self.batches: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
        self.rollout = self._walk(self._recording)
        advantages = torch.randn(len(self.rollout.leaves), generator=torch.Generator().manual_seed(0))
        edges, o = len(self.rollout.edge_row), config.objective
        low, high = torch.full((edges,), o.clip_low), torch.full((edges,), o.clip_high)
        edge = edge_advantages(advantages, self.rollout.leaf_edge, edges)
        self.assignment = Assignment(self.rollout, edge, low, high, None, len(self.rollout.row_sigma), False, {})

    def _recording(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        self.batches.append((x.clone(), sigma, self.policy.prompts.take(rows)))
        return self.velocity(x, sigma, rows)

    def _walk(self, velocity: Any) -> Any:
        policy, numbers = self.policy, range(len(self.prompts))
        generators = [generator(0, "noise", 1, g) for g in numbers]
        return concatenate([execute(velocity, self.plan, self.prompt_rows, generators, policy.latent_shape, device=policy.device)])

    def sample(self) -> None:
        self._walk(self.velocity)

    def sample_and_decode(self) -> None:
        self.policy.decode(self._walk(self.velocity).leaves)

    def train(self) -> dict[str, Any]:
        return self.trainer.update(Sampled(self.plan, self.rollout, 0), self.assignment, self.prompts, list(range(len(self.prompts))), 1)

    def _bare(self, x: Tensor, sigma: Tensor, prompts: dict[str, Tensor]) -> Tensor:
        policy = self.policy
        with nullcontext() if policy.dtype == torch.float32 else torch.autocast(policy.device.type, policy.dtype):
            return policy.predict(policy.network, x, sigma, prompts)

    def bare_forward(self) -> None:
        with torch.no_grad():
            for batch in self.batches:
                self._bare(*batch)

    def bare_forward_backward(self) -> None:
        rollout, policy = self.rollout, self.policy
        for rows in torch.arange(len(rollout.row_sigma)).split(self.trainer.rows_per_backward):
            prompts = policy.prompts.take(self.prompt_rows[rollout.row_group[rows]])
            self._bare(rollout.row_x[rows.to(rollout.row_x.device)], rollout.row_sigma[rows], prompts).float().mean().backward()
        self.trainer.optimizer.zero_grad()

    def whole(self) -> None:
        """What a run does in an iteration, but for rewards."""
        self.sample_and_decode()
        self.train()


@dataclass(frozen=True)
class Result:
    """Of a case. FLOP/s as a share of the device's matrix peak; overheads as ratios; memory in bytes."""

    images_per_second: float
    seconds_per_row: float
    rollout_overhead: float
    training_overhead: float
    rollout_utilisation: float
    training_utilisation: float
    measured: int
    predicted: int
    ratio: float
    rows: int
    """Of a micro-batch, fewer than the config's where memory ran out and it was halved."""

    def cells(self) -> list[str]:
        return [
            f"{self.images_per_second:.3g}",
            f"{self.seconds_per_row:.3g}",
            f"{self.rollout_overhead:.3f}",
            f"{self.training_overhead:.3f}",
            f"{self.rollout_utilisation:.0%}",
            f"{self.training_utilisation:.0%}",
            _size(self.measured),
            f"{_size(self.predicted)} ({self.predicted / self.measured - 1:+.0%})",
            f"{self.ratio:.1e}",
            str(self.rows),
        ]


def _size(value: int) -> str:
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def run_case(case: Case, architecture: Architecture, device: torch.device, peak: float, rounds: int) -> Result:
    """Measure one case.

    Raises:
        torch.OutOfMemoryError, UserError: it does not fit.
    """
    with tempfile.TemporaryDirectory() as name:
        config = config_of(case, architecture.rank, architecture.family, Path(name), device.type)
        on_shapes = loader_of(architecture, torch.device("cpu"))
        expected = estimate_memory(config, "cuda" if device.type == "cuda" else "cpu", on_shapes)
        forward, both = flops_of_row(config, on_shapes)
        with pipelines_from(loader_of(architecture, device)):
            bench = Bench(config)
    ratio = math.expm1(bench.train()["ratio/max_abs_log_first"])
    bench.whole(), bench.bare_forward(), bench.bare_forward_backward()
    measured = resident_bytes(bench.trainer) + allocator_peak(bench.whole, device)
    pairs = {"rollout": (bench.sample, bench.bare_forward), "training": (bench.train, bench.bare_forward_backward)}
    times = {name: [(timed(ours, device), timed(bare, device)) for _ in range(rounds)] for name, (ours, bare) in pairs.items()}
    overhead = {name: statistics.median(a / b for a, b in both_times) for name, both_times in times.items()}
    seconds = {name: statistics.median(a for a, _ in both_times) for name, both_times in times.items()}
    images = len(bench.rollout.leaves) / statistics.median(timed(bench.sample_and_decode, device) for _ in range(rounds))
    rows = len(bench.rollout.row_sigma)
    return Result(
        images_per_second=images,
        seconds_per_row=seconds["training"] / rows,
        rollout_overhead=overhead["rollout"],
        training_overhead=overhead["training"],
        rollout_utilisation=forward * bench.rollout.forward_rows / seconds["rollout"] / peak,
        training_utilisation=both * rows / seconds["training"] / peak,
        measured=measured,
        predicted=max(expected.phases[name] for name in ("rollout", "decoding", "training", "update")),
        ratio=ratio,
        rows=bench.trainer.rows_per_backward,
    )


HEAD = (
    "| case | dtype | images/s | s per training row | rollout / bare | training / bare | rollout FLOPs | training FLOPs | peak | predicted | ratio - 1 | rows |"
)


def main(
    out: Annotated[Path, typer.Option(help="the table to write")] = Path("benchmarks/gpu.md"),
    tiny_: Annotated[bool, typer.Option("--tiny", help="small networks, for a CPU")] = False,
    only: Annotated[str, typer.Option(help="cases whose name begins so")] = "",
    size: Annotated[int | None, typer.Option(help="cases of this size")] = None,
    rounds: Annotated[int, typer.Option(help="timed rounds of A B")] = 7,
    show: Annotated[bool, typer.Option("--show", help="print the first case's config and stop")] = False,
) -> None:
    """Measure, print and write the table."""
    on_gpu = torch.cuda.is_available() and not tiny_
    if not on_gpu and not tiny_:
        typer.echo("torch sees no GPU; the full-size networks need one. For small ones on the CPU: --tiny", err=True)
        raise typer.Exit(2)
    device = torch.device("cuda" if on_gpu else "cpu")
    cases = [case for case in (full_cases() if on_gpu else tiny_cases()) if case.name.startswith(only) and size in (None, case.size)]
    if not cases:
        typer.echo(f"no case begins with {only!r}", err=True)
        raise typer.Exit(2)
    if show:
        first = cases[0]
        with tempfile.TemporaryDirectory() as folder:
            typer.echo(dump_config(config_of(first, ARCHITECTURES[first.model].rank, ARCHITECTURES[first.model].family, Path(folder), device.type)))
        return
    peaks = {dtype: matmul_peak(device, getattr(torch, dtype)) for dtype in sorted({case.dtype for case in cases})}
    lines = [HEAD, "| --- " * (HEAD.count("|") - 1) + "|"]
    for case in cases:
        architecture = ARCHITECTURES[case.model] if on_gpu else tiny(ARCHITECTURES[case.model])
        try:
            cells = run_case(case, architecture, device, peaks[case.dtype], rounds).cells()
        except (torch.OutOfMemoryError, UserError) as error:
            cells = [f"does not fit: {str(error).splitlines()[0][:80]}", *[""] * 9]
        lines.append("| " + " | ".join([case.name, case.dtype, *cells]) + " |")
        typer.echo(lines[-1])
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch._dynamo.reset()
    facts = versions(device)
    where = torch.cuda.get_device_name() if on_gpu else f"{facts['cpu']}, {facts['threads']} threads"
    found = ", ".join(f"{dtype} {value / 1e12:.3g} TFLOP/s" for dtype, value in peaks.items())
    made_with = f"{where}; matrix peak {found}; torch {facts['torch']}, diffusers {facts['diffusers']}; commit {facts['commit']}; {rounds} rounds."
    warning = [] if on_gpu else [_MISSING, ""]
    text = ["# Full-size architectures on a GPU", "", *warning, (__doc__ or "").split("\n\n")[-1].strip().replace("\n", " "), "", made_with, "", *lines]
    out.write_text("\n".join(text) + "\n", encoding="utf-8")


_MISSING = (
    "**The GPU numbers are missing.** No GPU was at hand; the table below is of networks a thousand times smaller on a CPU (`--tiny`), and shows that the "
    "script runs, that the ratio of the first update is 1 and how close the predicted memory comes. Its times, overheads and utilisation say nothing about a "
    "GPU, the less so as the machine was shared with other work. "
    "On a machine with a GPU, `python benchmarks/gpu.py` replaces this file with the full-size table."
)


if __name__ == "__main__":
    typer.run(main)
