"""Which heads one device computes: its part of the tensor axis, divided along `ep` where the stream is replicated."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from moejax.kernels.block import Block, array_of
from moejax.nn.heads import HeadLayout
from moejax.nn.stream import Stream


@dataclass(frozen=True, slots=True)
class HeadShare:
    """`heads` query and `kv_heads` key/value heads on each device; `helpers` devices along `ep` divide a rank's."""

    layout: HeadLayout
    stream: Stream
    helpers: int
    heads: int
    kv_heads: int

    @classmethod
    def of(cls, layout: HeadLayout, stream: Stream) -> "HeadShare":
        """The finest even division of the heads under this stream."""
        rank_heads = layout.num_heads // stream.tp_size
        helpers = stream.helpers(rank_heads)
        heads = rank_heads // helpers
        return cls(layout, stream, helpers, heads, heads // math.gcd(heads, layout.group))

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes over which other devices hold other heads."""
        return ((self.stream.ep,) if self.helpers > 1 else ()) + self.stream.tp_axes

    @property
    def total_heads(self) -> int:
        """Query heads of all devices together, as `cache_spec` cuts them."""
        return self.heads * self.helpers * self.stream.tp_size

    @property
    def total_kv_heads(self) -> int:
        """Key/value heads likewise; those that several devices share count once on each."""
        return self.kv_heads * self.helpers * self.stream.tp_size

    @property
    def cache_spec(self) -> PartitionSpec:
        """How a cache `[B, G, C, H]` of these heads lies on the mesh."""
        divided = (self.stream.tp, self.stream.ep) if self.helpers > 1 else (self.stream.tp,)
        return self.stream.spec(self.stream.rows, divided)

    def take(
        self,
        params: Mapping[str, jax.Array],
        heads: Mapping[str, int],
        kv_heads: Mapping[str, int],
        linear: Collection[str],
    ) -> dict[str, Any]:
        """This device's heads out of its tensor-parallel rank's parameters; all of them where it has no helpers.

        Args:
          params: the rank's parameters by name.
          heads: the axis of the query heads for each parameter that has them.
          kv_heads: that of the key/value heads.
          linear: parameters that only the function of this name uses; they are named as a `Block` rather than cut out.
        """
        if self.helpers == 1:
            return dict(params)
        helper = lax.axis_index(self.stream.ep)
        first = helper * self.heads
        mine: dict[str, jax.Array | Block] = dict(params)
        # In the order of the parameters: that of a set differs from process to process, and with it the program's text.
        for name in params:
            if name in heads:
                mine[name] = Block(params[name], helper, heads[name], self.helpers)
            elif name in kv_heads:
                mine[name] = self._kv_block(params[name], kv_heads[name], first)
        return {name: value if name in linear else array_of(value) for name, value in mine.items()}

    def _kv_block(self, whole: jax.Array, axis: int, first: jax.Array) -> jax.Array | Block:
        """The key/value heads that query heads from `first` on read."""
        group = self.layout.group
        if self.heads % group == 0 or group % self.heads == 0:
            return Block(whole, first // max(group, self.heads), axis, whole.shape[axis] // self.kv_heads)
        kv = (first + jnp.arange(self.kv_heads, dtype=jnp.int32) * (self.heads // self.kv_heads)) // group
        return jnp.take(whole, kv, axis, mode="clip")

    def kv_weights(self) -> Float[Array, " G"]:
        """1 for the local key/value heads that count here, 0 for copies that count elsewhere, and for padding."""
        seen: set[int] = set()
        table = np.zeros((self.stream.tp_size, self.helpers, self.kv_heads), np.float32)
        rank_heads = self.heads * self.helpers
        for rank, helper, i in np.ndindex(*table.shape):
            head = rank * rank_heads + helper * self.heads + i * (self.heads // self.kv_heads)
            kv = self.layout.kv_of[head // self.layout.group]
            table[rank, helper, i] = kv >= 0 and kv not in seen
            seen.add(kv)
        rank = lax.axis_index(self.stream.tp) if self.stream.tp_axes else 0
        helper = lax.axis_index(self.stream.ep) if self.helpers > 1 else 0
        return jnp.asarray(table)[rank, helper]
