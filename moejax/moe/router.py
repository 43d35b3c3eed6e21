"""Routers: which experts a token goes to, and with which weights."""

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moejax.config import MoEConfig, RouterConfig
from moejax.errors import MoejaxError

NOWHERE = -1
"""The expert id of a choice that goes to no expert (padding)."""

_FEW = 8
"""Tokens that a sort takes less time for than several passes."""


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


Router: TypeAlias = Callable[..., Routing]
"""Anything that turns router logits (f32, `[*T, E]`) into a Routing; learned parts come as keywords, each `[E]`."""


def router_for(config: MoEConfig) -> Router:
    """The router that a config describes; the steps are those of `RouterConfig`, all of them in f32.

    Returns:
      `route(logits, correction=..., expert_scale=...)`, with those keywords that the config asks for.

    Raises:
      MoejaxError: "sparsemixer" for other than two experts a token; at a call, a learned part that is missing or that
        the config has no use for.
    """
    return _router(config.router, config.num_experts_per_tok)


def softmax_router(num_experts_per_tok: int, *, renormalise: bool = True) -> Router:
    """The router of Mixtral, Qwen-MoE and OLMoE: softmax over all experts, then the K most probable.

    All of it is f32. Exact ties go to the expert of the lower index.

    Args:
      num_experts_per_tok: K.
      renormalise: divide the K weights by their sum (`norm_topk_prob`; Mixtral always does).

    Source: Jiang et al. 2024, "Mixtral of Experts", section 2.1, as transformers computes it (`MixtralTopKRouter`).
    """
    return _router(RouterConfig(renormalise=renormalise), num_experts_per_tok)


def selection_scores(
    config: MoEConfig, logits: Float[Array, "*T E"], correction: Float[Array, " E"] | None = None
) -> Float[Array, "*T E"]:
    """What the K largest are chosen by, f32: correction added, groups that are not kept masked.

    For "sparsemixer" these are the logits. Its weights also jump where the best two change places, and any router with
    groups where two groups do; `decision_margin` sees all of these.
    """
    return _scores(config.router, logits, correction)[1]


@functools.cache  # equal settings give the same object, so that models of one shape share compiled programs
def _router(steps: RouterConfig, count: int) -> Router:
    if steps.score == "sparsemixer" and count != 2:
        raise MoejaxError(f"the sparsemixer router chooses 2 experts for each token, not num_experts_per_tok={count}")

    def route(
        logits: Float[Array, "*T E"],
        *,
        correction: Float[Array, " E"] | None = None,
        expert_scale: Float[Array, " E"] | None = None,
    ) -> Routing:
        scores, selection = _scores(steps, logits, correction)
        chosen = largest(selection, count)
        if steps.score == "sparsemixer":
            weights = _sparsemixer_weights(scores, chosen, steps.jitter)
        else:
            weights = _weights(steps, jnp.take_along_axis(scores, chosen, -1))
        _check_learned("expert_scale", steps.expert_scale, expert_scale)
        if expert_scale is not None:
            everywhere = jnp.zeros_like(scores) + expert_scale.astype(jnp.float32)  # cut as the scores are
            weights = weights * jnp.take_along_axis(everywhere, chosen, -1)
        return Routing(weights=weights, experts=chosen)

    return route


def _scores(
    steps: RouterConfig, logits: Float[Array, "*T E"], correction: Float[Array, " E"] | None
) -> tuple[Float[Array, "*T E"], Float[Array, "*T E"]]:
    """Scores to weigh by, and scores to select by. An expert of a group that is not kept weighs 0."""
    scores, selection = plain_scores(steps, logits, correction)
    if steps.groups == 1:
        return scores, selection
    best = largest(group_worth(steps, selection), steps.kept_groups)[..., None]
    kept = (best == jnp.arange(steps.groups, dtype=jnp.int32)).any(-2)
    kept = jnp.repeat(kept, scores.shape[-1] // steps.groups, axis=-1)
    return jnp.where(kept, scores, 0.0), jnp.where(kept, selection, steps.masked_score)


def plain_scores(
    steps: RouterConfig, logits: Float[Array, "*T E"], correction: Float[Array, " E"] | None
) -> tuple[Float[Array, "*T E"], Float[Array, "*T E"]]:
    """The same before groups are looked at."""
    _check_learned("correction", steps.correction, correction)
    logits = logits.astype(jnp.float32)
    match steps.score:
        case "softmax":
            scores = jax.nn.softmax(logits, axis=-1)
        case "sigmoid":
            scores = jax.nn.sigmoid(logits)
        case "none" | "sparsemixer":
            scores = logits
    selection = lax.stop_gradient(scores)
    return scores, selection if correction is None else selection + correction.astype(jnp.float32)


def group_worth(steps: RouterConfig, selection: Float[Array, "*T E"]) -> Float[Array, "*T groups"]:
    """The score that each group of experts competes with."""
    groups = selection.reshape(*selection.shape[:-1], steps.groups, -1)
    if steps.group_score == "max":
        return groups.max(-1)
    return jnp.sort(groups, axis=-1)[..., -2:].sum(-1)


def _weights(steps: RouterConfig, chosen: Float[Array, "*T K"]) -> Float[Array, "*T K"]:
    """The routing weights, given the scores of the chosen experts."""
    match steps.weigh:
        case "scores":
            weights = chosen
        case "softmax":
            weights = jax.nn.softmax(chosen, axis=-1)
        case "sigmoid":
            weights = jax.nn.sigmoid(chosen)
    if steps.renormalise:
        total = weights.sum(-1, keepdims=True) + steps.epsilon
        weights = weights / (jnp.maximum(total, steps.least_sum) if steps.least_sum else total)
    return weights * steps.scale


def _sparsemixer_weights(
    logits: Float[Array, "*T E"], chosen: Int[Array, "*T 2"], jitter: float
) -> Float[Array, "*T 2"]:
    """Each chosen expert's share among the logits near its own, those chosen before it left out.

    As in inference: transformers' training path samples and has another gradient.

    Source: Liu et al. 2024, "GRIN: GRadient-INformed MoE", as transformers computes it (`sparsemixer`).
    """
    weights, left = [], jnp.ones_like(logits, bool)
    for expert in (chosen[..., :1], chosen[..., 1:]):
        near = left & (excess(logits, jnp.take_along_axis(logits, expert, -1), jitter) <= 0)
        shares = jax.nn.softmax(jnp.where(near, logits, -jnp.inf), axis=-1)
        weights.append(jnp.take_along_axis(shares, expert, -1))
        left = jnp.arange(logits.shape[-1], dtype=jnp.int32) != expert
    return jnp.concatenate(weights, axis=-1)


def excess(logits: Float[Array, "*T n"], top: Float[Array, "*T 1"], jitter: float) -> Float[Array, "*T n"]:
    """How much farther below `top` each logit is than "sparsemixer" looks: 2 `jitter` of the larger of |logit|, top."""
    return top - logits - 2 * jitter * jnp.maximum(jnp.abs(logits), top)


def largest(scores: Float[Array, "*T n"], count: int) -> Int[Array, "*T count"]:
    """Indices of the `count` largest scores from the largest down; of exact ties the lower index first.

    Not `lax.top_k`, which the compiler does not cut over devices: it would gather the scores of all tokens first. For
    many tokens not a sort either, which takes twice as long on CPU (512 tokens, 8 of 64); for a few it is faster.
    """
    index = jnp.zeros_like(scores, jnp.int32) + jnp.arange(scores.shape[-1], dtype=jnp.int32)  # cut as the scores are
    if scores.size <= _FEW * scores.shape[-1]:
        order = lax.sort((-scores, index), dimension=scores.ndim - 1, is_stable=True, num_keys=1)[1]
        return order[..., :count]
    chosen, left = [], jnp.ones_like(scores, bool)
    for _ in range(count):
        # Masked scores come below any score; the least of these is worth as much as -inf, in the order of the index.
        candidates = jnp.where(left, jnp.maximum(scores, jnp.finfo(jnp.float32).min), -jnp.inf)
        chosen.append(jnp.argmax(candidates, axis=-1).astype(jnp.int32)[..., None])
        left = left & (index != chosen[-1])
    return jnp.concatenate(chosen, axis=-1)


def _check_learned(name: str, wanted: bool, given: jax.Array | None) -> None:
    if wanted and given is None:
        raise MoejaxError(f"this router has a learned {name}; call it with {name}=, one number an expert")
    if not wanted and given is not None:
        raise MoejaxError(f"this router takes no {name}; set RouterConfig({name}=True) for one that does")
