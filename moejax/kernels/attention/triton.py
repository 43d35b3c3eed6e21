"""Attention on NVIDIA GPUs as one Triton kernel with a running softmax: any widths, float32, float16 and bfloat16.

A program has a few consecutive queries of all heads that share a key/value head, so that each block of keys is loaded
once for them: for a decoded token that is the whole traffic. Its blocks of keys are those that one of its queries may
see. When queries are few, several programs share out the keys of one tile, and their parts are put together afterwards.

Source: Dao 2023, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning".
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moejax.kernels.attention.blocks import LOW, Blocks, row_spans
from moejax.kernels.attention.sight import NOWHERE, Keys, Queries
from moejax.precision import precision_of

PROGRAMS = 256
"""About as many as keep a large GPU busy."""


class _Tile(NamedTuple):
    """One program's queries, heads of each, and keys at a time; its warps, and loads under way at once."""

    queries: int
    heads: int
    keys: int
    warps: int
    stages: int

    @property
    def rows(self) -> int:
        """Queries by heads, filled up to a power of two; 16 are the fewest that Triton multiplies."""
        return max(16, pl.next_power_of_2(self.queries * self.heads))


def forward(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B G T H"],
    v: Float[Array, "B G T Hv"],
    sinks: Float[Array, " N"] | None,
    queries: Queries,
    keys: Keys,
    *,
    scale: float,
    roomy: bool = False,
    interpret: bool = False,
) -> tuple[Float[Array, "B S N Hv"], Float[Array, "B S N"]]:
    """What `blockwise.forward` returns, from the same arguments.

    With `roomy` a program may use 150 kB of shared memory, else 100 kB; `interpret` runs on any platform, slowly.
    """
    batch, length, heads, width = q.shape
    groups, room, value = v.shape[1:]
    tile = _tile(length, heads // groups, max(width, value), roomy and q.dtype != jnp.float32)
    spans = jnp.stack(row_spans(queries, keys, Blocks(tile.queries, tile.keys)))
    programs = (spans.shape[1], batch * groups * pl.cdiv(heads // groups, tile.heads))
    shares = _shares(math.prod(programs), pl.cdiv(room, tile.keys))
    sinks = jnp.full_like(q, LOW, jnp.float32, (heads,)) if sinks is None else sinks.astype(jnp.float32)
    vectors = [queries.first, queries.last, keys.places]
    if queries.segments is not None and keys.segments is not None:
        vectors += [queries.segments, keys.segments]
    # A share alone writes the result; several write parts that lose nothing when put together.
    dtype = v.dtype if shares == 1 else jnp.float32
    kind = jax.typeof(q).manual_axis_type
    shape = (shares, batch, length, heads)
    out, logs = pl.pallas_call(
        functools.partial(_kernel, tile=tile, scale=scale),
        [
            jax.ShapeDtypeStruct((*shape, value), dtype, manual_axis_type=kind),
            jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=kind),
        ],
        grid=(*programs, shares),
        # Named, since without it Pallas on a GPU means another compiler.
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
    )(spans, q, k, v, sinks, *vectors)
    return _joined(out, logs, v.dtype)


def _tile(length: int, sharing: int, width: int, roomy: bool) -> _Tile:
    """The fastest on an H100 that leave room for wide heads."""
    if width > 256:
        rows, keys, stages = 16, 32, 2
    elif width > 128:
        rows, keys, stages = 64, (64 if roomy else 32), 2
    else:
        rows, keys, stages = 64, 64, (3 if roomy else 2)
    heads = min(sharing, rows)
    return _Tile(min(length, rows // heads), heads, keys, 4, stages)


def _shares(programs: int, blocks: int) -> int:
    """Programs that share out the keys of one tile, each with at least four blocks where all keys are seen."""
    return max(1, min(PROGRAMS // programs, blocks // 4))


def _kernel(spans_ref, q_ref, k_ref, v_ref, sinks_ref, *refs, tile: _Tile, scale: float) -> None:
    *sight_refs, out_ref, logs_ref = refs
    i, pair, share = (pl.program_id(axis) for axis in range(3))
    groups, room, width = k_ref.shape[1:]
    sharing, value = q_ref.shape[2] // groups, v_ref.shape[3]
    pair, part = _divided(pair, pl.cdiv(sharing, tile.heads))
    row, group = _divided(pair, groups)
    query, head = _divided(_range(tile.rows), tile.heads)
    query, head = i * tile.queries + query, part * tile.heads + head
    mine = (_range(tile.rows) < tile.queries * tile.heads) & (query < q_ref.shape[1]) & (head < sharing)
    head += group * sharing
    q = [_load(q_ref, (row, query, head), part, mine, width) for part in _parts(width)]
    sees = _sight(sight_refs, row, query, mine)

    def add(j: jax.Array, state: tuple) -> tuple:
        largest, total, *values = state
        key = j * tile.keys + _range(tile.keys)
        there = key < room
        k = [_load(k_ref, (row, group, key), part, there, width) for part in _parts(width)]
        scores = sum(_dot(a, b.T) for a, b in zip(q, k, strict=True)) * scale
        scores = jnp.where(sees(key, there), scores, jnp.finfo(jnp.float32).min)
        new = jnp.maximum(largest, scores.max(-1))
        powers, shrunk = jnp.exp(scores - new[:, None]), jnp.exp(largest - new)
        v = [_load(v_ref, (row, group, key), part, there, value) for part in _parts(value)]
        sums = [a * shrunk[:, None] + _dot(powers.astype(b.dtype), b) for a, b in zip(values, v, strict=True)]
        return new, total * shrunk + powers.sum(-1), *sums

    first, past = _shared_out(spans_ref[0, i, row], spans_ref[1, i, row], share)
    nothing = [jnp.zeros((tile.rows, part.size), jnp.float32) for part in _parts(value)]
    sink = plt.load(sinks_ref.at[head], mask=mine & (share == 0), other=LOW)
    largest, total, *values = lax.fori_loop(first, past, add, (sink, jnp.where(sink > LOW, 1.0, 0.0), *nothing))
    total = jnp.where(total > 0, total, 1.0)  # of those that see nothing
    plt.store(logs_ref.at[share, row, query, head], largest + jnp.log(total), mask=mine)
    for sums, part in zip(values, _parts(value), strict=True):
        where = out_ref.at[share, row, query[:, None], head[:, None], part[None, :]]
        plt.store(where, (sums / total[:, None]).astype(out_ref.dtype), mask=mine[:, None] & (part < value)[None, :])


def _shared_out(first: jax.Array, past: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The blocks of keys of one share of those from `first` to `past`."""
    size = lax.div(past - first + (pl.num_programs(2) - 1), pl.num_programs(2))
    mine = jnp.minimum(first + share * size, past)
    return mine, jnp.minimum(mine + size, past)


def _sight(refs, row: jax.Array, query: jax.Array, mine: jax.Array):
    """The function from keys, and whether they are there, to which of them each query sees."""
    first_ref, last_ref, places_ref, *segment_refs = refs
    first, last = (plt.load(ref.at[row, query], mask=mine, other=NOWHERE) for ref in (first_ref, last_ref))
    own = [plt.load(ref.at[row, query], mask=mine, other=0) for ref in segment_refs[:1]]

    def sees(key: jax.Array, there: jax.Array) -> jax.Array:
        place = plt.load(places_ref.at[row, key], mask=there, other=-1)
        seen = (first[:, None] <= place[None, :]) & (place[None, :] <= last[:, None])
        for segments, ref in zip(own, segment_refs[1:], strict=True):
            seen &= segments[:, None] == plt.load(ref.at[row, key], mask=there, other=0)[None, :]
        return seen

    return sees


def _joined(
    out: Float[Array, "P B S N Hv"], logs: Float[Array, "P B S N"], dtype: DTypeLike
) -> tuple[Float[Array, "B S N Hv"], Float[Array, "B S N"]]:
    """The parts put together, each weighed by its sum of powers."""
    if len(out) == 1:
        return out[0], logs[0]
    together = jax.nn.logsumexp(logs, axis=0)
    weights = jnp.exp(logs - together)
    return jnp.sum(out.astype(jnp.float32) * weights[..., None], axis=0).astype(dtype), together


def _parts(width: int) -> list[jax.Array]:
    """The columns of a head in ranges whose lengths are powers of two, as Triton needs them; the last may go past."""
    parts, start = [], 0
    while start < width:
        size = max(16, 1 << ((width - start).bit_length() - 1))
        parts.append(start + _range(size))
        start += size
    return parts


def _load(ref, where: tuple[jax.Array, ...], part: jax.Array, there: jax.Array, width: int) -> jax.Array:
    """The rows of `ref` that are there, of each the columns `part` that are; zeros elsewhere."""
    *outer, last = (index if index.ndim == 0 else index[:, None] for index in where)
    return plt.load(ref.at[*outer, last, part[None, :]], mask=there[:, None] & (part < width)[None, :], other=0)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)


def _divided(a: jax.Array, b: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder."""
    return lax.div(a, jnp.int32(b)), lax.rem(a, jnp.int32(b))


def _range(size: int) -> jax.Array:
    return lax.iota(jnp.int32, size)
