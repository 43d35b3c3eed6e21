"""The small value of each config.json field that is a size, by the field's name.

Rules see the whole config, because sizes hang together: query heads share key/value heads as before, groups still
divide the experts, the context is as many times the one of pretraining. Equal widths stay equal.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Config = Mapping[str, Any]

# Wide enough for 32 values that share a scale in MXFP4, and for heads that are cut eight ways.
_WIDTH, _EXPERT_WIDTH, _HEAD, _VOCABULARY = 64, 32, 16, 128
_EXPERTS, _CHOSEN, _GROUPS, _GROUP = 8, 3, 4, 4
# Shorter than the prompts of the tests, so that windows and chunks are left behind.
_WINDOW = 8
_CONTEXT, _LONGEST = 512, 1024


def small_sizes(config: Config) -> dict[str, Any]:
    """`config` with every size that has a rule made small, inside its rope object too."""
    return _small(config, config)


def small_vocabulary(config: Config, vocabulary: int) -> dict[str, Any]:
    """`config` with the ids of special tokens moved, in their order, to the end of a small vocabulary."""
    names = [name for name in config if name.endswith(("_token_id", "_token_index"))]
    ids = sorted({i for name in names for i in _listed(config[name]) if isinstance(i, int) and i >= vocabulary})
    moved = {old: vocabulary - len(ids) + place for place, old in enumerate(ids)}

    def move(value: Any) -> Any:
        return [move(one) for one in value] if isinstance(value, list) else moved.get(value, value)

    return {name: move(value) if name in names else value for name, value in config.items()}


def _small(part: Config, config: Config) -> dict[str, Any]:
    return {name: _value(name, value, config) for name, value in part.items()}


def _value(name: str, value: Any, config: Config) -> Any:
    if isinstance(value, Mapping):
        return _small(value, config)
    if name in _LISTS and isinstance(value, list):
        return _LISTS[name](value, config)
    if name not in _RULES or isinstance(value, bool):
        return value
    if isinstance(value, list):
        return [_value(name, one, config) for one in value]
    return _RULES[name](value, config) if isinstance(value, int) else value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _at_most(largest: int) -> Callable[[int, Config], int]:
    return lambda value, config: min(value, largest)


def _kv_heads(value: int, config: Config) -> int:
    return min(value, 4 if value == config.get("num_attention_heads") else 2)


def _heads(value: int, config: Config) -> int:
    kv = config.get("num_key_value_heads") or value
    return _kv_heads(kv, config) * min(value // kv, 8)


def _other_kv_heads(value: int, config: Config) -> int:
    """Of layers that have other key/value heads than most: as many times fewer."""
    kv = config.get("num_key_value_heads") or value
    return max(1, _kv_heads(kv, config) * value // kv)


def _linear_value_heads(value: int, config: Config) -> int:
    keys = config.get("linear_num_key_heads") or value
    return min(keys, 2) * min(value // keys, 4)


def _hidden(value: int, config: Config) -> int:
    heads = config.get("num_attention_heads")
    if config.get("head_dim") or config.get("kv_lora_rank") or not heads:
        return min(value, _WIDTH)
    few = _heads(heads, config)
    return few * min(value // heads, max(8, _WIDTH // few))


def _head(value: int, config: Config) -> int:
    if (turned := config.get("qk_rope_head_dim")) is not None:
        return _turned_head(turned, config)
    # Where only a small part of these heads is turned, four pairs still are.
    narrow = _rotary_part(config) >= 0.5 or config.get("global_head_dim")
    return min(value, _HEAD if narrow else 2 * _HEAD)


def _other_head(value: int, config: Config) -> int:
    head = config.get("head_dim") or value
    return max(2, _head(head, config) * value // head)


def _turned_head(value: int, config: Config) -> int:
    return min(value, _HEAD // 2)


def _rotary_dim(value: int, config: Config) -> int:
    head = config.get("head_dim") or value
    return max(2, _head(head, config) * value // head // 2 * 2)


def _dense_width(value: int, config: Config) -> int:
    """Of an MLP, unless no other width is named: then experts have it."""
    return min(value, _WIDTH if config.get("moe_intermediate_size") else _EXPERT_WIDTH)


def _expert_width(value: int, config: Config) -> int:
    return min(value, _WIDTH if value == config.get("intermediate_size") else _EXPERT_WIDTH)


def _experts(value: int, config: Config) -> int:
    groups = _groups(config.get("n_group") or 1, config)
    return min(value, _GROUP * groups if groups > 1 else _EXPERTS)


def _groups(value: int, config: Config) -> int:
    return min(value, _GROUPS)


def _kept_groups(value: int, config: Config) -> int:
    groups = config.get("n_group") or 1
    return max(min(value, 2), _groups(groups, config) * value // groups)


def _original_length(value: int, config: Config) -> int:
    return min(value, 32 if (config.get("max_position_embeddings") or value) >= 4 * value else 128)


def _longest(value: int, config: Config) -> int:
    ropes = _ropes(config)
    original = next((r[name] for r in ropes for name in _ORIGINAL if r.get(name)), None)
    if original is not None:
        return min(value, _LONGEST, _original_length(original, config) * value // original)
    # A dynamic rope grows past this length, which prompts are to reach.
    dynamic = any("dynamic" in (r.get("type"), r.get("rope_type")) for r in ropes)
    return min(value, 64 if dynamic else _CONTEXT)


def _ropes(config: Config) -> list[Config]:
    """The config and the rope objects in it, those of single layer types too."""
    found = [config]
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name)
        if isinstance(rope, Mapping):
            found += [rope, *(inner for inner in rope.values() if isinstance(inner, Mapping))]
    return found


def _rotary_part(config: Config) -> float:
    return min((r["partial_rotary_factor"] for r in _ropes(config) if r.get("partial_rotary_factor")), default=1.0)


def _pairs(config: Config) -> int:
    """Pairs of values of a small head that are turned."""
    heads = config.get("num_attention_heads") or 1
    width = config.get("head_dim") or config.get("hidden_size", _WIDTH) // heads
    small = _head(width, config) if config.get("head_dim") else _hidden(width * heads, config) // _heads(heads, config)
    return int(small * _rotary_part(config)) // 2


def _spread(values: Sequence[Any], config: Config) -> list[Any]:
    """Values for fewer pairs, from all along the list."""
    pairs = min(_pairs(config), len(values))
    return [values[place * len(values) // pairs] for place in range(pairs)]


def _block(values: Sequence[int], config: Config) -> list[int]:
    return [min(value, _EXPERT_WIDTH) for value in values]


def _sections(values: Sequence[int], config: Config) -> list[int]:
    pairs = _pairs(config)
    return [pairs // len(values) + (place < pairs % len(values)) for place in range(len(values))]


_ORIGINAL = ("original_max_position_embeddings", "initial_context_length")

_RULES: Mapping[str, Callable[[int, Config], int]] = {
    "vocab_size": _at_most(_VOCABULARY),
    "vocab_size_per_layer_input": _at_most(_VOCABULARY),
    "hidden_size": _hidden,
    "intermediate_size": _dense_width,
    "intermediate_size_mlp": _at_most(_WIDTH + 32),
    "moe_intermediate_size": _expert_width,
    "shared_expert_intermediate_size": _at_most(_EXPERT_WIDTH + 16),
    "shared_intermediate_size": _at_most(_EXPERT_WIDTH + 16),
    "num_attention_heads": _heads,
    "num_key_value_heads": _kv_heads,
    "num_global_key_value_heads": _other_kv_heads,
    "head_dim": _head,
    "attention_head_dim": _head,
    "global_head_dim": _other_head,
    "rotary_dim": _rotary_dim,
    "q_lora_rank": _at_most(24),
    "kv_lora_rank": _at_most(_HEAD),
    "qk_nope_head_dim": _at_most(_HEAD),
    "qk_rope_head_dim": _turned_head,
    "v_head_dim": _at_most(_HEAD),
    "linear_num_key_heads": _at_most(2),
    "linear_num_value_heads": _linear_value_heads,
    "linear_key_head_dim": _at_most(_HEAD),
    "linear_value_head_dim": _at_most(_HEAD),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _experts),
    **dict.fromkeys(
        ("num_experts_per_tok", "experts_per_token", "moe_k", "moe_topk", "top_k_experts"), _at_most(_CHOSEN)
    ),
    "n_group": _groups,
    "topk_group": _kept_groups,
    "sliding_window": _at_most(_WINDOW),
    "attention_chunk_size": _at_most(_WINDOW),
    "floor_scale": _at_most(_WINDOW),
    "max_position_embeddings": _longest,
    **dict.fromkeys(_ORIGINAL, _original_length),
}

_LISTS: Mapping[str, Callable[[Sequence[Any], Config], list[Any]]] = {
    "long_factor": _spread,
    "short_factor": _spread,
    "mrope_section": _sections,
    "weight_block_size": _block,
}
