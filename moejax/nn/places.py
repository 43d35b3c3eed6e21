"""Where the tokens of one call stand, as the layers need it."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.config import ModelConfig, RopeConfig
from moejax.nn.rope import rope_tables


@dataclass(frozen=True, eq=False)
class Places:
    """Positions of the tokens, and the rotary tables that follow from them.

    Attributes:
      positions: of each token in its sequence; where a call extends a cache, -1 for padding.
      tables: (cosine, sine) for each rotary embedding in the model.
    """

    positions: Int[Array, "B S"]
    tables: Mapping[RopeConfig, tuple[Float[Array, "B S H2"], Float[Array, "B S H2"]]]

    @classmethod
    def of(cls, config: ModelConfig, positions: Int[Array, "B S"], lengths: Int[Array, " B"]) -> "Places":
        """Those of a call on rows of `lengths` tokens so far."""
        longest = config.max_position_embeddings
        return cls(positions, {rope: rope_tables(rope, longest, positions, lengths) for rope in config.ropes})

    def table(self, rope: RopeConfig | None) -> tuple[jax.Array, jax.Array]:
        """(cosine, sine) of one rotary embedding; for None, tables of no pairs."""
        if rope is not None:
            return self.tables[rope]
        nothing = jnp.zeros((*self.positions.shape, 0), jnp.float32)
        return nothing, nothing


def chunk_positions(first: int | Int[Array, ""], size: int, lengths: Int[Array, " B"]) -> Int[Array, "B S"]:
    """Positions of the tokens from `first` on in right-padded rows of `lengths` tokens; -1 for padding."""
    positions = first + jnp.arange(size, dtype=jnp.int32)
    return jnp.where(positions < lengths[:, None], positions, -1)
