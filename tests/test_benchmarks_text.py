"""benchmarks/text.py: what it counts, and the page that it writes. The runs themselves are no test."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from flowrl.config import load_config

FILE = Path(__file__).parent.parent / "benchmarks" / "text.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_text", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save(folder: Path, method: str, seed: int, after: float, **facts: Any) -> None:
    row = {"method": method, "seed": seed, "budget": 100, "tokens": 110, "iterations": 3, "rewards": [after], "rows": 1_000_000, "wasted": 0, "seconds": 2.0}
    row |= {"before": {"eval": [0.25, 0.1], "unseen": [0.5, 0.1]}, "after": {"eval": [after, 0.1], "unseen": [0.5, 0.1]}, "commit": "abc"}
    (folder / f"{method}-{seed}.json").write_text(json.dumps(row | facts))


def test_the_page_is_sorted_and_compares_gains_seed_by_seed(bench: ModuleType, tmp_path: Path) -> None:
    for method, gains in {"dpo": (0.0, 0.5), "grpo": (0.25, 0.25), "ppo": (0.5, 0.5), "rloo": (0.125, 0.0), "aspo": (0.25, 0.25)}.items():
        for seed, gain in enumerate(gains):
            save(tmp_path, method, seed, 0.25 + gain)
    page = bench.table(tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")][2:]
    assert rows[0][0] == "ppo" and rows[-1][0] == "rloo" and {row[0] for row in rows[1:4]} == {"dpo", "grpo", "aspo"}
    assert {row[0]: row[6] for row in rows} == {"ppo": "+", "dpo": "=", "grpo": "", "aspo": "=", "rloo": "-"}
    assert rows[0][1:6] == ["2", "0.250", "0.750", "0.500 ± 0.000", "0.000 ± 0.000"]
    assert next(row for row in rows if row[0] == "rloo")[4] == f"0.062 ± {12.706 * 0.0625:.3f}"
    assert "in every run: aspo. No prompt" in page and "are the least that the method needs" in page
    assert "--seeds 2 " in page and "Not complete" not in page
    save(tmp_path, "ppo", 2, 0.75)
    assert "**Not complete**: 4 of 5 methods have fewer than 3 seeds." in bench.table(tmp_path)
    save(tmp_path, "ppo", 0, 0.75, wasted=3)
    assert "Above the minimum: {'ppo'}." in bench.table(tmp_path)


def test_every_override_is_of_a_method_and_loads(bench: ModuleType) -> None:
    assert set(bench.OVERRIDES) <= set(bench.methods()) and bench.BASELINE in bench.methods()
    for method, settings in bench.OVERRIDES.items():
        load_config(bench.CONFIG, [f"method={method}", *settings])


def test_a_run_ends_with_the_iteration_that_reaches_the_budget(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "EVALUATED", {"eval": 4, "unseen": 4})
    monkeypatch.setattr(bench, "OVERRIDES", {"tree_po": ["rollout={groups_per_iteration: 2, group_size: 4}", "tree={segment: 8, roots: 2}"]})
    bench.train_one("tree_po", 1, tmp_path, 150)
    found = json.loads((tmp_path / "tree_po-1.json").read_text())
    assert 150 <= found["tokens"] < 150 + 2 * 4 * 48 and found["iterations"] == len(found["rewards"]) >= 1
    assert found["wasted"] == 0 and set(found["after"]) == {"eval", "unseen"}
    monkeypatch.setattr(bench, "Trainer", None)  # nothing is trained twice
    bench.train_one("tree_po", 1, tmp_path, 150)


def test_what_is_no_method_and_seed_is_refused(bench: ModuleType) -> None:
    app = typer.Typer()
    app.command()(bench.main)
    for only in ("nothing:0", "grpo", "grpo:x"):
        done = CliRunner().invoke(app, ["--only", only])
        assert done.exit_code == 2 and "is not METHOD:SEED" in done.output
