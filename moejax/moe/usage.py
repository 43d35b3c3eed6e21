"""How a decoder's routers used their experts in one pass, layer by layer; a layer without experts has no row."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moejax.moe.layer import MoEDetails
from moejax.sharding import pad_axis


def pairs_by_expert(details: Sequence[MoEDetails | None]) -> Int[Array, "L E"]:
    """The tokens that chose each expert; a layer of fewer experts than others is filled up with idle ones."""
    counts = [d.accounting.tokens_per_expert for d in details if d is not None]
    most = max((count.size for count in counts), default=0)
    return jnp.stack([pad_axis(count, 0, most) for count in counts]) if counts else jnp.zeros((0, 0), jnp.int32)


def entropy_sums(details: Sequence[MoEDetails | None], real: Bool[Array, "B S"]) -> Float[Array, " L"]:
    """The entropy of the softmax over a router's logits, in nats, summed over the tokens that are not padding; f32."""

    def of(logits: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(lax.stop_gradient(logits))
        return -jnp.where(real[..., None], jnp.exp(log_p) * log_p, 0.0).sum()

    sums = [of(d.router_logits) for d in details if d is not None]
    return jnp.stack(sums) if sums else jnp.zeros(0, jnp.float32)


def dropped_pairs(details: Sequence[MoEDetails | None]) -> Int[Array, ""]:
    """Pairs of token and expert that found no room, of all layers; 0 unless a capacity factor was set."""
    return sum((d.accounting.dropped for d in details if d is not None), jnp.int32(0))
