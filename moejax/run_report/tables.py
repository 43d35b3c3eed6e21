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
BITS = "bits per byte"


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
    for prefix, kind in ((EVAL_BITS, BITS), (EVAL_LOSS, "loss")):
        each = {domain: [_last(run, prefix + domain) for run in runs] for domain in domains(runs)}
        if each:
            values[f"{kind}, mean of domains"] = [_mean(column) for column in zip(*each.values(), strict=True)]
    values["tokens trained on"] = [_last(run, "tokens") for run in runs]
    values["tokens a second"] = [_median(run, "tokens_per_s") for run in runs]
    values["time in steps"] = [_seconds(run) for run in runs]
    values["model FLOPs utilisation"] = [_median(run, "mfu") for run in runs]
    values["fullest expert's load over the even share"] = [_fullest(run) for run in runs]
    values["steps skipped"] = [_last(run, "skipped") for run in runs]
    values["pairs dropped in the last step"] = [_last(run, "dropped") for run in runs]
    return {name: row for name, row in values.items() if any(value is not None for value in row)}


def domains(runs: Sequence[Run]) -> list[str]:
    """What the runs were evaluated on."""
    return list(dict.fromkeys(name for run in runs for name in run.under(EVAL_LOSS)))


def domain_rows(runs: Sequence[Run]) -> list[Row]:
    """For each domain the loss and the bits per byte of the last evaluation, a pair of cells for each run."""
    rows = []
    for domain in domains(runs):
        kinds = [[_last(run, prefix + domain) for run in runs] for prefix in (EVAL_LOSS, EVAL_BITS)]
        cells = [MISSING if value is None else f"{value:.4f}" for kind in kinds for value in kind]
        rows.append(Row(domain, cells, [flag for kind in kinds for flag in _lowest(kind)]))
    return rows


def final_rows(runs: Sequence[Run]) -> list[Row]:
    """The same as a table, the lowest losses marked where there are several runs."""
    rows = []
    for name, values in final_values(runs).items():
        judged = name.startswith(("training loss", BITS, "loss"))
        best = _lowest(values) if judged else [False] * len(values)
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
    if "time" in name:
        size, unit = next((each for each in ((3600, "h"), (60, "min")) if value >= 2 * each[0]), (1, "s"))
        return f"{value / size:.3g} {unit}"
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


def _lowest(values: Sequence[float | None]) -> list[bool]:
    """Which of several are the lowest."""
    known = [value for value in values if value is not None]
    return [len(known) > 1 and value is not None and value == min(known) for value in values]


def _mean_of_last(run: Run, name: str) -> float | None:
    curve = run.curves.get(name)
    return None if curve is None else float(curve.values[-window(curve) :].mean())


def _last(run: Run, name: str) -> float | None:
    curve = run.curves.get(name)
    return None if curve is None else float(curve.values[-1])


def _median(run: Run, name: str) -> float | None:
    curve = run.curves.get(name)
    return None if curve is None else float(np.median(curve.values))


def _seconds(run: Run) -> float | None:
    curve = run.curves.get("seconds")
    return None if curve is None else float(curve.values.sum())


def _fullest(run: Run) -> float | None:
    ends = [curve.values[-window(curve) :].mean() for curve in run.under(IMBALANCE).values()]
    return float(max(ends)) if ends else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
