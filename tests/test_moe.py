"""The mixture-of-experts block on every mesh, under every strategy and any routing, against the dense oracle."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from moe_cases import (
    CLAMPED,
    EVEN,
    MESHES,
    ODD,
    SCALED,
    Block,
    capacity_of,
    cell_rows,
    compiled,
    keep_first,
    oracle,
    oracle_of,
    relative,
    waves_of,
)

from moejax import MoejaxError, Routing, moe
from moejax.moe.router import NOWHERE

ALL = Block(tokens=24, hidden=8, experts=4, chosen=4)
SMALL = Block(tokens=24, experts=4)
NINE_SLOTS = Block(tokens=31, experts=8, hidden=7)

FAST_CASES = [
    ("ep=1,tp=1", ODD, 1),
    ("ep=2,tp=1", ALL, 1),
    ("ep=1,tp=4", ODD, 1),
    ("ep=4,tp=2", ODD, 2),
    ("ep=2,tp=4", EVEN, 1),
    ("ep=8,tp=1", ODD, 1),
    ("ep=3,tp=2", NINE_SLOTS, 1),
    ("ep=4,tp=2", CLAMPED, 2),
    ("ep=2,tp=4", SCALED, 1),
]
FAST_REPLICATED = [
    ("ep=4,tp=2", ODD),
    ("ep=2,tp=4", EVEN),
    ("ep=8,tp=1", ODD),
    ("ep=3,tp=2", NINE_SLOTS),
    ("ep=2,tp=4", CLAMPED),
    ("ep=4,tp=2", SCALED),
]
BLOCKS = (EVEN, ODD, ALL, NINE_SLOTS, CLAMPED, SCALED)


def slow_cases():
    for spec in MESHES:
        for block in BLOCKS:
            per_device = -(-block.experts // sizes(spec)[0])
            for chunks in range(1, per_device + 1):
                if per_device % chunks == 0 and (spec, block, chunks) not in FAST_CASES:
                    yield pytest.param(spec, block, chunks, marks=pytest.mark.slow)


def sizes(spec):
    """(ep, tp)."""
    return tuple(int(part.split("=")[1]) for part in spec.split(","))


def check_accounting(accounting, routing, block, spec, strategy, chunks):
    experts = np.asarray(routing.experts)
    want = np.bincount(experts[experts != NOWHERE], minlength=block.experts)
    assert accounting.tokens_per_expert.tolist() == want.tolist()
    assert int(accounting.dropped) == 0
    ep, tp = sizes(spec)
    waves = waves_of(routing, block, ep, chunks) if strategy == "all_to_all" else 1
    assert int(accounting.waves) == waves
    got = float(accounting.ep_bytes), float(accounting.tp_bytes)
    assert got == documented_bytes(strategy, block, ep, tp, chunks, waves)


def documented_bytes(strategy, block, ep, tp, chunks, waves):
    """The formulas of the two strategies' docstrings, for f32."""
    tokens = -(-block.tokens // ep) if strategy == "all_to_all" else block.tokens
    whole = 4 * tokens * block.width
    if strategy == "all_reduce":
        return (whole if ep > 1 else 0, whole if ep == 1 < tp else 0)
    shares = tp > 1 and block.width % tp == 0
    share = block.width // tp if shares else block.width
    rows = chunks * ep * cell_rows(tokens, block.chosen, ep, chunks)
    slots = -(-block.experts // ep) * ep
    ep_bytes = waves * 2 * rows * share * 4 + 4 * slots if ep > 1 else 0
    if not shares:
        return ep_bytes, whole if tp > 1 else 0
    parts = share + (block.width if block.shared else 0)
    return ep_bytes, 4 * (waves * rows * (share + block.width) + tokens * parts)


def check_every_routing(mesh, spec, block, strategy, chunks):
    run = compiled(functools.partial(moe, mesh=mesh(spec), strategy=strategy, chunks=chunks, **block.options))
    x, params = block.x(), block.params()
    for name, routing in block.routings().items():
        y, accounting = run(x, params, routing)
        assert relative(y, oracle_of(block)(x, params, routing)) < 1e-5, name
        check_accounting(accounting, routing, block, spec, strategy, chunks)


@pytest.mark.parametrize(("spec", "block", "chunks"), [*FAST_CASES, *slow_cases()])
def test_all_to_all_equals_the_oracle(mesh, spec, block, chunks):
    check_every_routing(mesh, spec, block, "all_to_all", chunks)


@pytest.mark.parametrize(
    ("spec", "block"),
    [
        *FAST_REPLICATED,
        *(
            pytest.param(spec, block, marks=pytest.mark.slow)
            for spec in MESHES
            for block in BLOCKS
            if (spec, block) not in FAST_REPLICATED
        ),
    ],
)
def test_all_reduce_equals_the_oracle(mesh, spec, block):
    check_every_routing(mesh, spec, block, "all_reduce", 1)


def test_routings_are_adversarial():
    """What the tests above rely on: crowds need several waves, and some devices get nothing at all."""
    routings = EVEN.routings()
    waves = {name: waves_of(routing, EVEN, 4) for name, routing in routings.items()}
    assert waves["ties"] == waves["last experts"] == math.ceil(16 / 6)
    assert waves["all to one expert"] == 2 and waves["one token"] == waves["all padding"] == 1
    assert max(waves_of(routing, ODD, 4, 2) for routing in ODD.routings().values()) > 1


@pytest.mark.parametrize("factor", [0.5, 1.25])
@pytest.mark.parametrize(
    ("spec", "block", "chunks"),
    [("ep=4,tp=2", CLAMPED, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in FAST_CASES if case[2] != 2)],
)
def test_capacity_factor_drops_what_gshard_drops(mesh, spec, block, chunks, factor):
    run = compiled(functools.partial(moe, mesh=mesh(spec), capacity_factor=factor, chunks=chunks, **block.options))
    x, params, ep = block.x(), block.params(), sizes(spec)[0]
    drops = {}
    for name, routing in block.routings().items():
        y, accounting = run(x, params, routing)
        kept, drops[name] = keep_first(routing, ep, capacity_of(-(-block.tokens // ep), block, factor))
        assert relative(y, oracle_of(block)(x, params, kept)) < 1e-5, name
        assert (int(accounting.dropped), int(accounting.waves)) == (drops[name], 1), name
        experts = np.asarray(routing.experts)
        asked = np.bincount(experts[experts != NOWHERE], minlength=block.experts)
        assert accounting.tokens_per_expert.tolist() == asked.tolist()
    assert drops["ties"] > 0 and drops["one token"] == 0


HIDDEN = {
    "gelu": lambda gate, up: jax.nn.gelu(gate, approximate=False) * up,
    "gelu_tanh": lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
    "relu": lambda gate, up: jnp.where(gate > 0, gate, 0.0) * up,
    CLAMPED.activation: lambda gate, up: (
        jnp.where(gate > 0.7, 0.7, gate)
        / (1 + jnp.exp(-1.702 * jnp.where(gate > 0.7, 0.7, gate)))
        * (1 + jnp.where(jnp.abs(up) > 0.7, 0.7 * jnp.sign(up), up))
    ),
}


@pytest.mark.parametrize(
    ("activation", "scales_input"),
    [
        ("gelu", False),
        ("gelu_tanh", False),
        ("relu", True),
        *((CLAMPED.activation, scales) for scales in (False, True)),
    ],
)
def test_activation_reaches_the_experts(activation, scales_input):
    block = dataclasses.replace(CLAMPED, activation=activation, scales_input=scales_input)
    x, params, routing = block.x(), block.params(), block.routings()["spread"]
    want = compiled(functools.partial(dense_by_hand, HIDDEN[activation], scales_input))(x, params, routing)
    assert relative(compiled(functools.partial(moe, **block.options))(x, params, routing)[0], want) < 1e-5
    assert relative(oracle_of(block)(x, params, routing), want) < 1e-5


def dense_by_hand(hidden, scales_input, x, params, routing):
    """Another oracle, in other words: gathers each token's matrices."""
    before, after = jnp.ones_like(routing.weights), routing.weights
    if scales_input:
        before, after = after, before
    both = jnp.einsum("td,tk,tkdcf->tkcf", x, before, params.gate_up[routing.experts])
    both = both + params.gate_up_bias[routing.experts]
    rows = jnp.einsum("tkf,tkfd->tkd", hidden(both[:, :, 0], both[:, :, 1]), params.down[routing.experts])
    rows = rows + params.down_bias[routing.experts]
    shared = jnp.einsum("td,dcf->tcf", x, params.shared_gate_up) + params.shared_gate_up_bias
    shared = jnp.einsum("tf,fd->td", hidden(shared[:, 0], shared[:, 1]), params.shared_down) + params.shared_down_bias
    return jnp.einsum("tkd,tk->td", rows, after) + shared * jax.nn.sigmoid(x @ params.shared_gate)[:, None]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_output_lies_as_the_tokens_do(mesh, kind):
    """Batch over ep and sequence whole, or replicated; with Explicit axes the type of the result says so too."""
    axes = jax.make_mesh((4, 2), ("ep", "tp"), axis_types=(kind, kind))
    x, params, routing = SMALL.x(), SMALL.params(), SMALL.routings()["spread"]
    want = oracle(x, params, routing)
    for spec, strategy in ((PartitionSpec("ep"), "all_to_all"), (PartitionSpec(), "all_reduce")):
        with jax.set_mesh(axes):
            put = jax.device_put(np.asarray(x).reshape(8, 3, -1), jax.NamedSharding(axes, spec))
            y, _ = compiled(functools.partial(moe, strategy=strategy))(put, params, routing)
        assert y.sharding.is_equivalent_to(jax.NamedSharding(axes, spec), y.ndim), y.sharding
        assert relative(np.asarray(y).reshape(x.shape), want) < 1e-5


def test_auto_takes_the_strategy_that_the_tokens_allow(mesh):
    """Visible in the accounting: only the exchange counts 4 bytes a slot."""
    run = compiled(functools.partial(moe, mesh=mesh("ep=4,tp=2")))
    for tokens, strategy in ((32, "all_to_all"), (30, "all_reduce")):
        block = dataclasses.replace(SMALL, tokens=tokens)
        _, accounting = run(block.x(), block.params(), block.routings()["one token"])
        assert float(accounting.ep_bytes) == documented_bytes(strategy, block, 4, 2, 1, 1)[0]


def test_half_precision_stays_half_precision(mesh):
    x, params, routing = SMALL.x(), SMALL.params(), SMALL.routings()["spread"]
    half_x, half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (x, params))
    y, accounting = compiled(functools.partial(moe, mesh=mesh("ep=4,tp=2")))(half_x, half, routing)
    assert y.dtype == jnp.bfloat16
    assert relative(y.astype(jnp.float32), oracle(x, params, routing)) < 3e-2
    full = documented_bytes("all_to_all", SMALL, 4, 2, 1, int(accounting.waves))
    assert float(accounting.tp_bytes) == full[1] / 2


MISTAKES = [
    (dict(ep_axis="expert"), "the mesh has no axis 'expert', only ('ep', 'tp')"),
    (dict(batch_axes=("dp", "ep")), "the mesh has no axis 'dp'"),
    (dict(strategy="ring"), "strategy 'ring' is unknown; choose one of auto, all_to_all, all_reduce"),
    (dict(strategy="all_reduce", batch_axes=("ep",)), "needs tokens replicated over 'ep'"),
    (dict(strategy="all_reduce", capacity_factor=1.0), "capacity_factor is for strategy all_to_all"),
    (dict(capacity_factor=0.0), "capacity_factor=0.0 must be above 0"),
    (dict(chunks=3), "chunks=3 does not divide the 2 expert slots of a device"),
    (dict(chunks=0), "chunks=0 does not divide"),
    (dict(num_experts=12), "8 stacked experts for num_experts=12 on ep=4; there must be 12 slots"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=lambda v: "" if isinstance(v, str) else str(v))
def test_mistakes_are_named(mesh, options, message):
    x, params, routing = EVEN.x(), EVEN.params(), EVEN.routings()["spread"]
    with pytest.raises(MoejaxError) as error:
        jax.eval_shape(functools.partial(moe, mesh=mesh("ep=4,tp=2"), **options), x, params, routing)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_not_inside_another_shard_map(mesh):
    x, params, routing = EVEN.x(), EVEN.params(), EVEN.routings()["spread"]
    whole = PartitionSpec()
    outer = jax.shard_map(lambda *a: moe(*a)[0], mesh=mesh("ep=4,tp=2"), in_specs=(whole,) * 3, out_specs=whole)
    with pytest.raises(MoejaxError, match="cannot run inside one"):
        jax.eval_shape(outer, x, params, routing)


def test_empty_slots_may_be_there_already(mesh):
    """As loaded layers hold them: padded weights and the true number of experts."""
    x, params, routing = CLAMPED.x(), CLAMPED.params(), CLAMPED.routings()["spread"]
    padded = params.replace(
        gate_up=jnp.pad(params.gate_up, ((0, 2), (0, 0), (0, 0), (0, 1))),
        down=jnp.pad(params.down, ((0, 2), (0, 1), (0, 0))),
        gate_up_bias=jnp.pad(params.gate_up_bias, ((0, 2), (0, 0), (0, 1))),
        down_bias=jnp.pad(params.down_bias, ((0, 2), (0, 0))),
    )
    function = functools.partial(moe, mesh=mesh("ep=4,tp=2"), num_experts=6, **CLAMPED.options)
    y, accounting = compiled(function)(x, padded, routing)
    assert relative(y, oracle_of(CLAMPED)(x, params, routing)) < 1e-5
    assert accounting.tokens_per_expert.shape == (6,)


def test_routing_may_be_flat_where_tokens_are_not():
    x, params, routing = EVEN.x(), EVEN.params(), EVEN.routings()["spread"]
    run = compiled(moe)
    y, _ = run(x.reshape(4, 8, -1), params, routing)
    z, _ = run(x.reshape(4, 8, -1), params, jax.tree.map(lambda a: a.reshape(4, 8, -1), routing))
    np.testing.assert_array_equal(y, z)
    assert relative(y.reshape(x.shape), oracle(x, params, Routing(routing.weights, routing.experts))) < 1e-5
