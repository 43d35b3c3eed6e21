"""DeepSeek-V2: latent attention, experts in groups chosen by a softmax whose weights are not renormalised."""

from collections.abc import Mapping
from typing import Any

from moejax.config import LayerConfig, ModelConfig, RouterConfig
from moejax.families.decoder import Defaults, read_activation, read_decoder
from moejax.families.deepseek_moe import (
    DEEPSEEK_FIELDS,
    DEEPSEEK_NAMES,
    ORIGINAL_FIELDS,
    MoEDefaults,
    read_moe,
    refuse_unread,
)
from moejax.families.family import Family
from moejax.families.fields import Fields
from moejax.families.latent_attention import LATENT_ATTENTION_FIELDS, read_latent_attention

_DEFAULTS = Defaults(
    vocab_size=102_400,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=None,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    bos_token_id=1,
    eos_token_id=2,
)
_EXPERTS = MoEDefaults(n_routed_experts=64, n_shared_experts=2, moe_intermediate_size=1407, alias="num_experts")


def to_config(raw: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(raw)
    decoder = read_decoder(fields, _DEFAULTS)
    attention = read_latent_attention(fields, _DEFAULTS, interleaved=True)
    num_layers = fields.integer("num_hidden_layers", _DEFAULTS.num_hidden_layers)
    moe = read_moe(fields, num_layers, _EXPERTS, _router(fields), decoder["hidden_size"])
    dense = fields.integer("intermediate_size", 11_008)
    layers = tuple(LayerConfig(attention, experts, 0 if experts else dense) for experts in moe)
    return ModelConfig(model_type="deepseek_v2", layers=layers, activation=read_activation(fields), **decoder)


def _router(fields: Fields) -> RouterConfig:
    """Groups compete by their best expert. `norm_topk_prob` has no effect in transformers."""
    refuse_unread(fields, scoring="softmax")
    method = fields.raw.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise fields.error("topk_method", "is not supported; greedy and group_limited_greedy are")
    limited = method == "group_limited_greedy"
    return RouterConfig(
        groups=fields.integer("n_group", 0) if limited else 1,
        kept_groups=fields.integer("topk_group", 0) if limited else 1,
        renormalise=False,
        scale=fields.number("routed_scaling_factor", 1.0),
    )


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    to_config=to_config,
    names=DEEPSEEK_NAMES,
    fields=DEEPSEEK_FIELDS | LATENT_ATTENTION_FIELDS | ORIGINAL_FIELDS | {"num_experts"},
)
