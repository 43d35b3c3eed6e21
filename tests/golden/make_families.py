"""Makes the golden files of `tiny_families`: what transformers computes for each family's first config, in float32.

Run from the tests folder, with the `parity` extra installed: `python -m golden.make_families [NAME ...]`. The parity
suite calls `compute` again, for every config, with the transformers that is installed then.

Weights are those of `moejax.twins`. What transformers gives, and when a seed is refused, is as in `golden.make`.

Arrays of NAME.npz (S = 28, longer than any window; 3 prompts of 1, 9 and 23 tokens, 48 new tokens):

| key                | shape             | what                                                                    |
|--------------------|-------------------|-------------------------------------------------------------------------|
| seed               | []                | of the weights                                                          |
| tokens             | [2, S]            | a full batch                                                            |
| logits             | [S + 4, V]        | row 0, then the last 4 positions of row 1                               |
| router_logits_{i}  | [2 * S, E]        | of the i-th sparse layer, as transformers records them                  |
| routed_experts_{i} | [2 * S, K]        | in no particular order                                                  |
| hidden_states      | [layers + 1, 7, D]| every fourth position of row 0; see `golden.make` for which             |
| prompts            | [33]              | the three prompts, one after the other                                  |
| greedy             | [3, 48]           | each prompt generated alone, with the KV cache                          |
| masked             | [5, V]            | under `left_mask`: row 0's last token, four positions of row 1          |
"""

import sys
import tempfile
import zlib
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_families import CONFIGS, FIRST, gives_probabilities
from transformers import PreTrainedModel

from golden.make import PROMPT_LENGTHS, TIE, VARIETY, forward, greedy, load_reference, record_routing
from moejax import make_mesh
from moejax.config import ModelConfig
from moejax.families import read_config, text_config
from moejax.moe.ties import decision_margin
from moejax.opening import checkpoint_plan
from moejax.twins.weights import tensor_values
from moejax.twins.writing import write_checkpoint

FOLDER = Path(__file__).parent / "families"
LENGTH, NEW_TOKENS = 28, 48
SHOWN = (9, 12, 20, 27)
"""The positions of row 1 that `masked` holds."""


def left_mask() -> np.ndarray:
    """An attention mask [2, S]: row 0 has no padding, row 1 starts with nine tokens of it."""
    mask = np.ones((2, LENGTH), np.int64)
    mask[1, :9] = 0
    return mask


def without_end(raw: dict[str, Any]) -> dict[str, Any]:
    """The config without end-of-sequence tokens, so that all new tokens come."""
    inner = {"text_config": without_end(raw["text_config"])} if "text_config" in raw else {}
    return {**raw, "eos_token_id": None, **inner}


def reference(name: str, seed: int) -> PreTrainedModel:
    """The text model in transformers."""
    with tempfile.TemporaryDirectory() as folder:
        raw = without_end(dict(text_config(CONFIGS[name])))
        return load_reference(write_checkpoint(Path(folder, "checkpoint"), raw, seed).folder)


def batches(name: str, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """A batch [2, S] and three prompts of random tokens."""
    random = np.random.RandomState(zlib.crc32(f"{name} tokens {seed}".encode()))
    vocabulary = read_config(CONFIGS[name]).vocab_size
    return random.randint(0, vocabulary, (2, LENGTH)), [random.randint(0, vocabulary, n) for n in PROMPT_LENGTHS]


def compute(name: str, seed: int) -> tuple[dict[str, np.ndarray], float]:
    """The arrays of NAME.npz, and the smallest margin met, of a choice of experts or of a token."""
    model, (tokens, prompts) = reference(name, seed), batches(name, seed)
    with record_routing(model) as calls:
        out = forward(model, tokens, output_hidden_states=True)
        routing = list(calls)
        masked = forward(model, tokens, attention_mask=left_mask()).logits
        del calls[len(routing) :]  # padding may tie
        generated = [greedy(model, prompt, NEW_TOKENS) for prompt in prompts]
    arrays = {
        "seed": np.array(seed),
        "tokens": tokens,
        "logits": np.concatenate([out.logits[0], out.logits[1, -4:]]),
        "hidden_states": np.stack([hidden[0, ::4] for hidden in out.hidden_states]),
        "prompts": np.concatenate(prompts),
        "greedy": np.stack([ids for ids, _ in generated]),
        "masked": np.concatenate([masked[0, -1:], masked[1, list(SHOWN)]]),
    }
    for index, (logits, experts) in enumerate(routing):
        arrays |= {f"router_logits_{index}": logits, f"routed_experts_{index}": experts}
    margins = [margin.min() for _, margin in generated]
    return arrays, float(min([*margins, *_routing_margins(name, seed, calls)]))


def _routing_margins(name: str, seed: int, calls: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """The smallest margin of each call; calls go through the sparse layers again and again."""
    config = read_config(CONFIGS[name])
    corrections = _corrections(config, seed)
    margins = []
    for index, (logits, _) in enumerate(calls):
        layer = config.sparse[index % len(config.sparse)]
        if gives_probabilities(name):
            logits = np.log(logits)
        margins.append(float(decision_margin(config.layers[layer].moe, logits, corrections.get(layer)).min()))
    return margins


def _corrections(config: ModelConfig, seed: int) -> dict[int, np.ndarray]:
    plan = checkpoint_plan(config, make_mesh("ep=1,tp=1"))
    values = tensor_values(config, plan, seed)
    pieces = {layer: plan.pieces.get(f"layers.{layer}.moe.correction", ()) for layer in config.sparse}
    return {layer: values[piece.tensor][piece.source].reshape(-1) for layer, found in pieces.items() for piece in found}


def settle(name: str) -> dict[str, np.ndarray]:
    """The arrays of the first seed that is taken."""
    for seed in count():
        arrays, least = compute(name, seed)
        variety = min(len(set(row)) for row in arrays["greedy"].tolist())
        taken = least > TIE and variety >= VARIETY
        print(f"{name}: seed {seed} {'taken' if taken else 'refused'}, margin {least:.1e}, {variety} different tokens")
        if taken:
            return arrays
    raise AssertionError("count() ended")


def make(name: str) -> None:
    arrays = settle(name)
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.npz"
    small = {key: value.astype(np.int16) if value.dtype == np.int64 else value for key, value in arrays.items()}
    np.savez_compressed(path, **small)
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for config in sys.argv[1:] or FIRST:
        make(config)
