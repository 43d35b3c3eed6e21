"""Quantised weights against the conversions of the transformers that is installed now. Run with `-m parity`."""

import warnings
from types import SimpleNamespace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moejax.quantization import fp8, mxfp4

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:::torch|transformers")]


@pytest.fixture(scope="module")
def torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
    return torch


def bits(x) -> np.ndarray:
    x = np.asarray(x)
    return x.view(f"u{x.itemsize}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mxfp4_bit_for_bit(torch, dtype):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (256, 1, 1))[:, None]
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 16, 2)
    want = convert_moe_packed_tensors(
        torch.from_numpy(blocks.copy()), torch.from_numpy(scales.copy()), dtype=getattr(torch, dtype)
    )
    want = want.view(torch.uint16 if dtype == "bfloat16" else torch.uint32).numpy().swapaxes(1, 2)
    np.testing.assert_array_equal(bits(mxfp4.unpack(blocks, scales, jnp.dtype(dtype))), want)
    np.testing.assert_array_equal(bits(mxfp4.unpack_host(blocks, scales).astype(dtype)), want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.bfloat16])
def test_fp8_bit_for_bit(torch, dtype, scale_dtype):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rng = np.random.default_rng(0)
    q, scales = fp8.quantise(rng.standard_normal((64, 96)) * np.exp(rng.normal(0, 2, (64, 96))), (16, 32))
    scales = scales.astype(scale_dtype)
    stored = torch.from_numpy(scales.astype(np.float32)).to(getattr(torch, np.dtype(scale_dtype).name))
    want = Fp8Dequantize(SimpleNamespace(quantization_config=None))._dequantize_one(
        torch.from_numpy(q.view(np.uint8)).view(torch.float8_e4m3fn), stored, getattr(torch, dtype)
    )
    got = fp8.dequantise(q, scales, np.arange(64) // 16, np.arange(96) // 32).astype(dtype)
    np.testing.assert_array_equal(bits(got), want.view(torch.uint32 if dtype == "float32" else torch.uint16).numpy())
