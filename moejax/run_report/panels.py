"""What is drawn of runs: which metrics make which charts and heatmaps."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from moejax.run_report.axis import Axis, short
from moejax.run_report.chart import POINTS, Chart, Line
from moejax.run_report.colours import depth, series
from moejax.run_report.curves import Curve
from moejax.run_report.heatmap import Heatmap
from moejax.run_report.reading import Run

LOAD = "router/load/"
ENTROPY = "router/entropy/"
IMBALANCE = "router/load_max_over_mean/"
EVAL_LOSS = "eval/loss/"
EVAL_BITS = "eval/bits_per_byte/"
EVAL_LOAD = "eval/router/load/"
CELLS = 40_000
"""Of all heatmaps over time of a run together, as far as that leaves them 24 columns."""


def window(curve: Curve) -> int:
    """Points that a smoothed curve takes the mean of."""
    return max(1, len(curve) // 50)


def loss_charts(runs: Sequence[Run]) -> list[Chart]:
    """The loss in training, and that of evaluations by domain."""
    widths = sorted({window(run.curves["loss"]) for run in runs if "loss" in run.curves})
    note = (
        ""
        if max(widths, default=1) == 1
        else f"smoothed over {' or '.join(map(str, widths))} steps; behind it the least and largest"
    )
    charts = [Chart("training loss (nats a token)", _over_runs(runs, "loss", smooth=True), note)]
    if len(runs) == 1:  # several runs may have several tokenizers, whose losses say little of each other
        charts += _by_domain(runs, EVAL_LOSS, "loss by domain (nats a token)")
    charts += _by_domain(runs, EVAL_BITS, "bits per byte by domain")
    return [chart for chart in charts if chart.lines]


def other_charts(runs: Sequence[Run]) -> list[Chart]:
    """The optimizer, the speed, further losses, and what should stay 0, where it did not."""
    charts = [
        Chart("learning rate", _over_runs(runs, "learning_rate"), from_zero=True),
        Chart("gradient norm", _over_runs(runs, "grad_norm", smooth=True), logarithmic=True),
        Chart("tokens a second", _over_runs(runs, "tokens_per_s", smooth=True), from_zero=True),
        Chart("model FLOPs utilisation", _over_runs(runs, "mfu", smooth=True), from_zero=True),
    ]
    titles = {
        "balance_loss": "load-balancing loss (unweighted)",
        "z_loss": "router z-loss (unweighted)",
        "skipped": "steps skipped so far (loss or gradient not finite)",
        "dropped": "pairs of token and expert dropped (a step)",
    }
    for name, title in titles.items():
        if any(run.curves[name].values.any() for run in runs if name in run.curves):
            smooth = name.endswith("loss")
            charts.append(Chart(title, _over_runs(runs, name, smooth=smooth), from_zero=not smooth))
    return [chart for chart in charts if chart.lines]


def router_charts(runs: Sequence[Run]) -> list[Chart]:
    """For each run the fullest expert's load and the router's entropy, a line a layer."""
    charts = []
    for run in runs:
        of = f", {run.name}" if len(runs) > 1 else ""
        experts = max((curve.values.shape[1] for curve in run.under(LOAD).values()), default=0)
        even = (math.log(experts), f"even: ln {experts} = {math.log(experts):.2f}") if experts else None
        charts.append(_by_layer(run, IMBALANCE, f"fullest expert's load over the even share{of}", (1.0, "even share")))
        charts.append(_by_layer(run, ENTROPY, f"router entropy (nats){of}", even))
    return [chart for chart in charts if chart.lines]


def loads_over_time(run: Run) -> list[Heatmap]:
    """A heatmap a layer, experts by steps."""
    curves = run.under(LOAD)
    experts = sum(curve.values.shape[1] for curve in curves.values())
    columns = min(max(CELLS // max(experts, 1), 24), 120)
    maps = []
    for name, curve in curves.items():
        binned, count = curve.bins(columns), curve.values.shape[1]
        round_steps = Axis.over(float(binned.steps[0]), float(binned.steps[-1]), 0, 1).ticks(6)
        places = np.interp(round_steps, binned.steps, np.arange(len(binned)) + 0.5)
        maps.append(
            Heatmap(
                layer_title(name),
                binned.values.T * count,
                "expert",
                "step",
                [str(expert) for expert in range(count)],
                [str(step) for step in binned.steps],
                (340, min(max(9 * count, 72), 200)),
                [(float(at), short(step)) for at, step in zip(places, round_steps, strict=True)],
            )
        )
    return maps


def loads_by_domain(run: Run) -> list[Heatmap]:
    """A heatmap a domain, layers by experts, at the last evaluation."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for name, curve in run.under(EVAL_LOAD).items():
        domain, _, layer = name.rpartition("/")
        found.setdefault(domain, {})[layer_number(layer)] = curve.values[-1]
    return domain_heatmaps({domain: dict(sorted(layers.items())) for domain, layers in found.items()})


def domain_heatmaps(loads: Mapping[str, Mapping[int, Float[np.ndarray, " E"]]]) -> list[Heatmap]:
    """A heatmap a domain, of the fractions that each expert of each layer took."""
    maps = []
    for domain, layers in loads.items():
        experts = max(map(len, layers.values()))
        cells = np.array(
            [np.pad(fractions * len(fractions), (0, experts - len(fractions))) for fractions in layers.values()]
        )
        wide, high = min(max(240 / experts, 1.5), 18), min(max(240 / len(layers), 5), 18)
        names = [str(layer) for layer in layers], [str(expert) for expert in range(experts)]
        maps.append(Heatmap(domain, cells, "layer", "expert", *names, (max(wide * experts, 90), high * len(layers))))
    return maps


def layer_number(name: str) -> int:
    """Of a metric's last part, such as "layer_07"."""
    return int(re.sub(r"\D", "", name) or 0)


def layer_title(name: str) -> str:
    """The same as it is written on the page."""
    return f"layer {layer_number(name)}"


def _over_runs(runs: Sequence[Run], name: str, smooth: bool = False) -> list[Line]:
    """A line a run; a single run's needs no name."""
    lines = []
    for index, run in enumerate(runs):
        if (curve := run.curves.get(name)) is None:
            continue
        colour, dash = series(index)
        label = run.name if len(runs) > 1 else ""
        width = window(curve) if smooth else 1
        band = curve.band(POINTS // 2) if width > 1 else None
        lines.append(Line(label, curve.smoothed(width), colour, dash, band))
    return lines


def _by_domain(runs: Sequence[Run], prefix: str, title: str) -> list[Chart]:
    """Domains as lines of one chart; with several runs a chart a domain, so that runs keep their colours."""
    domains = _ordered(name for run in runs for name in run.under(prefix))
    if len(runs) == 1:
        lines = [_marked(domain, runs[0].curves[prefix + domain], i) for i, domain in enumerate(domains)]
        return [Chart(title, lines)]
    charts = []
    for domain in domains:
        lines = [
            _marked(run.name, run.curves[prefix + domain], i)
            for i, run in enumerate(runs)
            if prefix + domain in run.curves
        ]
        charts.append(Chart(f"{domain}: {title.replace(' by domain', '')}", lines))
    return charts


def _by_layer(run: Run, prefix: str, title: str, bound: tuple[float, str] | None) -> Chart:
    curves = run.under(prefix)
    colours = [depth(i, len(curves)) for i in range(len(curves))]
    lines = [
        Line(layer_title(name), curve.smoothed(window(curve)), colour)
        for (name, curve), colour in zip(curves.items(), colours, strict=True)
    ]
    few = range(len(lines)) if len(lines) <= 8 else (0, len(lines) // 2, len(lines) - 1)
    return Chart(title, lines, bound=bound, legend=[(lines[i].label, lines[i].colour, "") for i in few])


def _marked(label: str, curve: Curve, index: int) -> Line:
    colour, dash = series(index)
    return Line(label, curve, colour, dash, marked=len(curve) <= 40)


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
