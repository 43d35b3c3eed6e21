"""The bench command: its examples run, what it prints, and mistakes."""

import importlib.util
import json

import pytest

from moejax.benchmarks import plot, probes
from moejax.commands import bench
from moejax.commands.main import main


@pytest.fixture(autouse=True)
def small_probes(monkeypatch):
    monkeypatch.setattr(probes, "_SIZES", {"cpu": (64,)})
    monkeypatch.setattr(probes, "_READ_BYTES", 1 << 20)


def example(name: str, capsys) -> list[str]:
    """The arguments of the example in a benchmark's help."""
    assert bench.main([*name.split(), "--help"]) == 0
    words = capsys.readouterr().out.splitlines()[-1].split()
    assert words[:2] == ["moejax", "bench"]
    return words[2:]


def result_of(arguments: list[str], capsys) -> dict:
    assert bench.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_latency(capsys):
    arguments = example("latency", capsys)
    assert arguments[0] == "latency"
    result = result_of([*arguments[:-1], "2", "--mesh", "ep=2,tp=1"], capsys)
    assert (result["benchmark"], result["mesh"], result["rounds"]) == ("latency", "ep=2,tp=1", 2)
    (batch,) = result["batches"]
    (row,) = batch["rows"]
    assert row["contender"] == "moejax"
    assert row["ttft_s"]["low"] <= row["ttft_s"]["median"] <= row["ttft_s"]["high"]
    assert row["prefill_tok_s"] == pytest.approx(result["input_len"] / row["ttft_s"]["median"])
    assert row["decode_tok_s"] == pytest.approx(1 / row["tpot_s"]["median"])
    assert row["decode_share"] == pytest.approx(
        batch["decode_bytes"] * row["decode_tok_s"] / result["limits"]["read_bytes_per_s"]
    )
    assert batch["against"] is None


def test_throughput_is_a_table_with_a_row_for_each_batch(capsys):
    arguments = example("throughput", capsys)
    assert main(["bench", *arguments[:-1], "1", "--mesh", "ep=2,tp=1"]) == 0
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["batch", "runtime", "prefill/s", "decode/s", "all/s", "peak", "read"]
    assert [row[:2] for row in rows[2:]] == [["1", "moejax"], ["4", "moejax"]]
    assert "limits " in err


def test_train(capsys):
    """A step on the same batch again lowers its loss; rates are of the median step."""
    result = result_of([*example("train", capsys), "--mesh", "ep=2,tp=1"], capsys)
    (row,) = result["rows"]
    assert row["contender"] == "moejax" and result["against"] is None
    assert row["losses"] == sorted(row["losses"], reverse=True) and len(row["losses"]) == 3
    assert row["tok_s"] == pytest.approx(2 * 32 / row["seconds"]["median"])
    assert row["peak_share"] == pytest.approx(
        result["step_flops"] / row["seconds"]["median"] / result["limits"]["matrix_flops_per_s"]
    )


def test_layer_collectives_and_their_examples(capsys):
    arguments = example("layer", capsys)
    arguments[arguments.index("64")] = "9"
    result = result_of([*arguments[:-1], "1"], capsys)
    cases = {(row["mesh"], row["tokens"]) for row in result["rows"]}
    assert cases == {(mesh, tokens) for mesh in ("ep=1,tp=1", "ep=4,tp=2") for tokens in (8, 9)}
    result = result_of(example("collectives", capsys), capsys)
    assert {row["bytes"] for row in result["rows"]} == {16384, 1048576}
    assert all(row["bytes_per_s"] == pytest.approx(row["bytes"] / row["seconds"]["median"]) for row in result["rows"])


def test_loading_in_fresh_processes(capsys):
    arguments = example("load", capsys)
    result = result_of([*arguments[:-1], "1"], capsys)
    (row,) = result["rows"]
    assert 16e6 < result["bytes"] < 17e6
    assert row["seconds"]["median"] > 0
    assert row["peak_bytes"] > result["bytes"]


def test_a_config_alone_has_random_weights_which_do_not_stay(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    raw = json.loads((plot.Path(bench.__file__).parents[1] / "demo" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 1}))
    result = result_of(["load", "--config", str(tmp_path / "config.json"), "--rounds", "1"], capsys)
    assert result["model"] == str(tmp_path / "config.json")
    assert result["bytes"] < 16e6
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which benchmark? begin with one of latency, throughput"),
        (["latencyy"], "there is no benchmark 'latencyy': begin with"),
        (["latency", "--rounds", "0"], "--rounds 0 must be at least 1"),
        (["latency", "--output-len", "1"], "--output-len 1 must be at least 2"),
        (["throughput", "--batch-size", "4", "0"], "--batch-size 0 must be at least 1"),
        (["layer", "--tokens", "0"], "--tokens 0 must be at least 1"),
        (["collectives", "--mesh", "ep=1,tp=1"], "one device has nothing to exchange"),
        (["latency", "--model", "x", "--config", "y.json"], "--model x and --config y.json were given together"),
        (["latency", "--config", "missing/config.json"], "missing has no config.json"),
        (["latency", "--plot", "plot.pdf"], "--plot plot.pdf must end in one of .png, .svg"),
        (["latency", "--plot", "missing/plot.png"], "there is no folder missing"),
        (["latency", "--vs", "llama"], "invalid choice: 'llama'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert bench.main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: others keep")]
    assert line.startswith("error: ") and message in line


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
    facts = {"model": "m", "mesh": "m", "bytes": 5, "input_len": 8, "rows": rows}
    facts["batches"] = [{"batch_size": 1, "rows": rows}]
    for name in bench.BENCHMARKS:
        file = tmp_path / f"{name}{suffix}"
        plot.draw(plot.panels_of({"benchmark": name} | facts), str(file))
        assert file.stat().st_size > 1000
