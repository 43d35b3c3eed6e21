"""The parts that are measured alone: probes, one block, collectives, random weights."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax.benchmarks import probes
from moejax.benchmarks.collectives import _collective, time_collectives
from moejax.benchmarks.layer import Case, block_of, layer_flops, time_layers
from moejax.benchmarks.random_weights import write_random_checkpoint
from moejax.benchmarks.work import Work
from moejax.errors import MoejaxError
from moejax.families import read_config
from moejax.opening import Checkpoint

MODELS = Path(__file__).parents[1] / "configs" / "models"
TINY = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 100}


def quiet(name: str, number: int) -> None:
    pass


def raw_config(name: str, **changes) -> dict:
    return json.loads((MODELS / name / "config.json").read_text()) | changes


class _Peer:
    """Answers faster than anything."""

    def ask(self, name, **arguments):
        return {"seconds": 1e-12}


def test_limits_are_the_best_of_all_ways(monkeypatch):
    monkeypatch.setattr(probes, "_SIZES", {"cpu": (64,)})
    monkeypatch.setattr(probes, "_READ_BYTES", {"cpu": 1 << 20})
    own = probes.matrix_peak("float32"), probes.read_bandwidth()
    assert 1e6 < own[0].rate < 1e15 and own[0].by in ("XLA 64", "grouped_matmul 64")
    assert 1e6 < own[1].rate < 1e13 and own[1].by in ("XLA row", "grouped_matmul row", "XLA sum")
    assert probes.matrix_peak("bfloat16", _Peer()) == probes.Limit(2 * 64**3 / 1e-12, "torch 64")
    assert probes.read_bandwidth(_Peer()) == probes.Limit((1 << 20) / 1e-12, "torch sum")


def test_virtual_devices_share_the_machine(mesh):
    assert probes.chips(mesh("ep=4,tp=2")) == 1
    assert probes.Limit(2.0, "a").times(3) == probes.Limit(6.0, "a")


def test_blocks_of_every_mesh_and_strategy_are_timed(mesh):
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8}
    moe = block_of(read_config(raw_config("qwen1.5-moe-a2.7b", **sizes)))
    many, one = mesh("ep=2,tp=2"), mesh("ep=1,tp=1")
    cases = [Case(many, "all_to_all", 9), Case(many, "all_reduce", 9), Case(one, "auto", 1)]
    spreads = time_layers(moe, cases, "float32", 2, quiet)
    assert list(spreads) == ["ep=2,tp=2 all_to_all 9", "ep=2,tp=2 all_reduce 9", "ep=1,tp=1 auto 1"]
    assert all(0 < spread.low <= spread.high for spread in spreads.values())


def test_a_block_costs_router_chosen_and_shared_experts():
    moe = block_of(read_config(raw_config("qwen1.5-moe-a2.7b")))
    assert layer_flops(moe, 3) == 2 * 3 * (2048 * 60 + 4 * 3 * 2048 * 1408 + 3 * 2048 * 5632)


def test_a_model_without_experts_has_no_block():
    dense = raw_config("qwen3-30b-a3b", mlp_only_layers=list(range(48)))
    with pytest.raises(MoejaxError, match="no layer of this model has experts"):
        block_of(read_config(dense))


def test_collectives_run_over_every_axis_and_psum_over_both(mesh):
    spreads = time_collectives(mesh("ep=4,tp=2"), [100, 4096], 1, quiet)
    expected = [("all_to_all", "ep"), ("all_to_all", "tp"), ("psum", "ep"), ("psum", "tp"), ("psum", "ep+tp")]
    assert list(spreads) == [(*case, size) for case in expected for size in (100, 4096)]


@pytest.mark.parametrize(("kind", "word"), [("psum", "all-reduce"), ("all_to_all", "all-to-all")])
def test_a_timed_collective_is_one_collective_of_the_stated_size(mesh, monkeypatch, kind, word):
    texts = []
    real = probes.jax.stages.Lowered.compile

    def compile(lowered, *args, **options):
        program = real(lowered, *args, **options)
        texts.append(program.as_text())
        return program

    monkeypatch.setattr(probes.jax.stages.Lowered, "compile", compile)
    _collective(mesh("ep=4,tp=1"), kind, ("ep",), 4096)
    (line,) = [line for line in texts[0].splitlines() if f" {word}(" in line]
    # XLA cuts an all-to-all into one operand for each device.
    operands = {"all-reduce": 1, "all-to-all": 4}[word]
    assert line.partition(f" {word}(")[0].count(f"f32[{1024 // operands}]") == operands
    assert "all-gather" not in texts[0]


def test_one_device_exchanges_nothing(mesh):
    with pytest.raises(MoejaxError, match="one device has nothing to exchange"):
        time_collectives(mesh("ep=1,tp=1"), [64], 1, quiet)


@pytest.mark.parametrize("name", ["olmoe-4l", "mixtral-4l"])
def test_random_weights_are_a_checkpoint_of_the_config(name, tmp_path, mesh):
    steps = []
    write_random_checkpoint(tmp_path, raw_config(name, **TINY), "bfloat16", lambda *step: steps.append(step))
    assert steps[-1][0] == steps[-1][1] < (tmp_path / "model.safetensors").stat().st_size
    model = moejax.load(tmp_path, mesh=mesh("ep=4,tp=2"))
    parameters = model.parameters()
    assert {array.dtype for array in parameters.values()} == {jnp.dtype(jnp.bfloat16)}
    down = np.asarray(parameters["layers.1.moe.down"].astype(jnp.float32))
    assert np.std(down) == pytest.approx(32**-0.5, rel=0.05)
    assert np.isfinite(model([[1, 2, 3]])).all()


def test_random_weights_of_a_quantised_config_are_plain_and_of_several_modalities_text(tmp_path):
    write_random_checkpoint(tmp_path, raw_config("gpt-oss-20b", **TINY, num_local_experts=4, layer_types=None))
    with Checkpoint.open(tmp_path, packed=True) as checkpoint:
        assert checkpoint.config.layers[0].moe.packed is False
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_the_two_shapes_of_the_published_figures_have_their_sizes():
    for name, gigaflops in (("olmoe-4l", 0.235), ("mixtral-4l", 0.201)):
        work = Work.of(read_config(raw_config(name)))
        moe = work.config.layers[0].moe
        values = work.matrices + 4 * 3 * moe.num_experts_per_tok * 1024 * moe.intermediate_size
        assert 2 * values / 1e9 == pytest.approx(gigaflops, abs=6e-4)
