"""rewards/plugins.py: names, import strings, files by their path, plug-ins of installed packages, and a folder that is read without being run."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from flowrl.types import Prompt, SampleBatch, UserError
from rewards import load_reward
from rewards.plugins import BUILT_IN, GROUP, YOURS, find, installed_plugins, normalize, rewards_in_folder
from rewards.registry import arguments
from rewards.table import REWARDS

ROOT = Path(__file__).parent.parent
BATCH = SampleBatch([Prompt("a"), Prompt("b")], torch.zeros(2, 3, 4, 4))
Install = Callable[..., Path]


@pytest.fixture(autouse=True)
def forget_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Whatever a test imports or appends to the path is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield
    for name in [name for name in set(sys.modules) - before if name.startswith(("planted", "flowrl_file_", "redness", "my_rewards"))]:
        del sys.modules[name]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Pretends to install a distribution: its metadata and, where a source is given, a module, in a folder on the path."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def plant(entry_points: str, source: str | None = None, name: str = "fake", module: str = "planted_plugin") -> Path:
        folder = site / f"{name}-0.1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        (folder / "entry_points.txt").write_text(f"[{GROUP}]\n{entry_points}\n")
        if source is not None:
            (site / f"{module}.py").write_text(textwrap.dedent(source))
        monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / name)])  # what an installation changes: the interpreter looks again
        return site

    return plant


# --- names


@pytest.mark.parametrize(("name", "found"), [("scene", "scene"), ("SCENE", "scene"), ("Scene-Strict", "scene_strict"), ("HPSv2.1", "hpsv2.1")])
def test_a_built_in_name_may_be_written_in_any_case_and_with_hyphens(name: str, found: str) -> None:
    source = find(name)
    assert (source.name, source.target, source.origin) == (found, REWARDS[found], BUILT_IN)


def test_a_normalised_name_loads_the_same_reward() -> None:
    assert load_reward("JPEG-Compressibility", {"quality": 50}).info == load_reward("jpeg_compressibility", {"quality": 50}).info


def test_no_two_built_in_names_are_the_same_when_normalised() -> None:
    assert len({normalize(name) for name in REWARDS}) == len(REWARDS)


# --- plug-ins


def test_a_plug_in_is_found_by_its_name_and_takes_arguments(install: Install) -> None:
    install(
        "Fake-Sharpness = planted_plugin:sharpness [extra]\nfake_class = planted_plugin:Shelf.Level",
        """
        import torch
        from flowrl.types import RewardInfo, Scores

        def sharpness(batch, radius=1): return [float(radius)] * len(batch)

        class Shelf:
            class Level:
                info = RewardInfo("level", "how high", 0.0, 1.0)
                def __init__(self, height): self.height = height
                def load(self, device, dtype): ...
                def score(self, batch): return Scores(torch.full((len(batch),), self.height), torch.ones(len(batch), dtype=torch.bool))
        """,
    )
    assert [(plugin.name, plugin.target, plugin.origin, plugin.problem) for plugin in installed_plugins()] == [
        ("fake_class", "planted_plugin:Shelf.Level", "fake 0.1", ""),
        ("fake_sharpness", "planted_plugin:sharpness", "fake 0.1", ""),
    ]
    reward = load_reward("FAKE-sharpness", {"radius": 3})
    assert reward.info.name == "FAKE-sharpness"
    assert reward.score(BATCH).values.tolist() == [3.0, 3.0]
    assert load_reward("fake_class", {"height": 0.5}).score(BATCH).values.tolist() == [0.5, 0.5]


def test_listing_imports_no_plug_in_and_other_rewards_work_beside_a_broken_one(install: Install) -> None:
    install("broken = planted_plugin:f", "raise RuntimeError('out of order')")
    assert [plugin.name for plugin in installed_plugins()] == ["broken"]
    assert "planted_plugin" not in sys.modules
    assert load_reward("scene").info.name == "scene"
    with pytest.raises(UserError, match=r"^reward 'broken' \(plug-in of fake 0\.1\): importing module 'planted_plugin' failed with RuntimeError: out of order"):
        load_reward("broken")


def test_a_plug_in_that_ends_the_program_when_imported_is_a_named_error(install: Install) -> None:
    install("quits = planted_plugin:f", "raise SystemExit(3)")
    with pytest.raises(UserError, match=r"fake 0\.1.*failed with SystemExit: 3$"):
        load_reward("quits")


def test_a_plug_in_whose_module_is_missing_says_whose_it_is_and_is_not_looked_for_in_the_current_folder(install: Install, tmp_path: Path) -> None:
    install("lost = planted_elsewhere:f")
    (tmp_path / "planted_elsewhere.py").write_text("def f(batch): return [1.0] * len(batch)\n")
    with pytest.raises(UserError, match=r"^reward 'lost' \(plug-in of fake 0\.1\): no module 'planted_elsewhere' among the installed packages$"):
        load_reward("lost")


def test_a_plug_in_with_the_name_of_a_built_in_reward_is_an_error_that_names_both_distributions(install: Install) -> None:
    install("Scene = planted_plugin:f", "")
    message = r"^reward 'scene' is given by flowrl-diffusion and by fake 0\.1; uninstall one, or name .* module:attribute, such as planted_plugin:f$"
    with pytest.raises(UserError, match=message):
        load_reward("scene")
    assert load_reward("ink").info.name == "ink"
    (plugin,) = installed_plugins()
    assert "given by flowrl-diffusion and by fake 0.1" in plugin.problem


def test_two_plug_ins_of_one_name_are_an_error_that_names_both_distributions(install: Install) -> None:
    install("same-name = planted_plugin:f", "")
    install("SAME_NAME = planted_plugin:g", name="other")
    with pytest.raises(UserError, match=r"is given by fake 0\.1 and by other 0\.1;"):
        load_reward("same_name")


@pytest.mark.parametrize("target", ["planted_plugin", "planted plugin:f", "planted_plugin:"])
def test_a_malformed_entry_point_is_explained_when_it_is_named(install: Install, target: str) -> None:
    install(f"odd = {target}", "")
    with pytest.raises(
        UserError, match=rf"^reward 'odd' of fake 0\.1 is declared as 'odd = {re.escape(target)}'; its author must write name = module:attribute$"
    ):
        load_reward("odd")


def test_a_misspelt_name_suggests_a_plug_in_too(install: Install) -> None:
    install("loveliness = planted_plugin:f", "")
    with pytest.raises(UserError, match=r"did you mean 'loveliness'\?"):
        load_reward("Lovelines")


def test_the_installed_packages_are_read_once(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("once = planted_plugin:f", "")
    calls: list[str] = []
    read = importlib.metadata.entry_points
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **given: calls.append("read") or read(**given))
    for _ in range(3):
        assert find("once").origin == "fake 0.1"
    assert calls == ["read"]


# --- files by their path


def test_a_file_is_named_by_its_path_and_its_own_imports_work(tmp_path: Path) -> None:
    folder = tmp_path / "some folder"
    folder.mkdir()
    (folder / "my-reward.py").write_text("import planted_neighbour\ndef f(batch, by=1.0): return [planted_neighbour.VALUE * by] * len(batch)\n")
    (folder / "planted_neighbour.py").write_text("VALUE = 2.0\n")
    before = set(sys.modules)
    for path in ("some folder/my-reward.py", f"{folder}/my-reward.py", "./some folder/../some folder/my-reward.py"):
        reward = load_reward(f"{path}:f", {"by": 3})
        assert (reward.info.name, reward.score(BATCH).values.tolist()) == ("f", [6.0, 6.0])
    assert len([name for name in set(sys.modules) - before if name.startswith("flowrl_file_")]) == 1
    assert str(folder) in sys.path


def test_two_files_of_one_name_are_two_rewards(tmp_path: Path) -> None:
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "planted.py").write_text(f"def f(batch): return [{value}] * len(batch)\n")
    assert [load_reward(f"{folder}/planted.py:f").score(BATCH).values[0].item() for folder in "ab"] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, r"^reward 'planted\.py:f': there is no file .*/planted\.py$"),
        ("raise ValueError('no')", r"^reward 'planted\.py:f': importing .*/planted\.py failed with ValueError: no$"),
        ("import sys; sys.exit('usage: planted')", r"failed with SystemExit: usage: planted$"),
        ("def ff(batch): ...", r"module 'planted\.py' \(.*/planted\.py\) has no attribute 'f' \(did you mean 'ff'\?\)$"),
    ],
)
def test_a_file_that_does_not_give_the_reward_is_named(tmp_path: Path, source: str | None, message: str) -> None:
    if source is not None:
        (tmp_path / "planted.py").write_text(source)
    for _ in range(2):  # a file that failed is tried again, not remembered half-made
        with pytest.raises(UserError, match=message):
            load_reward("planted.py:f")


@pytest.mark.parametrize("name", [".py:f b", "folder/file:f", "planted.py:", "planted.py:a..b"])
def test_a_malformed_path_is_explained(name: str) -> None:
    with pytest.raises(UserError, match=rf"^reward '{re.escape(name)}' is no import string; write module:attribute, .*, or path/to/my_rewards\.py:sharpness$"):
        load_reward(name)


# --- a folder


def test_a_folder_is_searched_without_running_its_files(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(
        textwrap.dedent(
            '''
            import types
            from rewards.network import NetworkReward
            raise RuntimeError("this file was run")
            def plain(batch, radius=2):
                """How plain.

                And more."""
            def typed(samples: "types.SampleBatch", /): ...
            def factory(model): ...
            def nothing(): ...
            def _private(batch): ...
            async def later(batch): ...
            class OnClass:
                info = 1
                def load(self, device, dtype): ...
                def score(self, batch): ...
            class InInit:
                """Set late."""
                def __init__(self): self.info = 1
                def load(self, device, dtype): ...
                def score(self, batch): ...
            class Property:
                @property
                def info(self): ...
                def load(self, device, dtype): ...
                def score(self, batch): ...
            class Network(NetworkReward):
                info: object = 1
            class NoInfo:
                def load(self, device, dtype): ...
                def score(self, batch): ...
            class NoScore:
                info = 1
                def load(self, device, dtype): ...
            def outer():
                def inner(batch): ...
            '''
        )
    )
    (tmp_path / "broken.py").write_text("def f(batch:\n")
    (tmp_path / "not_text.py").write_bytes(b"\xff\x00")
    (tmp_path / "large.py").write_text("def f(batch): ...\n" + "#" * 2**20)
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "random.py").write_text("def like_a_module_of_python(batch): 'Kept apart: \\d.'\n")
    (tmp_path / "__main__.py").write_text("def main(batch): ...\n")
    (tmp_path / "my-file.py").write_text("def f(batch): ...\n")
    found = rewards_in_folder(tmp_path)
    assert {source.origin for source in found} == {YOURS}
    assert [(source.name, source.description) for source in found] == [
        ("__main__.py:main", ""),
        ("my-file.py:f", ""),
        ("planted:plain", "How plain."),
        ("planted:typed", ""),
        ("planted:OnClass", ""),
        ("planted:InInit", "Set late."),
        ("planted:Property", ""),
        ("planted:Network", ""),
        ("random.py:like_a_module_of_python", "Kept apart: \\d."),
    ]
    assert "planted" not in sys.modules


def test_what_the_listing_says_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("def f(batch): return [4.0] * len(batch)\n")
    (tmp_path / "planted_here.py").write_text("def f(batch): return [5.0] * len(batch)\n")
    values = [load_reward(source.name).score(BATCH).values[0].item() for source in rewards_in_folder(tmp_path)]
    assert values == [5.0, 4.0]


def test_a_file_named_like_a_loaded_module_without_a_spec_is_listed_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted_bare.py").write_text("def f(batch): ...\n")
    monkeypatch.setitem(sys.modules, "planted_bare", types.ModuleType("planted_bare"))
    assert [source.name for source in rewards_in_folder(tmp_path)] == ["planted_bare.py:f"]


def test_a_listed_module_on_the_path_keeps_its_short_name(tmp_path: Path) -> None:
    (tmp_path / "planted_here.py").write_text("def f(batch): ...\n")
    sys.path.append(str(tmp_path))
    assert [source.name for source in rewards_in_folder(tmp_path)] == ["planted_here:f"]


def test_the_examples_of_the_documentation_work(tmp_path: Path, install: Install) -> None:
    text = (ROOT / "docs" / "rewards" / "own.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        (tmp_path / re.match(r"# (\w+\.py)\n", block)[1]).write_text(block)  # type: ignore[index]
    red = torch.zeros(1, 3, 2, 2)
    red[:, 0] = 1
    both = torch.cat([red, red.flip(1)])  # red, blue
    prompts = [Prompt("a", {"colour": [1.0, 0.0, 0.0]}), Prompt("b", {"colour": [0.0, 0.0, 0.0]})]
    names = {source.name: source.description for source in rewards_in_folder(tmp_path)}
    assert names["redness:redness"] == "How much redder than blue the picture is."
    assert load_reward("redness:redness", {"blue": 0.5}).score(SampleBatch(prompts, both)).values.tolist() == [1.0, -0.5]
    (entry,) = re.findall(r"^close_to_colour = .*$", text, re.MULTILINE)
    install(entry.replace('"', ""), (tmp_path / "my_rewards.py").read_text(), module="my_rewards")
    for name in ("my_rewards:CloseToColour", "my_rewards.py:CloseToColour", "close-to-colour"):
        reward = load_reward(name, {"scale": 2.0})
        assert reward.score(SampleBatch(prompts, both)).values.tolist() == [0.0, -2.0]
        with pytest.raises(UserError, match="^reward close_to_colour: `colour` of 'c' is not three numbers$"):
            reward.check_prompts([*prompts, Prompt("c", {"colour": [1.0]})])  # type: ignore[attr-defined]


# --- arguments, and the price of a listing


def test_the_arguments_of_a_reward_are_those_of_its_class_or_function(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(
        textwrap.dedent(
            """
            from flowrl.types import RewardInfo
            def plain(batch, radius=2): ...
            def factory(model, size=1): ...
            class Ready:
                info = RewardInfo("ready", "", 0.0, 1.0)
                def __init__(self, level=3): ...
                def load(self, device, dtype): ...
                def score(self, batch): ...
            ready, number = Ready(), 3
            """
        )
    )
    names = {attribute: [p.name for p in arguments(f"planted:{attribute}")] for attribute in ("plain", "factory", "Ready", "ready", "number")}
    assert names == {"plain": ["radius"], "factory": ["model", "size"], "Ready": ["level"], "ready": [], "number": []}
    assert [p.name for p in arguments("jpeg-compressibility")] == ["quality"]


def test_listing_all_rewards_imports_nothing_heavy_and_is_quick() -> None:
    code = """
        import sys, time
        from rewards import list_rewards
        from rewards.table import REWARDS
        assert [info.name for info in list_rewards()] == list(REWARDS)
        heavy = {"transformers", "onnxruntime", "open_clip", "httpx", "fastapi", "rapidocr", "torchvision", "math_verify", "cv2"} & sys.modules.keys()
        assert not heavy, heavy
        assert time.process_time() < 3, time.process_time()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
