"""Attention whose heads are cut over the mesh equals attention on one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from moe_cases import compiled, normal, relative

from moejax.config import AttentionConfig, NormConfig, RopeConfig
from moejax.nn.attention import KV_HEADS, QUERY_HEADS, Attention
from moejax.nn.head_share import HeadShare
from moejax.nn.heads import head_layout
from moejax.nn.places import Places, chunk_positions
from moejax.nn.rope import rope_tables
from moejax.nn.stream import Stream

WIDTH, BATCH, LENGTH, ROOM = 10, 4, 5, 8
LENGTHS = [5, 2, 4, 1]
HEADS = QUERY_HEADS | KV_HEADS | {"q_norm": 0, "k_norm": 0}

ROPE = RopeConfig(4)
PLAIN = AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=4, rope=ROPE)
FULL = dataclasses.replace(PLAIN, qk_norm="full", clip_qkv=1.5)
BIASED = AttentionConfig(
    num_heads=6, num_kv_heads=3, head_dim=4, rope=ROPE, qkv_bias=True, out_bias=True, qk_norm="head"
)
# Everything else that attention switches; chunks instead of a window.
SPECIAL = AttentionConfig(
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    chunk=3,
    rope=RopeConfig(2, interleaved=True),
    scale=0.7,
    qkv_bias=True,
    qk_norm="head",
    norm_after_rope=True,
    value_norm=True,
    sinks=True,
    gate=True,
    temperature=(2.0, 0.4),
)
SHARED = dataclasses.replace(PLAIN, keys_are_values=True, value_norm=True, qk_norm="unit")
CASES = [
    ("ep=2,tp=4", FULL, False),  # 6 heads on 4 devices, each kv head on several, each device's 2 heads for 2 helpers
    ("ep=2,tp=4", BIASED, False),
    ("ep=4,tp=2", FULL, True),
    ("ep=2,tp=2", dataclasses.replace(FULL, num_heads=8, num_kv_heads=2), False),  # helpers share a kv head
    ("ep=8,tp=1", dataclasses.replace(FULL, num_heads=8, num_kv_heads=2), False),
    ("ep=2,tp=4", SPECIAL, False),
    ("ep=2,tp=2", SHARED, True),
    ("ep=4,tp=2", PLAIN, False),  # 3 heads a device, which 4 helpers do not divide
    ("ep=2,tp=4", dataclasses.replace(BIASED, num_heads=5, num_kv_heads=1, qk_norm="full"), False),
]


def canonical(config):
    """Parameters in the checkpoint's heads, none of them neutral."""
    rng, d, h = np.random.default_rng(0), WIDTH, config.head_dim
    n, g = config.num_heads, config.num_kv_heads
    shapes = {"q": (d, n, h), "k": (d, g, h), "v": (d, g, h), "o": (n, h, d)}
    if config.keys_are_values:
        shapes.pop("v")
    if config.gate:
        shapes |= {"gate": (d, n, h)}
    if config.qkv_bias:
        shapes |= {f"{name}_bias": shape[1:] for name, shape in shapes.items() if name != "o"}
    if config.out_bias:
        shapes |= {"o_bias": (d,)}
    if config.sinks:
        shapes |= {"sinks": (n,)}
    if config.qk_norm in ("head", "full"):
        full = config.qk_norm == "full"
        shapes |= {"q_norm": (n, h) if full else (h,), "k_norm": (g, h) if full else (h,)}
    return {name: np.asarray(normal(rng, *shape, scale=0.7)) for name, shape in shapes.items()}


def laid_out(name, value, config, shards):
    """Query heads followed by zeros, key/value heads as `kv_of` repeats them."""
    if name not in HEADS or (name.endswith("_norm") and value.ndim == 1):
        return value
    layout, axis = head_layout(config.num_heads, config.num_kv_heads, shards), HEADS[name]
    heads = [i if i < config.num_heads else -1 for i in range(layout.num_heads)]
    order = np.array(layout.kv_of if name[0] in "kv" else heads)
    picked = np.moveaxis(np.take(value, order, axis), axis, 0)
    picked[order < 0] = 0
    return np.moveaxis(picked, 0, axis)


def attention_on(axes, config):
    """The layer's structure, and its parameters in place."""
    layer = nnx.eval_shape(
        lambda: Attention(config, WIDTH, NormConfig(1e-5), mesh=axes, rngs=nnx.Rngs(0), dtype=jnp.float32)
    )
    graph, state = nnx.split(layer)
    numbers, filled = canonical(config), []
    for path, leaf in nnx.to_flat_state(state):
        new = laid_out(path[0], numbers[path[0]], config, axes.shape["tp"])
        assert new.shape == leaf.shape, path
        sharding = NamedSharding(axes, leaf.get_metadata()["out_sharding"])
        filled.append((path, nnx.Param(jax.device_put(new, sharding))))
    assert len(filled) == len(numbers)
    return graph, nnx.from_flat_state(filled)


@functools.cache
def run(axes, config, cut):
    """Whole sequences; then a prefill of ragged rows in two chunks and one decoded token."""
    if config.chunk is None:
        config = dataclasses.replace(config, window=4)
    (graph, state), stream = attention_on(axes, config), Stream(axes, cut)
    x = np.random.default_rng(1).standard_normal((BATCH, LENGTH + 2, WIDTH)).astype(np.float32)
    lengths = np.array(LENGTHS, np.int32)
    segments = np.repeat(np.array([[1, 1, 1, 2, 2, 2, 0]], np.int32), BATCH, 0)

    def at(positions):
        return Places(positions, {config.rope: rope_tables(config.rope, 64, positions)})

    def everything(state, x, lengths):
        layer = nnx.merge(graph, state)
        places = jnp.broadcast_to(jnp.arange(LENGTH + 2, dtype=jnp.int32), x.shape[:2])
        whole = layer(x, at(places), jnp.asarray(segments), stream)
        cache, outs = layer.empty_cache(BATCH, ROOM, jnp.float32, stream), []
        for first, last in ((0, 3), (3, LENGTH)):
            where = at(chunk_positions(first, last - first, lengths))
            out, cache = layer.extend(x[:, first:last], where, cache, stream)
            outs.append(out)
        one = jnp.take_along_axis(x, lengths[:, None, None], 1)
        step, cache = layer.extend(one, at(lengths[:, None]), cache, stream)
        return whole, jnp.concatenate(outs, 1), step, cache

    return compiled(everything)(state, x, lengths), nnx.merge(graph, state).share(stream), stream


@pytest.mark.parametrize(("spec", "config", "cut"), CASES)
def test_equals_one_device(mesh, spec, config, cut):
    (whole, out, step, cache), share, stream = run(mesh(spec), config, cut)
    (whole_1, out_1, step_1, _), alone, _ = run(mesh("ep=1,tp=1"), config, False)
    assert alone.heads == config.num_heads and not alone.axes
    assert relative(np.asarray(whole)[:, :6], np.asarray(whole_1)[:, :6]) < 1e-5  # the last token is padding
    for row, length in enumerate(LENGTHS):
        assert relative(np.asarray(out)[row, :length], np.asarray(out_1)[row, :length]) < 1e-5
    assert relative(step, step_1) < 1e-5
    assert whole.sharding.is_equivalent_to(NamedSharding(stream.mesh, stream.batch_spec), 3)
    local = cache.k.addressable_shards[0].data.shape
    assert local[:2] == (BATCH // (stream.ep_size if cut else 1), share.kv_heads)
    assert local[2] == (config.chunk or 4)


def test_decoded_tokens_equal_the_whole_sequence(mesh):
    """One segment: what decode gives at a position is what the forward pass gives there."""
    config, axes = FULL, mesh("ep=2,tp=4")
    (graph, state), stream = attention_on(axes, config), Stream(axes, False)
    x = normal(np.random.default_rng(2), 1, 6, WIDTH)
    places = jnp.arange(6, dtype=jnp.int32)[None]

    def at(first, last):
        return Places(places[:, first:last], {ROPE: rope_tables(ROPE, 64, places[:, first:last])})

    @compiled
    def both(state):
        layer = nnx.merge(graph, state)
        whole = layer(x, at(0, 6), jnp.ones((1, 6), jnp.int32), stream)
        _, cache = layer.extend(x[:, :4], at(0, 4), layer.empty_cache(1, 6, jnp.float32, stream), stream)
        y, cache = layer.extend(x[:, 4:5], at(4, 5), cache, stream)
        z, _ = layer.extend(x[:, 5:], at(5, 6), cache, stream)
        return whole[:, 4:], jnp.concatenate([y, z], 1)

    assert relative(*both(state)) < 1e-5


@pytest.mark.parametrize(("spec", "config", "cut"), CASES)
def test_each_checkpoint_head_is_counted_once(mesh, spec, config, cut):
    """The weights of the full-width key norm, over all devices."""
    axes = mesh(spec)
    share = HeadShare.of(head_layout(config.num_heads, config.num_kv_heads, axes.shape["tp"]), Stream(axes, cut))
    mapped = jax.shard_map(
        lambda: jax.lax.psum(share.kv_weights().sum(), share.axes) if share.axes else share.kv_weights().sum(),
        mesh=axes,
        in_specs=(),
        out_specs=jax.P(),
    )
    assert float(jax.jit(mapped)()) == config.num_kv_heads
