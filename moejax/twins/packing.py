"""Packs the weights that a quantised checkpoint would hold packed, in the form its config names."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.checkpoint.pieces import Plan
from moejax.quantization import fp8, mxfp4

# Matrices of layers that stay as they are in every published checkpoint.
_LEFT = frozenset({"router", "shared_gate"})


def packed(tensors: Mapping[str, np.ndarray], plan: Plan, config: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
    """The tensors as `quantization_config` says: MXFP4 for stacked experts, FP8 in blocks for layers' matrices."""
    result = dict(tensors)
    if config is None:
        return result
    method = config["quant_method"]
    for name in _matrices(plan):
        if method == "mxfp4" and tensors[name].ndim == 3:
            values = result.pop(name).astype(np.float32).swapaxes(-1, -2)
            result[f"{name}_blocks"], result[f"{name}_scales"] = mxfp4.pack(values)
        elif method == "fp8" and not _spared(name, config):
            values = tensors[name].astype(np.float32)
            result[name], result[f"{name}_scale_inv"] = fp8.quantise(values, tuple(config["weight_block_size"]))
    return result


def _matrices(plan: Plan) -> list[str]:
    """The tensors of layers that are matrices, or stacks of them, and not left as they are."""
    found = {}
    for role, pieces in plan.pieces.items():
        if role.startswith("layers.") and role.rpartition(".")[2] not in _LEFT:
            found |= {p.tensor: None for p in pieces if len(p.source) > 1 and not p.dropped}
    return list(found)


def _spared(name: str, config: Mapping[str, Any]) -> bool:
    module = name.removesuffix(".weight")
    return any(
        module == other or module.startswith(f"{other}.") for other in config.get("modules_to_not_convert") or ()
    )
