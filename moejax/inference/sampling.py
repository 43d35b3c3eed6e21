"""From logits to token ids: the filters of transformers' warpers, in f32, as pure functions to be compiled.

Every row is filtered and drawn by itself, with its own key: a sequence's tokens do not depend on the batch around it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

_FEW = 64
"""Up to this many best tokens are looked up by `lax.top_k`, which is faster than searching their bound."""


@struct.dataclass
class Filters:
    """How a distribution is narrowed before drawing: numbers, or arrays that compiled functions take as operands, so
    that one program serves all values.

    Attributes:
        temperature: above 0; logits are divided by it.
        top_k: number of best tokens kept; 0 keeps all.
        top_p: smallest set of best tokens kept whose probability reaches this; 1 keeps all.
        min_p: tokens kept have at least this share of the best token's probability; 0 keeps all.
    """

    temperature: float | Float[Array, ""] = 1.0
    top_k: int | Int[Array, ""] = 0
    top_p: float | Float[Array, ""] = 1.0
    min_p: float | Float[Array, ""] = 0.0


def sample(logits: Float[Array, "B V"], keys: Key[Array, " B"], filters: Filters | None) -> Int[Array, " B"]:
    """One int32 token id a row, drawn from the filtered distribution; without filters the best (of ties the lower)."""
    if filters is None:
        return _best(logits.astype(jnp.float32))
    scores = filtered(logits, filters)
    # Around 0 the best tokens' scores keep f32's full precision beside the Gumbel noise, at any temperature.
    scores = scores - jnp.max(scores, axis=-1, keepdims=True)
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)


def filtered(logits: Float[Array, "B V"], filters: Filters) -> Float[Array, "B V"]:
    """f32 logits over the temperature, -inf where top-k, then top-p, then min-p takes a token out.

    Source: transformers 5.23, generation/logits_process.py, in the order of `_get_logits_processor`.
    """
    top_k = jnp.asarray(filters.top_k, jnp.int32)
    temperature, top_p, min_p = (
        jnp.asarray(value, jnp.float32) for value in (filters.temperature, filters.top_p, filters.min_p)
    )

    def narrowed(scores: jax.Array) -> jax.Array:
        scores = lax.cond((top_k > 0) & (top_k < scores.shape[-1]), _top_k, _all, scores, top_k)
        scores = lax.cond(top_p < 1, _top_p, _all, scores, top_p)
        return lax.cond(min_p > 0, _min_p, _all, scores, min_p)

    # Conditions are asked on the device, where each costs some microseconds: of most draws only the first one is.
    scores = logits.astype(jnp.float32) / temperature
    return lax.cond((top_k > 0) | (top_p < 1) | (min_p > 0), narrowed, lambda scores: scores, scores)


def repetition_penalty(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float | Float[Array, ""]
) -> Float[Array, "B V"]:
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


def _best(scores: Float[Array, "B V"]) -> Int[Array, " B"]:
    """argmax, in two reductions: XLA on CPU makes a loop over single numbers of the one that carries indices along."""
    best = (scores == scores.max(-1, keepdims=True)) | jnp.isnan(scores)
    return jnp.where(best, jnp.arange(scores.shape[-1], dtype=jnp.int32), jnp.iinfo(jnp.int32).max).min(-1)


def _all(scores: Float[Array, "B V"], _: jax.Array) -> Float[Array, "B V"]:
    return scores


def _top_k(scores: Float[Array, "B V"], k: Int[Array, ""]) -> Float[Array, "B V"]:
    """Tokens equal to the k-th best all stay."""
    few = min(_FEW, scores.shape[-1])

    def of_few() -> jax.Array:
        # The smallest, not the one at k: for a slice of top_k XLA on CPU sorts the whole row, 50 times slower.
        best = lax.top_k(scores, few)[0]
        return jnp.where(jnp.arange(few) < k, best, jnp.inf).min(-1, keepdims=True)

    def of_many() -> jax.Array:
        return _greatest(lambda score: (scores >= score).sum(-1, dtype=jnp.int32) >= k, scores.shape[0])

    return jnp.where(scores < lax.cond(k <= few, of_few, of_many), -jnp.inf, scores)


def _top_p(scores: Float[Array, "B V"], p: Float[Array, ""]) -> Float[Array, "B V"]:
    """Takes out the tail whose probability, summed from its end, is at most 1 - p; the best token always stays.

    Among equal scores the lower index counts as better. transformers leaves that order to an unstable sort.
    """
    probabilities, best = jax.nn.softmax(scores, axis=-1), scores.max(-1, keepdims=True)

    def below(score: jax.Array) -> jax.Array:
        """The probability of all tokens that are worse."""
        return jnp.where(scores < score, probabilities, 0.0).sum(-1, keepdims=True)

    edge = _greatest(lambda score: ((below(score) <= 1 - p) & (score <= best))[:, 0], scores.shape[0])
    # Of the tokens at the edge itself the last ones belong to the tail.
    equal = scores == edge
    after = lax.cumsum(equal.astype(jnp.float32), axis=1, reverse=True)
    tail = below(edge) + after * jnp.where(equal, probabilities, 0.0)
    first = jnp.arange(scores.shape[-1]) == jnp.argmax(scores, axis=-1)[:, None]
    return jnp.where((scores > edge) | (equal & (tail > 1 - p)) | first, scores, -jnp.inf)


def _min_p(scores: Float[Array, "B V"], p: Float[Array, ""]) -> Float[Array, "B V"]:
    probabilities = jax.nn.softmax(scores, axis=-1)
    best = jnp.max(probabilities, axis=-1, keepdims=True)
    return jnp.where(probabilities < p * best, -jnp.inf, scores)


def _greatest(holds: Callable[[Float[Array, "B 1"]], Bool[Array, " B"]], rows: int) -> Float[Array, "B 1"]:
    """The greatest f32 for which `holds`, which must hold for all that are less and for none that are greater.

    It is found bit by bit, from the sign on: 32 passes over a row, which XLA on CPU takes 50 times as long to sort.
    Whole numbers stand for floats in their order: those of negative floats have all bits but the sign turned over.
    """

    def value(number: jax.Array) -> jax.Array:
        bits = number ^ ((number >> 31) & 0x7FFF_FFFF)
        return lax.bitcast_convert_type(bits, jnp.float32)[:, None]

    def next_bit(i: jax.Array, number: jax.Array) -> jax.Array:
        tried = number + (jnp.int32(1) << (31 - i))
        return jnp.where(holds(value(tried)), tried, number)

    return value(lax.fori_loop(0, 32, next_bit, jnp.full(rows, -(2**31), jnp.int32)))
