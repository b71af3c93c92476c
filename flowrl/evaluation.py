"""Evaluation: fixed prompts and fixed start noise, ODE samples, rewards with 95 % confidence intervals.

Image i of a prompt set always has prompt i mod (number of prompts) and the same start noise, whatever the policy, batch size and number of
processes; so two evaluations differ by the policy only.
"""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from flowrl.checkpoint import load_policy
from flowrl.config import Config, load_config
from flowrl.data import load_prompts
from flowrl.engines import engine_of
from flowrl.policies.base import DiffusionPolicy
from flowrl.policies.families import family_of, make_policy
from flowrl.processes import make_accelerator
from flowrl.sections import RewardConfig, RolloutConfig
from flowrl.seeds import generator
from flowrl.statistics import mean_ci95
from flowrl.tracking import replace_file
from flowrl.types import Prompt, SampleBatch, UserError
from rewards.composite import Entry, WeightedRewards
from rewards.registry import load_reward
from samplers.rollout import sample_ode

__all__ = ["Evaluation", "Evaluator", "build_rewards", "evaluate_run", "grid_of", "save_grid", "sigmas_of"]

_LOGGER = logging.getLogger(__name__)
_PAD = 2


def build_rewards(entries: Sequence[RewardConfig], *, share: Sequence[RewardConfig] = (), of: WeightedRewards | None = None) -> WeightedRewards:
    """Rewards by name or import string, with their weights; still to be loaded.

    Args:
        share: configs of the rewards ``of``; where an entry asks for the same reward as one of these, it is that one, so that no network is loaded twice, and
            waits where that one does (``offload``).
    Raises:
        UserError: a reward is unknown, cannot be imported, or does not take its arguments; or a device is none.
    """
    same = ("name", "args", "device", "dtype")
    found = []
    for config in entries:
        twin = next((other for other in share if all(getattr(other, key) == getattr(config, key) for key in same)), None)
        reward = load_reward(config.name, config.args) if twin is None or of is None else of.entry_of(twin.key).reward
        dtype = None if config.dtype is None else getattr(torch, config.dtype)
        offload = (twin or config).offload
        found.append(Entry(config.key, config.weight, reward, _device(config), dtype, config.batch_size, offload, config.required))
    return WeightedRewards(found, beside=of)


def _device(config: RewardConfig) -> torch.device | None:
    if config.device is None:
        return None
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise UserError(f"reward {config.key}: '{config.device}' is no device; write cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"reward {config.key}: this machine has no {device}; it has {torch.cuda.device_count()} CUDA devices")
    return device


def sigmas_of(rollout: RolloutConfig, num_steps: int, policy: DiffusionPolicy) -> tuple[float, ...]:
    """The sigma grid of a run for this many steps."""
    return policy.sigmas(rollout.grid, num_steps, rollout.shift)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of one prompt set.

    Attributes:
        prompts: length n. scores: reward -> [n] float32, NaN where invalid. images: the first few, [k, 3, H, W] in [0, 1].
        problems: reward -> image number -> why it has no score. optional: rewards that need not score any.
    """

    prompts: Sequence[Prompt]
    scores: Mapping[str, Tensor]
    images: Tensor
    problems: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()

    def summary(self, num_prompts: int) -> dict[str, tuple[float, float, int]]:
        """Reward -> (mean, half width of the 95 % interval clustered by prompt, number of valid images); an optional one that scored none is left out.

        Raises:
            UserError: a reward could score none; the message says why of the first.
        """
        out = {}
        for name, values in self.scores.items():
            valid = torch.isfinite(values)
            clusters = (torch.arange(len(values)) % num_prompts)[valid]
            if not len(clusters) and name in self.optional:
                _LOGGER.warning("reward %s, which is not required, could score no image of the evaluation", name)
                continue
            if not len(clusters):
                problem = self.problems.get(name, {}).get(0, "it gave no reason")
                raise UserError(f"reward {name} could not score any image of the evaluation; the first, of the prompt '{self.prompts[0].text}': {problem}")
            out[name] = (*mean_ci95(values[valid], clusters), int(valid.sum()))
        return out

    def save(self, folder: Path, split: str) -> None:
        """Write the kept pictures, see `save_grid`."""
        save_grid(folder, split, self)


class Evaluator:
    """Samples prompt sets with a policy and scores them; on several processes each takes a share."""

    def __init__(
        self,
        policy: DiffusionPolicy,
        splits: Mapping[str, Sequence[Prompt]],
        rewards: WeightedRewards,
        *,
        sigmas: Sequence[float],
        seed: int,
        accelerator: Accelerator,
    ) -> None:
        self.policy, self.splits, self.rewards, self.sigmas, self.seed, self.accelerator = policy, splits, rewards, sigmas, seed, accelerator

    def __call__(self, split: str, num_images: int, guidance_scale: float, grid_images: int) -> Evaluation:
        """Evaluate ``num_images`` images of a prompt set; the same result on every process."""
        prompts = [self.splits[split][i % len(self.splits[split])] for i in range(num_images)]
        found: list[tuple[int, dict[str, float], dict[str, str], Tensor | None]] = []
        velocity = self.policy.velocity(guidance_scale)
        for chunk in self.policy.in_step_through(self._chunks(num_images, len(self.splits[split]))):
            noise = torch.stack([torch.randn(self.policy.latent_shape, generator=generator("eval", self.seed, split, i)) for i in chunk])
            texts = [prompts[i].text for i in chunk]
            start, rows = noise.to(self.policy.device), self.policy.prompt_rows(texts)
            latents = sample_ode(velocity, start, self.sigmas, rows, prediction=self.policy.prediction)
            images = self.policy.decode(latents)
            group = torch.tensor(chunk) % len(self.splits[split]) if self.rewards.compares else None
            scores = self.rewards.score(SampleBatch([prompts[i] for i in chunk], images=images, group=group))
            values = {name: scores[name].values.tolist() for name in self.rewards.names}  # their weighted sum is no measurement
            for j, i in enumerate(chunk):
                problems = {name: scores[name].problems[j] for name in self.rewards.names if j in scores[name].problems}
                found.append((i, {name: column[j] for name, column in values.items()}, problems, images[j] if i < grid_images else None))
        if self.accelerator.num_processes > 1:
            found = gather_object(found)
        found.sort(key=lambda item: item[0])
        scores_by_name = {name: torch.tensor([row[1][name] for row in found]) for name in found[0][1]}
        reasons = {name: {row[0]: row[2][name] for row in found if name in row[2]} for name in scores_by_name}
        pictures = [row[3] for row in found if row[3] is not None]
        self.rewards.rest()
        images = torch.stack(pictures) if pictures else torch.empty(0, 3, 1, 1)
        return Evaluation(prompts, scores_by_name, images, reasons, self.rewards.optional)

    def _chunks(self, num_images: int, num_prompts: int) -> Iterator[list[int]]:
        """This process's images, as many at a time as fit. Where a reward compares samples, all images of a prompt are together, whatever the sizes."""
        rank, world, size = self.accelerator.process_index, self.accelerator.num_processes, self.policy.rows_per_forward
        if not self.rewards.compares:
            mine = list(range(rank, num_images, world))
            yield from (mine[start : start + size] for start in range(0, len(mine), size))
            return
        chunk: list[int] = []
        for prompt in range(rank, min(num_prompts, num_images), world):
            images = list(range(prompt, num_images, num_prompts))
            if chunk and len(chunk) + len(images) > size:
                yield chunk
                chunk = []
            chunk += images
        if chunk:
            yield chunk


def png_of(pixels: Tensor) -> bytes:
    """A picture [3, H, W] in [0, 1] as a PNG file."""
    png = io.BytesIO()
    Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(png, format="PNG")
    return png.getvalue()


def grid_of(images: Tensor, columns: int) -> Image.Image:
    """Images [B, 3, H, W] in [0, 1] side by side, ``columns`` in a row, 2 white pixels apart."""
    b, _, h, w = images.shape
    rows = -(-b // columns)
    canvas = np.full((rows * (h + _PAD) + _PAD, columns * (w + _PAD) + _PAD, 3), 255, dtype=np.uint8)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for i in range(b):
        y, x = _PAD + (i // columns) * (h + _PAD), _PAD + (i % columns) * (w + _PAD)
        canvas[y : y + h, x : x + w] = pixels[i]
    return Image.fromarray(canvas)


def save_grid(folder: Path, split: str, evaluation: Evaluation) -> None:
    """Write ``<split>.png`` and ``<split>.json`` (prompts, scores and geometry) of an evaluation's kept images."""
    count = len(evaluation.images)
    if not count:
        return
    folder.mkdir(parents=True, exist_ok=True)
    columns = min(4, count)
    png = io.BytesIO()
    grid_of(evaluation.images, columns).save(png, format="PNG")
    replace_file(folder / f"{split}.png", png.getvalue())
    facts = {
        "prompts": [p.text for p in evaluation.prompts[:count]],
        "scores": {name: [_rounded(v) for v in values[:count].tolist()] for name, values in evaluation.scores.items()},
        "columns": columns,
        "tile": evaluation.images.shape[-1],
        "pad": _PAD,
    }
    replace_file(folder / f"{split}.json", (json.dumps(facts) + "\n").encode())


def _rounded(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return round(value, 6) if math.isfinite(value) else None


def evaluate_run(
    run: Path | None,
    config: Config | None,
    rewards: list[str],
    num_images: int,
    num_steps: int | None,
    guidance_scales: list[float],
    splits: list[str],
    seed: int,
    checkpoint: str = "last",
) -> list[dict[str, object]]:
    """Score the base model, and a run's checkpoint when one is given, on the same prompts and start noise.

    Args:
        run: a run directory; None = only the base model of ``config``.
        rewards: names or import strings, or labels of the config's rewards, which keep their ``args``; empty = the config's evaluation rewards.
        checkpoint: ``last`` or an iteration number.
    Returns:
        rows as in evals.jsonl.
    Raises:
        UserError: neither run nor config, an unknown split, no usable checkpoint.
    """
    if config is None:
        if run is None:
            raise UserError("give a run directory or a config to evaluate")
        config = load_config(run / "config.yaml")
    known = {reward.label: reward for reward in (*config.rewards, *config.evaluation.rewards) if reward.label is not None}
    entries = [known.get(name) or RewardConfig(name=name) for name in rewards] or list(config.evaluation.rewards or config.rewards)
    missing = [s for s in splits if s not in config.data.eval]
    if missing:
        raise UserError(f"no prompt set is called {missing[0]}; the config has {', '.join(config.data.eval)}")
    prompts = {name: load_prompts(config.data.eval[name]) for name in (splits or config.data.eval)}
    scorer = build_rewards(entries)
    rows: list[dict[str, object]] = []
    for asked in prompts.values():
        scorer.check_prompts(asked)
    accelerator = make_accelerator(config.training.device)
    scorer.load(accelerator.device)
    model = family_of(config.model).for_new_prompts(config.model)
    policy = make_policy(model, accelerator.device, rows_per_forward=config.training.rows_per_forward)
    evaluator = engine_of(config.model).make_evaluator(config, policy, prompts, scorer, accelerator, num_steps or config.evaluation.num_steps, seed)
    for name in ("base", "tuned") if run is not None else ("base",):
        iteration = load_policy(run, policy, checkpoint) if name == "tuned" and run is not None else 0
        for split in prompts:
            for scale in guidance_scales or [config.evaluation.guidance_scale]:
                evaluation = evaluator(split, num_images, scale, 0)
                for reward, (mean, ci95, n) in evaluation.summary(len(prompts[split])).items():
                    row = {"iteration": iteration, "split": split, "policy": name, "guidance_scale": scale, "reward": reward}
                    rows.append({**row, "mean": mean, "ci95": ci95, "n": n})
    scorer.close()
    return rows
