"""Preference data from scored samples: in each group the best against the worst, written as `load_pairs` reads it.

Letters: B samples, L... latent axes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict, Unpack, cast

import torch
from safetensors.torch import save
from torch import Tensor

from flowrl.config import Config
from flowrl.engines.diffusion import diffusion_engine
from flowrl.evaluation import png_of
from flowrl.mistakes import did_you_mean
from flowrl.pairs import SIDES
from flowrl.policies.families import make_policy
from flowrl.processes import make_accelerator
from flowrl.reward_metrics import join_scores
from flowrl.rollout_log import SavedRollout, load_rollouts, save_rollout
from flowrl.tracking import explain_full_disk, refuse_full_folder, replace_file
from flowrl.trainer import Trainer
from flowrl.types import UserError

if TYPE_CHECKING:
    from flowrl.engines.text import TextEngine

__all__ = ["PairChoice", "PairCounts", "best_against_worst", "make_pairs", "pairs_from_base", "pairs_from_run", "sample_answers", "sample_rollouts"]

Decode = Callable[[Tensor], Tensor]
"""Clean latents [B, L...] -> pictures [B, 3, H, W] in [0, 1] on the CPU."""
TOTAL = "total"
"""The name of the weighted sum of the rewards."""
_AGAIN = "make the pairs again"
_NO_PICTURES = "--images: a language model makes no pictures; leave it out"


@dataclass(frozen=True, slots=True)
class PairCounts:
    """What became of the samples.

    Attributes:
        groups, samples: that were looked at.
        invalid: samples that could not be scored and took no part.
        without_pair: groups of which no two samples differ enough.
        found: pairs that differ enough.
        written: those of them that were kept.
    """

    groups: int
    samples: int
    invalid: int
    without_pair: int
    found: int
    written: int


class PairChoice(TypedDict, total=False):
    """The arguments of `make_pairs` that say which samples become pairs."""

    reward: str
    margin: float
    max_pairs: int | None
    per_group: int


class _Pair(NamedTuple):
    """Where a pair stands in the saved rollouts: iteration, and the places of its two samples."""

    iteration: int
    samples: tuple[int, int]


def best_against_worst(values: Sequence[float], *, margin: float, per_group: int) -> list[tuple[int, int]]:
    """Pairs (chosen, rejected) of a group: the best against the worst, the second best against the second worst, and so on.

    No sample is used twice; of equal samples the first counts as the better one.

    Args:
        values: rewards of the group's samples, finite.
        margin: two samples are a pair only if their rewards differ by more than this, >= 0; so ties never are.
        per_group: most pairs.
    Returns:
        Positions in ``values``, the pair with the largest difference first.
    """
    order = sorted(range(len(values)), key=lambda i: -values[i])
    pairs = [(order[k], order[-1 - k]) for k in range(min(per_group, len(values) // 2))]
    return [(chosen, rejected) for chosen, rejected in pairs if values[chosen] - values[rejected] > margin]


def make_pairs(
    run_dir: Path,
    out: Path,
    *,
    reward: str = TOTAL,
    margin: float = 0.0,
    max_pairs: int | None = None,
    per_group: int = 1,
    decode: Decode | None = None,
) -> PairCounts:
    """Write ``out/pairs.jsonl`` and ``out/latents/*.safetensors`` from the rollouts that a run has saved.

    A line has prompt, chosen and rejected; its ``metadata`` is that of the prompt and ``pair``: the iteration and group, and both rewards. The list is
    written last, so a folder that has one is whole.

    Args:
        run_dir: a run that was trained with ``logging.rollouts_every``.
        out: a new or empty folder.
        reward: the score that decides; "total" is the weighted sum.
        margin, per_group: see `best_against_worst`.
        max_pairs: where more are found, so many of them, evenly spread over the run; >= 1, None = all.
        decode: None = no pictures, else they are written to ``out/images`` under the names of the latents.
    Raises:
        UserError: no rollouts, an unknown reward, no pair, ``out`` is not empty, or the disk is full.
        ValueError: margin is below 0, or a count below 1.
    """
    if margin < 0 or per_group < 1 or (max_pairs is not None and max_pairs < 1):
        raise ValueError(f"needs margin >= 0 and counts >= 1, got margin {margin}, per_group {per_group}, max_pairs {max_pairs}")
    refuse_full_folder(out)
    found: list[_Pair] = []
    groups = num_samples = invalid = without = 0
    for rollout in load_rollouts(run_dir):
        if reward not in rollout.scores:
            raise UserError(f"--reward {reward}: not among the scores of iteration {rollout.iteration}; {did_you_mean(reward, rollout.scores)}")
        score = rollout.scores[reward]
        for number in rollout.group.unique().tolist():
            places = torch.nonzero((rollout.group == number) & score.valid).squeeze(1).tolist()
            pairs = best_against_worst([score.values[i].item() for i in places], margin=margin, per_group=per_group)
            distinct = [(places[a], places[b]) for a, b in pairs if not torch.equal(rollout.latents[places[a]], rollout.latents[places[b]])]
            found += [_Pair(rollout.iteration, samples) for samples in distinct]
            groups, without = groups + 1, without + (not distinct)
        num_samples, invalid = num_samples + len(rollout.prompts), invalid + int((~score.valid).sum())
    if not groups:
        raise UserError(f"{run_dir} has no saved rollouts; train it with logging.rollouts_every=1, or give its config to sample from the base model")
    if not found:
        raise UserError(f"none of the {groups} groups has two samples whose {reward} differs by more than {margin:g}; lower --margin, or use another --reward")
    kept = found if max_pairs is None else [found[i * len(found) // max_pairs] for i in range(max_pairs)] if max_pairs < len(found) else found
    with explain_full_disk(out, next_step=_AGAIN):
        _write(run_dir, out, kept, reward, decode)
    return PairCounts(groups, num_samples, invalid, without, len(found), len(kept))


def _write(run_dir: Path, out: Path, pairs: Sequence[_Pair], reward: str, decode: Decode | None) -> None:
    for folder in ("latents", *(["images"] if decode else [])):
        (out / folder).mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    left = list(reversed(pairs))
    for rollout in load_rollouts(run_dir):
        while left and left[-1].iteration == rollout.iteration:
            lines.append(_write_one(out, f"{len(lines):06d}", rollout, left.pop().samples, reward, decode))
    replace_file(out / "pairs.jsonl", "".join(lines).encode())


def _write_one(out: Path, name: str, rollout: SavedRollout, places: tuple[int, int], reward: str, decode: Decode | None) -> str:
    """Write the two samples of a pair; returns its line."""
    prompt, score = rollout.prompts[places[0]], rollout.scores[reward]
    files = {side: f"latents/{name}_{side}.safetensors" for side in SIDES}
    facts: dict[str, object] = {"iteration": rollout.iteration, "group": int(rollout.group[places[0]]), "reward": reward}
    pictures = decode(rollout.latents[list(places)]) if decode else None
    for side, (key, file), place in zip(range(2), files.items(), places, strict=True):
        replace_file(out / file, save({"latent": rollout.latents[place].contiguous()}))
        facts[key] = score.values[place].item()
        if pictures is not None:
            replace_file(out / "images" / f"{name}_{key}.png", png_of(pictures[side]))
    metadata = {key: value for key, value in prompt.metadata.items() if key not in SIDES} | {"pair": facts}
    return json.dumps({"prompt": prompt.text, **files, "metadata": metadata}, ensure_ascii=False) + "\n"


def pairs_from_run(config: Config, out: Path, *, images: bool = False, **choice: Unpack[PairChoice]) -> PairCounts:
    """`make_pairs` of the run directory ``config.run_dir``, or `make_text_pairs`; ``images`` decodes with the VAE of its model."""
    if config.likelihood == "token":
        return _text_pairs(Path(config.run_dir), out, images, choice)
    decode: Decode | None = None
    if images:
        refuse_full_folder(out)
        decode = make_policy(config.model, make_accelerator(config.training.device).device, rows_per_forward=config.training.rows_per_forward).decode
    return make_pairs(Path(config.run_dir), out, decode=decode, **choice)


def pairs_from_base(config: Config, out: Path, num_groups: int, *, images: bool = False, **choice: Unpack[PairChoice]) -> PairCounts:
    """Sample groups from the untrained model of a config, with its prompts, rollout and rewards, and `make_pairs` of them.

    Args:
        config: without ``data.pairs``.
        num_groups: >= 1; a group is ``rollout.group_size`` samples of one prompt.
    """
    refuse_full_folder(out)
    if images and config.likelihood == "token":
        raise UserError(_NO_PICTURES)
    trainer = Trainer(config)
    if trainer.accelerator.num_processes > 1:
        raise UserError("flowrl pairs samples in one process; start it without accelerate launch")
    reward, known = choice.get("reward", TOTAL), (TOTAL, *trainer.rewards.names)
    if reward not in known:
        raise UserError(f"--reward {reward}: not among the rewards of the config; {did_you_mean(reward, known)}")
    with explain_full_disk(out, next_step=_AGAIN):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")
    with folder as name:
        if config.likelihood == "token":
            sample_answers(trainer, Path(name), num_groups)
            return _text_pairs(Path(name), out, images, choice)
        sample_rollouts(trainer, Path(name), num_groups)
        return make_pairs(Path(name), out, decode=trainer.policy.decode if images else None, **choice)


def _text_pairs(run_dir: Path, out: Path, images: bool, choice: PairChoice) -> PairCounts:
    from flowrl.text_pairing import make_text_pairs  # which reads this file

    if images:
        raise UserError(_NO_PICTURES)
    return make_text_pairs(run_dir, out, **choice)


def sample_answers(trainer: Trainer, run_dir: Path, num_groups: int) -> None:
    """`sample_rollouts` of a language model: the answers are kept as a run keeps them, and the allocator learns from their rewards as it does in a run."""
    iteration, engine = 0, cast("TextEngine", trainer.engine)
    while num_groups > 0:
        iteration += 1
        indices = engine.groups(iteration)[:num_groups]
        prompts, numbers = [trainer.prompts[index] for index in indices], list(range(len(indices)))
        with torch.no_grad():
            rolled_out, pending = engine.roll_out(prompts, indices, numbers, iteration)
        scores = join_scores([part.result() for part in pending])
        nobody = torch.zeros(0, dtype=torch.int64)
        engine.rounds.observe(engine.answers(rolled_out, scores, scores, (nobody, nobody), numbers, iteration))  # which may ask others more often next time
        with explain_full_disk(run_dir, next_step=_AGAIN):
            engine.save_rollout(run_dir, engine.keep(iteration, rolled_out, scores, prompts, numbers))
        num_groups -= len(indices)


def sample_rollouts(trainer: Trainer, run_dir: Path, num_groups: int) -> None:
    """Sample and score groups without training, and save them as the rollouts of iterations 1, 2, ... of a run.

    They are the groups that a training run with the same config would sample if its weights stayed as they are.
    """
    engine, iteration = diffusion_engine(trainer.engine, "flowrl pairs"), 0
    while num_groups > 0:
        iteration += 1
        indices = engine.groups(iteration)[:num_groups]
        prompts = [trainer.prompts[index] for index in indices]
        with torch.no_grad():
            rollout, futures = engine.sample(engine.plan(iteration), prompts, list(range(len(indices))), iteration)
        save_rollout(
            run_dir,
            iteration,
            prompts=[prompts[g] for g in rollout.leaf_group.tolist()],
            latents=rollout.leaves,
            group=rollout.leaf_group,
            scores=join_scores([future.result() for future in futures]),
            next_step=_AGAIN,
        )
        num_groups -= len(indices)
