"""MoE as a layer: alone, and inside somebody else's nnx model on a mesh of their own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from moe_cases import compiled, normal, oracle, relative

from moejax import MoE, MoEConfig, MoEDetails, RouterConfig, Routing, dense_moe
from moejax.config import ClampedSwiGLU
from moejax.moe.layer import Parallel
from moejax.moe.router import NOWHERE, router_for

CONFIG = MoEConfig(16, 12, 4, 2, shared_intermediate_size=8, shared_gate=True, bias=True)
UNEVEN = MoEConfig(16, 9, 6, 2, shared_intermediate_size=5, bias=True)
LEARNED = dataclasses.replace(
    UNEVEN,
    activation=ClampedSwiGLU(1.702, 0.7),
    router=RouterConfig("sigmoid", bias=True, correction=True, expert_scale=True, groups=3, kept_groups=2),
)
BATCH, LENGTH = 8, 3


def tokens(seed=0):
    return normal(np.random.default_rng(seed), BATCH, LENGTH, CONFIG.hidden_size)


def made(module, *args, **options):
    """A module with the same numbers on every mesh, in place; its own random ones take long to compile."""
    graph, state = nnx.split(nnx.eval_shape(lambda: module(*args, rngs=nnx.Rngs(0), **options)))
    rng, filled = np.random.default_rng(3), []
    for path, leaf in nnx.to_flat_state(state):
        value = np.asarray(normal(rng, *leaf.shape, scale=leaf.shape[0] ** -0.5))
        cut = leaf.get_metadata().get("out_sharding")
        mesh = options.get("mesh") or jax.sharding.get_mesh()
        put = value if cut is None else jax.device_put(value, NamedSharding(mesh, cut))
        filled.append((path, nnx.Param(jnp.asarray(put))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def with_details(layer, *args, **options):
    return compiled(lambda *a: layer.with_details(*a, **options))(*args)


def values(layer):
    return {path[0]: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(layer, nnx.Param))}


@pytest.mark.parametrize("spec", ["ep=4,tp=2", pytest.param("ep=1,tp=4", marks=pytest.mark.slow)])
def test_the_same_rngs_give_the_same_layer_on_every_mesh(mesh, spec):
    """Padding is zero and lies behind the weights; each weight lies on the mesh as its annotation says."""
    axes = mesh(spec)
    with jax.set_mesh(axes):
        layer = MoE(UNEVEN, rngs=nnx.Rngs(3))
    alone = values(MoE(UNEVEN, rngs=nnx.Rngs(3)))
    for name, value in values(layer).items():
        inside = tuple(slice(size) for size in alone[name].shape)
        np.testing.assert_array_equal(value[inside], alone[name])
        assert np.abs(value).sum() == pytest.approx(np.abs(alone[name]).sum(), rel=1e-6)
        param = getattr(layer, name)
        assert param[...].sharding.is_equivalent_to(
            NamedSharding(axes, param.get_metadata()["out_sharding"]), value.ndim
        )
    live = [axis if axes.shape[axis] > 1 else None for axis in ("ep", "tp")]
    assert layer.gate_up.get_metadata()["out_sharding"] == PartitionSpec(live[0], None, None, live[1])
    assert layer.down.get_metadata()["out_sharding"] == PartitionSpec(*live, None)
    assert layer.gate_up.shape[0] % axes.shape["ep"] == 0 and layer.down.shape[1] % axes.shape["tp"] == 0


def test_details_say_what_was_decided(mesh):
    layer = made(MoE, CONFIG, mesh=mesh("ep=4,tp=2"))
    mask = jnp.arange(LENGTH) < jnp.arange(BATCH)[:, None] % (LENGTH + 1)
    y, details = with_details(layer, tokens(), mask)
    assert isinstance(details, MoEDetails)
    logits = jnp.einsum("bsd,de->bse", tokens(), layer.router[...], precision="highest")
    assert relative(details.router_logits, logits) < 1e-6 and details.router_logits.dtype == jnp.float32
    want = layer.route(logits).only(mask)
    np.testing.assert_array_equal(details.routing.experts, want.experts)
    assert (np.asarray(want.experts)[~np.asarray(mask)] == NOWHERE).all()
    assert int(details.accounting.tokens_per_expert.sum()) == 2 * int(mask.sum())
    flat = Routing(want.weights.reshape(-1, 2), want.experts.reshape(-1, 2))
    params, y, flat = jax.tree.map(np.asarray, (layer.expert_params(), y, flat))
    assert relative(y.reshape(-1, 16), oracle(tokens().reshape(-1, 16), params, flat)) < 1e-5


@pytest.mark.parametrize("scales_input", [False, True])
def test_learned_parts_and_the_router_s_own_input(mesh, scales_input):
    config = dataclasses.replace(LEARNED, scales_input=scales_input)
    layer = made(MoE, config, mesh=mesh("ep=4,tp=2"))
    x, read = tokens(), tokens(5)
    y, details = with_details(layer, x, router_input=read)
    params = values(layer)
    logits = np.asarray(read, np.float64) @ params["router"] + params["router_bias"]
    assert relative(details.router_logits, logits) < 1e-6
    learned = {name: params[name] for name in ("correction", "expert_scale")}
    routing = router_for(config)(details.router_logits, **learned)
    np.testing.assert_array_equal(details.routing.experts, routing.experts)
    np.testing.assert_allclose(details.routing.weights, routing.weights, rtol=1e-6)
    flat = jax.tree.map(lambda a: np.asarray(a).reshape(-1, 2), routing)
    dense = compiled(functools.partial(dense_moe, activation=config.activation, scales_input=scales_input))
    experts = jax.tree.map(np.asarray, layer.expert_params())
    assert relative(np.asarray(y).reshape(-1, 16), dense(x.reshape(-1, 16), experts, flat)) < 1e-5


def test_learned_parts_start_neutral_and_the_correction_stays_f32():
    layer = MoE(LEARNED, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    for name, value in (("router_bias", 0), ("correction", 0), ("gate_up_bias", 0), ("down_bias", 0)):
        assert (np.asarray(getattr(layer, name)[...]) == value).all(), name
    assert (np.asarray(layer.expert_scale[...]) == 1).all()
    dtypes = {name: leaf.dtype for name, leaf in values(layer).items()}
    assert dtypes.pop("correction") == jnp.float32 and set(dtypes.values()) == {jnp.dtype(jnp.bfloat16)}
    y, details = with_details(layer, tokens().astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and details.routing.weights.dtype == jnp.float32


def test_options_of_one_call_replace_the_layers_own(mesh):
    layer = made(MoE, CONFIG, mesh=mesh("ep=4,tp=1"), capacity_factor=0.25)
    exact = Parallel(strategy="all_reduce")
    assert int(with_details(layer, tokens())[1].accounting.dropped) > 0
    assert int(with_details(layer, tokens(), parallel=exact)[1].accounting.dropped) == 0


def sigmoid_router(logits):
    """A user's own: sigmoid scores, the best expert and always expert 0 or 1 beside it."""
    best = jnp.argmax(logits[..., 2:], -1).astype(jnp.int32) + 2
    other = (logits[..., 1] > logits[..., 0]).astype(jnp.int32)
    experts = jnp.stack([best, other], -1)
    return Routing(jax.nn.sigmoid(jnp.take_along_axis(logits, experts, -1)), experts)


class TheirModel(nnx.Module):
    """Knows nothing of moejax but the layer."""

    def __init__(self, *, rngs, **options):
        self.into = nnx.Linear(6, 16, rngs=rngs)
        self.moe = MoE(CONFIG, rngs=rngs, **options)
        self.out = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        h = jnp.tanh(self.into(x))
        return self.out(h + nnx.remat(MoE.__call__)(self.moe, h))


class OneDevice(TheirModel):
    """The same parameters through the dense oracle."""

    def __call__(self, x):
        h = jnp.tanh(self.into(x))
        flat = h.reshape(-1, 16)
        routing = self.moe.route(jnp.dot(flat, self.moe.router[...], precision="highest"))
        return self.out(h + dense_moe(flat, self.moe.expert_params(), routing).reshape(h.shape))


@nnx.jit
def loss_and_gradients(model, x):
    return nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)


@pytest.mark.parametrize(
    ("names", "kind", "router"),
    [
        (("dp", "ep", "tp"), AxisType.Auto, None),
        (("data", "expert", "model"), AxisType.Explicit, sigmoid_router),
        pytest.param(("dp", "ep", "tp"), AxisType.Explicit, None, marks=pytest.mark.slow),
        pytest.param(("data", "expert", "model"), AxisType.Auto, sigmoid_router, marks=pytest.mark.slow),
    ],
)
def test_inside_a_model_on_a_mesh_with_data_parallelism(names, kind, router):
    dp, ep, tp = names
    axes = jax.make_mesh((2, 2, 2), names, axis_types=(kind,) * 3)
    x = normal(np.random.default_rng(1), BATCH, LENGTH, 6)
    want_loss, want = loss_and_gradients(made(OneDevice, router=router), x)
    with jax.set_mesh(axes):
        model = made(TheirModel, router=router, ep_axis=ep, tp_axis=tp, batch_axes=(dp, ep))
        loss, got = loss_and_gradients(model, jax.device_put(x, NamedSharding(axes, PartitionSpec((dp, ep)))))
    assert relative(loss, want_loss) < 1e-5
    got, want = (dict(nnx.to_flat_state(state)) for state in (got, want))
    assert got.keys() == want.keys() and len(got) == 12
    for path in want:
        assert relative(got[path][...], want[path][...]) < 1e-4, path
    assert got["moe", "gate_up"][...].sharding.spec == PartitionSpec(ep, None, None, tp)


@pytest.mark.parametrize("strategy", ["all_to_all", "all_reduce"])
def test_accounting_covers_the_whole_mesh(strategy):
    """Data-parallel groups are added up, also where the stream is replicated over ep."""
    axes = jax.make_mesh((2, 2, 2), ("dp", "ep", "tp"))
    batch = ("dp", "ep") if strategy == "all_to_all" else ("dp",)
    layer = made(MoE, CONFIG, mesh=axes, batch_axes=batch, strategy=strategy)
    y, details = with_details(layer, tokens())
    chosen = np.asarray(details.routing.experts).reshape(-1)
    assert details.accounting.tokens_per_expert.tolist() == np.bincount(chosen, minlength=4).tolist()
    flat = jax.tree.map(lambda a: a.reshape(-1, 2), details.routing)
    params, y, flat = jax.tree.map(np.asarray, (layer.expert_params(), y, flat))
    assert relative(y.reshape(-1, 16), oracle(tokens().reshape(-1, 16), params, flat)) < 1e-5
