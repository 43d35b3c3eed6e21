"""Rotary embeddings against numbers that transformers computed (tests/golden/make_rope.py)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import RopeConfig
from moejax.families import read_config
from moejax.nn.rope import apply_rope, attention_factor, inverse_frequencies, rope_tables

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("rope.json").read_text())
DYNAMIC = RopeConfig(8, kind="dynamic", factor=2.0)


@pytest.mark.parametrize("name", GOLDEN["frequencies"])
def test_frequencies_equal_transformers(name):
    case = GOLDEN["frequencies"][name]
    config = read_config(case["config"])
    lengths = None if case["length"] is None else jnp.array([case["length"]])
    (rope,) = config.ropes
    got = np.asarray(inverse_frequencies(rope, config.max_position_embeddings, lengths))
    want = np.array(case["frequencies"], np.float32)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got if lengths is None else got[0], want, rtol=3e-7)
    assert attention_factor(rope) == pytest.approx(case["attention_factor"], rel=1e-12)


def test_cases_differ_from_one_another():
    """Each scaling does something, so equality with transformers says something."""
    cases = GOLDEN["frequencies"].values()
    seen = {(tuple(case["frequencies"]), case["attention_factor"]) for case in cases}
    # "dynamic, short" is the default table, a null factor is the ratio that "yarn" states, and one mscale does nothing.
    assert len(seen) == len(cases) - 3


def test_tables_and_rotation_equal_transformers():
    case = GOLDEN["rotation"]
    config = read_config(case["config"])
    (rope,) = config.ropes
    cos, sin = jax.jit(lambda p: rope_tables(rope, 4096, p))(jnp.array(case["positions"]))
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(cos, case["cos"], atol=2e-6)
    np.testing.assert_allclose(sin, case["sin"], atol=2e-6)
    x = jnp.array(case["x"], jnp.float32)
    np.testing.assert_allclose(apply_rope(x, cos, sin), case["turned"], atol=4e-6)


def test_an_odd_width_turns_a_pair_more():
    """As transformers has it: the exponents are those of the odd width."""
    rope = RopeConfig(5, theta=100.0)
    frequencies = inverse_frequencies(rope, 64)
    np.testing.assert_allclose(frequencies, [1, 100 ** (-2 / 5), 100 ** (-4 / 5)], rtol=1e-6)
    assert rope.paired == 6
    x = jnp.ones((1, 1, 1, 8))
    turned = apply_rope(x, *rope_tables(rope, 64, jnp.array([[1]])))[0, 0, 0]
    angles = np.tile(frequencies, 2)
    sign = np.repeat([-1, 1], 3)
    np.testing.assert_allclose(turned, [*(np.cos(angles) + sign * np.sin(angles)), 1, 1], rtol=1e-6)


def test_rotation_keeps_dtype_and_rounds_once():
    cos, sin = rope_tables(RopeConfig(8), 64, jnp.array([[3, 9]]))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 3, 8)), jnp.bfloat16)
    turned = apply_rope(x, cos, sin)
    assert turned.dtype == jnp.bfloat16
    exact = apply_rope(x.astype(jnp.float32), cos, sin)
    np.testing.assert_array_equal(turned.astype(jnp.float32), exact.astype(jnp.bfloat16).astype(jnp.float32))


def test_dot_products_depend_on_distance_only():
    q, k = np.random.default_rng(1).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def score(q_position, k_position):
        turned = [
            apply_rope(jnp.asarray(x), *rope_tables(RopeConfig(16), 64, jnp.array([[p]])))
            for x, p in ((q, q_position), (k, k_position))
        ]
        return float(np.vdot(*map(np.asarray, turned)))

    assert score(5, 2) == pytest.approx(score(43, 40), abs=1e-4)
    assert abs(score(5, 2) - score(5, 4)) > 1e-2


def test_dynamic_row_in_a_batch_equals_the_row_alone():
    lengths = jnp.array([10, 64, 65, 500])
    frequencies = jax.jit(lambda n: inverse_frequencies(DYNAMIC, 64, n))
    batch = np.asarray(frequencies(lengths))
    for row in range(4):
        np.testing.assert_array_equal(batch[row], np.asarray(frequencies(lengths[row : row + 1]))[0])
    static = inverse_frequencies(DYNAMIC, 64)
    np.testing.assert_array_equal(batch[:2], [static, static])
    assert np.all(batch[3, 1:] < batch[2, 1:]) and np.all(batch[2, 1:] < static[1:])


def test_dynamic_tables_take_the_length_from_positions_unless_given():
    positions = jnp.array([[0, 99], [0, 20]])
    inferred = rope_tables(DYNAMIC, 64, positions)
    given = rope_tables(DYNAMIC, 64, positions, jnp.array([100, 21]))
    longer = rope_tables(DYNAMIC, 64, positions, jnp.array([300, 21]))
    np.testing.assert_array_equal(inferred, given)
    assert np.abs(np.asarray(longer[0] - given[0]))[0, 1].max() > 1e-3
    np.testing.assert_array_equal(longer[0][1], given[0][1])


def test_interleaved_pairs_are_neighbours_and_a_partial_rotation_leaves_the_rest():
    """Both layouts turn the same pairs, only placed otherwise."""
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1, 2, 3, 10)), jnp.float32)
    cos, sin = rope_tables(RopeConfig(6), 64, jnp.array([[3, 9]]))
    halves = apply_rope(x, cos, sin)
    np.testing.assert_array_equal(halves[..., 6:], x[..., 6:])
    order = np.array([0, 3, 1, 4, 2, 5, 6, 7, 8, 9])  # (i, i + 3) become neighbours
    neighbours = apply_rope(x[..., order], cos, sin, interleaved=True)
    np.testing.assert_array_equal(neighbours, halves[..., order])


def test_scale_by_length_of_each_row():
    factors = (1.0, 2.0, 3.0, 4.0)
    rope = RopeConfig(
        8, kind="longrope", original_length=16, short_factors=factors, long_factors=factors, mscales=(1.5, 2.5)
    )
    positions = jnp.array([[0, 15], [0, 16]])
    cos, sin = rope_tables(rope, 64, positions)
    np.testing.assert_allclose(jnp.hypot(cos, sin), np.broadcast_to([[[1.5]], [[2.5]]], (2, 2, 4)), rtol=1e-6)
