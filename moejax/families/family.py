"""What a checkpoint family is: how its config reads, and what its tensors are called."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moejax.checkpoint.expert_entries import SEPARATE, ExpertTensors
from moejax.config import ModelConfig


@dataclass(frozen=True)
class Wrapper:
    """A model of several modalities whose text half is a family's model.

    Attributes:
        model_type: of its config.json, whose `text_config` is the family's.
        prefixes: (prefix of a tensor name in the wrapper's checkpoint, prefix in the text model's own), tried in order.
            Tensors that none fits belong to other modalities and are left out.
    """

    model_type: str
    prefixes: tuple[tuple[str, str], ...]


def nothing_left_out(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """For families whose checkpoints hold only what their models use."""
    return ()


@dataclass(frozen=True)
class Family:
    """A family of checkpoints in Hugging Face's format, as data.

    Attributes:
        model_type: `model_type` of its config.json.
        architecture: the class transformers loads it with.
        to_config: parsed config.json -> ModelConfig; raises MoejaxError naming the field it cannot honour.
        names: role template -> checkpoint tensor name template. `{l}` is the layer, `{e}` the expert, which only tensor
            names have: a role holds all experts. Roles of parts (`moe.gate`, `moe.up`) are separate tensors of one
            parameter (`moe.gate_up`). A family names every role it may have; a config may use fewer.
        fields: names of config.json's fields that `to_config` reads beyond those all families share.
        experts: how its checkpoints stack experts.
        aliases: further model_types of the same family, which transformers doesn't know; what is saved has the first.
        wrapper: the model of several modalities that holds one of the family.
        left_out: parsed config.json -> glob patterns of checkpoint tensors that a decoder has no use for (layers that
            predict further tokens); loading names what it leaves out.
        ignored_tensors: glob patterns of checkpoint tensors that carry no parameter.
    """

    model_type: str
    architecture: str
    to_config: Callable[[Mapping[str, Any]], ModelConfig]
    names: Mapping[str, str]
    fields: frozenset[str]
    experts: ExpertTensors = SEPARATE
    aliases: tuple[str, ...] = ()
    wrapper: Wrapper | None = None
    left_out: Callable[[Mapping[str, Any]], tuple[str, ...]] = nothing_left_out
    ignored_tensors: tuple[str, ...] = ("*.rotary_emb.inv_freq",)


_LAYER = "model.layers.{l}."

DEFAULT_NAMES: Mapping[str, str] = {
    "embed": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "norm.bias": "model.norm.bias",
    "lm_head": "lm_head.weight",
    "layers.{l}.attention_norm.weight": _LAYER + "input_layernorm.weight",
    "layers.{l}.attention_norm.bias": _LAYER + "input_layernorm.bias",
    "layers.{l}.mlp_norm.weight": _LAYER + "post_attention_layernorm.weight",
    "layers.{l}.mlp_norm.bias": _LAYER + "post_attention_layernorm.bias",
    "layers.{l}.attention.q": _LAYER + "self_attn.q_proj.weight",
    "layers.{l}.attention.k": _LAYER + "self_attn.k_proj.weight",
    "layers.{l}.attention.v": _LAYER + "self_attn.v_proj.weight",
    "layers.{l}.attention.o": _LAYER + "self_attn.o_proj.weight",
    "layers.{l}.attention.q_bias": _LAYER + "self_attn.q_proj.bias",
    "layers.{l}.attention.k_bias": _LAYER + "self_attn.k_proj.bias",
    "layers.{l}.attention.v_bias": _LAYER + "self_attn.v_proj.bias",
    "layers.{l}.attention.o_bias": _LAYER + "self_attn.o_proj.bias",
    "layers.{l}.attention.q_norm": _LAYER + "self_attn.q_norm.weight",
    "layers.{l}.attention.k_norm": _LAYER + "self_attn.k_norm.weight",
    "layers.{l}.attention.q_a": _LAYER + "self_attn.q_a_proj.weight",
    "layers.{l}.attention.q_a_bias": _LAYER + "self_attn.q_a_proj.bias",
    "layers.{l}.attention.q_a_norm": _LAYER + "self_attn.q_a_layernorm.weight",
    "layers.{l}.attention.q_b": _LAYER + "self_attn.q_b_proj.weight",
    "layers.{l}.attention.kv_a": _LAYER + "self_attn.kv_a_proj_with_mqa.weight",
    "layers.{l}.attention.kv_a_bias": _LAYER + "self_attn.kv_a_proj_with_mqa.bias",
    "layers.{l}.attention.kv_a_norm": _LAYER + "self_attn.kv_a_layernorm.weight",
    "layers.{l}.attention.kv_b": _LAYER + "self_attn.kv_b_proj.weight",
    "layers.{l}.moe.router": _LAYER + "mlp.gate.weight",
    "layers.{l}.moe.gate": _LAYER + "mlp.experts.{e}.gate_proj.weight",
    "layers.{l}.moe.up": _LAYER + "mlp.experts.{e}.up_proj.weight",
    "layers.{l}.moe.down": _LAYER + "mlp.experts.{e}.down_proj.weight",
    "layers.{l}.moe.shared.gate": _LAYER + "mlp.shared_expert.gate_proj.weight",
    "layers.{l}.moe.shared.up": _LAYER + "mlp.shared_expert.up_proj.weight",
    "layers.{l}.moe.shared.down": _LAYER + "mlp.shared_expert.down_proj.weight",
    "layers.{l}.moe.shared_gate": _LAYER + "mlp.shared_expert_gate.weight",
    "layers.{l}.mlp.gate": _LAYER + "mlp.gate_proj.weight",
    "layers.{l}.mlp.up": _LAYER + "mlp.up_proj.weight",
    "layers.{l}.mlp.down": _LAYER + "mlp.down_proj.weight",
}
