import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.inference.sampling import (
    Filters,
    filtered,
    logprobs_of,
    mark_seen,
    repetition_penalty,
    request_keys,
    sample,
    seen_from_prompt,
)

V = 12
kept_scores = jax.jit(filtered)
drawn = jax.jit(sample)
# Few distinct values, so that ties are common; far enough apart that no threshold falls within rounding.
logit_rows = st.lists(st.lists(st.integers(-6, 6), min_size=V, max_size=V), min_size=3, max_size=3).map(
    lambda rows: np.array(rows, np.float32) / 2
)
filter_sets = st.builds(
    Filters,
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 5, V, V + 3]),
    top_p=st.sampled_from([0.0, 0.137, 0.513, 0.911, 1.0]),
    min_p=st.sampled_from([0.0, 0.0137, 0.231, 1.0]),
)


def softmax(scores: list[float]) -> list[float]:
    weights = [np.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def slow_kept(logits: list[float], filters: Filters) -> set[int]:
    """The tokens that survive, one rule after the other, in f64 and in the words of the rules."""
    scores = [float(value) / filters.temperature for value in logits]
    best_first = sorted(range(V), key=lambda token: (-scores[token], token))
    kept = best_first
    if 0 < filters.top_k < V:
        kept = [token for token in kept if scores[token] >= scores[best_first[filters.top_k - 1]]]
    if filters.top_p < 1:
        probabilities = softmax([scores[token] for token in kept])
        # The smallest set that reaches top_p, and never fewer than the best token.
        reached = [sum(probabilities[: size + 1]) >= filters.top_p for size in range(len(kept))]
        kept = kept[: reached.index(True) + 1] if True in reached else kept
    if filters.min_p > 0:
        probabilities = softmax([scores[token] for token in kept])
        kept = [
            token
            for token, p in zip(kept, probabilities, strict=True)
            if p >= filters.min_p * probabilities[0] * (1 - 1e-6)
        ]
    return set(kept)


@given(logit_rows, filter_sets)
@settings(max_examples=60, deadline=None)
def test_filters_keep_what_the_rules_say(logits, filters):
    scores = np.asarray(kept_scores(jnp.asarray(logits), filters))
    for row, kept in zip(logits, scores, strict=True):
        assert set(np.flatnonzero(kept > -np.inf)) == slow_kept(row, filters)
    finite = scores > -np.inf
    np.testing.assert_allclose(scores[finite], (logits / filters.temperature)[finite], rtol=1e-6)


# One row of logits through the Temperature-, TopK-, TopP- and MinPLogitsWarper of transformers 5.23, in that order.
WARPED = [2.0, 1.5, 1.5, 1.0, 0.0, -1.0, 3.0, -2.0]


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        (Filters(1.0, 3, 1.0, 0.0), [0, 1, 2, 6]),
        (Filters(1.0, 99, 1.0, 0.0), [0, 1, 2, 3, 4, 5, 6, 7]),
        (Filters(1.0, 0, 0.5, 0.0), [0, 6]),
        (Filters(1.0, 0, 0.9, 0.0), [0, 1, 2, 3, 6]),
        (Filters(2.0, 0, 0.9, 0.0), [0, 1, 2, 3, 4, 6]),
        (Filters(1.0, 0, 0.0, 0.0), [6]),
        (Filters(1.0, 0, 1.0, 0.1), [0, 1, 2, 3, 6]),
        (Filters(2.0, 0, 1.0, 0.1), [0, 1, 2, 3, 4, 5, 6]),
        (Filters(1.0, 0, 1.0, 1.0), [6]),
        (Filters(1.0, 2, 0.74, 0.0), [0, 6]),
        (Filters(1.0, 2, 0.72, 0.0), [6]),
        (Filters(1.0, 4, 0.8, 0.3), [0, 6]),
        (Filters(0.5, 5, 0.95, 0.01), [0, 1, 2, 6]),
    ],
)
def test_filters_agree_with_transformers(filters, kept):
    scores = filtered(jnp.asarray([WARPED]), filters)
    assert np.flatnonzero(np.asarray(scores[0]) > -np.inf).tolist() == kept


def test_of_equal_tokens_at_the_edge_of_top_p_the_lower_index_stays():
    scores = filtered(jnp.zeros((1, 8)), Filters(1.0, 0, 0.3, 0.0))
    assert np.flatnonzero(np.asarray(scores[0]) > -np.inf).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        (Filters(1.0, 3), [1, 2, 3, 4, 5]),
        (Filters(1.0, 6), [0, 1, 2, 3, 4, 5, 6]),
        (Filters(1.0, 7), [0, 1, 2, 3, 4, 5, 6]),
        (Filters(1.0, 0, 1e-6), [4]),
        (Filters(1.0, 0, 0.99999), [1, 2, 3, 4, 5]),
    ],
)
def test_edges_at_zero_below_it_and_at_impossible_tokens(filters, kept):
    """Both zeros are equal; a token that cannot be is kept only where the rule says so."""
    scores = kept_scores(jnp.asarray([[-80.0, 0.0, -0.0, 0.0, 9.0, 9.0, -np.inf, -np.inf]]), filters)
    assert np.flatnonzero(np.asarray(scores[0]) > -np.inf).tolist() == [token for token in kept if token < 6]


@pytest.mark.parametrize(
    "filters", [Filters(0.8, 50), Filters(0.8, 2000), Filters(1.5, 0, 0.9), Filters(1.0, 300, 0.5)]
)
def test_a_large_vocabulary_is_filtered_as_by_sorting(filters):
    logits = 3 * np.random.RandomState(0).standard_normal((4, 30_000)).astype(np.float32)
    scores = logits / np.float32(filters.temperature)
    for row, found in zip(scores, np.asarray(kept_scores(jnp.asarray(logits), filters)), strict=True):
        best_first = np.argsort(-row, kind="stable")[: filters.top_k or None]
        weights = np.exp((row - row.max())[best_first].astype(np.float64))
        tail = np.cumsum(weights[::-1])[::-1] / weights.sum()
        kept = best_first[tail > 1 - filters.top_p] if filters.top_p < 1 else best_first
        assert np.array_equal(np.flatnonzero(found > -np.inf), np.sort(kept))


def test_greedy_takes_the_lower_of_equal_tokens_and_sorts_nothing():
    logits = jnp.asarray([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0], [-1.0, -2.0, 5.0]])
    keys = request_keys(0, jnp.arange(3), jnp.zeros(3, jnp.int32))
    assert sample(logits, keys, None).tolist() == [1, 0, 2] and sample(logits, keys, None).dtype == jnp.int32
    assert "sort" not in str(jax.make_jaxpr(lambda x: sample(x, keys, None))(logits))


@given(logit_rows, filter_sets, st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_drawn_tokens_survive_the_filters_and_ignore_the_batch(logits, filters, seed):
    rows = len(logits)
    keys = request_keys(seed, jnp.arange(rows), jnp.full(rows, 5))
    tokens = np.asarray(drawn(jnp.asarray(logits), keys, filters))
    assert all(token in slow_kept(row, filters) for token, row in zip(tokens, logits, strict=True))
    assert drawn(jnp.asarray(logits[-1:]), keys[-1:], filters)[0] == tokens[-1]


def test_a_request_draws_the_same_in_any_batch_when_compiled():
    logits = jax.random.normal(jax.random.key(1), (16, 300))
    keys = request_keys(7, jnp.arange(16), jnp.arange(16) % 3)
    filters = Filters(0.9, 100, 0.95, 0.001)
    together = drawn(logits, keys, filters)
    alone = jnp.concatenate([drawn(logits[row : row + 1], keys[row : row + 1], filters) for row in range(16)])
    reversed_ = drawn(logits[::-1], keys[::-1], filters)[::-1]
    assert together.tolist() == alone.tolist() == reversed_.tolist()
    assert len(set(together.tolist())) > 8


def test_frequencies_are_those_of_the_filtered_distribution():
    draws = 4000
    logits = jnp.tile(jnp.asarray([[1.0, 0.0, 2.0, -3.0]]), (draws, 1))
    keys = request_keys(3, jnp.zeros(draws, jnp.int32), jnp.arange(draws))
    tokens = np.asarray(sample(logits, keys, Filters(2.0, 3, 1.0, 0.0)))
    expected = np.array([*softmax([0.5, 0.0, 1.0]), 0.0])
    counts = np.bincount(tokens, minlength=4) / draws
    # Four standard deviations of a frequency near 1/2 are 0.03.
    np.testing.assert_allclose(counts, expected, atol=0.03)
    assert counts[3] == 0


def test_a_small_temperature_is_greedy_on_large_logits():
    logits = jnp.full((1, V), -30_000.0).at[0, :2].set([30_000.0, 30_001.0])
    keys = request_keys(0, jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
    assert sample(logits, keys, Filters(1e-4, 0, 0.9, 0.1)).tolist() == [1]


def test_keys_are_those_of_the_formula():
    keys = request_keys(2**32 - 1, jnp.asarray([4, 4, 5]), jnp.asarray([0, 9, 9]))
    base = jax.random.key(2**32 - 1, impl="threefry2x32")
    for key, (request, position) in zip(keys, [(4, 0), (4, 9), (5, 9)], strict=True):
        by_hand = jax.random.fold_in(jax.random.fold_in(base, request), position)
        assert jax.random.key_data(key).tolist() == jax.random.key_data(by_hand).tolist()


def test_drawn_numbers_are_frozen():
    # A change here changes what every seed gives: name it in the changelog.
    tokens = [
        sample(jnp.zeros((3, V)), request_keys(seed, jnp.arange(3), jnp.arange(3)), Filters(1.0)) for seed in (0, 1)
    ]
    assert [row.tolist() for row in tokens] == [[3, 7, 9], [4, 9, 0]]


def test_repetition_penalty_as_in_transformers():
    seen = jnp.zeros((1, 8), bool).at[0, jnp.asarray([0, 5])].set(True)
    penalised = repetition_penalty(jnp.asarray([WARPED]), seen, 1.3)
    np.testing.assert_allclose(penalised[0], [2.0 / 1.3, 1.5, 1.5, 1.0, 0.0, -1.3, 3.0, -2.0], rtol=1e-6)


def test_seen_tokens_are_those_of_the_prompt_and_the_continuation():
    prompts = jnp.asarray([[3, 1, 3, 0], [2, 0, 0, 0]])
    seen = seen_from_prompt(prompts, jnp.asarray([3, 1]), 5)
    assert [np.flatnonzero(row).tolist() for row in seen] == [[1, 3], [2]]
    assert [np.flatnonzero(row).tolist() for row in mark_seen(seen, jnp.asarray([4, 2]))] == [[1, 3, 4], [2]]


def test_logprobs_are_of_the_raw_distribution():
    logits = jnp.asarray([WARPED, WARPED], jnp.bfloat16)
    logprobs = logprobs_of(logits, jnp.asarray([6, 0]))
    assert logprobs.dtype == jnp.float32
    np.testing.assert_allclose(logprobs, [np.log(softmax(WARPED)[6]), np.log(softmax(WARPED)[0])], rtol=1e-5)
