"""Parameters as one device stores them, and as a mesh does: with empty expert slots, padded widths, repeated heads.

What must not depend on the mesh takes the first form: random weights, the checkpoints of a run, the norm of a gradient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float

from moejax.checkpoint.pieces import Piece, Window
from moejax.config import ModelConfig
from moejax.language_model import role_of
from moejax.loading import abstract_decoder
from moejax.opening import checkpoint_plan

PADDING = np.iinfo(np.int32).max
"""The place, on one device, of what a mesh fills up with zeros: past any end."""


@dataclass(frozen=True, eq=False)
class StoredForm:
    """How a mesh stores one parameter.

    Attributes:
      axes: for each axis that the mesh stores otherwise, the index on one device of every index on the mesh, or
        PADDING.
    """

    axes: Mapping[int, np.ndarray]

    def expand(self, x: Array) -> Array:
        """From one device's form to the mesh's."""
        for axis, index in self.axes.items():
            x = jnp.take(x, index, axis=axis, mode="fill", fill_value=0)
        return x

    def contract(self, x: Array) -> Array:
        """The way back; of copies the first is taken."""
        for axis, index in self.axes.items():
            places, first = np.unique(index, return_index=True)
            x = jnp.take(x, first[places != PADDING].astype(np.int32), axis=axis)
        return x

    def summed(self, gradient: Float[Array, "..."]) -> Float[Array, "..."]:
        """What each copy's gradient must be for them to stay equal: that of all of its copies together."""
        for axis, index in self.axes.items():
            same = (index[:, None] == index) & (index != PADDING)
            if (same.sum(0) > 1).any():
                moved = jnp.tensordot(same.astype(np.float32), gradient, (1, axis), precision="highest")
                gradient = jnp.moveaxis(moved, 0, axis)
        return gradient

    def square_sum(self, x: Float[Array, "..."]) -> Float[Array, ""]:
        """The sum of squares, copies counted once."""
        squares = jnp.square(x)
        for axis, index in self.axes.items():
            copies = (index[:, None] == index).sum(0).astype(np.float32)
            squares = squares / copies.reshape(-1, *(1 for _ in range(axis + 1, x.ndim)))
        return squares.sum()


def stored_forms(config: ModelConfig, mesh: Mesh) -> dict[str, StoredForm]:
    """Role -> its form on this mesh, such as "layers.0.attention.k".

    Worked out from what each holds of a checkpoint, which is the one place that knows about slots and heads.
    """
    there = checkpoint_plan(config, mesh).pieces
    here = checkpoint_plan(config, AbstractMesh((1, 1), ("ep", "tp"))).pieces
    parameters = abstract_decoder(config, mesh, jnp.float32)[1]
    shapes = {role_of(path): leaf.shape for path, leaf in parameters.items()}
    return {role: _form(here[role], there[role], shape) for role, shape in shapes.items()}


def _form(here: Sequence[Piece], there: Sequence[Piece], shape: tuple[int, ...]) -> StoredForm:
    origin = {(piece.tensor, _key(piece.source)): piece.box for piece in here}
    axes = [np.full(size, PADDING, np.int32) for size in shape]
    for piece in there:
        for axis, to, start in zip(axes, piece.box, origin[piece.tensor, _key(piece.source)], strict=True):
            index = np.arange(start.start, start.stop, dtype=np.int32)
            old = axis[to]
            assert ((old == PADDING) | (old == index)).all(), f"{piece.tensor} lies in no product of axes"
            axis[to] = index
    return StoredForm({i: a for i, a in enumerate(axes) if not np.array_equal(a, np.arange(a.size))})


def _key(window: Window) -> tuple[tuple[int, int, int | None], ...]:
    return tuple((part.start, part.stop, part.step) for part in window)
