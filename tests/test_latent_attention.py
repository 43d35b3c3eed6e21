"""Latent attention whose heads are cut over the mesh equals the written-out form on one device, decoded tokens too."""

import dataclasses
import functools
import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from moe_cases import FAST, compiled, normal, relative

from moejax.config import LatentAttentionConfig, NormConfig, RopeConfig
from moejax.nn.latent_attention import HEADS, LatentAttention
from moejax.nn.latent_cache import LatentCache
from moejax.nn.places import Places, chunk_positions
from moejax.nn.rope import rope_tables
from moejax.nn.stream import Stream
from moejax.planning.collectives import collectives
from moejax.verification.latent_attention import latent_attention_reference

# No two sizes that a shape in a program could be confused by are equal.
WIDTH, BATCH, LENGTH, ROOM, STEPS = 20, 4, 5, 11, 2
LENGTHS = np.array([5, 2, 4, 1], np.int32)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 0]] * BATCH, np.int32)
NORM = NormConfig(eps=1e-5)

LATENT = LatentAttentionConfig(
    num_heads=8,
    kv_rank=12,
    query_rank=9,
    nope_dim=6,
    value_dim=7,
    rope=RopeConfig(dim=4, interleaved=True),
    scale=0.4,
    latent_norm_eps=1e-3,
    bias=True,
)
DIRECT = dataclasses.replace(LATENT, num_heads=5, query_rank=None, rope=RopeConfig(dim=4), bias=False)
CASES = [
    ("ep=1,tp=1", LATENT, False),
    ("ep=4,tp=2", LATENT, False),  # 4 heads a rank, one for each of 4 helpers
    ("ep=4,tp=2", LATENT, True),
    ("ep=2,tp=4", DIRECT, False),  # 5 heads on 4 ranks: 3 are padding
    ("ep=1,tp=3", DIRECT, False),
    ("ep=2,tp=4", dataclasses.replace(LATENT, query_rank=None), True),
]


def weights(config):
    """Parameters of the checkpoint's heads, none of them neutral."""
    rng, d, n = np.random.default_rng(0), WIDTH, config.num_heads
    query, lean = config.nope_dim + config.rope.dim, config.kv_rank + config.rope.dim
    shapes = {
        "kv_a": (d, lean),
        "kv_a_norm": (config.kv_rank,),
        "kv_b": (config.kv_rank, n, config.nope_dim + config.value_dim),
        "o": (n, config.value_dim, d),
    }
    if config.query_rank is None:
        shapes["q"] = (d, n, query)
    else:
        shapes |= {"q_a": (d, config.query_rank), "q_a_norm": (config.query_rank,)}
        shapes |= {"q_b": (config.query_rank, n, query)}
    if config.bias:
        shapes |= {"kv_a_bias": (lean,), "o_bias": (d,)}
        shapes |= {} if config.query_rank is None else {"q_a_bias": (config.query_rank,)}
    return {name: normal(rng, *shape, scale=0.5) for name, shape in shapes.items()}


def laid_out(axes, config, numbers, dtype=jnp.float32):
    """The layer's structure, and these parameters in place."""
    layer = nnx.eval_shape(lambda: LatentAttention(config, WIDTH, NORM, mesh=axes, rngs=nnx.Rngs(0), dtype=dtype))
    graph, state = nnx.split(layer)
    filled = []
    for (name,), leaf in nnx.to_flat_state(state):
        new = np.asarray(numbers[name])
        if name in HEADS:
            pads = [(0, 0)] * new.ndim
            pads[HEADS[name]] = (0, leaf.shape[HEADS[name]] - config.num_heads)
            new = np.pad(new, pads)
        assert new.shape == leaf.shape, name
        sharding = NamedSharding(axes, leaf.get_metadata()["out_sharding"])
        filled.append(((name,), nnx.Param(jax.device_put(jnp.asarray(new, dtype), sharding))))
    assert len(filled) == len(numbers)
    return graph, nnx.from_flat_state(filled)


def places_of(config, positions):
    return Places(positions, {config.rope: rope_tables(config.rope, 64, positions)})


def counted(config, rows, length):
    """Places of whole sequences."""
    return places_of(config, jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length)))


def inputs():
    return normal(np.random.default_rng(1), BATCH, LENGTH + STEPS, WIDTH)


@functools.cache
def alone(config):
    """(params, x) -> the reference's output, each row in one piece."""

    def run(params, x):
        places, ones = counted(config, *x.shape[:2]), jnp.ones(x.shape[:2], jnp.int32)
        return latent_attention_reference(params, config, NORM, x, places, ones)

    return compiled(run)


@functools.cache
def references(config):
    """Each row in one piece, and its two segments each alone."""
    run, params, x = alone(config), weights(config), inputs()
    return run(params, x), jnp.concatenate([run(params, x[:, :3]), run(params, x[:, 3:6])], 1)


@pytest.mark.parametrize(("spec", "config", "cut"), CASES)
def test_equals_the_reference(mesh, spec, config, cut):
    """Packed segments each as if alone; a ragged prefill in two chunks and the tokens after it as in one piece."""
    axes = mesh(spec)
    (graph, state), stream = laid_out(axes, config, weights(config)), Stream(axes, cut)

    @compiled
    def everything(state, x, lengths):
        layer = nnx.merge(graph, state)
        restarted = jnp.asarray([[0, 1, 2, 0, 1, 2, 0]] * BATCH, jnp.int32)
        packed = layer(x, places_of(config, restarted), jnp.asarray(SEGMENTS), stream)
        cache, outs = layer.empty_cache(BATCH, ROOM, jnp.float32, stream), []
        for first, last in ((0, 3), (3, LENGTH)):
            places = places_of(config, chunk_positions(first, last - first, lengths))
            out, cache = layer.extend(x[:, first:last], places, cache, stream)
            outs.append(out)
        steps = []
        for positions in (lengths, lengths + 1):
            one = jnp.take_along_axis(x, positions[:, None, None], 1)
            y, cache = layer.extend(one, places_of(config, positions[:, None]), cache, stream)
            steps.append(y)
        return packed, jnp.concatenate(outs, 1), jnp.concatenate(steps, 1), cache

    packed, out, steps, cache = everything(state, inputs(), LENGTHS)
    want, want_packed = map(np.asarray, references(config))
    assert relative(np.asarray(packed)[:, :6], want_packed) < 1e-5
    assert np.isfinite(packed).all()
    for row, length in enumerate(LENGTHS):
        assert relative(np.asarray(out)[row, :length], want[row, :length]) < 1e-5
        assert relative(np.asarray(steps)[row], want[row, length : length + STEPS]) < 1e-5
    assert packed.sharding.is_equivalent_to(NamedSharding(axes, stream.batch_spec), 3)
    local = cache.latent.addressable_shards[0].data.shape
    assert local == (BATCH // (stream.ep_size if cut else 1), ROOM, config.kv_rank + config.rope.dim)


@pytest.mark.parametrize(("spec", "config", "cut"), [CASES[1], CASES[2], CASES[3]])
def test_gradients_equal_the_reference_and_padding_has_none(mesh, spec, config, cut):
    axes = mesh(spec)
    (graph, state), stream = laid_out(axes, config, weights(config)), Stream(axes, cut)
    x, segments = inputs(), jnp.asarray(SEGMENTS)
    places = counted(config, *x.shape[:2])
    cotangent = jnp.where((segments > 0)[..., None], normal(np.random.default_rng(2), *x.shape), 0.0)

    def sharded(state, x):
        return jnp.vdot(nnx.merge(graph, state)(x, places, segments, stream), cotangent)

    def reference(params, x):
        return jnp.vdot(latent_attention_reference(params, config, NORM, x, places, segments), cotangent)

    got_state, got_x = compiled(jax.grad(sharded, (0, 1)))(state, x)
    want, want_x = compiled(jax.grad(reference, (0, 1)))(weights(config), x)
    assert relative(got_x, want_x) < 1e-4
    for (name,), leaf in nnx.to_flat_state(got_state):
        got = np.asarray(leaf[...])
        if name in HEADS:
            got, padding = np.split(got, [config.num_heads], HEADS[name])
            assert not padding.any(), name
        assert relative(got, want[name]) < 1e-4, name


def test_padded_heads_start_at_zero(mesh):
    layer = LatentAttention(DIRECT, WIDTH, NORM, mesh=mesh("ep=1,tp=3"), rngs=nnx.Rngs(0), dtype=jnp.float32)
    for name in ("q", "kv_b", "o"):
        real, padding = np.split(np.asarray(getattr(layer, name)[...]), [5], HEADS[name])
        assert real.all() and padding.size and not padding.any()


def decode_program(axes, config, cut):
    (graph, state), stream = laid_out(axes, config, weights(config)), Stream(axes, cut)

    def step(state, x, positions, cache):
        places = places_of(config, positions[:, None])
        return nnx.merge(graph, state).extend(x, places, cache, stream)

    cache = LatentCache(latent=jnp.zeros((BATCH, ROOM, config.kv_rank + config.rope.dim)))
    return jax.jit(step).lower(state, inputs()[:, :1], LENGTHS, cache)


@pytest.mark.parametrize(("cut", "summed"), [(False, ("ep", "tp")), (True, ("tp",))])
def test_decode_holds_one_all_reduce(mesh, cut, summed):
    axes = mesh("ep=4,tp=2")
    text = decode_program(axes, LATENT, cut).compile(FAST).as_text()
    assert [(c.kind, c.axes) for c in collectives(text, axes)] == [("all-reduce", summed)]


def test_decode_writes_out_no_keys_or_values_of_the_context(mesh):
    """As the prefill does, by which the search is known to find them."""
    axes, config = mesh("ep=1,tp=1"), LATENT
    widths = {config.nope_dim, config.value_dim, config.nope_dim + config.value_dim, config.nope_dim + config.rope.dim}

    def written_out(text):
        shapes = ([int(n) for n in dims.split("x")] for dims in re.findall(r"tensor<([\dx]+)x[a-z]", text))
        return {tuple(shape) for shape in shapes if ROOM in shape and widths & set(shape)}

    (graph, state), stream = laid_out(axes, config, weights(config)), Stream(axes, False)
    x = jnp.zeros((BATCH, ROOM, WIDTH))

    def prefill(state, x):
        layer = nnx.merge(graph, state)
        return layer.extend(
            x, counted(config, BATCH, ROOM), layer.empty_cache(BATCH, ROOM, jnp.float32, stream), stream
        )

    found = written_out(jax.jit(prefill).lower(state, x).as_text())
    assert {(BATCH, 8, ROOM, config.nope_dim + config.rope.dim), (BATCH, 8, ROOM, config.value_dim)} <= found
    assert not written_out(decode_program(axes, config, False).as_text())


def test_half_precision_rounds_decoded_tokens_no_worse_than_whole_sequences(mesh):
    config, axes = LATENT, mesh("ep=1,tp=1")
    graph, state = laid_out(axes, config, weights(config), jnp.bfloat16)
    x, stream = inputs().astype(jnp.bfloat16), Stream(axes, False)
    last = jnp.full(BATCH, LENGTH, jnp.int32)

    @compiled
    def both(state, x):
        layer = nnx.merge(graph, state)
        whole = layer(x, counted(config, *x.shape[:2]), jnp.ones(x.shape[:2], jnp.int32), stream)
        cache = layer.empty_cache(BATCH, ROOM, jnp.bfloat16, stream)
        _, cache = layer.extend(x[:, :LENGTH], counted(config, BATCH, LENGTH), cache, stream)
        step, cache = layer.extend(x[:, LENGTH : LENGTH + 1], places_of(config, last[:, None]), cache, stream)
        assert step.dtype == cache.latent.dtype == jnp.bfloat16
        return whole[:, LENGTH : LENGTH + 1], step

    wide = {name: value.astype(jnp.bfloat16).astype(jnp.float32) for name, value in weights(config).items()}
    want = alone(config)(wide, x.astype(jnp.float32))
    whole, step = (relative(y.astype(jnp.float32), want[:, LENGTH : LENGTH + 1]) for y in both(state, x))
    assert step < 2e-2 and step < 1.5 * whole


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.8,
    "mscale_all_dim": 1.2,
}
V3_PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
PARITY = [
    ("deepseek_v3", {"q_lora_rank": 9, "attention_bias": True, "rope_parameters": YARN}),
    ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True, "rope_interleave": False, **V3_PLAIN}),
    ("deepseek_v3", {"q_lora_rank": None, **V3_PLAIN}),
    ("deepseek_v3", {"q_lora_rank": 9, "rope_interleave": False, "rope_parameters": YARN}),
    ("deepseek_v2", {"q_lora_rank": 9, "attention_bias": True, "rope_parameters": YARN}),
    ("deepseek_v2", {"q_lora_rank": None, **V3_PLAIN}),
]
TENSORS = {
    "q": "q_proj.weight",
    "q_a": "q_a_proj.weight",
    "q_a_bias": "q_a_proj.bias",
    "q_a_norm": "q_a_layernorm.weight",
    "q_b": "q_b_proj.weight",
    "kv_a": "kv_a_proj_with_mqa.weight",
    "kv_a_bias": "kv_a_proj_with_mqa.bias",
    "kv_a_norm": "kv_a_layernorm.weight",
    "kv_b": "kv_b_proj.weight",
    "o": "o_proj.weight",
    "o_bias": "o_proj.bias",
}


@pytest.fixture(scope="module")
def torch():
    """Imported here so that collecting these tests needs no torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
    return torch


def transformers_attention(torch, family, options, x):
    """Its output on a batch, its tensors in our shapes, and the config that describes it."""
    import importlib

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    name = {"deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3"}[family]
    raw = getattr(module, f"{name}Config")(
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=12,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=7,
        max_position_embeddings=64,
        attn_implementation="eager",
        **options,
    )
    attention = getattr(module, f"{name}Attention")(raw, 0).eval()
    numbers = np.random.default_rng(3)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.tensor(numbers.normal(size=parameter.shape) * 0.5))
        length = x.shape[1]
        table = getattr(module, f"{name}RotaryEmbedding")(raw)(torch.tensor(x), torch.arange(length)[None])
        mask = torch.full((1, 1, length, length), -torch.inf).triu(1)
        y, _ = attention(hidden_states=torch.tensor(x), position_embeddings=table, attention_mask=mask)
    tensors = {name: tensor.numpy() for name, tensor in attention.state_dict().items()}
    params = {ours: tensors[theirs] for ours, theirs in TENSORS.items() if theirs in tensors}
    assert len(params) == len(tensors)
    return y.numpy(), {name: in_our_shape(name, value) for name, value in params.items()}, described(raw)


def in_our_shape(name, value):
    """torch's [out, in] as [in, out], heads on an axis of their own."""
    if value.ndim == 1:
        return value
    if name in HEADS:
        return value.T.reshape(4, -1, WIDTH) if name == "o" else value.T.reshape(value.shape[1], 4, -1)
    return value.T


def described(raw):
    rope, scale = raw.rope_parameters, (raw.qk_nope_head_dim + raw.qk_rope_head_dim) ** -0.5
    scaling = {}
    if rope["rope_type"] == "yarn":
        scale *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1) ** 2
        scaling = {key: rope[key] for key in ("factor", "mscale", "mscale_all_dim")}
        scaling |= {"kind": "yarn", "original_length": rope["original_max_position_embeddings"]}
    return LatentAttentionConfig(
        num_heads=4,
        kv_rank=raw.kv_lora_rank,
        query_rank=raw.q_lora_rank,
        nope_dim=raw.qk_nope_head_dim,
        value_dim=raw.v_head_dim,
        rope=RopeConfig(
            dim=raw.qk_rope_head_dim,
            theta=rope["rope_theta"],
            interleaved=getattr(raw, "rope_interleave", True),
            **scaling,
        ),
        scale=scale,
        bias=raw.attention_bias,
    )


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:::torch|transformers")
@pytest.mark.parametrize(("family", "options"), PARITY)
def test_equals_transformers(mesh, torch, family, options):
    x = np.asarray(normal(np.random.default_rng(4), 2, 24, WIDTH))
    want, params, config = transformers_attention(torch, family, options, x)
    axes = mesh("ep=2,tp=2")
    (graph, state), stream = laid_out(axes, config, params), Stream(axes, False)
    places, ones = counted(config, 2, 24), jnp.ones((2, 24), jnp.int32)

    @compiled
    def both(state, params, x):
        y = nnx.merge(graph, state)(x, places, ones, stream)
        return y, latent_attention_reference(params, config, NORM, x, places, ones)

    for got in both(state, params, x):
        assert relative(got, want) < 1e-5
