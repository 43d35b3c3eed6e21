"""GLM-4.5: DeepSeek-V3's experts over grouped-query attention, half of each head turned."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from moejax.config import ModelConfig
from moejax.families.decoder import Defaults, decoder_layers, no_windows, read_activation, read_attention, read_decoder
from moejax.families.deepseek_moe import (
    DEEPSEEK_FIELDS,
    DEEPSEEK_NAMES,
    MoEDefaults,
    further_layers,
    read_moe,
    sigmoid_router,
)
from moejax.families.family import Family
from moejax.families.fields import Fields

_DEFAULTS = Defaults(
    vocab_size=151_552,
    hidden_size=4096,
    num_hidden_layers=46,
    num_attention_heads=96,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-5,
)
_EXPERTS = MoEDefaults(n_routed_experts=128, num_experts_per_tok=8, first_k_dense_replace=1)


def to_config(raw: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(raw)
    attention = read_attention(
        fields,
        _DEFAULTS,
        partial_rotary=0.5,
        qkv_bias=fields.flag("attention_bias", False),
        qk_norm="head" if fields.flag("use_qk_norm", False) else "none",
    )
    decoder = read_decoder(fields, _DEFAULTS)
    num_layers = fields.integer("num_hidden_layers", _DEFAULTS.num_hidden_layers)
    moe = read_moe(fields, num_layers, _EXPERTS, sigmoid_router(fields), decoder["hidden_size"])
    windows = no_windows(fields, num_layers)
    layers = decoder_layers(attention, windows, moe, fields.integer("intermediate_size", 10_944))
    return ModelConfig(model_type="glm4_moe", layers=layers, activation=read_activation(fields), **decoder)


GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    to_config=to_config,
    names=DEEPSEEK_NAMES,
    fields=DEEPSEEK_FIELDS | {"attention_bias", "use_qk_norm", "sliding_window"},
    left_out=partial(further_layers, num_layers=_DEFAULTS.num_hidden_layers),
)
