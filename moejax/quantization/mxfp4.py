"""MXFP4: blocks of 32 four-bit values (E2M1) that share one scale of eight bits (E8M0), a power of two.

The low half of a byte is the earlier value, the high half the later. A value is ELEMENTS[code] * 2**(scale - 127); all
of them are exact in bfloat16 and float32, subnormals included, except those past the largest finite number, which
become infinite (scales 253 to 255, which no real weight needs). Scale 255, the format's NaN, is read as 2**128, as
transformers reads it.

Source: OCP Microscaling Formats (MX) v1.0, sections 5.2, 5.3.3, 5.4.1 and 6.3.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from moejax.errors import MoejaxError

BLOCK = 32
"""Values that share a scale."""

ELEMENTS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""What the sixteen codes stand for."""

_BIAS = 127
_LARGEST_EXPONENT = 2  # of an element: 4 = 2**2 and 6 = 1.5 * 2**2


def unpack(blocks: UInt8[Array, "*B n 16"], scales: UInt8[Array, "*B n"], dtype: DTypeLike) -> Float[Array, "*B K"]:
    """The K = 32 n values of packed blocks, in `dtype`.

    Assembled from bits, since XLA's products on CPU and TPU flush subnormals to zero. Both values of a byte are made as
    one integer: an axis of two entries would keep XLA:CPU from vectorising.
    """
    wide, scale = blocks.astype(jnp.uint32), scales.astype(jnp.uint32)[..., None]
    low, high = bfloat16_bits(wide & jnp.uint32(15), scale), bfloat16_bits(wide >> jnp.uint32(4), scale)
    pairs = lax.bitcast_convert_type(low | high << jnp.uint32(16), jnp.uint16)
    bits = pairs.reshape(*scales.shape[:-1], scales.shape[-1] * BLOCK)
    if jnp.dtype(dtype) == jnp.float32:
        return lax.bitcast_convert_type(bits.astype(jnp.uint32) << jnp.uint32(16), jnp.float32)
    return lax.bitcast_convert_type(bits, jnp.bfloat16).astype(dtype)


def bfloat16_bits(code: jax.Array, scale: jax.Array) -> jax.Array:
    """The bits of each code's bfloat16 under a scale, as uint32: one of sign, 8 of exponent, 7 of fraction.

    Neighbouring magnitudes of E2M1 are one step of its last fraction bit apart, which is bit 6 of a bfloat16. That line
    begins at code 2; below, where E2M1 is subnormal (or bfloat16 is), magnitudes are multiples of the half.
    """
    magnitude, one = code & jnp.uint32(7), jnp.uint32(1)
    half = jnp.where(scale < 2, jnp.uint32(32) << scale, (scale - one) << jnp.uint32(7))
    start = jnp.where(scale == 0, jnp.uint32(4), jnp.uint32(2))
    line = (scale << jnp.uint32(7)) + (magnitude << jnp.uint32(6)) - jnp.uint32(128)
    infinity = jnp.uint32(0x7F80)
    bits = jnp.where(magnitude < start, magnitude * half, jnp.minimum(line, infinity))
    return bits | ((code & jnp.uint32(8)) << jnp.uint32(12))


def unpack_host(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """`unpack` on the host, to bfloat16: uint8 `[..., n, 16]` and `[..., n]` give `[..., 32 n]`."""
    pairs = _PAIRS[(scales.astype(np.uint16) << 8)[..., None] | blocks]
    return pairs.view(ml_dtypes.bfloat16).reshape(*scales.shape[:-1], scales.shape[-1] * BLOCK)


def _pairs() -> np.ndarray:
    """Both values of every byte under every scale, as one integer: indexed by scale * 256 + byte."""
    with np.errstate(over="ignore"):
        values = np.ldexp(ELEMENTS, np.arange(256)[:, None] - _BIAS).astype(ml_dtypes.bfloat16)
    byte = np.arange(256)
    both = np.stack([values[:, byte & 15], values[:, byte >> 4]], -1)
    return both.view(np.uint32).reshape(-1)


_PAIRS = _pairs()


def pack(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packs `[..., K]` along its last axis into uint8 blocks `[..., K/32, 16]` and scales `[..., K/32]`.

    A block's scale puts its largest magnitude at 4 to 8; elements are rounded to the nearest, ties to the even code,
    and saturate at 6. Blocks that some scale makes exact come back unchanged from `unpack`. A block of zeros has zero
    bytes and scale 0, so zeros appended to packed arrays are zero weights.

    Source: OCP Microscaling Formats (MX) v1.0, section 6.3.

    Raises:
        MoejaxError: 32 does not divide K, or a value is not finite.
    """
    check_width(values.shape[-1])
    wide = values.astype(np.float64).reshape(*values.shape[:-1], values.shape[-1] // BLOCK, BLOCK)
    if not np.isfinite(wide).all():
        raise MoejaxError("weights to pack as MXFP4 hold values that are not finite; the format has none")
    largest = np.abs(wide).max(-1)
    exponent = np.where(largest > 0, np.frexp(largest)[1] - 1 - _LARGEST_EXPONENT, -_BIAS)
    scales = np.clip(exponent + _BIAS, 0, 254).astype(np.uint8)
    codes = _nearest(np.ldexp(wide, _BIAS - scales.astype(np.int32)[..., None]))
    return codes[..., ::2] | codes[..., 1::2] << 4, scales


def check_width(width: int) -> None:
    """Raises MoejaxError where a width is no whole number of blocks."""
    if width % BLOCK:
        raise MoejaxError(
            f"a width of {width} cannot be packed as MXFP4, whose blocks hold {BLOCK} values; pad it to a multiple of "
            f"{BLOCK} or keep the weights unpacked"
        )


def _nearest(scaled: np.ndarray) -> np.ndarray:
    """The code of the nearest element; halfway between two codes the even one."""
    magnitudes = ELEMENTS[:8]
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    size = np.abs(scaled)
    below, upto = np.searchsorted(middles, size, "left"), np.searchsorted(middles, size, "right")
    code = np.where(below % 2 == 0, below, upto)
    return (code + 8 * np.signbit(scaled)).astype(np.uint8)
