"""Ranks of a list are not those of rounding; the slow copy is measured as every other policy is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rows import seeded
from text_runs import text_config
from torch import Tensor

from flowrl.core.list_losses import lipo
from flowrl.trainer import Trainer
from flowrl.types import Decisions

GROUP = {"group": torch.zeros(4, dtype=torch.int64), "num_groups": 1}
MASK = torch.ones(4, 3, dtype=torch.bool)
REWARDS = torch.tensor([0.0, 1.0, 0.5, 0.25])


def gradient(reference: Tensor, **args: float) -> Tensor:
    log_prob = torch.zeros(4, 3, requires_grad=True)
    decisions = Decisions(log_prob, torch.zeros(4, 3), REWARDS[:, None].expand(4, 3), MASK)
    loss = lipo(decisions, **GROUP, ref_log_prob=reference, beta=0.5, **args).loss
    (found,) = torch.autograd.grad(loss.sum(), log_prob)
    return found


def test_at_the_reference_rounding_decides_no_rank():
    exact = gradient(torch.zeros(4, 3))
    for seed in range(5):
        noise = 1e-5 * torch.randn(4, 3, generator=seeded(seed))
        torch.testing.assert_close(gradient(noise), exact, rtol=1e-3, atol=1e-5)
    other = [gradient(1e-5 * torch.randn(4, 3, generator=seeded(seed)), tie=1e-9) for seed in range(5)]
    assert max(float((found - exact).abs().max()) for found in other) > 0.1  # so it was


def test_scores_that_differ_by_more_than_a_tie_rank_by_their_size():
    """beta u: 0, 0, 0, 0.006: one more than a tie of 0.001 puts the last answer first, and leaves it where it was with a tie of 0.1."""
    reference = torch.zeros(4, 3)
    reference[3] = -0.004
    exact = gradient(torch.zeros(4, 3))
    assert float((gradient(reference) - exact).abs().max()) > 0.1
    torch.testing.assert_close(gradient(reference, tie=0.1), exact, rtol=0.05, atol=0.01)


def test_the_slow_copy_is_measured_as_other_policies_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its log-probabilities stand beside theirs, and its pass is counted once."""
    monkeypatch.syspath_prepend(tmp_path)
    trainer = Trainer(text_config(tmp_path, "method=nash_mp", "rollout={groups_per_iteration: 3, group_size: 4}"))
    metrics, _ = trainer.iterate(1)
    assert metrics["nfe/used"] == metrics["nfe/minimum"] > 0
