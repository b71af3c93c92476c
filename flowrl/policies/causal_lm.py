"""A trainable causal language model of transformers: answers to prompts, and the log-probabilities of their tokens.

Letters: n samples, T tokens of the longest answer, L positions of a batch, V vocabulary, H hidden size.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from flowrl.policies import decoding
from flowrl.policies.caches import GrowingCache
from flowrl.policies.decoding_check import check_decoding
from flowrl.policies.language_models import EXAMPLE, load_language_model, located, rendered
from flowrl.policies.pipelines import without_progress_bars
from flowrl.policies.token_statistics import OutputHead, TokenOutput, positions_at_once, token_statistics
from flowrl.policies.trained import TrainedPolicy
from flowrl.policies.vllm_engine import VllmEngine
from flowrl.policies.weights import cast, cast_module
from flowrl.sections import GenerationConfig, ModelConfig
from flowrl.types import Completions, Prompt, UserError

__all__ = ["CausalLmPolicy", "TokenNetwork", "TokenOutput"]

_LOGGER = logging.getLogger(__name__)
_OF_IMAGES = (
    "height",
    "width",
    "max_sequence_length",
    "guidance",
    "pad_rows",
    "text_encoders",
    "prompt_storage",
    "prompt_folder",
    "vae_slicing",
    "vae_tiling",
    "vae_channels_last",
)
_ADAPTER = "adapter_model.safetensors"
_PROMPTS = 65_536
"""Prompts whose tokens are kept: an epoch of all but the largest data sets, at some 100 MB."""


class TokenNetwork(nn.Module):
    """A causal LM whose output head runs where it is asked to, without dropout. Everything goes through its forward, so that it can be wrapped and sharded.

    Args:
        model: of transformers.
    Raises:
        UserError: the model makes its logits in a way that is not known.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # where it is cut to be sharded and compiled
        self._takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
        self._scale, self._softcap = _logit_settings(model)
        self._checkpointed = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for module in model.modules():  # some layers drop out themselves, by a share that is their own (OPT)
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)

    @property
    def head(self) -> OutputHead:
        return OutputHead(self.model.get_output_embeddings(), self._scale, self._softcap)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        *,
        cache: Any = None,
        places: Tensor | None = None,
        targets: Tensor | None = None,
        last: Tensor | None = None,
        columns: Collection[str] = (),
        temperature: float = 1.0,
        kappa: float = 0.02,
    ) -> dict[str, Tensor]:
        """Logits after each row's last position, or statistics of some tokens.

        Args:
            ids, positions: [n, L] int64. mask: [n, past + L] bool, tokens that may be seen. last: [n] int64, the last position of each row; None = L - 1.
            places: [N] int64, numbers of positions in the flattened [n, L], and targets: [N], the tokens that come after them. The rest as of
                `token_statistics`; None = ``logits`` [n, V] are wanted.
        Returns:
            name -> [N, ...], or ``logits``.
        """
        for layer in self._checkpointed:  # transformers checkpoints layers in training mode only, and a cache cannot be used then; their parts never drop out
            layer.training = torch.is_grad_enabled()
        where = {"position_ids": positions} if self._takes_positions else {}
        found = self.model.base_model(input_ids=ids, attention_mask=mask.long(), past_key_values=cache, use_cache=cache is not None, **where)
        hidden: Tensor = found.last_hidden_state
        if places is None or targets is None:
            return {"logits": self.head(hidden[:, -1] if last is None else hidden[torch.arange(len(hidden), device=hidden.device), last])}
        hidden = hidden.flatten(0, 1)[places]
        size = positions_at_once(self.model.config.get_text_config().vocab_size)
        values = token_statistics(self.head, hidden, targets, columns=columns, temperature=temperature, kappa=kappa, at_once=size)
        return values | ({"hidden": hidden.float()} if "hidden" in columns else {})


@torch.no_grad()
def _logit_settings(model: Any) -> tuple[float, float | None]:
    """Scale and soft cap of the logits, those of the model's config with which they are the model's own."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if head is not None:
        ids = torch.arange(1, 5, device=model.device)[None] % config.vocab_size
        theirs = model(input_ids=ids, use_cache=False).logits.float()
        hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
        divisor = getattr(config, "logits_scaling", 1.0)  # Granite divides by it, HyperCLOVA multiplies
        scales = (getattr(config, "logit_scale", None) or 1.0, 1 / divisor, divisor, getattr(config, "lm_head_multiplier", None) or 1.0, 1.0)
        caps = (getattr(config, "final_logit_softcapping", None), None)

        def error(settings: tuple[float, float | None]) -> float:
            if hidden is None:
                return math.inf
            found = OutputHead(head, *settings)(hidden.to(head.weight.dtype))  # some keep sums in float32 (Mamba)
            return float((found.float() - theirs).abs().max())

        best = min(product(scales, caps), key=error)
        if error(best) <= (1e-4 if model.dtype == torch.float32 else 0.02) * max(1e-3, float(theirs.abs().max())):
            return best
    raise UserError(f"model.path: {type(model).__name__} makes its logits in a way that flowrl does not know; only its hidden states times its head are")


class CausalLmPolicy(TrainedPolicy):
    """A trainable causal LM with its tokenizer.

    Args:
        config: the ``model`` section of a run.
        device: where the network lives.
        rows_per_forward: most texts in one forward without gradient, and most answers that are sampled at once.
        keep_reference: keep what `reference` needs (a frozen copy under full fine-tuning; LoRA needs none).
    Raises:
        UserError: the model cannot be loaded, or the config asks for something that only image generators have.
    """

    title: ClassVar[str] = "language model"
    pipelines: ClassVar[tuple[str, ...]] = ()
    example: ClassVar[str] = EXAMPLE
    medium: ClassVar[str] = "text"
    smaller_model = "set model.dtype: bfloat16, a smaller generation.max_new_tokens, or shard the model over several devices"

    def __init__(self, config: ModelConfig, device: torch.device, *, rows_per_forward: int = 256, keep_reference: bool = False) -> None:
        super().__init__(config, device, rows_per_forward=rows_per_forward)
        for name in _OF_IMAGES:
            if getattr(config, name) != ModelConfig.model_fields[name].default:
                raise UserError(f"model.{name}: only image generators have it, and {config.path} is a language model; leave it out")
        model, self.tokenizer = load_language_model(config.path, self._weights_dtype, config.attention_backend)
        self.where = located(config.path)
        """What transformers is given as the model: a folder, or a hub id."""
        model.requires_grad_(False).eval()
        self.ends, self.pad = _special_tokens(model, self.tokenizer, config.path)
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if config.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # renamed during transformers 5
            enable({"use_reentrant": False})
        self.network: TokenNetwork = TokenNetwork(model.to(device))
        self._decoding, self._why_not = check_decoding(self.network, self.pad, device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # peft finds out by itself, for GPT-2
            self._make_trainable(_linear_layers(model), keep_reference)
        self._compile(self._networks, tuple(model._no_split_modules or ()), "transformers")
        self.training_module = self.network
        self._prompt = lru_cache(_PROMPTS)(partial(_prompt_tokens, self.tokenizer, self.ends))  # of a function that does not hold the policy
        self._vllm: VllmEngine | None = None
        self.sampled_tokens = 0
        """Tokens that `generate` has sampled so far, whatever for; what it was given to begin with is none."""

    @property
    def _adapted(self) -> Any:
        return self.network.model

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states that the output head reads."""
        return int(self.network.model.config.get_text_config().hidden_size)

    @property
    def ending(self) -> int:
        """The token that ends an answer: the tokenizer's, where the model has several. There must be one."""
        own = self.tokenizer.eos_token_id
        return int(own) if own in self.ends else min(self.ends)

    # --- prompts ---

    def check_generation(self, settings: GenerationConfig, *, given: str | None = None) -> None:
        """Whether this model can answer so.

        Args:
            given: the key of a config that lets answers begin with tokens that are given.
        Raises:
            UserError: nothing would end an answer, the context is too short, or the model cannot be sampled so with a cache.
        """
        kind, ours = type(self.network.model).__name__, settings.engine == "transformers"
        if ours and self._decoding == "no":
            raise UserError(
                f"model.path: {kind} does not say with a cache of its tokens what it says of whole texts ({self._why_not}), so that it cannot be sampled "
                "here; use a decoder whose layers attend, or generation.engine: vllm"
            )
        if ours and given is not None and self._decoding != "any":
            raise UserError(
                f"{given}: answers would begin with tokens that are given, and {kind} keeps a state of what it has read, which their padding would change; "
                "leave it out, or use a decoder whose layers attend"
            )
        if not self.ends and not settings.stop:
            raise UserError(f"generation.stop: the tokenizer of {self.config.path} has no end token, so that nothing would end an answer; give a text")
        if self.context is not None and settings.max_new_tokens >= self.context:
            raise UserError(f"generation.max_new_tokens: {settings.max_new_tokens} leave no room for a prompt in the model's context of {self.context} tokens")

    def encode(self, prompts: Sequence[Prompt], settings: GenerationConfig | None = None) -> list[Tensor]:
        """Tokens [n] int64 of prompts, on the CPU: with the tokenizer's chat template where it has one, else of the text as it is. Each is worked out once.

        The messages are those of ``metadata["messages"]``, a list of {role, content}; else the prompt's text is the user's.

        Args:
            settings: how it will be answered, which says how long a prompt may be; None = it fills the context.
        Raises:
            UserError: a prompt is empty, or too long.
        """
        found = [self._tokens(prompt) for prompt in prompts]
        room = None if self.context is None else self.context - (settings.max_new_tokens if settings else 0)
        for number, (prompt, tokens) in enumerate(zip(prompts, found, strict=True)):
            name = f"prompt {number + 1} ({_short(prompt.text)})"
            most = settings.max_prompt_tokens if settings else None
            if not len(tokens):
                raise UserError(f"prompt {number + 1} is empty")
            if most is not None and len(tokens) > most:
                raise UserError(f"{name} has {len(tokens)} tokens, more than generation.max_prompt_tokens, {most}")
            if room is not None and len(tokens) > room:
                answer = f" less generation.max_new_tokens, {settings.max_new_tokens}" if settings else ""
                raise UserError(f"{name} has {len(tokens)} tokens, and the model's context is {self.context}{answer}; shorten one of them")
        return found

    def _tokens(self, prompt: Prompt) -> Tensor:
        messages = prompt.metadata.get("messages")
        if messages is None:
            return self._prompt(prompt.text, None)
        shown = _short(prompt.text or str(messages))
        if not _are_messages(messages):
            raise UserError(f"the messages of prompt {shown} are not a list of mappings with role and content")
        if self.tokenizer.chat_template is None:
            raise UserError(f"prompt {shown} has messages, and the tokenizer of {self.config.path} has no chat template")
        return self._prompt("", json.dumps(messages, default=str))

    # --- answers ---

    @torch.no_grad()
    def generate(
        self,
        prompt_tokens: Sequence[Tensor],
        counts: Sequence[int],
        settings: GenerationConfig,
        generators: Sequence[torch.Generator],
        prefix: Sequence[Tensor] | None = None,
        *,
        prefix_log_prob: Sequence[Tensor] | None = None,
        greedy: bool = False,
    ) -> Completions:
        """Answers to prompts, see `flowrl.policies.decoding.generate`. Of a sharded network, only within `in_step`.

        Raises:
            UserError: nothing would end an answer, or a prompt with its answer is longer than the context.
        """
        self.check_generation(settings, given="prefix" if any(map(len, prefix or ())) else None)
        longest = max(map(len, prompt_tokens), default=0)
        if self.context is not None and longest + settings.max_new_tokens > self.context:
            most = f"generation.max_new_tokens, {settings.max_new_tokens}, are more than the model's context, {self.context}"
            raise UserError(f"a text of {longest} tokens and {most}")
        if settings.engine == "vllm":
            self._vllm = self._vllm or VllmEngine(self, settings)
            found = self._vllm.generate(prompt_tokens, counts, settings, generators, prefix=prefix, prefix_log_prob=prefix_log_prob, greedy=greedy)
        else:
            found = decoding.generate(self, prompt_tokens, counts, settings, generators, prefix=prefix, prefix_log_prob=prefix_log_prob, greedy=greedy)
        known = sum(map(len, prefix)) if prefix is not None and prefix_log_prob is not None else 0
        self.sampled_tokens += int(found.mask.sum()) - known
        return found

    def new_cache(self) -> Any:
        """Of `DecodingModel`."""
        return GrowingCache(self.network.model.config)

    def next_logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, real: int, last: Tensor | None = None) -> Tensor:
        """Of `DecodingModel`."""
        logits = self._forward(ids, mask, positions, real, cache=cache, last=last)["logits"]
        return logits.float()

    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Texts without special tokens."""
        return [self.tokenizer.decode(list(numbers), skip_special_tokens=True, clean_up_tokenization_spaces=False) for numbers in tokens]

    # --- log-probabilities ---

    def token_output(
        self,
        completions: Completions,
        samples: Tensor,
        *,
        columns: Collection[str] = (),
        temperature: float = 1.0,
        kappa: float = 0.02,
        on_host: bool = False,
    ) -> TokenOutput:
        """What the network says of the tokens of some answers, whoever said them.

        With gradient all samples are evaluated at once; without it, as many at a time as ``rows_per_forward``. Each costs its prompt and its answer less the
        last token.

        Args:
            samples: [n] int64, numbers of answers.
            columns: of `flowrl.policies.token_statistics.COLUMNS`. temperature: as sampled. kappa: of ``min_p``.
            on_host: without gradient, leave each part in host memory, where all answers' hidden states may fit.
        Returns:
            On the policy's device, or the host; T is completions.tokens.shape[1].
        """
        lengths, groups = completions.length.tolist(), completions.group.tolist()
        sizes = {sample: len(completions.prompt_tokens[groups[sample]]) + lengths[sample] for sample in set(samples.tolist())}
        tokens = completions.tokens.to(self.device)

        def evaluate(chosen: list[int]) -> TokenOutput:
            prompts = [completions.prompt_tokens[groups[sample]].to(self.device) for sample in chosen]
            texts = [torch.cat((prompt, tokens[sample, : lengths[sample]])) for prompt, sample in zip(prompts, chosen, strict=True)]
            ids = pad_sequence([text[: max(1, len(text) - 1)] for text in texts], batch_first=True, padding_value=self.pad)
            real = sum(max(1, len(text) - 1) for text in texts)
            place = torch.arange(ids.shape[1], device=self.device)
            inside = torch.tensor([[max(1, len(text) - 1), len(prompt)] for text, prompt in zip(texts, prompts, strict=True)], device=self.device)
            mask = place < inside[:, :1]
            said = torch.arange(tokens.shape[1], device=self.device)
            present = said < torch.tensor([lengths[sample] for sample in chosen], device=self.device)[:, None]
            where = torch.arange(len(chosen), device=self.device)[:, None] * ids.shape[1] + inside[:, 1:] - 1 + said
            values = self._forward(
                ids,
                mask,
                place.expand_as(ids),
                real,
                places=where[present],
                targets=tokens[torch.tensor(chosen, device=self.device)][present],
                columns=tuple(columns),
                temperature=temperature,
                kappa=kappa,
            )
            spread = {name: value.new_zeros(*present.shape, *value.shape[1:]).index_put((present,), value) for name, value in values.items()}
            return TokenOutput(spread.pop("log_prob"), spread)

        wanted = samples.tolist()
        if torch.is_grad_enabled() or len(wanted) == 0:
            return evaluate(wanted)
        order = sorted(range(len(wanted)), key=lambda number: -sizes[wanted[number]])  # like with like, and the longest first
        place = torch.device("cpu") if on_host else self.device
        kept: dict[str, Tensor] = {}

        def part(rows: slice) -> Tensor:
            found = evaluate([wanted[number] for number in order[rows]])
            where = torch.tensor(order[rows], device=place)
            for name, value in {"log_prob": found.log_prob, **found.columns}.items():
                if name not in kept:
                    kept[name] = torch.zeros(len(wanted), *value.shape[1:], dtype=value.dtype, device=place)
                kept[name][where] = value.to(place)
            return where

        self.in_parts(len(order), part)
        return TokenOutput(kept.pop("log_prob"), kept)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, real: int, **more: Any) -> dict[str, Tensor]:
        if self.company is not None:
            self.company.turn()
        with self._autocast():
            found: dict[str, Tensor] = self._module()(ids, mask, positions, **more)
        self.rows.forward += real
        self.rows.backward += real if torch.is_grad_enabled() else 0
        self.rows.padding += ids.numel() - real
        return found

    @torch.no_grad()
    def _keep_company(self) -> None:
        one = torch.ones(1, 1, dtype=torch.int64, device=self.device)
        self._forward(one, one.bool(), torch.zeros_like(one), 1)
        self.rows.idle += 1

    # --- files ---

    def export(self, folder: Path, form: Literal["lora", "network", "pipeline"] | None = None, dtype: torch.dtype | None = None) -> None:
        """Write what peft loads (the LoRA: PeftModel.from_pretrained) or transformers (network or pipeline, which are the same: from_pretrained), with the
        tokenizer. Arguments and errors as of `TrainedPolicy.export`.
        """
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        model, is_lora = self.network.model, self.config.adapter == "lora"
        with self._writing(folder):
            if form == "lora" or (form is None and is_lora):
                found = get_peft_model_state_dict(model, save_embedding_layers=False)  # of the adapter alone: where the base model lies is not asked
                state = {f"base_model.model.{name}": cast(name, value, dtype) for name, value in found.items()}
                save_file({name: value.contiguous() for name, value in state.items()}, folder / _ADAPTER, metadata={"format": "pt"})
                (folder / "adapter_config.json").write_text(json.dumps(self._lora_facts(), indent=2, sort_keys=True) + "\n")
            else:
                if is_lora:
                    _fold(model)
                cast_module(model, dtype, "network")
                with without_progress_bars():
                    model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def _lora_facts(self) -> dict[str, Any]:
        (config,) = self.network.model.peft_config.values()
        facts = config.to_dict() | {"inference_mode": True, "task_type": "CAUSAL_LM", "base_model_name_or_path": self.config.path}
        return {name: sorted(value) if isinstance(value, set) else value for name, value in facts.items()}

    def load_export(self, folder: Path) -> None:
        """Put exported weights into this policy.

        Raises:
            UserError: the folder holds no export of this kind of adapter.
        """
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        if self.config.adapter == "lora":
            file = folder / _ADAPTER
            if not file.is_file():
                raise UserError(f"{folder} holds no LoRA weights ({_ADAPTER})")
            state = {name.removeprefix("base_model.model."): value for name, value in load_file(file).items()}
            outcome = set_peft_model_state_dict(self.network.model, state)
            if outcome.unexpected_keys:
                raise UserError(f"{file} does not fit this model: unexpected {outcome.unexpected_keys[0]}")
            return
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} holds no exported language model (config.json)")
        loaded, _ = load_language_model(str(folder), torch.float32, self.config.attention_backend)
        self.network.model.load_state_dict(loaded.state_dict())


def _prompt_tokens(tokenizer: Any, ends: Collection[int], text: str, messages: str | None) -> Tensor:
    """Of a prompt's text, or of its messages as JSON."""
    if messages is None and not text.strip():
        numbers = []
    elif tokenizer.chat_template is not None:
        said = [{"role": "user", "content": text}] if messages is None else json.loads(messages)
        numbers = tokenizer(rendered(tokenizer, said), add_special_tokens=False)["input_ids"]
    else:
        numbers = tokenizer(text)["input_ids"]
        while numbers and numbers[-1] in ends:  # some tokenizers end every text
            numbers = numbers[:-1]
    return torch.tensor(numbers, dtype=torch.int64)


def _special_tokens(model: Any, tokenizer: Any, path: str) -> tuple[frozenset[int], int]:
    """(tokens that end an answer, the padding token)."""
    ends: set[int] = set()
    for found in (tokenizer.eos_token_id, getattr(getattr(model, "generation_config", None), "eos_token_id", None)):
        ends |= set(found) if isinstance(found, list | tuple) else set() if found is None else {int(found)}
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(ends, default=0)
        _LOGGER.info("the tokenizer of %s has no padding token; padding is masked everywhere, so token %d stands for it", path, pad)
    return frozenset(ends), int(pad)


def _linear_layers(model: Any) -> tuple[str, ...]:
    """Last names of all linear layers but the output head."""
    head = model.get_output_embeddings()
    kinds = nn.Linear | Conv1D
    return tuple(sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, kinds) and module is not head}))


def _fold(model: Any) -> None:
    """Adds the adapter to the weights, each sum taken in float32 and rounded once to the weight's dtype, and removes it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if not isinstance(module, BaseTunerLayer):
            continue
        base = module.get_base_layer()
        dtype = base.weight.dtype
        base.to(torch.float32)
        module.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, base.to(dtype))
    del model.peft_config
    model._hf_peft_config_loaded = False


def _are_messages(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(one, Mapping) and {"role", "content"} <= set(one) for one in value)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return f"'{line}'" if len(line) <= 60 else f"'{line[:57]}...'"
