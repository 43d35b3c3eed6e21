"""Balance losses against numpy: values, gradients, and what they are for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from loss_views import LLAMA4, ORACLES, SEGMENTS, SIGMOID, SOFTMAX, random_views, view_of
from moe_cases import FAST, compiled

from moejax import MoEConfig, MoejaxError
from moejax.moe.balance import switch_balance
from moejax.moe.losses import BALANCE, z_loss
from moejax.planning.collectives import collectives

LOSSES = BALANCE | {"z": z_loss}
# sum_i f_i P_i times this is what the loss says: transformers lets the f_i sum to K.
SCALE = {"switch": 2, "sequence": 1, "global": 1}


def with_logits(views, logits):
    return [dataclasses.replace(view, logits=of) for view, of in zip(views, logits, strict=True)]


@functools.cache
def program():
    """views -> every loss and its gradients in each layer's logits."""

    @compiled
    def run(views):
        logits = [view.logits for view in views]
        return {
            name: jax.value_and_grad(lambda logits, loss=loss: loss(with_logits(views, logits)))(logits)
            for name, loss in LOSSES.items()
        }

    return run


def values(views):
    return {name: float(value) for name, (value, _) in program()(views).items()}


@pytest.mark.parametrize("config", [SOFTMAX, SIGMOID, LLAMA4], ids=["softmax", "sigmoid", "llama4"])
def test_values_and_gradients_are_numpy_s(config):
    """Gradients by central differences, the choice of experts held."""
    views, step = random_views(config), 1e-5
    logits = [np.asarray(view.logits, np.float64) for view in views]
    for name, (value, gradients) in program()(views).items():
        assert value == pytest.approx(ORACLES[name](views, logits), rel=1e-6), name
        for layer, gradient in enumerate(gradients):
            for place in np.ndindex(gradient.shape):
                sides = []
                for sign in (1, -1):
                    logits[layer][place] += sign * step
                    sides.append(ORACLES[name](views, logits))
                    logits[layer][place] -= sign * step
                want = (sides[0] - sides[1]) / (2 * step)
                assert float(gradient[place]) == pytest.approx(want, rel=1e-3, abs=1e-7), (name, layer, place)


def test_choices_that_go_nowhere_are_counted_nowhere():
    """A user's own router may make some."""
    views = random_views(SOFTMAX)
    experts = np.asarray(views[0].routing.experts).copy()
    experts[1, 1:4, 0] = -1
    views[0] = view_of(SOFTMAX, views[0].logits, experts, SEGMENTS, views[0].earlier)
    logits = [np.asarray(view.logits, np.float64) for view in views]
    assert values(views) == pytest.approx({name: oracle(views, logits) for name, oracle in ORACLES.items()}, rel=1e-6)


def test_of_padding_alone_nothing_is_lost():
    nothing = random_views(SOFTMAX, segments=np.zeros_like(SEGMENTS))
    nothing = [dataclasses.replace(view, earlier=jnp.zeros(5, jnp.int32)) for view in nothing]
    for value, gradients in program()(nothing).values():
        assert value == 0 and not np.asarray(gradients).any()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), config=st.sampled_from([SOFTMAX, SIGMOID]))
def test_the_names_of_experts_and_the_order_of_sequences_do_not_matter(seed, config):
    views, rng = random_views(config, seed=seed), np.random.default_rng(seed)
    names, rows = rng.permutation(config.num_experts), rng.permutation(len(SEGMENTS))

    def renamed(view):
        experts = np.asarray(view.routing.experts)[rows]
        experts = np.argsort(names)[experts] * (experts >= 0)
        return view_of(config, view.logits[rows][..., names], experts, SEGMENTS[rows], view.earlier[names])

    assert values([renamed(view) for view in views]) == pytest.approx(values(views), rel=1e-5)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_the_order_of_tokens_matters_to_sequences_alone(seed):
    views, rng = random_views(SOFTMAX, seed=seed), np.random.default_rng(seed)
    order = rng.permutation(SEGMENTS.size)

    def shuffled(view):
        flat = [np.asarray(a).reshape(SEGMENTS.size, -1)[order] for a in (view.logits, view.routing.experts)]
        logits, experts = (a.reshape(*SEGMENTS.shape, -1) for a in flat)
        return view_of(SOFTMAX, logits, experts, SEGMENTS.reshape(-1)[order].reshape(SEGMENTS.shape), view.earlier)

    before, after = values(views), values([shuffled(view) for view in views])
    assert after.pop("sequence") != pytest.approx(before.pop("sequence"), rel=1e-4)
    assert after == pytest.approx(before, rel=1e-5)


EVEN = MoEConfig(8, 8, 6, 2)


def cyclic():
    """Six tokens a row, each sequence choosing all six experts twice."""
    return np.stack([np.arange(24) % 6, (np.arange(24) + 3) % 6], -1).reshape(4, 6, 2)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_evenly_spread_tokens_are_worth_one(seed):
    """Whatever the scores are, where the choice is even; and whatever the choice is, where the scores are."""
    rng, one = np.random.default_rng(seed), np.ones((4, 6), np.int32)
    logits, experts = rng.standard_normal((4, 6, 6)), rng.integers(0, 6, (4, 6, 2))
    none = jnp.zeros(6, jnp.int32)
    for view in (view_of(EVEN, logits, cyclic(), one, none), view_of(EVEN, 0 * logits, experts, one, none)):
        got = values([view, view])
        assert {name: got[name] / scale for name, scale in SCALE.items()} == pytest.approx(dict.fromkeys(SCALE, 1))


def test_a_crowd_is_worth_most_and_is_pushed_away():
    """All to the experts 0 and 1, surely: E / K. Less sure, the gradient lowers the logits of these two alone."""
    crowd, one = np.broadcast_to([0, 1], (4, 6, 2)), np.ones((4, 6), np.int32)
    logits = np.where(np.arange(6) < 2, 1.0, 0.0) * np.ones((4, 6, 1))
    none = jnp.zeros(6, jnp.int32)
    got = values([view_of(EVEN, 50 * logits, crowd, one, none)] * 2)
    assert {name: got[name] / scale for name, scale in SCALE.items()} == pytest.approx(dict.fromkeys(SCALE, 3))
    found = program()([view_of(EVEN, logits, crowd, one, none)] * 2)
    for name in SCALE:
        signs = np.sign(np.asarray(found[name][1][0]))
        np.testing.assert_array_equal(signs, np.broadcast_to([1, 1, -1, -1, -1, -1], signs.shape))


def test_who_makes_up_for_whom():
    """Rows of one text each, and one expert each, are uneven by sequence only; so is a batch after its opposite."""
    one, certain = np.ones((4, 6), np.int32), MoEConfig(8, 8, 4, 1)
    experts = np.broadcast_to(np.arange(4)[:, None, None], (4, 6, 1))
    logits = 60 * np.eye(4)[experts[..., 0]]
    none = jnp.zeros(4, jnp.int32)
    got = values([view_of(certain, logits, experts, one, none)] * 2)
    assert (got["sequence"], got["switch"], got["global"]) == pytest.approx((4, 1, 1))
    crowd = view_of(certain, logits[:1].repeat(4, 0), experts[:1].repeat(4, 0), one, jnp.array([0, 24, 24, 24]))
    got = values([crowd] * 2)
    assert (got["sequence"], got["switch"], got["global"]) == pytest.approx((4, 4, 1))
    alone = compiled(LOSSES["global"])([dataclasses.replace(crowd, earlier=None)])
    assert float(alone) == pytest.approx(4)


@pytest.mark.parametrize("name", LOSSES)
def test_only_small_sums_travel(name, mesh):
    """Tokens cut over ep: no gather, and not a byte more than some sums of E numbers and a few counts in each layer."""
    axes, segments = mesh("ep=4,tp=2"), np.tile(SEGMENTS, (2, 1))
    views = random_views(SIGMOID, segments=segments)

    def put(a):
        cut = PartitionSpec("ep") if a.shape[:1] == segments.shape[:1] else PartitionSpec()
        return jax.device_put(a, NamedSharding(axes, cut))

    views = jax.tree.map(put, views)
    run = jax.jit(jax.value_and_grad(lambda logits: LOSSES[name](with_logits(views, logits))))
    cut = run.lower([view.logits for view in views]).compile(FAST)
    found = collectives(cut.as_text(), axes)
    assert {c.kind for c in found} == {"all-reduce"} and {c.axes for c in found} == {("ep",)}
    assert sum(c.bytes for c in found) <= 4 * len(views) * (SIGMOID.num_experts + 2)
    value, gradients = cut([view.logits for view in views])
    want, wanted = program()(jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), views))[name]
    assert value == pytest.approx(float(want), rel=1e-6)
    np.testing.assert_allclose(gradients, wanted, rtol=1e-4, atol=1e-7)


def test_layers_of_other_numbers_of_experts_are_not_pooled():
    views = random_views(SOFTMAX, 1) + random_views(dataclasses.replace(SOFTMAX, num_experts=6), 1)
    with pytest.raises(MoejaxError, match=r'pools layers.*\[5, 6\] experts; choose "sequence" or "global"'):
        switch_balance(views)
    got = compiled(lambda views: {name: LOSSES[name](views) for name in ("sequence", "global", "z")})(views)
    logits = [np.asarray(view.logits, np.float64) for view in views]
    assert got == pytest.approx({name: ORACLES[name](views, logits) for name in got}, rel=1e-6)
