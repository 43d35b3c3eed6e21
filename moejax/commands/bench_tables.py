"""The results of `moejax bench` as tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from moejax.report import human_bytes

Result = Mapping[str, Any]


def table_of(result: Result) -> list[Table | str]:
    """A benchmark's result: one table, and a line for each comparison."""
    return _TABLES[result["benchmark"]](result)


def _generation(result: Result) -> list[Table | str]:
    titles = ("batch", "runtime", "TTFT ms", "TPOT ms", "prefill t/s", "decode t/s", "all t/s", "of peak", "of read")
    rows, lines = [], []
    for batch in result["batches"]:
        for row in batch["rows"]:
            rates = [f"{row[name]:.4g}" for name in ("prefill_tok_s", "decode_tok_s", "total_tok_s")]
            shares = [f"{row[name]:.0%}" for name in ("prefill_share", "decode_share")]
            times = [_milliseconds(row[name]) for name in ("ttft_s", "tpot_s")]
            rows.append([str(batch["batch_size"]), row["contender"], *times, *rates, *shares])
        if against := batch["against"]:
            lines.append(
                f"batch {batch['batch_size']}: prefill {against['prefill_ratio']:.2f} times "
                f"{against['prefill_best_peer']}, decode {against['decode_ratio']:.2f} times "
                f"{against['decode_best_peer']}; {against['same_tokens']:.0%} of the tokens the same"
            )
    return [_table(titles, rows), *lines]


def _layer(result: Result) -> list[Table | str]:
    rows = [
        [
            str(row["tokens"]),
            row["mesh"],
            row["strategy"],
            _milliseconds(row["seconds"]),
            f"{row['flops_per_s'] / 1e9:.4g}",
            f"{row['peak_share']:.0%}",
        ]
        for row in result["rows"]
    ]
    return [_table(("tokens", "mesh", "strategy", "ms", "GFLOP/s", "of peak"), rows)]


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
    return f"{1e3 * spread['median']:.4g} ({1e3 * spread['low']:.4g}-{1e3 * spread['high']:.4g})"


def _seconds(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.3g} ({spread['low']:.3g}-{spread['high']:.3g})"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for title in titles:
        table.add_column(title)
    for row in rows:
        table.add_row(*row)
    return table


_TABLES: Mapping[str, Callable[[Result], list[Table | str]]] = {
    "latency": _generation,
    "throughput": _generation,
    "layer": _layer,
    "collectives": _collectives,
    "load": _load,
}
