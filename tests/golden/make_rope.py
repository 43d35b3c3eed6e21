"""Writes rope.json: rotary frequencies and tables as transformers computes them, for tests/test_rope.py.

Run it with the `parity` extra installed: python tests/golden/make_rope.py
"""

import json
from pathlib import Path

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding, apply_rotary_pos_emb

BASE = {"head_dim": 16, "max_position_embeddings": 4096, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LONG = {
    "type": "longrope",
    "short_factor": [1.0, 1.04, 1.05, 1.06, 1.2, 1.5, 2.0, 2.8],
    "long_factor": [1.02, 1.05, 1.4, 4.0, 20.0, 44.0, 60.0, 65.0],
    "original_max_position_embeddings": 512,
}
CASES = {
    "default": {},
    "default, the family's theta": {"rope_theta": None},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "dynamic, short": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "length": 4096},
    "dynamic, one past": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "length": 4097},
    "dynamic, long": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "length": 20000},
    "yarn": {"rope_scaling": YARN},
    "yarn, wide": {"rope_scaling": YARN, "head_dim": 32},
    "yarn, null factor": {"rope_scaling": {**YARN, "factor": None}},
    "yarn, context of the config": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "yarn, top-level context": {"rope_scaling": YARN, "original_max_position_embeddings": 512},
    "yarn, attention factor": {"rope_scaling": {**YARN, "attention_factor": 1.25}},
    "yarn, one mscale": {"rope_scaling": {**YARN, "mscale": 0.7}},
    "yarn, both mscales": {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "yarn, betas": {"rope_scaling": {**YARN, "beta_fast": 4, "beta_slow": 0.5}},
    "yarn, not truncated": {"rope_scaling": {**YARN, "truncate": False}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    },
    "llama3, context of the config": {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4},
    },
    "proportional": {"rope_scaling": {"rope_type": "proportional", "partial_rotary_factor": 0.3}},
    "proportional, all pairs, stretched": {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}},
    "proportional, top-level part": {"rope_scaling": {"rope_type": "proportional"}, "partial_rotary_factor": 0.5},
    "longrope, short": {"rope_scaling": LONG, "length": 512},
    "longrope, one past": {"rope_scaling": LONG, "length": 513},
    "longrope, factor": {"rope_scaling": {**LONG, "factor": 3.0}, "length": 513},
    "longrope, factor below 1": {"rope_scaling": {**LONG, "factor": 0.5}, "length": 513},
    "longrope, attention factor": {"rope_scaling": {**LONG, "attention_factor": 1.25}, "length": 513},
    "longrope, top-level context": {"rope_scaling": LONG, "original_max_position_embeddings": 300, "length": 301},
}


def rotary(case: dict) -> tuple[dict, MixtralRotaryEmbedding]:
    config = {name: value for name, value in {**BASE, **case}.items() if name != "length" and value is not None}
    # The constructor writes into the dictionaries it is given.
    return config, MixtralRotaryEmbedding(MixtralConfig(**json.loads(json.dumps(config))))


def frequencies(case: dict) -> dict:
    config, rotate = rotary(case)
    if "length" in case:
        rotate(torch.zeros(1), torch.tensor([[case["length"] - 1]]))
    config["model_type"] = "mixtral"
    return {
        "config": config,
        "length": case.get("length"),
        "frequencies": rotate.inv_freq.tolist(),
        "attention_factor": rotate.attention_scaling,
    }


def rotation() -> dict:
    config, rotate = rotary({"rope_scaling": YARN})
    positions = torch.tensor([[0, 1, 7], [5, 4095, 2]])
    cos, sin = rotate(torch.zeros(1), positions)
    x = torch.sin(torch.arange(2 * 3 * 2 * 16, dtype=torch.float32)).reshape(2, 3, 2, 16)
    turned, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    return {
        "config": {**config, "model_type": "mixtral"},
        "positions": positions.tolist(),
        "cos": cos[..., :8].tolist(),
        "sin": sin[..., :8].tolist(),
        "x": x.tolist(),
        "turned": turned.tolist(),
    }


if __name__ == "__main__":
    golden = {"frequencies": {name: frequencies(case) for name, case in CASES.items()}, "rotation": rotation()}
    Path(__file__).with_name("rope.json").write_text(json.dumps(golden, indent=1) + "\n")
