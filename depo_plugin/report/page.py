"""The report's page: one HTML file that holds everything it shows. Names and settings are escaped by Jinja2."""

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from depo_plugin import __version__
from depo_plugin.report import figures, summary
from depo_plugin.report.numbers import Numbers


def write(runs: Sequence[Numbers], out: Path) -> Path:
    """Write report.html and each figure as NAME.png and NAME-dark.png into a folder; return the page's path."""
    drawn, missing = figures.draw(runs)
    out.mkdir(parents=True, exist_ok=True)
    for one in drawn:
        (out / f"{one.name}.png").write_bytes(one.light)
        (out / f"{one.name}-dark.png").write_bytes(one.dark)
    path = out / "report.html"
    path.write_text(html(runs, drawn, missing), encoding="utf-8")
    return path


def html(runs: Sequence[Numbers], drawn: Sequence[figures.Drawn], missing: Sequence[str]) -> str:
    """Return the page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda data: b64encode(data).decode()
    settings = summary.settings_rows(runs)
    return environment.get_template("page.html").render(
        runs=[(run, summary.sentences(run), summary.source_table(run)) for run in runs],
        several=len(runs) > 1,
        title="DEPO report: " + ", ".join(summary.short(run.name, 40) for run in runs),
        version=__version__,
        figures=drawn,
        missing=missing,
        key_figures=summary.key_figures(runs),
        settings=settings,
        settings_head=["Setting", *([run.name for run in runs] if len(runs) > 1 else ["Value"])],
        differences=[row for row in settings if len(set(row[1:])) > 1],
    )
