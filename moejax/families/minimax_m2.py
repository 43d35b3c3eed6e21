"""MiniMax-M2: sigmoid scores without groups, query and key normalised over all heads at once, partly turned heads."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from moejax.config import ModelConfig, MoEConfig, RouterConfig
from moejax.families.decoder import Defaults, decoder_layers, no_windows, read_activation, read_attention, read_decoder
from moejax.families.deepseek_moe import further_layers
from moejax.families.family import Family
from moejax.families.fields import Fields
from moejax.families.mixtral import MIXTRAL

_DEFAULTS = Defaults(
    vocab_size=200_064,
    hidden_size=3072,
    num_hidden_layers=62,
    num_attention_heads=48,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=196_608,
    rms_norm_eps=1e-6,
    rope_theta=5_000_000.0,
    bos_token_id=200_034,
    eos_token_id=200_020,
)


def to_config(raw: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(raw)
    if raw.get("scoring_func") not in (None, "sigmoid"):
        raise fields.error("scoring_func", "is not supported for minimax_m2; sigmoid is")
    head_dim = fields.integer("head_dim", 128)
    turned = fields.optional_integer("rotary_dim", head_dim) or head_dim
    attention = read_attention(fields, _DEFAULTS, partial_rotary=turned / head_dim, qk_norm="full")
    decoder = read_decoder(fields, _DEFAULTS)
    num_layers = fields.integer("num_hidden_layers", _DEFAULTS.num_hidden_layers)
    # Where both names stand, transformers lets the alias `num_experts` win.
    experts = "num_experts" if "num_experts" in raw else "num_local_experts"
    moe = MoEConfig(
        hidden_size=decoder["hidden_size"],
        intermediate_size=fields.integer("intermediate_size", 1536),
        num_experts=fields.integer(experts, 256),
        num_experts_per_tok=fields.integer("num_experts_per_tok", 8),
        activation=read_activation(fields),
        router=RouterConfig(score="sigmoid", correction=True),
    )
    layers = decoder_layers(attention, no_windows(fields, num_layers), [moe] * num_layers)
    return ModelConfig(model_type="minimax_m2", layers=layers, **decoder)


MINIMAX_M2 = Family(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    to_config=to_config,
    names={
        **MIXTRAL.names,
        "layers.{l}.moe.correction": "model.layers.{l}.block_sparse_moe.e_score_correction_bias",
    },
    fields=frozenset(
        {
            *("num_local_experts", "num_experts", "rotary_dim", "scoring_func", "sliding_window"),
            # Published, and read by nothing: M2 is what they say it is.
            *("attn_type_list", "qk_norm_type", "use_qk_norm", "use_routing_bias", "shared_intermediate_size"),
            *("num_mtp_modules", "mtp_transformer_layers", "use_mtp", "router_jitter_noise"),
        }
    ),
    left_out=partial(further_layers, num_layers=_DEFAULTS.num_hidden_layers),
)
