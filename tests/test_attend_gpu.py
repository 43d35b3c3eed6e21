"""The GPU's attention: its numbers on CPU by interpretation, its programs compiled for H100s that are not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attend_cases import CASES, PROGRAMS, SHAPES, inputs, sight
from jax.sharding import NamedSharding, PartitionSpec
from moe_cases import relative

from moejax.kernels.attention import triton
from moejax.kernels.attention.reference import attend
from moejax.kernels.attention.sight import visible
from moejax.nn.attend import attend_places
from moejax.planning.topologies import h100_mesh


@pytest.mark.parametrize(("shape", "rule"), CASES)
def test_equals_all_scores_at_once(shape, rule):
    queries, keys = sight(SHAPES[shape], rule)
    q, k, v, sinks = inputs(SHAPES[shape], jnp.float32)
    sinks = sinks if rule.get("sinks") else None
    run = functools.partial(triton.forward, scale=0.3, interpret=True)
    got, logs = jax.jit(run)(q, k, v, sinks, queries, keys)
    seen = visible(queries, keys)
    want = attend(q, k, v, seen, scale=0.3, sinks=sinks)
    real = np.asarray(seen.any(-1))
    assert relative(np.asarray(got)[real], np.asarray(want)[real]) < 1e-5
    assert np.isfinite(got).all() and np.isfinite(logs).all()


def test_half_precision():
    shape = SHAPES["a prompt"]
    queries, keys = sight(shape, {})
    q, k, v, _ = inputs(shape, jnp.bfloat16)
    got, _ = jax.jit(functools.partial(triton.forward, scale=0.3, interpret=True))(q, k, v, None, queries, keys)
    want = attend(*(x.astype(jnp.float32) for x in (q, k, v)), visible(queries, keys), scale=0.3)
    assert got.dtype == jnp.bfloat16
    real = np.asarray(visible(queries, keys).any(-1))
    assert relative(np.asarray(got, np.float32)[real], np.asarray(want)[real]) < 2**-7


@pytest.fixture(scope="module")
def h100():
    pytest.importorskip("jax_cuda12_plugin", reason="needs JAX's CUDA plugin")
    return h100_mesh("ep=1,tp=1")


@pytest.mark.deviceless
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("name", PROGRAMS)
def test_is_one_kernel_without_scores_in_memory(h100, name):
    rows, length, room, *_ = shape = PROGRAMS[name]

    def run(q, k, v, sinks, q_places, k_places):
        return attend_places(q, k, v, q_places, k_places, window=4096, sinks=sinks)

    places = tuple(jax.ShapeDtypeStruct((rows, n), jnp.int32) for n in (length, room))
    operands = (*jax.eval_shape(lambda: inputs(shape, jnp.bfloat16)), *places)
    sharding = NamedSharding(h100, PartitionSpec())
    operands = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in operands]
    run = jax.shard_map(run, mesh=h100, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=True)
    program = jax.jit(run).lower(*operands).compile()
    text = program.as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 1
    assert " dot(" not in text and "while(" not in text
    # A prompt's scores would take 1 GB and more; a token's parts, before they are put together, take a few megabytes.
    assert program.memory_analysis().temp_size_in_bytes < 2**24
