"""MXFP4 against a table from the specification, and what `pack` makes comes back."""

import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.errors import MoejaxError
from moejax.quantization.mxfp4 import ELEMENTS, pack, unpack, unpack_host

UNPACK = jax.jit(unpack, static_argnums=2)
BF16 = ml_dtypes.bfloat16


def spec_element(code: int) -> float:
    """E2M1 by its definition: sign, two bits of exponent with bias 1, one bit of fraction."""
    sign, exponent, fraction = code >> 3, code >> 1 & 3, code & 1
    size = (1 + fraction / 2) * 2 ** (exponent - 1) if exponent else fraction / 2
    return math.copysign(size, -1 if sign else 1)


def every_byte():
    """All bytes under all scales (255, which the specification calls NaN, as 2**128), and their values."""
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (256, 1, 1))
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, 1)
    values = np.empty((256, 512))
    for byte in range(256):
        values[:, 2 * byte], values[:, 2 * byte + 1] = spec_element(byte & 15), spec_element(byte >> 4)
    return blocks, scales, values * 2.0 ** (np.arange(256.0)[:, None] - 127)


def bits(x) -> np.ndarray:
    x = np.asarray(x)
    return x.view(f"u{x.itemsize}")


def test_elements():
    assert [spec_element(code) for code in range(16)] == list(ELEMENTS)
    assert np.signbit(ELEMENTS[8])


@pytest.mark.parametrize("dtype", [BF16, np.float32])
def test_every_byte_under_every_scale(dtype):
    blocks, scales, values = every_byte()
    with np.errstate(over="ignore"):
        want = values.astype(dtype)
    got = UNPACK(blocks, scales, dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(bits(got), bits(want))
    np.testing.assert_array_equal(bits(unpack_host(blocks, scales).astype(dtype)), bits(want))


def test_what_is_not_finite():
    """Only the three largest scales overflow, and only their largest elements; nothing is NaN."""
    values = unpack_host(*every_byte()[:2]).astype(np.float32)
    assert not np.isnan(values).any()
    smallest = [np.abs(np.where(np.isinf(row), ELEMENTS[pair], 9)).min() for row, pair in by_scale(values)]
    assert smallest == [9] * 253 + [4, 2, 1]
    assert np.isfinite(values[:, ::32]).all()


def by_scale(values):
    codes = np.stack([np.arange(256) & 15, np.arange(256) >> 4], -1).reshape(-1)
    return ((row, codes) for row in values)


def test_float16():
    blocks, scales = pack(np.float32([[0.5, -3.0, 96.0, 2.0**-14] * 8]))
    got = UNPACK(blocks, scales, jnp.float16)
    assert got.dtype == jnp.float16
    np.testing.assert_array_equal(got, unpack_host(blocks, scales).astype(np.float16))


@pytest.mark.parametrize("lead", [(), (3,), (2, 0), (2, 3)])
def test_leading_axes(lead):
    rng = np.random.default_rng(0)
    blocks, scales = (rng.integers(0, 255, (*lead, 5, *tail), np.uint8) for tail in ((16,), ()))
    got = unpack_host(blocks, scales)
    assert got.shape == (*lead, 160)
    np.testing.assert_array_equal(bits(unpack(blocks, scales, BF16)), bits(got))
    for at in np.ndindex(*lead):
        np.testing.assert_array_equal(bits(got[at]), bits(unpack_host(blocks[at], scales[at])))


@settings(deadline=None)
@given(st.data())
def test_what_is_on_the_grid_comes_back(data):
    codes = np.array(data.draw(st.lists(st.integers(0, 15), min_size=32, max_size=32)))
    values = np.ldexp(ELEMENTS[codes], data.draw(st.integers(-127, 125))).astype(np.float32)
    np.testing.assert_array_equal(bits(unpack_host(*pack(values)).astype(np.float32)), bits(values))


def test_packing_rounds_to_the_nearest():
    rng = np.random.default_rng(0)
    values = np.float32(rng.standard_normal((50, 64)) * np.exp(rng.normal(0, 9, (50, 1))))
    blocks, scales = pack(values)
    got = unpack_host(blocks, scales).astype(np.float64)
    grid = np.ldexp(ELEMENTS, scales[..., None].astype(int) - 127).repeat(32, 1)
    best = np.abs(grid - values[..., None]).min(-1)
    np.testing.assert_array_equal(np.abs(got - values), best)
    assert (blocks.shape, scales.shape) == ((50, 2, 16), (50, 2))


def test_ties_go_to_the_even_code():
    middles = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0]
    values = unpack_host(*pack(np.float32([*middles, *(-x for x in middles), *[4.0] * 16])))
    assert list(values[:8]) == [0, 1, 1, 2, 2, 4, 4, 6]
    assert list(values[8:16]) == [0, -1, -1, -2, -2, -4, -4, -6]


def test_zeros_are_zero_bytes():
    blocks, scales = pack(np.zeros((2, 64)))
    assert not blocks.any() and not scales.any()
    for scale in range(256):
        assert not bits(UNPACK(blocks, np.full_like(scales, scale), BF16)).any()


def test_bfloat16_values_can_be_packed():
    values = np.linspace(-4, 4, 64).astype(BF16)
    assert np.array_equal(unpack_host(*pack(values)), unpack_host(*pack(values.astype(np.float64))))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            np.zeros((4, 48)),
            "a width of 48 cannot be packed as MXFP4, whose blocks hold 32 values; "
            "pad it to a multiple of 32 or keep the weights unpacked",
        ),
        (np.full(32, np.inf), "weights to pack as MXFP4 hold values that are not finite; the format has none"),
        (np.full(32, np.nan), "weights to pack as MXFP4 hold values that are not finite; the format has none"),
    ],
)
def test_what_cannot_be_packed(values, message):
    with pytest.raises(MoejaxError, match=f"^{re.escape(message)}$"):
        pack(values)
