"""One block of a weight, named but not cut out: a slice handed to a kernel would be a copy of it in every step."""

import jax
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int


@struct.dataclass
class Block:
    """Stands for the `index`-th of `count` equal parts of a weight along one of its axes.

    Attributes:
      whole: the weight.
      index: which part; differs from device to device.
      axis: of `whole`, divisible by `count`.
      count: parts.
    """

    whole: Float[Array, "*W"]
    index: Int[Array, ""]
    axis: int = struct.field(pytree_node=False)
    count: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part."""
        shape = list(self.whole.shape)
        shape[self.axis] //= self.count
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.whole.ndim

    def array(self) -> Float[Array, "*W"]:
        """The part, cut out."""
        width = self.shape[self.axis]
        return lax.dynamic_slice_in_dim(self.whole, self.index * width, width, self.axis)


def array_of(w: jax.Array | Block) -> jax.Array:
    """A weight as an array, whichever way it is held."""
    return w.array() if isinstance(w, Block) else w
