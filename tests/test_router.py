"""Routers against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from moe_cases import FAST, compiled, normal
from router_rows import EXPERTS, ROWS

from moejax import MoEConfig, MoejaxError, RouterConfig, Routing, softmax_router
from moejax.moe.router import NOWHERE, router_for, selection_scores
from moejax.moe.ties import decision_margin
from moejax.planning.collectives import collectives

TOKENS = 16


def learned(config, correction, scale):
    """The keywords that a row's router asks for."""
    wanted = {"correction": (config.correction, correction), "expert_scale": (config.expert_scale, scale)}
    return {name: jnp.asarray(value, jnp.float32) for name, (asked, value) in wanted.items() if asked}


@functools.cache
def program(name):
    """logits, learned parts -> the routing, the selection scores."""
    config = ROWS[name].config

    @compiled
    def run(logits, keywords):
        correction = keywords.get("correction")
        return router_for(config)(logits, **keywords), selection_scores(config, logits, correction)

    return run


@st.composite
def numbers(draw):
    """Logits, corrections, scales: random, or few different ones, so that most experts tie."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = rng.standard_normal((TOKENS, EXPERTS)) * draw(st.sampled_from([0.1, 3.0]))
    # With corrections below -1 all selection scores are negative: a mask of 0 would be worth most.
    correction = rng.standard_normal(EXPERTS) * 0.3 - draw(st.sampled_from([0.0, 2.0]))
    if draw(st.booleans()):
        logits, correction = np.round(logits), np.round(correction)
    return tuple(a.astype(np.float32) for a in (logits, correction, 1 + rng.standard_normal(EXPERTS)))


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(drawn=numbers())
def test_every_row_of_the_table_is_the_family_s_router(name, drawn):
    logits, correction, scale = drawn
    row = ROWS[name]
    got, selection = program(name)(logits, learned(row.router, correction, scale))
    wide = [a.astype(np.float64) for a in drawn]
    want = [row.slow(token.copy(), wide[1], wide[2]) for token in wide[0]]
    assert got.experts.tolist() == [experts for experts, _ in want]
    np.testing.assert_allclose(got.weights, [weights for _, weights in want], rtol=2e-5)
    assert got.experts.dtype == jnp.int32 and got.weights.dtype == selection.dtype == jnp.float32
    np.testing.assert_array_equal(np.argsort(-selection, -1, kind="stable")[:, : row.chosen], got.experts)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "gemma4", "phimoe"])
def test_routing_of_cut_tokens_has_no_collective(name, kind):
    row, rng = ROWS[name], np.random.default_rng(0)
    axes = jax.make_mesh((4, 2), ("ep", "tp"), axis_types=(kind, kind))
    logits, keywords = normal(rng, 8, 3, EXPERTS), learned(row.router, normal(rng, EXPERTS), normal(rng, EXPERTS))
    with jax.set_mesh(axes):
        put = jax.device_put(logits, NamedSharding(axes, PartitionSpec("ep")))
        run = jax.jit(router_for(row.config)).lower(put, **keywords).compile(FAST)
        got = run(put, **keywords)
    assert collectives(run.as_text(), axes) == []
    want = program(name)(logits, keywords)[0]
    np.testing.assert_array_equal(got.experts, want.experts)
    np.testing.assert_allclose(got.weights, want.weights, rtol=1e-6)


def by_hand(logits, chosen, renormalise):
    """Stable sort of exact probabilities: ties stay in the order of their index."""
    logits = np.asarray(logits, np.float64)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    experts = np.argsort(-probabilities, -1, kind="stable")[..., :chosen]
    weights = np.take_along_axis(probabilities, experts, -1)
    return weights / weights.sum(-1, keepdims=True) if renormalise else weights, experts


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("chosen", [1, 6])
def test_chooses_and_weighs(chosen, renormalise):
    logits = 3 * normal(np.random.default_rng(chosen), 2, 25, 6)
    got = compiled(softmax_router(chosen, renormalise=renormalise))(logits)
    weights, experts = by_hand(logits, chosen, renormalise)
    np.testing.assert_array_equal(got.experts, experts)
    np.testing.assert_allclose(got.weights, weights, rtol=1e-5)


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


def test_an_expert_of_a_group_that_is_not_kept_weighs_nothing():
    """DeepSeek-V2, where the kept group has one probability above 0: the mask's zeros tie with it and come earlier."""
    config = MoEConfig(8, 8, 4, 2, router=RouterConfig(groups=2, renormalise=False))
    got = router_for(config)(jnp.array([[0.0, -200.0, 0.5, -200.0]]))
    assert got.experts.tolist() == [[2, 0]]
    np.testing.assert_allclose(got.weights, [[np.exp(0.5) / (1 + np.exp(0.5)), 0]], rtol=1e-6)


def test_half_precision_logits_are_widened_first():
    """0.1 apart near 100: one bfloat16, two float32."""
    logits = jnp.array([[100.0, 100.5]], jnp.bfloat16)
    got = softmax_router(2, renormalise=False)(logits)
    assert got.weights.dtype == jnp.float32
    np.testing.assert_allclose(got.weights, by_hand(logits, 2, False)[0], rtol=1e-6)


def test_equal_settings_give_the_same_router():
    narrow, wide = (MoEConfig(8, f, 6, 2, router=RouterConfig(renormalise=True)) for f in (8, 16))
    assert router_for(narrow) is router_for(wide) is softmax_router(2)


@pytest.mark.parametrize(
    ("router", "chosen", "keywords", "message"),
    [
        (RouterConfig("sparsemixer"), 3, {}, "chooses 2 experts for each token, not num_experts_per_tok=3"),
        (RouterConfig(correction=True), 2, {}, "has a learned correction; call it with correction="),
        (RouterConfig(expert_scale=True), 2, {}, "has a learned expert_scale"),
        (RouterConfig(), 2, {"correction": jnp.zeros(4)}, "takes no correction; set RouterConfig(correction=True)"),
    ],
)
def test_mistakes_are_named(router, chosen, keywords, message):
    with pytest.raises(MoejaxError) as error:
        router_for(MoEConfig(8, 8, 4, chosen, router=router))(jnp.zeros((1, 4)), **keywords)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["deepseek_v3", "gemma4", "phimoe"])
def test_weights_have_the_gradient_of_their_formula(name):
    """Central differences; far logits, whose exponentials overflow, give no NaN."""
    row, rng = ROWS[name], np.random.default_rng(1)
    logits = rng.standard_normal((1, EXPERTS)) * 0.01 + 3  # near enough for sparsemixer to weigh several
    logits[0, -1] = -300.0
    keywords = learned(row.router, rng.standard_normal(EXPERTS) * 0.1, 1 + rng.random(EXPERTS))
    slow = [np.asarray(keywords.get(part, np.zeros(EXPERTS)), np.float64) for part in ("correction", "expert_scale")]
    squares = jax.grad(lambda x: (router_for(row.config)(x, **keywords).weights ** 2).sum())
    gradient = compiled(squares)(jnp.asarray(logits, jnp.float32))
    for expert in range(EXPERTS):
        step = np.eye(EXPERTS)[expert] * 1e-5
        up, down = ((row.slow(logits[0] + sign * step, *slow)[1] ** 2).sum() for sign in (1, -1))
        np.testing.assert_allclose(gradient[0, expert], (up - down) / 2e-5, rtol=1e-3, atol=1e-5)


MARGINS = [
    (RouterConfig("none"), 2, [4.0, 1.0, 3.0, 2.0], 1 / 4),
    (RouterConfig("none"), 4, [4.0, 1.0, 3.0, 2.0], np.inf),
    # Groups are worth 4 and 3.5; within the kept one 4 and 1 are 3 apart.
    (RouterConfig("none", groups=2, masked_score=-np.inf), 1, [4.0, 1.0, 3.5, 3.25], 0.5 / 4),
    (RouterConfig("none", groups=2, masked_score=-np.inf, group_score="top2"), 1, [4.0, 1.0, 3.5, 1.0], 0.5 / 5),
    # Nothing changes which experts sparsemixer chooses, but the first two change places, or the third comes near.
    (RouterConfig("sparsemixer"), 2, [4.0, 3.99, 2.0, 1.0], 0.01 / 4),
    (RouterConfig("sparsemixer"), 2, [4.0, 3.9, 3.82, 1.0], (3.9 * 0.02 - 0.08) / -4),
]


@pytest.mark.parametrize(("router", "chosen", "logits", "margin"), MARGINS)
def test_margin_is_the_distance_to_another_decision(router, chosen, logits, margin):
    config = MoEConfig(8, 8, 4, chosen, router=router)
    np.testing.assert_allclose(decision_margin(config, jnp.array([logits])), [margin], rtol=1e-3)


def test_margin_reads_the_correction():
    config = MoEConfig(8, 8, 3, 1, router=RouterConfig("none", correction=True))
    got = decision_margin(config, jnp.array([[1.0, 2.0, 3.0]]), jnp.array([4.0, 0.0, 1.0]))
    np.testing.assert_allclose(got, [1 / 5])


def test_only_sends_the_others_nowhere_at_weight_zero():
    routing = Routing(jnp.full((2, 3, 2), 0.5), jnp.ones((2, 3, 2), jnp.int32))
    keep = jnp.array([[True, False, True], [False, True, False]])
    got = routing.only(keep)
    np.testing.assert_array_equal(got.experts, np.where(keep[..., None], 1, NOWHERE) * np.ones((1, 1, 2), int))
    np.testing.assert_array_equal(got.weights, np.where(keep[..., None], 0.5, 0) * np.ones((1, 1, 2)))
