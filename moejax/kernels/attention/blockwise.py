"""Attention by blocks of queries and keys with a running softmax: memory of one pair of blocks, in plain XLA.

Source: Dao et al. 2022, "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", whose backward
rule this is too: scores are computed again from what the forward pass kept, the logarithm of each query's sum.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moejax.kernels.attention.blocks import (
    LOW,
    Blocks,
    block_of_keys,
    blocks_of_queries,
    key_block,
    query_blocks,
    spans,
    whole,
)
from moejax.kernels.attention.sight import Keys, Queries, visible
from moejax.precision import precision_of
from moejax.sharding import varying_as

State: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
"""The largest score so far, the sum of powers and the sum of values, f32 `[B, G, I, S]`, the last also by Hv."""


def forward(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B G T H"],
    v: Float[Array, "B G T Hv"],
    sinks: Float[Array, " N"] | None,
    queries: Queries,
    keys: Keys,
    *,
    scale: float,
    dtype: DTypeLike,
) -> tuple[Float[Array, "B S N Hv"], Float[Array, "B S N"]]:
    """Attention, and the logarithm of the sum of each query's powers.

    Args:
      q, k, v: N query heads over G key/value heads.
      sinks: a score for each head that takes part in the softmax and brings no value.
      queries, keys: who sees what; a query that sees nothing gets zeros.
      scale: of the scores.
      dtype: of the operands of the products; sums are f32.

    Returns:
      Attention in v's dtype, and the f32 logarithms.
    """
    length, groups = q.shape[1], k.shape[1]
    blocks = Blocks.of(length, k.shape[2])
    first, past = spans(queries, keys, blocks)

    def of_queries(block: tuple[jax.Array, Queries, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q, queries, first, past = block
        q = q.astype(dtype)

        def of_keys(j: jax.Array, state: State) -> State:
            scores = _scores(q, key_block(k, 2, j, blocks.keys), queries, block_of_keys(keys, j, blocks.keys), scale)
            return _taken_in(state, scores, key_block(v, 2, j, blocks.keys).astype(dtype))

        largest, total, values = lax.fori_loop(first, past, of_keys, _initial(q, sinks, v))
        total = jnp.where(total > 0, total, 1)  # of those that see nothing
        return (values / total[..., None]).astype(v.dtype), largest + jnp.log(total)

    cut = query_blocks(_grouped(q, groups), 3, blocks.queries)
    out, logs = lax.map(of_queries, (cut, blocks_of_queries(queries, blocks.queries), first, past))
    return _ungrouped(whole(out, 3, length)), _ungrouped(whole(logs, 3, length))


def backward(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B G T H"],
    v: Float[Array, "B G T Hv"],
    queries: Queries,
    keys: Keys,
    out: Float[Array, "B S N Hv"],
    logs: Float[Array, "B S N"],
    dout: Float[Array, "B S N Hv"],
    *,
    scale: float,
    dtype: DTypeLike,
) -> tuple[Float[Array, "B S N H"], Float[Array, "B G T H"], Float[Array, "B G T Hv"]]:
    """The gradients of q, k and v, given what `forward` returned and the gradient of its first result."""
    length, groups = q.shape[1], k.shape[1]
    blocks = Blocks.of(length, k.shape[2])
    first, past = spans(queries, keys, blocks)

    def of_queries(sums: tuple[jax.Array, jax.Array], block: tuple) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        q, dout, logs, shared, queries, first, past = block
        q, dout = q.astype(dtype), dout.astype(dtype)

        def of_keys(j: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple:
            dq, dk, dv = state
            k_block, v_block = (key_block(x, 2, j, blocks.keys).astype(dtype) for x in (k, v))
            powers = jnp.exp(_scores(q, k_block, queries, block_of_keys(keys, j, blocks.keys), scale) - logs[..., None])
            dpowers = _product("bgiqv,bgtv->bgiqt", dout, v_block)
            dscores = (powers * (dpowers - shared[..., None]) * scale).astype(dtype)
            dq = dq + _product("bgiqt,bgth->bgiqh", dscores, k_block)
            dk = _added(dk, j, blocks.keys, _product("bgiqt,bgiqh->bgth", dscores, q))
            dv = _added(dv, j, blocks.keys, _product("bgiqt,bgiqv->bgtv", powers.astype(dtype), dout))
            return dq, dk, dv

        dq, dk, dv = lax.fori_loop(first, past, of_keys, (_zeros(q.shape, q), *sums))
        return (dk, dv), dq

    shared = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
    cut = (query_blocks(_grouped(x, groups), 3, blocks.queries) for x in (q, dout, logs, shared))
    zeros = (_zeros(k.shape, q), _zeros(v.shape, q))
    (dk, dv), dq = lax.scan(of_queries, zeros, (*cut, blocks_of_queries(queries, blocks.queries), first, past))
    return _ungrouped(whole(dq, 3, length)).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _grouped(x: Float[Array, "B S N ..."], groups: int) -> Float[Array, "B G I S ..."]:
    """The query heads of each key/value head side by side, and their queries as rows."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], groups, -1, *x.shape[3:]), 1, 3)


def _ungrouped(x: Float[Array, "B G I S ..."]) -> Float[Array, "B S N ..."]:
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _scores(q: jax.Array, k: jax.Array, queries: Queries, keys: Keys, scale: float) -> Float[Array, "B G I Q K"]:
    scores = _product("bgiqh,bgth->bgiqt", q, k.astype(q.dtype)) * scale
    return jnp.where(visible(queries, keys)[:, None, None], scores, jnp.finfo(jnp.float32).min)


def _initial(q: jax.Array, sinks: jax.Array | None, v: jax.Array) -> State:
    """Nothing taken in yet, or the sinks alone."""
    sums = q.shape[:-1]
    largest = jnp.full(sums[1:3], LOW) if sinks is None else sinks.astype(jnp.float32).reshape(sums[1:3])
    largest = varying_as(jnp.broadcast_to(largest[:, :, None], sums), q)
    total = jnp.full_like(largest, 0 if sinks is None else 1)
    return largest, total, _zeros((*sums, v.shape[-1]), q)


def _taken_in(state: State, scores: jax.Array, v: jax.Array) -> State:
    """The sums with one more block of keys."""
    largest, total, values = state
    new = jnp.maximum(largest, scores.max(-1))
    powers, shrunk = jnp.exp(scores - new[..., None]), jnp.exp(largest - new)
    product = _product("bgiqt,bgtv->bgiqv", powers.astype(v.dtype), v)
    return new, total * shrunk + powers.sum(-1), values * shrunk[..., None] + product


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)


def _added(sums: jax.Array, j: jax.Array, size: int, more: jax.Array) -> jax.Array:
    """`sums` with `more` added to its block j of keys."""
    start = jnp.minimum(j * size, sums.shape[2] - size)
    return lax.dynamic_update_slice_in_dim(sums, key_block(sums, 2, j, size) + more, start, 2)


def _zeros(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    return varying_as(jnp.zeros(shape, jnp.float32), like)
