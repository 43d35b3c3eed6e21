"""Random weights on which nothing is neutral and nothing decides alone.

Activations stay near 1, router logits spread about 1, logits 1 to 3; norms, biases, sinks and scales are off their
neutral values. A config's multipliers (of embeddings, branches, scores, logits) are made up for, or one of them would
hide the rest. Values come from numpy's RandomState, whose stream is frozen, by seed and tensor name: the same on every
machine.
"""

import math
import zlib
from collections.abc import Callable
from functools import partial

import numpy as np

from moejax.checkpoint.pieces import Piece, Plan
from moejax.config import AttentionConfig, ClampedSwiGLU, LatentAttentionConfig, LayerConfig, ModelConfig, MoEConfig

Law = Callable[[np.ndarray], np.ndarray]
"""Makes a parameter's values from standard normal ones."""

_LOGITS = 2.0
_SCORES = 2.0


def tensor_values(config: ModelConfig, plan: Plan, seed: int) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, in float32.

    Args:
        config: the model.
        plan: of the model on any mesh. It says which parameter each part of a tensor is, and that, not the tensor's
            name, decides how its values are spread.
        seed: from 0.
    """
    normal = {name: _normal(name, shape, seed) for name, shape in plan.shapes.items()}
    values = {name: array.copy() for name, array in normal.items()}
    for role, pieces in plan.pieces.items():
        for piece in pieces:
            law = _law(config, role, _inputs(piece, plan.shapes[piece.tensor]))
            values[piece.tensor][piece.source] = law(normal[piece.tensor][piece.source])
    return {name: array.astype(np.float32) for name, array in values.items()}


def _normal(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode())).standard_normal(shape)


def _inputs(piece: Piece, shape: tuple[int, ...]) -> int:
    """How many values each output of a matrix sums: tensors are [out, in], or where nothing is transposed [in, out]."""
    return shape[-1] if piece.transpose or len(shape) == 1 else shape[-2]


def _law(config: ModelConfig, role: str, inputs: int) -> Law:
    *path, name = role.split(".")
    layer = config.layers[int(path[1])] if path[:1] == ["layers"] else None
    if layer is None:
        return _end_law(config, role)
    around = partial(_around, centre=_norm_centre(config, layer, path[-1], name))
    if name == "A_log":
        return lambda normal: np.log(0.3 * np.abs(normal) + 0.02)
    if name == "correction":
        return lambda normal: 0.1 * normal
    if name == "sinks":
        return lambda normal: normal
    if name.endswith("bias"):
        return lambda normal: 0.2 * normal
    if name.endswith(("weight", "norm", "scale")):
        return partial(around, factor=_norm_factor(config, layer, path[-1], name))
    gain = _gain(config, layer, path[-1], name)
    return lambda normal: gain * normal / math.sqrt(_fan_in(name, normal, inputs))


def _end_law(config: ModelConfig, role: str) -> Law:
    """Of the embedding, the head and the last norm."""
    if role == "embed" and not config.tie_word_embeddings:
        return lambda normal: normal / config.embedding_scale
    if role in ("embed", "lm_head"):
        return lambda normal: _head_gain(config) * normal
    if role.endswith("bias"):
        return lambda normal: 0.2 * normal
    return partial(_around, centre=_centre(config))


def _around(normal: np.ndarray, centre: float, factor: float = 1.0) -> np.ndarray:
    return factor * (1 + 0.3 * normal) + centre - 1


def _centre(config: ModelConfig) -> float:
    return 0.0 if config.norm.kind == "rms_plus_one" else 1.0


def _norm_centre(config: ModelConfig, layer: LayerConfig, part: str, name: str) -> float:
    """A norm's neutral weight. Norms inside latent and linear attention are of their own kind, plain; so are scales."""
    own = part == "attention" and not isinstance(layer.mixer, AttentionConfig)
    return 1.0 if own or name.endswith("scale") else _centre(config)


def _norm_factor(config: ModelConfig, layer: LayerConfig, part: str, name: str) -> float:
    if name == "q_norm":
        return _sharpness(layer)
    return _branch(config) if part in ("attention_out_norm", "out_norm") else 1.0


def _sharpness(layer: LayerConfig) -> float:
    """What queries are multiplied by for scores that spread by _SCORES, keys being near 1."""
    mixer = layer.mixer
    if isinstance(mixer, AttentionConfig):
        return _SCORES / (math.sqrt(mixer.head_dim) * (mixer.scale or mixer.head_dim**-0.5))
    if isinstance(mixer, LatentAttentionConfig):
        return _SCORES / (math.sqrt(mixer.nope_dim + mixer.rope.dim) * mixer.scale)
    return 1.0


def _gain(config: ModelConfig, layer: LayerConfig, part: str, name: str) -> float:
    """What a matrix makes of inputs near 1."""
    mixer = layer.mixer
    if part == "attention":
        if name == "o":
            return 1.5 * _branch(config)
        normed = isinstance(mixer, AttentionConfig) and mixer.qk_norm != "none"
        return _sharpness(layer) if name in ("q", "q_b") and not normed else 1.0
    if name == "router" and layer.side_by_side:
        return math.sqrt(config.hidden_size)  # of an input over as much
    activation = layer.moe.activation if layer.moe is not None else config.activation
    if name == "gate_up":
        return _reach(activation)
    if name == "down":
        return 3 * _branch(config) / _reach(activation) / (_weights(layer.moe) if part == "moe" else 1.0)
    return 1.0


def _reach(activation: object) -> float:
    """Gate and up, for an activation with limits so large that some values meet them."""
    return max(1.0, activation.limit / 2) if isinstance(activation, ClampedSwiGLU) else 1.0


def _weights(moe: MoEConfig | None) -> float:
    return 1.0 if moe is None else max(1.0, moe.router.scale)


def _branch(config: ModelConfig) -> float:
    """What a branch has to add to be seen in the stream.

    Tied embeddings that were still loud at the end would find themselves: each token would follow itself.
    """
    stream = 4 * _head_gain(config) * config.embedding_scale if config.tie_word_embeddings else 1.0
    return max(1.0, stream) / config.residual_scale


def _head_gain(config: ModelConfig) -> float:
    return _LOGITS / config.logits_scale / math.sqrt(config.hidden_size)


def _fan_in(name: str, normal: np.ndarray, inputs: int) -> int:
    """Of a convolution its kernel, of a single row its length."""
    return normal.shape[-1] if name.startswith("conv") or name == "shared_gate" else inputs
