"""Answers sampled by vLLM (extra `vllm`) instead of the policy's own decoder.

vLLM holds a second copy of the network, with kernels of its own: its log-probabilities are those of the policy but for rounding, for which a run corrects by
truncated importance weights. New weights reach it through files, as its documentation has it: a LoRA as an adapter with a new number in every request, a whole
network by `reload_weights`. It was not run against vLLM itself; tests hold the calls to the documented ones.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flowrl.sections import GenerationConfig
from flowrl.types import Completions, UserError

if TYPE_CHECKING:
    from flowrl.policies.causal_lm import CausalLmPolicy

__all__ = ["VllmEngine"]

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM reserves memory for
_MEMORY_SHARE = 0.4


class VllmEngine:
    """vLLM with a policy's weights.

    Args:
        policy: whose weights it samples with; not a sharded one.
        settings: the run's; the temperature must stay theirs.
        options: further arguments of ``vllm.LLM``.
    Raises:
        UserError: vLLM is not installed, the network is sharded, or the settings ask for log-probabilities that vLLM does not report.
    """

    def __init__(self, policy: CausalLmPolicy, settings: GenerationConfig, options: Mapping[str, Any] | None = None) -> None:
        if policy.company is not None:
            raise UserError("generation.engine: vllm cannot take the weights of a sharded network; use transformers, or training.sharding: none")
        self._mode = _log_prob_mode(settings)
        try:
            self._vllm: Any = importlib.import_module("vllm")
            self._requests: Any = importlib.import_module("vllm.lora.request")
        except ImportError as error:
            raise UserError("generation.engine: vllm is not installed; pip install 'flowrl-diffusion[vllm]', or use transformers") from error
        self._policy, config = policy, policy.config
        self._is_lora = config.adapter == "lora"
        rank = next((size for size in _RANKS if size >= config.lora.rank), None)
        if self._is_lora and rank is None:
            raise UserError(f"model.lora.rank: vllm takes ranks up to {_RANKS[-1]}, not {config.lora.rank}")
        lora = {"enable_lora": True, "max_lora_rank": rank} if self._is_lora else {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._number = 0
        self._seen: Tensor | None = None
        self._llm = self._vllm.LLM(
            model=policy.where,
            tokenizer=policy.where,
            dtype=config.dtype,
            logprobs_mode=self._mode,
            gpu_memory_utilization=_MEMORY_SHARE,
            **lora,
            **(options or {}),
        )

    def update_weights(self) -> None:
        """Give vLLM the policy's weights of now."""
        folder = tempfile.TemporaryDirectory(prefix="flowrl-vllm-")
        self._policy.export(Path(folder.name))
        if not self._is_lora:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder.name})
        self._folder = folder  # vLLM reads an adapter when it first meets its number; the folder before goes
        self._number += 1
        self._llm.reset_prefix_cache()
        self._seen = self._fingerprint()

    def _fingerprint(self) -> Tensor:
        """Changes whenever the weights do, whoever changes them."""
        doubles = (p.detach().double() for p in self._policy.trainable())  # one at a time
        return torch.stack([torch.stack((value.sum(), value.square().sum())) for value in doubles]).cpu()

    def generate(
        self,
        prompts: Sequence[Tensor],
        counts: Sequence[int],
        settings: GenerationConfig,
        generators: Sequence[torch.Generator],
        *,
        prefix: Sequence[Tensor] | None = None,
        prefix_log_prob: Sequence[Tensor] | None = None,
        greedy: bool = False,
    ) -> Completions:
        """As `flowrl.policies.decoding.generate`, but each answer has a seed from its prompt's generator, and vLLM draws. New weights are handed over first.

        Tokens that vLLM evaluates again when it runs out of memory are not counted.
        """
        if _log_prob_mode(settings) != self._mode:
            raise UserError("generation.temperature: with vllm it cannot change within a run")
        if self._seen is None or not torch.equal(self._seen, self._fingerprint()):
            self.update_weights()
        group = [number for number, count in enumerate(counts) for _ in range(count)]
        starts = [torch.zeros(0, dtype=torch.int64)] * len(group) if prefix is None else [part.to("cpu", torch.int64) for part in prefix]
        seeds = torch.cat([torch.randint(2**31 - 1, (count,), generator=own) for own, count in zip(generators, counts, strict=True)]).tolist()
        asked = [{"prompt_token_ids": [*prompts[number].tolist(), *start.tolist()]} for number, start in zip(group, starts, strict=True)]
        sampling = [self._sampling(settings, seed, len(start), greedy) for seed, start in zip(seeds, starts, strict=True)]
        adapter = self._requests.LoRARequest(f"policy-{self._number}", self._number, self._folder.name) if self._is_lora and self._folder else None
        said = [answer.outputs[0] for answer in self._llm.generate(asked, sampling, use_tqdm=False, lora_request=adapter)]
        tokens = [torch.cat((start, torch.tensor(list(one.token_ids), dtype=torch.int64))) for start, one in zip(starts, said, strict=True)]
        known = [torch.zeros(len(start)) for start in starts] if prefix_log_prob is None else [part.cpu().float() for part in prefix_log_prob]
        log_prob = [torch.cat((first, _log_prob(one))) for first, one in zip(known, said, strict=True)]
        own = [torch.arange(len(text)) >= (len(start) if prefix_log_prob is None else 0) for text, start in zip(tokens, starts, strict=True)]
        forward = sum(len(prompts[number]) for number in set(group)) + sum(max(0, len(text) - 1) for text in tokens)
        self._policy.rows.forward += forward
        device = self._policy.device
        return Completions(
            prompt_tokens=tuple(prompt.cpu() for prompt in prompts),
            tokens=pad_sequence(tokens, batch_first=True, padding_value=self._policy.pad).to(device),
            mask=pad_sequence(own, batch_first=True, padding_value=False).to(device),
            length=torch.tensor([len(text) for text in tokens], device=device),
            group=torch.tensor(group, dtype=torch.int64, device=device),
            finished=torch.tensor([one.finish_reason == "stop" for one in said], device=device),
            log_prob=pad_sequence(log_prob, batch_first=True).to(device),
            texts=tuple(self._policy.decode([text.tolist() for text in tokens])),
        )

    def _sampling(self, settings: GenerationConfig, seed: int, begun: int, greedy: bool) -> Any:
        return self._vllm.SamplingParams(
            n=1,
            seed=seed,
            temperature=0.0 if greedy else settings.temperature,
            top_p=1.0 if greedy else settings.top_p,
            top_k=settings.top_k if settings.top_k and not greedy else -1,
            min_p=0.0 if greedy else settings.min_p,
            max_tokens=settings.max_new_tokens - begun,
            min_tokens=max(0, settings.min_new_tokens - begun),
            stop=list(settings.stop) or None,
            stop_token_ids=sorted(self._policy.ends) or None,
            include_stop_str_in_output=True,
            logprobs=0,
        )


def _log_prob_mode(settings: GenerationConfig) -> str:
    """What vLLM is asked to report: log-probabilities before its temperature, or after everything. Ours are after the temperature and before the rest."""
    if settings.temperature == 1.0:
        return "raw_logprobs"
    if settings.top_p < 1 or settings.top_k or settings.min_p or settings.min_new_tokens:
        raise UserError(
            "generation.temperature: vllm reports log-probabilities either before the temperature or after top_p, top_k, min_p and min_new_tokens; "
            "use temperature 1.0, or none of these, or the engine transformers"
        )
    return "processed_logprobs"


def _log_prob(answer: Any) -> Tensor:
    """Of the tokens of one answer, [n] float32."""
    return torch.tensor([places[token].logprob for token, places in zip(answer.token_ids, answer.logprobs or (), strict=True)], dtype=torch.float32)
