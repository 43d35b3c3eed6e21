"""Which part of which checkpoint tensor fills which part of which parameter.

Checkpoints hold linear weights as [out, in] and mostly one tensor for each expert and projection. moejax holds them as
[in, out], with heads on an axis of their own, experts stacked in slots, gate and up side by side.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moejax.checkpoint.attention_entries import attention_entries
from moejax.checkpoint.delta_net_entries import delta_net_entries
from moejax.checkpoint.entries import Entry, LayerNames, whole_tensor
from moejax.checkpoint.expert_entries import PACKED_ROLES, ExpertTensors, dense_entries, moe_entries
from moejax.checkpoint.latent_attention_entries import latent_attention_entries
from moejax.checkpoint.pieces import Piece, Plan
from moejax.config import AttentionConfig, DeltaNetConfig, LatentAttentionConfig, ModelConfig, NormConfig


@dataclass(frozen=True, slots=True)
class MeshLayout:
    """What a plan needs to know of the mesh: its tensor axis, and the slot of each of a layer's experts."""

    tp: int
    slot_of: Callable[[int], Sequence[int]]


MIXER_ENTRIES: dict[type, Callable[[Any, NormConfig, int, LayerNames, int], Iterator[Entry]]] = {
    AttentionConfig: attention_entries,
    LatentAttentionConfig: latent_attention_entries,
    DeltaNetConfig: delta_net_entries,
}
"""For each kind of mixer: (config, norm, model width, names, tp) -> entries."""


def plan(config: ModelConfig, names: Mapping[str, str], experts: ExpertTensors, layout: MeshLayout) -> Plan:
    """The correspondence of a model with its checkpoint.

    Padding needs no piece: heads past N, hidden widths past F, vocabulary rows past V and empty slots stay zeros.

    Args:
        config: the model; it decides which parameters there are.
        names: role template -> tensor name template, as families declare them, such as
            "layers.{l}.moe.gate": "model.layers.{l}.mlp.experts.{e}.gate_proj.weight".
        experts: how the checkpoint stacks its experts.
        layout: the mesh.
    """
    pieces: dict[str, list[Piece]] = defaultdict(list)
    shapes: dict[str, tuple[int, ...]] = {}
    for role, piece, shape in _entries(config, names, experts, layout):
        pieces[role].append(piece)
        shapes[piece.tensor] = shape
    packed = {piece.tensor for role, parts in pieces.items() if role.endswith(PACKED_ROLES) for piece in parts}
    return Plan({role: tuple(parts) for role, parts in pieces.items()}, shapes, frozenset(packed))


def _entries(
    config: ModelConfig, names: Mapping[str, str], experts: ExpertTensors, layout: MeshLayout
) -> Iterator[Entry]:
    V, D = config.vocab_size, config.hidden_size
    yield whole_tensor("embed", names["embed"], (V, D))
    for index, layer in enumerate(config.layers):

        def named(part: str, index: int = index) -> LayerNames:
            return LayerNames(names, index, part)

        for part in layer.norms:
            yield from _norm(config.norm, named(part), D)
        yield from MIXER_ENTRIES[type(layer.mixer)](layer.mixer, config.norm, D, named("attention"), layout.tp)
        if layer.moe is not None:
            yield from moe_entries(layer.moe, named("moe"), experts, layout.slot_of(layer.moe.num_experts))
        if layer.dense_intermediate_size:
            yield from dense_entries(named("mlp"), D, layer.dense_intermediate_size, layer.dense_bias)
        if layer.side_by_side:
            yield from _norm(replace(config.norm, kind="rms"), named("router_norm"), D)
        if layer.output_scale:
            tensor = names["layers.{l}.output_scale"].format(l=index)
            yield whole_tensor(f"layers.{index}.output_scale", tensor, (1,))
    for name in _norm_parts(config.norm):
        yield whole_tensor(f"norm.{name}", names[f"norm.{name}"], (D,))
    if not config.tie_word_embeddings:
        yield whole_tensor("lm_head", names["lm_head"], (V, D))
    if config.head_bias:
        yield whole_tensor("lm_head_bias", names["lm_head_bias"], (V,))


def _norm(norm: NormConfig, names: LayerNames, width: int) -> Iterator[Entry]:
    return (whole_tensor(names.role(name), names.tensor(name), (width,)) for name in _norm_parts(norm))


def _norm_parts(norm: NormConfig) -> tuple[str, ...]:
    return ("weight", "bias") if norm.kind == "layer" else ("weight",)
