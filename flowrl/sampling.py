"""Pictures, or answers of a language model, from a base model or a run's tuned weights, as files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

import torch

from flowrl.checkpoint import load_policy
from flowrl.config import load_config
from flowrl.evaluation import png_of, sigmas_of
from flowrl.policies.causal_lm import CausalLmPolicy
from flowrl.policies.families import family_of, make_policy
from flowrl.processes import make_accelerator
from flowrl.sections import GenerationConfig, LoraConfig, ModelConfig, RolloutConfig, TrainingConfig
from flowrl.seeds import generator
from flowrl.tracking import explain_full_disk, replace_file
from flowrl.types import Prompt, UserError
from samplers.rollout import sample_ode

__all__ = ["picture_names", "sample_to_folder"]

_SLUG_LENGTH = 48


def picture_names(prompts: list[str], images_per_prompt: int) -> list[str]:
    """``NNN_slug_k.png`` for every picture, prompt by prompt: the prompt's number from 0, its words, and the picture's number from 0."""
    digits = max(3, len(str(len(prompts) - 1)))
    slugs = [re.sub(r"[^a-z0-9]+", "-", text.lower())[:_SLUG_LENGTH].strip("-") or "prompt" for text in prompts]
    return [f"{number:0{digits}}_{slug}_{k}.png" for number, slug in enumerate(slugs) for k in range(images_per_prompt)]


def sample_to_folder(
    model: str,
    prompts: list[str],
    out: Path,
    run: Path | None,
    checkpoint: str,
    num_steps: int,
    guidance_scale: float,
    seed: int,
    images_per_prompt: int,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> list[Path]:
    """Draw pictures with deterministic steps (Euler of the flow ODE, or DDIM with eta 0) and write them as PNG files, see `picture_names`.

    A language model answers instead, as its run's rollouts do (``generation``), into the file ``answers.jsonl``; it knows no steps and no guidance.

    Picture k of a prompt follows from the seed, the prompt's text and k, whatever the other prompts, the policy and the batch size; so two
    calls with two checkpoints can be compared picture by picture.

    Args:
        model: the base model: ``flowrl:NAME``, a folder or a hub id.
        out: the folder to write to, made when missing.
        run: a run directory whose tuned weights, size and sigma grid are used; None = the base model.
        checkpoint: ``last`` or an iteration number; read only with ``run``.
        num_steps: sampling steps, >= 1.
        guidance_scale: 1 = off.
        dtype: of the networks; None = the run's, or float32 on a CPU and bfloat16 elsewhere.
    Returns:
        The files, prompt by prompt.
    Raises:
        UserError: a file exists already, the model or the checkpoint cannot be loaded, or the disk is full.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder; choose another one to write to")
    generation = GenerationConfig()
    if run is None:  # a LoRA of rank 1 that changes nothing, because full fine-tuning would keep float32 weights
        settings, rollout, training = ModelConfig(path=model, lora=LoraConfig(rank=1), text_encoders="offload"), RolloutConfig(), TrainingConfig()
        dtype = dtype or ("bfloat16" if torch.accelerator.is_available() else "float32")
    else:
        config = load_config(run / "config.yaml")
        settings, generation = config.model.model_copy(update={"path": model}), config.generation
        rollout, training = config.rollout, config.training
    family = family_of(settings)
    is_text = family.medium == "text"
    of_text = {"text_encoders": "keep"} if is_text else {}  # which language models do not know
    settings = family.for_new_prompts(settings.model_copy(update={"dtype": dtype or settings.dtype, **of_text}))
    files = [out / name for name in (["answers.jsonl"] if is_text else picture_names(prompts, images_per_prompt))]
    if taken := [file for file in files if file.exists()]:
        raise UserError(f"{taken[0]} exists already; choose another folder to write to")
    rows = training.rows_per_forward
    policy = make_policy(settings, make_accelerator(training.device).device, rows_per_forward=rows)
    if run is not None:
        load_policy(run, policy, checkpoint)
    if is_text:
        _answer(policy, [prompt for prompt in prompts for _ in range(images_per_prompt)], files[0], generation, seed, images_per_prompt)
        return files
    sigmas = sigmas_of(rollout, num_steps, policy)
    velocity = policy.velocity(guidance_scale)
    wanted = [(text, k) for text in prompts for k in range(images_per_prompt)]
    with explain_full_disk(out, next_step="sample again"):
        out.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(wanted), rows):
            chunk = wanted[start : start + rows]
            noise = torch.stack([torch.randn(policy.latent_shape, generator=generator("sample", seed, text, k)) for text, k in chunk])
            with torch.no_grad():
                prompt_rows = policy.prompt_rows([text for text, _ in chunk])
                latents = sample_ode(velocity, noise.to(policy.device), sigmas, prompt_rows, prediction=policy.prediction)
            for file, pixels in zip(files[start : start + rows], policy.decode(latents), strict=False):
                replace_file(file, png_of(pixels))
    return files


def _answer(policy: CausalLmPolicy, prompts: list[str], file: Path, generation: GenerationConfig, seed: int, per_prompt: int) -> None:
    """Answers as lines {prompt, answer, finished}; answer k of a prompt follows from the seed, the prompt and k."""
    asked = [Prompt(text) for text in prompts]
    generators = [generator("sample", seed, text, number % per_prompt) for number, text in enumerate(prompts)]
    found = policy.generate(policy.encode(asked, generation), [1] * len(asked), generation, generators)
    lines = [
        json.dumps({"prompt": prompt, "answer": text, "finished": bool(done)}, ensure_ascii=False)
        for prompt, text, done in zip(prompts, found.texts, found.finished, strict=True)
    ]
    with explain_full_disk(file.parent, next_step="sample again"):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, ("\n".join(lines) + "\n").encode())
