"""Granite-MoE: scaled embeddings, branches, attention and logits; with `granitemoeshared` a shared expert too."""

from collections.abc import Mapping
from typing import Any

from moejax.checkpoint.expert_entries import ExpertTensors
from moejax.config import ModelConfig, MoEConfig, RouterConfig
from moejax.families.decoder import Defaults, decoder_layers, no_windows, read_activation, read_attention, read_decoder
from moejax.families.family import DEFAULT_NAMES, Family
from moejax.families.fields import Fields

_DEFAULTS = Defaults(
    vocab_size=32_000,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=None,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    bos_token_id=1,
    eos_token_id=2,
)


def to_config(raw: Mapping[str, Any]) -> ModelConfig:
    return _config(Fields(raw), "granitemoe", shared=0)


def to_shared_config(raw: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(raw)
    return _config(fields, "granitemoeshared", fields.integer("shared_intermediate_size", 0, minimum=0))


def _config(fields: Fields, model_type: str, shared: int) -> ModelConfig:
    bias = fields.flag("attention_bias", False)
    # The multiplier is the scale of the scores itself; 1 / sqrt(head_dim) has no part in it.
    scale = fields.number("attention_multiplier", 1.0)
    attention = read_attention(fields, _DEFAULTS, qkv_bias=bias, out_bias=bias, scale=scale)
    decoder = read_decoder(fields, _DEFAULTS)
    num_layers = fields.integer("num_hidden_layers", _DEFAULTS.num_hidden_layers)
    moe = MoEConfig(
        hidden_size=decoder["hidden_size"],
        intermediate_size=fields.integer("intermediate_size", 11_008),
        num_experts=fields.integer("num_local_experts", 8),
        num_experts_per_tok=fields.integer("num_experts_per_tok", 2),
        activation=read_activation(fields),
        router=RouterConfig(score="none", weigh="softmax", renormalise=False),
        shared_intermediate_size=shared,
    )
    return ModelConfig(
        model_type=model_type,
        layers=decoder_layers(attention, no_windows(fields, num_layers), [moe] * num_layers),
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        logits_scale=1 / fields.number("logits_scaling", 1.0),
        **decoder,
    )


_LAYER = "model.layers.{l}."
_NAMES = {
    **DEFAULT_NAMES,
    "layers.{l}.moe.router": _LAYER + "block_sparse_moe.router.layer.weight",
    "layers.{l}.moe.gate_up": _LAYER + "block_sparse_moe.input_linear.weight",
    "layers.{l}.moe.down": _LAYER + "block_sparse_moe.output_linear.weight",
    "layers.{l}.moe.shared.gate_up": _LAYER + "shared_mlp.input_linear.weight",
    "layers.{l}.moe.shared.down": _LAYER + "shared_mlp.output_linear.weight",
}
_FIELDS = frozenset(
    "num_local_experts attention_bias attention_multiplier embedding_multiplier residual_multiplier logits_scaling "
    "sliding_window".split()
)

GRANITEMOE = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    to_config=to_config,
    names=_NAMES,
    fields=_FIELDS,
    experts=ExpertTensors(stacked=True),
)
GRANITEMOESHARED = Family(
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    to_config=to_shared_config,
    names=_NAMES,
    fields=_FIELDS | {"shared_intermediate_size"},
    experts=ExpertTensors(stacked=True),
)
