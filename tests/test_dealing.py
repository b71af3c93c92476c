"""Which process has which groups, and what the updates of an iteration find on each."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from text_runs import text_config

from flowrl.dealing import dealt, exchanged
from flowrl.trainer import Trainer


@pytest.mark.parametrize(("world", "updates"), list(itertools.product((1, 2, 3, 4, 6, 8), (1, 2, 3, 4, 6, 16))))
def test_groups_and_those_of_every_update_are_spread_evenly(world: int, updates: int) -> None:
    for num_groups in (world, world + 1, 2 * world + 1, 3 * updates + world, world * updates, 5 * world * updates + 2):
        shares = [dealt(num_groups, (rank, world), updates) for rank in range(world)]
        assert sorted(g for share in shares for g in share) == list(range(num_groups))
        assert all(share == sorted(share) and share[0] == rank for rank, share in enumerate(shares))
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        for update in range(updates):
            there = [sum(g % updates == update for g in share) for share in shares]  # groups of a single unit
            assert max(there) - min(there) <= 1


def test_by_hand() -> None:
    assert [dealt(8, (rank, 2), 2) for rank in (0, 1)] == [[0, 3, 4, 7], [1, 2, 5, 6]]
    assert [dealt(7, (rank, 2), 3) for rank in (0, 1)] == [[0, 2, 4, 6], [1, 3, 5]]  # no common factor: in turn
    assert [dealt(8, (rank, 4), 2) for rank in range(4)] == [[0, 7], [1, 4], [2, 5], [3, 6]]
    assert dealt(5, (0, 1), 4) == [0, 1, 2, 3, 4]


def test_what_an_update_of_one_process_holds_is_shared_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The units of each update are those of one process, and no process has more than its share of them."""
    monkeypatch.syspath_prepend(str(tmp_path))
    trainer = Trainer(text_config(tmp_path, "objective.updates_per_iteration=2"))
    for units, most in ((1, 2), (2, 4), (3, 6)):  # of 8 groups, 4 to a process: with one unit each, 4 an update
        whole = trainer.split(torch.arange(8).repeat_interleave(units), list(range(8)), (1, 0))
        expected = [Counter((part // units).tolist()) for part in whole]
        found: list[Counter[int]] = [Counter(), Counter()]
        for rank in (0, 1):
            mine = dealt(8, (rank, 2), 2)
            parts = trainer.split(torch.arange(4).repeat_interleave(units), mine, (1, 0))
            assert max(len(part) for part in parts) == most
            for update, part in enumerate(parts):
                found[update] += Counter(mine[unit // units] for unit in part.tolist())
        assert found == expected


def test_one_process_keeps_what_it_has() -> None:
    parcel = {"a": torch.ones(2)}
    assert exchanged([parcel], torch.device("cpu"))[0] is parcel
