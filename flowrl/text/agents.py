"""Agents: episodes of several turns in an environment as the answers of a group. Credit of their turns is in flowrl/text/turns.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.environments import Actions, Environment, load_environment, run_episodes
from flowrl.environments.base import Step
from flowrl.seeds import derive_seed, generator
from flowrl.text.parts import Stateless
from flowrl.text.rollout_base import Rolled
from flowrl.text.sources import Asked
from flowrl.types import Prompt, UserError

if TYPE_CHECKING:
    from flowrl.policies.causal_lm import CausalLmPolicy

__all__ = ["EpisodeRollout"]

_MARK = "\u241e"  # stands for an answer where the chat template is looked at


class _Seeded:
    """An environment whose randomness follows from a seed of its own, not from its place among the episodes of a process."""

    def __init__(self, environment: Environment, seed: int) -> None:
        self._environment, self._seed = environment, seed

    @property
    def success(self) -> bool:
        return self._environment.success

    @property
    def answer(self) -> str:
        return str(getattr(self._environment, "answer", ""))

    def reset(self, prompt: Prompt, seed: int) -> str:
        return self._environment.reset(prompt, self._seed)

    def step(self, action: str) -> Step:
        return self._environment.step(action)

    def copy(self) -> Any:
        return type(self)(self._environment.copy(), self._seed)


class _Speaker:
    """The policy in episodes: contexts -> actions. It keeps in mind which episode a context belongs to, so that its random numbers are that episode's.

    Args:
        owners: (group, member) of each episode, in their order. draw: generator of a group's first turn (member None), or of an episode's later one.
    """

    def __init__(
        self, policy: CausalLmPolicy, config: Config, owners: Sequence[tuple[int, int]], draw: Callable[[int, int | None, int], torch.Generator], greedy: bool
    ) -> None:
        self.policy, self.config, self.draw, self.greedy = policy, config, draw, greedy
        self.sampled, self._turn = 0, 0
        self._said: list[tuple[tuple[int, int], list[int]]] = [(owner, []) for owner in owners]

    def __call__(self, contexts: list[Tensor]) -> Actions:
        known = [context.tolist() for context in contexts]
        owners = self._owners(known)
        if self._turn == 0:
            numbers = list(dict.fromkeys(group for group, _ in owners))
            prompts = [contexts[[group for group, _ in owners].index(number)] for number in numbers]
            counts = [sum(group == number for group, _ in owners) for number in numbers]
            draws = [self.draw(number, None, 0) for number in numbers]
        else:
            prompts, counts, draws = contexts, [1] * len(contexts), [self.draw(*owner, self._turn) for owner in owners]
        found = self.policy.generate(prompts, counts, self.config.generation, draws, greedy=self.greedy)
        lengths = found.length.tolist()
        self.sampled += sum(map(len, prompts)) + sum(length - 1 for length in lengths)
        tokens, log_probs = found.tokens.cpu(), found.log_prob.cpu()
        said = [tokens[row, :length] for row, length in enumerate(lengths)]
        self._said = [(owner, context + action.tolist()) for owner, context, action in zip(owners, known, said, strict=True)]
        self._turn += 1
        return Actions(said, [log_probs[row, :length] for row, length in enumerate(lengths)], found.finished.cpu())

    def _owners(self, contexts: Sequence[list[int]]) -> list[tuple[int, int]]:
        """Those that are still there, in their order: a context goes on from what its episode had said."""
        rest = iter(self._said)
        found = []
        for context in contexts:
            owner, before = next(rest)
            while context[: len(before)] != before:
                owner, before = next(rest)
            found.append(owner)
        return found


class EpisodeRollout(Stateless):
    """Episodes of the run's environment as answers. Their own reward, the sum of their steps', stands in the metadata ``episode_reward`` of the prompts that
    rewards see; the reward ``episode`` reads it. The episodes of a group begin in the same state.

    Args:
        prompts: sets of them that will be asked.
    Raises:
        UserError: the environment cannot be made or used with a prompt, or an episode would not fit into the model's context.
    """

    def __init__(self, config: Config, policy: CausalLmPolicy, prompts: Sequence[Sequence[Prompt]]) -> None:
        assert config.environment is not None
        self.config, self.policy, self.settings = config, policy, config.environment
        self.make = load_environment(self.settings.name, self.settings.args)
        self.max_tokens = self.settings.max_tokens
        for some in prompts:
            self._check(some)

    def _check(self, prompts: Sequence[Prompt]) -> None:
        """Before any work starts: whether the environment can work with prompts, and how long an episode may become."""
        made = self.make()
        check: Callable[[Sequence[Prompt]], None] | None = getattr(made, "check_prompts", None)
        if check is not None:
            check(prompts)
        if self.policy.context is None:
            return
        longest = max(len(self._prompt(prompt, made.reset(prompt, 0))) for prompt in prompts)
        room, turn = self.policy.context - longest, self.config.generation.max_new_tokens
        if room < turn + (self.settings.max_tokens or 1):
            asked = "" if self.settings.max_tokens is None else f"{self.settings.max_tokens} tokens of an episode before its last turn and "
            raise UserError(
                f"environment.max_tokens: a prompt of {longest} tokens leaves {room} of the model's context of {self.policy.context}, and {asked}"
                f"{turn} of a turn (generation.max_new_tokens) are asked for; lower them"
            )
        self.max_tokens = min(self.max_tokens or room, room - turn)

    def groups(self, fresh: list[int]) -> list[int]:
        """As they come."""
        return fresh

    def meet(self, gather: Callable[[Any], list[Any]]) -> None:
        """Nothing is shared."""

    def __call__(self, asked: Asked, counts: Sequence[int]) -> Rolled:
        seed, iteration = self.config.seed, asked.iteration

        def draw(group: int, member: int | None, turn: int) -> torch.Generator:
            return generator(seed, "tokens", iteration, asked.numbers[group], *(() if member is None else (member, turn)))

        return self.play(asked.prompts, counts, [derive_seed(seed, "environment", iteration, number) for number in asked.numbers], draw)

    def play(
        self,
        prompts: Sequence[Prompt],
        counts: Sequence[int],
        seeds: Sequence[int],
        draw: Callable[[int, int | None, int], torch.Generator],
        *,
        greedy: bool = False,
    ) -> Rolled:
        """Episodes. seeds: of each prompt's environment."""
        owners = [(group, member) for group, count in enumerate(counts) for member in range(count)]
        speaker = _Speaker(self.policy, self.config, owners, draw, greedy)
        begun = iter(owners)

        def make() -> Environment:
            group, _ = next(begun)
            made = self.make()
            named = type(type(made).__name__, (_Seeded,), {})  # messages name the environment by its class
            seeded: Environment = named(made, seeds[group])
            return seeded

        episodes = run_episodes(
            make,
            prompts,
            counts,
            speaker,
            self._reply,
            lambda tokens: self.policy.decode([tokens])[0],
            self.settings.max_turns,
            seed=0,
            max_tokens=self.max_tokens,
            pad_token=self.policy.pad,
            encode_prompt=self._prompt,
        )
        totals, groups = episodes.rewards.tolist(), episodes.completions.group.tolist()
        shown = [replace(prompts[g], metadata={**prompts[g].metadata, "episode_reward": total}) for g, total in zip(groups, totals, strict=True)]
        count = float(len(groups))
        means = {"episode/success": (float(episodes.success.sum()), count), "episode/turns": (float(episodes.present.sum()), count)}
        return Rolled(episodes.completions, speaker.sampled, shown, {"episodes": episodes}, means)

    def _prompt(self, prompt: Prompt, observation: str) -> list[int]:
        """Tokens of a prompt and the first thing that the environment says."""
        if observation:
            messages = prompt.metadata.get("messages")
            if messages is not None:
                last = {**messages[-1], "content": f"{messages[-1]['content']} {observation}"}
                prompt = replace(prompt, metadata={**prompt.metadata, "messages": [*messages[:-1], last]})
            prompt = replace(prompt, text=f"{prompt.text} {observation}")
        found: list[int] = self.policy.encode([prompt])[0].tolist()
        return found

    def _reply(self, observation: str) -> list[int]:
        """Tokens of what the environment says, and of what stands between it and the agent's words."""
        from flowrl.policies.language_models import rendered  # transformers takes seconds to import

        if not observation:
            return []
        tokenizer = self.policy.tokenizer
        ends: list[int] = []
        if self.settings.reply is not None:
            text = self.settings.reply.replace("{observation}", observation)
        elif tokenizer.chat_template is None:
            text = f"\n{observation}\n"
        else:
            messages = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}, {"role": "user", "content": observation}]
            text, ends = rendered(tokenizer, messages).rpartition(_MARK)[2], sorted(self.policy.ends)
        tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens[1:] if tokens and tokens[0] in ends and not self.config.generation.stop else tokens  # the agent has said its end token
