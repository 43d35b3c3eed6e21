"""DeepSeek-V3, R1 and Kimi-K2: latent attention, experts in groups chosen by corrected sigmoids."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from moejax.config import LayerConfig, ModelConfig
from moejax.families.decoder import Defaults, read_activation, read_decoder
from moejax.families.deepseek_moe import (
    DEEPSEEK_FIELDS,
    DEEPSEEK_NAMES,
    ORIGINAL_FIELDS,
    MoEDefaults,
    further_layers,
    read_moe,
    refuse_unread,
    sigmoid_router,
)
from moejax.families.family import Family
from moejax.families.fields import Fields
from moejax.families.latent_attention import LATENT_ATTENTION_FIELDS, read_latent_attention

_DEFAULTS = Defaults(
    vocab_size=129_280,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    num_key_value_heads=None,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    bos_token_id=0,
    eos_token_id=1,
)
_EXPERTS = MoEDefaults(n_routed_experts=256, num_experts_per_tok=8, moe_intermediate_size=2048, first_k_dense_replace=3)


def to_config(raw: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(raw)
    decoder = read_decoder(fields, _DEFAULTS)
    attention = read_latent_attention(fields, _DEFAULTS, interleaved=fields.flag("rope_interleave", True))
    if "head_dim" in raw and raw["head_dim"] != attention.rope.dim:
        raise fields.error("head_dim", f"must be qk_rope_head_dim={attention.rope.dim}: transformers turns that many")
    num_layers = fields.integer("num_hidden_layers", _DEFAULTS.num_hidden_layers)
    refuse_unread(fields, scoring="sigmoid", method="noaux_tc")
    router = sigmoid_router(fields, groups=8, kept_groups=4, scale=2.5)
    moe = read_moe(fields, num_layers, _EXPERTS, router, decoder["hidden_size"])
    dense = fields.integer("intermediate_size", 18_432)
    layers = tuple(LayerConfig(attention, experts, 0 if experts else dense) for experts in moe)
    return ModelConfig(model_type="deepseek_v3", layers=layers, activation=read_activation(fields), **decoder)


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    to_config=to_config,
    names=DEEPSEEK_NAMES,
    fields=DEEPSEEK_FIELDS | LATENT_ATTENTION_FIELDS | ORIGINAL_FIELDS | {"rope_interleave"},
    aliases=("kimi_k2",),
    left_out=partial(further_layers, num_layers=_DEFAULTS.num_hidden_layers),
)
