"""The average of the weights, by hand."""

from __future__ import annotations

import pytest
import torch

from flowrl.policies.ema import Ema


def parameter(value: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor([value]))


def set_to(p: torch.nn.Parameter, value: float) -> None:
    p.data.fill_(value)


def test_the_average_moves_by_one_minus_decay_towards_the_parameter() -> None:
    p = parameter(1.0)
    ema = Ema([p], decay=0.75, every=1, warmup=False)
    set_to(p, 5.0)
    ema.update()
    assert ema.average[0].item() == 2.0  # 0.75 * 1 + 0.25 * 5
    set_to(p, 10.0)
    ema.update()
    assert ema.average[0].item() == 4.0  # 0.75 * 2 + 0.25 * 10


def test_it_averages_only_every_so_many_updates() -> None:
    p = parameter(0.0)
    ema = Ema([p], decay=0.5, every=3, warmup=False)
    seen = []
    for value in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0):
        set_to(p, value)
        ema.update()
        seen.append(ema.average[0].item())
    assert seen == [0.0, 0.0, 2.0, 2.0, 2.0, 17.0]  # 0.5 * 0 + 0.5 * 4, then 0.5 * 2 + 0.5 * 32


def test_the_warm_up_counts_optimiser_updates() -> None:
    # After n = 4 updates the decay is 5/14, after n = 8 it is 9/18 = 1/2; 0.9 is reached when (1 + n) / (10 + n) = 0.9, at n = 80.
    p = parameter(0.0)
    ema = Ema([p], decay=0.9, every=4, warmup=True)
    set_to(p, 14.0)
    for _ in range(4):
        ema.update()
    assert ema.average[0].item() == pytest.approx(9.0)  # (1 - 5/14) * 14
    set_to(p, 1.0)
    for _ in range(4):
        ema.update()
    assert ema.average[0].item() == pytest.approx(5.0)  # 1/2 * 9 + 1/2 * 1
    ema.num_updates = 79
    ema.update()
    assert ema.average[0].item() == pytest.approx(0.9 * 5.0 + 0.1 * 1.0)


def test_within_applied_the_parameters_are_the_average_and_afterwards_their_own_bits_again() -> None:
    p = parameter(0.1)
    ema = Ema([p], decay=0.5, every=1, warmup=False)
    set_to(p, 0.3)
    ema.update()
    before = p.detach().clone()
    with ema.applied():
        assert p.item() == pytest.approx(0.2)
        assert torch.equal(p.detach(), ema.average[0])
    assert torch.equal(p.detach(), before)
    with pytest.raises(ZeroDivisionError), ema.applied():
        raise ZeroDivisionError
    assert torch.equal(p.detach(), before)
    assert ema.average[0].item() == pytest.approx(0.2)


def test_the_state_continues_where_it_stopped() -> None:
    p, q = parameter(1.0), parameter(1.0)
    whole, first = Ema([p], decay=0.9, every=2, warmup=True), Ema([q], decay=0.9, every=2, warmup=True)
    for value in (2.0, 3.0, 4.0):
        for x, e in ((p, whole), (q, first)):
            set_to(x, value)
            e.update()
    second = Ema([q], decay=0.9, every=2, warmup=True)
    second.load_state_dict(first.state_dict())
    for x, e in ((p, whole), (q, second)):
        set_to(x, 5.0)
        e.update()
    assert torch.equal(whole.average[0], second.average[0])
    assert second.average[0].item() != first.average[0].item()
