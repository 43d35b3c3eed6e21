"""The gated delta rule: the recurrence against numpy in f64, the chunked form against the recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import compiled, normal, relative

from moejax.nn.delta_rule import chunked, recurrent, restarts_of

B, G, N, HK, HV, LONGEST = 2, 2, 4, 5, 3, 200
slow, fast = compiled(recurrent), compiled(chunked)


def tokens(length, seed=0, decay=1.0):
    """q, k, v, log decay and beta; decays from none to almost all."""
    rng = np.random.default_rng(seed)
    q, k, v = normal(rng, B, length, G, HK), normal(rng, B, length, G, HK), normal(rng, B, length, N, HV)
    return q, k, v, -jnp.exp(normal(rng, B, length, N, scale=2.0)) * decay, jax.nn.sigmoid(normal(rng, B, length, N))


def first_state(seed=0):
    return normal(np.random.default_rng(seed), B, N, HK, HV)


def by_hand(q, k, v, log_decay, beta, restarts, state):
    """The rule for one token of one head at a time, in f64."""
    q, k, v, log_decay, beta, state = (np.asarray(a, np.float64) for a in (q, k, v, log_decay, beta, state))
    out, state = np.zeros(v.shape), state.copy()
    for row, head in np.ndindex(B, N):
        held, source = state[row, head], head // (N // G)
        for i in range(v.shape[1]):
            key, query = k[row, i, source], q[row, i, source]
            key = key / np.sqrt((key**2).sum() + 1e-6)
            query = query / np.sqrt((query**2).sum() + 1e-6) / np.sqrt(HK)
            held = (0 if restarts[row, i] else held) * np.exp(log_decay[row, i, head]) * np.ones((HK, HV))
            held = held + beta[row, i, head] * np.outer(key, v[row, i, head] - key @ held)
            out[row, i, head] = query @ held
        state[row, head] = held
    return out, state


def random_restarts(length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).random((B, length)) < 0.05, jnp.int32)


@pytest.mark.parametrize("decay", [0.01, 1.0, 30.0])
def test_both_forms_equal_the_rule_by_hand(decay):
    """Also where a token that forgets everything stands among tokens that forget little."""
    args = (*tokens(LONGEST, decay=decay), random_restarts(LONGEST), first_state())
    want = by_hand(*args)
    for form in (slow, fast):
        for got, exact in zip(form(*args), want, strict=True):
            assert got.dtype == jnp.float32
            assert relative(got, exact) < 2e-6


@pytest.mark.parametrize("length", [1, 64, 65])
def test_chunks_equal_tokens_at_any_length(length):
    for got, want in zip(fast(*tokens(length)), slow(*tokens(length)), strict=True):
        assert relative(got, want) < 1e-5


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, LONGEST), seed=st.integers(0, 1000))
def test_padding_to_the_right_is_neutral(length, seed):
    q, k, v, log_decay, beta = tokens(LONGEST, seed)
    real = (jnp.arange(LONGEST) < length)[:, None]
    args = (q, k, v, jnp.where(real, log_decay, 0.0), jnp.where(real, beta, 0.0))
    restarts = random_restarts(LONGEST, seed) * real[:, 0].astype(jnp.int32)
    out, state = fast(*args, restarts, first_state())
    want, _ = slow(*args, restarts, first_state())
    assert relative(out, want) < 1e-5
    exact = by_hand(*(a[:, :length] for a in args), restarts[:, :length], first_state())[1]
    assert relative(state, exact) < 1e-5


def test_nothing_passes_a_restart():
    """Not one bit: neither what was written before it nor the first state."""
    at = 70
    restarts = jnp.zeros((B, LONGEST), jnp.int32).at[:, at].set(1)
    one, other = tokens(LONGEST, 1), tokens(LONGEST, 2)
    mixed = tuple(jnp.concatenate([b[:, :at], a[:, at:]], 1) for a, b in zip(one, other, strict=True))
    for form in (slow, fast):
        out, state = form(*one, restarts, first_state(1))
        out_2, state_2 = form(*mixed, restarts, first_state(2))
        assert (out[:, at:] == out_2[:, at:]).all() and (state == state_2).all()
        assert (out[:, :at] != out_2[:, :at]).any()


def test_gradients_equal_those_of_the_recurrence():
    """With restarts, and a head whose queries and keys are zeros as those of padded heads are."""
    length = 70
    q, k, v, log_decay, beta = tokens(length)
    args = (q.at[:, :, 0].set(0.0), k.at[:, :, 0].set(0.0), v, log_decay, beta)
    restarts, weights = random_restarts(length), normal(np.random.default_rng(5), B, length, N, HV)

    def gradients(form):
        def loss(args, state):
            out, last = form(*args, restarts, state)
            return (out * weights).sum() + jnp.square(last).sum()

        return compiled(jax.grad(loss, (0, 1)))(args, first_state())

    for got, want in zip(*(jax.tree.leaves(gradients(form)) for form in (chunked, recurrent)), strict=True):
        assert relative(got, want) < 1e-4


def test_narrow_tokens_are_widened_first():
    narrow = [a.astype(jnp.bfloat16) for a in tokens(9)]
    for got, want in zip(slow(*narrow), slow(*(a.astype(jnp.float32) for a in narrow)), strict=True):
        assert got.dtype == jnp.float32 and relative(got, want) < 1e-6


@pytest.mark.parametrize(
    ("segments", "restarts"),
    [
        ([1, 1, 2, 2, 0, 0], [1, 0, 1, 0, 0, 0]),
        ([0, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0]),  # padding to the left, and a gap
        ([1, 0, 2, 1, 0, 1], [1, 0, 1, 1, 0, 0]),  # an id that comes again
        ([0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]),
    ],
)
def test_a_segment_begins_where_the_id_changes(segments, restarts):
    assert restarts_of(jnp.array([segments], jnp.int32))[0].tolist() == restarts


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:::torch|transformers")
@pytest.mark.parametrize("state", [None, first_state()])
def test_equals_transformers(state):
    import torch
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    # Gentle decays: theirs are differences of running sums, 1e-5 off behind a strong one where ours are 2e-7 off.
    args = tokens(LONGEST, decay=0.01)
    options = {
        "initial_state": None if state is None else torch.tensor(np.asarray(state)),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
    }
    pairs = [(fast, theirs.torch_chunk_gated_delta_rule), (slow, theirs.torch_recurrent_gated_delta_rule)]
    for ours, reference in pairs:
        wanted = reference(*(torch.tensor(np.asarray(a)) for a in args), **options)
        for got, want in zip(ours(*args, None, state), wanted, strict=True):
            assert relative(got, want.numpy()) < 1e-5
