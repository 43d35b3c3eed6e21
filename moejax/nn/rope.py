"""Rotary position embeddings: pairs of a head's values turned by angles proportional to the position.

Of the first `rope.paired` values of a head, value i pairs with value i + H2, or, interleaved, 2i with 2i + 1; H2 is the
number of pairs. The tables are float32 and follow transformers' `modeling_rope_utils`, so that long
contexts, where an angle magnifies the last bit of a frequency, agree.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.config import RopeConfig


def inverse_frequencies(
    rope: RopeConfig, max_position_embeddings: int, lengths_B: Int[Array, "B"] | None = None
) -> Float[np.ndarray, "H2"] | Float[Array, "B H2"]:
    """Radians per token of each pair of a head, float32.

    All kinds but "dynamic" and "longrope" are static and come as one numpy table. "dynamic" (NTK scaling) raises its
    base with the length of the sequence once that passes `max_position_embeddings`; "longrope" changes its factors once
    past `original_length`. Transformers takes the longest sequence of the batch; here each row takes its own, so that a
    row in a batch equals the row alone.

    Args:
        rope: the kind, the rotated width and the parameters.
        max_position_embeddings: tokens; the length from which "dynamic" grows.
        lengths_B: current length of each row in tokens (last position + 1); None means that none has passed the length
            from which "dynamic" or "longrope" changes.

    Source: https://huggingface.co/papers/2309.00071 (yarn) and transformers' `modeling_rope_utils`.
    """
    plain = _powers(rope.theta, rope.dim)
    match rope.kind:
        case "default":
            return plain
        case "linear":
            return plain / np.float32(rope.factor)
        case "dynamic":
            return plain if lengths_B is None else _dynamic(rope, max_position_embeddings, lengths_B)
        case "yarn":
            return _yarn(rope, max_position_embeddings)
        case "llama3":
            return _llama3(rope, plain, rope.original_length or max_position_embeddings)
        case "longrope":
            return _longrope(rope, lengths_B)
        case "proportional":
            still = np.arange(plain.size) >= rope.turned_pairs
            return np.where(still, np.float32(0), plain / np.float32(rope.factor))


def attention_factor(rope: RopeConfig) -> float:
    """What multiplies sine and cosine: 1 except for "yarn" and "longrope", which sharpen a stretched softmax."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "longrope":
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_length)) if rope.factor > 1 else 1.0
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def rope_tables(
    rope: RopeConfig,
    max_position_embeddings: int,
    positions_BS: Int[Array, "B S"],
    lengths_B: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B S H2"], Float[Array, "B S H2"]]:
    """Cosine and sine of every pair's angle at every position, float32.

    Args:
        rope, max_position_embeddings: as `inverse_frequencies` takes them.
        positions_BS: position of each token in its sequence, from 0.
        lengths_B: each row's current length in tokens, which "dynamic" and "longrope" read; None means the row's last
            position plus 1, right unless padding carries higher positions than the text.
    """
    if lengths_B is None:
        lengths_B = positions_BS.max(axis=-1) + 1
    frequencies = jnp.asarray(inverse_frequencies(rope, max_position_embeddings, lengths_B))
    if frequencies.ndim == 2:
        frequencies = frequencies[:, None, :]
    angles_BSH = positions_BS.astype(jnp.float32)[..., None] * frequencies
    scale = attention_factor(rope) if rope.mscales is None else _mscales(rope, rope.mscales, lengths_B)
    return jnp.cos(angles_BSH) * scale, jnp.sin(angles_BSH) * scale


def apply_rope(
    x_BSNH: Float[Array, "B S N H"],
    cos_BSH: Float[Array, "B S H2"],
    sin_BSH: Float[Array, "B S H2"],
    interleaved: bool = False,
) -> Float[Array, "B S N H"]:
    """Turns the pairs of each head's first 2 * H2 values; computed in float32, returned in x's dtype.

    Pairs are (i, i + H2), or neighbours where `interleaved`. The other values pass as they are.
    """
    pairs = cos_BSH.shape[-1]
    if not pairs:
        return x_BSNH
    cos, sin = cos_BSH[:, :, None, :], sin_BSH[:, :, None, :]
    turned, rest = x_BSNH[..., : 2 * pairs], x_BSNH[..., 2 * pairs :]
    # [.., 2, pairs] or [.., pairs, 2]: the axis that holds the two values of a pair.
    axis = -1 if interleaved else -2
    split = turned.astype(jnp.float32).reshape(*turned.shape[:-1], *((pairs, 2) if interleaved else (2, pairs)))
    first, second = jnp.moveaxis(split, axis, 0)
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis).reshape(turned.shape)
    return jnp.concatenate([turned.astype(x_BSNH.dtype), rest], axis=-1)


def _exponents(dim: int) -> Float[np.ndarray, "H2"]:
    return np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)


def _powers(theta: float, dim: int) -> Float[np.ndarray, "H2"]:
    """1 / theta^(2i/H), the power rounded to float32 before it is inverted, as torch has it."""
    return np.float32(1) / _periods(theta, dim)


def _periods(theta: float, dim: int) -> Float[np.ndarray, "H2"]:
    # The power itself in float64: numpy's float32 power differs between processors.
    return (float(np.float32(theta)) ** _exponents(dim).astype(np.float64)).astype(np.float32)


def _dynamic(rope: RopeConfig, max_position_embeddings: int, lengths_B: Int[Array, "B"]) -> Float[Array, "B H2"]:
    """1 / (theta * growth^(H/(H-2)))^(2i/H), written so that float32 only raises the growth to a power."""
    plain = _powers(rope.theta, rope.dim)
    exponents = (_exponents(rope.dim).astype(np.float64) * -rope.dim / (rope.dim - 2)).astype(np.float32)
    growth_B = rope.factor * lengths_B.astype(jnp.float32) / max_position_embeddings - (rope.factor - 1)
    # Below the trained length, where it would shrink, growth is 1 and leaves the table as it is.
    growth_B = jnp.where(lengths_B > max_position_embeddings, growth_B, 1.0)
    return jnp.asarray(plain) * growth_B[:, None] ** exponents


def _longrope(rope: RopeConfig, lengths_B: Int[Array, "B"] | None) -> Float[np.ndarray, "H2"] | Float[Array, "B H2"]:
    """Source: Ding et al. 2024, "LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens"."""
    periods = _periods(rope.theta, rope.dim)
    short, long = (
        np.float32(1) / (np.array(factors, np.float32) * periods) for factors in (rope.short_factors, rope.long_factors)
    )
    if lengths_B is None or rope.short_factors == rope.long_factors:
        return short
    return jnp.where((lengths_B > rope.original_length)[:, None], long, short)


def _mscales(rope: RopeConfig, mscales: tuple[float, float], lengths_B: Int[Array, "B"]) -> Float[Array, "B 1 1"]:
    short, long = (jnp.float32(mscale) for mscale in mscales)
    return jnp.where(lengths_B > rope.original_length, long, short)[:, None, None]


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(rope: RopeConfig, max_position_embeddings: int) -> Float[np.ndarray, "H2"]:
    """Fast pairs keep their frequency, slow ones are divided by `factor`, with a ramp between the two."""
    original = rope.original_length or max_position_embeddings

    def pair_with(turns: float) -> float:
        """Index of the pair that makes `turns` full turns over the pretraining context."""
        return rope.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(rope.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = np.float32(1) - np.clip(ramp, np.float32(0), np.float32(1))
    periods = _periods(rope.theta, rope.dim)
    stretched = np.float32(1) / (np.float32(rope.factor) * periods)
    return stretched * (np.float32(1) - keep) + (np.float32(1) / periods) * keep


def _llama3(rope: RopeConfig, plain: Float[np.ndarray, "H2"], original: int) -> Float[np.ndarray, "H2"]:
    """Short wavelengths keep their frequency, long ones are divided by `factor`, smoothly between the two."""
    factor, low = np.float32(rope.factor), np.float32(rope.low_freq_factor)
    wavelengths = np.float32(2 * math.pi) / plain
    slow = wavelengths > np.float32(original / rope.low_freq_factor)
    if rope.high_freq_factor == rope.low_freq_factor:
        return np.where(slow, plain / factor, plain)
    smooth = (np.float32(original) / wavelengths - low) / np.float32(rope.high_freq_factor - rope.low_freq_factor)
    between = (np.float32(1) - smooth) * plain / factor + smooth * plain
    fast = wavelengths < np.float32(original / rope.high_freq_factor)
    return np.where(slow, plain / factor, np.where(fast, plain, between))
