"""Several rewards as one: scored in batches, checked strictly, summed with weights. A broken reward stops the run; it never becomes a zero.

Letters: B samples.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowrl.types import Prompt, Reward, SampleBatch, Scores, UserError
from rewards.groups import groups_of
from rewards.registry import describe_error

__all__ = ["ConstantRewardMonitor", "Entry", "Pending", "WeightedRewards", "join_scores"]

_LOGGER = logging.getLogger(__name__)
_TOTAL = "total"
_TAKEN = ("mean", "std", "invalid", "satisfied", "weight")
"""What the trainer logs of every reward beside its raw columns."""
_NETWORK_THREADS = 16
"""Batches of network rewards under way at a time; each reward bounds its own requests."""


class Entry(NamedTuple):
    """One of several rewards.

    Attributes:
        name: in metrics and messages. weight: finite; 0 means "only watch it".
        device, dtype, batch_size: None = the device of the run, and what the reward says of itself.
        offload: its networks wait on the CPU while no batch is scored, see `WeightedRewards.rest`.
        required: a sample that it cannot score is left out; else the total of that sample has the mean of its group in place of the score.
    """

    name: str
    weight: float
    reward: Reward
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    batch_size: int | None = None
    offload: bool = False
    required: bool = True


class Pending:
    """Scores under way, see `WeightedRewards.submit`. Once they are there, the pictures are let go."""

    def __init__(self, owner: WeightedRewards, batch: SampleBatch, parts: Sequence[Future[dict[str, Scores]]]) -> None:
        self._owner, self._parts = owner, list(parts)
        self._batch = SampleBatch(batch.prompts, group=batch.group)
        self._result: dict[str, Scores] | None = None

    def result(self) -> dict[str, Scores]:
        """Wait for them. Raises what `WeightedRewards.score` raises."""
        if self._result is None:
            found = {name: scores for part in self._parts for name, scores in part.result().items()}
            self._result = self._owner.with_total({name: found[name] for name in self._owner.names}, self._batch)
            self._parts = []
        return self._result


class WeightedRewards:
    """A weighted sum of rewards.

    total = sum_k weight_k value_k, added up in float64 and given as float32. A sample is valid in the total when it is valid in every required
    reward, those of weight 0 included, and in one that has a weight. Where a reward that is not required has no score, the mean of the sample's group stands
    in for it, which neither lifts nor sinks the sample; in a group without any score it adds nothing.

    Args:
        rewards: entries, or tuples (name, weight, reward). The names are distinct and not "total".
        beside: others that are loaded first; a reward object that is also among them is not loaded twice.
    Raises:
        UserError: no reward, a name twice, a name that is taken, a weight that is not finite, a batch size below 1.
    """

    def __init__(self, rewards: Sequence[Entry | tuple[str, float, Reward]], *, beside: WeightedRewards | None = None) -> None:
        self._beside = beside
        if not rewards:
            raise UserError("no reward is given; list at least one under `rewards`")
        self._entries = tuple(Entry(*entry) for entry in rewards)
        names = [entry.name for entry in self._entries]
        for name, weight, reward, *_ in self._entries:
            if name == _TOTAL:
                raise UserError("a reward cannot be called 'total', the name of the weighted sum; choose another name")
            if names.count(name) > 1:
                raise UserError(f"reward {name} is listed {names.count(name)} times; keep one entry with the sum of the weights, or give each a label")
            if not math.isfinite(weight):
                raise UserError(f"reward {name} has the weight {weight}; give a finite number")
            if reward.info.batch_size < 1:
                raise UserError(f"reward {name} declares a batch size of {reward.info.batch_size}; give 1 or more")
        self._weights = {entry.name: entry.weight for entry in self._entries}
        self._sizes = {entry.name: entry.batch_size for entry in self._entries}
        self._devices: dict[str, torch.device] = {}
        self._pools: tuple[ThreadPoolExecutor, ThreadPoolExecutor] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the rewards, in their order, without "total"."""
        return tuple(entry.name for entry in self._entries)

    @property
    def weights(self) -> dict[str, float]:
        """Name -> weight."""
        return dict(self._weights)

    @weights.setter
    def weights(self, weights: Mapping[str, float]) -> None:
        self._weights = {name: float(weights[name]) for name in self.names}

    @property
    def optional(self) -> frozenset[str]:
        """Rewards that are not required."""
        return frozenset(entry.name for entry in self._entries if not entry.required)

    @property
    def compares(self) -> bool:
        """Whether a reward looks at several samples of a prompt together."""
        return any(entry.reward.info.scope != "sample" for entry in self._entries)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Find, before any work starts, a prompt that a reward could never score.

        Raises:
            UserError: the prompt lacks metadata that a reward needs, or the reward itself says what is wrong.
        """
        for name, _, reward, *_ in self._entries:
            for key in reward.info.metadata:
                if lacking := [prompt for prompt in prompts if key not in prompt.metadata]:
                    count = f"{len(lacking)} of {len(prompts)} prompts lack it, the first is"
                    raise UserError(f"reward {name} needs `{key}` in the metadata of every prompt; {count} {_quote(lacking[0])}")
            check = getattr(reward, "check_prompts", None)
            if check is not None:
                try:
                    check(prompts)
                except UserError as error:
                    raise UserError(f"reward {name}: {_reason(name, error)}") from error

    def require_medium(self, made: str) -> None:
        """Refuse, before anything is loaded, a reward of pictures in a run of text, or of text in a run of pictures.

        Args:
            made: what the model makes, "images" or "text".
        Raises:
            UserError: a reward looks at the other one alone.
        """
        here, other = ("texts", "images") if made == "text" else ("images", "texts")
        for name, _, reward, *_ in self._entries:
            if other in reward.info.reads and here not in reward.info.reads:
                what = "pictures, and a language model answers in text" if made == "text" else "texts, and an image generator makes pictures"
                raise UserError(f"reward {name} judges {what}; choose another one from `flowrl rewards` (one of your own says `reads` in its info)")

    def load(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Load every reward; called once before the first ``score``.

        Args:
            device: for rewards that neither their entry nor their own nature puts elsewhere.
            dtype: for all whose entry gives none; None = float32 on a CPU, on other devices what the reward says of itself.
        Raises:
            UserError: a reward cannot be loaded; the message names it.
        """
        for entry in self._entries:
            name, info = entry.name, entry.reward.info
            where = entry.device or (device if info.runs_on == "device" else torch.device("cpu"))
            kind = entry.dtype or dtype or (torch.float32 if where.type == "cpu" else getattr(torch, info.dtype))
            loaded = self._beside._device_of(entry.reward) if self._beside is not None else None
            if loaded is not None:
                self._devices[name] = loaded
                continue
            try:
                entry.reward.load(where, kind)
            except (Exception, SystemExit) as error:
                raise UserError(f"reward {name} could not be loaded: {_reason(name, error)}") from error
            self._devices[name] = where
        self.rest()

    def _device_of(self, reward: Reward) -> torch.device | None:
        """Where a reward object was loaded; None where it is not among these, or not loaded."""
        return next((self._devices.get(entry.name) for entry in self._entries if entry.reward is reward), None)

    def entry_of(self, name: str) -> Entry:
        """The entry of that name."""
        return next(entry for entry in self._entries if entry.name == name)

    def rest(self) -> None:
        """Move the networks of rewards with ``offload`` to the CPU; the next ``score`` brings them back."""
        for entry in self._entries:
            move = getattr(entry.reward, "to", None)
            if entry.offload and move is not None:
                move(torch.device("cpu"))

    def close(self) -> None:
        """Give back threads, processes and connections. It can be loaded again."""
        for pool in self._pools or ():
            pool.shutdown(wait=False, cancel_futures=True)
        self._pools = None
        for entry in self._entries:
            close = getattr(entry.reward, "close", None)
            if close is not None:
                close()

    def score(self, batch: SampleBatch) -> dict[str, Scores]:
        """Score a batch with every reward, without gradient and outside any enclosing autocast.

        A reward gets at most its batch size at a time; one whose scope is a pair or a group gets all, so that groups stay whole. If a call raises, its
        samples are tried one by one, so that the error names the first prompt that fails. A batch that the device's memory does not hold is halved.

        Returns:
            name -> Scores for every reward and for "total", on the CPU: values [B] float32, valid [B] bool. A value is NaN exactly where
            valid is False.
        Raises:
            UserError: a reward raised, or returned the wrong type, the wrong length, or NaN or infinity for a sample that it calls valid.
                The message names the reward and the first such prompt.
            ValueError: B = 0, or the images, texts or groups are not B.
            RuntimeError: ``load`` was not called.
        """
        self._check(batch)
        return self.with_total(self._scored(self._entries, batch), batch)

    def submit(self, batch: SampleBatch) -> Pending:
        """`score` in the background: rewards on this machine one after the other in one thread, network rewards beside them, several batches at a time.

        Raises:
            ValueError, RuntimeError: as `score`; everything else is raised by the result.
        """
        self._check(batch)
        if self._pools is None:
            self._pools = ThreadPoolExecutor(1, "rewards"), ThreadPoolExecutor(_NETWORK_THREADS, "network-rewards")
        here, network = self._pools
        local = [entry for entry in self._entries if entry.reward.info.runs_on != "network"]
        parts = [here.submit(self._scored, local, batch)] if local else []
        parts += [network.submit(self._scored, [entry], batch) for entry in self._entries if entry.reward.info.runs_on == "network"]
        return Pending(self, batch, parts)

    def with_total(self, scores: dict[str, Scores], batch: SampleBatch) -> dict[str, Scores]:
        """Scores of all rewards, and their weighted sum as "total"."""
        return {**scores, _TOTAL: self._total(scores, batch)}

    def _scored(self, entries: Sequence[Entry], batch: SampleBatch) -> dict[str, Scores]:
        found = {}
        for entry in entries:
            kind = self._devices[entry.name].type
            quiet = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()
            with torch.no_grad(), quiet:
                found[entry.name] = self._in_batches(entry, batch)
        return found

    def _in_batches(self, entry: Entry, batch: SampleBatch) -> Scores:
        name, reward = entry.name, entry.reward
        move = getattr(reward, "to", None)
        if entry.offload and move is not None:
            move(self._devices[name])
        whole = reward.info.scope != "sample"
        size = len(batch) if whole else self._sizes[name] or reward.info.batch_size
        parts: list[Scores] = []
        start = 0
        while start < len(batch):
            try:
                parts.append(_score_once(name, reward, _part(batch, start, start + size)))
            except torch.OutOfMemoryError as error:
                if whole or size == 1:
                    raise UserError(
                        f"reward {name}: the memory of {self._devices[name]} does not hold it; set device: cpu, a smaller dtype, or offload: true"
                    ) from error
                size = self._sizes[name] = (size + 1) // 2
                with contextlib.suppress(RuntimeError):
                    torch.cuda.empty_cache()
                _LOGGER.warning("reward %s: out of memory, from now on with batch_size %d", name, size)
                continue
            start += size
        return join_scores(parts)

    def require_differentiable(self) -> None:
        """Check, before any weights are loaded, that `differentiable_total` can work. Rewards of weight 0 are only watched and may be anything.

        Raises:
            UserError: a reward with a weight has no gradient (the message names the first), or none has a weight.
        """
        weighted = [(entry.name, entry.reward) for entry in self._entries if self._weights[entry.name]]
        if not weighted:
            raise UserError("every reward has the weight 0, so there is no reward to differentiate; give one a weight")
        for name, reward in weighted:
            if not reward.info.differentiable:
                raise UserError(
                    f"reward {name} is not differentiable, which this objective needs; choose another reward (such as ink), give it the weight 0 "
                    "to watch it, or, if it is your own, set differentiable=True in its RewardInfo and keep the gradient of the images in its values"
                )

    def differentiable_total(self, batch: SampleBatch) -> Tensor:
        """The weighted sum with its gradient by the pictures, outside any enclosing autocast. Rewards of weight 0 are not scored.

        Where all is valid and no reward has the weight 0, the values are those of "total" in `score`.

        Args:
            batch: its images may be on any device, and require a gradient.
        Returns:
            [B] float32 on the images' device, with gradient; NaN where a sample is invalid in a reward, as in `score`.
        Raises:
            UserError: as `require_differentiable` and `score`; or a reward that calls itself differentiable returned values without gradient.
            ValueError: B = 0, the parts are not B, or the images require no gradient.
            RuntimeError: ``load`` was not called.
        """
        self._check(batch)
        self.require_differentiable()
        if batch.images is None or not batch.images.requires_grad:
            raise ValueError("SampleBatch.images must be pictures that require a gradient")
        with torch.enable_grad(), torch.autocast(batch.images.device.type, enabled=False):
            scores = {entry.name: self._in_batches(entry, batch) for entry in self._entries if self._weights[entry.name]}
            for name, score in scores.items():
                if not score.values.requires_grad:
                    raise UserError(f"reward {name} calls itself differentiable, but its values carry no gradient; correct the reward or its RewardInfo")
            return self._total(scores, batch).values.to(batch.images.device)

    def _check(self, batch: SampleBatch) -> None:
        if len(self._devices) < len(self._entries):
            raise RuntimeError("WeightedRewards.load must be called before score")
        if len(batch) == 0:
            raise ValueError("cannot score an empty batch")
        for part in ("images", "texts", "group"):
            value = getattr(batch, part)
            if value is not None and len(value) != len(batch):
                raise ValueError(f"SampleBatch.{part} has {len(value)} entries for {len(batch)} prompts")

    def _total(self, scores: Mapping[str, Scores], batch: SampleBatch) -> Scores:
        required = {entry.name: entry.required for entry in self._entries}
        values, valid = torch.zeros(len(batch), dtype=torch.float64), torch.ones(len(batch), dtype=torch.bool)
        counted = torch.zeros(len(batch), dtype=torch.bool)
        for name, score in scores.items():
            if required[name]:
                valid &= score.valid
            if self._weights[name]:
                known = score.values.double().cpu()
                values = values + self._weights[name] * torch.where(score.valid, known, _group_means(known.detach(), score.valid, batch))
                counted |= score.valid
        if not all(required.values()):
            valid &= counted
        out = torch.where(valid, values, torch.nan).float()
        bad = valid & ~out.isfinite()
        if bad.any():
            prompt = batch.prompts[_first(bad)]
            raise UserError(f"the weighted sum of the rewards overflows for the prompt {_quote(prompt)}; use smaller weights")
        problems: dict[int, str] = {}
        for name, score in scores.items():
            for i in (i for i in score.problems if not bool(valid[i])):
                problems.setdefault(i, f"reward {name} on the prompt {_quote(batch.prompts[i])}: {score.problems[i]}")
        return Scores(out, valid, problems=problems)


def _group_means(values: Tensor, valid: Tensor, batch: SampleBatch) -> Tensor:
    """Of each sample the mean [B] of the valid values of its group, 0 where there is none."""
    means = torch.zeros_like(values)
    if not bool(valid.all()):
        for group in groups_of(batch):
            if bool(valid[group].any()):
                means[group] = values[group[valid[group]]].mean()
    return means


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Scores of several batches as one. A raw column that a batch lacks is NaN there."""
    starts = [sum(len(part.values) for part in parts[:number]) for number in range(len(parts))]
    columns = list(dict.fromkeys(key for part in parts for key in part.raw))
    return Scores(
        torch.cat([part.values for part in parts]),
        torch.cat([part.valid for part in parts]),
        {key: torch.cat([part.raw.get(key, torch.full((len(part.values),), torch.nan)) for part in parts]) for key in columns},
        {start + index: reason for start, part in zip(starts, parts, strict=True) for index, reason in part.problems.items()},
    )


class ConstantRewardMonitor:
    """Notices a reward that has given one and the same score to every sample of a run, and so cannot teach anything."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[str, Any]] = {}

    def update(self, scores: Mapping[str, Scores]) -> None:
        """Take in the scores of one iteration, as ``WeightedRewards.score`` gives them. Invalid samples do not count."""
        for name, score in scores.items():
            values = score.values[score.valid]
            if values.numel() == 0:
                continue
            low, high = values.min().item(), values.max().item()
            seen = self._seen.setdefault(name, {"count": 0, "low": low, "high": high})
            seen.update(count=seen["count"] + values.numel(), low=min(seen["low"], low), high=max(seen["high"], high))

    def constant(self) -> dict[str, int]:
        """Name -> number of valid samples, for each reward that gave two samples or more the same score and never another one.

        "total" is left out where it only repeats what its rewards say, that is, where they are all constant.
        """
        found = {name: seen["count"] for name, seen in self._seen.items() if seen["count"] > 1 and seen["low"] == seen["high"]}
        if all(name in found for name in self._seen if name != _TOTAL):
            found.pop(_TOTAL, None)
        return found

    def warnings(self) -> list[str]:
        """One line for each constant reward, with its score and its count of samples; empty when all is well."""
        return [
            f"reward {name} gave the same score, {self._seen[name]['low']:g}, to all {count} samples of the run and teaches nothing; "
            "check that it fits the prompts and the model"
            for name, count in self.constant().items()
        ]

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Name -> {"count": int, "low": float, "high": float}: plain, JSON-ready, and a copy."""
        return {name: dict(seen) for name, seen in self._seen.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Continue from what ``state_dict`` gave."""
        self._seen = {name: dict(seen) for name, seen in state.items()}


def _score_once(name: str, reward: Reward, batch: SampleBatch) -> Scores:
    try:
        scores = reward.score(batch)
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:
        place = "on the prompt"
        if len(batch) > 1:
            for index in range(len(batch) if reward.info.scope == "sample" else 0):
                _score_once(name, reward, _part(batch, index, index + 1))  # the first sample that fails alone raises with its own prompt
            place = f"on {len(batch)} samples together, the first with the prompt"
        advice = "" if isinstance(error, UserError) else "; correct the reward, or let it return valid=False for what it cannot score"
        raise UserError(f"reward {name} failed {place} {_quote(batch.prompts[0])}: {_reason(name, error)}{advice}") from error
    return _checked(name, scores, batch)


def _checked(name: str, scores: object, batch: SampleBatch) -> Scores:
    size = len(batch)
    where = f"for {size} samples, the first with the prompt {_quote(batch.prompts[0])}"
    if not isinstance(scores, Scores) or not isinstance(scores.raw, Mapping):
        kind = f"raw as {type(scores.raw).__name__}" if isinstance(scores, Scores) else type(scores).__name__
        raise UserError(f"reward {name} returned {kind} {where}; return flowrl.types.Scores with a dict of raw columns")
    if taken := [key for key in scores.raw if key in _TAKEN]:
        raise UserError(f"reward {name} returned a raw column called {taken[0]}, which is the name of a metric of its own; call it something else")
    for column, value in [("values", scores.values), ("valid", scores.valid), *((f"raw {key!r}", raw) for key, raw in scores.raw.items())]:
        if not isinstance(value, Tensor):
            raise UserError(f"reward {name} returned {column} as {type(value).__name__} {where}; return a tensor [{size}]")
        if value.shape != (size,):
            shape = list(value.shape)
            raise UserError(f"reward {name} returned {column} of shape {shape} {where}; return one entry per sample, shape [{size}]")
    if not scores.values.is_floating_point() or scores.valid.dtype != torch.bool:
        kinds = f"values of {scores.values.dtype} and valid of {scores.valid.dtype}"
        raise UserError(f"reward {name} returned {kinds} {where}; return torch.float32 and torch.bool")
    values, valid = scores.values.to("cpu", torch.float32), scores.valid.cpu()
    bad = valid & ~values.isfinite()
    if bad.any():
        worst = _first(bad)
        raise UserError(
            f"reward {name} returned {values[worst].item()} for the prompt {_quote(batch.prompts[worst])}; "
            "return a finite score, or valid=False where there is none"
        )
    nan = torch.full_like(values, float("nan"))
    problems = {index: str(scores.problems.get(index, "it gave no reason")) for index in torch.nonzero(~valid).flatten().tolist()}
    return Scores(torch.where(valid, values, nan), valid, {key: raw.cpu() for key, raw in scores.raw.items()}, problems)


def _part(batch: SampleBatch, start: int, stop: int) -> SampleBatch:
    return SampleBatch(
        prompts=batch.prompts[start:stop],
        images=None if batch.images is None else batch.images[start:stop],
        texts=None if batch.texts is None else batch.texts[start:stop],
        group=None if batch.group is None else batch.group[start:stop],
    )


def _first(mask: Tensor) -> int:
    return int(mask.nonzero()[0])


def _reason(name: str, error: BaseException) -> str:
    """What an error says, without the name that a reward gives itself: in the config it may have another."""
    return re.sub(r"^reward [^:\s]+: ", "", str(error)) if isinstance(error, UserError) else describe_error(error)


def _quote(prompt: Prompt) -> str:
    text = " ".join(prompt.text.split())
    return f"'{text}'" if len(text) <= 120 else f"'{text[:117]}...'"
