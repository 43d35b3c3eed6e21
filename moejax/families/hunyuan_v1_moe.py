"""Hunyuan-v1-MoE: heads turned before they are normalised, an ungated shared expert, experts a token by layer."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moejax.config import AttentionConfig, ModelConfig, MoEConfig
from moejax.errors import MoejaxError
from moejax.families.decoder import Defaults, decoder_layers, no_windows, read_activation, read_attention, read_decoder
from moejax.families.family import DEFAULT_NAMES, Family
from moejax.families.fields import Fields
from moejax.families.rope_parameters import rope_fields

_DEFAULTS = Defaults(
    vocab_size=290_943,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=None,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
)


def to_config(raw: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(raw)
    bias = fields.flag("attention_bias", False)
    attention = read_attention(fields, _DEFAULTS, qkv_bias=bias, out_bias=bias, qk_norm="head", norm_after_rope=True)
    decoder = read_decoder(fields, _DEFAULTS)
    num_layers = fields.integer("num_hidden_layers", _DEFAULTS.num_hidden_layers)
    # Where both names stand, transformers lets the aliases `num_local_experts` and `num_experts_per_tok` win.
    experts = "num_local_experts" if "num_local_experts" in raw else "num_experts"
    moe = MoEConfig(
        hidden_size=decoder["hidden_size"],
        intermediate_size=fields.integer("intermediate_size", 11_008),
        num_experts=fields.integer(experts, 1),
        num_experts_per_tok=1,
        activation=read_activation(fields),
        shared_intermediate_size=fields.integer("intermediate_size", 11_008),
    )
    layers = [replace(moe, num_experts_per_tok=count) for count in _experts_per_tok(fields, num_layers)]
    return ModelConfig(
        model_type="hunyuan_v1_moe",
        layers=decoder_layers(_with_alpha(fields, attention), no_windows(fields, num_layers), layers),
        **decoder,
    )


def _experts_per_tok(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """One number for all layers, or a list with one for each."""
    name = "num_experts_per_tok" if "num_experts_per_tok" in fields.raw else "moe_topk"
    if not isinstance(fields.raw.get(name), list):
        return (fields.integer(name, 1),) * num_layers
    counts = fields.integers(name)
    if len(counts) < num_layers:
        raise MoejaxError(f"config field {name} has {len(counts)} numbers but num_hidden_layers={num_layers}")
    return counts[:num_layers]


def _with_alpha(fields: Fields, attention: AttentionConfig) -> AttentionConfig:
    """Rope of the kind "dynamic" with an `alpha` is not dynamic: it has a larger base, whatever the length."""
    rope, alpha = attention.rope, rope_fields(fields).optional_number("alpha")
    if rope is None or rope.kind != "dynamic" or alpha is None:
        return attention
    theta = rope.theta * alpha ** (rope.dim / (rope.dim - 2))
    return replace(attention, rope=replace(rope, kind="default", theta=theta, factor=1.0))


_LAYER = "model.layers.{l}."

HUNYUAN_V1_MOE = Family(
    model_type="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    to_config=to_config,
    names={
        **DEFAULT_NAMES,
        "layers.{l}.attention.q_norm": _LAYER + "self_attn.query_layernorm.weight",
        "layers.{l}.attention.k_norm": _LAYER + "self_attn.key_layernorm.weight",
        "layers.{l}.moe.router": _LAYER + "mlp.gate.wg.weight",
        "layers.{l}.moe.shared.gate": _LAYER + "mlp.shared_mlp.gate_proj.weight",
        "layers.{l}.moe.shared.up": _LAYER + "mlp.shared_mlp.up_proj.weight",
        "layers.{l}.moe.shared.down": _LAYER + "mlp.shared_mlp.down_proj.weight",
    },
    # transformers builds the same model whatever those of the second line say; a checkpoint for which they mean
    # something else has other tensors, and is refused for that.
    fields=frozenset(
        "num_experts num_local_experts moe_topk attention_bias sliding_window eod_token_id "
        "attention_head_dim moe_intermediate_size num_shared_expert use_cla use_mixed_mlp_moe use_qk_norm".split()
    ),
)
