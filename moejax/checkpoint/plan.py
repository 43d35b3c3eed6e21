"""Which part of which checkpoint tensor fills which part of which parameter.

Checkpoints hold linear weights as [out, in] and one tensor for each expert and projection. moejax holds them as [in,
out], with heads on an axis of their own, experts stacked in slots, gate and up side by side.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping

from moejax.checkpoint.pieces import Piece, Plan, whole
from moejax.config import ModelConfig
from moejax.nn.heads import HeadLayout

# role, piece, and the shape that the piece's tensor has as a whole
Entry = tuple[str, Piece, tuple[int, ...]]


def plan(config: ModelConfig, names: Mapping[str, str], heads: HeadLayout, slot_of: tuple[int, ...]) -> Plan:
    """The correspondence of a model with its checkpoint.

    Padding needs no piece: heads past N, hidden widths past F, vocabulary rows past V and empty slots stay zeros. So
    the mesh matters only through `heads` and `slot_of`.

    Args:
        config: the model; it decides which parameters there are.
        names: role template -> tensor name template, as families declare them, such as
            "layers.{l}.moe.gate": "model.layers.{l}.mlp.experts.{e}.gate_proj.weight".
        heads: query and key/value heads as stored.
        slot_of: for each expert, the slot that holds it.
    """
    pieces: dict[str, list[Piece]] = defaultdict(list)
    shapes: dict[str, tuple[int, ...]] = {}
    for role, piece, shape in _entries(config, names, heads, slot_of):
        pieces[role].append(piece)
        shapes[piece.tensor] = shape
    return Plan({role: tuple(parts) for role, parts in pieces.items()}, shapes)


def _entries(
    config: ModelConfig, names: Mapping[str, str], heads: HeadLayout, slot_of: tuple[int, ...]
) -> Iterator[Entry]:
    V, D = config.vocab_size, config.hidden_size
    yield _whole("embed", names["embed"], (V, D))
    for layer, sparse in enumerate(config.sparse):
        yield from _attention(config, names, heads, layer)
        yield from _experts(config, names, slot_of, layer) if sparse else _dense(config, names, layer)
    yield _whole("norm", names["norm"], (D,))
    if not config.tie_word_embeddings:
        yield _whole("lm_head", names["lm_head"], (V, D))


def _attention(config: ModelConfig, names: Mapping[str, str], heads: HeadLayout, layer: int) -> Iterator[Entry]:
    attention, D, H = config.attention, config.hidden_size, config.attention.head_dim
    queries = tuple(head if head < attention.num_heads else -1 for head in range(heads.num_heads))
    prefix = f"layers.{layer}.attention"

    def name(part: str) -> str:
        return names[f"layers.{{l}}.attention.{part}"].format(l=layer)

    for part in ("attention_norm", "mlp_norm"):
        yield _whole(f"layers.{layer}.{part}", names[f"layers.{{l}}.{part}"].format(l=layer), (D,))
    for part, stored, total in (
        ("q", queries, attention.num_heads),
        ("k", heads.kv_of, attention.num_kv_heads),
        ("v", heads.kv_of, attention.num_kv_heads),
    ):
        for at, head in _held(stored):
            source = (slice(head * H, (head + 1) * H), slice(0, D))
            dest = (slice(0, D), at, slice(0, H))
            yield f"{prefix}.{part}", Piece(dest, name(part), source, transpose=True), (total * H, D)
        if attention.qkv_bias:
            yield from _per_head(f"{prefix}.{part}_bias", name(f"{part}_bias"), stored, total, H)
        if part != "v" and attention.qk_norm == "full":
            yield from _per_head(f"{prefix}.{part}_norm", name(f"{part}_norm"), stored, total, H)
        if part != "v" and attention.qk_norm == "head":
            yield _whole(f"{prefix}.{part}_norm", name(f"{part}_norm"), (H,))
    for at, head in _held(queries):
        source = (slice(0, D), slice(head * H, (head + 1) * H))
        dest = (at, slice(0, H), slice(0, D))
        yield f"{prefix}.o", Piece(dest, name("o"), source, transpose=True), (D, attention.num_heads * H)
    if attention.out_bias:
        yield _whole(f"{prefix}.o_bias", name("o_bias"), (D,))


def _experts(config: ModelConfig, names: Mapping[str, str], slot_of: tuple[int, ...], layer: int) -> Iterator[Entry]:
    moe, D, prefix = config.moe, config.hidden_size, f"layers.{layer}.moe"
    template = {part: names[f"layers.{{l}}.moe.{part}"] for part in ("router", "gate", "up", "down")}
    yield _linear(f"{prefix}.router", template["router"].format(l=layer), D, moe.num_experts)
    for part in ("gate", "up"):
        for expert, slot in enumerate(slot_of):
            tensor = template[part].format(l=layer, e=expert)
            yield _gate_or_up(f"{prefix}.gate_up", tensor, part, D, moe.intermediate_size, (slot,))
    for expert, slot in enumerate(slot_of):
        tensor = template["down"].format(l=layer, e=expert)
        yield _linear(f"{prefix}.down", tensor, moe.intermediate_size, D, (slot,))
    if moe.shared_intermediate_size:
        shared = {part: names[f"layers.{{l}}.moe.shared.{part}"].format(l=layer) for part in ("gate", "up", "down")}
        yield from _mlp(shared, f"{prefix}.shared_gate_up", f"{prefix}.shared_down", D, moe.shared_intermediate_size)
    if moe.shared_gate:
        tensor = names["layers.{l}.moe.shared_gate"].format(l=layer)
        yield f"{prefix}.shared_gate", Piece(whole((D,)), tensor, whole((1, D))), (1, D)


def _dense(config: ModelConfig, names: Mapping[str, str], layer: int) -> Iterator[Entry]:
    tensors = {part: names[f"layers.{{l}}.mlp.{part}"].format(l=layer) for part in ("gate", "up", "down")}
    prefix = f"layers.{layer}.mlp"
    yield from _mlp(tensors, f"{prefix}.gate_up", f"{prefix}.down", config.hidden_size, config.dense_intermediate_size)


def _mlp(tensors: Mapping[str, str], gate_up: str, down: str, D: int, F: int) -> Iterator[Entry]:
    for part in ("gate", "up"):
        yield _gate_or_up(gate_up, tensors[part], part, D, F)
    yield _linear(down, tensors["down"], F, D)


def _gate_or_up(role: str, tensor: str, part: str, D: int, F: int, lead: tuple[int, ...] = ()) -> Entry:
    dest = (*lead, slice(0, D), ("gate", "up").index(part), slice(0, F))
    return role, Piece(dest, tensor, whole((F, D)), transpose=True), (F, D)


def _linear(role: str, tensor: str, inputs: int, outputs: int, lead: tuple[int, ...] = ()) -> Entry:
    shape = (outputs, inputs)
    return role, Piece((*lead, *whole((inputs, outputs))), tensor, whole(shape), transpose=True), shape


def _whole(role: str, tensor: str, shape: tuple[int, ...]) -> Entry:
    return role, Piece(whole(shape), tensor, whole(shape)), shape


def _per_head(role: str, tensor: str, stored: tuple[int, ...], total: int, H: int) -> Iterator[Entry]:
    for at, head in _held(stored):
        yield role, Piece((at, slice(0, H)), tensor, (slice(head * H, (head + 1) * H),)), (total * H,)


def _held(stored: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(where it is stored, head of the checkpoint) for every stored head that is not padding."""
    return ((at, head) for at, head in enumerate(stored) if head >= 0)
