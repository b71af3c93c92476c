"""Episode reward: what the environment of an agent gave, the sum of its steps' rewards. Only for runs with the config section `environment`.

    value = metadata["episode_reward"], which the sampler puts there for each episode

Source: ours.
"""

from __future__ import annotations

import math

import torch

from flowrl.types import RewardInfo, SampleBatch, Scores, UserError

__all__ = ["EpisodeReward"]


class EpisodeReward:
    """The sum of the rewards of an episode's steps. See the module's text."""

    def __init__(self) -> None:
        self.info = RewardInfo(
            name="episode",
            description="sum of what the environment gave for the steps of an agent's episode; for runs with `environment`",
            low=-math.inf,
            high=math.inf,
            source="flowrl, programmatic",
            batch_size=1024,
            reads=("metadata",),
            runs_on="cpu",
        )

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing to load."""

    def score(self, batch: SampleBatch) -> Scores:
        """values [B] float32.

        Raises:
            UserError: a sample is no episode.
        """
        found = [prompt.metadata.get("episode_reward") for prompt in batch.prompts]
        if any(not isinstance(value, int | float) for value in found):
            raise UserError("reward episode: there are no episodes; set environment, or choose another reward")
        return Scores(torch.tensor(found, dtype=torch.float32), torch.ones(len(found), dtype=torch.bool))
