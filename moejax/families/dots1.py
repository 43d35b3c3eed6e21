"""dots.llm1: DeepSeek-V3's experts, query and key normalised per head, windows in the layers from some one on."""

from collections.abc import Mapping
from typing import Any

from moejax.config import ModelConfig
from moejax.families.decoder import (
    Defaults,
    decoder_layers,
    read_activation,
    read_attention,
    read_decoder,
    read_layer_types,
)
from moejax.families.deepseek_moe import DEEPSEEK_FIELDS, DEEPSEEK_NAMES, MoEDefaults, read_moe, sigmoid_router
from moejax.families.family import Family
from moejax.families.fields import Fields

_DEFAULTS = Defaults(
    vocab_size=152_064,
    hidden_size=4608,
    num_hidden_layers=62,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
)


def to_config(raw: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(raw)
    bias = fields.flag("attention_bias", False)
    attention = read_attention(fields, _DEFAULTS, qkv_bias=bias, out_bias=bias, qk_norm="head")
    decoder = read_decoder(fields, _DEFAULTS)
    num_layers = fields.integer("num_hidden_layers", _DEFAULTS.num_hidden_layers)
    router = sigmoid_router(fields, renormalise=False)
    moe = read_moe(fields, num_layers, MoEDefaults(), router, decoder["hidden_size"])
    windows = _windows(fields, num_layers)
    layers = decoder_layers(attention, windows, moe, fields.integer("intermediate_size", 10_944))
    return ModelConfig(model_type="dots1", layers=layers, activation=read_activation(fields), **decoder)


def _windows(fields: Fields, num_layers: int) -> list[int | None]:
    """Layer types as listed, or else windows in the layers from `max_window_layers` on."""
    window = fields.optional_integer("sliding_window", 4096)
    first = fields.integer("max_window_layers", 62, minimum=0)
    listed = read_layer_types(fields, num_layers)
    if listed is None:
        listed = tuple(layer >= first for layer in range(num_layers))
    elif any(listed) and window is None:
        raise fields.error("sliding_window", "leaves no window for layer_types' sliding_attention; give it one")
    return [window if layer else None for layer in listed]


DOTS1 = Family(
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    to_config=to_config,
    names=DEEPSEEK_NAMES,
    fields=DEEPSEEK_FIELDS
    | {
        *("attention_bias", "sliding_window", "max_window_layers"),
        # Published, and read by nothing: every layer behind the dense ones is sparse, all scores are sigmoids.
        *("moe_layer_freq", "scoring_func", "use_sliding_window"),
    },
)
