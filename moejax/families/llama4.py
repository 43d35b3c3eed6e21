"""Llama 4's text model: chunked layers with rope, full layers without, and experts whose input the router scales."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moejax.checkpoint.expert_entries import ExpertTensors
from moejax.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, RouterConfig
from moejax.families.decoder import Defaults, read_activation, read_attention, read_decoder, read_layer_types
from moejax.families.family import DEFAULT_NAMES, Family, Wrapper
from moejax.families.fields import Fields

_DEFAULTS = Defaults(
    vocab_size=202_048,
    hidden_size=5120,
    num_hidden_layers=48,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-5,
    rope_theta=500_000.0,
    bos_token_id=1,
    eos_token_id=2,
)


def to_config(raw: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(raw)
    decoder = read_decoder(fields, _DEFAULTS, honours=("attention_chunk_size",))
    mixers, activation = _mixers(fields), read_activation(fields)
    width = fields.integer("intermediate_size", 8192)
    moe = MoEConfig(
        hidden_size=decoder["hidden_size"],
        intermediate_size=width,
        num_experts=fields.integer("num_local_experts", 16),
        num_experts_per_tok=fields.integer("num_experts_per_tok", 1),
        activation=activation,
        router=RouterConfig(score="none", weigh="sigmoid", renormalise=False),
        shared_intermediate_size=width,
        scales_input=True,
    )
    dense = fields.integer("intermediate_size_mlp", 16_384)
    step = fields.integer("interleave_moe_layer_step", 1)
    sparse = range(step - 1, len(mixers), step) if raw.get("moe_layers") is None else fields.integers("moe_layers")
    layers = tuple(
        LayerConfig(mixer, moe) if index in sparse else LayerConfig(mixer, dense_intermediate_size=dense)
        for index, mixer in enumerate(mixers)
    )
    return ModelConfig(model_type="llama4_text", layers=layers, activation=activation, **decoder)


def _mixers(fields: Fields) -> list[AttentionConfig]:
    """Attention of each layer: turned and normed where `no_rope_layers` has a 1, tempered where it has a 0."""
    bias = fields.flag("attention_bias", False)
    attention = read_attention(fields, _DEFAULTS, qkv_bias=bias, out_bias=bias)
    assert attention.rope is not None
    turned = replace(attention, rope=replace(attention.rope, interleaved=True), norm_after_rope=True)
    if fields.flag("use_qk_norm", True):
        turned = replace(turned, qk_norm="unit")
    still = replace(attention, rope=None)
    if fields.flag("attn_temperature_tuning", True):
        still = replace(still, temperature=(fields.number("floor_scale", 8192), fields.number("attn_scale", 0.1)))
    num_layers = fields.integer("num_hidden_layers", _DEFAULTS.num_hidden_layers)
    interval = fields.integer("no_rope_layer_interval", 4)
    rope = fields.integers("no_rope_layers") or tuple(int((i + 1) % interval != 0) for i in range(num_layers))
    if len(rope) < num_layers:
        raise fields.error("no_rope_layers", f"must have a value for each of {num_layers} layers")
    chunk = fields.integer("attention_chunk_size", 8192)
    chunked = read_layer_types(fields, num_layers, "chunked_attention") or tuple(map(bool, rope[:num_layers]))
    return [
        replace(turned if rope[index] else still, chunk=chunk if chunked[index] else None)
        for index in range(num_layers)
    ]


_MLP = "model.layers.{l}.feed_forward."

LLAMA4 = Family(
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    to_config=to_config,
    names={
        **DEFAULT_NAMES,
        "layers.{l}.moe.router": _MLP + "router.weight",
        "layers.{l}.moe.gate_up": _MLP + "experts.gate_up_proj",
        "layers.{l}.moe.down": _MLP + "experts.down_proj",
        "layers.{l}.moe.shared.gate": _MLP + "shared_expert.gate_proj.weight",
        "layers.{l}.moe.shared.up": _MLP + "shared_expert.up_proj.weight",
        "layers.{l}.moe.shared.down": _MLP + "shared_expert.down_proj.weight",
        "layers.{l}.mlp.gate": _MLP + "gate_proj.weight",
        "layers.{l}.mlp.up": _MLP + "up_proj.weight",
        "layers.{l}.mlp.down": _MLP + "down_proj.weight",
    },
    experts=ExpertTensors(stacked=True, inputs_first=True),
    wrapper=Wrapper("llama4", (("language_model.", ""),)),
    fields=frozenset(
        "intermediate_size_mlp num_local_experts moe_layers interleave_moe_layer_step use_qk_norm no_rope_layers "
        "no_rope_layer_interval attn_temperature_tuning floor_scale attn_scale attention_bias router_jitter_noise "
        "for_llm_compressor".split()
    ),
)
