"""Shapes of attention that no tile divides, rules of who sees what, and shapes of published models."""

import jax.numpy as jnp
import numpy as np
from moe_cases import normal

from moejax.kernels.attention.sight import Keys, queries_at

# Rows, queries, keys, query heads, key/value heads, widths: no tile divides these.
SHAPES = {
    "a prompt": (2, 70, 70, 4, 2, 16, 8),
    "six heads share a key": (1, 40, 90, 6, 1, 24, 40),
    "a token over a long cache": (2, 1, 700, 4, 2, 16, 16),
    "a token of more heads than rows": (2, 1, 90, 70, 1, 36, 36),
}
WINDOW, CHUNK = {"window": 30, "sinks": True, "packed": True}, {"chunk": 32, "packed": True}
CASES = [
    ("a prompt", {}),
    ("a prompt", CHUNK),
    ("six heads share a key", WINDOW),
    ("a token over a long cache", {"sinks": True}),
    ("a token over a long cache", WINDOW),
    ("a token of more heads than rows", CHUNK),
]


def sight(shape, rule):
    """Places as in a ring with a few empty places, and padding among the queries; the last query sees most."""
    rows, length, room = shape[:3]
    k_places = np.roll(np.where(np.arange(room) < 5, -1, np.arange(room)), room // 3)
    q_places = np.arange(room - length, room)
    q_places[: length // 9] = -1
    q_places, k_places = (jnp.tile(jnp.asarray(x, jnp.int32), (rows, 1)) for x in (q_places, k_places))
    q_segments, k_segments = (jnp.maximum(x, 0) // 50 if rule.get("packed") else None for x in (q_places, k_places))
    return queries_at(q_places, q_segments, rule.get("window"), rule.get("chunk")), Keys(k_places, k_segments)


def inputs(shape, dtype):
    rows, length, room, heads, groups, width, value = shape
    rng = np.random.default_rng(0)
    shapes = ((rows, length, heads, width), (rows, groups, room, width), (rows, groups, room, value), (heads,))
    return [normal(rng, *s).astype(dtype) for s in shapes]


# What real models bring: grouped heads with sinks, latent attention written out and over latents.
PROGRAMS = {
    "prefill": (1, 8192, 8192, 16, 4, 128, 128),
    "decode": (8, 1, 4096, 64, 8, 64, 64),
    "latent prefill": (1, 8192, 8192, 4, 4, 192, 128),
    "latent decode": (8, 1, 4096, 128, 1, 576, 576),
}
