"""Credit of an agent's turns: GiGPO, IGPO, SALT, Step-GRPO. Their episodes are those of flowrl/text/agents.py.

Letters: B episodes, T tokens, S turns of the longest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from flowrl.core.agent_credit import gigpo, merged_advantages, step_zscore, turn_advantages, turn_gains
from flowrl.core.token_advantages import steps_to_decisions
from flowrl.environments import Episodes
from flowrl.estimation import Estimator
from flowrl.text.answers import Answers
from flowrl.text.credit_base import sample_advantages
from flowrl.text.parts import Stateless
from flowrl.types import Completions

__all__ = ["GigpoCredit", "IgpoCredit", "SaltCredit", "TurnCredit"]


def _episodes(answers: Answers) -> tuple[Episodes, Tensor]:
    """The iteration's episodes, and the turn of each token."""
    found: Episodes = answers.extra["episodes"]
    turn = answers.completions.turn
    assert turn is not None
    return found, turn


class GigpoCredit(Stateless):
    """GiGPO (arXiv:2505.10978): the episode compared with its group, and each turn with those of the group from the same state, see `gigpo`.

    `advantage.scale` says whether both parts are divided by their spread (group_std) or not (none); eps, ddof and singleton are those of `advantage`.

    Args:
        gamma: discount of the steps' rewards, in (0, 1]. weight: of the turns' part, >= 0.
        episode_over: what the episodes' statistics count; steps lets long episodes weigh more.
    """

    def __init__(self, gamma: float = 0.95, weight: float = 1.0, episode_over: Literal["trajectories", "steps"] = "trajectories") -> None:
        if not 0 < gamma <= 1 or weight < 0:
            raise ValueError(f"gamma is {gamma:g} and weight {weight:g}; a discount is in (0, 1], and a weight not negative")
        if episode_over not in ("trajectories", "steps"):
            raise ValueError(f"episode_over is {episode_over}; known: trajectories, steps")
        self.gamma, self.weight, self.episode_over = gamma, weight, episode_over

    def __call__(self, answers: Answers, estimator: Estimator) -> Tensor:
        episodes, turn = _episodes(answers)
        anchor, num_anchors = episodes.states()
        a = answers.config.advantage
        found = gigpo(
            answers.rewards,
            episodes.step_rewards.double(),
            answers.group,
            answers.valid,
            episodes.present,
            anchor,
            answers.num_groups,
            num_anchors,
            gamma=self.gamma,
            weight=self.weight,
            normalize=a.scale == "group_std",
            episode_over="steps" if self.episode_over == "steps" else "trajectories",
            eps=a.eps,
            ddof=a.ddof,
            singleton=a.singleton,
        )
        return steps_to_decisions(found, turn, answers.mask)


class TurnCredit(Stateless):
    """Step-GRPO (arXiv:2505.22095): what the environment gave for a turn, compared with the same turn of the group's other episodes, see `step_zscore`.

    `rewards` are not read: they are only shown, and say which episodes have a score. `advantage.scale` says whether it is divided by the spread (group_std) or
    not (none); eps and ddof are those of `advantage`.
    """

    def __call__(self, answers: Answers, estimator: Estimator) -> Tensor:
        episodes, turn = _episodes(answers)
        a, rewards = answers.config.advantage, episodes.step_rewards.double()
        divide = a.scale == "group_std"
        found = step_zscore(rewards, answers.group, answers.valid, episodes.present, answers.num_groups, normalize=divide, eps=a.eps, ddof=a.ddof)
        return steps_to_decisions(found, turn, answers.mask)


class SaltCredit(Stateless):
    """SALT (arXiv:2510.20022): turns that episodes of a group share, equal actions after equal histories, get the mean of their episodes' advantages."""

    def __call__(self, answers: Answers, estimator: Estimator) -> Tensor:
        episodes, turn = _episodes(answers)
        key, num_keys = episodes.shared_steps()
        found = merged_advantages(sample_advantages(answers, estimator), key, episodes.present, answers.valid, num_keys)
        return steps_to_decisions(found, turn, answers.mask)


class IgpoCredit(Stateless):
    """IGPO (arXiv:2510.14967): a turn is rewarded with how much likelier it makes the right answer, see `turn_gains` and `turn_advantages`.

    The environment says what is right (`Environment.answer`); without an answer nothing is gained. eps and ddof are those of `advantage`.

    Args:
        form: position, first or joint. gamma: discount, in (0, 1]. outcome_weight: of the episode's reward, the last turn's.
    """

    def __init__(self, form: Literal["position", "first", "joint"] = "position", gamma: float = 1.0, outcome_weight: float = 1.0) -> None:
        if form not in ("position", "first", "joint"):
            raise ValueError(f"form is {form}; known: position, first, joint")
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma is {gamma:g}, and a discount is in (0, 1]")
        self.form, self.gamma, self.outcome_weight = form, gamma, outcome_weight

    def __call__(self, answers: Answers, estimator: Estimator) -> Tensor:
        episodes, turn = _episodes(answers)
        log_prob, known = self._answer_log_prob(answers, episodes)
        a = answers.config.advantage
        gains = torch.where(known[:, None], turn_gains(log_prob, episodes.present), 0.0)
        counted, total = answers.add(float(known.sum())), answers.add(float(gains.sum()))
        answers.metrics["turn/gain"] = total / max(counted, 1.0)
        found = turn_advantages(
            gains,
            answers.rewards,
            answers.group,
            answers.valid,
            episodes.present,
            answers.num_groups,
            form="position" if self.form == "position" else "first" if self.form == "first" else "joint",
            gamma=self.gamma,
            outcome_weight=self.outcome_weight,
            eps=a.eps,
            ddof=a.ddof,
        )
        return steps_to_decisions(found, turn, answers.mask)

    @torch.no_grad()
    def _answer_log_prob(self, answers: Answers, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """[B, S] float64, mean log-probability of the right answer's tokens before each turn, and [B] bool, whether there is a right answer."""
        policy, c = answers.policy, answers.completions
        gold = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in episodes.answers]
        asked: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}  # (what is known, right answer) -> number; equal ones are evaluated once
        place = torch.full(episodes.present.shape, -1, dtype=torch.int64)
        for row, group in enumerate(c.group.tolist()):
            prompt, tokens = c.prompt_tokens[group].tolist(), c.tokens[row].tolist()
            for step in torch.nonzero(episodes.present[row])[:, 0].tolist() if gold[row] else []:
                before = (*prompt, *tokens[: int(episodes.turn_start[row, step])])
                place[row, step] = asked.setdefault((before, tuple(gold[row])), len(asked))
        values = torch.zeros(len(asked) + 1, dtype=torch.float64)
        with policy.in_step():
            if asked:
                probes = _probes([before for before, _ in asked], [right for _, right in asked], policy.pad)
                log_prob = policy.token_output(probes, torch.arange(len(asked))).log_prob.double().cpu()
                values[:-1] = log_prob.sum(1) / probes.length
        answers.extra["measured_tokens"] = answers.extra.get("measured_tokens", 0) + sum(len(before) + len(right) - 1 for before, right in asked)
        return values[place], torch.tensor([bool(right) for right in gold])


def _probes(contexts: Sequence[Sequence[int]], said: Sequence[Sequence[int]], pad: int) -> Completions:
    """Given answers to contexts, to be evaluated."""
    width, length = max(map(len, said)), torch.tensor([len(tokens) for tokens in said])
    mask = torch.arange(width) < length[:, None]
    return Completions(
        prompt_tokens=tuple(torch.tensor(context, dtype=torch.int64) for context in contexts),
        tokens=torch.tensor([[*tokens, *[pad] * (width - len(tokens))] for tokens in said]),
        mask=mask,
        length=length,
        group=torch.arange(len(said)),
        finished=torch.ones(len(said), dtype=torch.bool),
        log_prob=torch.zeros(mask.shape),
        texts=("",) * len(said),
    )
