"""TreePO: answers that share beginnings, and the credit of the branches. See `TreeRollout` and `TreeCredit`.

Letters: B answers, T tokens, D depths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.core.token_advantages import tree_advantages
from flowrl.estimation import Estimator
from flowrl.seeds import generator
from flowrl.text.answers import Answers
from flowrl.text.credit_base import whitened
from flowrl.text.parts import Stateless
from flowrl.text.rollout_base import Path, Rolled, collected, continuation_tokens
from flowrl.text.sources import Asked
from flowrl.text_sections import TreeConfig

if TYPE_CHECKING:
    from flowrl.policies.causal_lm import CausalLmPolicy

__all__ = ["TreeCredit", "TreeRollout"]


class TreeRollout(Stateless):
    """Answers of a group as the leaves of a tree, which forks at the ends of segments.

    At the prompt and at the end of each segment, an answer that is under way may go on as several, until the group has all its leaves; who forks is drawn.
    When no answer is under way and leaves are missing, random leaves are begun anew from a random end of a segment, and do not fork any more.

    Raises:
        UserError: the model cannot go on from tokens that are given.
    """

    def __init__(self, config: Config, policy: CausalLmPolicy) -> None:
        assert config.tree is not None
        self.config, self.policy, self.tree = config, policy, config.tree
        policy.check_generation(config.generation, given="tree")

    def groups(self, fresh: list[int]) -> list[int]:
        """As they come."""
        return fresh

    def meet(self, gather: Callable[[Any], list[Any]]) -> None:
        """Nothing is shared."""

    def __call__(self, asked: Asked, counts: Sequence[int]) -> Rolled:
        prompts, numbers, iteration = asked.prompts, asked.numbers, asked.iteration
        encoded, limit = self.policy.encode(prompts), self.config.generation.max_new_tokens
        self._nodes, self._sampled = 0, 0
        leaves: list[list[Path]] = [[] for _ in prompts]
        live = [[Path([], [], [self._node()])] for _ in prompts]
        depth = 0
        while any(live):
            draws = [generator(self.config.seed, "tree", iteration, number, depth) for number in numbers]
            now = zip(live, leaves, counts, draws, strict=True)
            forked = [_forked(paths, size - len(done), self.tree, depth, draw) if paths else [] for paths, done, size, draw in now]
            depth += 1
            grown = self._grow(encoded, forked, min(limit, depth * self.tree.segment), draws)
            for number, paths in enumerate(grown):
                for path in paths:
                    path.nodes.append(self._node())
                over = [path.is_finished or len(path.tokens) >= limit for path in paths]
                leaves[number] += [path for path, is_over in zip(paths, over, strict=True) if is_over]
                live[number] = [path for path, is_over in zip(paths, over, strict=True) if not is_over]
        draws = [generator(self.config.seed, "tree", iteration, number, "again") for number in numbers]
        again = [_again(done, size - len(done), self.tree.segment, draw) for done, size, draw in zip(leaves, counts, draws, strict=True)]
        if any(again):
            for done, more in zip(leaves, self._grow(encoded, again, limit, draws), strict=True):
                done += more
        return Rolled(collected(self.policy, encoded, leaves, ancestors=True), self._sampled)

    def _node(self) -> int:
        self._nodes += 1
        return self._nodes - 1

    def _grow(self, prompts: Sequence[Tensor], paths: Sequence[Sequence[Path]], length: int, draws: Sequence[torch.Generator]) -> list[list[Path]]:
        """Each path of each group, grown to ``length`` or its end."""
        asked = [number for number, group in enumerate(paths) if group]
        rows = [(number, path) for number in asked for path in paths[number]]
        found = self.policy.generate(
            [prompts[number] for number in asked],
            [len(paths[number]) for number in asked],
            self.config.generation.model_copy(update={"max_new_tokens": length, "min_new_tokens": min(length, self.config.generation.min_new_tokens)}),
            [draws[number] for number in asked],
            prefix=[torch.tensor(path.tokens, dtype=torch.int64) for _, path in rows],
            prefix_log_prob=[torch.tensor(path.log_prob, dtype=torch.float32) for _, path in rows],
        )
        self._sampled += continuation_tokens(prompts, [number for number, _ in rows], [path.tokens for _, path in rows], found.length.tolist())
        grown: list[list[Path]] = [[] for _ in paths]
        for row, (number, path) in enumerate(rows):
            grown[number].append(Path.of(found, row, list(path.nodes)))
        return grown


def _forked(paths: Sequence[Path], room: int, tree: TreeConfig, depth: int, draw: torch.Generator) -> list[Path]:
    """Paths that go on, some several times: ``room`` of them at most, and at most ``branches`` (at the prompt ``roots``) for each."""
    most = tree.roots if depth == 0 and tree.roots is not None else tree.branches
    times = [1] * len(paths)
    for _ in range(most - 1):
        for place in torch.randperm(len(paths), generator=draw).tolist():
            if sum(times) < room:
                times[place] += 1
    return [path for path, count in zip(paths, times, strict=True) for _ in range(count)]


def _again(leaves: Sequence[Path], missing: int, segment: int, draw: torch.Generator) -> list[Path]:
    """Beginnings of random leaves, up to a random end of a segment."""
    found = []
    for _ in range(missing):
        leaf = leaves[int(torch.randint(len(leaves), (1,), generator=draw))]
        whole = int(torch.randint((len(leaf.tokens) - 1) // segment + 1, (1,), generator=draw))
        found.append(Path(leaf.tokens[: whole * segment], leaf.log_prob[: whole * segment], leaf.nodes[: whole + 1]))
    return found


class TreeCredit(Stateless):
    """TreePO (arXiv:2508.17445): each answer is compared with those below each node that it passes, see `flowrl.core.token_advantages.tree_advantages`.

    Without a tree it is REINFORCE++ with the group's mean as its baseline.

    Args:
        weight: of the depths: by the number of answers below the node ("size"), or equal ("mean").
        skip_constant: leave out depths > 0 at which all rewards are equal. whitened: divide by the spread of all tokens and subtract their mean.
    """

    def __init__(self, weight: Literal["size", "mean"] = "size", skip_constant: bool = False, whitened: bool = True) -> None:
        if weight not in ("size", "mean"):
            raise ValueError(f"weight is {weight}; known: size, mean")
        self.weight, self.skip_constant, self.whitened = weight, skip_constant, whitened

    def __call__(self, answers: Answers, estimator: Estimator) -> Tensor:
        ancestors = answers.completions.ancestors
        if ancestors is None:
            ancestors = answers.group[:, None]
        found = tree_advantages(
            answers.rewards,
            ancestors,
            answers.valid,
            int(ancestors.max()) + 1,
            weight="size" if self.weight == "size" else "mean",
            skip_constant=self.skip_constant,
            singleton=answers.config.advantage.singleton,
        )
        if not self.whitened:
            return found
        return whitened(answers, found[:, None].expand_as(answers.mask))
