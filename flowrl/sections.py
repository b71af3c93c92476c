"""The sections of a run's config, as pydantic models. Unknown keys are errors; every field says what it is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

__all__ = [
    "AdvantageConfig",
    "AfterWindowConfig",
    "AnchorConfig",
    "ContrastConfig",
    "CreditConfig",
    "CriticConfig",
    "DataConfig",
    "DepthPruningConfig",
    "DirectConfig",
    "EmaConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "KLConfig",
    "LayerTuningConfig",
    "LoggingConfig",
    "LoraConfig",
    "MatchingConfig",
    "ModelConfig",
    "NonNegativeInt",
    "ObjectiveConfig",
    "OldPolicyConfig",
    "OptimizerConfig",
    "RewardConfig",
    "RewardWeightsConfig",
    "RolloutConfig",
    "Section",
    "SelectionConfig",
    "Text",
    "TrainingConfig",
    "TreeConfig",
    "WidthPruningConfig",
    "WindowConfig",
    "reward_entries",
]


def _only_numbers(kind: Literal["int_type", "float_type"]) -> Callable[[Any], Any]:
    """pydantic would take true for 1 and "7" for 7; in a config these are mistakes."""

    def check(value: Any) -> Any:
        if isinstance(value, bool | str):
            raise PydanticKnownError(kind)
        return value

    return check


Int = Annotated[int, BeforeValidator(_only_numbers("int_type"))]
PositiveInt = Annotated[Int, Field(ge=1)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
Float = Annotated[float, BeforeValidator(_only_numbers("float_type")), Field(allow_inf_nan=False)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
Decay = Annotated[Float, Field(ge=0, lt=1)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(min_length=1)]


def _one_or_many(value: Any) -> Any:
    """A lone number becomes a list of one."""
    return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value


def reward_entries(value: Any) -> Any:
    """`scene`, `[scene, jpeg]`, `{scene: 1.0}` and `{scene: {weight: 1.0, args: {}}}` all become a list of mappings with a `name`."""
    if isinstance(value, str) or (isinstance(value, Mapping) and isinstance(value.get("name"), str)):
        value = [value]
    if isinstance(value, Mapping):
        value = [{"name": name, **spec} if isinstance(spec, Mapping) else {"name": name, "weight": spec} for name, spec in value.items()]
    if isinstance(value, list | tuple):
        value = [{"name": entry} if isinstance(entry, str) else entry for entry in value]
    return value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class LoraConfig(Section):
    rank: PositiveInt = 32
    alpha: PositiveFloat = 64.0
    targets: tuple[str, ...] | None = Field(
        None, description="module name endings; null = the attention projections of an image generator, all linear layers of a language model but its head"
    )


class ModelConfig(Section):
    path: Text = Field("flowrl:tiny-sd3", description="flowrl:tiny-sd3 or flowrl:tiny-lm, a folder that diffusers or transformers can load, or a hub id")
    family: Text = Field("auto", description="auto = as the model's index or config says; or a name in flowrl/policies/families.py")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    adapter: Literal["lora", "full"] = "lora"
    lora: LoraConfig = LoraConfig()
    height: PositiveInt | None = Field(None, description="pixels; null = the model's own size")
    width: PositiveInt | None = None
    max_sequence_length: NonNegativeInt | None = Field(
        None, description="tokens of a prompt (T5, Qwen3); null = the family's, see docs/models.md; 0 for the embedded model"
    )
    guidance: NonNegativeFloat | None = Field(
        None, description="of guidance-distilled networks (FLUX.1-dev), which take it as an input; null = 3.5; refused where there is none"
    )
    gradient_checkpointing: Flag = False
    text_encoders: Literal["keep", "offload", "free"] = Field(
        "keep", description="after a prompt is encoded: stay on the device, wait in host memory, or, once all prompts of the run are encoded, be dropped"
    )
    prompt_storage: Literal["device", "host", "disk"] = Field("device", description="where embeddings of prompts are kept; disk: files mapped into memory")
    prompt_folder: Text | None = Field(None, description="of embeddings on disk; runs and models may share it")
    attention_backend: Text | None = Field(
        None,
        description="one of diffusers' attention backends, such as flash or sage; of a language model transformers', such as sdpa; null = the library's own",
    )
    compile: Annotated[Literal["off", "blocks", "whole"], BeforeValidator(lambda value: "off" if value is False else value)] = Field(
        "off", description="torch.compile of the one network that samples and trains: its repeated blocks (fast to compile), or the whole"
    )
    pad_rows: Flag = Field(
        False,
        description="fill every batch of latents up to a power of two, so that compiled graphs and captured CUDA graphs meet few shapes; costs the filling",
    )
    tf32: Flag = Field(False, description="float32 matrix products of the process in TF32, on GPUs that have it; nothing changes for bfloat16")
    vae_slicing: Flag = Field(False, description="decode one picture at a time")
    vae_tiling: Flag = Field(False, description="decode large pictures in tiles, which blends their seams")
    vae_channels_last: Flag = False


class DataConfig(Section):
    train: Text = Field(
        "flowrl:tiny-sd3/train", description="prompts: a .txt, .jsonl or .parquet file, a folder that datasets saved, or a hub id; see docs/text_data.md"
    )
    eval: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], Text] = Field(
        default_factory=lambda: {"train": "flowrl:tiny-sd3/train", "eval": "flowrl:tiny-sd3/eval", "unseen": "flowrl:tiny-sd3/unseen"},
        min_length=1,
        description="name -> prompts file, each evaluated and plotted separately",
    )
    pairs: Text | None = Field(
        None, description="train on these preference pairs instead of rollouts: a .jsonl file, a `datasets` folder, a .parquet file or a hub id"
    )


class RewardConfig(Section):
    name: Text = Field(description="a registered reward, or module:attribute")
    label: Text | None = Field(None, description="its name in metrics and messages, so that one reward can be used twice; null = `name`")
    weight: Float = Field(1.0, description="in the total; 0 = only watch it")
    args: dict[str, Any] = {}
    device: Text | None = Field(None, description="where its networks are, such as cpu or cuda:1; null = where the policy is")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="of its networks; null = the reward's own choice, float32 on a CPU")
    batch_size: PositiveInt | None = Field(
        None, description="samples a call; null = the reward's own choice; halved for good when the device's memory runs out"
    )
    offload: Flag = Field(False, description="keep its networks in host memory while the policy samples and trains")
    required: Flag = Field(True, description="false: a sample that it cannot score has the mean of its group there instead of being left out")
    minimum: Float | None = Field(None, description="a hard constraint: samples below it rank under all others of their group, whatever else they score")

    @property
    def key(self) -> str:
        """Its name in metrics."""
        return self.label or self.name


class RewardWeightsConfig(Section):
    """Weights of several rewards that change during training, see flowrl/reward_weights.py."""

    kind: Literal["fixed", "hypervolume", "gradient"] = Field(
        "fixed", description="hypervolume: all advantages are scaled by what the last evaluation added to the Pareto front; gradient: mirror descent"
    )
    split: Text | None = Field(None, description="hypervolume: the prompt set of `data.eval` that counts; null = the first")
    reference: dict[str, Float] | None = Field(None, description="hypervolume: reward -> the value above which volume counts; null = the base model's")
    every: PositiveInt = Field(5, description="gradient: iterations between updates of the weights, each at the price of a training pass for every reward")
    rate: PositiveFloat = Field(1.0, description="gradient: step of the mirror descent, the learning rate over the regularisation mu")


class WindowConfig(Section):
    """The stochastic steps of the plans `window` and (where it has no splits) `tree`: ``size`` consecutive steps in low..high-1."""

    size: PositiveInt = 2
    low: NonNegativeInt = 0
    high: PositiveInt | None = Field(None, description="null = half of the steps for `random`, all but the last step for the other schedules")
    schedule: Literal["random", "progressive", "decay", "exp_decay", "frozen", "backward"] = Field(
        "random", description="where the window starts in an iteration, see flowrl/planning.py"
    )
    every: PositiveInt = Field(25, description="iterations that a moving window stays at one start (for the decaying schedules: at the first start)")
    every_least: PositiveInt = Field(1, description="decay: iterations at the last start")
    stride: PositiveInt = Field(1, description="steps by which a moving window moves")
    exp_rate: NonNegativeFloat = Field(0.1, description="exp_decay: iterations at start l are ceil(every exp(-exp_rate max(l - exp_after, 0)))")
    exp_after: NonNegativeInt = 13
    start_decay: Annotated[Float, Field(gt=0, le=1)] = Field(1.0, description="random: the probability of start l is proportional to start_decay^l")
    backward_first: PositiveInt = Field(14, description="backward: steps from the end at the first iteration (B2-DiffuRL)")
    backward_stages: PositiveInt = Field(100, description="backward: iterations until all steps are trained")


class TreeConfig(Section):
    branching: Annotated[tuple[PositiveInt, ...], BeforeValidator(_one_or_many)] = Field(
        (2,), min_length=1, description="children per node at each split; one number for all splits or one for each"
    )
    splits: tuple[NonNegativeInt, ...] | None = Field(None, description="steps at which nodes branch; null = every step of the window")
    stochastic: Literal["splits", "window", "all"] = Field(
        "splits", description="which steps carry noise and are trained: the splits, the splits and the window, or all but the last"
    )
    noise_growth: NonNegativeFloat = Field(0.0, description="linear growth of the noise level over the splits: level (1 + noise_growth j / (splits - 1))")
    sibling_scale: PositiveFloat | None = Field(
        None, description="siblings share noise: (shared + s own) / sqrt(1 + s^2), each unit variance; null = independent siblings"
    )


class AfterWindowConfig(Section):
    solver: Literal["ode", "dpm++"] = "ode"
    compression: Annotated[Float, Field(gt=0, le=1)] = Field(1.0, description="share of the steps after the window that is kept (MixGRPO-Flash: 0.4)")


class RolloutConfig(Section):
    plan: Literal["chain", "window", "tree", "granular", "ode"] = "chain"
    solver: Literal["ode", "heun", "dpm++"] = Field("ode", description="of the plan `ode`: Euler, Heun (two rows a step but the last), or DPM-Solver++ 2M")
    num_steps: PositiveInt = 10
    grid: Literal["shifted", "diffusers", "flux"] = Field("shifted", description="sigma grid, see samplers/schedules.py")
    shift: PositiveFloat | None = Field(None, description="null = the scheduler's own shift")
    kernel: Literal["flow_sde", "dance_sde", "cps", "ddim", "sde_dpm++"] = "flow_sde"
    noise_level: Annotated[tuple[PositiveFloat, ...], BeforeValidator(_one_or_many)] = Field(
        (0.7,), min_length=1, description="one number, or one for each stochastic step of the plan"
    )
    train_fraction: Annotated[Float, Field(gt=0, le=1)] = Field(
        0.99, description="chain: share of the steps that are stochastic and trained, from the noisy end"
    )
    window: WindowConfig = WindowConfig()
    after_window: AfterWindowConfig = AfterWindowConfig()
    tree: TreeConfig = TreeConfig()
    granularities: tuple[PositiveInt, ...] = Field((1, 2, 3), min_length=1, description="granular: stride of the steps after the stochastic one")
    same_noise: Flag = Field(False, description="True: the images of a group share their start noise")
    groups_per_iteration: PositiveInt = 16
    group_size: PositiveInt = Field(16, description="samples of a prompt; at least 2, but for language models whose advantages do not compare within groups")
    group_shards: PositiveInt = Field(1, description="parts that a group is sampled and trained in, each of which may be another process's; see docs/scale.md")
    guidance_scale: Annotated[Float, Field(ge=1)] = Field(1.0, description="classifier-free guidance; 1 = off (conditional branch only)")
    log_prob_reduction: Literal["mean", "sum"] = Field("mean", description="over latent elements; published clip ranges mean `mean`")

    @property
    def window_high(self) -> int:
        """The window lies in steps ``window.low .. window_high - 1``."""
        if self.window.high is not None:
            return self.window.high
        return self.num_steps // 2 if self.window.schedule == "random" else self.num_steps - 1

    @property
    def chain_steps(self) -> int:
        """Stochastic, trained steps of the plan `chain`: the last step of the grid is never one of them."""
        return max(1, min(self.num_steps - 1, int(self.train_fraction * self.num_steps)))

    def noise_levels(self, count: int) -> tuple[float, ...]:
        """Noise level of each of the plan's stochastic steps."""
        return self.noise_level * count if len(self.noise_level) == 1 else self.noise_level


class GenerationConfig(Section):
    """How a language model answers; see flowrl/policies/decoding.py."""

    max_new_tokens: PositiveInt = Field(256, description="of an answer; one that is not finished by then is cut")
    min_new_tokens: NonNegativeInt = Field(0, description="before them no end token is sampled")
    temperature: PositiveFloat = Field(1.0, description="of sampling, and of the log-probabilities that are trained")
    top_p: Annotated[Float, Field(gt=0, le=1)] = Field(1.0, description="nucleus sampling; 1 = off")
    top_k: NonNegativeInt = Field(0, description="0 = off")
    min_p: Annotated[Float, Field(ge=0, lt=1)] = Field(0.0, description="tokens below so much of the likeliest one's probability are not sampled; 0 = off")
    stop: tuple[Text, ...] = Field((), description="texts that end an answer, beside the tokenizer's end token")
    max_prompt_tokens: PositiveInt | None = Field(None, description="longer prompts are an error; null = what the model's context leaves")
    engine: Literal["transformers", "vllm"] = Field("transformers", description="vllm: the extra of that name; it samples, the policy trains")
    importance: Literal["none", "truncated", "masked"] | None = Field(
        None, description="weights that correct for an engine whose numerics differ from training's; null = truncated for vllm, else none"
    )
    importance_level: Literal["token", "sequence"] = "token"
    importance_low: NonNegativeFloat = Field(
        0.0, description="the least that a weight is; below it counts as that (truncated) or as nothing (masked; 0.5 is usual)"
    )
    importance_high: PositiveFloat = Field(
        2.0, validate_default=True, description="the most that a weight is; beyond it counts as that (truncated) or as nothing (masked)"
    )

    @field_validator("importance_high")
    @classmethod
    def _above_the_least(cls, value: float, info: ValidationInfo) -> float:
        least = info.data.get("importance_low", 0.0)
        if value <= least:
            raise PydanticCustomError(
                "importance_range", "{value} is not above importance_low, {least}, so no weight is between them", {"value": value, "least": least}
            )
        return value

    @field_validator("min_new_tokens")
    @classmethod
    def _room_for_the_least(cls, value: int, info: ValidationInfo) -> int:
        most = info.data.get("max_new_tokens", value)
        if value > most:
            message = "{value} is more than max_new_tokens, {most}, so no answer could end; lower it, or raise max_new_tokens"
            raise PydanticCustomError("answer_too_long", message, {"value": value, "most": most})
        return value


class AdvantageConfig(Section):
    centre: Literal["none", "batch", "group", "leave_one_out", "length_weighted", "virtual_max", "best_minus_second", "ema", "history"] = Field(
        "group", description="what is taken off a reward, see flowrl/core/estimators.py; history: the mean of its prompt's remembered rewards"
    )
    scale: Literal["none", "group_std", "batch_std", "batch_std_centred", "beta", "history"] = Field(
        "batch_std", description="what the rest is divided by; history: the spread of its prompt's remembered rewards"
    )
    singleton: Literal["zero", "raw"] = Field("zero", description="the advantage of a sample that has no other of its group to be compared with")
    virtual: NonNegativeInt = Field(1, description="virtual_max: further rewards of the highest value in each group (NGRPO)")
    decay: Decay = Field(0.9, description="ema: of the average of the iterations' mean rewards")
    ddof: Literal[0, 1] = 0
    eps: PositiveFloat = 1e-4
    clip: PositiveFloat = 5.0
    aggregate: Literal["rewards", "advantages", "gdpo"] = Field(
        "rewards",
        description="several rewards: weighted sum before the advantage; an advantage of each and the weighted sum; or that, standardised over the iteration",
    )
    std_floor: NonNegativeFloat = Field(
        0.0, description="aggregate advantages or gdpo: share of a reward's spread over the iteration that is added to that of each group, against noise"
    )
    history_size: PositiveInt = Field(16, description="history: rewards remembered for each prompt")
    history_least: PositiveInt = Field(16, description="history: below so many, mean and std of all rewards of the iteration are used")

    transform: Literal["identity", "exp", "one_plus", "softmax", "best", "unit_interval"] = Field(
        "identity", description="from clipped advantages to weights of the loss, see flowrl/core/transforms.py"
    )
    temperature: PositiveFloat = Field(1.0, description="exp and softmax: of the advantages")


class CreditConfig(Section):
    """From rewards of leaves to advantages of decisions, see flowrl/core/credit.py."""

    normalize: Literal["leaf", "layer", "sibling"] = Field(
        "leaf", description="advantages of leaves, then back up; or back up rewards, then compare the nodes of a layer, or siblings"
    )
    backup: Literal["mean", "path", "level"] = Field("mean", description="over the leaves below: mean, path probability, or level by level")
    temperature: NonNegativeFloat = Field(1.0, description="path and level: weights are softmax(temperature log-probability)")
    integrate: Literal["mean", "sum"] = Field("mean", description="granular: over the granularities of a child")


class DepthPruningConfig(Section):
    first: PositiveInt = Field(15, description="depths first..last (a child of step k has depth k + 1) are not trained at the start")
    last: PositiveInt = 18
    slide_every: PositiveInt = Field(30, description="iterations between moves by one towards the root")
    stop: PositiveInt = Field(9, description="the depth at which `first` stops")


class WidthPruningConfig(Section):
    keep: Annotated[Float, Field(gt=0, le=1)] = Field(0.5, description="share of the leaves below the last split that is trained")
    mode: Literal["branch", "extremes"] = Field("branch", description="the best of each branch, or the best and worst of the whole tree")


class ContrastConfig(Section):
    high: Float = Field(0.5, description="the best sample of a branch is trained if its advantage is at least this")
    low: Float = Field(-0.5, description="the worst is trained if its advantage is below this; all others are not")


class SelectionConfig(Section):
    """Which sampled decisions are trained; the default is all of them."""

    fraction: Annotated[Float, Field(gt=0, le=1)] = Field(1.0, description="share of the trainable steps, drawn for each sample (DanceGRPO)")
    depth: DepthPruningConfig | None = Field(None, description="BranchGRPO's depth pruning")
    width: WidthPruningConfig | None = Field(None, description="BranchGRPO's width pruning")
    contrast: ContrastConfig | None = Field(None, description="B2-DiffuRL's best against worst within a branch")


class LayerTuningConfig(Section):
    """LayerTuning-RL: a supervised term towards the best leaf of the tree, see flowrl/core/layer_tuning.py."""

    weight: NonNegativeFloat = 0.0
    target: Literal["best_velocity", "to_best_x0"] = Field(
        "best_velocity", description="the velocity that the best path had in this layer, or the straight way from the node to the best leaf"
    )
    nodes: Literal["all", "best_path"] = Field("all", description="which nodes of a layer are pulled")
    guard: NonNegativeFloat = Field(0.5, description="only where the best reward exceeds the group's mean by more than guard standard deviations")


class MatchingConfig(Section):
    """The flow-matching loss of a finished sample as its log-likelihood, see flowrl/likelihoods/matching.py."""

    weighting: Literal["uniform", "t", "t2", "huber", "ghuber", "self_normalised"] = "uniform"
    power: Annotated[Float, Field(gt=0, le=1)] = Field(0.25, description="ghuber's exponent")
    num_times: PositiveInt = Field(6, description="noise levels per sample and iteration, one in each of so many strata")
    times: Literal["grid", "uniform", "logit_normal"] = Field("grid", description="drawn from the rollout's sigma grid, or continuous")
    first_time: NonNegativeInt = Field(1, description="grid: index of the first sigma that is used; 0 = pure noise")
    include_first: Flag = Field(False, description="grid: the first of the times is always pure noise")
    time_fraction: Annotated[Float, Field(gt=0, le=1)] = Field(0.9, description="grid: share of the steps that is used, from the noisy end")
    low: Annotated[Float, Field(ge=0, lt=1)] = Field(0.0, description="uniform: lowest level before the shift")
    high: Annotated[Float, Field(gt=0, le=1)] = 1.0
    shift: PositiveFloat | None = Field(None, description="uniform and logit_normal: time shift; null = that of the rollout's grid")
    shared_times: Flag = Field(True, description="all samples of an iteration have the same times; false = each its own")
    guidance_scale: Annotated[Float, Field(ge=1)] = Field(
        1.0, description="guidance of the velocity that is matched; 1 = the conditional one, which is what the loss is about, however the rollout is guided"
    )
    combine: Literal["exp_first", "sum_first"] = Field("exp_first", description="a ratio for each time, or one of the mean over a sample's times")


class OldPolicyConfig(Section):
    """A slow copy of the weights: old <- d old + (1 - d) weights, d = min(decay_max, decay_slope max(0, updates - decay_start))."""

    rollout: Flag = Field(False, description="it samples, and ratios are taken to it")
    every: PositiveInt = Field(1, description="iterations between its updates")
    decay_slope: NonNegativeFloat = 0.001
    decay_start: NonNegativeInt = 0
    decay_max: Decay = 0.3


class AnchorConfig(Section):
    weight: NonNegativeFloat = Field(0.0, description="of <(v - v_old)^2>, the velocity's distance to the old policy's")


class CriticConfig(Section):
    """A value V(x_sigma, sigma, prompt) that is subtracted from the advantages (AC-Flow), see flowrl/critic.py."""

    widths: tuple[PositiveInt, ...] = Field((64, 128, 256, 256), min_length=1, description="channels of the stride-2 convolutions")
    hidden: PositiveInt = 256
    learning_rate: PositiveFloat = 1e-4
    updates_per_iteration: PositiveInt = 4
    batch_rows: PositiveInt = Field(256, description="rows of one critic update")
    target_decay: Decay = Field(0.99, description="of the averaged critic that the actor sees")
    advantage_clip: PositiveFloat = Field(1.0, description="bound of reward - value")
    warmup_iterations: NonNegativeInt = Field(100, description="iterations in which only the critic learns")
    ramp_iterations: NonNegativeInt = Field(100, description="iterations in which the actor's advantages grow to their full size")
    gate: Annotated[Float, Field(lt=1)] = Field(0.1, description="the actor starts when the critic's explained variance exceeds this")
    gate_patience: PositiveInt = Field(1000, description="iterations after the warm-up in which the gate must open, or the run stops with an error")
    enabled: Flag = Field(True, description="false: V = 0, everything else (warm-up, clip) as configured")


class DirectConfig(Section):
    """Objectives that differentiate the reward through the picture: refl, draft, direct_align; see flowrl/updates/direct.py."""

    low: NonNegativeInt = Field(7, description="refl: first step from whose latent the clean picture is predicted")
    high: PositiveInt | None = Field(None, description="refl: one past the last such step; null = all")
    last_steps: PositiveInt = Field(1, description="draft: K, the steps with gradient")
    random_steps: Flag = Field(False, description="draft: K is drawn from 1..last_steps in every iteration (AlignProp)")
    recompute: Flag = Field(False, description="draft: evaluate each step again in the backward pass; the memory of one step, twice the rows")
    renoise: NonNegativeInt = Field(0, description="draft with last_steps 1: so many noisings of each sample instead of its own last latent (DRaFT-LV)")
    sigma_low: Annotated[Float, Field(gt=0, lt=1)] = Field(0.1, description="direct_align: noise levels from which the picture is recovered")
    sigma_high: Annotated[Float, Field(gt=0, lt=1)] = 0.9
    sigma_jump: Annotated[Float, Field(gt=0, lt=1)] = Field(0.1, description="direct_align: length of the one step with gradient")
    inversion: Flag = Field(False, description="direct_align: every second row steps towards noise and has its reward pushed down")
    positive_text: str = Field("", description="put before the prompt; the reward is then that of it minus that of negative_text")
    negative_text: str = ""
    threshold: Float | None = Field(None, description="loss scale relu(threshold - reward); null = -scale reward")
    scale: PositiveFloat = 1.0


class ObjectiveConfig(Section):
    name: Text = Field("clipped_surrogate", description="see flowrl/objective_names.py; docs/objectives.md lists them")
    args: dict[str, Any] = Field({}, description="further parameters of the objective, by the names of its function in flowrl/core")
    ratio: Literal["plain", "ratio_norm", "seq_mean", "seq_mean_token", "seq_sum", "none"] = Field(
        "plain", description="of each decision; ratio_norm: GRPO-Guard's centred one; of the whole sample: mean (GSPO), its token form, or sum; none: 1"
    )
    step_weight: Literal["none", "inv_dt", "inv_kap_dt", "kap_over_dt"] = Field("none", description="GRPO-Guard's weight of each step's loss")
    clip_low: PositiveFloat = 1e-4
    clip_high: PositiveFloat = 1e-4
    dual_clip: Annotated[Float, Field(gt=1)] | None = Field(None, description="clipped_surrogate: the most that a ratio counts where the advantage is below 0")
    ratio_max: PositiveFloat | None = Field(None, description="clipped_surrogate: the most that any ratio counts")
    dynamic_clip: Annotated[Float, Field(ge=0, le=1)] = Field(0.0, description="reward sensitivity of the clip bounds (Dynamic-TreeRPO); 0 = fixed")
    reduction: Literal["mean", "group_mean", "seq_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"] = Field(
        "mean", description="over decisions, groups or samples, see flowrl/core/reductions.py"
    )
    max_length: PositiveFloat | None = Field(None, description="seq_mean_token_sum_norm: the constant; null = generation.max_new_tokens, or the steps")
    updates_per_iteration: PositiveInt = 2
    inner_epochs: PositiveInt = 1
    beta: PositiveFloat = Field(1.0, description="dpo, ipo, simpo, rpo: strength of the preference; nft: how far the implicit policies go")
    margin: NonNegativeFloat = Field(0.0, description="simpo: the margin gamma that chosen log-probabilities times beta should win by")
    sft_weight: NonNegativeFloat = Field(0.0, description="rpo: weight of the chosen samples' negative log-likelihood")
    label_smoothing: Annotated[Float, Field(ge=0, lt=0.5)] = Field(0.0, description="dpo and rpo: the chance that a preference is wrong")


class KLConfig(Section):
    weight: NonNegativeFloat = 0.0
    form: Literal["fg_code", "exact_mean", "v_mse", "x_mse", "v_elbo", "k1", "k2", "k3", "k3_k2", "abs"] = Field(
        "fg_code", description="of SDE steps, of velocities (v_*), or of tokens (k1, k2, k3, k3_k2, abs)"
    )
    place: Literal["loss", "reward"] = Field("loss", description="tokens: a term of the loss, or taken off the reward of each token (PPO, REINFORCE++)")


class OptimizerConfig(Section):
    name: Literal["adamw", "adamw_8bit"] = Field("adamw", description="adamw_8bit: moments in 8 bits (extra `8bit`), a quarter of the memory; CUDA only")
    learning_rate: PositiveFloat = 3e-4
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 1e-4
    warmup_updates: NonNegativeInt = 0
    max_grad_norm: PositiveFloat = 1.0


class EmaConfig(Section):
    decay: Decay = 0.9
    every: PositiveInt = 8
    warmup: Flag = True


class TrainingConfig(Section):
    iterations: PositiveInt = 100
    rows_per_forward: PositiveInt = Field(256, description="network rows in one rollout forward; halved for good when memory runs out")
    rows_per_backward: PositiveInt = Field(256, description="network rows in one training forward+backward; halved for good when memory runs out")
    offload_rollouts: Flag = Field(False, description="keep the latents of an iteration in host memory until they are trained")
    checkpoint_every: PositiveInt = 25
    keep_checkpoints: PositiveInt = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    sharding: Literal["none", "fsdp2"] = Field(
        "none", description="several processes: each holds the whole network, or its part of network, optimiser and averages (see docs/scale.md)"
    )
    timeout_minutes: PositiveFloat = Field(30.0, description="how long a process waits for another one before the run ends with an error")
    max_invalid_share: Annotated[Float, Field(ge=0, le=1)] = Field(
        0.05, description="share of an iteration's samples without a score above which the run stops"
    )


class EvaluationConfig(Section):
    every: PositiveInt = Field(25, description="iterations between evaluations; the first and the last are always made")
    num_images: PositiveInt = Field(128, description="images per prompt set during training")
    final_num_images: PositiveInt = Field(512, description="images per prompt set in the evaluations before and after training")
    num_steps: PositiveInt = 20
    guidance_scale: Annotated[Float, Field(ge=1)] = 1.0
    compare_guidance_scales: tuple[Annotated[Float, Field(ge=1)], ...] = Field((), description="further guidance scales of the first and last evaluation")
    rewards: tuple[RewardConfig, ...] = Field((), description="empty = the training rewards")
    grid_images: NonNegativeInt = Field(16, description="samples kept to be looked at, of each prompt set")
    greedy: Flag = Field(False, description="language models: the likeliest token instead of a sampled one")
    seed: NonNegativeInt = 1234

    _shorthand = field_validator("rewards", mode="before")(reward_entries)


class LoggingConfig(Section):
    tensorboard: Flag = True
    rollouts_every: PositiveInt | None = Field(None, description="iterations between saved rollouts (latents, prompts, rewards), which `flowrl pairs` reads")
    wandb_project: Text | None = None
