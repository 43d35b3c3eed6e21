"""JAX's Hopper kernel behind its wrapper, in its GPU interpreter, against a loop over rows."""

import jax.numpy as jnp
import pytest
from grouped_cases import CASES, check
from jax.experimental.pallas import mosaic_gpu

from moejax.kernels import hopper

interpreted = pytest.mark.skipif(
    not hasattr(mosaic_gpu, "force_gpu_interpret_mode"), reason="this JAX has no public GPU interpreter"
)


def check_interpreted(rows, sizes, dtype, shape=(96, 160)):
    with mosaic_gpu.force_gpu_interpret_mode():
        check(hopper.products, None, rows, sizes, shape=shape, dtype=dtype)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(("rows", "sizes"), CASES)
def test_equals_a_loop(rows, sizes):
    check_interpreted(rows, sizes, jnp.bfloat16)


@interpreted
def test_float16_is_accumulated_in_float32():
    check_interpreted(13, [3, 0, 2, 4], jnp.float16, shape=(512, 64))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_what_it_takes(dtype):
    def supports(depth, width, weights=dtype, transposed=False, out_dtype=dtype):
        shape = (2, width, depth) if transposed else (2, depth, width)
        w = jnp.zeros(shape, weights)
        return hopper.supports(jnp.zeros((9, depth), dtype), w, transposed=transposed, out_dtype=out_dtype)

    assert supports(64, 96) and supports(96, 64, transposed=True)
    assert not supports(48, 64) and not supports(48, 64, transposed=True)
    assert not supports(64, 40) and not supports(64, 40, transposed=True)
    assert not supports(64, 64, weights=jnp.float32) and not supports(64, 64, out_dtype=jnp.float32)


def test_refuses_float32():
    assert not hopper.supports(jnp.zeros((9, 64)), jnp.zeros((2, 64, 64)), transposed=False, out_dtype=jnp.float32)
