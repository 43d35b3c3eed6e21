"""Small mixture-of-experts blocks, adversarial routings and numpy oracles, shared by the tests of the core."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import ExpertParams, Routing, dense_moe
from moejax.config import Activation, ClampedSwiGLU
from moejax.moe.router import NOWHERE

# Machine code is made faster and runs slower; the collectives and the arithmetic are the same.
FAST = {"xla_backend_optimization_level": 0}
MESHES = [
    f"ep={ep},tp={tp}" for ep, tp in [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (4, 2), (2, 4), (8, 1), (1, 8), (3, 2)]
]


@dataclasses.dataclass(frozen=True)
class Block:
    """The static sizes of one block and its tokens."""

    tokens: int = 32
    width: int = 16
    hidden: int = 12
    experts: int = 8
    chosen: int = 2
    shared: int = 0
    gated: bool = False
    bias: bool = False
    activation: Activation = "silu"
    scales_input: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What experts do, as `moe` and `dense_moe` take it."""
        return {"activation": self.activation, "scales_input": self.scales_input}

    def params(self, seed: int = 0) -> ExpertParams:
        """Weights that keep outputs near 1."""
        e, d, f, s = self.experts, self.width, self.hidden, self.shared
        rng = np.random.default_rng(seed)
        return ExpertParams(
            gate_up=normal(rng, e, d, 2, f, scale=d**-0.5),
            down=normal(rng, e, f, d, scale=f**-0.5),
            shared_gate_up=normal(rng, d, 2, s, scale=d**-0.5) if s else None,
            shared_down=normal(rng, s, d, scale=s**-0.5) if s else None,
            shared_gate=normal(rng, d) if self.gated else None,
            gate_up_bias=normal(rng, e, 2, f) if self.bias else None,
            down_bias=normal(rng, e, d) if self.bias else None,
            shared_gate_up_bias=normal(rng, 2, s) if self.bias and s else None,
            shared_down_bias=normal(rng, d) if self.bias and s else None,
        )

    def x(self, seed: int = 1) -> jax.Array:
        return normal(np.random.default_rng(seed), self.tokens, self.width)

    def routings(self, seed: int = 2) -> dict[str, Routing]:
        """What breaks exchanges: crowds, empty experts, ties, padding, weights that are no probabilities."""
        rng = np.random.default_rng(seed)
        t, e, k = self.tokens, self.experts, self.chosen
        distinct = np.stack([rng.permutation(e)[:k] for _ in range(t)])
        few = np.stack([rng.permutation(max(k, e // 2))[:k] for _ in range(t)])
        one = np.full((t, k), NOWHERE)
        one[:, k // 2] = e - 1
        holes = np.where(rng.random((t, k)) < 0.4, NOWHERE, distinct)
        padded = np.where(np.arange(t)[:, None] < t // 3, distinct, NOWHERE)
        lone = np.full((t, k), NOWHERE)
        lone[-1] = np.arange(k)
        experts = {
            "spread": distinct,
            "ties": np.tile(np.arange(k), (t, 1)),  # equal logits everywhere choose the K lowest experts
            "last experts": np.tile(np.arange(e - k, e), (t, 1)),
            "all to one expert": one,
            "one expert K times": np.full((t, k), e - 1),  # a user's own router may
            "half of the experts": few,
            "some choices nowhere": holes,
            "mostly padding": padded,
            "one token": lone,
            "all padding": np.full((t, k), NOWHERE),
        }
        weights = normal(rng, t, k) + 1.0
        return {name: Routing(weights, jnp.asarray(chosen, jnp.int32)) for name, chosen in experts.items()}


EVEN = Block(shared=8)
# 4 and 8 cut 30 tokens unevenly; 6 experts leave slots empty; tp=4 divides neither 18 columns nor a hidden width.
ODD = Block(tokens=30, width=18, hidden=9, experts=6, chosen=3, shared=5, gated=True)
# GPT-OSS and Llama 4, but for biases and for shared experts (whose biases are Ernie 4.5's) that they lack. The limit is
# low enough to clamp.
CLAMPED = dataclasses.replace(ODD, bias=True, activation=ClampedSwiGLU(alpha=1.702, limit=0.7))
SCALED = dataclasses.replace(EVEN, bias=True, scales_input=True)


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape) * scale, jnp.float32)


def relative(got: Any, want: Any) -> float:
    """max |a - b| / max |b|; the absolute error where b is zero throughout."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    return float(np.abs(got - want).max() / (np.abs(want).max() or 1.0))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """jit that compiles quickly."""
    return jax.jit(function, compiler_options=FAST)


oracle = compiled(dense_moe)


@functools.cache
def oracle_of(block: Block) -> Callable[..., Any]:
    """The oracle of what the block's experts do."""
    return compiled(functools.partial(dense_moe, **block.options))


def capacity_of(tokens: int, block: Block, factor: float) -> int:
    """GShard's rows for one expert at one sender of `tokens` tokens."""
    return max(1, min(tokens, math.ceil(factor * tokens * block.chosen / block.experts)))


def keep_first(routing: Routing, senders: int, capacity: int) -> tuple[Routing, int]:
    """GShard by hand: each sender walks over its tokens in order; an expert with `capacity` pairs takes no more.

    Returns:
      The routing without the dropped pairs, and how many they are.
    """
    experts = np.asarray(routing.experts).copy()
    per_sender = -(-len(experts) // senders)
    dropped = 0
    for sender in range(senders):
        used: dict[int, int] = {}
        for token in range(sender * per_sender, min((sender + 1) * per_sender, len(experts))):
            for k, expert in enumerate(experts[token]):
                if expert == NOWHERE:
                    continue
                used[expert] = used.get(expert, 0) + 1
                if used[expert] > capacity:
                    experts[token, k] = NOWHERE
                    dropped += 1
    return Routing(routing.weights, jnp.asarray(experts)), dropped


def cell_rows(tokens: int, chosen: int, ep: int, chunks: int) -> int:
    """The documented capacity of an exact cell: 1.5 times the even share, never more than all pairs."""
    return max(1, min(math.ceil(1.5 * tokens * chosen / (ep * chunks)), tokens * chosen))


def waves_of(routing: Routing, block: Block, ep: int, chunks: int = 1) -> int:
    """How often the exchange must run, counted pair by pair."""
    experts = np.asarray(routing.experts)
    tokens = -(-len(experts) // ep)
    slots = -(-block.experts // ep) // chunks
    cells: dict[tuple[int, int], int] = {}
    for token, chosen in enumerate(experts):
        for expert in chosen[chosen != NOWHERE]:
            cell = (token // tokens, expert // slots)
            cells[cell] = cells.get(cell, 0) + 1
    rows = cell_rows(tokens, block.chosen, ep, chunks)
    return max(1, math.ceil(max(cells.values(), default=0) / rows))
