"""OLMoE: every layer a mixture of experts, query and key normalised over all heads at once, optional clipping."""

from collections.abc import Mapping
from typing import Any

from moejax.config import ModelConfig, MoEConfig, RouterConfig
from moejax.errors import MoejaxError
from moejax.families.decoder import (
    Defaults,
    decoder_layers,
    no_windows,
    read_activation,
    read_attention,
    read_decoder,
)
from moejax.families.family import DEFAULT_NAMES, Family
from moejax.families.fields import Fields

_DEFAULTS = Defaults(
    vocab_size=50_304,
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=None,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    eos_token_id=50_279,
)


def to_config(raw: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(raw)
    bias = fields.flag("attention_bias", False)
    attention = read_attention(
        fields,
        _DEFAULTS,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="full",
        clip_qkv=fields.optional_number("clip_qkv"),
    )
    decoder = read_decoder(fields, _DEFAULTS)
    if attention.num_heads * attention.head_dim != decoder["hidden_size"]:
        raise MoejaxError(
            f"num_attention_heads={attention.num_heads} times head_dim={attention.head_dim} must be "
            f"hidden_size={decoder['hidden_size']}: OLMoE's query norm is that wide"
        )
    num_layers = fields.integer("num_hidden_layers", _DEFAULTS.num_hidden_layers)
    # Where both names stand, transformers lets the alias `num_local_experts` win.
    experts = "num_local_experts" if "num_local_experts" in raw else "num_experts"
    moe = MoEConfig(
        hidden_size=decoder["hidden_size"],
        intermediate_size=fields.integer("intermediate_size", 2048),
        num_experts=fields.integer(experts, 64),
        num_experts_per_tok=fields.integer("num_experts_per_tok", 8),
        activation=read_activation(fields),
        router=RouterConfig(renormalise=fields.flag("norm_topk_prob", False)),
    )
    layers = decoder_layers(attention, no_windows(fields, num_layers), [moe] * num_layers)
    return ModelConfig(model_type="olmoe", layers=layers, **decoder)


OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    to_config=to_config,
    names=DEFAULT_NAMES,
    fields=frozenset(
        {"num_experts", "num_local_experts", "attention_bias", "clip_qkv", "norm_topk_prob", "sliding_window"}
    ),
)
