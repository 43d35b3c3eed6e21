"""Gate, activation and up in one: values against float64, by every instruction set; gradients against the parts'."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import compiled, normal, relative

from moejax.kernels import native
from moejax.kernels.gated_matmul import silu_gated_matmul
from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.kernels.native.library import instruction_sets

CASES = [
    (7, 5, 3, [3, 0, 2]),
    (300, 64, 100, [130, 0, 150, 5]),
    (4, 300, 130, [1, 0, 2]),  # slices of the depth, gate and up at once
    (8, 200, 2100, [8]),  # and so wide that they are not
    (4, 6, 8, [0, 0]),
    (1, 6, 8, [0, 1]),
]


def operands(rows, width, hidden, sizes, dtype=jnp.float32):
    """Rows past the last group hold nonsense; some gates are far from 0."""
    rng = np.random.default_rng(rows)
    x = normal(rng, rows, width, scale=4).at[sum(sizes) :].set(jnp.nan)
    return x.astype(dtype), normal(rng, len(sizes), width, 2, hidden).astype(dtype), jnp.array(sizes, jnp.int32)


def in_float64(x, gate_up, sizes):
    x, gate_up = (np.asarray(a, np.float64) for a in (x, gate_up))
    y = np.zeros((len(x), gate_up.shape[3]))
    for row, group in enumerate(np.repeat(np.arange(len(gate_up)), sizes)):
        gate, up = (x[row] @ gate_up[group, :, half] for half in (0, 1))
        y[row] = gate / (1 + np.exp(-gate)) * up
    return y


@pytest.mark.parametrize("case", CASES)
def test_equals_float64(case):
    x, gate_up, sizes = operands(*case)
    want = in_float64(x, gate_up, sizes)
    assert np.abs(compiled(silu_gated_matmul)(x, gate_up, sizes) - want).max() <= 1e-6 * np.abs(want).max()
    assert silu_gated_matmul(x[:0], gate_up, 0 * sizes).shape == (0, gate_up.shape[3])


@pytest.mark.parametrize("isa", range(len(instruction_sets())), ids=instruction_sets())
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_every_instruction_set(isa, dtype, bound):
    for case in CASES[:4]:
        x, gate_up, sizes = operands(*case, dtype)
        run = compiled(functools.partial(native.gated_products, isa=isa))
        got = run(x, gate_up.reshape(*gate_up.shape[:2], -1), sizes)
        assert got.dtype == dtype
        assert relative(got.astype(jnp.float32), in_float64(x, gate_up, sizes)) < bound


def test_no_power_overflows():
    gate_up = jnp.ones((1, 1, 2, 1))
    x = jnp.array([[-1e4], [-100.0], [0.0], [100.0], [1e4]])
    y = compiled(silu_gated_matmul)(x, gate_up, jnp.array([5], jnp.int32))
    np.testing.assert_allclose(y[:, 0], [0, 0, 0, 1e4, 1e8], rtol=1e-6, atol=1e-30)


def test_gradients_are_those_of_the_parts():
    x, gate_up, sizes = operands(9, 5, 3, [3, 0, 6])

    def parts(x, gate_up):
        both = grouped_matmul(x, gate_up.reshape(3, 5, 6), sizes)
        return jax.nn.silu(both[:, :3]) * both[:, 3:]

    dy = normal(np.random.default_rng(1), 9, 3)

    def gradients(f):
        return compiled(lambda x, w, dy: jax.vjp(f, x, w)[1](dy))(x, gate_up, dy)

    for got, want in zip(gradients(lambda x, w: silu_gated_matmul(x, w, sizes)), gradients(parts), strict=True):
        assert relative(got, want) < 1e-6
