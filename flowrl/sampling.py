"""Pictures from a base model or a run's tuned weights, as PNG files."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from flowrl.checkpoint import load_policy
from flowrl.config import load_config
from flowrl.evaluation import png_of, sigmas_of
from flowrl.policies.base import DiffusionPolicy
from flowrl.policies.families import make_policy
from flowrl.processes import make_accelerator
from flowrl.sections import ModelConfig, RolloutConfig, TrainingConfig
from flowrl.seeds import generator
from flowrl.tracking import explain_full_disk, replace_file
from flowrl.types import UserError
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
) -> list[Path]:
    """Draw pictures with deterministic steps (Euler of the flow ODE, or DDIM with eta 0) and write them as PNG files, see `picture_names`.

    Picture k of a prompt follows from the seed, the prompt's text and k, whatever the other prompts, the policy and the batch size; so two
    calls with two checkpoints can be compared picture by picture.

    Args:
        model: the base model: ``flowrl:NAME``, a folder or a hub id.
        out: the folder to write to, made when missing.
        run: a run directory whose tuned weights, size and sigma grid are used; None = the base model.
        checkpoint: ``last`` or an iteration number; read only with ``run``.
        num_steps: sampling steps, >= 1.
        guidance_scale: 1 = off.
    Returns:
        The files, prompt by prompt.
    Raises:
        UserError: a file exists already, the model or the checkpoint cannot be loaded, or the disk is full.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder; choose another one to write to")
    files = [out / name for name in picture_names(prompts, images_per_prompt)]
    if taken := [file for file in files if file.exists()]:
        raise UserError(f"{taken[0]} exists already; choose another folder to write to")
    if run is None:
        settings, rollout, training = ModelConfig(path=model, adapter="full"), RolloutConfig(), TrainingConfig()
    else:
        config = load_config(run / "config.yaml")
        settings = DiffusionPolicy.for_new_prompts(config.model.model_copy(update={"path": model}))
        rollout, training = config.rollout, config.training
    rows = training.rows_per_forward
    policy = make_policy(settings, make_accelerator(training.device).device, rows_per_forward=rows)
    if run is not None:
        load_policy(run, policy, checkpoint)
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
