"""The house: packages, who imports whom, configs, packaging."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import flowrl
from flowrl.config import load_config

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("flowrl", "rewards", "samplers")


def modules() -> list[str]:
    paths = [path.relative_to(ROOT).with_suffix("") for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [".".join(path.parts).removesuffix(".__init__") for path in paths]


def imports_of(module: str) -> set[str]:
    """Absolute names that a module imports anywhere, `from a.b import c` counting as a.b."""
    path = ROOT / (module.replace(".", "/") + ".py")
    tree = ast.parse((path if path.exists() else ROOT / module.replace(".", "/") / "__init__.py").read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names.add(node.module or "")
    return names


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("module", modules())
def test_every_module_can_be_imported_and_has_a_docstring(module: str) -> None:
    assert importlib.import_module(module).__doc__


@pytest.mark.parametrize("module", [name for name in modules() if within(name, ("flowrl.core", "samplers"))])
def test_core_and_samplers_import_torch_and_the_types_only(module: str) -> None:
    own = "flowrl.core" if within(module, ("flowrl.core",)) else "samplers"
    foreign = {name for name in imports_of(module) if name.partition(".")[0] not in sys.stdlib_module_names}
    assert {name for name in foreign if not within(name, ("torch", "flowrl.types", own))} == set()


@pytest.mark.parametrize("module", [name for name in modules() if within(name, ("rewards",))])
def test_rewards_know_nothing_of_the_framework_but_its_types(module: str) -> None:
    ours = {name for name in imports_of(module) if within(name, PACKAGES)}
    assert {name for name in ours if not within(name, ("rewards", "flowrl.types"))} == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_typed_and_imported_from_this_checkout(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
    assert Path(importlib.import_module(package).__file__ or "").parent == ROOT / package


@pytest.mark.parametrize("config", sorted(path for path in (ROOT / "configs").glob("**/*.yaml") if path.parent.name != "launch"), ids=lambda path: path.stem)
def test_every_config_loads(config: Path) -> None:
    assert load_config(config).run_dir


def test_every_config_that_make_starts_exists() -> None:
    configs = re.findall(r"configs/\S+\.yaml", (ROOT / "Makefile").read_text())
    assert len(configs) == 2
    assert [name for name in configs if not (ROOT / name).is_file()] == []


def test_the_installed_distribution_is_this_one_and_owns_its_package_names() -> None:
    owners = importlib.metadata.packages_distributions()
    if "flowrl" not in owners:
        pytest.skip("not installed; the tests run from the checkout")
    assert {package: set(owners[package]) for package in PACKAGES} == {package: {"flowrl-diffusion"} for package in PACKAGES}
    assert importlib.metadata.version("flowrl-diffusion") == flowrl.__version__


def requirements() -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    return [Requirement(line) for line in [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_a_dependency_has_a_lower_bound_and_no_pin(requirement: Requirement) -> None:
    assert [specifier.operator for specifier in requirement.specifier] == [">="]


def test_the_tested_set_satisfies_the_lower_bounds() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    tested = {name.lower().replace("_", "-"): Version(version) for name, version in (line.split("==") for line in lines)}
    for requirement in requirements():
        if requirement.name not in ("wandb", "bitsandbytes", "vllm", "gguf"):  # an account, CUDA, and weights of such a kind cannot be part of a test
            assert requirement.specifier.contains(tested[requirement.name.lower()]), requirement


def test_every_dependency_that_is_imported_is_declared() -> None:
    names = {"PIL": "pillow", "yaml": "pyyaml", "open_clip": "open-clip-torch", "pydantic_core": "pydantic"}
    declared = {requirement.name for requirement in requirements()}
    for module in modules():
        for name in imports_of(module):
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and top not in PACKAGES:
                assert names.get(top, top.replace("_", "-")) in declared, f"{module} imports {top}"
