"""The gated delta rule: linear attention whose state fades and corrects what it holds.

One head keeps a state S `[Hk, Hv]`. A token with query q, key k, value v, log decay g <= 0 and rate beta does

    S <- exp(g) S        S <- S + beta k (v - k S)        o = q S

with q and k scaled to length 1, and q by 1 / sqrt(Hk) besides. All of it is in f32.

Source: Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule", equation 10.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.precision import precision_of
from moejax.sharding import pad_axis, round_up, varying_as

CHUNK = 64
"""Tokens that the chunked form takes at once."""
LENGTH_EPS = 1e-6
HIGHEST = precision_of(jnp.float32)


def restarts_of(segments: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """1 at each token that begins a segment: its id is not 0 and not the last one before it that is not 0."""
    places = jnp.arange(segments.shape[1], dtype=jnp.int32)
    last = lax.cummax(jnp.where(segments > 0, places, 0), axis=1)
    held = jnp.take_along_axis(segments, last, 1)
    return (held != jnp.pad(held, ((0, 0), (1, 0)))[:, :-1]).astype(jnp.int32)


def recurrent(
    q: Float[Array, "B S G Hk"],
    k: Float[Array, "B S G Hk"],
    v: Float[Array, "B S N Hv"],
    log_decay: Float[Array, "B S N"],
    beta: Float[Array, "B S N"],
    restarts: Int[Array, "B S"] | None = None,
    state: Float[Array, "B N Hk Hv"] | None = None,
) -> tuple[Float[Array, "B S N Hv"], Float[Array, "B N Hk Hv"]]:
    """Token by token, as the rule is written.

    Args:
      q, k: each of their G heads serves N / G consecutive heads of `v`. Any float dtype, as `v` and `beta`.
      log_decay, beta: 0 and 0 leave the state as it is: padding to the right.
      restarts: 1 where the state is emptied before the token; None is nowhere.
      state: the state before the first token; None is empty.

    Returns:
      The outputs and the state after the last token, both f32.
    """
    tokens, state = _prepared(q, k, v, log_decay, beta, restarts, state)

    def step(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v, g, beta, restart = token
        state = jnp.where(restart[..., None, None] > 0, 0.0, state) * jnp.exp(g)[..., None, None]
        error = v - jnp.einsum("bnkv,bnk->bnv", state, k, precision=HIGHEST)
        state = state + k[..., None] * (beta[..., None] * error)[..., None, :]
        return state, jnp.einsum("bnkv,bnk->bnv", state, q, precision=HIGHEST)

    state, out = lax.scan(step, state, tuple(jnp.moveaxis(a, 2, 0) for a in tokens))
    return jnp.moveaxis(out, 0, 1), state


def chunked(
    q: Float[Array, "B S G Hk"],
    k: Float[Array, "B S G Hk"],
    v: Float[Array, "B S N Hv"],
    log_decay: Float[Array, "B S N"],
    beta: Float[Array, "B S N"],
    restarts: Int[Array, "B S"] | None = None,
    state: Float[Array, "B N Hk Hv"] | None = None,
) -> tuple[Float[Array, "B S N Hv"], Float[Array, "B N Hk Hv"]]:
    """What `recurrent` gives, CHUNK tokens at once.

    Inside a chunk token i sees what token j <= i wrote faded by F_ij = exp(g_{j+1} + ... + g_i), and the state S from
    before the chunk by f_i = exp(g_1 + ... + g_i); a restart between them makes either 0. What the tokens write, their
    corrected values W, depend on each other: w_i = beta_i (v_i - f_i k_i S - sum_{j<i} F_ij (k_i . k_j) w_j), a unit
    lower triangular system. It is solved for v and for f k before S is known, of all chunks together; only three small
    products then go from chunk to chunk.
    """
    tokens, state = _prepared(q, k, v, log_decay, beta, restarts, state)
    length, size = v.shape[1], min(CHUNK, v.shape[1])

    def cut(x: jax.Array) -> jax.Array:
        padded = pad_axis(x, 2, round_up(length, size))
        return jnp.moveaxis(padded.reshape(*x.shape[:2], -1, size, *x.shape[3:]), 2, 0)

    q, k, v, g, beta, restarts = (cut(a) for a in tokens)
    between, since = _fading(g, restarts)
    strength = beta[..., None] * between * _products(k, k)
    right = beta[..., None] * jnp.concatenate([v, since[..., None] * k], -1)
    solved = lax.linalg.triangular_solve(strength, right, left_side=True, lower=True, unit_diagonal=True)
    values, reads = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    chunks = (
        values,
        reads,
        since[..., None] * q,
        between * _products(q, k),
        between[..., -1, :, None] * k,
        since[..., -1, None, None],
    )

    def step(state: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        values, reads, q, weights, k, fade = chunk
        written = values - jnp.matmul(reads, state, precision=HIGHEST)
        out = jnp.matmul(q, state, precision=HIGHEST) + jnp.matmul(weights, written, precision=HIGHEST)
        return fade * state + jnp.einsum("bnik,bniv->bnkv", k, written, precision=HIGHEST), out

    state, out = lax.scan(step, state, chunks)
    out = jnp.moveaxis(out, 0, 2).reshape(*out.shape[1:3], -1, out.shape[-1])[:, :, :length]
    return jnp.moveaxis(out, 2, 1), state


def _prepared(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    restarts: jax.Array | None,
    state: jax.Array | None,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """q, k, v, g, beta in f32 and restarts, `[B, N or 1, S, ...]`, queries and keys scaled; and the first state."""
    heads = v.shape[2]

    def unit(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x * lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + LENGTH_EPS)
        return jnp.repeat(x, heads // x.shape[2], axis=2)

    if restarts is None:
        restarts = jnp.zeros(v.shape[:2], jnp.int32)
    if state is None:
        state = jnp.zeros((v.shape[0], heads, k.shape[-1], v.shape[-1]), jnp.float32)
    arrays = [unit(q) * k.shape[-1] ** -0.5, unit(k), *(a.astype(jnp.float32) for a in (v, log_decay, beta))]
    tokens = tuple(jnp.swapaxes(a, 1, 2) for a in (*arrays, restarts[..., None]))
    return tokens, varying_as(state, *arrays)


def _fading(
    g: Float[Array, "n B N C"], restarts: Int[Array, "n B 1 C"]
) -> tuple[Float[Array, "n B N C C"], Float[Array, "n B N C"]]:
    """What is left at token i of what token j wrote (0 for j > i), and of the state from before the chunk.

    The sums of log decays between two tokens are added up as they are: differences of running sums lose the small ones
    behind a large one.
    """
    count = jnp.cumsum(restarts, -1)
    lower = jnp.tril(jnp.ones((g.shape[-1],) * 2, jnp.float32))
    sums = jnp.matmul(lower * g[..., None, :], jnp.tril(lower, -1), precision=HIGHEST)
    seen = (lower > 0) & (count[..., :, None] == count[..., None, :])
    return jnp.where(seen, jnp.exp(sums), 0.0), jnp.where(count == 0, jnp.exp(jnp.cumsum(g, -1)), 0.0)


def _products(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum("...ik,...jk->...ij", a, b, precision=HIGHEST)
