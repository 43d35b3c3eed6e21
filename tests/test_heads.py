"""The layout of heads over shards, for every small combination."""

import itertools

import pytest

from moejax.nn.heads import head_layout

SIZES = [(n, g) for n in range(1, 17) for g in range(1, n + 1) if n % g == 0]


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 8])
def test_every_query_head_reads_its_own_key_head_inside_its_shard(shards):
    for num_heads, num_kv_heads in SIZES:
        layout = head_layout(num_heads, num_kv_heads, shards)
        assert num_heads <= layout.num_heads < num_heads + shards
        assert layout.num_heads % shards == 0 and layout.num_kv_heads % shards == 0
        per_shard, kv_per_shard = layout.num_heads // shards, layout.num_kv_heads // shards
        for head in range(layout.num_heads):
            stored = head // layout.group
            assert stored // kv_per_shard == head // per_shard
            own = head // (num_heads // num_kv_heads) if head < num_heads else -1
            assert layout.kv_of[stored] == own


def test_nothing_is_repeated_where_shards_divide_the_key_heads():
    for (num_heads, num_kv_heads), shards in itertools.product(SIZES, (1, 2, 4)):
        if num_kv_heads % shards == 0:
            layout = head_layout(num_heads, num_kv_heads, shards)
            assert (layout.num_heads, layout.kv_of) == (num_heads, tuple(range(num_kv_heads)))


@pytest.mark.parametrize(
    ("sizes", "num_heads", "kv_of"),
    [
        ((8, 2, 4), 8, (0, 0, 1, 1)),
        ((6, 3, 4), 8, (0, 1, 2, -1)),
        ((6, 2, 4), 8, (0, 0, 0, 1, 1, 1, -1, -1)),
    ],
)
def test_examples_of_the_table(sizes, num_heads, kv_of):
    layout = head_layout(*sizes)
    assert (layout.num_heads, layout.kv_of) == (num_heads, kv_of)
