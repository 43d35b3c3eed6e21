"""FP8 in blocks against one value after another."""

import ml_dtypes
import numpy as np
import pytest

from moejax.quantization.fp8 import E4M3, dequantise, quantise


def spec_value(byte: int) -> float:
    """E4M3 by its definition: sign, 4 bits of exponent with bias 7, 3 of fraction; all ones is NaN, there is no inf."""
    sign, exponent, fraction = -1.0 if byte >> 7 else 1.0, byte >> 3 & 15, byte & 7
    if (exponent, fraction) == (15, 7):
        return np.nan
    return sign * (2.0 ** (exponent - 7) * (1 + fraction / 8) if exponent else 2.0**-6 * fraction / 8)


def one_by_one(q, scales, block):
    """float32(q) * scale for each value of a matrix."""
    want = np.empty(q.shape, np.float32)
    for row, column in np.ndindex(*q.shape):
        value = np.float32(spec_value(int(q.view(np.uint8)[row, column])))
        want[row, column] = value * np.float32(scales[row // block[0], column // block[1]])
    return want


def indices(q, block):
    return tuple(np.arange(extent) // size for extent, size in zip(q.shape[-2:], block, strict=True))


@pytest.mark.parametrize(("shape", "block"), [((16, 16), (4, 8)), ((17, 30), (4, 8)), ((3, 5), (128, 128))])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_equals_one_value_after_another(shape, block, dtype):
    rng = np.random.default_rng(0)
    q = rng.permutation(np.resize(np.arange(256, dtype=np.uint8), shape).reshape(-1)).reshape(shape).view(E4M3)
    counts = [-(-extent // size) for extent, size in zip(shape, block, strict=True)]
    scales = np.exp(rng.standard_normal(counts)).astype(dtype)
    got = dequantise(q, scales, *indices(q, block))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, one_by_one(q, scales, block))


@pytest.mark.parametrize("shape", [(8, 16), (9, 17), (2, 9, 17), (1, 1)])
def test_quantise_reaches_the_formats_precision(shape):
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(shape) * np.exp(rng.normal(0, 3, shape))).astype(np.float32)
    q, scales = quantise(values, (4, 8))
    assert (q.dtype, scales.dtype) == (E4M3, np.float32)
    assert scales.shape == (*shape[:-2], -(-shape[-2] // 4), -(-shape[-1] // 8))
    got = dequantise(q, scales, *indices(q, (4, 8)))
    # Half a step of three fraction bits, or of the subnormals.
    step = scales.take(indices(q, (4, 8))[0], -2).take(indices(q, (4, 8))[1], -1)
    assert (np.abs(got - values) <= np.maximum(np.abs(values) * 2.0**-4, step * 2.0**-10) * 1.0001).all()
    assert np.abs(q.astype(np.float32)).max() == 448


def test_zeros_stay_zeros():
    q, scales = quantise(np.zeros((4, 4)), (2, 2))
    assert (scales == 1).all() and not q.view(np.uint8).any()
