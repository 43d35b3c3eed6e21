"""The compiled steps of generation: pure functions of a decoder's structure, its parameters and what a step leaves."""

import functools
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moejax.inference.sampling import (
    Filters,
    logprobs_of,
    mark_seen,
    repetition_penalty,
    request_keys,
    sample,
    seen_from_prompt,
)
from moejax.model import Decoder, Lie
from moejax.nn.cache import Cache
from moejax.nn.places import chunk_positions
from moejax.sharding import place

BLOCK = 32
"""The most tokens of a row that one dispatch draws: what is streamed then still comes in small pieces."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How the next token is drawn: whether each part of it is there decides about programs, and no value does.

    Attributes:
      filters: None is greedy.
      penalty: of tokens that were there already; 1 is none.
      logprobs: whether its log-probability is wanted.
    """

    filters: Filters | None
    penalty: float
    logprobs: bool


@struct.dataclass
class Step:
    """What one step leaves for the next, on the devices.

    Attributes:
      tokens: the newest token of each row.
      logprobs: its log-probability; None where nobody asked.
      positions: its position.
      caches: one for each layer.
      seen: tokens that the row holds, for the repetition penalty; None without one.
    """

    tokens: Int[Array, " B"]
    logprobs: Float[Array, " B"] | None
    positions: Int[Array, " B"]
    caches: tuple[Cache, ...]
    seen: Bool[Array, "B V"] | None


@struct.dataclass
class Requests:
    """Whose rows these are.

    Attributes:
      lengths: tokens of each prompt; 0 for rows that only fill up.
      numbers: of each prompt among all prompts, for the random keys.
      seed: of the random numbers.
      eos: ids that end a row, filled up with -1.
      filters: of all rows; None where they are greedy.
      penalty: of tokens that were there already; None without one.
    """

    lengths: Int[Array, " B"]
    numbers: Int[Array, " B"]
    seed: Int[Array, ""]
    eos: Int[Array, " N"]
    filters: Filters | None
    penalty: Float[Array, ""] | None


@struct.dataclass
class Drawn:
    """What the host gets, the same on every device.

    Attributes:
      tokens: of each row, those of `count` steps.
      logprobs: theirs; None where nobody asked.
      count: steps taken.
      dropped: pairs dropped by a capacity factor in all of them.
    """

    tokens: Int[Array, "N B"]
    logprobs: Float[Array, "N B"] | None
    count: Int[Array, ""]
    dropped: Int[Array, ""]


Loop: TypeAlias = tuple[Step, Int[Array, " B"], Drawn]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def begin(graph: Any, size: int, logprobs: bool, penalised: bool, lie: Lie, state: Any, lengths: jax.Array) -> Step:
    """The step before any token of prompts of `lengths`, with caches of `size` places."""
    decoder: Decoder = nnx.merge(graph, state)
    step = Step(
        tokens=jnp.zeros(lie.rows, jnp.int32),
        logprobs=jnp.zeros(lie.rows, jnp.float32) if logprobs else None,
        positions=lengths,
        caches=decoder.empty_caches(size, lie),
        seen=jnp.zeros((lie.rows, decoder.config.vocab_size), bool) if penalised else None,
    )
    return _in_rows(step, lie)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def prefill(
    graph: Any, lie: Lie, state: Any, step: Step, tokens: jax.Array, first: jax.Array, requests: Requests
) -> tuple[Step, Drawn]:
    """Runs a chunk of the right-padded prompts, `tokens [B, S]` from the place `first` on.

    Rows that end in it get their first new token; those that ended before keep theirs.
    """
    decoder: Decoder = nnx.merge(graph, state)
    positions = chunk_positions(first, tokens.shape[1], requests.lengths)
    logits, caches, dropped = decoder.extend(tokens, positions, requests.lengths, step.caches, lie)
    real = (positions >= 0).sum(1, dtype=jnp.int32)
    seen = None if step.seen is None else step.seen | seen_from_prompt(tokens, real, logits.shape[-1])
    new = _draw(logits, replace(step, positions=requests.lengths, caches=caches, seen=seen), requests, lie)
    ends = (real > 0) & (requests.lengths <= first + tokens.shape[1])
    tokens, logprobs = jax.tree.map(
        lambda now, before: jnp.where(ends, now, before), (new.tokens, new.logprobs), (step.tokens, step.logprobs)
    )
    if seen is not None and new.seen is not None:
        seen = jnp.where(ends[:, None], new.seen, seen)
    new = replace(new, tokens=tokens, logprobs=logprobs, seen=seen)
    tokens, logprobs = jax.tree.map(lambda row: row[None], _everywhere((tokens, logprobs), lie))
    return _in_rows(new, lie), Drawn(tokens=tokens, logprobs=logprobs, count=jnp.int32(1), dropped=dropped)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def decode(
    graph: Any, lie: Lie, state: Any, step: Step, left: jax.Array, budgets: jax.Array, requests: Requests
) -> tuple[Step, Drawn]:
    """Draws more tokens for each row, until no row goes on or the least of `budgets` is spent.

    Args:
      left: tokens `[B]` that each row may still draw. One with 0, or with an end-of-sequence id, goes to no expert.
      budgets: steps that each device's host wants, at most BLOCK; hosts measure time, so they may differ.
    """
    decoder: Decoder = nnx.merge(graph, state)
    budget = _everywhere(budgets, lie).min()

    def going(loop: Loop) -> jax.Array:
        _, left, drawn = loop
        return (drawn.count < budget) & (left > 0).any()

    def body(loop: Loop) -> Loop:
        step, left, drawn = loop
        active = place(left > 0, lie.stream.mesh, lie.stream.batch_spec)
        positions = jnp.where(active, step.positions, -1)[:, None]
        logits, caches, dropped = decoder.extend(step.tokens[:, None], positions, step.positions + 1, step.caches, lie)
        new = _draw(logits, replace(step, positions=step.positions + 1, caches=caches), requests, lie)
        tokens, logprobs = _everywhere((new.tokens, new.logprobs), lie)
        ended = (tokens[:, None] == requests.eos).any(1)
        tokens, logprobs = jax.tree.map(
            lambda so_far, row: so_far.at[drawn.count].set(row), (drawn.tokens, drawn.logprobs), (tokens, logprobs)
        )
        drawn = Drawn(tokens=tokens, logprobs=logprobs, count=drawn.count + 1, dropped=drawn.dropped + dropped)
        return new, jnp.where(ended, 0, left - 1), drawn

    nothing = _everywhere(jnp.zeros((BLOCK, lie.rows), jnp.int32), lie)
    scores = None if step.logprobs is None else nothing.astype(jnp.float32)
    drawn = Drawn(tokens=nothing, logprobs=scores, count=jnp.int32(0), dropped=jnp.int32(0))
    start = (step, _everywhere(left, lie), drawn)
    step, _, drawn = lax.while_loop(going, body, start)
    return _in_rows(step, lie), drawn


def _draw(logits: jax.Array, step: Step, requests: Requests, lie: Lie) -> Step:
    """The step with the token at its positions drawn, from logits whose vocabulary is first put together."""
    seen = step.seen
    with jax.named_scope("sample"):
        logits = place(logits, lie.stream.mesh, lie.stream.batch_spec)
        scores = logits
        if seen is not None and requests.penalty is not None:
            scores = repetition_penalty(logits, seen, requests.penalty)
        tokens = sample(scores, request_keys(requests.seed, requests.numbers, step.positions), requests.filters)
        logprobs = None if step.logprobs is None else logprobs_of(logits, tokens)
        seen = None if seen is None else mark_seen(seen, tokens)
    return _in_rows(replace(step, tokens=tokens, logprobs=logprobs, seen=seen), lie)


def _in_rows(step: Step, lie: Lie) -> Step:
    """The step with all but its caches, which mixers place, cut as the batch is: one program then serves all steps."""
    rows = replace(step, caches=())
    rows = jax.tree.map(lambda a: place(a, lie.stream.mesh, lie.stream.batch_spec), rows)
    return replace(rows, caches=step.caches)


def _everywhere(values: Any, lie: Lie) -> Any:
    """Arrays, the whole of each on every device."""
    return jax.tree.map(lambda a: place(a, lie.stream.mesh, PartitionSpec()), values)
