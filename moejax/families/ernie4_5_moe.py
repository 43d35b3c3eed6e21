"""Ernie 4.5: softmax scores chosen by with a bias, neighbours turned, biases wherever a matrix may have one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moejax.checkpoint.expert_entries import ExpertTensors
from moejax.config import ModelConfig, MoEConfig, RouterConfig
from moejax.families.decoder import Defaults, decoder_layers, no_windows, read_activation, read_attention, read_decoder
from moejax.families.deepseek_moe import DEEPSEEK_NAMES
from moejax.families.family import Family
from moejax.families.fields import Fields

_DEFAULTS = Defaults(
    vocab_size=103_424,
    hidden_size=2560,
    num_hidden_layers=28,
    num_attention_heads=20,
    num_key_value_heads=4,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-5,
    rope_theta=500_000.0,
    bos_token_id=1,
    eos_token_id=2,
)


def to_config(raw: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(raw)
    bias = fields.flag("use_bias", False)
    attention = read_attention(fields, _DEFAULTS, qkv_bias=bias, out_bias=bias)
    assert attention.rope is not None
    attention = replace(attention, rope=replace(attention.rope, interleaved=True))
    decoder = read_decoder(fields, _DEFAULTS)
    decoder |= {"tie_word_embeddings": fields.flag("tie_word_embeddings", True), "head_bias": bias}
    num_layers = fields.integer("num_hidden_layers", _DEFAULTS.num_hidden_layers)
    windows = no_windows(fields, num_layers)
    moe = _experts(fields, num_layers, decoder["hidden_size"])
    layers = decoder_layers(attention, windows, moe, fields.integer("intermediate_size", 12_288))
    layers = tuple(replace(layer, dense_bias=bias and layer.moe is None) for layer in layers)
    return ModelConfig(model_type="ernie4_5_moe", layers=layers, activation=read_activation(fields), **decoder)


def _experts(fields: Fields, num_layers: int, hidden_size: int) -> list[MoEConfig | None]:
    """The experts of every `moe_layer_interval`th layer between two indices, None in the others."""
    first = fields.integer("moe_layer_start_index", 1, minimum=0)
    last = fields.integer("moe_layer_end_index", -1, minimum=-1)
    step = fields.integer("moe_layer_interval", 1)
    sparse = range(first, num_layers if last == -1 else min(last + 1, num_layers))
    width = fields.integer("moe_intermediate_size", 1536)
    shared = fields.integer("moe_num_shared_experts", 2, minimum=0)
    # Where both names stand, transformers lets the aliases win.
    experts = "num_experts" if "num_experts" in fields.raw else "moe_num_experts"
    chosen = "num_experts_per_tok" if "num_experts_per_tok" in fields.raw else "moe_k"
    moe = MoEConfig(
        hidden_size=hidden_size,
        intermediate_size=width,
        num_experts=fields.integer(experts, 64),
        num_experts_per_tok=fields.integer(chosen, 6),
        activation=read_activation(fields),
        router=RouterConfig(correction=True, least_sum=fields.number("moe_norm_min", 1e-12)),
        shared_intermediate_size=width * shared,
        shared_bias=shared > 0 and fields.flag("use_bias", False),
    )
    return [moe if layer in sparse and (layer + 1) % step == 0 else None for layer in range(num_layers)]


_MLP = "model.layers.{l}.mlp."
_PARTS = ("gate", "up", "down")

ERNIE4_5_MOE = Family(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    to_config=to_config,
    names={
        **DEEPSEEK_NAMES,
        "lm_head_bias": "lm_head.bias",
        "layers.{l}.moe.correction": _MLP + "moe_statics.e_score_correction_bias",
        **{f"layers.{{l}}.moe.shared.{part}_bias": f"{_MLP}shared_experts.{part}_proj.bias" for part in _PARTS},
        **{f"layers.{{l}}.mlp.{part}_bias": f"{_MLP}{part}_proj.bias" for part in _PARTS},
    },
    fields=frozenset(
        {
            *("use_bias", "moe_num_experts", "num_experts", "moe_k", "moe_intermediate_size", "moe_num_shared_experts"),
            *("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "moe_norm_min", "sliding_window"),
            # Published, and read by nothing.
            *("moe_capacity", "moe_use_aux_free", "num_nextn_predict_layers", "use_rmsnorm"),
        }
    ),
    experts=ExpertTensors(correction_row=True),
    left_out=lambda raw: ("*mtp*",),
)
