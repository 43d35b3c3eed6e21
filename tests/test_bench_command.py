"""The bench command: its examples run, what it prints, and mistakes."""

import argparse
import importlib.util
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from moejax.benchmarks import plot, probes
from moejax.commands import bench, bench_runs
from moejax.commands.bench_tables import table_of
from moejax.commands.main import main
from moejax.errors import MoejaxError


@pytest.fixture(autouse=True)
def small_probes(monkeypatch):
    monkeypatch.setattr(probes, "_SIZES", {"cpu": (64,)})
    monkeypatch.setattr(probes, "_READ_BYTES", {"cpu": 1 << 20})


def result_of(arguments: list[str], capsys) -> dict:
    assert bench.main([*arguments, "--rounds", "1", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def printed(table: Table) -> list[str]:
    """A table's lines on a terminal of 80 columns, where nothing may be cut."""
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    text = console.file.getvalue()
    assert "…" not in text
    return text.splitlines()


def test_latency_of_a_config_whose_random_weights_do_not_stay(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    raw = json.loads((Path(bench.__file__).parents[1] / "demo" / "config.json").read_text())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw | {"num_hidden_layers": 1}))
    lengths = ["--input-len", "4", "--output-len", "3"]
    result = result_of(["latency", "--mesh", "ep=1,tp=1", "--config", str(file), *lengths], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (result["benchmark"], result["model"], result["mesh"]) == ("latency", str(file), "ep=1,tp=1")
    (batch,) = result["batches"]
    (row,) = batch["rows"]
    assert row["contender"] == "moejax"
    assert row["prefill_tok_s"] == pytest.approx(4 / row["ttft_s"]["median"])
    assert row["decode_tok_s"] == pytest.approx(1 / row["tpot_s"]["median"])
    assert row["decode_share"] == pytest.approx(
        batch["decode_bytes"] * row["decode_tok_s"] / batch["limits"]["read_bytes_per_s"]
    )
    assert batch["against"] is None


def test_throughput_is_a_table_of_runtimes_and_a_line_of_ratios():
    spread = {"median": 2e-3, "low": 1e-3, "high": 4e-3}
    row = {"ttft_s": spread, "tpot_s": spread} | dict.fromkeys(("prefill_share", "decode_share"), 0.5)
    row |= dict.fromkeys(("prefill_tok_s", "decode_tok_s", "total_tok_s"), 1234.5)
    peer = "transformers grouped_mm"
    against = {"prefill_ratio": 1.5, "prefill_best_peer": peer, "decode_ratio": 2.0, "decode_best_peer": peer}
    rows = [row | {"contender": name} for name in ("moejax", peer)]
    batch = {"batch_size": 1, "rows": rows, "against": against | {"same_tokens": 1.0}}
    table, line = table_of({"benchmark": "throughput", "batches": [batch]})
    lines = printed(table)
    assert [lines[0].split()[0], *lines[2].split()] == ["batch", "1", "moejax", "1234", "1234", "1234", "50%", "50%"]
    assert line.startswith(f"batch 1: prefill 1.50 times {peer}, decode 2.00 times {peer}; 100% of the tokens")
    lines = printed(table_of({"benchmark": "latency", "batches": [batch]})[0])
    assert lines[2].split()[:5] == ["moejax", "2", "±75%", "2", "±75%"]


def test_train(capsys):
    """A step on the same batch again lowers its loss; rates are of the median step."""
    result = result_of(["train", "--batch-size", "2", "--seq-len", "32", "--mesh", "ep=2,tp=1"], capsys)
    (row,) = result["rows"]
    assert row["contender"] == "moejax" and result["against"] is None
    assert row["losses"] == sorted(row["losses"], reverse=True) and len(row["losses"]) == 2
    assert row["tok_s"] == pytest.approx(2 * 32 / row["seconds"]["median"])
    assert row["peak_share"] == pytest.approx(
        result["step_flops"] / row["seconds"]["median"] / result["limits"]["matrix_flops_per_s"]
    )


def test_layer_and_collectives(capsys):
    result = result_of(["layer", "--tokens", "8", "--meshes", "ep=1,tp=1", "ep=2,tp=1"], capsys)
    assert {(row["mesh"], row["tokens"]) for row in result["rows"]} == {("ep=1,tp=1", 8), ("ep=2,tp=1", 8)}
    result = result_of(["collectives", "--mesh", "ep=4,tp=1", "--sizes", "4096"], capsys)
    assert [(row["collective"], row["axes"]) for row in result["rows"]] == [("all_to_all", "ep"), ("psum", "ep")]
    assert all(row["bytes_per_s"] == pytest.approx(4096 / row["seconds"]["median"]) for row in result["rows"])


def test_loading_in_fresh_processes(capsys):
    result = result_of(["load"], capsys)
    (row,) = result["rows"]
    assert 16e6 < result["bytes"] < 17e6
    assert row["seconds"]["median"] > 0
    assert row["peak_bytes"] > result["bytes"]
    assert bench.main(["load", "--platform", "tpu"]) == 2
    assert "load measures the CPU's memory" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", *bench.BENCHMARKS])
def test_the_examples_in_the_help_run(name, capsys):
    assert bench.main([*name.split(), "--help"]) == 0
    words = capsys.readouterr().out.splitlines()[-1].split()
    assert words[:2] == ["moejax", "bench"]
    assert main([*words[1:]]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which benchmark is not said; begin with one of latency, throughput"),
        (["latencyy"], "there is no benchmark 'latencyy'; begin with"),
        (["latency", "--rounds", "0"], "--rounds 0 must be at least 1"),
        (["latency", "--output-len", "1"], "--output-len 1 must be at least 2"),
        (["throughput", "--batch-size", "4", "0"], "--batch-size 0 must be at least 1"),
        (["layer", "--tokens", "0"], "--tokens 0 must be at least 1"),
        (["collectives", "--mesh", "ep=1,tp=1"], "one device has nothing to exchange"),
        (["latency", "--model", "x", "--config", "y.json"], "--model x and --config y.json were given together"),
        (["latency", "--config", "missing/config.json"], "missing has no config.json"),
        (["latency", "--plot", "plot.pdf"], "--plot plot.pdf must end in one of .png, .svg"),
        (["latency", "--plot", "missing/plot.png"], "there is no folder missing"),
        (["latency", "--input-len", "5000"], "--input-len 5000 and --output-len 32 are over the model's context"),
        (["layer", "--dequantise"], "unrecognized arguments: --dequantise"),
        (["latency", "--vs", "llama"], "invalid choice: 'llama'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert bench.main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_a_missing_matplotlib_or_torch_is_said_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for option, remedy in ((["--plot", "x.svg"], "moejax[notebook]"), (["--vs", "transformers"], "moejax[parity]")):
        assert bench.main(["load", *option]) == 2
        assert f'pip install "{remedy}"' in capsys.readouterr().err.splitlines()[-1]


def test_panels_hold_rates_with_their_quartiles_in_order():
    spread = {"median": 2.0, "low": 1.0, "high": 4.0}
    batch = {"batch_size": 4, "rows": [{"contender": "a", "ttft_s": spread, "tpot_s": spread}]}
    prefill, decode = plot.panels_of({"benchmark": "latency", "input_len": 8, "batches": [batch]})
    assert prefill.lines == {"a": [(4, 16.0, 8.0, 32.0)]}
    assert decode.lines == {"a": [(4, 2.0, 1.0, 4.0)]}


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_plot_is_drawn_of_every_benchmark(suffix, tmp_path):
    pytest.importorskip("matplotlib")
    seconds = {"median": 2.0, "low": 1.0, "high": 4.0}
    rows = [
        {"contender": "a", "mesh": "m", "strategy": "s", "tokens": t, "collective": "c", "axes": "ep", "bytes": t}
        | {name: seconds for name in ("seconds", "ttft_s", "tpot_s")}
        for t in (1, 8)
    ]
    facts = {"model": "m", "mesh": "m", "bytes": 5, "input_len": 8, "batch_size": 2, "seq_len": 8, "rows": rows}
    facts["batches"] = [{"batch_size": 1, "rows": rows}]
    for name in bench.BENCHMARKS:
        file = tmp_path / f"{name}{suffix}"
        plot.draw(plot.panels_of({"benchmark": name} | facts), str(file))
        assert file.stat().st_size > 1000


@pytest.mark.parametrize(
    ("platform", "devices", "allowed", "message"),
    [
        ("gpu", 2, ("cpu", "cuda"), "compares one GPU, not 2; use --mesh ep=1,tp=1 or --platform cpu"),
        ("gpu", 1, ("cpu",), "does not compare this on cuda; add --platform cpu"),
        ("tpu", 1, ("cpu", "cuda"), "does not compare this on tpu; add --platform cpu"),
    ],
)
def test_where_a_peer_cannot_compare(platform, devices, allowed, message):
    device = SimpleNamespace(platform=platform)
    mesh = SimpleNamespace(devices=np.array([device] * devices), size=devices)
    with pytest.raises(MoejaxError, match=re.escape(message)):
        bench_runs._check_versus(argparse.Namespace(vs="transformers"), mesh, allowed)
