"""Qwen2-MoE: a gated shared expert beside the routed ones, dense layers, windows in alternate layers."""

from collections.abc import Mapping
from typing import Any

from moejax.config import ModelConfig
from moejax.errors import MoejaxError
from moejax.families.decoder import (
    Defaults,
    decoder_layers,
    read_activation,
    read_attention,
    read_decoder,
    read_layer_types,
)
from moejax.families.family import DEFAULT_NAMES, Family
from moejax.families.fields import Fields
from moejax.families.qwen_moe import read_moe

_DEFAULTS = Defaults(
    vocab_size=151_936,
    hidden_size=2048,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=16,
    max_position_embeddings=32_768,
    rms_norm_eps=1e-6,
)


def to_config(raw: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(raw)
    attention = read_attention(fields, _DEFAULTS, qkv_bias=fields.flag("qkv_bias", True))
    decoder = read_decoder(fields, _DEFAULTS)
    num_layers = fields.integer("num_hidden_layers", _DEFAULTS.num_hidden_layers)
    moe = read_moe(
        fields,
        num_layers,
        hidden_size=decoder["hidden_size"],
        num_experts=fields.integer("num_experts", 60, minimum=0),
        intermediate_size=1408,
        num_experts_per_tok=4,
        shared_intermediate_size=fields.integer("shared_expert_intermediate_size", 5632),
        shared_gate=True,
    )
    layers = decoder_layers(attention, _windows(fields, num_layers), moe, fields.integer("intermediate_size", 5632))
    return ModelConfig(model_type="qwen2_moe", layers=layers, activation=read_activation(fields), **decoder)


def _windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Layer types as listed, or else windows in the even layers below `max_window_layers`."""
    listed = read_layer_types(fields, num_layers)
    limit = fields.integer("max_window_layers", 28, minimum=0)
    if not fields.flag("use_sliding_window", False):
        if listed is not None and any(listed):
            raise MoejaxError("config field layer_types lists sliding_attention but use_sliding_window is false")
        return (None,) * num_layers
    window = fields.integer("sliding_window", 4096)
    windowed = listed or tuple(layer % 2 == 0 and layer < limit for layer in range(num_layers))
    return tuple(window if layer else None for layer in windowed)


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    to_config=to_config,
    names=DEFAULT_NAMES,
    fields=frozenset(
        "num_experts qkv_bias use_sliding_window sliding_window max_window_layers decoder_sparse_step mlp_only_layers "
        "moe_intermediate_size shared_expert_intermediate_size norm_topk_prob".split()
    ),
)
