"""Write docs/text_methods.md: every method of language models, with its parts.

python scripts/list_text_methods.py            # tests/test_text_methods_page.py compares
"""

from __future__ import annotations

import re
from pathlib import Path

from flowrl.config import Config, Method, list_methods
from flowrl.core.preference import PAIR_OBJECTIVES
from flowrl.text_sections import EntropyConfig

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


def _else(config: Config) -> str:
    named = {"shaping": config.shaping, "tokens": config.tokens.weights, "from elsewhere": config.allocation.samples}
    found = [f"{title}: {', '.join(part.name for part in parts)}" for title, parts in named.items() if parts]
    if config.token_credit.name != "answer":
        found.append(f"credit: {config.token_credit.name}")
    if config.allocation.name != "uniform":
        found.append(f"allocation: {config.allocation.name}")
    if config.objective.name in PAIR_OBJECTIVES:
        found.append(f"pairs: {config.pairing.rule}")
    found += [name for name in ("value", "tree", "environment", "partial") if getattr(config, name) is not None]
    return "; ".join([*found, *(["entropy"] if config.entropy != EntropyConfig() else [])])


def _row(name: str, method: Method) -> str:
    config = Config.model_validate({"run_dir": "run", "rewards": ["any"], **method.config})
    o, a, kl = config.objective, config.advantage, config.kl
    paper = re.search(r"arXiv:(\d{4}\.\d{4,5})", method.paper)
    link = f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else method.paper
    price = f"{kl.weight:g} {kl.form}{' in the reward' if kl.place == 'reward' else ''}" if kl.weight else ""
    return "| " + " | ".join((name, link, f"{a.centre} / {a.scale}", o.ratio, o.name, o.reduction, price, _else(config))) + " |"


def page() -> str:
    """The text of the page."""
    text = {name: method for name, method in list_methods().items() if method.config.get("likelihood") == "token"}
    rows = [_row(name, method) for name, method in text.items()]
    return "\n".join([HEAD, "| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |", *rows, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
