"""Experts' load by domain as one SVG file, from the JSON of `moejax eval`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax.errors import MoejaxError
from moejax.run_report.heatmap import legend_drawn, scale_end
from moejax.run_report.panels import domain_heatmaps

_STYLE = "text{font:11px system-ui,sans-serif}.title{font-weight:600;font-size:13px}.axis{stroke:#768390;fill:none}"
# One grey that is legible on white and on black: a picture in a README does not know its background.
_INK = "#768390"


def domains_svg(result: Mapping[str, Any]) -> str:
    """Heatmaps side by side, layers by experts, one for each file of an evaluation, and their scale.

    Args:
      result: the JSON object that `moejax eval --json` prints.
    """
    loads = {
        file["name"]: dict(zip(result["layers"], map(np.array, file["load"]), strict=True)) for file in result["files"]
    }
    maps = domain_heatmaps(loads)
    end = scale_end(maps)
    places = np.cumsum([0, *(each.width for each in maps)])
    width, height = max(places[-1], 310), max(each.height for each in maps) + 44
    drawn = "".join(
        f'<g transform="translate({place:g} 0)">{each.drawn(end)}</g>'
        for place, each in zip(places, maps, strict=False)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" fill="{_INK}" role="img" aria-label="load of experts by domain"><style>{_STYLE}</style>'
        f'{drawn}<g transform="translate(18 {height - 40:g})">{legend_drawn(end)}</g></svg>\n'
    )


def check_figure(path: str | None) -> None:
    """Raises MoejaxError, before anything is computed, where a picture is asked for that cannot be made."""
    if path is None:
        return
    if Path(path).suffix != ".svg":
        raise MoejaxError(f"--plot {path} must end in .svg")
    if not Path(path).parent.is_dir():
        raise MoejaxError(f"--plot {path}: there is no folder {Path(path).parent}")


def write_figure(result: Mapping[str, Any], path: str) -> None:
    """Writes that picture.

    Raises:
      MoejaxError: the file cannot be written.
    """
    try:
        Path(path).write_text(domains_svg(result), encoding="utf-8")
    except OSError as error:
        raise MoejaxError(f"cannot write {path}: {error.strerror}") from error
