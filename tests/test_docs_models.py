"""The worked example of docs/models.md is a family that keeps the contract."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import families
import pytest
from toys import ROOT

from flowrl.policies.families import FAMILIES


@pytest.mark.slow
def test_the_worked_example_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [block.partition("```")[0] for block in (ROOT / "docs" / "models.md").read_text().split("```python\n")[1:]]
    assert len(blocks) == 2
    module = types.ModuleType("auraflow")
    monkeypatch.setitem(sys.modules, "auraflow", module)
    exec(blocks[0], vars(module))
    monkeypatch.setitem(FAMILIES, "auraflow", "auraflow:AuraFlowPolicy")
    scope = {**vars(families), "BUILDERS": {}}
    exec(blocks[1], scope)
    families.assert_family_contract(scope["BUILDERS"]["auraflow"], tmp_path)
