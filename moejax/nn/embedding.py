"""Token embedding and output head: vocabulary rows cut over `tp`."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.kernels.block import Block
from moejax.kernels.linear import linear
from moejax.kernels.rows import take_rows
from moejax.nn.stream import Stream
from moejax.sharding import psum


def embed(tokens: Int[Array, "B S"], table: Float[Array, "Vp D"], stream: Stream) -> Float[Array, "B S D"]:
    """Each token's row of the table; every device looks up the rows it has, and one sum over `tp` fills the rest."""

    def local(tokens: jax.Array, table: jax.Array) -> jax.Array:
        first = lax.axis_index(stream.tp) * table.shape[0] if stream.tp_axes else 0
        row = tokens - first
        mine = (row >= 0) & (row < table.shape[0])
        found = take_rows(table, jnp.where(mine, row, table.shape[0]))
        return psum(found, stream.tp_axes)

    rows = stream.batch_spec
    specs = (rows, stream.spec(stream.tp))
    return jax.shard_map(local, mesh=stream.mesh, in_specs=specs, out_specs=rows, check_vma=True)(tokens, table)


def head_logits(
    x: Float[Array, "B S D"], head: Float[Array, "Vp D"], vocab_size: int, stream: Stream
) -> Float[Array, "B S V"]:
    """Logits in f32, cut over `tp` (and over `ep` where the stream is replicated and the rows divide).

    The padding rows that make the head divisible (Vp of them in all) are cut off.
    """
    helpers = stream.helpers(head.shape[0] // stream.tp_size)

    def local(x: jax.Array, head: jax.Array) -> jax.Array:
        mine = Block(head, lax.axis_index(stream.ep), 0, helpers) if helpers > 1 else head
        return linear(x, mine, transposed=True, out_dtype=jnp.float32)

    out = stream.spec(stream.rows, None, (stream.tp, stream.ep) if helpers > 1 else stream.tp)
    specs = (stream.batch_spec, stream.spec(stream.tp))
    logits = jax.shard_map(local, mesh=stream.mesh, in_specs=specs, out_specs=out, check_vma=True)(x, head)
    return logits[..., :vocab_size]
