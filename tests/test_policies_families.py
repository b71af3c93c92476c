"""Every family of image generators keeps the contract of tests/families.py, on a pipeline of its real classes that was saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
from families import BUILDERS as TRANSFORMERS
from families import CONTRACT
from unets import UNET_BUILDERS

from flowrl.policies.families import FAMILIES, _load, family_of
from flowrl.sections import ModelConfig
from flowrl.types import UserError

BUILDERS = TRANSFORMERS | UNET_BUILDERS


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name -> the folder of its random pipeline, built once."""
    built: dict[str, Path] = {}

    def folder(name: str) -> Path:
        kind = _load(BUILDERS[name].family).pipelines[0]
        if not hasattr(diffusers, kind):
            pytest.skip(f"this diffusers has no {kind}")
        if name not in built:
            built[name] = BUILDERS[name].build(tmp_path_factory.mktemp(name) / "pipeline")
        return built[name]

    return folder


@pytest.mark.parametrize("clause", CONTRACT)
@pytest.mark.parametrize("name", BUILDERS)
def test_every_family_keeps_the_contract(name: str, clause: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    CONTRACT[clause](BUILDERS[name], folder_of(name), tmp_path)


def test_every_family_of_image_generators_has_a_builder() -> None:
    assert {builder.family for builder in BUILDERS.values()} == {name for name in FAMILIES if _load(name).medium == "images"}


@pytest.mark.parametrize("name", BUILDERS)
def test_the_family_is_read_from_the_index(name: str, folder_of: Callable[[str], Path]) -> None:
    kind = family_of(ModelConfig(path=str(folder_of(name))))
    assert f"{kind.__module__}:{kind.__name__}" == FAMILIES[BUILDERS[name].family]


def test_a_pipeline_of_another_family_than_the_named_one_is_refused(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"is a FluxPipeline, not a Stable Diffusion 3 pipeline$"):
        BUILDERS["sd3"].policy(folder_of("flux"), family="sd3")
    with pytest.raises(UserError, match=r"model\.family: unknown family flux3; did you mean flux2\?|model\.family: unknown family flux3"):
        BUILDERS["sd3"].policy(folder_of("flux"), family="flux3")


def test_a_guidance_input_that_the_network_lacks_is_an_error(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"model\.guidance: this Stable Diffusion 3 takes no guidance scale as an input"):
        BUILDERS["sd3"].policy(folder_of("sd3"), guidance=3.5)
