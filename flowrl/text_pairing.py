"""Preference data from scored answers: in each group the best against the worst, written as `load_text_pairs` reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flowrl.mistakes import did_you_mean
from flowrl.pairing import PairCounts, best_against_worst
from flowrl.tables import parse_line, read_lines
from flowrl.tracking import explain_full_disk, refuse_full_folder, replace_file
from flowrl.types import UserError

__all__ = ["make_text_pairs"]


class _Answer(NamedTuple):
    line: dict[str, Any]
    score: float
    iteration: int


def make_text_pairs(run_dir: Path, out: Path, *, reward: str = "total", margin: float = 0.0, max_pairs: int | None = None, per_group: int = 1) -> PairCounts:
    """Write ``out/pairs.jsonl`` from the answers that a run of a language model has kept.

    A line has prompt (a conversation where the data had one), chosen, rejected and both scores; its ``metadata`` is that of the prompt and ``pair``: the
    iteration, group and reward. Empty answers and pairs of equal ones are left out. An answer that was cut at its limit ends where it was cut.

    Args:
        run_dir: a run that was trained with ``logging.rollouts_every``. out: a new or empty folder.
        reward: the score that decides; "total" is the weighted sum. margin, per_group: see `best_against_worst`.
        max_pairs: where more are found, so many of them, evenly spread over the run; >= 1, None = all.
    Raises:
        UserError: no answers, an unknown reward, no pair, ``out`` is not empty, or the disk is full.
        ValueError: margin is below 0, or a count below 1.
    """
    if margin < 0 or per_group < 1 or (max_pairs is not None and max_pairs < 1):
        raise ValueError(f"needs margin >= 0 and counts >= 1, got margin {margin}, per_group {per_group}, max_pairs {max_pairs}")
    refuse_full_folder(out)
    found: list[tuple[_Answer, _Answer]] = []
    groups = samples = invalid = without = 0
    for group, lost in _groups(run_dir, reward):
        pairs = best_against_worst([answer.score for answer in group], margin=margin, per_group=per_group)
        distinct = [(group[a], group[b]) for a, b in pairs if group[a].line["answer"].strip() != group[b].line["answer"].strip()]
        found += distinct
        groups, samples, invalid, without = groups + 1, samples + len(group) + lost, invalid + lost, without + (not distinct)
    if not groups:
        raise UserError(f"{run_dir} has no saved answers; train it with logging.rollouts_every=1, or give its config to sample from the base model")
    if not found:
        raise UserError(f"none of the {groups} groups has two answers whose {reward} differs by more than {margin:g}; lower --margin, or use another --reward")
    kept = found if max_pairs is None or max_pairs >= len(found) else [found[i * len(found) // max_pairs] for i in range(max_pairs)]
    with explain_full_disk(out, next_step="make the pairs again"):
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / "pairs.jsonl", "".join(_line(*pair, reward) for pair in kept).encode())
    return PairCounts(groups, samples, invalid, without, len(found), len(kept))


def _groups(run_dir: Path, reward: str) -> Iterator[tuple[list[_Answer], int]]:
    """The scored answers of each group, and how many of it have no score or no text."""
    for file in sorted((run_dir / "rollouts").glob("iteration_*.jsonl")):
        iteration, groups = int(file.stem.partition("_")[2]), dict[int, list[dict[str, Any]]]()
        for number, text in enumerate(read_lines(file, f"answers {file}", "answer"), 1):
            line = parse_line(text, f"answers {file}: line {number}")
            groups.setdefault(line["group"], []).append(line)
            if reward not in line["scores"]:
                raise UserError(f"--reward {reward}: not among the scores of iteration {iteration}; {did_you_mean(reward, line['scores'])}")
        for lines in groups.values():
            usable = [line for line in lines if line["scores"][reward] is not None and line["answer"].strip()]
            yield [_Answer(line, line["scores"][reward], iteration) for line in usable], len(lines) - len(usable)


def _line(chosen: _Answer, rejected: _Answer, reward: str) -> str:
    metadata = dict(chosen.line["metadata"])
    prompt = metadata.pop("messages", None) or chosen.line["prompt"]
    metadata["pair"] = {"iteration": chosen.iteration, "group": chosen.line["group"], "reward": reward}
    pair = {"prompt": prompt, "chosen": chosen.line["answer"], "rejected": rejected.line["answer"]}
    scores = {"chosen_score": chosen.score, "rejected_score": rejected.score}
    return json.dumps({**pair, **scores, "metadata": metadata}, ensure_ascii=False) + "\n"
