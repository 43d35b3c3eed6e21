"""The cache of one layer of latent attention: one latent a token, whatever the number of heads."""

from flax import struct
from jaxtyping import Array, Float, Int

from moejax.kernels.rows import put_rows
from moejax.nn.cache import place_of


@struct.dataclass
class LatentCache:
    """What a layer keeps of the tokens so far, in the model's dtype; place p holds position p.

    Attributes:
      latent: L values: the normed latent and, after it, the turned part of the key that all heads share.
    """

    latent: Float[Array, "B C L"]


def extended(cache: LatentCache, latent: Float[Array, "B S L"], positions: Int[Array, "B S"]) -> LatentCache:
    """The cache with S more tokens a row; what has the position -1 is left out."""
    at = place_of(positions, cache.latent.shape[1])
    return LatentCache(latent=put_rows(cache.latent[:, None], latent[:, :, None], at)[:, 0])
