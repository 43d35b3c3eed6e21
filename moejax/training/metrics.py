"""What a step is called in every sink: one flat record a step, names with slashes, layers by two digits.

    step, loss, tokens_per_s, tokens, seconds, learning_rate, grad_norm, balance_loss, z_loss, dropped, skipped, mfu,
    bad_layer
    router/load_max_over_mean/layer_07, router/entropy/layer_07, router/load/layer_07
    eval/loss/<name>, eval/bits_per_byte/<name>, eval/router/load/<name>/layer_07

`tokens` are the targets learned so far, `seconds` those of this step, losses in nats. `router/load` is a list, the
share of each expert in a layer's pairs, and is in metrics.jsonl alone. `mfu` is there where the recipe states a peak,
`eval/` where the step was followed by an evaluation, `bad_layer` where a loss or gradient was not finite: the first
layer that shows it, or -1. A value that is not finite is null in JSON.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from moejax.config import ModelConfig
from moejax.evaluation.results import Result

Record: TypeAlias = dict[str, Any]


def layer_name(index: int) -> str:
    """Such as "layer_07"."""
    return f"layer_{index:02}"


def router_record(config: ModelConfig, tokens_per_expert: np.ndarray, entropy: np.ndarray) -> Record:
    """The router's part of a record.

    Args:
      config: of the model; row i of the arrays is its i-th layer with experts.
      tokens_per_expert: pairs, `[L, E]`; a layer of fewer experts is filled up.
      entropy: of the router's choice, mean over tokens, in nats, `[L]`.
    """
    record: Record = {}
    for row, index in enumerate(config.sparse):
        moe, name = config.layers[index].moe, layer_name(index)
        assert moe is not None
        pairs = tokens_per_expert[row, : moe.num_experts]
        share = pairs / max(pairs.sum(), 1)
        record[f"router/load_max_over_mean/{name}"] = float(share.max() * share.size)
        record[f"router/entropy/{name}"] = float(entropy[row])
        record[f"router/load/{name}"] = [round(value, 6) for value in share.tolist()]
    return record


def worst_load(record: Mapping[str, Any]) -> float:
    """The largest `router/load_max_over_mean` of all layers; 0 without sparse layers."""
    return max((v for name, v in record.items() if name.startswith("router/load_max_over_mean/")), default=0.0)


def eval_record(config: ModelConfig, results: Sequence[Result]) -> Record:
    """An evaluation's part of a record."""
    record: Record = {}
    for result in results:
        record[f"eval/loss/{result.name}"] = result.loss
        record[f"eval/bits_per_byte/{result.name}"] = result.bits_per_byte
        for index, shares in zip(config.sparse, result.as_json(config)["load"], strict=True):
            record[f"eval/router/load/{result.name}/{layer_name(index)}"] = [round(share, 6) for share in shares]
    return record
