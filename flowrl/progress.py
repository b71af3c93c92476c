"""How training goes, shown to the person who waits: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

__all__ = ["TrainingProgress"]


class TrainingProgress:
    """Shows how training goes: a live bar on a terminal, one compact line now and then elsewhere (log files, CI).

    Args:
        total: iterations of the whole run.
        start: iterations done before, when resuming.
        enabled: False on all processes but the main one.
        console: where to write; standard error by default, so that standard output stays free for results.
        every_s: least seconds between two lines when there is no terminal; the first and the last iteration are always shown.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        enabled: bool = True,
        console: Console | None = None,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._enabled = enabled
        self._console = console or Console(stderr=True)
        self._every_s = every_s
        self._clock = clock
        self._seconds: deque[float] = deque(maxlen=20)
        self._last_printed: float | None = None
        self._pending = ""
        self._live: Live | None = None
        bar = (TextColumn("iteration"), MofNCompleteColumn(), BarColumn(bar_width=None), TaskProgressColumn())
        self._bar = Progress(*bar, console=self._console, expand=True)
        self._task = self._bar.add_task("train", total=total, completed=start)

    def __enter__(self) -> Self:
        if self._enabled and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(self._bar, console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._pending:
            self._print_line()

    def update(self, metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> None:
        """Shows an iteration.

        Args:
            metrics: a line of metrics.jsonl; what is missing or null is not shown.
            timings: the same iteration's line of timings.jsonl; seconds per iteration are the mean ``seconds/total`` of the last 20.
        """
        if not self._enabled:
            return
        iteration = int(metrics["iteration"])
        if timings.get("seconds/total") is not None:
            self._seconds.append(float(timings["seconds/total"]))
        details = " · ".join(self._details(iteration, metrics))
        if self._live is not None:
            self._bar.update(self._task, completed=iteration)
            style = "red" if "NFE" in details and "= minimum" not in details else "default"
            self._live.update(Group(self._bar, Text(details, style=style)))
            return
        self._pending = f"iteration {iteration}/{self._total} · {details}" if details else f"iteration {iteration}/{self._total}"
        if self._last_printed is None or iteration >= self._total or self._clock() - self._last_printed >= self._every_s:
            self._print_line()

    def print(self, message: str) -> None:
        """Writes a line of its own (an evaluation, a warning) above the bar."""
        if self._enabled:
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def _print_line(self) -> None:
        line, self._pending = self._pending, ""
        self._last_printed = self._clock()
        self.print(line)

    def _details(self, iteration: int, metrics: Mapping[str, Any]) -> Iterator[str]:
        known = {key: value for key, value in metrics.items() if value is not None}
        if "reward/total/mean" in known:
            yield f"reward {known['reward/total/mean']:.3f}"
        if "ratio/mean" in known:
            yield f"ratio {known['ratio/mean']:.5f}"
        if "clip/low" in known or "clip/high" in known:
            yield f"clip {known.get('clip/low', 0.0) + known.get('clip/high', 0.0):.1%}"
        if "pair/accuracy" in known:
            yield f"pairs in order {known['pair/accuracy']:.0%}"
        if known.get("kl/mean", 0.0) > 0:
            yield f"KL {known['kl/mean']:.2e}"
        if self._seconds:
            per_iteration = sum(self._seconds) / len(self._seconds)
            yield f"{per_iteration:.2f} s/iteration"
            for made in ("images", "answers"):
                if known.get(made, 0) > 0 and per_iteration > 0:  # stored pairs are nothing that anybody made
                    yield f"{known[made] / iteration / per_iteration:.1f} {made}/s"
        if "nfe/used" in known and "nfe/minimum" in known:
            used, minimum = int(known["nfe/used"]), int(known["nfe/minimum"])
            yield f"NFE {used} = minimum" if used == minimum else f"NFE {used}, minimum {minimum}"
        if self._seconds and iteration < self._total:
            left = round(per_iteration * (self._total - iteration))
            yield f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
