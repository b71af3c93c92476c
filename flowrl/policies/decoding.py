"""Answers of a language model, sampled token by token with a KV cache.

A prompt goes through the network once for all answers of its group, and an answer that is over leaves the batch. All randomness of a group is drawn from its
own generator before the first token, one uniform number for each place of each answer; a token is where that number falls in the distribution's cumulative
sum. So answers do not depend on what else is in the batch, on how many answers fit into memory at once, or on the number of processes, but for numbers that
fall within rounding of a boundary between two tokens.

Letters: R rows of a batch, V vocabulary, P prompts, B answers, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flowrl.sections import GenerationConfig
from flowrl.types import Completions

__all__ = ["Batch", "DecodingModel", "filtered", "generate", "inverse_cdf"]

_KEEP_SHARE = 0.75


class DecodingModel(Protocol):
    """What decoding asks of a policy.

    Attributes:
        pad: number of the padding token. ends: numbers of the tokens that end an answer.
    """

    pad: int
    device: torch.device

    @property
    def ends(self) -> Collection[int]: ...

    def new_cache(self) -> Any:
        """An empty one, with `flowrl.policies.caches.GrowingCache.batch_select_indices` and ``move_right``."""
        ...

    def next_logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, real: int, last: Tensor | None = None) -> Tensor:
        """Logits [R, V] after place ``last`` [R] (None = the end) of new tokens ``ids`` [R, n] at ``positions`` [R, n]; ``mask`` [R, past + n] is True for
        tokens that may be seen. ``real`` of the tokens are counted, the others are padding.
        """
        ...

    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Texts without special tokens."""
        ...

    def in_parts(self, count: int, work: Callable[[slice], Tensor]) -> Tensor:
        """``work`` on ``count`` answers, as many at a time as fit."""
        ...


def filtered(log_p: Tensor, settings: GenerationConfig) -> Tensor:
    """Log-probabilities [R, V] with -inf where top-k, then top-p, then min-p rule a token out, as in transformers; not renormalised.

    top_p keeps the fewest of the likeliest tokens whose probability, of what top-k left, reaches it; min_p those of at least min_p times the likeliest.
    """
    if settings.top_k and settings.top_k < log_p.shape[-1]:
        log_p = log_p.masked_fill(log_p < log_p.topk(settings.top_k).values[:, -1:], -math.inf)
    if settings.top_p < 1:
        ordered, places = log_p.sort(dim=-1, descending=True, stable=True)
        share = ordered.softmax(-1, dtype=torch.float64)
        dropped = share.cumsum(-1) - share >= settings.top_p
        log_p = log_p.masked_fill(torch.zeros_like(dropped).scatter(-1, places, dropped), -math.inf)
    if settings.min_p > 0:
        log_p = log_p.masked_fill(log_p < log_p.amax(-1, keepdim=True) + math.log(settings.min_p), -math.inf)
    return log_p


def inverse_cdf(log_p: Tensor, uniform: Tensor) -> Tensor:
    """The tokens [R] int64 in whose share of 0..1, in the order of the vocabulary, the numbers ``uniform`` [R] in [0, 1) fall.

    Args:
        log_p: [R, V], need not be normalised; -inf is never drawn.
    """
    mass = log_p.softmax(-1, dtype=torch.float64).cumsum(-1)
    total = mass[:, -1:]
    level = torch.minimum(uniform.to(mass)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, level, right=True)[:, 0]


@dataclass(frozen=True, slots=True)
class _Order:
    """What all parts of one call share; uniform [B, max_new_tokens] None = the likeliest tokens."""

    prompts: Sequence[Tensor]
    settings: GenerationConfig
    group: list[int]
    prefix: list[Tensor]
    uniform: Tensor | None


@dataclass(frozen=True, slots=True)
class _Answers:
    """Room for what is said, [B, max_new_tokens] and [B], on the CPU."""

    tokens: Tensor
    log_prob: Tensor
    length: Tensor
    finished: Tensor


def generate(
    model: DecodingModel,
    prompts: Sequence[Tensor],
    counts: Sequence[int],
    settings: GenerationConfig,
    generators: Sequence[torch.Generator],
    *,
    prefix: Sequence[Tensor] | None = None,
    prefix_log_prob: Sequence[Tensor] | None = None,
    greedy: bool = False,
) -> Completions:
    """Answers to prompts; a prompt is any sequence of tokens, so this also goes on with a dialogue, a tree's node or an answer that was cut.

    Args:
        prompts: P tensors [n] int64, n >= 1. counts: answers to each.
        generators: one for each prompt, on the CPU; each is advanced by counts x max_new_tokens numbers whatever happens. Not used by ``greedy``.
        prefix: B tensors int64, group by group: tokens that the answers begin with. They count towards max_new_tokens; no end token or stop text is looked
            for in them. None = nothing.
        prefix_log_prob: B tensors float32: the policy sampled the prefixes itself, with these log-probabilities; None = it did not, and ``mask`` is False.
        greedy: take the likeliest token.
    Returns:
        Answers of at most max_new_tokens tokens, on the model's device. A stop text stays in its answer.
    Raises:
        ValueError: lengths that do not fit each other, an empty prompt, or a prefix of max_new_tokens or more.
    """
    group = [number for number, count in enumerate(counts) for _ in range(count)]
    total, longest = len(group), settings.max_new_tokens
    _check(prompts, counts, generators, longest, total, prefix, prefix_log_prob)
    starts = [torch.zeros(0, dtype=torch.int64)] * total if prefix is None else [part.to("cpu", torch.int64) for part in prefix]
    uniform = None
    if not greedy and total:
        drawn = [torch.rand(count, longest, generator=own, dtype=torch.float64) for own, count in zip(generators, counts, strict=True)]
        uniform = torch.cat(drawn)
    answers = _Answers(
        torch.full((total, longest), model.pad),
        torch.zeros(total, longest),
        torch.tensor([len(start) for start in starts], dtype=torch.int64),
        torch.zeros(total, dtype=torch.bool),
    )
    order = _Order([prompt.to("cpu", torch.int64) for prompt in prompts], settings, group, starts, uniform)

    def part(rows: slice) -> Tensor:
        _say(model, order, rows, answers)
        return answers.length[rows]

    if total:
        model.in_parts(total, part)
    end = max(1, int(answers.length.max())) if total else 1
    place = torch.arange(end)
    given = torch.tensor([len(start) for start in starts], dtype=torch.int64)
    mask = place < answers.length[:, None]
    log_prob = answers.log_prob[:, :end]
    if prefix_log_prob is None:
        mask = mask & (place >= given[:, None])
    else:
        for row, values in enumerate(prefix_log_prob):
            log_prob[row, : len(values)] = values.to(log_prob)
    tokens = answers.tokens[:, :end]
    said = [row[:length] for row, length in zip(tokens.tolist(), answers.length.tolist(), strict=True)]
    return Completions(
        prompt_tokens=tuple(order.prompts),
        tokens=tokens.to(model.device),
        mask=mask.to(model.device),
        length=answers.length.to(model.device),
        group=torch.tensor(group, dtype=torch.int64, device=model.device),
        finished=answers.finished.to(model.device),
        log_prob=log_prob.to(model.device),
        texts=tuple(model.decode(said)),
    )


def _check(
    prompts: Sequence[Tensor],
    counts: Sequence[int],
    generators: Sequence[torch.Generator],
    longest: int,
    total: int,
    prefix: Sequence[Tensor] | None,
    prefix_log_prob: Sequence[Tensor] | None,
) -> None:
    if not len(prompts) == len(counts) == len(generators):
        raise ValueError(f"{len(prompts)} prompts, {len(counts)} counts and {len(generators)} generators")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt without tokens")
    if prefix is None and prefix_log_prob is not None:
        raise ValueError("prefix_log_prob without prefix")
    if prefix is None:
        return
    if len(prefix) != total or any(len(part) >= longest for part in prefix):
        raise ValueError(f"{total} answers need as many prefixes, of fewer than {longest} tokens each")
    if prefix_log_prob is not None and [len(part) for part in prefix_log_prob] != [len(part) for part in prefix]:
        raise ValueError("prefix_log_prob does not fit prefix")


class Batch:
    """Rows that are under way: their cache, what they may see of it, and the logits of their next token. Padding stands on the left of each row: between tokens
    it would count as one where places are counted (windows, ALiBi).
    """

    def __init__(self, model: DecodingModel) -> None:
        self.model, self.cache = model, model.new_cache()
        self.mask = torch.zeros(0, 0, dtype=torch.bool, device=model.device)
        self.seen = torch.zeros(0, dtype=torch.int64, device=model.device)  # tokens of each row that are in the cache
        self.logits = torch.zeros(0, 0, device=model.device)

    def begin(self, texts: Sequence[Tensor]) -> None:
        """Put texts into the cache, each at least a token."""
        device, total = self.model.device, sum(map(len, texts))
        ids = pad_sequence(list(texts), batch_first=True, padding_value=self.model.pad, padding_side="left").to(device)
        self.seen = torch.tensor([len(text) for text in texts], device=device)
        place = torch.arange(ids.shape[1], device=device) - (ids.shape[1] - self.seen)[:, None]
        self.mask = place >= 0
        self.logits = self.model.next_logits(ids, self.mask, place.clamp_min(0), self.cache, total)

    def go_on(self, texts: Sequence[Tensor]) -> None:
        """Put more tokens into the cache; a row may get none."""
        device, lengths = self.model.device, [len(text) for text in texts]
        ids = pad_sequence(list(texts), batch_first=True, padding_value=self.model.pad).to(device)
        sizes, place = torch.tensor(lengths, device=device), torch.arange(ids.shape[1], device=device).expand_as(ids)
        self.mask = torch.cat((self.mask, place < sizes[:, None]), 1)
        last = (sizes - 1).clamp_min(0)
        found = self.model.next_logits(ids, self.mask, self.seen[:, None] + torch.minimum(place, last[:, None]), self.cache, sum(lengths), last)
        self.logits = torch.where((sizes > 0)[:, None], found, self.logits)
        self.seen = self.seen + sizes
        if min(lengths) < max(lengths):
            by = ids.shape[1] - sizes
            self.cache.move_right(by)
            self.mask = self.mask.gather(1, (torch.arange(self.mask.shape[1], device=device) - by[:, None]) % self.mask.shape[1])

    def advance(self, token: Tensor, live: Tensor, num_live: int) -> None:
        """One more token [R] in each row; rows that are not ``live`` are only in the way."""
        self.mask = torch.cat((self.mask, live[:, None]), 1)
        self.logits = self.model.next_logits(token[:, None], self.mask, self.seen[:, None], self.cache, num_live)
        self.seen = self.seen + live

    def select(self, rows: Tensor) -> None:
        """Keep these rows, any of them several times."""
        self.cache.batch_select_indices(rows)
        self.mask, self.seen, self.logits = self.mask[rows], self.seen[rows], self.logits[rows]


def _begin(model: DecodingModel, order: _Order, rows: slice) -> Batch:
    """A batch of answers whose prompts and prefixes are read: each prompt once, and each prefix of a prompt once."""
    keys = [(number, tuple(start.tolist())) for number, start in zip(order.group[rows], order.prefix[rows], strict=True)]
    contexts = list(dict.fromkeys(keys))
    prompts = list(dict.fromkeys(number for number, _ in contexts))
    batch = Batch(model)
    batch.begin([order.prompts[number] for number in prompts])
    _pick(batch, [prompts.index(number) for number, _ in contexts], len(prompts))
    if any(start for _, start in contexts):
        batch.go_on([torch.tensor(start, dtype=torch.int64) for _, start in contexts])
    where = {context: row for row, context in enumerate(contexts)}
    _pick(batch, [where[key] for key in keys], len(contexts))
    return batch


def _pick(batch: Batch, rows: list[int], present: int) -> None:
    if rows != list(range(present)):
        batch.select(torch.tensor(rows, device=batch.model.device))


def _say(model: DecodingModel, order: _Order, rows: slice, answers: _Answers) -> None:
    """Fill in the answers of some rows."""
    most = order.settings.max_new_tokens
    batch = _begin(model, order, rows)
    said: list[list[int]] = [start.tolist() for start in order.prefix[rows]]
    log_prob = [[0.0] * len(text) for text in said]
    finished = [False] * len(said)
    live = [True] * len(said)
    present = list(range(len(said)))  # the answer of each row of the batch
    while True:
        token, value = _draw(batch.logits, order, rows.start, present, [len(said[number]) for number in present], model.ends)
        drawn, values = token.tolist(), value.tolist()
        speaking = [row for row, number in enumerate(present) if live[number]]
        for row in speaking:
            said[present[row]].append(drawn[row])
            log_prob[present[row]].append(values[row])
        stopped = _stopped(model, order.settings, [present[row] for row in speaking], said)
        for row in speaking:
            number = present[row]
            finished[number] = drawn[row] in model.ends or number in stopped
            live[number] = not finished[number] and len(said[number]) < most
        left = [row for row in speaking if live[present[row]]]
        if not left:
            break
        if len(left) <= _KEEP_SHARE * len(present):
            batch.select(torch.tensor(left, device=model.device))
            token, present = token[torch.tensor(left, device=model.device)], [present[row] for row in left]
        batch.advance(token, torch.tensor([live[number] for number in present], device=model.device), len(left))
    for number, (text, each) in enumerate(zip(said, log_prob, strict=True)):
        answers.tokens[rows.start + number, : len(text)] = torch.tensor(text)
        answers.log_prob[rows.start + number, : len(text)] = torch.tensor(each)
    answers.length[rows], answers.finished[rows] = torch.tensor([len(text) for text in said]), torch.tensor(finished)


def _draw(logits: Tensor, order: _Order, start: int, present: list[int], places: list[int], ends: Collection[int]) -> tuple[Tensor, Tensor]:
    """Tokens [R] at their places in the answers, and their log-probabilities [R] before anything is ruled out."""
    settings = order.settings
    log_p = (logits / settings.temperature).log_softmax(-1)
    allowed = log_p
    if any(place < settings.min_new_tokens for place in places):
        early = torch.tensor([place < settings.min_new_tokens for place in places], device=logits.device)
        none = log_p.index_fill(-1, torch.tensor(sorted(ends), dtype=torch.int64, device=logits.device), -math.inf)
        allowed = torch.where(early[:, None], none, log_p)
    if order.uniform is None:
        token = allowed.argmax(-1)
    else:
        where = torch.tensor([[start + number, min(place, settings.max_new_tokens - 1)] for number, place in zip(present, places, strict=True)])
        token = inverse_cdf(filtered(allowed, settings), order.uniform[where[:, 0], where[:, 1]].to(logits.device))
    return token, log_p.gather(-1, token[:, None])[:, 0]


def _stopped(model: DecodingModel, settings: GenerationConfig, numbers: list[int], said: list[list[int]]) -> set[int]:
    """Those of some answers that their last token has given a stop text. Every token is at least a byte, so that it lies in the last few."""
    numbers = [number for number in numbers if len(said[number]) > settings.min_new_tokens] if settings.stop else []
    if not numbers:
        return set()
    reach = max(len(stop.encode()) for stop in settings.stop) + 4
    tails = model.decode([said[number][-reach:] for number in numbers])
    hits = [(number, tail) for number, tail in zip(numbers, tails, strict=True) if any(stop in tail for stop in settings.stop)]
    before = model.decode([said[number][-reach:-1] for number, _ in hits])
    return {number for (number, tail), old in zip(hits, before, strict=True) if any(tail.count(stop) > old.count(stop) for stop in settings.stop)}
