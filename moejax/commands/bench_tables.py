"""The results of `moejax bench` as tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from moejax.start_report import human_bytes

Result = Mapping[str, Any]


def table_of(result: Result) -> list[Table | str]:
    """A benchmark's result: one table, and a line for each comparison."""
    return _TABLES[result["benchmark"]](result)


def _latency(result: Result) -> list[Table | str]:
    titles = ("runtime", "TTFT ms", "TPOT ms", "prefill/s", "decode/s", "peak", "read")

    def cells(batch: Result, row: Result) -> list[str]:
        return [
            row["contender"],
            _milliseconds(row["ttft_s"]),
            _milliseconds(row["tpot_s"]),
            *_rates(row),
            *_shares(row),
        ]

    return _generation(result, titles, cells)


def _throughput(result: Result) -> list[Table | str]:
    titles = ("batch", "runtime", "prefill/s", "decode/s", "all/s", "peak", "read")

    def cells(batch: Result, row: Result) -> list[str]:
        return [str(batch["batch_size"]), row["contender"], *_rates(row), _digits(row["total_tok_s"]), *_shares(row)]

    return _generation(result, titles, cells)


def _generation(
    result: Result, titles: Sequence[str], cells: Callable[[Result, Result], list[str]]
) -> list[Table | str]:
    batches = result["batches"]
    table = _table(titles, [cells(batch, row) for batch in batches for row in batch["rows"]])
    return [table, *(_against(batch) for batch in batches if batch["against"])]


def _against(batch: Result) -> str:
    against = batch["against"]
    return (
        f"batch {batch['batch_size']}: prefill {against['prefill_ratio']:.2f} times {against['prefill_best_peer']}, "
        f"decode {against['decode_ratio']:.2f} times {against['decode_best_peer']}; "
        f"{against['same_tokens']:.0%} of the tokens the same"
    )


def _rates(row: Result) -> list[str]:
    return [_digits(row["prefill_tok_s"]), _digits(row["decode_tok_s"])]


def _shares(row: Result) -> list[str]:
    return [f"{row['prefill_share']:.0%}", f"{row['decode_share']:.0%}"]


def _layer(result: Result) -> list[Table | str]:
    rows = [
        [
            str(row["tokens"]),
            row["mesh"],
            row["strategy"],
            _milliseconds(row["seconds"]),
            _digits(row["flops_per_s"] / 1e9),
            f"{row['peak_share']:.0%}",
        ]
        for row in result["rows"]
    ]
    return [_table(("tokens", "mesh", "strategy", "ms", "GFLOP/s", "peak"), rows)]


def _collectives(result: Result) -> list[Table | str]:
    rows = [
        [
            row["collective"],
            row["axes"],
            human_bytes(row["bytes"]),
            _milliseconds(row["seconds"]),
            f"{row['bytes_per_s'] / 1e9:.3g}",
        ]
        for row in result["rows"]
    ]
    return [_table(("collective", "axes", "a device", "ms", "GB/s"), rows)]


def _train(result: Result) -> list[Table | str]:
    rows = [
        [
            row["contender"],
            _milliseconds(row["seconds"]),
            _digits(row["tok_s"]),
            f"{row['peak_share']:.0%}",
            human_bytes(row["peak_bytes"]),
            f"{row['losses'][0]:.5f}",
        ]
        for row in result["rows"]
    ]
    lines = []
    if against := result["against"]:
        lines.append(
            f"{against['tok_ratio']:.2f} times the tokens a second of {against['best_peer']}, "
            f"{against['peak_ratio']:.2f} of its memory"
        )
    return [_table(("runtime", "step ms", "tokens/s", "peak", "memory", "first loss"), rows), *lines]


def _load(result: Result) -> list[Table | str]:
    rows = [
        [
            row["contender"],
            _seconds(row["seconds"]),
            human_bytes(result["bytes"] / row["seconds"]["median"]) + "/s",
            human_bytes(row["peak_bytes"]),
            f"{row['added_ratio']:.2f}",
        ]
        for row in result["rows"]
    ]
    lines = [f"{human_bytes(result['bytes'])} of weights as {result['dtype']}, in the page cache for everyone"]
    if against := result["against"]:
        lines.append(
            f"{against['time_ratio']:.2f} times as fast as transformers, {against['peak_ratio']:.2f} of its memory"
        )
    return [_table(("runtime", "s", "rate", "peak memory", "added / weights"), rows), *lines]


def _milliseconds(spread: Mapping[str, float]) -> str:
    return _spread(spread, 1e3)


def _seconds(spread: Mapping[str, float]) -> str:
    return _spread(spread, 1.0)


def _spread(spread: Mapping[str, float], scale: float) -> str:
    """Such as "16.3 ±4%": the median, and half the distance between the quartiles."""
    return f"{_digits(scale * spread['median'])} ±{(spread['high'] - spread['low']) / 2 / spread['median']:.0%}"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for title in titles:
        table.add_column(title, no_wrap=title != "runtime")
    for row in rows:
        table.add_row(*row)
    return table


_TABLES: Mapping[str, Callable[[Result], list[Table | str]]] = {
    "latency": _latency,
    "throughput": _throughput,
    "layer": _layer,
    "train": _train,
    "collectives": _collectives,
    "load": _load,
}
