"""From the config.json of a published model to that of a tiny one with the same special paths."""

from collections.abc import Callable, Mapping
from typing import Any

from moejax.config import DeltaNetConfig, ModelConfig
from moejax.families import read_config, text_config
from moejax.twins.kinds import layer_kinds
from moejax.twins.sizes import Config, small_sizes, small_vocabulary

# Lists of layers. Any other list with an entry for each layer is cut to the layers that stay.
_LAYER_NUMBERS = ("mlp_only_layers", "moe_layers")

# Fields that say where one kind of layer ends and the next begins, each with values that need fewer layers.
_BORDERS: Mapping[str, Callable[[Config], int]] = {
    "first_k_dense_replace": lambda config: 1,
    "max_window_layers": lambda config: 1,
    "moe_layer_start_index": lambda config: 1,
    "moe_layer_end_index": lambda config: config.get("moe_layer_start_index", 0),
}

# Lengths that a config may leave to its family, whose value no short prompt reaches: (stated field, field, value).
_REACHED = (("attention_chunk_size", "floor_scale", 8192),)

_Read = Callable[[Config], ModelConfig]


def shrink(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config of the same family, small in every size, with the fewest first layers that show each kind of layer.

    Of a model of several modalities the text config is shrunk and the rest stays.

    Raises:
        MoejaxError: the config is not supported; see `read_config`.
    """
    if text_config(raw) is raw:
        return _shrunk(raw, read_config)
    small = _shrunk(raw["text_config"], lambda text: read_config({**raw, "text_config": text}))
    return small_vocabulary(raw, small["vocab_size"]) | {"text_config": small}


def _shrunk(raw: Config, read: _Read) -> dict[str, Any]:
    config = read(raw)
    raw = dict(raw) | {name: size for name, size in _stated(config).items() if name not in raw}
    for given, name, default in _REACHED:
        if raw.get(given):
            raw.setdefault(name, default)
    small = small_sizes(raw)
    small = small_vocabulary(small, small["vocab_size"])
    kinds = set(layer_kinds(read(small)))
    for name, border in _BORDERS.items():
        if isinstance(small.get(name), int):
            trial = small | {name: min(small[name], border(small))}
            found = layer_kinds(read(trial))
            if set(found) == kinds and _first(found) < _first(layer_kinds(read(small))):
                small = trial
    # At least two, so that one layer's output is another's input.
    kept = max(_first(layer_kinds(read(small))), min(config.num_layers, 2))
    return _cut(small, config.num_layers, kept)


def _stated(config: ModelConfig) -> dict[str, Any]:
    """The sizes that every family names alike, for configs that leave them to the family."""
    attention = next((layer.mixer for layer in config.layers if not isinstance(layer.mixer, DeltaNetConfig)), None)
    heads = {} if attention is None else {"num_attention_heads": attention.num_heads}
    return heads | {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "max_position_embeddings": config.max_position_embeddings,
    }


def _first(kinds: list[Any]) -> int:
    """How many of the first layers show every kind."""
    return 1 + max(kinds.index(kind) for kind in set(kinds))


def _cut(config: Config, layers: int, kept: int) -> dict[str, Any]:
    """The config of the first `kept` of its `layers` layers."""

    def value(name: str, old: Any) -> Any:
        if name in _LAYER_NUMBERS and isinstance(old, list):
            return [layer for layer in old if layer < kept]
        if isinstance(old, list) and len(old) == layers and not name.endswith("_token_id"):
            return old[:kept]
        if name == "moe_layer_end_index":
            return min(old, kept - 1)
        return old

    return {name: value(name, old) for name, old in config.items()} | {"num_hidden_layers": kept}
