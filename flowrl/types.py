"""The nouns of flowrl: plain data that every other module passes around. Imports nothing heavy: torch is needed by type checkers only.

Letters: B samples (leaves), G group size, P groups, N tree nodes, E edges, S decisions in a sequence, L... latent axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "Completions",
    "Decisions",
    "Objective",
    "Pairs",
    "Prompt",
    "Reward",
    "RewardInfo",
    "Rollout",
    "SampleBatch",
    "Scores",
    "UserError",
    "Velocity",
]


class UserError(Exception):
    """A mistake in the user's input: shown as one line, without a traceback, with exit code 2."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text prompt and the facts about it that a reward may read."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SampleBatch:
    """Decoded outputs to be scored, in the order of their prompts.

    Attributes:
        prompts: length B.
        images: [B, 3, H, W] float32 in [0, 1], or None for text; on the CPU, but for rewards that are differentiated, which get them where they were made.
        texts: length B, or None for images.
        group: [B] int64; equal numbers share a prompt. None when samples are unrelated.
    """

    prompts: Sequence[Prompt]
    images: Tensor | None = None
    texts: Sequence[str] | None = None
    group: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True, slots=True)
class Scores:
    """What a reward says of a batch.

    Attributes:
        values: [B] float32, higher is better. Where ``valid`` is False the value is NaN and must not be used.
        valid: [B] bool; False where a sample could not be scored.
        raw: further columns worth logging, each [B]; NaN where there is nothing to say.
        problems: index of a sample that is not valid -> why, in a few words; not every reward says.
    """

    values: Tensor
    valid: Tensor
    raw: Mapping[str, Tensor] = field(default_factory=dict)
    problems: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RewardInfo:
    """Static facts about a reward, readable without loading its weights.

    Attributes:
        low, high: the range of its values. direction: of the published measure; for "lower" the values are its negative, so that higher is better.
        source: the paper, and what else defines the measure.
        weights: what it loads, each a hub id ``owner/name`` or ``owner/name:file``, or an installed package. weights_license: of these.
        parameters: of its networks, in all.
        reads: the parts of a sample that it looks at; empty = not known, so nothing is refused for it.
        metadata: keys of the prompt's metadata without which it cannot score.
        scope: whether a sample is scored alone, or beside others of its pair or group.
        runs_on: "device" = where the config says; "cpu" = an engine that knows no other device; "network" = elsewhere, so this process only waits.
        batch_size: samples a call, if the config says nothing.
        dtype: of its networks on an accelerator, if the config says nothing; on a CPU they are float32.
        extra: the extra of this package that brings what it imports, empty = none.
    """

    name: str
    description: str
    low: float
    high: float
    source: str = ""
    weights_license: str = ""
    scope: Literal["sample", "pair", "group"] = "sample"
    differentiable: bool = False
    batch_size: int = 64
    direction: Literal["higher", "lower"] = "higher"
    weights: tuple[str, ...] = ()
    parameters: int = 0
    reads: tuple[Literal["prompt", "images", "texts", "metadata"], ...] = ("prompt", "images")
    metadata: tuple[str, ...] = ()
    runs_on: Literal["device", "cpu", "network"] = "device"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    extra: str = ""


@runtime_checkable
class Reward(Protocol):
    """Anything that scores samples. ``load`` is called once before the first ``score``, and is the only place that touches weights.

    A reward may also have ``to(device)``, which moves its networks (offloading), ``check_prompts(prompts)``, which raises a UserError for the first prompt
    that it could never score, before any work starts, and ``close()``, which gives back processes and connections.
    """

    info: RewardInfo

    def load(self, device: torch.device, dtype: torch.dtype) -> None: ...

    def score(self, batch: SampleBatch) -> Scores: ...


Velocity: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor]"
"""(x [R, L...], sigma [R], prompt_row [R] int64) -> velocity [R, L...], the model's estimate of noise - clean."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """A forest of denoising trees: nodes are latents, edges are steps, leaves are clean latents.

    Only nodes that touch a trained edge, and those of the plan's kept steps, keep their latents. A *row* is a node whose velocity training needs; siblings
    share it. Finished samples that no sampler of ours drew have leaves alone.

    Attributes:
        leaves: [B, L...] float32, final latents, ordered group by group.
        leaf_group: [B] int64, group number of each leaf, in 0..P-1.
        leaf_set: [B] int64 in 0..; leaves of one set are compared with each other (all leaves of a group, but for granular plans).
        row_x: [R, L...] float32, the latent of each training row.
        row_sigma: [R] float64.
        row_group: [R] int64.
        row_step: [R] int64, index of the row's latent in the sigma grid.
        row_velocity: [R, L...] float32, the sampling policy's velocity; None where it was not asked for.
        edge_row: [E] int64, the row (parent node) each trained edge starts from.
        edge_x_next: [E, L...] float32, the sampled next latent.
        edge_sigma, edge_sigma_next, edge_sigma_guard: [E] float64.
        edge_noise_level: [E] float64, the kernel's noise parameter.
        edge_step: [E] int64, index of the step in the sigma grid.
        edge_parent: [E] int64, the nearest trained edge above, -1 if there is none.
        edge_old_log_prob: [E] float32, under the policy that sampled.
        leaf_edge: [M, 2] int64 pairs (edge, a leaf below it): how leaf rewards reach edges. A chain edge has one pair.
        kernel: name of the transition kernel of the trained edges.
        forward_rows: network rows evaluated while sampling (one row = one latent, CFG counts twice).
    """

    leaves: Tensor
    leaf_group: Tensor
    leaf_set: Tensor
    row_x: Tensor
    row_sigma: Tensor
    row_group: Tensor
    row_step: Tensor
    row_velocity: Tensor | None
    edge_row: Tensor
    edge_x_next: Tensor
    edge_sigma: Tensor
    edge_sigma_next: Tensor
    edge_sigma_guard: Tensor
    edge_noise_level: Tensor
    edge_step: Tensor
    edge_parent: Tensor
    edge_old_log_prob: Tensor
    leaf_edge: Tensor
    kernel: str
    forward_rows: int


@dataclass(frozen=True, slots=True)
class Completions:
    """Answers of a language model. Letters: B answers, T tokens of the longest one, P groups, D depths of a tree.

    Attributes:
        prompt_tokens: P tensors [n] int64, without padding; the answers of a group share one.
        tokens: [B, T] int64, group by group, without the prompt; beyond ``length`` there is padding.
        mask: [B, T] bool, True where the policy sampled the token, an end token included; False for padding and for what an environment said.
        length: [B] int64, tokens that are there, whoever said them.
        group: [B] int64 in 0..P-1, rising; groups may differ in size.
        finished: [B] bool; False where the length limit cut the answer.
        log_prob: [B, T] float32 of the sampled tokens at the temperature of sampling, before top-p, top-k and min-p; 0 where not sampled.
        texts: length B, decoded without special tokens.
        turn: [B, T] int64, the turn of an agent that a token belongs to; None = there is one.
        ancestors: [B, D] int64, the tree node that each answer passes at each depth, numbered over all groups; None = no tree.
    """

    prompt_tokens: tuple[Tensor, ...]
    tokens: Tensor
    mask: Tensor
    length: Tensor
    group: Tensor
    finished: Tensor
    log_prob: Tensor
    texts: tuple[str, ...]
    turn: Tensor | None = None
    ancestors: Tensor | None = None

    def __len__(self) -> int:
        return len(self.length)


@dataclass(frozen=True, slots=True)
class Decisions:
    """What an objective sees: B sequences of S random decisions. A tree edge is a sequence with S = 1.

    Attributes:
        log_prob: [B, S] float32, under the policy being trained; carries the gradient.
        old_log_prob: [B, S] float32, under the policy that sampled.
        advantages: [B, S] float32.
        mask: [B, S] bool, True where the decision counts.
        negative_log_prob: [B, S] float32, under the implicit negative policy, with gradient; only the objective `nft` reads it.
    """

    log_prob: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    mask: Tensor
    negative_log_prob: Tensor | None = None

    def __post_init__(self) -> None:
        _same_shape(self, self.log_prob, ("old_log_prob", "advantages", "mask", "negative_log_prob"))


@dataclass(frozen=True, slots=True)
class Pairs:
    """What a pair loss sees: B preferences of a chosen over a rejected sample, each judged at S places (noise levels; 1 for text).

    Attributes:
        chosen, rejected: [B, S] float32, log-probabilities under the policy being trained; carry the gradient.
        reference_chosen, reference_rejected: [B, S] float32 under the reference, constants; None where there is no reference.
        mask: [B, S] bool, True where the preference counts.
        chosen_length, rejected_length: [B, S] float32, tokens that a summed log-probability runs over; None = 1, as for log-probabilities per element.

    What only some losses read, each [B, S] float32 (core/pair_losses.py, `PAIR_NEEDS`):
        previous_chosen, previous_rejected: log-probabilities under the policy that the iteration started from, constants.
        chosen_reward, rejected_reward: rewards, or win rates in [0, 1]; constants.
        preference: the chance that the chosen one is the better, in [0, 1]; a constant. 1/2 is a tie.
        calibration: mean of log_prob - reference over calibration samples of the prompt; carries the gradient.
        revising_chosen, revising_rejected: the policy asked to improve the chosen (the rejected) sample: log_prob - reference of the chosen one minus that of
            the rejected one; carry the gradient.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    mask: Tensor
    chosen_length: Tensor | None = None
    rejected_length: Tensor | None = None
    previous_chosen: Tensor | None = None
    previous_rejected: Tensor | None = None
    chosen_reward: Tensor | None = None
    rejected_reward: Tensor | None = None
    preference: Tensor | None = None
    calibration: Tensor | None = None
    revising_chosen: Tensor | None = None
    revising_rejected: Tensor | None = None

    def __post_init__(self) -> None:
        _same_shape(self, self.chosen, tuple(column.name for column in fields(self)))


def _same_shape(owner: object, like: Tensor, names: Sequence[str]) -> None:
    for name in names:
        value: Tensor | None = getattr(owner, name)
        if value is not None and value.shape != like.shape:
            raise ValueError(f"{type(owner).__name__}.{name} has shape {tuple(value.shape)}, the log-probabilities {tuple(like.shape)}")


class Objective(NamedTuple):
    """Per-decision losses [B, S] (minimise; not yet reduced) and per-decision diagnostics, detached, each [B, S]."""

    loss: Tensor
    metrics: dict[str, Tensor]
