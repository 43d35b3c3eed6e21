"""Routers against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import normal

from moejax import MoEConfig, RouterConfig, Routing, softmax_router
from moejax.moe.router import NOWHERE, router_for


def by_hand(logits, chosen, renormalise):
    """Stable sort of exact probabilities: ties stay in the order of their index."""
    logits = np.asarray(logits, np.float64)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    experts = np.argsort(-probabilities, -1, kind="stable")[..., :chosen]
    weights = np.take_along_axis(probabilities, experts, -1)
    return weights / weights.sum(-1, keepdims=True) if renormalise else weights, experts


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("chosen", [1, 3, 6])
def test_chooses_and_weighs(chosen, renormalise):
    logits = 3 * normal(np.random.default_rng(chosen), 2, 25, 6)
    got = softmax_router(chosen, renormalise=renormalise)(logits)
    weights, experts = by_hand(logits, chosen, renormalise)
    np.testing.assert_array_equal(got.experts, experts)
    np.testing.assert_allclose(got.weights, weights, rtol=1e-5)
    assert got.experts.dtype == jnp.int32 and got.weights.dtype == jnp.float32


@pytest.mark.parametrize(
    ("logits", "experts"),
    [
        ([0.0, 0.0, 0.0, 0.0], [0, 1, 2]),
        ([1.0, 2.0, 2.0, 1.0], [1, 2, 0]),
        ([0.0, 5.0, 0.0, 5.0], [1, 3, 0]),
        ([-200.0, -200.0, 0.0, -200.0], [2, 0, 1]),  # three probabilities of exactly 0
    ],
)
def test_ties_go_to_the_lower_index(logits, experts):
    assert softmax_router(3)(jnp.array([logits])).experts.tolist() == [experts]


def test_half_precision_logits_are_widened_first():
    """0.1 apart near 100: one bfloat16, two float32."""
    logits = jnp.array([[100.0, 100.5]], jnp.bfloat16)
    got = softmax_router(2, renormalise=False)(logits)
    assert got.weights.dtype == jnp.float32
    np.testing.assert_allclose(got.weights, by_hand(logits, 2, False)[0], rtol=1e-6)


def test_config_says_which_router():
    logits = normal(np.random.default_rng(0), 4, 6)
    for renormalise in (True, False):
        config = MoEConfig(8, 8, 6, 2, router=RouterConfig(renormalise=renormalise))
        np.testing.assert_allclose(router_for(config)(logits).weights, by_hand(logits, 2, renormalise)[0], rtol=1e-5)


def test_only_sends_the_others_nowhere_at_weight_zero():
    routing = Routing(jnp.full((2, 3, 2), 0.5), jnp.ones((2, 3, 2), jnp.int32))
    keep = jnp.array([[True, False, True], [False, True, False]])
    got = routing.only(keep)
    np.testing.assert_array_equal(got.experts, np.where(keep[..., None], 1, NOWHERE) * np.ones((1, 1, 2), int))
    np.testing.assert_array_equal(got.weights, np.where(keep[..., None], 0.5, 0) * np.ones((1, 1, 2)))
