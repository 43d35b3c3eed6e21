"""PhiMoE: two experts by sparsemixer, LayerNorm and biases throughout, a long rope whose scale follows the length."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moejax.config import ModelConfig, MoEConfig, NormConfig, RopeConfig, RouterConfig
from moejax.families.decoder import (
    Defaults,
    decoder_layers,
    read_activation,
    read_attention,
    read_decoder,
    uniform_windows,
)
from moejax.families.family import Family
from moejax.families.fields import Fields
from moejax.families.mixtral import MIXTRAL
from moejax.families.rope_parameters import rope_fields

_DEFAULTS = Defaults(
    vocab_size=32_064,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-5,
    rope_theta=1_000_000.0,
    bos_token_id=1,
    eos_token_id=2,
)


def to_config(raw: Mapping[str, Any]) -> ModelConfig:
    # Unlike elsewhere, the top-level context of pretraining has no say: transformers reads the one in the rope object.
    fields = Fields({name: value for name, value in raw.items() if name != "original_max_position_embeddings"})
    bias = fields.flag("attention_bias", False)
    attention = read_attention(fields, _DEFAULTS, qkv_bias=bias, out_bias=bias)
    assert attention.rope is not None
    attention = replace(attention, rope=_rope(rope_fields(fields), attention.rope))
    decoder = read_decoder(fields, _DEFAULTS)
    num_layers = fields.integer("num_hidden_layers", _DEFAULTS.num_hidden_layers)
    if fields.integer("num_experts_per_tok", 2) != 2:
        raise fields.error("num_experts_per_tok", "is not supported for phimoe, whose router always chooses 2")
    jitter = 0.0 if raw.get("router_jitter_noise") == 0 else fields.number("router_jitter_noise", 0.01)
    moe = MoEConfig(
        hidden_size=decoder["hidden_size"],
        intermediate_size=fields.integer("intermediate_size", 6400),
        num_experts=fields.integer("num_local_experts", 16),
        num_experts_per_tok=2,
        activation=read_activation(fields),
        router=RouterConfig(score="sparsemixer", jitter=jitter),
    )
    windows = uniform_windows(fields, fields.optional_integer("sliding_window"), num_layers)
    return ModelConfig(
        model_type="phimoe",
        layers=decoder_layers(attention, windows, [moe] * num_layers),
        head_bias=fields.flag("lm_head_bias", False),
        **decoder | {"norm": NormConfig(decoder["norm"].eps, "layer")},
    )


def _rope(scaling: Fields, rope: RopeConfig) -> RopeConfig:
    """As transformers turns: with the short factors in sequences of any length, and a scale of each length's own."""
    if rope.kind == "default":
        return rope
    if rope.kind != "longrope":
        raise scaling.error("rope_type", f"is read as {rope.kind}, which is not supported for phimoe; longrope is")
    mscales = scaling.number("short_mscale"), scaling.number("long_mscale")
    return replace(rope, long_factors=rope.short_factors, mscales=mscales, recomputes=True)


PHIMOE = Family(
    model_type="phimoe",
    architecture="PhimoeForCausalLM",
    to_config=to_config,
    names={**MIXTRAL.names, "lm_head_bias": "lm_head.bias"},
    fields=frozenset(
        "num_local_experts attention_bias lm_head_bias sliding_window router_jitter_noise input_jitter_noise "
        "hidden_dropout".split()
    ),
)
