"""Gated DeltaNet on any mesh equals the token-by-token reference on one device, which equals transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from moe_cases import compiled, normal, relative

from moejax.config import DeltaNetConfig, NormConfig
from moejax.nn.delta_net import KEY_HEADS, VALUE_HEADS, DeltaNet
from moejax.nn.heads import head_layout
from moejax.nn.places import Places, chunk_positions
from moejax.nn.stream import Stream
from moejax.verification.delta_net import delta_net_reference

WIDTH, BATCH, LENGTH = 10, 4, 7
NORM = NormConfig(1e-6)
LENGTHS = np.array([5, 2, 4, 0], np.int32)
SEGMENTS = np.array(
    [
        [1, 1, 1, 2, 2, 2, 0],
        [0, 0, 1, 1, 1, 1, 1],  # padding to the left
        [1, 1, 0, 1, 1, 0, 1],  # gaps
        [3, 1, 0, 0, 2, 2, 2],
    ],
    np.int32,
)
ODD = DeltaNetConfig(num_key_heads=3, num_value_heads=6, key_dim=5, value_dim=3, kernel=4)
EVEN = DeltaNetConfig(num_key_heads=2, num_value_heads=8, key_dim=5, value_dim=3, kernel=4)
CASES = [
    ("ep=1,tp=1", ODD, False),
    ("ep=4,tp=2", ODD, True),
    # 3 heads a device, which 4 helpers do not divide
    pytest.param("ep=4,tp=2", ODD, False, marks=pytest.mark.slow),
    ("ep=2,tp=4", ODD, False),  # 8 value heads with padding, one a device
    pytest.param("ep=2,tp=2", EVEN, False, marks=pytest.mark.slow),  # helpers share a key head
]


def canonical(config):
    """Parameters in the checkpoint's heads, none of them neutral."""
    rng, d = np.random.default_rng(0), WIDTH
    n, g, hk, hv, kernel = (
        config.num_value_heads,
        config.num_key_heads,
        config.key_dim,
        config.value_dim,
        config.kernel,
    )
    shapes = {"q": (d, g, hk), "k": (d, g, hk), "v": (d, n, hv), "z": (d, n, hv), "b": (d, n), "a": (d, n)}
    shapes |= {"conv_q": (g, hk, kernel), "conv_k": (g, hk, kernel), "conv_v": (n, hv, kernel)}
    shapes |= {"dt_bias": (n,), "A_log": (n,), "norm": (hv,), "o": (n, hv, d)}
    return {name: normal(rng, *shape, scale=0.7) for name, shape in shapes.items()}


def laid_out(name, value, layout):
    """Value heads followed by zeros, key heads as `kv_of` repeats them."""
    value, axis = np.asarray(value), (VALUE_HEADS | KEY_HEADS).get(name)
    if axis is None:
        return value
    heads = [i if i < value.shape[axis] else -1 for i in range(layout.num_heads)]
    order = np.array(layout.kv_of if name in KEY_HEADS else heads)
    picked = np.moveaxis(np.take(value, order, axis), axis, 0)
    picked[order < 0] = 0
    return np.moveaxis(picked, 0, axis)


def layer_on(axes, config, numbers, dtype=jnp.float32):
    """The layer's structure, and its parameters in place."""
    layer = nnx.eval_shape(lambda: DeltaNet(config, WIDTH, NORM, mesh=axes, rngs=nnx.Rngs(0), dtype=dtype))
    graph, state = nnx.split(layer)
    layout, filled = head_layout(config.num_value_heads, config.num_key_heads, axes.shape["tp"]), []
    for path, leaf in nnx.to_flat_state(state):
        new = laid_out(path[0], numbers[path[0]], layout)
        assert new.shape == leaf.shape and leaf.dtype == dtype, path
        sharding = NamedSharding(axes, leaf.get_metadata()["out_sharding"])
        filled.append((path, nnx.Param(jax.device_put(new, sharding))))
    assert len(filled) == len(numbers)
    return graph, nnx.from_flat_state(filled)


def no_places(x):
    return Places(jnp.zeros(x.shape[:2], jnp.int32), {})


@functools.cache
def reference(config):
    return compiled(lambda params, x, segments: delta_net_reference(params, config, NORM, x, segments))


def inputs(seed=1):
    return normal(np.random.default_rng(seed), BATCH, LENGTH, WIDTH)


@pytest.mark.parametrize(("spec", "config", "cut"), CASES)
def test_equals_one_device(mesh, spec, config, cut):
    """Packed and padded sequences; then a prefill of ragged rows in two chunks and two decoded tokens."""
    axes, numbers, x = mesh(spec), canonical(config), inputs()
    (graph, state), stream = layer_on(axes, config, numbers), Stream(axes, cut)

    def everything(state, x, segments, lengths):
        layer, steps = nnx.merge(graph, state), []
        whole = layer(x, no_places(x), segments, stream)
        cache, outs = layer.empty_cache(BATCH, LENGTH, jnp.float32, stream), []
        for first, last in ((0, 3), (3, 5)):
            places = Places(chunk_positions(first, last - first, lengths), {})
            out, cache = layer.extend(x[:, first:last], places, cache, stream)
            outs.append(out)
        for past in (lengths, lengths + 1):
            one = jnp.take_along_axis(x, past[:, None, None], 1)
            step, cache = layer.extend(one, no_places(one), cache, stream)
            steps.append(step)
        return whole, jnp.concatenate(outs, 1), jnp.concatenate(steps, 1), cache

    whole, out, steps, cache = compiled(everything)(state, x, jnp.asarray(SEGMENTS), jnp.asarray(LENGTHS))
    want = reference(config)(numbers, x, jnp.asarray(SEGMENTS))
    assert relative(whole, want) < 1e-5
    assert (np.asarray(whole)[SEGMENTS == 0] == 0).all()
    plain = np.asarray(reference(config)(numbers, x, jnp.ones_like(SEGMENTS)))
    for row, length in enumerate(LENGTHS):
        assert relative(np.asarray(out)[row, :length], plain[row, :length]) < 1e-5 if length else True
        assert relative(np.asarray(steps)[row], plain[row, length : length + 2]) < 1e-5
    assert whole.sharding.is_equivalent_to(NamedSharding(axes, stream.batch_spec), 3)
    check_cache(cache, config, nnx.merge(graph, state).share(stream), stream)


def check_cache(cache, config, share, stream):
    """Each device holds its own rows and heads."""
    rows, taps = BATCH // (stream.ep_size if stream.cut else 1), config.kernel - 1
    local = [leaf.addressable_shards[0].data.shape for leaf in jax.tree.leaves(cache)]
    keys, values = (rows, share.kv_heads, taps, config.key_dim), (rows, share.heads, taps, config.value_dim)
    assert local == [keys, keys, values, (rows, share.heads, config.key_dim, config.value_dim)]
    assert cache.state.dtype == jnp.float32


def test_gradients_equal_the_references(mesh):
    """On padded and repeated heads; the padding's own gradients are exactly zero."""
    config, axes, x, segments = ODD, mesh("ep=2,tp=4"), inputs(), jnp.asarray(SEGMENTS)
    numbers, stream, weights = canonical(ODD), Stream(axes, False), inputs(2)
    graph, state = layer_on(axes, config, numbers)
    layout = head_layout(config.num_value_heads, config.num_key_heads, 4)

    def loss(state, x):
        return (nnx.merge(graph, state)(x, no_places(x), segments, stream) * weights).sum()

    def loss_1(numbers, x):
        return (delta_net_reference(numbers, config, NORM, x, segments) * weights).sum()

    (got, got_x), (want, want_x) = (compiled(jax.grad(f, (0, 1)))(p, x) for f, p in ((loss, state), (loss_1, numbers)))
    assert relative(got_x, want_x) < 1e-4
    for path, leaf in nnx.to_flat_state(got):
        name, mine = path[0], np.asarray(leaf[...])
        axis = (VALUE_HEADS | KEY_HEADS).get(name)
        if axis is not None:
            mine = np.moveaxis(mine, axis, 0)
            owner = np.array(layout.kv_of if name in KEY_HEADS else [*range(6), -1, -1])
            assert (mine[owner < 0] == 0).all(), name
            summed = [mine[owner == head].sum(0) for head in range(np.moveaxis(want[name], axis, 0).shape[0])]
            mine = np.moveaxis(np.stack(summed), 0, axis)
        assert relative(mine, want[name]) < 1e-4, name


def test_packed_segments_equal_each_alone(mesh):
    """Longer than a chunk, so that the second begins inside the first chunk and ends in another."""
    axes, length, first = mesh("ep=1,tp=1"), 80, 30
    (graph, state), stream = layer_on(axes, ODD, canonical(ODD)), Stream(axes, False)
    x = np.random.default_rng(3).standard_normal((3, length, WIDTH)).astype(np.float32)
    x[1, :first], x[2, : length - first] = x[0, :first], x[0, first:]
    segments = np.ones((3, length), np.int32)
    segments[0, first:] = 2
    segments[1, first:] = segments[2, length - first :] = 0
    y = np.asarray(compiled(lambda s, x: nnx.merge(graph, s)(x, no_places(x), jnp.asarray(segments), stream))(state, x))
    assert relative(y[0, :first], y[1, :first]) < 1e-5
    assert relative(y[0, first:], y[2, : length - first]) < 1e-5


def their_numbers(layer, config):
    """transformers' parameters of either model by our names."""
    n, g, hk, hv, kernel = (
        config.num_value_heads,
        config.num_key_heads,
        config.key_dim,
        config.value_dim,
        config.kernel,
    )
    own = {name: value.detach().float().numpy() for name, value in layer.named_parameters()}
    keys = g * hk
    if "in_proj_qkvz.weight" in own:
        each = own["in_proj_qkvz.weight"].reshape(g, -1, WIDTH)
        q, k, v, z = np.split(each, np.cumsum([hk, hk, n // g * hv]), 1)
        b, a = np.split(own["in_proj_ba.weight"].reshape(g, -1, WIDTH), 2, 1)
    else:
        q, k, v = np.split(own["in_proj_qkv.weight"], [keys, 2 * keys])
        z, b, a = (own[f"in_proj_{name}.weight"] for name in "zba")
    conv = np.split(own["conv1d.weight"].reshape(-1, kernel), [keys, 2 * keys])
    numbers = {
        "q": q.reshape(g, hk, -1),
        "k": k.reshape(g, hk, -1),
        "v": v.reshape(n, hv, -1),
        "z": z.reshape(n, hv, -1),
    }
    numbers = {name: np.moveaxis(value, -1, 0) for name, value in numbers.items()}
    numbers |= {"b": b.reshape(n, -1).T, "a": a.reshape(n, -1).T, "o": own["out_proj.weight"].T.reshape(n, hv, -1)}
    numbers |= {f"conv_{x}": w.reshape(-1, hv if x == "v" else hk, kernel) for x, w in zip("qkv", conv, strict=True)}
    return numbers | {"dt_bias": own["dt_bias"], "A_log": own["A_log"], "norm": own["norm.weight"]}


def their_layer(family, config):
    import torch
    from transformers import Qwen3_5MoeTextConfig, Qwen3NextConfig
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    classes = {
        "qwen3_next": (Qwen3NextConfig, Qwen3NextGatedDeltaNet),
        "qwen3_5_moe": (Qwen3_5MoeTextConfig, Qwen3_5MoeGatedDeltaNet),
    }
    make_config, make_layer = classes[family]
    settings = make_config(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=config.num_key_heads,
        linear_num_value_heads=config.num_value_heads,
        linear_key_head_dim=config.key_dim,
        linear_value_head_dim=config.value_dim,
        linear_conv_kernel_dim=config.kernel,
        rms_norm_eps=NORM.eps,
    )
    torch.manual_seed(0)
    layer = make_layer(settings, 0).eval()
    with torch.no_grad():
        for value in layer.parameters():
            value.normal_(0.0, 0.7)
    return layer, settings


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:::torch|transformers")
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe"])
def test_equals_transformers(mesh, family):
    """Padding on either side and in between; then a prompt and two tokens after it from its cache."""
    import torch
    from transformers import DynamicCache

    layer, settings = their_layer(family, ODD)
    numbers, axes, x = their_numbers(layer, ODD), mesh("ep=1,tp=1"), inputs()
    (graph, state), stream = layer_on(axes, ODD, numbers), Stream(axes, False)
    mask = np.array([[1] * 5 + [0] * 2, [0] * 2 + [1] * 5, [1, 1, 0, 1, 1, 0, 1], [1] * 7], np.int32)
    theirs = torch.tensor(np.asarray(x))
    cache, steps = DynamicCache(config=settings), []
    with torch.no_grad():
        want = layer(theirs, attention_mask=torch.tensor(mask)).numpy()
        for part in (theirs[:, :5], theirs[:, 5:6], theirs[:, 6:]):
            steps.append(layer(part, cache_params=cache).numpy())

    def ours(state, x):
        layer = nnx.merge(graph, state)
        whole = layer(x, no_places(x), jnp.asarray(mask), stream)
        y, cache = layer.extend(
            x[:, :5], no_places(x[:, :5]), layer.empty_cache(BATCH, LENGTH, jnp.float32, stream), stream
        )
        z, cache = layer.extend(x[:, 5:6], no_places(x[:, 5:6]), cache, stream)
        last, _ = layer.extend(x[:, 6:], no_places(x[:, 6:]), cache, stream)
        return whole, jnp.concatenate([y, z, last], 1)

    whole, parts = compiled(ours)(state, x)
    assert relative(whole, want) < 1e-5
    assert relative(parts, np.concatenate(steps, 1)) < 1e-5
    assert relative(reference(ODD)(numbers, x, jnp.asarray(mask)), want) < 1e-5


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:::torch|transformers")
def test_bfloat16_rounds_where_transformers_does(mesh):
    import torch

    layer, _ = their_layer("qwen3_next", ODD)
    layer = layer.to(torch.bfloat16)
    numbers = {name: jnp.asarray(value, jnp.bfloat16) for name, value in their_numbers(layer, ODD).items()}
    axes, x, ones = mesh("ep=1,tp=1"), inputs().astype(jnp.bfloat16), jnp.ones((BATCH, LENGTH), jnp.int32)
    graph, state = layer_on(axes, ODD, numbers, jnp.bfloat16)
    with torch.no_grad():
        want = layer(torch.tensor(np.asarray(x, np.float32)).to(torch.bfloat16)).float().numpy()
    got = compiled(lambda s, x: nnx.merge(graph, s)(x, no_places(x), ones, Stream(axes, False)))(state, x)
    assert got.dtype == jnp.bfloat16
    assert relative(np.asarray(got, np.float32), want) < 1e-2
    assert relative(np.asarray(reference(ODD)(numbers, x, ones), np.float32), want) < 1e-2
