"""A page's figures and words: what runs ended with, what they were told, and in what these differ."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moejax.run_report.axis import short
from moejax.run_report.panels import EVAL_BITS, EVAL_LOSS, IMBALANCE, window
from moejax.run_report.reading import Run

MISSING = "-"


@dataclass(frozen=True)
class Row:
    """A name, a cell for each run, and which cells are the best."""

    name: str
    cells: Sequence[str]
    best: Sequence[bool]


def final_values(runs: Sequence[Run]) -> dict[str, list[float | None]]:
    """By name, what each run ended with; a curve that is drawn smoothed ends with its last window's mean."""
    values: dict[str, list[float | None]] = {"steps": [run.last["step"] for run in runs]}
    values["training loss"] = [_mean_of_last(run, "loss") for run in runs]
    for prefix, kind in ((EVAL_BITS, "bits per byte"), (EVAL_LOSS, "loss")):
        domains = dict.fromkeys(name for run in runs for name in run.under(prefix))
        each = {domain: [_last(run, prefix + domain) for run in runs] for domain in domains}
        if len(each) > 1:
            values[f"{kind}, mean of domains"] = [_mean(column) for column in zip(*each.values(), strict=True)]
        values |= {f"{kind}, {domain}": row for domain, row in each.items()}
    values["tokens trained on"] = [_last(run, "tokens") for run in runs]
    values["tokens a second"] = [_median(run, "tokens_per_s") for run in runs]
    values["model FLOPs utilisation"] = [_median(run, "mfu") for run in runs]
    values["fullest expert's load over the even share"] = [_fullest(run) for run in runs]
    values["steps skipped"] = [_last(run, "skipped") for run in runs]
    values["pairs dropped in the last step"] = [_last(run, "dropped") for run in runs]
    return {name: row for name, row in values.items() if any(value is not None for value in row)}


def final_rows(runs: Sequence[Run]) -> list[Row]:
    """The same as a table, the lowest losses marked where there are several runs."""
    rows = []
    for name, values in final_values(runs).items():
        known = [value for value in values if value is not None]
        judged = len(runs) > 1 and name.startswith(("training loss", "bits per byte", "loss"))
        best = [judged and value is not None and value == min(known) for value in values]
        rows.append(Row(name, [MISSING if value is None else figure(name, value) for value in values], best))
    return rows


def figure(name: str, value: float) -> str:
    """A final value as it is written."""
    if "loss" in name or "bits" in name:
        return f"{value:.4f}"
    if "utilisation" in name:
        return f"{value:.1%}"
    if "over the even share" in name:
        return f"{value:.2f}x"
    return f"{value:,.0f}" if value < 1e6 else f"{short(float(f'{value:.3g}'))}"


def recipe_rows(runs: Sequence[Run]) -> list[Row]:
    """Every field of the recipes, dotted."""
    flat = [flattened(run.recipe) for run in runs]
    names = dict.fromkeys(name for fields in flat for name in fields)
    return [Row(name, [fields.get(name, MISSING) for fields in flat], [False] * len(runs)) for name in names]


def differing(rows: Sequence[Row]) -> list[Row]:
    """Those whose cells are not all the same."""
    return [row for row in rows if len(set(row.cells)) > 1]


def flattened(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted names and values as TOML would write them; entries of a list of tables by their number."""
    flat: dict[str, str] = {}
    for name, value in recipe.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
            for number, entry in enumerate(value):
                flat |= flattened(entry, f"{prefix}{name}.{number}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def model_line(run: Run) -> str:
    """What the model is, from its config.json, in words that all families share."""
    raw = run.model
    names = {
        "hidden_size": "width {}",
        "num_hidden_layers": "{} layers",
        "num_local_experts": "{} experts",
        "num_experts": "{} experts",
        "n_routed_experts": "{} experts",
        "num_experts_per_tok": "{} a token",
        "vocab_size": "vocabulary {}",
    }
    known = [text.format(raw[name]) for name, text in names.items() if isinstance(raw.get(name), int)]
    return ", ".join([str(raw["model_type"]), *known]) if "model_type" in raw else ""


def _mean_of_last(run: Run, name: str) -> float | None:
    curve = run.curves.get(name)
    return None if curve is None else float(curve.values[-window(run) :].mean())


def _last(run: Run, name: str) -> float | None:
    curve = run.curves.get(name)
    return None if curve is None else float(curve.values[-1])


def _median(run: Run, name: str) -> float | None:
    curve = run.curves.get(name)
    return None if curve is None else float(np.median(curve.values))


def _fullest(run: Run) -> float | None:
    ends = [curve.values[-max(1, len(curve) // 50) :].mean() for curve in run.under(IMBALANCE).values()]
    return float(max(ends)) if ends else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
