"""Folders as training runs leave them, with figures like those of real ones."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

DOMAINS = ("bible", "chat", "code", "speeches", "stories")
RECIPE = """steps = {steps}
seed = {seed}
dtype = "bfloat16"

[model]
config = "configs/train/demo.json"

[data]
batch = 16
length = 256

[[data.mixture]]
path = "corpus/chat.train.txt.xz"
weight = 1.0

[[data.mixture]]
path = "corpus/code.train.txt.xz"
weight = 0.5

[optimizer]
lr = {lr}
warmup = 100
"""
CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_local_experts": 8,
    "vocab_size": 4096,
}


def write_run(
    folder: Path,
    steps: int = 200,
    layers: int = 4,
    experts: int = 8,
    seed: int = 0,
    lr: float = 1e-3,
    every: int = 50,
    begin: int = 1,
) -> Path:
    """A run of so many steps with an evaluation every so many; `begin` appends to one that is there."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(RECIPE.format(steps=steps, seed=seed, lr=lr))
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    with (folder / "metrics.jsonl").open("a") as file:
        for row in rows(steps, layers, experts, seed, lr, every, begin):
            file.write(json.dumps(row) + "\n")
    return folder


def rows(
    steps: int, layers: int, experts: int, seed: int, lr: float, every: int, begin: int = 1
) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    taste = rng.normal(
        0, 1.2, (layers, len(DOMAINS), experts)
    )  # what a layer's experts like, once they have learned it
    drift = rng.normal(0, 1, (layers, experts))
    for step in range(begin, steps + 1):
        share = step / steps
        drift = 0.97 * drift + rng.normal(0, 0.25, (layers, experts))
        base = 2.9 + 5.4 * math.exp(-share * 14) - 0.35 * share - 60 * (lr - 1e-3)
        row: dict[str, Any] = {
            "step": step,
            "loss": base + rng.normal(0, 0.12) + (3.0 if step == steps // 2 else 0),
            "tokens_per_s": 11_500 + rng.normal(0, 300) - (6000 if step % every == 1 else 0),
            "tokens": step * 4080,
            "learning_rate": lr * min(step / 100, 0.55 + 0.45 * math.cos(math.pi * share)),
            "grad_norm": float(np.exp(rng.normal(-0.4, 0.3)) + 4 * math.exp(-share * 30)),
            "seconds": 0.35,
            "balance_loss": layers * (1.02 + 0.5 * math.exp(-share * 20) + rng.normal(0, 0.01)),
            "z_loss": 0.0,
            "dropped": 0,
            "skipped": int(step > 0.7 * steps) if seed else 0,
        }
        for layer in range(layers):
            load = _load(0.25 * (1 - share) * drift[layer] + 0.1 * taste[layer].mean(0) * share)
            row[f"router/load_max_over_mean/layer_{layer:02}"] = float(load.max() * experts)
            row[f"router/entropy/layer_{layer:02}"] = math.log(experts) * (1 - share * (0.25 + 0.1 * layer / layers))
            row[f"router/load/layer_{layer:02}"] = load.round(5).tolist()
        if step % every == 0 or step == steps:
            row |= _evaluation(base, share, taste)
        yield row


def _evaluation(base: float, share: float, taste: np.ndarray) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for number, domain in enumerate(DOMAINS):
        loss = base + 0.3 * (number - 2) * share
        row[f"eval/loss/{domain}"] = loss
        row[f"eval/bits_per_byte/{domain}"] = loss / math.log(2) / (3.2 + 0.2 * number)
        for layer, liked in enumerate(taste):
            row[f"eval/router/load/{domain}/layer_{layer:02}"] = _load(liked[number] * share).round(5).tolist()
    return row


def _load(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits)
    return powers / powers.sum()
