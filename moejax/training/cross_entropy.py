"""Cross-entropy over a vocabulary that is cut across devices, without the logits of all tokens ever being there.

A block of tokens at a time meets the head; its logits give the loss and, where a gradient is wanted, the gradients of
the block at once, so that no block is computed twice. The gradients wait, scaled by nothing yet, for the one number
that comes back.
"""

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.config import ModelConfig
from moejax.kernels.linear import linear
from moejax.model import finished_logits
from moejax.nn.stream import Stream
from moejax.sharding import alike, live_axes, pad_axis, pmax, psum, varying_as

BLOCK = 512
"""Tokens whose logits are there at one time, on each device."""

Rows: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
Head: TypeAlias = tuple[jax.Array, jax.Array | None]


def cross_entropy(
    x: Float[Array, "B S D"],
    head: Float[Array, "Vp D"],
    bias: Float[Array, " Vp"] | None,
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    config: ModelConfig,
    stream: Stream,
) -> Float[Array, ""]:
    """The weighted sum over tokens of -log p(target), f32, the same on every device and every mesh.

    Args:
      x: hidden states after the last norm.
      head: rows of the vocabulary, cut over `tp` and padded to divide.
      bias: of the logits, cut alike, or None.
      targets: the token to be predicted at each place; anything where the weight is 0.
      weights: f32; 1 / (number of targets) for a mean.
      config: scale and bound of the logits, and the size of the vocabulary.
      stream: how rows lie on the mesh.

    Returns:
      The sum. Differentiable in `x`, `head` and `bias`, not in `weights`.
    """
    ep_axes = live_axes(stream.mesh, stream.rows)

    def local(x: jax.Array, head: jax.Array, bias: jax.Array | None, targets: jax.Array, weights: jax.Array):
        first = lax.axis_index(stream.tp) * head.shape[0] if stream.tp_axes else jnp.int32(0)
        flat = x.reshape(-1, x.shape[-1])
        flat, head, bias, first = alike(flat, head, bias, first)
        rows = (flat, targets.reshape(-1), weights.reshape(-1))
        return psum(_weighted_sum(rows, (head, bias), first, config, stream.tp_axes), ep_axes)

    rows, table = stream.batch_spec, stream.spec(stream.tp)
    specs = (rows, table, table, rows, rows)
    mapped = jax.shard_map(local, mesh=stream.mesh, in_specs=specs, out_specs=stream.spec(), check_vma=True)
    return mapped(x, head, bias, targets, lax.stop_gradient(weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _weighted_sum(rows: Rows, tables: Head, first: jax.Array, config: ModelConfig, axes: tuple[str, ...]) -> jax.Array:
    total, _ = lax.scan(
        lambda total, block: (total + _block_loss(block, tables, first, config, axes)[0], None),
        varying_as(jnp.float32(0), rows[2]),
        _blocks(rows),
    )
    return total


def _forward(
    rows: Rows, tables: Head, first: jax.Array, config: ModelConfig, axes: tuple[str, ...]
) -> tuple[jax.Array, tuple]:
    """The sum, and its gradients as if one more of it were worth 1."""

    def of_block(carry: tuple, block: Rows) -> tuple[tuple, jax.Array]:
        total, gradients = carry
        loss, pullback = _block_loss(block, tables, first, config, axes)
        dx, *more = pullback()
        return (total + loss, jax.tree.map(lambda a, b: a + b.astype(a.dtype), gradients, tuple(more))), dx

    start = jax.tree.map(lambda a: varying_as(jnp.zeros(a.shape, jnp.float32), a), tables)
    (total, gradients), dx = lax.scan(of_block, (varying_as(jnp.float32(0), rows[2]), start), _blocks(rows))
    dx = dx.reshape(-1, dx.shape[-1])[: rows[0].shape[0]]
    return total, (dx, gradients, jax.tree.map(lambda a: varying_as(jnp.zeros(0, a.dtype), a), tables))


def _backward(config: ModelConfig, axes: tuple[str, ...], saved: tuple, scale: jax.Array) -> tuple:
    dx, gradients, dtypes = saved
    d_tables = jax.tree.map(lambda g, like: (g * scale).astype(like.dtype), gradients, dtypes)
    return (dx * scale.astype(dx.dtype), None, None), d_tables, None


_weighted_sum.defvjp(_forward, _backward)


def _blocks(rows: Rows) -> Rows:
    """The tokens in blocks, the last one filled up with tokens of weight 0."""
    count = -(-rows[0].shape[0] // BLOCK)
    size = -(-rows[0].shape[0] // count)
    x, targets, weights = (pad_axis(a, 0, count * size).reshape(count, size, *a.shape[1:]) for a in rows)
    return x, targets, weights


def _block_loss(block: Rows, tables: Head, first: jax.Array, config: ModelConfig, axes: tuple[str, ...]):
    """The block's loss, and a function that gives its gradients in x, head and bias."""
    (x, targets, weights), (head, bias) = block, tables
    products = linear(x, head, transposed=True, out_dtype=jnp.float32)
    logits, to_products = jax.vjp(lambda y, bias: finished_logits(y, bias, config), products, bias)
    ids = first + jnp.arange(head.shape[0], dtype=jnp.int32)
    logits = jnp.where(ids < config.vocab_size, logits, -jnp.inf)
    largest = pmax(logits.max(-1), axes)
    powers = jnp.exp(logits - largest[:, None])
    total = psum(powers.sum(-1), axes)
    hit = ids == targets[:, None]
    of_target = psum(jnp.where(hit, logits, 0.0).sum(-1), axes)
    loss = ((jnp.log(total) + largest - of_target) * weights).sum()

    def gradients() -> tuple[jax.Array, ...]:
        slope = (powers / total[:, None] - hit.astype(jnp.float32)) * weights[:, None]
        d_products, d_bias = to_products(slope)
        _, to_operands = jax.vjp(lambda x, head: linear(x, head, transposed=True, out_dtype=jnp.float32), x, head)
        return *to_operands(d_products), d_bias

    return loss, gradients
