"""From the rows that each process read to the batch of a step on the mesh."""

from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from moejax import distributed
from moejax.model import Lie
from moejax.training.batch import NO_TARGET, Batch


@dataclass(frozen=True)
class Placing:
    """Cuts a batch of N rows into A parts, row r into part r mod A, and puts them on the mesh.

    So a process' rows, which stand together in the batch, stand together in each part too, and which part a row comes
    into does not depend on how many processes there are.

    Attributes:
      lie: how one part lies, of N / A rows and those that fill it up.
      parts: A.
    """

    lie: Lie
    parts: int

    def __call__(self, rows: Batch) -> Batch:
        """
        Args:
          rows: numpy, this process' rows of the batch, `[N / processes, S]`.

        Returns:
          `[A, lie.rows, S]` over the mesh.
        """
        # Padding is segment 0, of no target.
        fill = Batch(0, NO_TARGET, 0, 0)  # type: ignore[arg-type]
        return jax.tree.map(self._put, rows, fill)

    def _put(self, rows: np.ndarray, fill: int) -> jax.Array:
        parts = rows.reshape(-1, self.parts, rows.shape[-1]).swapaxes(0, 1)
        count, own = distributed.process_count(), parts.shape[1]
        first = distributed.process_index() * own
        if count > 1 and not self._aligned(own, count):
            parts, first = multihost_utils.process_allgather(parts.swapaxes(0, 1), tiled=True).swapaxes(0, 1), 0
        shape = (self.parts, self.lie.rows, rows.shape[-1])
        if (missing := self.lie.rows - own * count) > 0:
            parts = np.pad(parts, ((0, 0), (0, missing), (0, 0)), constant_values=fill)

        def part_of(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[1].indices(self.lie.rows)
            return parts[:, start - first : stop - first]

        return jax.make_array_from_callback(shape, self._sharding, part_of)

    @property
    def _sharding(self) -> NamedSharding:
        stream = self.lie.stream
        return NamedSharding(stream.mesh, PartitionSpec(None, *stream.batch_spec))

    def _aligned(self, own: int, count: int) -> bool:
        """Whether the devices of each process take just the rows that it has; the answer is the same on all."""
        if own * count != self.lie.rows:
            return False
        where = self._sharding.devices_indices_map((self.parts, self.lie.rows, 1))
        return all(
            own * device.process_index <= at[1].indices(self.lie.rows)[0]
            and at[1].indices(self.lie.rows)[1] <= own * (device.process_index + 1)
            for device, at in where.items()
            if at is not None
        )
