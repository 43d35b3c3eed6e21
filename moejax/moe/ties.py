"""How near a router is to deciding otherwise."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config import MoEConfig
from moejax.moe.router import excess, group_worth, plain_scores, selection_scores


def decision_margin(
    config: MoEConfig, logits: Float[Array, "*T E"], correction: Float[Array, " E"] | None = None
) -> Float[Array, "*T"]:
    """For each token the smallest change of its scores, over the largest of them, that makes its routing jump; f32.

    That is the gap between the last chosen and the next selection score, and with groups also that between the last
    kept and the next group's. The weights of "sparsemixer" jump too when its two experts change places, or when a logit
    comes near enough to count. Infinite where nothing could be decided otherwise.
    """
    steps, selection = config.router, selection_scores(config, logits, correction)
    margins = [_gap(selection, config.num_experts_per_tok)]
    if steps.groups > 1:
        margins.append(_gap(group_worth(steps, plain_scores(steps, logits, correction)[1]), steps.kept_groups))
    if steps.score == "sparsemixer":
        margins += [_gap(selection, 1), _near_enough(selection, steps.jitter)]
    return jnp.stack(margins).min(0)


def _gap(scores: Float[Array, "*T n"], count: int) -> Float[Array, "*T"]:
    """Between the `count`-th largest and the next."""
    if count == scores.shape[-1]:
        return jnp.full(scores.shape[:-1], jnp.inf, jnp.float32)
    ranked = -jnp.sort(-scores, axis=-1)
    return (ranked[..., count - 1] - ranked[..., count]) / _largest_magnitude(scores)


def _near_enough(logits: Float[Array, "*T E"], jitter: float) -> Float[Array, "*T"]:
    """Between the logits and the edge of what "sparsemixer" looks at, for each of its two experts."""
    ranked = -jnp.sort(-logits, axis=-1)
    edges = [
        jnp.abs(excess(ranked[..., rank + 1 :], ranked[..., rank : rank + 1], jitter)).min(-1, initial=jnp.inf)
        for rank in (0, 1)
    ]
    return jnp.minimum(*edges) / _largest_magnitude(logits)


def _largest_magnitude(scores: Float[Array, "*T n"]) -> Float[Array, "*T"]:
    return jnp.where(jnp.isfinite(scores), jnp.abs(scores), 0.0).max(-1)
