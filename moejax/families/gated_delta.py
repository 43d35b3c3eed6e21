"""What Qwen3-Next and Qwen3.5 share: layers of gated DeltaNet among layers of gated attention, zero-centred norms."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moejax.config import DeltaNetConfig, Mixer
from moejax.families.decoder import Defaults, read_activation, read_attention, read_decoder, read_layer_types
from moejax.families.family import DEFAULT_NAMES
from moejax.families.fields import Fields

# Fields of published configs that transformers' classes do not read: attention has a gate and no window whatever they
# say, recurrent states are float32, and layers that predict further tokens are left out.
_UNREAD = "attn_output_gate use_sliding_window sliding_window max_window_layers mamba_ssm_dtype"

FIELDS = frozenset(
    "attention_bias full_attention_interval linear_num_key_heads linear_num_value_heads linear_key_head_dim "
    "linear_value_head_dim linear_conv_kernel_dim num_experts moe_intermediate_size shared_expert_intermediate_size "
    f"decoder_sparse_step mlp_only_layers norm_topk_prob mtp_num_hidden_layers mtp_use_dedicated_embeddings {_UNREAD}"
    "".split()
)

_LINEAR = "model.layers.{l}.linear_attn."

NAMES: Mapping[str, str] = {
    **DEFAULT_NAMES,
    "layers.{l}.attention.linear.conv": _LINEAR + "conv1d.weight",
    "layers.{l}.attention.linear.dt_bias": _LINEAR + "dt_bias",
    "layers.{l}.attention.linear.A_log": _LINEAR + "A_log",
    "layers.{l}.attention.linear.norm": _LINEAR + "norm.weight",
    "layers.{l}.attention.linear.o": _LINEAR + "out_proj.weight",
}
"""Without the projections of DeltaNet's input, in which the families differ."""


def projection_names(*parts: str) -> dict[str, str]:
    """Names of the projections of DeltaNet's input."""
    return {f"layers.{{l}}.attention.linear.{part}": f"{_LINEAR}in_proj_{part}.weight" for part in parts}


def read_zero_centred_decoder(fields: Fields, defaults: Defaults) -> dict[str, Any]:
    """What `read_decoder` reads, with norms whose weights are zero-centred."""
    decoder = read_decoder(fields, defaults)
    return decoder | {"norm": replace(decoder["norm"], kind="rms_plus_one")}


def read_mixers(fields: Fields, defaults: Defaults) -> list[Mixer]:
    """Each layer's: as `layer_types` lists them, or else full attention in every `full_attention_interval`-th."""
    bias = fields.flag("attention_bias", False)
    full = read_attention(
        fields, defaults, partial_rotary=0.25, qkv_bias=bias, out_bias=bias, qk_norm="head", gate=True
    )
    linear = DeltaNetConfig(
        num_key_heads=fields.integer("linear_num_key_heads", 16),
        num_value_heads=fields.integer("linear_num_value_heads", 32),
        key_dim=fields.integer("linear_key_head_dim", 128),
        value_dim=fields.integer("linear_value_head_dim", 128),
        kernel=fields.integer("linear_conv_kernel_dim", 4),
        activation=read_activation(fields),
    )
    num_layers = fields.integer("num_hidden_layers", defaults.num_hidden_layers)
    listed = read_layer_types(fields, num_layers, "linear_attention")
    if listed is None:
        interval = fields.integer("full_attention_interval", 4)
        listed = tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    return [linear if layer else full for layer in listed]


def left_out(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Layers that predict further tokens."""
    return ("mtp.*",)
