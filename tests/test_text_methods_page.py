"""docs/text_methods.md shows the methods as they are."""

from __future__ import annotations

from pathlib import Path

from loading import load_script

from flowrl.config import list_methods

ROOT = Path(__file__).parent.parent


def test_the_page_is_that_of_the_files() -> None:
    script = load_script("scripts/list_text_methods.py")
    page = (ROOT / "docs" / "text_methods.md").read_text(encoding="utf-8")
    assert page == script.page(), "run python scripts/list_text_methods.py"
    names = [name for name, method in list_methods().items() if method.config.get("likelihood") == "token"]
    assert len(names) >= 85
    assert all(f"\n| {name} | " in page for name in names)
