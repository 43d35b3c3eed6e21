"""Qwen3-Next: gated DeltaNet with its projections interleaved by key head, a gated shared expert, dense layers."""

from collections.abc import Mapping
from typing import Any

from moejax.config import LayerConfig, ModelConfig
from moejax.families.decoder import Defaults, read_activation
from moejax.families.family import Family
from moejax.families.fields import Fields
from moejax.families.gated_delta import (
    FIELDS,
    NAMES,
    left_out,
    projection_names,
    read_mixers,
    read_zero_centred_decoder,
)
from moejax.families.qwen_moe import read_moe

_DEFAULTS = Defaults(
    vocab_size=151_936,
    hidden_size=2048,
    num_hidden_layers=48,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=256,
    max_position_embeddings=32_768,
    rms_norm_eps=1e-6,
)


def to_config(raw: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(raw)
    decoder, mixers = read_zero_centred_decoder(fields, _DEFAULTS), read_mixers(fields, _DEFAULTS)
    moe = read_moe(
        fields,
        len(mixers),
        hidden_size=decoder["hidden_size"],
        num_experts=fields.integer("num_experts", 512, minimum=0),
        intermediate_size=512,
        num_experts_per_tok=10,
        renormalise=True,
        shared_intermediate_size=fields.integer("shared_expert_intermediate_size", 512),
        shared_gate=True,
    )
    dense = fields.integer("intermediate_size", 5632)
    layers = tuple(LayerConfig(*pair, 0 if pair[1] else dense) for pair in zip(mixers, moe, strict=True))
    return ModelConfig(model_type="qwen3_next", layers=layers, activation=read_activation(fields), **decoder)


QWEN3_NEXT = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    to_config=to_config,
    names={**NAMES, **projection_names("qkvz", "ba")},
    fields=FIELDS,
    left_out=left_out,
)
