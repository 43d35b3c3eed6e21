"""The cache of one layer of latent attention: one latent a token, whatever the number of heads."""

import jax
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int


@struct.dataclass
class LatentCache:
    """What a layer keeps of the tokens so far, in the model's dtype; place p holds position p.

    Attributes:
      latent: L values: the normed latent and, after it, the turned part of the key that all heads share.
    """

    latent: Float[Array, "B C L"]


def appended(cache: LatentCache, latent: Float[Array, "B 1 L"], positions: Int[Array, " B"]) -> LatentCache:
    """The cache with one more token a row, at that row's position."""
    put = jax.vmap(lambda row, new, at: lax.dynamic_update_slice_in_dim(row, new, at, 0))
    return LatentCache(latent=put(cache.latent, latent, positions))
