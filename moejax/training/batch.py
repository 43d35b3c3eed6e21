"""What a training step and an evaluation read: packed sequences, and what is to be predicted at each place."""

from flax import struct
from jaxtyping import Array, Int

NO_TARGET = -1
"""The target of a place whose next token is not to be learned."""


@struct.dataclass
class Batch:
    """Packed sequences, all int32.

    Attributes:
      tokens: ids.
      targets: the id that follows each token, or NO_TARGET: at a text's end, on padding, before a token that is not
        to be learned.
      segments: 0 is padding; attention stays within a segment.
      positions: of each token in its segment, for the rotary embedding.
    """

    tokens: Int[Array, "B S"]
    targets: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    positions: Int[Array, "B S"]
