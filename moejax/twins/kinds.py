"""What the layers of a model do, their sizes aside."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from moejax.config import AttentionConfig, DeltaNetConfig, LatentAttentionConfig, LayerConfig, ModelConfig

# Fields of layers, mixers, ropes and experts that may shrink: whether there is such a thing is kept, how large is not.
_SIZES = frozenset(
    "num_heads num_kv_heads head_dim theta window chunk temperature kv_rank query_rank nope_dim value_dim "
    "num_key_heads num_value_heads key_dim hidden_size intermediate_size dense_intermediate_size "
    "shared_intermediate_size num_experts num_experts_per_tok dim turned_pairs original_length "
    "short_factors long_factors".split()
)
_COUNTS = frozenset({"groups", "kept_groups"})


def layer_kinds(config: ModelConfig) -> list[Any]:
    """For each layer a value that is equal where two layers take the same paths through the code.

    Of rotary bases, which some families work out from a head's width, the order within the model is kept.
    """
    bases = sorted({rope.theta for rope in config.ropes})
    return [(_shared_heads(layer), _turned(layer), _base(layer, bases), _kind(layer)) for layer in config.layers]


def _kind(part: Any, name: str = "") -> Any:
    if name in _COUNTS:
        return part > 1
    if name in _SIZES:
        return part not in (None, 0)
    if is_dataclass(part) and not isinstance(part, type):
        # Of latent attention the scale of scores follows from the widths.
        names = [f.name for f in fields(part) if (type(part), f.name) != (LatentAttentionConfig, "scale")]
        return type(part).__name__, *((name, _kind(getattr(part, name), name)) for name in names)
    if isinstance(part, Mapping):
        return tuple((key, _kind(value, key)) for key, value in part.items())
    return part


def _shared_heads(layer: LayerConfig) -> bool | None:
    """Whether query heads share key/value heads."""
    mixer = layer.mixer
    return mixer.num_heads > mixer.num_kv_heads if isinstance(mixer, AttentionConfig) else None


def _turned(layer: LayerConfig) -> bool | None:
    """Whether all of a head is turned."""
    mixer = layer.mixer
    if not isinstance(mixer, AttentionConfig) or mixer.rope is None:
        return None
    return mixer.rope.dim == mixer.head_dim


def _base(layer: LayerConfig, bases: list[float]) -> int | None:
    rope = None if isinstance(layer.mixer, DeltaNetConfig) else layer.mixer.rope
    return None if rope is None else bases.index(rope.theta)
