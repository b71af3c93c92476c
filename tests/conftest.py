"""Fixtures that several test files share; what they are made of is in toys.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from toys import Launcher, build_pipeline, make_config, write_config

from flowrl.config import Config

settings.register_profile("flowrl", deadline=None)  # a busy machine is no failure
settings.load_profile("flowrl")
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])  # toys:REWARD in subprocesses


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random pipeline, a hundred times smaller than the embedded one."""
    return build_pipeline(tmp_path_factory.mktemp("model") / "random-sd3")


@pytest.fixture
def config_file(tmp_path: Path, pipeline: Path) -> Path:
    """The YAML file of a run of a second."""
    return write_config(tmp_path, pipeline)


@pytest.fixture
def configure(tmp_path: Path, pipeline: Path) -> Callable[..., Config]:
    """(*overrides) -> the resolved config of a run of a second."""
    return lambda *overrides: make_config(tmp_path, pipeline, *overrides)


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Starts flowrl commands in processes of their own."""
    server = Launcher()
    yield server
    server.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Bit-exact comparisons between this process and others need the same number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
