"""Win rate inside a group: in what part of its comparisons with the other pictures of its prompt does a picture win? (Pref-GRPO)

    value_i = mean over j != i of w_ij,   w_ij = 1 for a win, 0 for a loss, 1/2 for a tie; the mean of both orders of the two pictures if both are asked

When the scores of a group differ by little, standardising them blows up noise; win rates keep their spread. The comparisons come from one of two judges:

    reward      scores of any other reward. With ``temperature`` tau, w_ij = sigmoid((r_i - r_j) / tau) instead.
    url         a vision-language model behind an OpenAI-compatible endpoint, which sees two pictures at a time (rewards/judge.py)

An answer that cannot be read is a comparison that did not take place. A picture that got less than half of its comparisons is invalid. Unless every pair of a
group was compared (``opponents``, or answers that cannot be read), wins against strong and weak opponents are told apart by the model of Bradley and Terry:

    P(i beats j) = p_i / (p_i + p_j),     value_i = mean over j != i of p_i / (p_i + p_j)

fitted by Hunter's MM iterations, where every picture also has half a win and half a loss against an opponent of strength 1, which keeps strengths finite.

Source: Pref-GRPO, arXiv:2508.20751: all unordered pairs of a group, win rate as the reward; it counts an answer that cannot be read as half a win for both.
Ours: dropped answers, the order of the two pictures (a model may prefer a place), fewer opponents, the sigmoid, and what the prior of 1/2 is.
Letters: B samples, n members of a group, M comparisons, H and W pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from flowrl.types import Prompt, Reward, RewardInfo, SampleBatch, Scores, UserError
from rewards.composite import WeightedRewards
from rewards.groups import groups_of
from rewards.network import check_choice
from rewards.pictures import not_finite, pictures_of
from rewards.registry import load_reward

__all__ = ["Preference", "WinRate", "bradley_terry", "schedule"]

Verdict = Literal["first", "second", "tie"] | None

_POINTS = {"first": 1.0, "second": 0.0, "tie": 0.5}
_PAIRS = 64  # given to a judge at a time
_ITERATIONS = 10_000  # far more than a group needs; each takes microseconds


class Preference(Protocol):
    """Compares pictures two by two."""

    def prefer(self, first: Tensor, second: Tensor, prompts: Sequence[str]) -> Sequence[Verdict]:
        """Which of two pictures fits its prompt better, M times; pictures [M, 3, H, W] float32 in [0, 1]. None = no answer that could be read."""
        ...


def schedule(num: int, opponents: int | None, generator: torch.Generator) -> list[tuple[int, int]]:
    """Pairs of a round robin of ``num`` players: all, or so many rounds, drawn at random, that each meets ``opponents`` others.

    With an odd number one player pauses in each round; there is then one round more, and some meet one more.
    """
    order = torch.randperm(num, generator=generator).tolist()
    seats: list[int | None] = order + [None] * (num % 2)
    rounds = []
    for turn in range(len(seats) - 1):  # the first stays, the others move round
        moved = [seats[0], *seats[1 + turn :], *seats[1 : 1 + turn]]
        pairs = zip(moved[: len(seats) // 2], reversed(moved[len(seats) // 2 :]), strict=True)
        rounds.append([(a, b) for a, b in pairs if a is not None and b is not None])
    if opponents is not None and opponents < num - 1:
        chosen = torch.randperm(len(rounds), generator=generator)[: opponents + num % 2]
        rounds = [rounds[turn] for turn in chosen.tolist()]
    return [pair for pairs in rounds for pair in pairs]


def bradley_terry(wins: Tensor, tolerance: float = 1e-10) -> Tensor:
    """Strengths [n] float64 > 0 from wins[i, j] >= 0, how often i beat j (a tie is half a win for both), with the prior of the module's text.

    Hunter, 2004: p_i <- W_i / sum_j N_ij / (p_i + p_j), until no log p_i moves by more than the tolerance.
    """
    wins = wins.double()
    met, won = wins + wins.T, wins.sum(1) + 0.5
    strength = torch.ones_like(won)
    for _ in range(_ITERATIONS):
        before = strength
        strength = won / ((met / (before[:, None] + before)).sum(1) + 1 / (before + 1))
        if (strength.log() - before.log()).abs().max() <= tolerance:
            break
    return strength


@dataclass(frozen=True, slots=True)
class _Comparisons:
    """Of one group: the pair [M, 2] of each comparison, and what the first of the pair won [M] float64, NaN where there is no verdict."""

    pairs: Tensor
    points: Tensor


class WinRate:
    """The part of the comparisons with the other samples of its prompt that a sample wins. See the module's text.

    Args:
        reward: name or import string of the reward whose scores are compared; "pickscore" if no judge is given at all.
        reward_args: its ``args``.
        url, model: of an OpenAI-compatible endpoint that judges instead. judge_args: further arguments of rewards/judge.py's PairJudge.
        judge: an object with ``prefer`` that judges instead, from Python.
        temperature: for ``reward`` only: a win is the sigmoid of the difference of the scores divided by this, > 0. None = 1, 0 or 1/2.
        opponents: how many others a sample is compared with. None = all.
        orders: "coin" = each pair is shown in one order, drawn at random; "both" = in both, at twice the cost.
        seed: of the draws, which depend on it, the prompt and the size of the group alone.
    Raises:
        UserError: arguments out of range, or that do not fit together.
    """

    def __init__(
        self,
        reward: str | None = None,
        reward_args: Mapping[str, Any] | None = None,
        url: str | None = None,
        model: str | None = None,
        judge_args: Mapping[str, Any] | None = None,
        judge: Preference | None = None,
        temperature: float | None = None,
        opponents: int | None = None,
        orders: Literal["coin", "both"] = "coin",
        seed: int = 0,
    ) -> None:
        judges = [name for name, given in (("reward", reward), ("url", url), ("judge", judge)) if given is not None]
        if len(judges) > 1:
            raise UserError(f"reward win_rate: {' and '.join(judges)} are given; one of them is the judge, remove the other")
        if (url is None) != (model is None):
            raise UserError("reward win_rate: a judge behind an endpoint needs both url and model")
        by_scores = url is None and judge is None
        if temperature is not None and not (by_scores and _is_number(temperature) and 0 < temperature < math.inf):
            raise UserError(f"reward win_rate: temperature must be a finite number above 0, and needs a `reward` as the judge; got {temperature!r}")
        if opponents is not None and (isinstance(opponents, bool) or not isinstance(opponents, int) or opponents < 1):
            raise UserError(f"reward win_rate: opponents must be a whole number of 1 or more, or nothing for all, not {opponents!r}")
        check_choice("win_rate", "orders", orders, ("coin", "both"))
        self.name = (reward or "pickscore") if by_scores else None
        self.reward_args = dict(reward_args or {})
        self.url, self.model, self.judge_args = url, model, dict(judge_args or {})
        self.temperature, self.opponents, self.orders, self.seed = temperature, opponents, orders, seed
        self._judge = judge
        self._inner: Reward | None = None
        self._scored: WeightedRewards | None = None
        self._loaded = False
        self.info = RewardInfo(
            name="win_rate",
            description=f"part of the comparisons with the other samples of its prompt that a sample wins, judged by {self.name or model or 'your own judge'}",
            low=0.0,
            high=1.0,
            source="Pref-GRPO, arXiv:2508.20751",
            reads=("prompt", "images") if reward is None else (),
            scope="group",
            runs_on="device" if url is None else "network",
            extra="" if url is None else "remote",
        )

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """What the reward that judges asks of its prompts.

        Raises:
            UserError: from that reward.
        """
        if self.name is not None:
            WeightedRewards([(self.name, 1.0, self._reward())]).check_prompts(prompts)

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the reward that judges, or make the judge; a second call loads that reward once more, which only moves it.

        That reward is loaded in the precision that it asks for itself, unless another one than float32 is given.

        Raises:
            UserError: the reward that judges cannot be made or loaded, or is itself one of groups; the judge cannot be made.
        """
        if self.name is not None:
            if self._scored is None:
                self._scored = WeightedRewards([(self.name, 1.0, self._reward())])
            self._scored.load(device, None if dtype == torch.float32 else dtype)
        elif self._judge is None:
            from rewards.judge import PairJudge

            self._judge = PairJudge(**{"url": self.url, "model": self.model, "both_orders": False, **self.judge_args})  # the orders are drawn here
        self._loaded = True

    def to(self, device: torch.device) -> None:
        """Move the reward that judges."""
        move = getattr(self._inner, "to", None)
        if move is not None:
            move(device)

    def close(self) -> None:
        """Give back what the judge holds. It can be loaded again."""
        for part in (self._inner, self._judge):
            close = getattr(part, "close", None)
            if close is not None:
                close()
        self._judge = None if self.url is not None else self._judge
        self._loaded = False

    def score(self, batch: SampleBatch) -> Scores:
        """Win rates of the samples of a batch inside their groups.

        Returns:
            values [B] float32 in [0, 1]; raw["win_rate_comparisons"] [B] float32, how many comparisons of the sample have a verdict, and where a reward
            judges raw["win_rate_score"] [B] float32, its score. Invalid: what the judging reward calls invalid, or a picture with NaN or infinite pixels (it
            is then no opponent either); a sample alone in its group; a sample with fewer than half of its comparisons.
        Raises:
            UserError: the judging reward or the judge failed or broke its promise; no pictures for a judge.
            ValueError: B = 0.
            RuntimeError: ``load`` was not called.
        """
        if not self._loaded:
            raise RuntimeError("reward win_rate: load must be called before score")
        if len(batch) == 0:
            raise ValueError("reward win_rate: cannot score an empty batch")
        usable, problems, given = self._usable(batch)
        values, answered = torch.full((2, len(batch)), torch.nan)
        groups = [group[usable[group]] for group in groups_of(batch)]
        problems |= {int(group[0]): "no other sample of its prompt to compare it with" for group in groups if len(group) == 1}
        groups = [group for group in groups if len(group) > 1]
        drawn = [self._draw(batch.prompts[int(group[0])].text, len(group)) for group in groups]
        for group, compared in zip(groups, self._compare(batch, groups, drawn, given), strict=True):
            rates, verdicts, enough = _rates(compared, len(group))
            answered[group] = verdicts.float()
            values[group[enough]] = rates[enough].float()
            problems |= dict.fromkeys(group[~enough].tolist(), "the judge gave a verdict in fewer than half of its comparisons")
        valid = torch.tensor([index not in problems for index in range(len(batch))])
        return Scores(values, valid, {"win_rate_comparisons": answered} | ({} if given is None else {"win_rate_score": given}), problems)

    def _reward(self) -> Reward:
        if self._inner is None:
            assert self.name is not None, "only where a reward judges"
            made = load_reward(self.name, self.reward_args)
            if made.info.scope != "sample":
                raise UserError(f"reward win_rate: {self.name} looks at a whole {made.info.scope}; let a reward judge that scores a sample alone")
            self._inner = made
        return self._inner

    def _usable(self, batch: SampleBatch) -> tuple[Tensor, dict[int, str], Tensor | None]:
        """Samples that can be compared [B] bool, why each other cannot, and the scores [B] of the judging reward, if one judges."""
        if self._scored is None:
            finite = pictures_of("win_rate", batch)[1]
            return finite, not_finite(finite), None
        assert self.name is not None, "scores come from a reward"
        scores = self._scored.score(batch)[self.name]
        return scores.valid, {index: f"{self.name}: {reason}" for index, reason in scores.problems.items()}, scores.values

    def _draw(self, prompt: str, num: int) -> Tensor:
        """Comparisons [M, 2] of a group, in the order in which the judge sees the two."""
        digest = hashlib.blake2b(f"{self.seed}\0{prompt}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        pairs = torch.tensor(schedule(num, self.opponents, generator))
        if self.orders == "both":
            return torch.cat([pairs, pairs.flip(1)])
        heads = torch.randint(2, (len(pairs),), generator=generator).bool()
        return torch.where(heads[:, None], pairs.flip(1), pairs)

    def _compare(self, batch: SampleBatch, groups: list[Tensor], drawn: list[Tensor], given: Tensor | None) -> list[_Comparisons]:
        if given is not None:
            differences = [given[group][pairs].double() @ torch.tensor([1.0, -1.0], dtype=torch.float64) for group, pairs in zip(groups, drawn, strict=True)]
            points = [(d.sign() + 1) / 2 if self.temperature is None else torch.sigmoid(d / self.temperature) for d in differences]
        else:
            samples = torch.cat([torch.zeros(0, 2, dtype=torch.int64), *(group[pairs] for group, pairs in zip(groups, drawn, strict=True))])
            points = list(self._ask(batch, samples).split([len(pairs) for pairs in drawn]))
        return [_Comparisons(pairs, won) for pairs, won in zip(drawn, points, strict=True)]

    def _ask(self, batch: SampleBatch, samples: Tensor) -> Tensor:
        """Points [M] float64 of the first of each pair of samples [M, 2]; NaN where the judge gave no verdict."""
        assert self._judge is not None, "score has checked it"
        images = pictures_of("win_rate", batch)[0].detach()
        points: list[float] = []
        for part in samples.split(_PAIRS):
            if len(part) == 0:
                continue
            prompts = [batch.prompts[i].text for i in part[:, 0].tolist()]
            verdicts = list(self._judge.prefer(images[part[:, 0]], images[part[:, 1]], prompts))
            if len(verdicts) != len(part) or not all(verdict is None or verdict in _POINTS for verdict in verdicts):
                raise UserError(f"reward win_rate: the judge answered {verdicts!r} to {len(part)} pairs; it must say first, second, tie or None of each")
            points += [math.nan if verdict is None else _POINTS[verdict] for verdict in verdicts]
        return torch.tensor(points, dtype=torch.float64)


def _rates(compared: _Comparisons, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Win rates [n] float64, comparisons with a verdict [n], and whether these are at least half of those that were due [n] bool."""
    first, second = compared.pairs.T
    answered = ~compared.points.isnan()
    due, met, won = torch.zeros(3, num, num, dtype=torch.float64)
    due.index_put_((first, second), torch.ones(len(first), dtype=torch.float64), accumulate=True)
    first, second, points = first[answered], second[answered], compared.points[answered]
    met.index_put_((first, second), torch.ones_like(points), accumulate=True)
    won.index_put_((first, second), points, accumulate=True)
    won.index_put_((second, first), 1 - points, accumulate=True)
    due, met = due + due.T, met + met.T
    enough = (met.sum(1) > 0) & (2 * met.sum(1) >= due.sum(1))
    if (met > 0).sum() == num * (num - 1):
        share = won / met.clamp_min(1)  # of each pair, over its orders
    else:
        strength = bradley_terry(won / met.clamp_min(1))
        share = strength[:, None] / (strength[:, None] + strength)
    return (share.sum(1) - share.diagonal()) / (num - 1), met.sum(1), enough


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
