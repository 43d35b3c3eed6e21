"""GPT-OSS: attention sinks, windows in every second layer, experts with biases and a clamped SwiGLU."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moejax.checkpoint.expert_entries import ExpertTensors
from moejax.config import ClampedSwiGLU, ModelConfig, MoEConfig, RouterConfig
from moejax.families.decoder import Defaults, decoder_layers, read_attention, read_decoder, read_layer_types
from moejax.families.family import DEFAULT_NAMES, Family
from moejax.families.fields import Fields

_DEFAULTS = Defaults(
    vocab_size=201_088,
    hidden_size=2880,
    num_hidden_layers=36,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-5,
    rope_theta=150_000.0,
)

# What transformers takes where a config says nothing of its rope.
_ROPE = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}


def to_config(raw: Mapping[str, Any]) -> ModelConfig:
    if raw.get("rope_scaling") is None and raw.get("rope_parameters") is None:
        raw = {**raw, "rope_scaling": _ROPE}
    fields = Fields(raw)
    decoder = read_decoder(fields, _DEFAULTS)
    bias = fields.flag("attention_bias", True)
    attention = read_attention(fields, _DEFAULTS, qkv_bias=bias, out_bias=bias, sinks=True)
    num_layers = fields.integer("num_hidden_layers", _DEFAULTS.num_hidden_layers)
    windowed = read_layer_types(fields, num_layers) or tuple(layer % 2 == 0 for layer in range(num_layers))
    window = fields.integer("sliding_window", 128) if any(windowed) else None
    # Where both names stand, transformers lets the alias `num_experts` win.
    experts = "num_experts" if "num_experts" in raw else "num_local_experts"
    moe = MoEConfig(
        hidden_size=decoder["hidden_size"],
        intermediate_size=fields.integer("intermediate_size", 2880),
        num_experts=fields.integer(experts, 128),
        num_experts_per_tok=fields.integer("num_experts_per_tok", 4),
        activation=ClampedSwiGLU(fields.number("swiglu_alpha", 1.702), fields.number("swiglu_limit", 7.0)),
        router=RouterConfig(score="none", bias=True, weigh="softmax", renormalise=False),
        bias=True,
    )
    windows = [window if layer else None for layer in windowed]
    decoder["norm"] = replace(decoder["norm"], kind="rms_wide")
    return ModelConfig(model_type="gpt_oss", layers=decoder_layers(attention, windows, [moe] * num_layers), **decoder)


_MLP = "model.layers.{l}.mlp."

GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    to_config=to_config,
    names={
        **DEFAULT_NAMES,
        "layers.{l}.attention.sinks": "model.layers.{l}.self_attn.sinks",
        "layers.{l}.moe.router": _MLP + "router.weight",
        "layers.{l}.moe.router_bias": _MLP + "router.bias",
        "layers.{l}.moe.gate_up": _MLP + "experts.gate_up_proj",
        "layers.{l}.moe.gate_up_bias": _MLP + "experts.gate_up_proj_bias",
        "layers.{l}.moe.down": _MLP + "experts.down_proj",
        "layers.{l}.moe.down_bias": _MLP + "experts.down_proj_bias",
    },
    experts=ExpertTensors(stacked=True, inputs_first=True, interleaved=True),
    fields=frozenset(
        "num_local_experts num_experts sliding_window attention_bias swiglu_alpha swiglu_limit "
        "experts_per_token initial_context_length".split()
    ),
)
