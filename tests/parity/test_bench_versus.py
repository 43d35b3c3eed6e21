"""The bench command against the transformers that is installed: the same tokens from the same weights, in turn."""

import importlib.util
import json

import pytest

from moejax.benchmarks import probes
from moejax.commands import bench

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def small_probes(monkeypatch):
    monkeypatch.setattr(probes, "_SIZES", {"cpu": (64,)})
    monkeypatch.setattr(probes, "_READ_BYTES", {"cpu": 1 << 20})


def result_of(arguments: list[str], capsys) -> dict:
    assert bench.main([*arguments, "--vs", "transformers", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


SHORT = ["--dtype", "float32", "--input-len", "12", "--output-len", "4", "--rounds", "1"]


def test_latency_against_every_implementation_of_the_experts(capsys):
    result = result_of(["latency", "--batch-size", "2", "--mesh", "ep=1,tp=1", *SHORT], capsys)
    (batch,) = result["batches"]
    peers = [f"transformers {experts}" for experts in ("eager", "grouped_mm", "batched_mm")]
    assert [row["contender"] for row in batch["rows"]] == ["moejax", *peers]
    rates = {row["contender"]: row for row in batch["rows"]}
    against = batch["against"]
    assert against["same_tokens"] == 1.0
    for phase in ("prefill", "decode"):
        best = max(rates[peer][f"{phase}_tok_s"] for peer in peers)
        assert against[f"{phase}_ratio"] == pytest.approx(rates["moejax"][f"{phase}_tok_s"] / best)
        assert rates[against[f"{phase}_best_peer"]][f"{phase}_tok_s"] == best
    assert result["peer"]["processes"] == 1
    assert result["peer"]["threads"] == result["cpus"]


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
def test_expert_parallelism_against_as_many_processes(capsys):
    result = result_of(["latency", "--mesh", "ep=2,tp=1", *SHORT], capsys)
    assert result["peer"]["processes"] == 2
    assert result["batches"][0]["against"]["same_tokens"] == 1.0


def test_loading(capsys):
    result = result_of(["load", "--rounds", "1"], capsys)
    own, peer = result["rows"]
    assert (own["contender"], peer["contender"]) == ("moejax", "transformers")
    assert result["against"]["time_ratio"] == pytest.approx(peer["seconds"]["median"] / own["seconds"]["median"])
    assert peer["peak_bytes"] > 100e6
