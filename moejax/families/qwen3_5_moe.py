"""Qwen3.5-MoE's text model: gated DeltaNet whose input has a projection for each part, every layer sparse."""

from collections.abc import Mapping
from typing import Any

from moejax.config import LayerConfig, ModelConfig, MoEConfig
from moejax.families.decoder import Defaults, read_activation
from moejax.families.family import Family, Wrapper
from moejax.families.fields import Fields
from moejax.families.gated_delta import (
    FIELDS,
    NAMES,
    left_out,
    projection_names,
    read_mixers,
    read_zero_centred_decoder,
)

_DEFAULTS = Defaults(
    vocab_size=248_320,
    hidden_size=2048,
    num_hidden_layers=40,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=256,
    max_position_embeddings=32_768,
    rms_norm_eps=1e-6,
)


def to_config(raw: Mapping[str, Any]) -> ModelConfig:
    """`norm_topk_prob`, `decoder_sparse_step` and `mlp_only_layers`, which Qwen3-Next reads, have no meaning here."""
    fields = Fields(raw)
    decoder = read_zero_centred_decoder(fields, _DEFAULTS)
    moe = MoEConfig(
        hidden_size=decoder["hidden_size"],
        intermediate_size=fields.integer("moe_intermediate_size", 512),
        num_experts=fields.integer("num_experts", 256),
        num_experts_per_tok=fields.integer("num_experts_per_tok", 8),
        activation=read_activation(fields),
        shared_intermediate_size=fields.integer("shared_expert_intermediate_size", 512),
        shared_gate=True,
    )
    layers = tuple(LayerConfig(mixer, moe) for mixer in read_mixers(fields, _DEFAULTS))
    return ModelConfig(model_type="qwen3_5_moe_text", layers=layers, **decoder)


QWEN3_5_MOE = Family(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    to_config=to_config,
    names={**NAMES, **projection_names("qkv", "z", "b", "a")},
    fields=FIELDS,
    wrapper=Wrapper("qwen3_5_moe", (("model.language_model.", "model."), ("lm_head.", "lm_head."))),
    left_out=left_out,
)
