"""Routers: which experts a token goes to, and with which weights."""

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moejax.config import MoEConfig

NOWHERE = -1
"""The expert id of a choice that goes to no expert (padding)."""


@struct.dataclass
class Routing:
    """The decision for T tokens; leading axes may also be (B, S).

    Attributes:
      weights: what each chosen expert's output is multiplied by, f32.
      experts: chosen experts, int32 in [0, E), or NOWHERE. The experts of one token are distinct.
    """

    weights: Float[Array, "*T K"]
    experts: Int[Array, "*T K"]

    def only(self, keep: Bool[Array, "*T"]) -> "Routing":
        """The same routing with the tokens that are not kept (padding) sent nowhere, at weight 0."""
        keep = keep[..., None]
        return Routing(
            weights=jnp.where(keep, self.weights, jnp.zeros((), self.weights.dtype)),
            experts=jnp.where(keep, self.experts, jnp.int32(NOWHERE)),
        )


Router: TypeAlias = Callable[[Float[Array, "*T E"]], Routing]
"""Anything that turns router logits (f32) into a Routing."""


@functools.cache  # equal settings give the same object, so that models of one shape share compiled programs
def softmax_router(num_experts_per_tok: int, *, renormalise: bool = True) -> Router:
    """The router of Mixtral, Qwen-MoE and OLMoE: softmax over all experts, then the K most probable.

    All of it is f32. Exact ties go to the expert of the lower index.

    Args:
      num_experts_per_tok: K.
      renormalise: divide the K weights by their sum (`norm_topk_prob`; Mixtral always does).

    Source: Jiang et al. 2024, "Mixtral of Experts", section 2.1, as transformers computes it (`MixtralTopKRouter`).
    """

    def route(logits: Float[Array, "*T E"]) -> Routing:
        probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        weights, experts = _largest(probabilities, num_experts_per_tok)
        if renormalise:
            weights = weights / weights.sum(-1, keepdims=True)
        return Routing(weights=weights, experts=experts)

    return route


def _largest(scores: Float[Array, "*T E"], count: int) -> tuple[Float[Array, "*T K"], Int[Array, "*T K"]]:
    """The largest scores, in order, and their indices.

    Not `lax.top_k`, which the compiler does not cut over devices: it would gather the scores of all tokens first.
    """
    experts = jnp.zeros_like(scores, jnp.int32) + jnp.arange(scores.shape[-1], dtype=jnp.int32)  # cut as the scores are
    keys = -lax.stop_gradient(scores)
    _, order = lax.sort((keys, experts), dimension=scores.ndim - 1, is_stable=True, num_keys=1)
    chosen = order[..., :count]
    return jnp.take_along_axis(scores, chosen, -1), chosen


def router_for(config: MoEConfig) -> Router:
    """The router that a model's config describes."""
    return softmax_router(config.num_experts_per_tok, renormalise=config.router.renormalise)
