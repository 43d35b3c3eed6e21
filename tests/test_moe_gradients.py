"""Gradients of the tokens, of every weight and of the routing weights against the dense oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import (
    CLAMPED,
    EVEN,
    FAST,
    MESHES,
    ODD,
    SCALED,
    Block,
    capacity_of,
    compiled,
    keep_first,
    normal,
    oracle,
    relative,
    waves_of,
)

from moejax import Routing, dense_moe, moe
from moejax.planning.collectives import collectives


def gradients(block_function, cotangent):
    """(x, params, routing) -> the gradients of a weighted sum of the outputs, by name."""

    def loss(x, params, weights, experts):
        return jnp.vdot(block_function(x, params, Routing(weights, experts)), cotangent)

    def run(x, params, routing):
        dx, dparams, dweights = jax.grad(loss, (0, 1, 2))(x, params, routing.weights, routing.experts)
        named = {"x": dx, "weights": dweights}
        fields = [field.name for field in dataclasses.fields(params)]
        return named | {f: getattr(dparams, f) for f in fields if getattr(dparams, f) is not None}

    return run


def cotangent_of(block):
    return normal(np.random.default_rng(9), block.tokens, block.width)


@functools.cache
def oracle_gradients(block):
    return compiled(gradients(functools.partial(dense_moe, **block.options), cotangent_of(block)))


def check(run, block, routings, kept=lambda routing: routing):
    x, params = block.x(), block.params()
    for name, routing in routings.items():
        got, want = run(x, params, routing), oracle_gradients(block)(x, params, kept(routing))
        kinds = 1 + bool(block.shared)  # each of a matrix, or a matrix and its bias, on either side of the activation
        assert got.keys() == want.keys() and len(got) == 2 + kinds * (2 + 2 * block.bias) + block.gated
        chosen = np.asarray(kept(routing).experts) >= 0
        for tensor in got:
            a, b = got[tensor], want[tensor]
            if tensor == "weights":  # of a choice that goes nowhere the weight does not matter
                assert not np.asarray(a)[~chosen].any(), name
                a, b = np.where(chosen, a, 0), np.where(chosen, b, 0)
            assert relative(a, b) < 1e-4, f"{tensor} of {name!r}"


FAST_CASES = [
    ("ep=4,tp=2", ODD, 1),
    ("ep=2,tp=4", EVEN, 1),
    ("ep=2,tp=4", CLAMPED, 1),
    ("ep=4,tp=2", SCALED, 1),
]
FAST_REPLICATED = [
    ("ep=4,tp=2", EVEN, 1),
    ("ep=2,tp=4", ODD, 1),
    ("ep=4,tp=2", CLAMPED, 1),
    ("ep=2,tp=4", SCALED, 1),
]


def with_slow(cases):
    rest = [
        (spec, block, 1) for spec in MESHES for block in (EVEN, ODD, CLAMPED, SCALED) if (spec, block, 1) not in cases
    ]
    return [
        *cases,
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [*rest, ("ep=4,tp=2", ODD, 2), ("ep=2,tp=4", ODD, 3)]
        ),
    ]


@pytest.mark.parametrize(("spec", "block", "chunks"), with_slow(FAST_CASES))
def test_all_to_all(mesh, spec, block, chunks):
    routings, ep = block.routings(), int(spec[3])
    assert ep == 1 or max(waves_of(routing, block, ep, chunks) for routing in routings.values()) > 1
    function = functools.partial(moe, mesh=mesh(spec), strategy="all_to_all", chunks=chunks, **block.options)
    check(compiled(gradients(lambda *a: function(*a)[0], cotangent_of(block))), block, routings)


@pytest.mark.parametrize(("spec", "block", "chunks"), with_slow(FAST_REPLICATED))
def test_all_reduce(mesh, spec, block, chunks):
    function = functools.partial(moe, mesh=mesh(spec), strategy="all_reduce", **block.options)
    check(compiled(gradients(lambda *a: function(*a)[0], cotangent_of(block))), block, block.routings())


@pytest.mark.parametrize("strategy", ["all_to_all", pytest.param("all_reduce", marks=pytest.mark.slow)])
def test_through_checkpoint(mesh, strategy):
    """Computed again in the backward pass, whose repeated waves are there too."""
    function = functools.partial(moe, mesh=mesh("ep=4,tp=2"), strategy=strategy)
    again = jax.checkpoint(lambda *a: function(*a)[0])
    routings = {name: EVEN.routings()[name] for name in ("spread", "ties", "mostly padding")}
    check(compiled(gradients(again, cotangent_of(EVEN))), EVEN, routings)


def test_dropped_pairs_have_none(mesh):
    function = functools.partial(moe, mesh=mesh("ep=4,tp=2"), capacity_factor=0.5)
    capacity = capacity_of(8, EVEN, 0.5)
    routings = {name: EVEN.routings()[name] for name in ("spread", "ties")}
    run = compiled(gradients(lambda *a: function(*a)[0], cotangent_of(EVEN)))
    check(run, EVEN, routings, kept=lambda routing: keep_first(routing, 4, capacity)[0])


def test_without_a_mesh_and_without_a_shared_expert():
    block = Block(tokens=11, experts=3)
    check(compiled(gradients(lambda *a: moe(*a)[0], cotangent_of(block))), block, block.routings())


@pytest.mark.slow
def test_backward_gathers_neither_weights_nor_tokens(mesh):
    """Over ep only exchanges, the counts, and the sums of what is the same on all its devices (shared expert, gate)."""
    axes = mesh("ep=4,tp=2")
    function = functools.partial(moe, mesh=axes, strategy="all_to_all")
    run = jax.jit(gradients(lambda *a: function(*a)[0], cotangent_of(EVEN)))
    text = run.lower(EVEN.x(), EVEN.params(), EVEN.routings()["spread"]).compile(FAST).as_text()
    found = collectives(text, axes)
    assert {c.dtype for c in found if c.kind == "all-gather" and "ep" in c.axes} == {"s32"}
    assert {c.kind for c in found if "ep" in c.axes} <= {"all-gather", "all-to-all", "all-reduce"}
    shared = 4 * EVEN.width * EVEN.shared // 2
    assert sum(c.bytes for c in found if c.kind == "all-reduce" and "ep" in c.axes) == 3 * shared


def test_oracle_is_the_sum_over_experts():
    """The oracle itself, in float64 by hand for one token of two experts."""
    block = Block(tokens=1, width=2, hidden=3, experts=2, chosen=2)
    x, params = (jax.tree.map(np.asarray, a) for a in (block.x(), block.params()))
    routing = Routing(jnp.array([[0.25, 2.0]]), jnp.array([[1, 0]], jnp.int32))
    want = np.zeros(2)
    for weight, expert in ((0.25, 1), (2.0, 0)):
        gate, up = x[0] @ params.gate_up[expert, :, 0], x[0] @ params.gate_up[expert, :, 1]
        want += weight * ((gate / (1 + np.exp(-gate)) * up) @ params.down[expert])
    np.testing.assert_allclose(oracle(block.x(), block.params(), routing)[0], want, rtol=1e-5)
