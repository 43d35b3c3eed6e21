"""What the parameters of a tiny checkpoint are on a mesh, worked out tensor by tensor with whole numpy arrays."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.checkpoint.pieces import Plan
from moejax.checkpoint.plan import MeshLayout, plan
from moejax.config import ModelConfig
from moejax.families import FAMILIES
from moejax.nn.heads import HeadLayout, head_layout

Tensors = Mapping[str, np.ndarray]

SPECS = {
    "embed": P("tp", None),
    "lm_head": P("tp", None),
    "moe.gate_up": P("ep", None, None, "tp"),
    "moe.down": P("ep", "tp", None),
    "moe.shared_gate_up": P(None, None, "tp"),
    "moe.shared_down": P("tp", None),
    "mlp.gate_up": P(None, None, "tp"),
    "mlp.down": P("tp", None),
    "attention.q": P(None, "tp", None),
    "attention.k": P(None, "tp", None),
    "attention.v": P(None, "tp", None),
    "attention.o": P("tp", None, None),
    "attention.q_bias": P("tp", None),
    "attention.k_bias": P("tp", None),
    "attention.v_bias": P("tp", None),
}


def mesh_layout(config: ModelConfig, mesh: Mesh) -> tuple[HeadLayout, tuple[int, ...]]:
    """Heads, and a slot for each expert: in reverse order, so that no test passes by slot and expert being one."""
    attention = config.layers[0].mixer
    heads = head_layout(attention.num_heads, attention.num_kv_heads, mesh.shape["tp"])
    return heads, _reversed_slots(config.num_experts, mesh)


def mesh_plan(config: ModelConfig, mesh: Mesh) -> Plan:
    family = FAMILIES[config.model_type]
    layout = MeshLayout(mesh.shape["tp"], lambda experts: _reversed_slots(experts, mesh))
    return plan(config, family.names, family.experts, layout)


def _reversed_slots(experts: int, mesh: Mesh) -> tuple[int, ...]:
    slots = _ceil(experts, mesh.shape["ep"])
    return tuple(slots - 1 - expert for expert in range(experts))


def abstract(expected: Mapping[str, np.ndarray], config: ModelConfig, mesh: Mesh, dtype: np.dtype | type):
    return {
        role: jax.ShapeDtypeStruct(value.shape, dtype, sharding=NamedSharding(mesh, _spec(role, config)))
        for role, value in expected.items()
    }


def expected_parameters(tensors: Tensors, config: ModelConfig, mesh: Mesh) -> dict[str, np.ndarray]:
    """Role -> the whole array, padding included, in the checkpoint's dtype."""
    tp = mesh.shape["tp"]
    expected = {"embed": _pad(tensors["model.embed_tokens.weight"], 0, tp), "norm.weight": tensors["model.norm.weight"]}
    if not config.tie_word_embeddings:
        expected["lm_head"] = _pad(tensors["lm_head.weight"], 0, tp)
    for layer, own_config in enumerate(config.layers):
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        block = _attention(own, config, mesh) | (
            _moe(own, config, mesh) if own_config.moe else _mlp("mlp", "mlp", own, tp)
        )
        expected |= {f"layers.{layer}.{role}": value for role, value in block.items()}
    return expected


def _attention(own: Tensors, config: ModelConfig, mesh: Mesh) -> dict[str, np.ndarray]:
    attention, heads = config.layers[0].mixer, mesh_layout(config, mesh)[0]
    H = attention.head_dim
    queries = [head if head < attention.num_heads else -1 for head in range(heads.num_heads)]
    block = {
        "attention_norm.weight": own["input_layernorm.weight"],
        "mlp_norm.weight": own["post_attention_layernorm.weight"],
    }
    for part, stored in (("q", queries), ("k", heads.kv_of), ("v", heads.kv_of)):
        block[f"attention.{part}"] = _heads(own[f"self_attn.{part}_proj.weight"], stored, H).transpose(2, 0, 1)
        if attention.qkv_bias:
            block[f"attention.{part}_bias"] = _heads(own[f"self_attn.{part}_proj.bias"], stored, H)
        if part != "v" and attention.qk_norm == "head":
            block[f"attention.{part}_norm"] = own[f"self_attn.{part}_norm.weight"]
        if part != "v" and attention.qk_norm == "full":
            block[f"attention.{part}_norm"] = _heads(own[f"self_attn.{part}_norm.weight"], stored, H)
    block["attention.o"] = _heads(own["self_attn.o_proj.weight"].T, queries, H)
    if attention.out_bias:
        block["attention.o_bias"] = own["self_attn.o_proj.bias"]
    return block


def _heads(value: np.ndarray, stored, H: int) -> np.ndarray:
    split = value.reshape(-1, H, *value.shape[1:])
    return np.stack([split[head] if head >= 0 else np.zeros_like(split[0]) for head in stored])


def _moe(own: Tensors, config: ModelConfig, mesh: Mesh) -> dict[str, np.ndarray]:
    tp, slot_of = mesh.shape["tp"], mesh_layout(config, mesh)[1]
    mixtral = config.model_type == "mixtral"
    prefix, parts = ("block_sparse_moe", "w1 w3 w2") if mixtral else ("mlp", "gate_proj up_proj down_proj")
    gate, up, down = (
        [own[f"{prefix}.experts.{e}.{part}.weight"].T for e in range(len(slot_of))] for part in parts.split()
    )
    gate_up = [_pad(np.stack(pair, 1), 2, tp) for pair in zip(gate, up, strict=True)]
    down = [_pad(value, 0, tp) for value in down]
    slots = max(slot_of) + 1

    def stack(values: list[np.ndarray]) -> np.ndarray:
        by_slot = dict(zip(slot_of, values, strict=True))
        return np.stack([by_slot.get(slot, np.zeros_like(values[0])) for slot in range(slots)])

    block = {"router": own[f"{prefix}.gate.weight"].T, "gate_up": stack(gate_up), "down": stack(down)}
    moe = next(layer.moe for layer in config.layers if layer.moe)
    if moe.shared_intermediate_size:
        block |= _mlp("", "mlp.shared_expert", own, tp, "shared_")
    if moe.shared_gate:
        block["shared_gate"] = own["mlp.shared_expert_gate.weight"][0]
    return {f"moe.{role.removeprefix('.')}": value for role, value in block.items()}


def _mlp(role: str, prefix: str, own: Tensors, tp: int, lead: str = "") -> dict[str, np.ndarray]:
    gate, up, down = (own[f"{prefix}.{part}_proj.weight"].T for part in ("gate", "up", "down"))
    return {f"{role}.{lead}gate_up": _pad(np.stack([gate, up], 1), 2, tp), f"{role}.{lead}down": _pad(down, 0, tp)}


def _pad(value: np.ndarray, axis: int, multiple: int) -> np.ndarray:
    widths = [(0, 0)] * value.ndim
    widths[axis] = (0, _ceil(value.shape[axis], multiple) - value.shape[axis])
    return np.pad(value, widths)


def _ceil(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


def _spec(role: str, config: ModelConfig) -> P:
    if config.layers[0].mixer.qk_norm == "full" and role.endswith(("q_norm", "k_norm")):
        return P("tp", None)
    return SPECS.get(role.split(".", 2)[-1] if role.startswith("layers.") else role, P())
