"""Shares: on the expert axis each device of the tensor axis carries its part of D, so the bytes there are divided by R.

Where the tensor axis does not divide D (or has one device), whole rows travel and results stay partial sums until
`whole`.
"""

from jax import lax
from jaxtyping import Array, Float

from moejax.moe.strategies.local import Local
from moejax.sharding import came, psum


def divides(width: int, local: Local) -> bool:
    """Whether rows of this width travel in shares."""
    return local.tp is not None and width % local.tp_size == 0


def cut_share(x: Float[Array, "T D"], local: Local) -> Float[Array, "T d"]:
    """The columns of `x` that this device carries."""
    if not divides(x.shape[1], local):
        return x
    width = x.shape[1] // local.tp_size
    return lax.dynamic_slice_in_dim(x, local.tp_index() * width, width, 1)


def gather_share(share: Float[Array, "M d"], width: int, local: Local) -> Float[Array, "M D"]:
    """Whole rows from the shares of all devices of the tensor axis."""
    return came(lax.all_gather(share, local.tp, axis=1, tiled=True)) if divides(width, local) else share


def scatter_share(partial: Float[Array, "M D"], local: Local) -> Float[Array, "M d"]:
    """This device's share of the sum over the tensor axis; whole rows stay partial sums."""
    if not divides(partial.shape[1], local):
        return partial
    return came(lax.psum_scatter(partial, local.tp, scatter_dimension=1, tiled=True))


def whole(share: Float[Array, "T d"], width: int, local: Local) -> Float[Array, "T D"]:
    """The result on every device of the tensor axis: shares put together, or partial sums added."""
    if not divides(width, local):
        return psum(share, local.tp_axes)
    return came(lax.all_gather(share, local.tp, axis=1, tiled=True, to="invarying"))
