"""Grouped-query attention for the oracle: one device, whole heads, no layout."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.config import AttentionConfig, NormConfig
from moejax.kernels.attention.reference import attend, causal
from moejax.nn.norm import normalise, unit_norm
from moejax.nn.places import Places
from moejax.nn.rope import apply_rope
from moejax.precision import precision_of


def attention_reference(
    params: Mapping[str, jax.Array],
    config: AttentionConfig,
    norm: NormConfig,
    x: Float[Array, "B S D"],
    places: Places,
    segments: Int[Array, "B S"],
) -> Float[Array, "B S D"]:
    """What `Attention` computes, from parameters as they lie on a mesh of one device."""
    heads = {name: _project(params, name, x) for name in ("q", "k", "v", "gate") if name in params}
    q, k = heads["q"], heads["k"]
    v = heads.get("v", k)
    if config.value_norm:
        v = unit_norm(v, norm.eps)
    steps = [lambda name, y: _norm(params, config, norm, name, y), lambda _, y: _turn(config, places, y)]
    if config.norm_after_rope:
        steps.reverse()
    if (limit := config.clip_qkv) is not None:
        v = jnp.clip(v, -limit, limit)
        steps.insert(1, lambda _, y: jnp.clip(y, -limit, limit))
    for step in steps:
        q, k = step("q", q), step("k", k)
    if config.temperature is not None:
        floor, scale = config.temperature
        growth = jnp.log1p(jnp.floor((places.positions.astype(jnp.float32) + 1) / floor)) * scale + 1
        q = (q.astype(jnp.float32) * growth[..., None, None]).astype(q.dtype)
    visible = causal(segments, config.window, config.chunk)
    out = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), visible, scale=config.scale, sinks=params.get("sinks"))
    if config.gate:
        out = out * jax.nn.sigmoid(heads["gate"])
    y = jnp.einsum("bsnh,nhd->bsd", out, params["o"], precision=precision_of(x.dtype))
    return y + params["o_bias"] if config.out_bias else y


def _project(params: Mapping[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
    y = jnp.einsum("bsd,dnh->bsnh", x, params[name], precision=precision_of(x.dtype))
    return y + params[f"{name}_bias"] if f"{name}_bias" in params else y


def _norm(
    params: Mapping[str, jax.Array], config: AttentionConfig, norm: NormConfig, name: str, y: jax.Array
) -> jax.Array:
    if config.qk_norm == "none":
        return y
    if config.qk_norm == "unit":
        return unit_norm(y, norm.eps)
    rows = y.reshape(*y.shape[:2], -1) if config.qk_norm == "full" else y
    return normalise(rows, norm, params[f"{name}_norm"].reshape(rows.shape[-1])).reshape(y.shape)


def _turn(config: AttentionConfig, places: Places, y: jax.Array) -> jax.Array:
    return y if config.rope is None else apply_rope(y, *places.table(config.rope), config.rope.interleaved)
