"""Tasks of several turns for language models: the protocol, two small environments, and the loop that plays them."""

from __future__ import annotations

from flowrl.environments.base import Environment, Step
from flowrl.environments.episodes import Act, Actions, Episodes, run_episodes
from flowrl.environments.registry import ENVIRONMENTS, load_environment

__all__ = ["ENVIRONMENTS", "Act", "Actions", "Environment", "Episodes", "Step", "load_environment", "run_episodes"]
