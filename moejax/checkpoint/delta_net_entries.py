"""The tensors of gated DeltaNet."""

from collections.abc import Iterator

from moejax.checkpoint.entries import Entry, Heads, LayerNames, held, whole_tensor
from moejax.checkpoint.pieces import Piece
from moejax.config import DeltaNetConfig, NormConfig
from moejax.nn.heads import head_layout


def delta_net_entries(
    config: DeltaNetConfig, norm: NormConfig, width: int, names: LayerNames, tp: int
) -> Iterator[Entry]:
    """Value heads as query heads are laid out, key heads as key/value heads.

    Projections of the input come in one of two forms: "qkvz" and "ba", in which each key head's rows are its query, its
    key, and the values and gates of its value heads (Qwen3-Next), or "qkv", "z", "b" and "a", each head after head
    (Qwen3.5). The tensors' names begin with "linear.", apart from those of a model's attention layers.
    """
    N, G = config.num_value_heads, config.num_key_heads
    layout = head_layout(N, G, tp)
    values = tuple(head if head < N else -1 for head in range(layout.num_heads))
    projections = _by_key_head if names.has("linear.qkvz") else _by_part
    yield from projections(config, names, values, layout.kv_of, width)
    yield from _convolution(config, names, values, layout.kv_of)
    for part in ("dt_bias", "A_log"):
        yield from Heads(values, N, 1).scalars(names.role(part), names.tensor(f"linear.{part}"))
    yield whole_tensor(names.role("norm"), names.tensor("linear.norm"), (config.value_dim,))
    yield from Heads(values, N, config.value_dim).project_back(names.role("o"), names.tensor("linear.o"), width)


def _by_key_head(
    config: DeltaNetConfig, names: LayerNames, values: tuple[int, ...], keys: tuple[int, ...], width: int
) -> Iterator[Entry]:
    N, G, Hk, Hv = config.num_value_heads, config.num_key_heads, config.key_dim, config.value_dim
    each = N // G
    rows = 2 * Hk + 2 * each * Hv
    for part, first in (("q", 0), ("k", Hk)):
        yield from Heads(keys, G, rows, first, Hk).project(names.role(part), names.tensor("linear.qkvz"), width)
    for part, tensor, head_rows, first, size in (
        ("v", "qkvz", rows, 2 * Hk, Hv),
        ("z", "qkvz", rows, 2 * Hk + each * Hv, Hv),
        ("b", "ba", 2 * each, 0, 1),
        ("a", "ba", 2 * each, each, 1),
    ):
        for at, head in held(values):
            start = head // each * head_rows + first + head % each * size
            yield _projected(names, part, tensor, at, slice(start, start + size), width, G * head_rows)


def _by_part(
    config: DeltaNetConfig, names: LayerNames, values: tuple[int, ...], keys: tuple[int, ...], width: int
) -> Iterator[Entry]:
    N, G, Hk, Hv = config.num_value_heads, config.num_key_heads, config.key_dim, config.value_dim
    total = 2 * G * Hk + N * Hv
    for part, tensor, stored, first, size, rows in (
        ("q", "qkv", keys, 0, Hk, total),
        ("k", "qkv", keys, G * Hk, Hk, total),
        ("v", "qkv", values, 2 * G * Hk, Hv, total),
        ("z", "z", values, 0, Hv, N * Hv),
        ("b", "b", values, 0, 1, N),
        ("a", "a", values, 0, 1, N),
    ):
        for at, head in held(stored):
            start = first + head * size
            yield _projected(names, part, tensor, at, slice(start, start + size), width, rows)


def _projected(names: LayerNames, part: str, tensor: str, at: int, source: slice, width: int, rows: int) -> Entry:
    """One head's rows of a projection; `b` and `a` have a single one and no axis for it."""
    inputs = slice(0, width)
    dest = (inputs, slice(at, at + 1)) if part in "ba" else (inputs, at, slice(0, source.stop - source.start))
    return (
        names.role(part),
        Piece(dest, names.tensor(f"linear.{tensor}"), (source, inputs), transpose=True),
        (rows, width),
    )


def _convolution(
    config: DeltaNetConfig, names: LayerNames, values: tuple[int, ...], keys: tuple[int, ...]
) -> Iterator[Entry]:
    """One tensor `[channels, 1, kernel]`: all queries' channels, then all keys', then all values'."""
    N, G, Hk, Hv = config.num_value_heads, config.num_key_heads, config.key_dim, config.value_dim
    shape = (2 * G * Hk + N * Hv, 1, config.kernel)
    for part, stored, first, size in (
        ("conv_q", keys, 0, Hk),
        ("conv_k", keys, G * Hk, Hk),
        ("conv_v", values, 2 * G * Hk, Hv),
    ):
        for at, head in held(stored):
            channels = slice(first + head * size, first + (head + 1) * size)
            source = (channels, slice(0, 1), slice(0, config.kernel))
            dest = (at, slice(0, size), slice(0, config.kernel))
            yield names.role(part), Piece(dest, names.tensor("linear.conv"), source, dropped=(1,)), shape
