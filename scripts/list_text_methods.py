"""Write docs/text_methods.md: every method of language models, with its parts.

python scripts/list_text_methods.py            # tests/test_text_methods_page.py compares
"""

from __future__ import annotations

import re
from pathlib import Path

from flowrl.config import Method, list_methods
from flowrl.method_parts import PLAIN, parts_of

PAGE = Path(__file__).parent.parent / "docs" / "text_methods.md"
HEAD = """\
# Methods of language models

Every method is a choice of a few parts, a file of `flowrl/methods/text/`; `flowrl methods NAME` shows one with its paper, what of it was checked against
the source and where ours differs. Any of them runs on the embedded model: `flowrl train configs/tiny_text.yaml method=NAME run_dir=runs/NAME`.

One iteration: prompts by `allocation`; answers by `generation` (one by one, as a `tree`, in an `environment`, or `partial`); rewards; `shaping`; `advantage`
(centre, scale); `token_credit` (from answers to tokens); `tokens.weights`; the `objective` at its `ratio`, reduced over tokens, answers or groups; `kl` and
`entropy` as further terms. What of this works on pictures: [crossing_over.md](crossing_over.md). Pairs and lists: [text_preferences.md](text_preferences.md).
"""
COLUMNS = ("method", "paper", "centre / scale", "ratio", "objective", "reduction", "KL", "else")


def _row(name: str, method: Method) -> str:
    parts = parts_of(method)
    paper = re.search(r"arXiv:(\d{4}\.\d{4,5})", method.paper)
    link = f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else method.paper
    rest = "; ".join(f"{part}: {parts[part]}" for part, plain in PLAIN.items() if parts[part] != plain)
    price = "" if parts["KL"] == "none" else parts["KL"]
    return "| " + " | ".join((name, link, f"{parts['centre']} / {parts['scale']}", parts["ratio"], parts["objective"], parts["reduction"], price, rest)) + " |"


def page() -> str:
    """The text of the page."""
    text = {name: method for name, method in list_methods().items() if method.config.get("likelihood") == "token"}
    rows = [_row(name, method) for name, method in text.items()]
    return "\n".join([HEAD, "| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |", *rows, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
