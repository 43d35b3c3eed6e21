"""The page: charts, heatmaps and tables in one HTML file that needs nothing else."""

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

import moejax
from moejax.run_report import panels, tables
from moejax.run_report.chart import Chart
from moejax.run_report.colours import series
from moejax.run_report.heatmap import Heatmap, legend, scale_end
from moejax.run_report.reading import Run

TILES = ("training loss", "bits per byte, mean of domains", "tokens trained on", "tokens a second", "steps skipped")


def render(runs: Sequence[Run]) -> str:
    """The HTML of a page about one run, or about several side by side."""
    over_time = {run.name: panels.loads_over_time(run) for run in runs}
    by_domain = {run.name: panels.loads_by_domain(run) for run in runs}
    final = tables.final_rows(runs)
    recipe = tables.recipe_rows(runs)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_file("page.html.jinja")).render(
        version=moejax.__version__,
        style=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        runs=[(run.name, *series(i), tables.model_line(run)) for i, run in enumerate(runs)],
        tiles=[(row.name, row.cells[0]) for row in final if row.name in TILES] if len(runs) == 1 else [],
        final=final,
        domains=tables.domain_rows(runs),
        recipe=recipe,
        differing=tables.differing(recipe),
        sections=[
            ("Loss", _charts(panels.loss_charts(runs))),
            ("Optimizer and speed", _charts(panels.other_charts(runs))),
            ("Router, by layer", _charts(panels.router_charts(runs))),
        ],
        **_maps("over_time", over_time),
        **_maps("by_domain", by_domain),
    )


def _charts(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    return [
        {"title": each.title, "note": each.note, "legend": each.entries(), "svg": Markup(each.svg())} for each in charts
    ]


def _maps(name: str, maps: Mapping[str, Sequence[Heatmap]]) -> dict[str, Any]:
    """Each run's heatmaps, and the scale of all of them."""
    end = scale_end([each for found in maps.values() for each in found])
    drawn = [(run, [Markup(each.svg(end)) for each in found]) for run, found in maps.items() if found]
    return {name: drawn, f"{name}_scale": Markup(legend(end))}


def _file(name: str) -> str:
    return (resources.files("moejax.run_report") / name).read_text(encoding="utf-8")
