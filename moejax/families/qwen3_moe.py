"""Qwen3-MoE: query and key normalised per head, dense layers, one sliding window for all layers or none."""

from collections.abc import Mapping
from typing import Any

from moejax.config import ModelConfig
from moejax.families.decoder import (
    Defaults,
    decoder_layers,
    read_activation,
    read_attention,
    read_decoder,
    uniform_windows,
)
from moejax.families.family import DEFAULT_NAMES, Family
from moejax.families.fields import Fields
from moejax.families.qwen_moe import read_moe

_DEFAULTS = Defaults(
    vocab_size=151_936,
    hidden_size=2048,
    num_hidden_layers=24,
    num_attention_heads=32,
    num_key_value_heads=4,
    max_position_embeddings=32_768,
    rms_norm_eps=1e-6,
)


def to_config(raw: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(raw)
    bias = fields.flag("attention_bias", False)
    attention = read_attention(fields, _DEFAULTS, qkv_bias=bias, out_bias=bias, qk_norm="head")
    decoder = read_decoder(fields, _DEFAULTS)
    num_layers = fields.integer("num_hidden_layers", _DEFAULTS.num_hidden_layers)
    # The hub's configs say `num_experts`, those that transformers 5 writes `num_local_experts`, which wins over it.
    experts = "num_local_experts" if "num_local_experts" in raw else "num_experts"
    moe = read_moe(
        fields,
        num_layers,
        hidden_size=decoder["hidden_size"],
        num_experts=fields.integer(experts, 128, minimum=0),
        intermediate_size=768,
        num_experts_per_tok=8,
    )
    windowed = fields.flag("use_sliding_window", False)
    window = fields.optional_integer("sliding_window", 4096) if windowed else None
    windows = uniform_windows(fields, window, num_layers)
    layers = decoder_layers(attention, windows, moe, fields.integer("intermediate_size", 6144))
    return ModelConfig(model_type="qwen3_moe", layers=layers, activation=read_activation(fields), **decoder)


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    to_config=to_config,
    names=DEFAULT_NAMES,
    fields=frozenset(
        "num_experts num_local_experts attention_bias use_sliding_window sliding_window decoder_sparse_step "
        "mlp_only_layers moe_intermediate_size norm_topk_prob max_window_layers".split()
    ),
)
