"""A run whose reward is scored by a server writes the same bytes as one that scores in its own process; one whose server dies stops with its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from reward_servers import serving

from flowrl.config import Config
from flowrl.run import train
from flowrl.types import UserError
from rewards import load_reward

Configure = Callable[..., Config]


def remote(label: str, url: str, **args: object) -> str:
    more = "".join(f", {key}: {value}" for key, value in args.items())
    return f"{{name: remote, label: {label}, weight: 0.01, args: {{url: '{url}'{more}}}}}"


def test_metrics_of_a_remote_reward_are_those_of_a_local_one_bit_for_bit(configure: Configure, tmp_path: Path, one_thread: None) -> None:
    own = "{name: 'toys:redness', label: red}"
    local = train(configure(f"rewards=[{own}, {{name: jpeg_compressibility, label: jpeg, weight: 0.01}}]", f"run_dir={tmp_path / 'local'}"))
    with serving(load_reward("jpeg_compressibility"), max_wait_ms=0) as url:
        far = train(configure(f"rewards=[{own}, {remote('jpeg', url, samples_per_request=3)}]", f"run_dir={tmp_path / 'far'}"))
    for name in ("metrics.jsonl", "evals.jsonl"):
        assert (local / name).read_bytes() == (far / name).read_bytes()
        assert b"jpeg" in (local / name).read_bytes()


def test_a_server_that_dies_stops_the_run_with_its_name_and_the_checkpoint_stays(configure: Configure, tmp_path: Path) -> None:
    settings = ("evaluation.every=100", "training.checkpoint_every=1")
    with serving(load_reward("jpeg_compressibility")) as url:
        entry = remote("jpeg", url, tries=1, deadline=2, timeout=1)
        run = train(configure(f"rewards=[{entry}]", f"run_dir={tmp_path / 'run'}", "training.iterations=2", *settings))
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    with pytest.raises(UserError, match="^reward jpeg: no endpoint answered") as caught:
        train(configure(f"rewards=[{entry}]", f"run_dir={run}", "training.iterations=4", *settings), resume=run)
    assert url in str(caught.value)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == checkpoints
