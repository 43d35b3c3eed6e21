"""Gemma-4: a dense MLP beside the experts, norms around every branch, another attention in full layers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moejax.checkpoint.expert_entries import ExpertTensors
from moejax.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, RouterConfig
from moejax.errors import MoejaxError
from moejax.families.decoder import Defaults, read_activation, read_attention, read_decoder, read_layer_types
from moejax.families.family import DEFAULT_NAMES, Family, Wrapper
from moejax.families.fields import Fields

_DEFAULTS = Defaults(
    vocab_size=262_144,
    hidden_size=2304,
    num_hidden_layers=30,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-6,
    bos_token_id=2,
    eos_token_id=1,
)

_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


def to_config(raw: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(raw)
    _refuse_variants(fields)
    tied = Fields({"tie_word_embeddings": True, **raw})
    decoder = read_decoder(tied, _DEFAULTS, honours=("per_layer_config",))
    decoder["norm"] = replace(decoder["norm"], kind="rms_wide")
    moe, activation = _experts(fields, decoder["hidden_size"]), read_activation(fields, *_ACTIVATION)
    dense = fields.integer("intermediate_size", 9216)
    layers = tuple(
        LayerConfig(attention, moe, dense, branch_norms=True, output_scale=True) for attention in _attentions(fields)
    )
    return ModelConfig(
        model_type="gemma4_text",
        layers=layers,
        activation=activation,
        embedding_scale=decoder["hidden_size"] ** 0.5,
        logits_softcap=fields.optional_number("final_logit_softcapping"),
        **decoder,
    )


_ACTIVATION = ("hidden_activation", "gelu_pytorch_tanh")


def _experts(fields: Fields, hidden_size: int) -> MoEConfig | None:
    if not fields.flag("enable_moe_block", False):
        return None
    return MoEConfig(
        hidden_size=hidden_size,
        intermediate_size=fields.integer("moe_intermediate_size", 0),
        num_experts=fields.integer("num_experts", 0),
        num_experts_per_tok=fields.integer("top_k_experts", 0),
        activation=read_activation(fields, *_ACTIVATION),
        router=RouterConfig(expert_scale=True),
    )


def _attentions(fields: Fields) -> list[AttentionConfig]:
    """Each layer's attention: windows, or all tokens with wider heads; the last layer sees all whatever is listed."""
    count = fields.integer("num_hidden_layers", _DEFAULTS.num_hidden_layers)
    listed = read_layer_types(fields, count) or tuple((layer + 1) % 6 != 0 for layer in range(count))
    windowed = (*listed[:-1], False)
    overrides = _overrides(fields, windowed)
    return [_attention(fields, window, overrides.get(layer, {})) for layer, window in enumerate(windowed)]


def _attention(fields: Fields, windowed: bool, own: Mapping[str, Any]) -> AttentionConfig:
    bias = fields.flag("attention_bias", False)
    return read_attention(
        Fields({**fields.raw, "rope_parameters": fields.raw.get("rope_parameters") or _ROPES, **own}),
        _DEFAULTS,
        layer_type="sliding_attention" if windowed else "full_attention",
        window=fields.integer("sliding_window", 512) if windowed else None,
        scale=1.0,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
        value_norm=True,
        keys_are_values=not windowed and fields.flag("attention_k_eq_v", False),
    )


def _overrides(fields: Fields, windowed: tuple[bool, ...]) -> dict[int, Mapping[str, Any]]:
    """What single layers have otherwise: as transformers 5 writes it, layer by layer, or as the hub's fields imply."""
    if "per_layer_config" in fields.raw:
        return _listed_overrides(fields)
    wide: dict[str, Any] = {"head_dim": fields.integer("global_head_dim", 512)}
    heads = fields.optional_integer("num_global_key_value_heads")
    if heads is not None and fields.flag("attention_k_eq_v", False):
        wide["num_key_value_heads"] = heads
    return {layer: wide for layer, window in enumerate(windowed) if not window}


def _listed_overrides(fields: Fields) -> dict[int, Mapping[str, Any]]:
    listed = fields.raw["per_layer_config"]
    if listed is None:
        return {}
    if not isinstance(listed, Mapping) or not all(
        str(layer).isdecimal() and isinstance(own, Mapping) and set(own) <= {"head_dim", "num_key_value_heads"}
        for layer, own in listed.items()
    ):
        raise fields.error("per_layer_config", "must give layers' numbers head_dim and num_key_value_heads, no others")
    return {int(layer): own for layer, own in listed.items()}


def _refuse_variants(fields: Fields) -> None:
    """Fails for the mechanisms of Gemma-4's small models, which those with experts do without."""
    if fields.integer("hidden_size_per_layer_input", 256, minimum=0):
        raise MoejaxError(
            f"config field hidden_size_per_layer_input={fields.raw.get('hidden_size_per_layer_input', 256)} "
            "(256 where absent) is not supported: embeddings for each layer; models with experts set it to 0"
        )
    if fields.integer("num_kv_shared_layers", 0, minimum=0):
        raise fields.error("num_kv_shared_layers", "is not supported; every layer has keys and values of its own (0)")
    if fields.raw.get("use_bidirectional_attention") not in (None, "vision"):
        raise fields.error("use_bidirectional_attention", "is not supported; text is read causally (vision or null)")


_LAYER = "model.layers.{l}."

GEMMA4 = Family(
    model_type="gemma4_text",
    architecture="Gemma4ForCausalLM",
    to_config=to_config,
    names={
        **DEFAULT_NAMES,
        "layers.{l}.attention_out_norm.weight": _LAYER + "post_attention_layernorm.weight",
        "layers.{l}.mlp_norm.weight": _LAYER + "pre_feedforward_layernorm.weight",
        "layers.{l}.mlp_out_norm.weight": _LAYER + "post_feedforward_layernorm_1.weight",
        "layers.{l}.moe_norm.weight": _LAYER + "pre_feedforward_layernorm_2.weight",
        "layers.{l}.moe_out_norm.weight": _LAYER + "post_feedforward_layernorm_2.weight",
        "layers.{l}.out_norm.weight": _LAYER + "post_feedforward_layernorm.weight",
        "layers.{l}.output_scale": _LAYER + "layer_scalar",
        "layers.{l}.router_norm.weight": _LAYER + "router.scale",
        "layers.{l}.moe.router": _LAYER + "router.proj.weight",
        "layers.{l}.moe.expert_scale": _LAYER + "router.per_expert_scale",
        "layers.{l}.moe.gate_up": _LAYER + "experts.gate_up_proj",
        "layers.{l}.moe.down": _LAYER + "experts.down_proj",
    },
    fields=frozenset(
        "hidden_activation global_head_dim num_global_key_value_heads attention_k_eq_v attention_bias sliding_window "
        "enable_moe_block num_experts top_k_experts moe_intermediate_size final_logit_softcapping "
        "hidden_size_per_layer_input vocab_size_per_layer_input num_kv_shared_layers use_double_wide_mlp "
        "use_bidirectional_attention".split()
    ),
    experts=ExpertTensors(stacked=True),
    wrapper=Wrapper("gemma4", (("model.language_model.", "model."), ("lm_head.", "lm_head."))),
)
