"""The real steps as 8 TPUs v5p would run them. libtpu must be of the release that the tpu extra names."""

import functools

import pytest
from program_cases import EP, TP, Case, documented_bytes, moved_bytes

from moejax.planning.collectives import collectives
from moejax.planning.hlo import Program
from moejax.planning.programs import compile_decode, compile_prefill
from moejax.planning.topologies import tpu_mesh

pytest.importorskip("libtpu", reason="compiles for TPUs with libtpu")
pytestmark = pytest.mark.deviceless

CASES = [Case("mixtral-8x7b"), Case("mixtral-8x7b", chunk=1)]


@functools.cache
def compiled(case):
    """The executable, and its text."""
    mesh = tpu_mesh(f"ep={EP},tp={TP}")
    if case.chunk > 1:
        run = compile_prefill(case.config, mesh, batch=case.batch, chunk=case.chunk, max_len=case.room)
    else:
        run = compile_decode(case.config, mesh, batch=case.batch, max_len=case.room)
    return run, run.as_text()


def payload(moved):
    """What is in the model's dtype; of counts and flags TPUs make sums."""
    return {key: size for key, size in moved.items() if key[2] == "bf16"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bytes_on_each_axis_are_the_documented_ones(case):
    """To the byte, so no weight is gathered, and no token that a strategy says stays where it is."""
    found = collectives(compiled(case)[1], tpu_mesh(f"ep={EP},tp={TP}"))
    assert payload(moved_bytes(found)) == payload(documented_bytes(case))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_caches_are_updated_in_place_and_nothing_passes_through_the_host(case):
    run, text = compiled(case)
    mixer = case.config.layers[0].mixer
    caches = 2 * 2 * case.rows * mixer.num_kv_heads // TP * case.room * mixer.head_dim
    assert run.memory_analysis().alias_size_in_bytes >= caches
    assert not {line.opcode for line in Program.parse(text).instructions()} & {"send", "recv", "infeed", "outfeed"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_down_matrices_of_experts_are_read_where_they_are(case):
    """No kernel makes an array of their form. Of gate and up one does: their shape has another tiling in memory than
    the kernel's, so that XLA lays them out anew, as the README says."""
    stack = case.moe.num_experts // EP, case.hidden, case.config.hidden_size
    for line in Program.parse(compiled(case)[1]).kernels():
        assert stack not in {made.shape for made in line.result}, line
