"""Rewards: what a run is trained for. One reward per file, found by name through ``rewards.registry``.

A new reward is a file here and one line in ``rewards.table.REWARDS``; a private one is ``module:attribute`` in the config, and a package of its own brings some
through the entry-point group ``flowrl.rewards``, see ``rewards.plugins``.
"""

from rewards.composite import ConstantRewardMonitor, WeightedRewards
from rewards.registry import FunctionReward, list_rewards, load_reward
from rewards.table import REWARDS

__all__ = ["REWARDS", "ConstantRewardMonitor", "FunctionReward", "WeightedRewards", "list_rewards", "load_reward"]
