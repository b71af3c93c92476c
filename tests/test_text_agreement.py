"""What a credit of a language model reads: rewards, weights and prices that it would pass over are refused, and its values are fitted to what the policy is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from text_runs import assert_trains, assign_rewards, text_config

from flowrl.config import load_config
from flowrl.text.credit import CREDITS
from flowrl.trainer import Trainer
from flowrl.types import UserError

TINY = Path(__file__).parent.parent / "configs" / "tiny_text.yaml"
TURNS = "token_credit: turns reads only what the environment gives for each turn"
PRICE = "kl={weight: 0.1, place: reward, form: k1}"
TAKE_PRICES = ("gae", "token_returns")
CREDIT_METHODS = {
    "risk": "risk_po",
    "consistency": "copo",
    "step_gate": "empg",
    "gigpo": "gigpo",
    "igpo": "igpo",
    "salt": "salt",
    "turns": "step_grpo",
    "tree": "tree_po",
    "segments": "spo",
    "branches": "spo_tree",
    "soft_values": "oreo",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["rewards=[{name: arithmetic, minimum: 0.5}]"], f"rewards: the minimum of arithmetic does nothing, since {TURNS}; leave it out"),
        (["shaping=[overlong]"], f"shaping: overlong changes rewards, and {TURNS}; leave it out"),
        (["shaping=[win_rate]"], f"shaping: win_rate changes rewards, and {TURNS}; leave it out"),
        (["reward_weights.kind=hypervolume"], f"reward_weights.kind: hypervolume weighs rewards, and {TURNS}; use fixed"),
        (["reward_weights.kind=gradient", "rewards=[arithmetic, length]"], f"reward_weights.kind: gradient weighs rewards, and {TURNS}; use fixed"),
        (["advantage.aggregate=gdpo"], f"advantage.aggregate: gdpo gives each reward an advantage, and {TURNS}; use aggregate: rewards"),
    ],
)
def test_what_step_grpo_would_not_read_is_refused(overrides: list[str], line: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(TINY, ["method=step_grpo", *overrides])
    assert str(error.value) == line
    assert "turns" not in refusal("method=gigpo", *overrides)


def refusal(*overrides: str) -> str:
    """All lines with which a config is refused; "" where it is not."""
    try:
        load_config(TINY, list(overrides))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["hypervolume", "gradient"])
def test_values_of_oreo_know_no_weights_that_change(kind: str) -> None:
    line = f"reward_weights.kind: {kind} changes what the policy is fitted to, and not what the values of token_credit: soft_values are; use fixed"
    assert refusal("method=oreo", "rewards=[arithmetic, length]", f"reward_weights.kind={kind}") == line


def test_every_credit_either_takes_the_price_of_a_token_or_refuses_it() -> None:
    takes = {name for name, credit in CREDITS.items() if getattr(credit, "takes_price", False)}
    assert takes == set(TAKE_PRICES)
    assert takes | CREDIT_METHODS.keys() | {"answer"} == CREDITS.keys()
    assert refusal("method=reinforce_pp", PRICE) == refusal("method=ppo", PRICE) == ""
    assert refusal(PRICE, "shaping=[kl_price]") == ""


@pytest.mark.parametrize("credit", CREDIT_METHODS)
def test_a_credit_that_would_pass_over_a_price_refuses_it(credit: str) -> None:
    method = f"method={CREDIT_METHODS[credit]}"
    assert load_config(TINY, [method]).token_credit.name == credit
    line = f"kl.place: token_credit: {credit} takes no price off the reward of a token; use kl: {{place: loss, form: k3}}"
    assert refusal(method, PRICE) == line
    assert line in refusal(method, PRICE, "shaping=[kl_price]")
    assert refusal(method, "kl={weight: 0.1, place: loss, form: k3}") == ""


@pytest.mark.parametrize("clip", [0.25, 1e6])
def test_values_of_oreo_are_fitted_to_the_clipped_reward_of_the_policy(folder: Path, clip: float) -> None:
    """The policy has not moved yet, so that a token is worth the reward of its answer; 1.1 is the highest reward here."""
    trainer = Trainer(text_config(folder, "method=oreo", "value.warmup_iterations=0", f"advantage.clip={clip}"))
    assigned = assign_rewards(trainer, [place / 10 for place in range(12)])
    targets: Any = assigned.answers.extra["value_targets"]
    mask = assigned.answers.mask
    expected = torch.arange(12.0).div(10).clamp(max=clip)[:, None].expand(mask.shape)
    torch.testing.assert_close(assigned.advantages[mask], expected[mask])
    torch.testing.assert_close(targets.returns[mask], expected[mask], rtol=1e-4, atol=1e-5)
    assert (assigned.sums["clamped"] > 0) == (clip < 1)


@pytest.mark.parametrize("overrides", [["old_policy={rollout: false}"], ["method=bapo", "objective.updates_per_iteration=1"], ["generation.importance_high=3"]])
def test_what_only_draws_a_warning_trains(folder: Path, overrides: list[str]) -> None:
    assert_trains(text_config(folder, *overrides, "rollout={groups_per_iteration: 3, group_size: 4}"), 1)
