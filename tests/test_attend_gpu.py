"""The GPU's attention: its numbers on CPU by interpretation, its programs compiled for H100s that are not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from moe_cases import normal, relative

from moejax.kernels.attention import triton
from moejax.kernels.attention.reference import attend
from moejax.kernels.attention.sight import Keys, queries_at, visible
from moejax.nn.attend import attend_places
from moejax.planning.topologies import h100_mesh

# Rows, queries, keys, query heads, key/value heads, widths: no tile divides these.
SHAPES = {
    "a prompt": (2, 70, 70, 4, 2, 16, 8),
    "six heads share a key": (1, 40, 90, 6, 1, 24, 40),
    "a token over a long cache": (2, 1, 700, 4, 2, 16, 16),
    "a token of more heads than rows": (2, 1, 90, 70, 1, 36, 36),
}
WINDOW, CHUNK = {"window": 30, "sinks": True, "packed": True}, {"chunk": 32, "packed": True}
CASES = [
    ("a prompt", {}),
    ("a prompt", CHUNK),
    ("six heads share a key", WINDOW),
    ("a token over a long cache", {"sinks": True}),
    ("a token over a long cache", WINDOW),
    ("a token of more heads than rows", CHUNK),
]


def sight(shape, rule):
    """Places as in a ring with a few empty places, and padding among the queries; the last query sees most."""
    rows, length, room = shape[:3]
    k_places = np.roll(np.where(np.arange(room) < 5, -1, np.arange(room)), room // 3)
    q_places = np.arange(room - length, room)
    q_places[: length // 9] = -1
    q_places, k_places = (jnp.tile(jnp.asarray(x, jnp.int32), (rows, 1)) for x in (q_places, k_places))
    q_segments, k_segments = (jnp.maximum(x, 0) // 50 if rule.get("packed") else None for x in (q_places, k_places))
    return queries_at(q_places, q_segments, rule.get("window"), rule.get("chunk")), Keys(k_places, k_segments)


def inputs(shape, dtype):
    rows, length, room, heads, groups, width, value = shape
    rng = np.random.default_rng(0)
    shapes = ((rows, length, heads, width), (rows, groups, room, width), (rows, groups, room, value), (heads,))
    return [normal(rng, *s).astype(dtype) for s in shapes]


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


# What real models bring: grouped heads with sinks, latent attention written out and over latents.
PROGRAMS = {
    "prefill": (1, 8192, 8192, 16, 4, 128, 128),
    "decode": (8, 1, 4096, 64, 8, 64, 64),
    "latent prefill": (1, 8192, 8192, 4, 4, 192, 128),
    "latent decode": (8, 1, 4096, 128, 1, 576, 576),
}


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
