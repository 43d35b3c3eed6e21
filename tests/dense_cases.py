"""Tiny random dense checkpoints of the families that can be upcycled, described without any model code."""

import json
from pathlib import Path
from typing import Any

import tiny

_ALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}

CONFIGS: dict[str, dict[str, Any]] = {
    # Leaves all that it can to the family, whose defaults are not Mixtral's: norm, rope, key/value heads.
    "llama_bare": {"model_type": "llama", **_ALL},
    # The hub's spelling of Llama 3.2: its rope, tied embeddings, several ends, fields that Mixtral does not have.
    "llama_hub": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **_ALL,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 5,
        "eos_token_id": [2, 3],
        "pretraining_tp": 1,
        "initializer_range": 0.05,
        "rms_norm_eps": 1e-3,
        "max_position_embeddings": 128,
        "rope_theta": 5000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    },
    # The spelling of transformers 5, with another activation; the base is left to the family.
    "llama_new": {
        "model_type": "llama",
        **_ALL,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "gelu",
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        "dtype": "float32",
    },
    "mistral_window": {
        "model_type": "mistral",
        **_ALL,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "mistral_full": {"model_type": "mistral", **_ALL, "num_key_value_heads": 1, "sliding_window": None},
    # Heads of 128, which their number does not say; biases; a window that is switched off.
    "qwen3_bare": {
        "model_type": "qwen3",
        **_ALL,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "use_sliding_window": False,
        "sliding_window": 4,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3_windows": {
        "model_type": "qwen3",
        **_ALL,
        "num_key_value_heads": None,
        "head_dim": 8,
        "rms_norm_eps": 1e-4,
        "rope_theta": 1000000.0,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 0,
    },
    # Windows are on, but begin after the last layer.
    "qwen3_late": {
        "model_type": "qwen3",
        **_ALL,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
    },
}


def write_dense(
    folder: Path, name: str, seed: int = 0, dtype: str = "float32", shards: int = 1, **changes: Any
) -> Path:
    """Writes the checkpoint of a name in `CONFIGS`, and returns its folder.

    Args:
        folder: made if it is not there.
        name: of the config.
        seed: of the weights.
        dtype: how the tensors are stored.
        shards: files.
        changes: fields of config.json that differ, which have no effect on the tensors.
    """
    raw = CONFIGS[name]
    # As a sparse model with no sparse layer, of the same attention.
    dense = raw | {"mlp_only_layers": list(range(raw["num_hidden_layers"]))}
    if raw["model_type"] == "qwen3":
        dense |= {"model_type": "qwen3_moe", "head_dim": raw.get("head_dim", 128)}
    tiny.write_checkpoint(folder, {"num_key_value_heads": None} | dense, seed, dtype, shards)
    (folder / "config.json").write_text(json.dumps(raw | changes))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    (folder / "tokenizer_config.json").write_text("{}")
    return folder
