"""Makes the golden files: what transformers computes for each tiny checkpoint of `tiny.CONFIGS`, in float32.

Run from the tests folder, with the `parity` extra installed: `python -m golden.make [NAME ...]`. The parity suite calls
`compute` again, with the transformers that is installed then.

What transformers 5 gives with output_router_logits=True and output_hidden_states=True:

- `router_logits`: a tuple, one entry for each *sparse* layer in order (dense layers have none), each [B * S, E], before
  the softmax, in the model's dtype.
- `hidden_states`: a tuple of num_layers + 1 entries [B, S, D]: the embeddings, then the residual stream after each
  layer, except that the last entry is after the final norm (it is `last_hidden_state`).
- No chosen experts: `routed_experts` here are recorded from the routers, [B * S, K], best first.

Without position_ids, forward numbers positions 0..S-1 whatever attention_mask says; generate numbers the unmasked
tokens.

Arrays of NAME.npz (L sparse layers, S = 40, 3 prompts of 1, 9 and 23 tokens, 64 new tokens):

| key                | shape                       | what                                                       |
|--------------------|-----------------------------|------------------------------------------------------------|
| seed               | []                          | of `tiny.write_checkpoint`                                 |
| tokens             | [2, S]                      | a full batch                                               |
| logits             | [S + 4, V]                  | row 0, then the last 4 positions of row 1                  |
| router_logits      | [L, 2 * S, E]               |                                                            |
| routed_experts     | [L, 2 * S, K]               | best first                                                 |
| hidden_states      | [num_layers + 1, S / 4, D]  | every fourth position of row 0                             |
| prompts            | [33]                        | the three prompts, one after the other                     |
| prompt_lengths     | [3]                         |                                                            |
| greedy             | [3, 64]                     | each prompt generated alone, with the KV cache             |
| margins            | [3, 64]                     | (best - second) / largest abs(logit) at each step          |
| mask_tokens        | [2, 12]                     | row 0 has no padding; row 1 is padded as a variant says    |
| mask_{variant}     | [12]                        | attention_mask of row 1 (variants: `mask_variants`)        |
| positions_{variant}| [12]                        | position_ids of row 1, where the variant passes them       |
| masked_{variant}   | [1 + unmasked, V]           | logits of row 0's last token, then row 1's unmasked tokens |

A seed is taken only if nothing in it is a tie (`TIE`), in routing or in greedy choice, so that tests compare exactly,
and if each generated sequence has at least `VARIETY` different tokens: a short cycle forgives mistakes.
"""

import copy
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import CONFIGS, write_checkpoint
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

FOLDER = Path(__file__).parent
LENGTH, NEW_TOKENS, PROMPT_LENGTHS = 40, 64, (1, 9, 23)
TIE = 3e-5
VARIETY = 12

torch.set_num_threads(2)
torch.set_grad_enabled(False)


def load_reference(folder: Path) -> PreTrainedModel:
    """The checkpoint in transformers, f32; its grouped matmuls refuse widths that are not multiples of 4, so eager."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    problems = {key: value for key, value in info.items() if value}
    if problems:
        raise RuntimeError(f"transformers did not load {folder} cleanly: {problems}")
    return model.eval()


def fresh(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that has seen no sequence: dynamic rope remembers the longest one."""
    return copy.deepcopy(model)


@contextmanager
def record_routing(model: PreTrainedModel) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Collects (router logits [T, E], chosen experts [T, K]) of each mixture-of-experts block that runs.

    Logits are what transformers itself records for output_router_logits; choices are what the experts are told. Llama
    4's are told nothing (each gets all tokens, most of them multiplied by zero): there the largest logits choose.
    """
    recorder = _router_recorder(model)
    logits: list[np.ndarray] = []
    calls: list[tuple[np.ndarray, np.ndarray]] = []

    def router(_module: Any, _inputs: Any, out: Any) -> None:
        logits.append(out[recorder.index].reshape(-1, out[recorder.index].shape[-1]).numpy())

    def experts(_module: Any, inputs: tuple[Any, ...]) -> None:
        if len(inputs) > 1:
            chosen = inputs[1].numpy()
        else:
            chosen = np.argsort(-logits[-1], axis=-1)[:, : model.config.num_experts_per_tok]
        calls.append((logits.pop(), chosen))

    modules = list(model.modules())
    hooks = [m.register_forward_hook(router) for m in modules if isinstance(m, recorder.target_class)]
    hooks += [m.register_forward_pre_hook(experts) for m in modules if type(m).__name__.endswith("Experts")]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _router_recorder(model: PreTrainedModel) -> Any:
    recorded = (getattr(module, "_can_record_outputs", None) or {} for module in model.modules())
    return next(outputs["router_logits"] for outputs in recorded if "router_logits" in outputs)


def forward(model: PreTrainedModel, tokens: np.ndarray, **options: Any) -> Any:
    """transformers' output for int tokens [B, S], from a fresh copy; array options become tensors."""
    tensors = {key: torch.tensor(value) if isinstance(value, np.ndarray) else value for key, value in options.items()}
    return fresh(model)(torch.tensor(tokens), **tensors)


def greedy(model: PreTrainedModel, prompt: np.ndarray, new_tokens: int = NEW_TOKENS) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [N] and margins [N] of one prompt alone, past any end-of-sequence token."""
    model = fresh(model)
    model.generation_config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    ids = torch.tensor(prompt)[None]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), output_logits=True, return_dict_in_generate=True)
    logits = torch.cat(out.logits).numpy()
    best = np.sort(logits, axis=-1)[:, -2:]
    return out.sequences[0, len(prompt) :].numpy(), (best[:, 1] - best[:, 0]) / np.abs(logits).max(axis=-1)


def mask_variants() -> dict[str, tuple[np.ndarray, bool]]:
    """Name -> (attention_mask [2, 12], whether position_ids that skip the padding are passed)."""
    right, left, hole = (np.ones((2, 12), np.int64) for _ in range(3))
    right[1, 7:] = 0
    left[1, :5] = 0
    hole[1, 3:5] = 0
    return {"right": (right, False), "left": (left, False), "left_positions": (left, True), "hole": (hole, False)}


def compute(name: str, seed: int) -> tuple[dict[str, np.ndarray], float]:
    """The arrays of NAME.npz, and the smallest routing margin met (relative to the largest score)."""
    raw = CONFIGS[name]
    random = np.random.RandomState(zlib.crc32(f"{name} tokens {seed}".encode()))
    with tempfile.TemporaryDirectory() as folder:
        model = load_reference(write_checkpoint(Path(folder), raw, seed))
    tokens = random.randint(0, raw["vocab_size"], (2, LENGTH))
    prompts = [random.randint(0, raw["vocab_size"], length) for length in PROMPT_LENGTHS]
    with record_routing(model) as calls:
        out = forward(model, tokens, output_router_logits=True, output_hidden_states=True)
        forward_calls = list(calls)
        generated = [greedy(model, prompt) for prompt in prompts]
        masked = _masked(model, random.randint(0, raw["vocab_size"], (2, 12)))
    arrays = {
        "seed": np.array(seed),
        "tokens": tokens,
        "logits": np.concatenate([out.logits[0], out.logits[1, -4:]]),
        "router_logits": np.stack(out.router_logits),
        "routed_experts": np.stack([experts for _, experts in forward_calls]),
        "hidden_states": np.stack([hidden[0, ::4] for hidden in out.hidden_states]),
        "prompts": np.concatenate(prompts),
        "prompt_lengths": np.array(PROMPT_LENGTHS),
        "greedy": np.stack([ids for ids, _ in generated]),
        "margins": np.stack([margin for _, margin in generated]),
    } | masked
    return arrays, min(routing_margin(*call) for call in calls)


def _masked(model: PreTrainedModel, tokens: np.ndarray) -> dict[str, np.ndarray]:
    arrays = {"mask_tokens": tokens}
    for variant, (mask, with_positions) in mask_variants().items():
        positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
        options = {"attention_mask": mask} | ({"position_ids": positions} if with_positions else {})
        logits = forward(model, tokens, **options).logits.numpy()
        arrays[f"mask_{variant}"] = mask[1]
        arrays[f"masked_{variant}"] = np.concatenate([logits[0, -1:], logits[1, mask[1] == 1]])
        if with_positions:
            arrays[f"positions_{variant}"] = positions[1]
    return arrays


def routing_margin(logits: np.ndarray, experts: np.ndarray) -> float:
    """Smallest (k-th - next score) / best score over the tokens of one router call; inf when all experts are chosen."""
    if experts.shape[-1] == logits.shape[-1]:
        return np.inf
    scores = np.sort(np.exp(logits - logits.max(axis=-1, keepdims=True)), axis=-1)[:, ::-1]
    top_k = experts.shape[-1]
    return float((scores[:, top_k - 1] - scores[:, top_k]).min())


def make(name: str) -> None:
    for seed in count():
        arrays, margin = compute(name, seed)
        least = min(margin, arrays["margins"].min())
        variety = min(len(set(row)) for row in arrays["greedy"].tolist())
        if least > TIE and variety >= VARIETY:
            break
        print(f"{name}: seed {seed} refused: least margin {least:.1e}, {variety} different tokens")
    path = FOLDER / f"{name}.npz"
    small = {key: value.astype(np.int16) if value.dtype == np.int64 else value for key, value in arrays.items()}
    np.savez_compressed(path, **small)
    print(f"{name}: seed {seed}, least margin {least:.1e}, {variety} different tokens, {path.stat().st_size} bytes")


if __name__ == "__main__":
    for config in sys.argv[1:] or CONFIGS:
        make(config)
