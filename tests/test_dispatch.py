"""The sorted slots of a DispatchPlan and its dense tensors say the same thing, that of GShard by hand."""

import functools

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import compiled, keep_first

from moejax import Routing, make_plan
from moejax.moe.router import NOWHERE

TOKENS, EXPERTS = 7, 5


@st.composite
def routings(draw):
    chosen = draw(st.sampled_from([2, EXPERTS]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    pool = draw(st.integers(chosen, EXPERTS))
    tokens = np.stack([rng.permutation(pool)[:chosen] for _ in range(TOKENS)])
    experts = np.where(rng.random(tokens.shape) < draw(st.sampled_from([0.0, 0.3, 1.0])), NOWHERE, tokens)
    weights = np.arange(1, experts.size + 1, dtype=np.float32).reshape(experts.shape)
    return Routing(jnp.asarray(weights), jnp.asarray(experts, jnp.int32))


@functools.cache
def views(capacity):
    @compiled
    def run(routing):
        plan = make_plan(routing, EXPERTS)
        dense = plan.dispatch_TEC(capacity), plan.combine_TEC(capacity)
        return plan, plan.sorted_position(), *dense, plan.dropped(TOKENS if capacity is None else capacity)

    return run


@settings(max_examples=50, deadline=None)
@given(routings())
def test_pairs_are_sorted_by_expert_then_by_token(routing):
    plan, position, *_ = views(None)(routing)
    experts = np.asarray(routing.experts).reshape(-1)
    by_expert = np.where(experts == NOWHERE, EXPERTS, experts)
    np.testing.assert_array_equal(np.argsort(position), np.argsort(by_expert, kind="stable"))
    np.testing.assert_array_equal(plan.order, np.argsort(position))
    np.testing.assert_array_equal(plan.counts, np.bincount(by_expert, minlength=EXPERTS + 1)[:EXPERTS])
    np.testing.assert_array_equal(plan.expert, by_expert)
    np.testing.assert_array_equal(plan.rank, [(by_expert[:i] == e).sum() for i, e in enumerate(by_expert)])


@settings(max_examples=50, deadline=None)
@given(routings(), st.sampled_from([None, 1, 3]))
def test_dense_tensors_are_the_slots(routing, capacity):
    plan, _, dispatch, combine, dropped = views(capacity)(routing)
    rows = TOKENS if capacity is None else capacity
    kept, lost = keep_first(routing, 1, rows)
    want = np.zeros((TOKENS, EXPERTS, rows))
    chosen = routing.experts.shape[1]
    for pair, (expert, rank) in enumerate(zip(np.asarray(plan.expert), np.asarray(plan.rank), strict=True)):
        if expert < EXPERTS and rank < rows:
            want[pair // chosen, expert, rank] = routing.weights[pair // chosen, pair % chosen]
    np.testing.assert_array_equal(combine, want)
    np.testing.assert_array_equal(dispatch, want != 0)
    assert int(dropped) == lost
    # Summed over rows the tensors are the routing that GShard keeps.
    again = np.zeros((TOKENS, EXPERTS))
    for token, k in np.argwhere(np.asarray(kept.experts) != NOWHERE):
        again[token, kept.experts[token, k]] = routing.weights[token, k]
    np.testing.assert_array_equal(np.asarray(combine).sum(-1), again)
    assert np.asarray(dispatch).sum(0).max() <= 1


def test_earlier_tokens_keep_their_place():
    """By hand; without a capacity there is room for all."""
    experts = [[2], [2], [0], [2], [NOWHERE], [2], [1]]
    routing = Routing(jnp.ones((TOKENS, 1)), jnp.array(experts, jnp.int32))
    _, _, dispatch, _, dropped = views(3)(routing)
    assert np.argwhere(dispatch).tolist() == [[0, 2, 0], [1, 2, 1], [2, 0, 0], [3, 2, 2], [6, 1, 0]]
    assert int(dropped) == 1
    _, _, dispatch, _, dropped = views(None)(routing)
    assert dispatch.shape == (TOKENS, EXPERTS, TOKENS)
    assert (int(dispatch.sum()), int(dropped)) == (TOKENS - 1, 0)
