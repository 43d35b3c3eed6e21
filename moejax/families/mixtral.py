"""Mixtral: every layer a mixture of experts, one sliding window for all layers or none."""

from collections.abc import Mapping
from typing import Any

from moejax.config import ModelConfig, MoEConfig
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

_DEFAULTS = Defaults(
    vocab_size=32_000,
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
    fields = Fields(raw)
    decoder = read_decoder(fields, _DEFAULTS)
    num_layers = fields.integer("num_hidden_layers", _DEFAULTS.num_hidden_layers)
    # Where both names stand, transformers lets the alias `num_experts` win.
    experts = "num_experts" if "num_experts" in raw else "num_local_experts"
    moe = MoEConfig(
        hidden_size=decoder["hidden_size"],
        intermediate_size=fields.integer("intermediate_size", 14_336),
        num_experts=fields.integer(experts, 8),
        num_experts_per_tok=fields.integer("num_experts_per_tok", 2),
        activation=read_activation(fields),
    )
    windows = uniform_windows(fields, fields.optional_integer("sliding_window"), num_layers)
    layers = decoder_layers(read_attention(fields, _DEFAULTS), windows, [moe] * num_layers)
    return ModelConfig(model_type="mixtral", layers=layers, **decoder)


_MOE = "model.layers.{l}.block_sparse_moe."

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    to_config=to_config,
    names={
        **DEFAULT_NAMES,
        "layers.{l}.moe.router": _MOE + "gate.weight",
        "layers.{l}.moe.gate": _MOE + "experts.{e}.w1.weight",
        "layers.{l}.moe.up": _MOE + "experts.{e}.w3.weight",
        "layers.{l}.moe.down": _MOE + "experts.{e}.w2.weight",
    },
    fields=frozenset({"num_local_experts", "num_experts", "sliding_window", "router_jitter_noise"}),
)
