"""Episodes: a policy and environments take turns. The policy is a function of contexts, so that nothing here knows of models or engines.

Letters: B episodes, T tokens of the longest one, P prompts (groups), S turns of the longest one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from flowrl.core.agent_credit import number_keys
from flowrl.environments.base import Environment, Step
from flowrl.seeds import derive_seed
from flowrl.types import Completions, Prompt, UserError

__all__ = ["Act", "Actions", "Episodes", "run_episodes"]


class Actions(NamedTuple):
    """What a policy says in one turn of N episodes.

    Attributes:
        tokens: N tensors [n] int64, an end token it sampled included.
        log_probs: N tensors [n] float32, as `Completions.log_prob`.
        finished: N truth values (a list, or [N] bool); False where the length limit cut the action.
    """

    tokens: Sequence[Tensor]
    log_probs: Sequence[Tensor]
    finished: Sequence[bool] | Tensor


Act: TypeAlias = Callable[[list[Tensor]], Actions | tuple[Sequence[Tensor], Sequence[Tensor], Sequence[bool] | Tensor]]
"""Contexts (N tensors [n] int64: prompt and all tokens so far) -> `Actions`, or its fields."""


@dataclass(frozen=True, slots=True)
class Episodes:
    """What was said and how it was rewarded.

    Attributes:
        completions: the tokens; the environment's have the number of the turn that they answer, and ``mask`` False. ``finished``: the environment ended the
            episode, and no limit cut its last action. ``texts``: everything after the prompt.
        rewards: [B] float32, sum of the step rewards.
        step_rewards: [B, S] float32, 0 where not present.
        present: [B, S] bool, True for the turns that an episode had; turns 0..n-1.
        turn_start: [B, S] int64, the first token of the policy's turn: prompt and tokens before it are what the turn was sampled from; 0 where not present.
        tool_start: [B] int64, `turn_start` of the first turn that used a tool; -1 = none.
        success: [B] bool.
        keys: B lists, the state before each turn, see `Step.key`.
        actions, observations: B lists of texts; ``observations[i][0]`` is the first one, which stands in the prompt, and the last may have been read by nobody.
        answers: length B, the right last action where the environment says it, else "".
    """

    completions: Completions
    rewards: Tensor
    step_rewards: Tensor
    present: Tensor
    turn_start: Tensor
    tool_start: Tensor
    success: Tensor
    keys: list[list[Hashable]]
    actions: list[list[str]]
    observations: list[list[str]]
    answers: tuple[str, ...]

    def states(self) -> tuple[Tensor, int]:
        """Numbers [B, S] of the states before the turns, and how many there are: `anchor` and `num_anchors` of `agent_credit.gigpo`."""
        return number_keys(self.keys, self.completions.group.tolist(), self.present.shape[1])

    def shared_steps(self) -> tuple[Tensor, int]:
        """Numbers [B, S] of equal actions after equal histories, and how many there are: `key` and `num_keys` of `agent_credit.merged_advantages`."""
        keys: list[list[Hashable]] = []
        for actions, observations in zip(self.actions, self.observations, strict=True):
            keys.append([(tuple(zip(actions[:turn], observations[1 : turn + 1], strict=True)), action) for turn, action in enumerate(actions)])
        return number_keys(keys, self.completions.group.tolist(), self.present.shape[1])


@dataclass(slots=True)
class _Episode:
    """One that is being played; the lists grow token by token and turn by turn."""

    environment: Environment
    group: int
    played: Sequence[Tensor]
    observations: list[str]
    tokens: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    log_prob: list[float] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    turn_start: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    keys: list[Hashable] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    tool_start: int = -1
    is_live: bool = True
    finished: bool = False

    def add(self, tokens: list[int], log_prob: list[float] | None, turn: int) -> None:
        """Append tokens; log_prob None = the policy did not sample them."""
        self.tokens += tokens
        self.mask += [log_prob is not None] * len(tokens)
        self.log_prob += [0.0] * len(tokens) if log_prob is None else log_prob
        self.turn += [turn] * len(tokens)


def run_episodes(
    environment_factory: Callable[[], Environment],
    prompts: Sequence[Prompt],
    counts: Sequence[int],
    act: Act,
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    max_turns: int,
    *,
    seed: int,
    max_tokens: int | None = None,
    pad_token: int = 0,
    encode_prompt: Callable[[Prompt, str], list[int]] | None = None,
    played: Sequence[Sequence[Tensor]] | None = None,
) -> Episodes:
    """Play episodes turn by turn; in each turn one call of ``act`` serves all that are not over, in their order.

    An episode ends, unfinished, after an action that a limit cut, which the environment still judges, after ``max_turns``, or where its answer leaves no room
    for a further token. What the environment says last is not appended.

    Args:
        environment_factory: makes a new environment, see `load_environment`.
        prompts: length P. counts: length P, episodes of each, at least 1; they all have the same seed, so that they start in the same state.
        encode: text of an observation -> token ids, with whatever separates it from what the policy said. decode: token ids -> text, without special tokens.
        max_turns: of an episode, at least 1; the environment may end it earlier.
        seed: everything random in the environments follows from it and the prompt's number.
        max_tokens: of an episode after its prompt, the environment's too; longer actions are cut. None = no limit here.
        pad_token: stands behind the shorter episodes.
        encode_prompt: prompt and first observation -> token ids; None = ``encode`` of the two texts with a space between them.
        played: of each episode the actions of its first turns, which are taken as they are and count as not sampled (``mask`` False): a branch of an earlier
            episode, as REFUEL and trees need.
    Raises:
        ValueError: lengths differ, a number is below 1, or ``act`` returned something of another shape.
        UserError: an environment raised an error, gave a reward that is not finite, or began one prompt in two ways.
    """
    total = sum(counts)
    if len(prompts) != len(counts) or not prompts or min(counts) < 1 or max_turns < 1 or (max_tokens is not None and max_tokens < 1):
        raise ValueError(f"{len(prompts)} prompts, {list(counts)} episodes, {max_turns} turns, {max_tokens} tokens; each must be at least 1")
    if played is not None and len(played) != total:
        raise ValueError(f"played has {len(played)} entries for {total} episodes")
    episodes = _begin(environment_factory, prompts, counts, seed, played)
    begun = {episode.group: episode.observations[0] for episode in episodes}
    prompt_tokens = tuple(
        torch.tensor(_joined(encode, prompt, begun[number]) if encode_prompt is None else encode_prompt(prompt, begun[number]), dtype=torch.int64)
        for number, prompt in enumerate(prompts)
    )
    for turn in range(max_turns):
        live = [episode for episode in episodes if episode.is_live]
        asked = [episode for episode in live if turn >= len(episode.played)]
        sampled: Iterator[tuple[Tensor, Tensor | None, Any]] = iter(())
        if asked:
            actions = Actions(*act([torch.cat([prompt_tokens[episode.group], torch.tensor(episode.tokens, dtype=torch.int64)]) for episode in asked]))
            _check_actions(actions, len(asked))
            sampled = zip(actions.tokens, actions.log_probs, actions.finished, strict=True)
        for episode in live:
            tokens, log_prob, is_whole = (episode.played[turn], None, True) if turn < len(episode.played) else next(sampled)
            room = len(tokens) if max_tokens is None else max_tokens - len(episode.tokens)
            is_whole = bool(is_whole) and len(tokens) <= room
            episode.turn_start.append(len(episode.tokens))
            episode.add(tokens[:room].tolist(), None if log_prob is None else log_prob[:room].tolist(), turn)
            step = _take(episode, decode(tokens[:room].tolist()))
            goes_on = not step.done and is_whole and turn + 1 < max_turns
            answer = encode(step.observation) if goes_on else []
            episode.finished = step.done and is_whole
            episode.is_live = goes_on and (max_tokens is None or len(episode.tokens) + len(answer) < max_tokens)
            if episode.is_live:
                episode.add(answer, None, turn)
        if not any(episode.is_live for episode in episodes):
            break
    return _collect(episodes, prompt_tokens, decode, pad_token)


def _begin(
    environment_factory: Callable[[], Environment],
    prompts: Sequence[Prompt],
    counts: Sequence[int],
    seed: int,
    played: Sequence[Sequence[Tensor]] | None,
) -> list[_Episode]:
    episodes: list[_Episode] = []
    for number, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        for _ in range(count):
            environment = environment_factory()
            first: str = _guarded(environment, "reset", prompt, derive_seed(seed, "environment", number))
            if episodes and episodes[-1].group == number and episodes[-1].observations != [first]:
                raise UserError(f"environment {type(environment).__name__}: reset says {first!r} and {episodes[-1].observations[0]!r} for one prompt and seed")
            episodes.append(_Episode(environment, number, () if played is None else played[len(episodes)], [first]))
    return episodes


def _joined(encode: Callable[[str], list[int]], prompt: Prompt, observation: str) -> list[int]:
    return encode(f"{prompt.text} {observation}" if observation else prompt.text)


def _take(episode: _Episode, action: str) -> Step:
    """Let the environment judge an action, and note what it says."""
    step: Step = _guarded(episode.environment, "step", action)
    if not math.isfinite(step.reward):
        raise UserError(f"environment {type(episode.environment).__name__}: step gave the reward {step.reward}; it must be finite")
    episode.actions.append(action)
    episode.keys.append(step.key)
    episode.rewards.append(float(step.reward))
    episode.observations.append(step.observation)
    if step.tool and episode.tool_start < 0:
        episode.tool_start = episode.turn_start[-1]
    return step


def _guarded(environment: Environment, method: str, *args: object) -> Any:
    """The result of a method; an error in it names the environment."""
    try:
        return getattr(environment, method)(*args)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"environment {type(environment).__name__}: {method} failed with {reason[:300]}") from error


def _check_actions(actions: Actions, count: int) -> None:
    lengths = len(actions.tokens), len(actions.log_probs), len(actions.finished)
    if lengths != (count, count, count):
        raise ValueError(f"act returned {lengths} tokens, log-probabilities and finished for {count} contexts")
    for tokens, log_prob in zip(actions.tokens, actions.log_probs, strict=True):
        if tokens.dim() != 1 or tokens.shape != log_prob.shape or tokens.dtype != torch.int64:
            raise ValueError(
                f"act returned tokens {tuple(tokens.shape)} {tokens.dtype} with log-probabilities {tuple(log_prob.shape)}; needed: [n] each, int64"
            )


def _collect(episodes: Sequence[_Episode], prompt_tokens: tuple[Tensor, ...], decode: Callable[[list[int]], str], pad_token: int) -> Episodes:
    width = max(1, *(len(episode.tokens) for episode in episodes))
    turns = max(len(episode.actions) for episode in episodes)

    def table(name: str, columns: int, padding: float, dtype: torch.dtype) -> Tensor:
        rows = [getattr(episode, name) for episode in episodes]
        return torch.tensor([row + [padding] * (columns - len(row)) for row in rows], dtype=dtype)

    completions = Completions(
        prompt_tokens=prompt_tokens,
        tokens=table("tokens", width, pad_token, torch.int64),
        mask=table("mask", width, False, torch.bool),
        length=torch.tensor([len(episode.tokens) for episode in episodes]),
        group=torch.tensor([episode.group for episode in episodes]),
        finished=torch.tensor([episode.finished for episode in episodes]),
        log_prob=table("log_prob", width, 0.0, torch.float32),
        texts=tuple(decode(episode.tokens) for episode in episodes),
        turn=table("turn", width, 0, torch.int64),
    )
    step_rewards = table("rewards", turns, 0.0, torch.float32)
    return Episodes(
        completions=completions,
        rewards=step_rewards.sum(1),
        step_rewards=step_rewards,
        present=torch.arange(turns) < torch.tensor([len(episode.actions) for episode in episodes])[:, None],
        turn_start=table("turn_start", turns, 0, torch.int64),
        tool_start=torch.tensor([episode.tool_start for episode in episodes]),
        success=torch.tensor([bool(episode.environment.success) for episode in episodes]),
        keys=[episode.keys for episode in episodes],
        actions=[episode.actions for episode in episodes],
        observations=[episode.observations for episode in episodes],
        answers=tuple(str(getattr(episode.environment, "answer", "")) for episode in episodes),
    )
