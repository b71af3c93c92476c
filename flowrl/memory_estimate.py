"""What a run will take of a device's memory, before it starts: its own networks, built from their configs without weights, really run forward and backward on
tensors that have shapes and no memory, and every storage that lives meanwhile is counted.

So activations are exact for any family, with and without gradient checkpointing, and nothing is downloaded but configs and tokenizers. What kernels take for
themselves (cuDNN workspaces), the driver's context, torch's reserve and the networks of rewards are not in it; compiled networks take less.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from flowrl.data import GroupSampler, load_prompts
from flowrl.estimate import units_of_group
from flowrl.likelihood_agreement import DIRECT_NAMES, trains_steps
from flowrl.planning import kept_latents
from flowrl.types import UserError

if TYPE_CHECKING:
    from flowrl.config import Config
    from flowrl.policies.base import DiffusionPolicy
    from flowrl.policies.weightless import Loader

__all__ = ["MEMORY_HEAD", "LiveBytes", "MemoryEstimate", "estimate_memory", "memory_lines"]

MEMORY_HEAD = ("memory", "GiB", "rows")
Kind = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one device of a run in one process.

    Attributes:
        device: "cuda" or "cpu": whose autocast and optimiser are meant.
        network, vae, text_encoders: weights; ``trainable`` of the network's learn. text_encoders: what stays there between prompts.
        reference: the frozen copy of full fine-tuning. averages: EMA and old policy.
        gradients, moments: of the trainable weights.
        prompts: embeddings of all prompts that a run meets. latents: of an iteration, with what is kept beside them.
        phases: the peak of each part of a run, everything that is there included.
        rows: network rows, prompts or pictures at once in each of them.
    """

    device: Kind
    network: int
    trainable: int
    reference: int
    vae: int
    text_encoders: int
    averages: int
    gradients: int
    moments: int
    prompts: int
    latents: int
    phases: dict[str, int]
    rows: dict[str, int]

    @property
    def resident(self) -> int:
        """What is there from the first update to the end, whatever the run is doing."""
        return self.network + self.reference + self.vae + self.text_encoders + self.averages + self.moments + self.prompts

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "resident": self.resident, "peak": self.peak}


def estimate_memory(config: Config, device: Kind | None = None, loader: Loader | None = None) -> MemoryEstimate:
    """The memory of a run. It takes seconds, for FLUX.1 about half a minute.

    Args:
        device: what it will run on; None = a CUDA device unless the config says cpu.
        loader: of the pipeline, as of `flowrl.policies.weightless.weightless`.
    Raises:
        UserError: the model's configs cannot be read, or cannot be run without weights.
    """
    from flowrl.policies.weightless import weightless

    kind: Kind = device or ("cpu" if config.training.device == "cpu" else "cuda")
    if config.likelihood == "token":
        return _of_text(config, kind)
    plan = _Plan.of(config)
    try:
        with weightless(loader), _like(kind), LiveBytes() as live:
            return _Account(config, plan, kind, live).estimate()
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"memory: this model could not be run without its weights ({said}); the run itself may be able to") from error


def _of_text(config: Config, kind: Kind) -> MemoryEstimate:
    """Of a language model."""
    from flowrl.policies.prompt_lengths import prompt_lengths
    from flowrl.policies.weightless import weightless
    from flowrl.policies.weightless_text import weightless_language_models

    if config.data.pairs is not None or config.environment is not None or config.generation.engine == "vllm":
        what = "stored pairs" if config.data.pairs is not None else "environments" if config.environment is not None else "vllm's own network and cache"
        raise UserError(f"memory: {what} are not predicted; the run itself shows what it takes")
    prompts = load_prompts(config.data.train)
    met = GroupSampler(len(prompts), config.rollout.groups_per_iteration, config.seed).met(config.training.iterations)
    longest = max(prompt_lengths(config.model.path, [prompts[index] for index in sorted(met)]))
    try:
        with weightless(), weightless_language_models(), _like(kind), LiveBytes() as live:
            return _TextAccount(config, longest, kind, live).estimate()
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"memory: this model could not be run without its weights ({said}); the run itself may be able to") from error


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the config alone says.

    Attributes:
        texts: distinct prompts that a run meets, and the empty one.
        latents: kept of an iteration, with what other policies say at them.
        rows, batches: network rows of one forward and backward, and micro-batches of an update.
        steps: network evaluations with gradient one after another.
    """

    texts: int
    latents: int
    rows: int
    batches: int
    steps: int

    @classmethod
    def of(cls, config: Config) -> _Plan:
        from flowrl.updates.direct import steps_with_gradient

        iterations = range(1, min(100, config.training.iterations) + 1)
        return cls(_texts(config), _kept(config), *_micro_batch(config), max(steps_with_gradient(config, iteration) for iteration in iterations))


def _texts(config: Config) -> int:
    from flowrl.pairs import load_pairs

    e = config.evaluation
    prompts = load_prompts(config.data.train) if config.data.pairs is None else load_pairs(config.data.pairs).prompts
    met = GroupSampler(len(prompts), config.rollout.groups_per_iteration, config.seed).met(config.training.iterations)
    splits = [load_prompts(path)[: max(e.num_images, e.final_num_images)] for path in config.data.eval.values()]
    if config.model.text_encoders == "free":  # then all are encoded beforehand
        met, splits = set(range(len(prompts))), [load_prompts(path) for path in config.data.eval.values()]
    return len({prompts[index].text for index in met} | {p.text for split in splits for p in split} | {""})


def _kept(config: Config) -> int:
    from flowrl.updates.direct import kept_steps
    from flowrl.updates.matching import needs_old_velocity

    ends = (1, config.training.iterations)  # a window may grow
    leaves, rows, edges = max((kept_latents(config, iteration, kept_steps(config, iteration)) for iteration in ends), key=sum)
    penalised, normalised = config.kl.weight > 0, config.objective.ratio == "ratio_norm" or config.layer_tuning.weight > 0
    kept = leaves + edges + rows * (1 + normalised + (trains_steps(config) and penalised))
    if config.likelihood == "matching":  # the noise, and what other policies say at it
        kept += leaves * config.matching.num_times * (1 + penalised + needs_old_velocity(config))
    return config.rollout.groups_per_iteration * kept


def _micro_batch(config: Config) -> tuple[int, int]:
    """(rows, batches) of `_Plan`: rows that stay together are those of a unit of `flowrl.updates`."""
    from flowrl.core.preference import PAIR_OBJECTIVES

    objective, matching = config.objective, config.matching
    if trains_steps(config) or objective.name in DIRECT_NAMES:
        together, of_group = 1, float(units_of_group(config, 1))
    else:
        members = 2 if objective.name in PAIR_OBJECTIVES else 1
        together = members * (matching.num_times if matching.combine == "sum_first" else 1)
        of_group = units_of_group(config, 1) * members * matching.num_times
    of_update = math.ceil(config.rollout.groups_per_iteration * of_group / objective.updates_per_iteration)
    rows = max(together, min(config.training.rows_per_backward, of_update) // together * together)
    return rows, math.ceil(of_update / rows)


class _Account:
    """The parts of a run, one after another."""

    def __init__(self, config: Config, plan: _Plan, kind: Kind, live: LiveBytes) -> None:
        from flowrl.policies.families import make_policy
        from flowrl.updates.pairs import needs_reference

        self.config, self.plan, self.kind, self.live = config, plan, kind, live
        plain = {"compile": "off", "attention_backend": None, "prompt_storage": "device", "prompt_folder": None}
        rows = config.training.rows_per_forward
        self.policy: DiffusionPolicy = make_policy(config.model.model_copy(update=plain), torch.device("cpu"), rows_per_forward=rows)
        self.copied = config.model.adapter == "full" and needs_reference(config)

    def estimate(self) -> MemoryEstimate:
        config, policy, e = self.config, self.policy, self.config.evaluation
        trainable = policy.trainable()
        weights = _bytes(trainable)
        encoders = _bytes(p for encoder in policy.text_encoders for p in [*encoder.parameters(), *encoder.buffers()])
        moments = _moments(config, trainable)
        averages = weights * ((config.ema is not None) + (config.old_policy is not None))
        texts, each = self.plan.texts, sum(column.nbytes for column in policy.prompts.take(torch.tensor([0])).values())
        prompts = texts * each if config.model.prompt_storage == "device" else 0
        network, vae = _bytes([*policy.network.parameters(), *policy.network.buffers()]), _bytes([*policy.vae.parameters(), *policy.vae.buffers()])
        reference = network if self.copied else 0
        stay = encoders if config.model.text_encoders == "keep" else 0
        latents = 0 if config.training.offload_rollouts else 4 * self.plan.latents * math.prod(policy.latent_shape)
        base = network + reference + vae + moments + averages + prompts

        rollout_rows = min(config.training.rows_per_forward, config.rollout.groups_per_iteration * config.rollout.group_size)
        evaluation_rows = min(config.training.rows_per_forward, max(e.num_images, e.final_num_images))
        train_rows, batches = self.plan.rows, self.plan.batches
        at_once = 1 if self.kind == "cpu" else min(64, texts)
        copy = weights if config.old_policy is not None and config.old_policy.rollout else 0
        sampled = config.data.pairs is None
        phases: dict[str, int] = {}
        rows: dict[str, int] = {}

        def note(name: str, count: int, there: int, temporary: int) -> None:
            rows[name], phases[name] = count, there + temporary

        note("prompts", at_once, base + encoders + prompts, self._encoding(at_once))
        if sampled:
            note("rollout", rollout_rows, base + stay + latents + copy, self._forward(rollout_rows, config.rollout.guidance_scale))
            note("decoding", rollout_rows, base + stay + latents + copy, self._decoding(rollout_rows))
        held = _bytes(trainable) if batches > 1 else 0  # gradients of the micro-batches before
        note("training", train_rows, base + stay + latents + held, self._training(train_rows, held > 0))
        note("update", 0, base + stay + latents + weights, _of_update(config, trainable, self.kind))
        copy = weights if config.ema is not None else 0
        note("evaluation", evaluation_rows, base + stay + copy, self._forward(evaluation_rows, e.guidance_scale))
        note("evaluation, decoding", evaluation_rows, base + stay + copy, self._decoding(evaluation_rows))
        return MemoryEstimate(
            device=self.kind,
            network=network,
            trainable=weights,
            reference=reference,
            vae=vae,
            text_encoders=stay,
            averages=averages,
            gradients=weights,
            moments=moments,
            prompts=prompts,
            latents=latents,
            phases=phases,
            rows=rows,
        )

    # --- what comes and goes: bytes above what was there before ---

    def _inputs(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(rows, *self.policy.latent_shape)
        return x, torch.linspace(0.9, 0.1, rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.int64)

    def _encoding(self, count: int) -> int:
        return self.live.peak_of(lambda: self.policy._embed([""] * count))

    @cache  # noqa: B019
    def _forward(self, rows: int, guidance_scale: float) -> int:
        def work() -> object:
            with torch.no_grad():
                return self.policy.velocity(guidance_scale)(*self._inputs(rows))

        return self.live.peak_of(work)

    @cache  # noqa: B019
    def _decoding(self, pictures: int) -> int:
        latents = torch.randn(pictures, *self.policy.latent_shape)
        return self.live.peak_of(lambda: self.policy.decode(latents))

    def _training(self, rows: int, accumulating: bool) -> int:
        """One micro-batch: forward, loss, backward; with the gradients, where they are not there before."""
        config, policy = self.config, self.policy
        guidance = config.rollout.guidance_scale if trains_steps(config) or config.objective.name in DIRECT_NAMES else config.matching.guidance_scale
        velocity = policy.velocity(guidance)
        for p in policy.trainable():
            p.grad = torch.zeros_like(p) if accumulating else None

        def work() -> None:
            x, sigma, prompt_row = self._inputs(rows)
            if config.objective.name in DIRECT_NAMES:
                for _ in range(self.plan.steps):
                    x = x - 0.1 * velocity(x, sigma, prompt_row)
                loss = policy.decode_with_grad(x).square().mean()
            else:
                loss = velocity(x, sigma, prompt_row).square().mean()
            _run_backward(loss)

        try:
            return self.live.peak_of(work)
        finally:
            for p in policy.trainable():
                p.grad = None


class _TextAccount:
    """The parts of a run of a language model. Every answer has all of ``generation.max_new_tokens``, and the longest prompt.

    Args:
        longest: tokens of that prompt.
    """

    def __init__(self, config: Config, longest: int, kind: Kind, live: LiveBytes) -> None:
        from flowrl.engines.text import TextEngine
        from flowrl.policies.causal_lm import CausalLmPolicy
        from flowrl.text.objectives import make_objective
        from flowrl.text.pairs import PairObjective

        self.config, self.kind, self.live, self.longest = config, kind, live, longest
        plain = config.model.model_copy(update={"compile": "off", "attention_backend": None})
        self.policy = CausalLmPolicy(plain, torch.device("cpu"), rows_per_forward=config.training.rows_per_forward)
        self.copied = config.model.adapter == "full" and TextEngine.needs_reference(config)
        objective, size = make_objective(config), config.rollout.group_size
        self.together = size if objective.whole_groups else 2 if isinstance(objective, PairObjective) else 1

    def estimate(self) -> MemoryEstimate:
        config, policy, e = self.config, self.policy, self.config.evaluation
        trainable = policy.trainable()
        weights, network = _bytes(trainable), _bytes([*policy.network.parameters(), *policy.network.buffers()])
        averages = weights * ((config.ema is not None) + (config.old_policy is not None))
        reference, moments = network if self.copied else 0, _moments(config, trainable)
        base = network + reference + moments + averages
        answers = config.rollout.groups_per_iteration * config.rollout.group_size
        most, at_once = config.training.rows_per_forward, config.training.rows_per_backward
        of_update = math.ceil(answers / config.objective.updates_per_iteration)
        trained = max(self.together, min(at_once, of_update) // self.together * self.together)
        copy = weights if config.old_policy is not None and config.old_policy.rollout else 0
        held = weights if trained < of_update else 0
        phases: dict[str, int] = {}
        rows: dict[str, int] = {}

        def note(name: str, count: int, there: int, temporary: int) -> None:
            rows[name], phases[name] = count, there + temporary

        note("rollout", min(most, answers), base + copy, self._sampling(min(most, answers)))
        note("measuring", min(most, answers), base, self._pass(min(most, answers), gradient=False, accumulating=False))
        note("training", trained, base + held, self._pass(trained, gradient=True, accumulating=held > 0))
        note("update", 0, base + weights, _of_update(config, trainable, self.kind))
        evaluated = min(most, max(e.num_images, e.final_num_images))
        note("evaluation", evaluated, base + (weights if config.ema is not None else 0), self._sampling(evaluated))
        return MemoryEstimate(
            device=self.kind,
            network=network,
            trainable=weights,
            reference=reference,
            vae=0,
            text_encoders=0,
            averages=averages,
            gradients=weights,
            moments=moments,
            prompts=0,
            latents=0,
            phases=phases,
            rows=rows,
        )

    @cache  # noqa: B019
    def _sampling(self, rows: int) -> int:
        """The last token of so many answers: the cache of all tokens before it, and what chooses among the vocabulary."""
        from flowrl.policies.decoding import filtered, inverse_cdf

        policy, g = self.policy, self.config.generation
        length = self.longest + g.max_new_tokens - 1

        def work() -> object:
            with torch.no_grad():
                known, place = policy.new_cache(), torch.arange(length)[None]
                policy.next_logits(torch.zeros_like(place), torch.ones_like(place).bool(), place, known, length)
                known.batch_select_indices(torch.zeros(rows, dtype=torch.int64))
                last = torch.zeros(rows, 1, dtype=torch.int64)
                logits = policy.next_logits(last, torch.ones(rows, length + 1, dtype=torch.bool), last + length, known, rows)
                return known, inverse_cdf(filtered(torch.log_softmax(logits / g.temperature, -1), g), torch.rand(rows))

        return self.live.peak_of(work)

    def _pass(self, rows: int, *, gradient: bool, accumulating: bool) -> int:
        """Log-probabilities of so many answers, and with gradient the backward pass of their sum."""
        policy, own = self.policy, self.config.generation.max_new_tokens
        length = self.longest + own - 1
        for p in policy.trainable():
            p.grad = torch.zeros_like(p) if accumulating else None

        def work() -> object:
            ids = torch.zeros(rows, length, dtype=torch.int64)
            places = (torch.arange(rows)[:, None] * length + torch.arange(self.longest - 1, length)).flatten()
            with torch.set_grad_enabled(gradient):
                where = torch.arange(length).expand(rows, length)
                found = policy._forward(ids, torch.ones_like(ids).bool(), where, ids.numel(), places=places, targets=torch.zeros_like(places))
            loss = found["log_prob"].sum()
            if gradient:
                _run_backward(loss)
            return found

        try:
            return self.live.peak_of(work)
        finally:
            for p in policy.trainable():
                p.grad = None


def _run_backward(loss: Tensor) -> None:
    """``loss.backward()`` would take `_CudaAutocast` away while checkpoints are recomputed."""
    torch.autograd.Variable._execution_engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _moments(config: Config, trainable: Sequence[nn.Parameter]) -> int:
    """Two per weight; of adamw_8bit a byte each and a float32 for every 256, but float32 for tensors under 4096 elements."""
    if config.optimizer.name == "adamw":
        return 2 * _bytes(trainable)
    return sum(2 * (p.numel() + 4 * math.ceil(p.numel() / 256) if p.numel() >= 4096 else 4 * p.numel()) for p in trainable)


def _of_update(config: Config, trainable: Sequence[nn.Parameter], kind: Kind) -> int:
    """What AdamW computes with: on CUDA for all weights at once, the square roots of the second moments."""
    if config.optimizer.name != "adamw":
        return 0
    return _bytes(trainable) if kind == "cuda" else max(4 * p.numel() for p in trainable)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each counted once."""
    return sum({id(storage): storage.nbytes() for storage in [t.untyped_storage() for t in tensors]}.values())


# --- counting -----------------------------------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that were made within it and are still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def peak_of(self, work: Callable[[], object]) -> int:
        """The most bytes that were alive during ``work``, above those before it. What it returns counts."""
        before = self.most = self.now
        work()
        return self.most - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._meet(leaf.untyped_storage())
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._leave, size)

    def _leave(self, size: int) -> None:
        self.now -= size


# --- a CUDA device's autocast on CPU tensors ------------------------------------------------------------------------------------------------------

_FLOAT32 = frozenset(
    ("exp", "log", "pow", "__pow__", "__rpow__", "reciprocal", "rsqrt", "layer_norm", "group_norm", "cosine_similarity", "mse_loss", "norm", "softplus")
)
_FLOAT32_RESULT = frozenset(("softmax", "log_softmax", "sum", "cumsum", "prod"))


class _CudaAutocast(TorchFunctionMode):
    """Where autocast is on, also the operations that a CUDA device computes in float32 and a CPU does not."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if (name in _FLOAT32 or name in _FLOAT32_RESULT) and torch.is_autocast_enabled("cpu"):
            if name in _FLOAT32:
                args, kwargs = tree_map(_widened, args), tree_map(_widened, kwargs)
            elif kwargs.get("dtype") is None and isinstance(args[0], Tensor) and args[0].dtype in (torch.bfloat16, torch.float16):
                kwargs["dtype"] = torch.float32
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


@contextlib.contextmanager
def _like(kind: Kind) -> Iterator[None]:
    with _CudaAutocast() if kind == "cuda" else contextlib.nullcontext():
        yield


# --- table --------------------------------------------------------------------------------------------------------------------------------------


def memory_lines(expected: MemoryEstimate) -> tuple[list[tuple[str, ...]], list[str]]:
    """(rows of a table under `MEMORY_HEAD`, notes)."""
    kept = {
        "network": expected.network,
        "  of it trainable": expected.trainable,
        "reference": expected.reference,
        "VAE": expected.vae,
        "text encoders": expected.text_encoders,
        "averaged weights": expected.averages,
        "optimiser": expected.moments,
        "embeddings of prompts": expected.prompts,
        "latents of an iteration": expected.latents,
    }
    rows: list[tuple[str, ...]] = [(name, _gib(size), "") for name, size in kept.items() if size]
    rows += [(f"peak: {name}", _gib(size), f"{expected.rows[name]:,}" if expected.rows[name] else "") for name, size in expected.phases.items()]
    worst = max(expected.phases, key=lambda name: expected.phases[name])
    notes = [
        f"peak memory on {'a CUDA device' if expected.device == 'cuda' else 'the CPU'}: {_gib(expected.peak)} GiB, in: {worst}; "
        "networks of rewards, the driver and torch's reserve come on top"
    ]
    return rows, notes


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}" if size >= 2**27 else f"{size / 2**30:.2g}"
