"""benchmarks/gpu.py: the architectures are the published ones, its cases are runs, and on small networks it measures what it says."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from loading import load_script

from flowrl.policies.families import make_policy
from flowrl.policies.weightless import weightless

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script("benchmarks/gpu.py")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "billions", "side"), [("sd3.5-medium", 2.24, 128), ("flux.1-dev", 11.90, 64)])
def test_the_architectures_have_the_published_sizes(bench: ModuleType, tmp_path: Path, model: str, billions: float, side: int) -> None:
    architecture = bench.ARCHITECTURES[model]
    case = next(case for case in bench.full_cases() if case.model == model and case.size == 8 * side)
    config = bench.config_of(case, architecture.rank, architecture.family, tmp_path, "cpu")
    with weightless(bench.loader_of(architecture, CPU)):
        policy = make_policy(config.model.model_copy(update={"adapter": "full", "compile": "off"}), CPU)
        assert sum(p.numel() for p in policy.trainable()) / 1e9 == pytest.approx(billions, abs=0.01)
        assert policy.latent_shape == (16, side, side)


@pytest.mark.parametrize("name", ["full_cases", "tiny_cases"])
def test_every_case_is_a_run_with_a_name_of_its_own(bench: ModuleType, tmp_path: Path, name: str) -> None:
    cases = getattr(bench, name)()
    assert len({(case.name, case.dtype) for case in cases}) == len(cases)
    for case in cases:
        architecture = bench.ARCHITECTURES[case.model]
        assert bench.config_of(case, architecture.rank, architecture.family, tmp_path, "cpu").model.compile == case.compile


@pytest.mark.slow
def test_a_case_is_measured(bench: ModuleType) -> None:
    case = bench.Case("flux.1-dev", "lora", 64, "off", "float32", False, 2)
    found = bench.run_case(case, bench.tiny(bench.ARCHITECTURES["flux.1-dev"]), CPU, peak=1e12, rounds=1)
    assert found.ratio < bench.RATIO_BOUND["float32"]
    assert found.predicted == pytest.approx(found.measured, rel=0.15)
    assert found.rows == 2
    assert min(found.images_per_second, found.seconds_per_row, found.rollout_overhead, found.training_utilisation) > 0
    assert len(found.cells()) == bench.HEAD.count("|") - 3


def test_flops_are_two_for_every_weight_and_token(bench: ModuleType, tmp_path: Path) -> None:
    case = bench.Case("sd3.5-medium", "full", 128, "off", "float32", False, 2)
    architecture = bench.tiny(bench.SD3_MEDIUM)
    config = bench.config_of(case, architecture.rank, architecture.family, tmp_path, "cpu")
    forward, both = bench.flops_of_row(config, bench.loader_of(architecture, CPU))
    with weightless(bench.loader_of(architecture, CPU)):
        weights = sum(p.numel() for name, p in make_policy(config.model, CPU).network.named_parameters() if ".attn" in name and name.endswith("weight"))
    assert forward > 2 * 64 * weights * 0.3  # 64 picture tokens, and some weights see the prompt's 24
    assert both == pytest.approx(3 * forward, rel=0.05)  # the gradient of a product is two


def test_memory_is_the_allocators(bench: ModuleType) -> None:
    def work() -> None:
        first = torch.zeros(1 << 20)
        second = torch.zeros(1 << 20)
        del first, second
        torch.zeros(1 << 19)

    assert bench.allocator_peak(work, CPU) == pytest.approx(2 * 4 * 2**20, rel=0.01)


def test_without_a_gpu_it_says_what_to_do(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(bench.typer.Exit):
        bench.main(tiny_=False, only="", size=None, rounds=1, show=False)
    assert "--tiny" in capsys.readouterr().err
