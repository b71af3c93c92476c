"""What an agent acts in: the protocol, and the words for one step."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple, Protocol, Self, runtime_checkable

from flowrl.types import Prompt

__all__ = ["Environment", "Step"]


class Step(NamedTuple):
    """What an environment answers to an action.

    Attributes:
        observation: what the policy reads next; "" = nothing. Nobody reads that of the last step.
        reward: of this step, finite, higher is better.
        done: the episode is over.
        key: names the state in which the action was taken: equal keys in a group are the same state, which is what GiGPO compares.
        tool: the action used a tool, and the observation is its answer.
    """

    observation: str
    reward: float
    done: bool
    key: Hashable
    tool: bool = False


@runtime_checkable
class Environment(Protocol):
    """A task of several turns, all of whose randomness follows from the seed of ``reset``.

    ``step`` answers any text within milliseconds, whatever a model may write: what makes no sense costs a turn. It may also have ``answer``, the text of the
    last action that would be right (IGPO asks how likely the policy finds it), and ``check_prompts(prompts)``, which raises a UserError for the first prompt
    that it cannot work with, before any work starts.

    Attributes:
        success: whether the episode reached its goal; False before its end.
    """

    success: bool

    def reset(self, prompt: Prompt, seed: int) -> str:
        """Begin an episode; returns the first observation, which is appended to the prompt, "" = nothing. The same for the same arguments."""
        ...

    def step(self, action: str) -> Step:
        """Take an action.

        Raises:
            RuntimeError: no episode is under way.
        """
        ...

    def copy(self) -> Self:
        """The same episode a second time, independent of this one: a branch of a tree."""
        ...
