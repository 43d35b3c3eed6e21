"""How attention heads are laid out over the tensor axis: padded query heads, repeated key/value heads."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """The heads as the mesh stores them.

    Attributes:
        num_heads: N', query heads with their padding; head i < N is the checkpoint's head i, the others are zeros.
        kv_of: for each stored key/value head, the checkpoint's head that it holds, or -1 for zeros.
    """

    num_heads: int
    kv_of: tuple[int, ...]

    @property
    def num_kv_heads(self) -> int:
        return len(self.kv_of)

    @property
    def group(self) -> int:
        """Consecutive query heads that read one stored key/value head."""
        return self.num_heads // len(self.kv_of)


def head_layout(num_heads: int, num_kv_heads: int, shards: int) -> HeadLayout:
    """Lays N query heads and G key/value heads out so that every shard holds equally many of both.

    A shard holds n = ceil(N / shards) query heads and n / g key/value heads, where g = gcd(n, N / G): the longest run
    of query heads that never crosses a shard nor a key/value head of the checkpoint. Key/value heads repeat where
    shards share one.

    |  N |  G | shards | N' | n | g | kv_of                           |                                         |
    |----|----|--------|----|---|---|---------------------------------|-----------------------------------------|
    |  8 |  2 |      1 |  8 | 8 | 4 | 0 1                             | as in the checkpoint                    |
    |  8 |  2 |      2 |  8 | 4 | 4 | 0 / 1                           | shards divide the key/value heads       |
    |  8 |  2 |      4 |  8 | 2 | 2 | 0 / 0 / 1 / 1                   | two shards repeat each key/value head   |
    |  6 |  2 |      2 |  6 | 3 | 3 | 0 / 1                           |                                         |
    |  6 |  3 |      4 |  8 | 2 | 2 | 0 / 1 / 2 / -1                  | the last shard holds padding only       |
    |  6 |  2 |      4 |  8 | 2 | 1 | 0 0 / 0 1 / 1 1 / -1 -1         | a shard cuts through a group of three   |

    g divides N, so a stored key/value head never serves both a real query head and padding; those of the padding hold
    zeros. Zero queries, keys, values and output rows keep padding at exactly zero, in the output and in every
    gradient.
    """
    padded = math.ceil(num_heads / shards) * shards
    shared = num_heads // num_kv_heads
    group = math.gcd(padded // shards, shared)
    first_heads = range(0, padded, group)
    return HeadLayout(padded, tuple(head // shared if head < num_heads else -1 for head in first_heads))
