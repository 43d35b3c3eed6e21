"""Noise on what routers read, so that in training tokens also try experts near their choice."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Key


@struct.dataclass
class Jitter:
    """Multiplies what a router reads, element by element, by uniform noise in [1 - amount, 1 + amount).

    Only the router reads the noisy input, as in Switch: noise is there to explore choices. Transformers' Mixtral
    multiplies the block's input in place, so that its experts compute on it too.

    An element's noise depends on the key and on its index alone, not on the mesh. Rows that fill up a batch change
    none of it, since they come last.

    Attributes:
      key: of one training step (and of one accumulation step in it).
      amount: below 1.

    Source: Fedus et al. 2021, "Switch Transformers", section 2.4 and its Mesh TensorFlow code ("input jitter").
    """

    key: Key[Array, ""]
    amount: float = struct.field(pytree_node=False)

    def of_layer(self, index: int) -> "Jitter":
        """Other noise for each layer."""
        return Jitter(jax.random.fold_in(self.key, index), self.amount)

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        """x times the noise, in f32, rounded to x's dtype."""
        noise = jax.random.uniform(self.key, x.shape, jnp.float32, 1 - self.amount, 1 + self.amount)
        return (x.astype(jnp.float32) * noise).astype(x.dtype)
