"""One self-contained HTML page about a run, `templates/report.html` filled in.

The page loads nothing: styles, SVG curves and images are inside it, so it can be mailed, archived and opened offline, in light and in
dark mode.
"""

from __future__ import annotations

from pathlib import Path

import jinja2

from flowrl.checks import check_run
from flowrl.curves import draw_charts, smoothing_window
from flowrl.gallery import data_uri, load_pairs
from flowrl.results import headline_tiles, result_tables, run_facts, score_text
from flowrl.run_records import half_width, load_run
from flowrl.tracking import explain_full_disk, replace_file

__all__ = ["write_report"]


def write_report(run: Path) -> Path:
    """Writes ``run/report.html``, one page without external resources; missing pieces of an unfinished run are named in the page.

    Args:
        run: a run directory.

    Returns:
        The path of the page.

    Raises:
        UserError: when the folder is not a run directory, when its records are damaged, or when the disk is full.
    """
    run = Path(run)
    loaded = load_run(run)
    tables, findings = result_tables(loaded), list(check_run(loaded))
    gallery, notes = load_pairs(loaded)
    templates = jinja2.PackageLoader("flowrl")
    environment = jinja2.Environment(loader=templates, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(score=score_text, uri=data_uri)
    page = environment.get_template("report.html").render(
        name=run.resolve().name,
        facts=run_facts(loaded),
        tiles=headline_tiles(loaded, tables),
        tables=tables,
        checks=findings,
        warnings=sum(state == "warn" for state, _ in findings),
        gallery=gallery,
        gallery_notes=notes,
        before=min(loaded.samples, default=0),
        after=max(loaded.samples, default=0),
        charts=list(draw_charts(loaded)) if loaded.metrics or loaded.evals else [],
        is_text=loaded.is_text,
        config_text=loaded.config_text,
        versions=loaded.versions,
        window=smoothing_window(len(loaded.metrics)),
        half=half_width,
    )
    path = run / "report.html"
    with explain_full_disk(run, next_step=f"run: flowrl report {run}"):
        replace_file(path, page.encode())
    return path
