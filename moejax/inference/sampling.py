"""From logits to token ids: the filters of transformers' warpers, in f32, as pure functions to be compiled.

Every row is filtered and drawn by itself, with its own key: a sequence's tokens do not depend on the batch around it.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


@dataclass(frozen=True, slots=True)
class Filters:
    """How a distribution is narrowed before drawing; hashable, hence a static argument of compiled functions.

    Attributes:
        temperature: 0 is greedy, and the rest then has no effect.
        top_k: number of best tokens kept; 0 keeps all.
        top_p: smallest set of best tokens kept whose probability reaches this; 1 keeps all.
        min_p: tokens kept have at least this share of the best token's probability; 0 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def sample(logits: Float[Array, "B V"], keys: Key[Array, " B"], filters: Filters) -> Int[Array, " B"]:
    """One int32 token id a row: the best (ties go to the lower index), or one drawn from the filtered distribution."""
    if filters.temperature == 0:
        return jnp.argmax(logits.astype(jnp.float32), axis=-1).astype(jnp.int32)
    scores = filtered(logits, filters)
    # Around 0 the best tokens' scores keep f32's full precision beside the Gumbel noise, at any temperature.
    scores = scores - jnp.max(scores, axis=-1, keepdims=True)
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)


def filtered(logits: Float[Array, "B V"], filters: Filters) -> Float[Array, "B V"]:
    """f32 logits over the temperature (above 0), -inf where top-k, then top-p, then min-p takes a token out.

    Source: transformers 5.23, generation/logits_process.py, in the order of `_get_logits_processor`.
    """
    scores = logits.astype(jnp.float32) / filters.temperature
    if 0 < filters.top_k < scores.shape[-1]:
        scores = _top_k(scores, filters.top_k)
    if filters.top_p < 1:
        scores = _top_p(scores, filters.top_p)
    if filters.min_p > 0:
        scores = _min_p(scores, filters.min_p)
    return scores


def repetition_penalty(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float) -> Float[Array, "B V"]:
    """f32 logits with those of `seen` tokens divided (where positive) or multiplied (where negative) by `penalty`.

    Source: Keskar et al. 2019, arXiv:1909.05858, with transformers' treatment of negative logits.
    """
    logits = logits.astype(jnp.float32)
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def seen_from_prompt(tokens: Int[Array, "B S"], lengths: Int[Array, " B"], vocab_size: int) -> Bool[Array, "B V"]:
    """Which tokens each right-padded prompt holds; the padding after `lengths` counts for nothing."""
    rows, width = tokens.shape
    real = jnp.arange(width)[None, :] < lengths[:, None]
    indices = jnp.where(real, tokens, vocab_size)
    return jnp.zeros((rows, vocab_size), bool).at[jnp.arange(rows)[:, None], indices].set(True, mode="drop")


def mark_seen(seen: Bool[Array, "B V"], tokens: Int[Array, " B"]) -> Bool[Array, "B V"]:
    """`seen` with each row's new token added."""
    return seen.at[jnp.arange(seen.shape[0]), tokens].set(True)


def request_keys(
    seed: int | Int[Array, ""], requests: Int[Array, " B"], positions: Int[Array, " B"]
) -> Key[Array, " B"]:
    """The key of each row's next token: fold_in(fold_in(key(seed), request), position).

    Args:
        seed: 0 to 2**32 - 1.
        requests: number of each row's prompt among all the prompts, wherever in a batch it runs.
        positions: position of the token to be drawn in its sequence.
    """
    # The generator is named: a caller's jax_default_prng_impl must not change what a seed means.
    base = jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(lambda request, position: jax.random.fold_in(jax.random.fold_in(base, request), position))(
        requests, positions
    )


def logprobs_of(logits: Float[Array, "B V"], tokens: Int[Array, " B"]) -> Float[Array, " B"]:
    """f32 natural log-probability of each row's token under the model's own logits, before penalty and filters."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]


def _top_k(scores: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Tokens equal to the k-th best all stay."""
    # The smallest of the best, not the last: for a slice of top_k XLA on CPU sorts the whole row, 50 times slower.
    kth = jnp.min(jax.lax.top_k(scores, k)[0], axis=-1, keepdims=True)
    return jnp.where(scores < kth, -jnp.inf, scores)


def _top_p(scores: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Takes out the tail whose probability, summed from its end, is at most 1 - p; the best token always stays.

    Among equal scores the lower index counts as better. transformers leaves that order to an unstable sort.
    """
    order = jnp.argsort(scores, axis=-1, stable=True, descending=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(scores, order, axis=-1), axis=-1)
    tail = jax.lax.cumsum(probabilities, axis=1, reverse=True)
    kept = (tail > 1 - p).at[:, 0].set(True)
    kept = jnp.put_along_axis(jnp.zeros_like(kept), order, kept, axis=-1, inplace=False)
    return jnp.where(kept, scores, -jnp.inf)


def _min_p(scores: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    probabilities = jax.nn.softmax(scores, axis=-1)
    best = jnp.max(probabilities, axis=-1, keepdims=True)
    return jnp.where(probabilities < p * best, -jnp.inf, scores)
