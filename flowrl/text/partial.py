"""T-PPO: answers that stop at a window and go on in the next iteration. See `PartialRollout`.

Letters: B answers, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from flowrl.config import Config
from flowrl.seeds import generator
from flowrl.text.rollout_base import Path, Rolled, collected, continuation_tokens
from flowrl.text.sources import Asked

if TYPE_CHECKING:
    from flowrl.policies.causal_lm import CausalLmPolicy

__all__ = ["PartialRollout"]


class PartialRollout:
    """An answer gets at most ``partial.window`` tokens an iteration. A group keeps its prompt while one of its answers is under way; one that is finished
    makes place for a new answer to the same prompt.

    State: the answers that are under way, of all processes.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, config: Config, policy: CausalLmPolicy) -> None:
        assert config.partial is not None
        self.config, self.policy, self.window = config, policy, config.partial.window
        policy.check_generation(config.generation, given="partial")
        self._open: dict[int, tuple[int, list[tuple[list[int], list[float]]]]] = {}  # group -> prompt number, what its answers begin with
        self._mine: dict[int, tuple[int, list[tuple[list[int], list[float]]]]] = {}

    def groups(self, fresh: list[int]) -> list[int]:
        """Those under way keep their prompt."""
        return [self._open[number][0] if number in self._open else index for number, index in enumerate(fresh)]

    def __call__(self, asked: Asked, counts: Sequence[int]) -> Rolled:
        config, numbers, iteration = self.config, asked.numbers, asked.iteration
        encoded, limit = self.policy.encode(asked.prompts), config.generation.max_new_tokens
        begun = [[Path(list(t), list(p), []) for t, p in self._open[number][1]] if number in self._open else [] for number in numbers]
        begun = [paths or [Path([], [], []) for _ in range(size)] for paths, size in zip(begun, counts, strict=True)]
        grown: list[list[Path]] = [list(paths) for paths in begun]
        sampled = 0
        for start in sorted({len(path.tokens) for paths in begun for path in paths}):
            rows = [(place, member, path) for place, paths in enumerate(begun) for member, path in enumerate(paths) if len(path.tokens) == start]
            places = sorted({place for place, _, _ in rows})
            length = min(limit, start + self.window)
            found = self.policy.generate(
                [encoded[place] for place in places],
                [sum(place == other for other, _, _ in rows) for place in places],
                config.generation.model_copy(update={"max_new_tokens": length, "min_new_tokens": min(length, config.generation.min_new_tokens)}),
                [generator(config.seed, "tokens", iteration, numbers[place], start) for place in places],
                prefix=[torch.tensor(path.tokens, dtype=torch.int64) for _, _, path in rows],
                prefix_log_prob=[torch.tensor(path.log_prob, dtype=torch.float32) for _, _, path in rows],
            )
            sampled += continuation_tokens(encoded, [place for place, _, _ in rows], [path.tokens for _, _, path in rows], found.length.tolist())
            for row, (place, member, _) in enumerate(rows):
                grown[place][member] = Path.of(found, row, [])
        self._mine = {}
        for index, number, paths in zip(asked.indices, numbers, grown, strict=True):
            rest = [([], []) if _is_over(path, limit) else (path.tokens, path.log_prob) for path in paths]
            if any(tokens for tokens, _ in rest):
                self._mine[number] = (int(index), rest)
        completions = collected(self.policy, encoded, grown)
        given = torch.tensor([len(path.tokens) for paths in begun for path in paths])
        done = torch.tensor([_is_over(path, limit) for paths in grown for path in paths])
        fresh = torch.arange(completions.tokens.shape[1]) >= given[:, None]
        return Rolled(completions, sampled, extra={"done": done, "fresh": fresh})

    def meet(self, gather: Callable[[Any], list[Any]]) -> None:
        """Tell all processes what is under way."""
        self._open = {number: slot for part in gather(self._mine) for number, slot in part.items()}

    def state_dict(self) -> dict[str, Any]:
        """What is under way."""
        return {"open": dict(self._open)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self._open = dict(state["open"])


def _is_over(path: Path, limit: int) -> bool:
    return path.is_finished or len(path.tokens) >= limit
