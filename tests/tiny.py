"""Tiny random checkpoints of every family, described without any model code of the package.

Weights come from numpy's RandomState, whose stream is frozen, keyed by the seed and the tensor's name, so that a
checkpoint is the same on every machine and needs no file in the repository.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tiny_configs import CONFIGS

__all__ = ["CONFIGS", "num_experts", "sparse_layers", "tensor_shapes", "tensor_value", "write_checkpoint"]

_MLP = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL_MLP = ("w1", "w3", "w2")
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def sparse_layers(raw: dict[str, Any]) -> list[int]:
    """The layers that are mixtures of experts; the others have one dense MLP."""
    step = raw.get("decoder_sparse_step", 1)
    dense = raw.get("mlp_only_layers") or []
    return [layer for layer in range(raw["num_hidden_layers"]) if layer not in dense and (layer + 1) % step == 0]


def num_experts(raw: dict[str, Any]) -> int:
    return raw["num_local_experts"] if raw["model_type"] == "mixtral" else raw["num_experts"]


def tensor_shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint on the hub with this config (torch layout, [out, in])."""
    width, vocab = raw["hidden_size"], raw["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not raw.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, width)
    for layer in range(raw["num_hidden_layers"]):
        block = _attention(raw) | (_experts(raw) if layer in sparse_layers(raw) else _dense(raw))
        block |= {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def _attention(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, heads = raw["hidden_size"], raw["num_attention_heads"]
    head = raw.get("head_dim") or width // heads
    q, kv = heads * head, (raw["num_key_value_heads"] or heads) * head
    shapes = {"q_proj.weight": (q, width), "k_proj.weight": (kv, width), "v_proj.weight": (kv, width)}
    shapes["o_proj.weight"] = (width, q)
    family = raw["model_type"]
    if (family == "qwen2_moe" and raw.get("qkv_bias", True)) or raw.get("attention_bias", False):
        shapes |= {"q_proj.bias": (q,), "k_proj.bias": (kv,), "v_proj.bias": (kv,)}
    if raw.get("attention_bias", False):
        shapes["o_proj.bias"] = (width,)
    if family == "qwen3_moe":
        shapes |= {"q_norm.weight": (head,), "k_norm.weight": (head,)}
    if family == "olmoe":
        shapes |= {"q_norm.weight": (q,), "k_norm.weight": (kv,)}
    return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def _mlp(prefix: str, width: int, inner: int, names: tuple[str, str, str] = _MLP) -> dict[str, tuple[int, ...]]:
    gate, up, down = names
    shapes = {gate: (inner, width), up: (inner, width), down: (width, inner)}
    return {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}


def _dense(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return _mlp("mlp", raw["hidden_size"], raw["intermediate_size"])


def _experts(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, count = raw["hidden_size"], num_experts(raw)
    inner = raw.get("moe_intermediate_size", raw["intermediate_size"])
    prefix, names = ("block_sparse_moe", _MIXTRAL_MLP) if raw["model_type"] == "mixtral" else ("mlp", _MLP)
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.gate.weight": (count, width)}
    for expert in range(count):
        shapes |= _mlp(f"{prefix}.experts.{expert}", width, inner, names)
    if raw["model_type"] == "qwen2_moe":
        shapes |= _mlp("mlp.shared_expert", width, raw["shared_expert_intermediate_size"])
        shapes["mlp.shared_expert_gate.weight"] = (1, width)
    return shapes


def tensor_value(raw: dict[str, Any], name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 values, off neutral everywhere, that keep activations near 1 and logits 1 to 3 apart."""
    values = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode())).standard_normal(shape)
    return _rescale(raw, name, values).astype(np.float32)


def _rescale(raw: dict[str, Any], name: str, normal: np.ndarray) -> np.ndarray:
    if "norm" in name:
        return 1 + 0.3 * normal
    if name.endswith("bias"):
        return 0.2 * normal
    fan_in = math.sqrt(normal.shape[-1])
    if name == "lm_head.weight" or (name == "model.embed_tokens.weight" and raw.get("tie_word_embeddings", False)):
        return 2 * normal / fan_in
    if name == "model.embed_tokens.weight":
        return normal
    gain = 1.5 if "q_proj" in name or "k_proj" in name else 3.0 if "w2" in name or "down_proj" in name else 1.0
    return gain * normal / fan_in


def write_checkpoint(
    folder: Path, raw_config: dict[str, Any], seed: int = 0, dtype: str = "float32", shards: int = 1
) -> Path:
    """Writes a checkpoint folder as the hub has it, and returns it.

    Args:
        folder: where config.json, generation_config.json and the safetensors files go; made if it is not there.
        raw_config: a value of `CONFIGS`, or such a dict changed.
        dtype: how the tensors are stored; config.json's own dtype field says the same.
        shards: 1 writes model.safetensors; more write that many files and an index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spelling = "dtype" if "dtype" in raw_config else "torch_dtype"
    _write_json(folder / "config.json", raw_config | {spelling: dtype})
    generation = {key: raw_config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in raw_config}
    _write_json(folder / "generation_config.json", generation)
    shapes = tensor_shapes(raw_config)
    values = {name: tensor_value(raw_config, name, shape, seed) for name, shape in shapes.items()}
    tensors = {name: value.astype(_DTYPES[dtype]) for name, value in values.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    names = sorted(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return folder


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
