"""Compiled prefill and decode for one batch of prompts."""

import functools
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moejax.distributed import replicated_to_host
from moejax.inference.sampling import (
    Filters,
    logprobs_of,
    mark_seen,
    repetition_penalty,
    request_keys,
    sample,
    seen_from_prompt,
)
from moejax.language_model import LanguageModel
from moejax.model import Decoder, Lie, lay
from moejax.nn.cache import Cache
from moejax.sharding import place, round_up

BUCKET = 16
"""Prompts are padded, and caches sized, to multiples of this, so that a new length seldom compiles anew."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How the next token is drawn; static in compiled functions except for the seed."""

    filters: Filters
    penalty: float
    logprobs: bool


@struct.dataclass
class Step:
    """What one step leaves for the next, on the devices.

    Attributes:
      tokens: the newest token of each row.
      positions: its position.
      caches: one for each layer.
      seen: tokens that the row holds, for the repetition penalty; None without one.
    """

    tokens: Int[Array, " B"]
    positions: Int[Array, " B"]
    caches: tuple[Cache, ...]
    seen: Bool[Array, "B V"] | None


@struct.dataclass
class Drawn:
    """What one step gives the host, the same on every device: new tokens, their log-probabilities, dropped pairs."""

    tokens: Int[Array, " B"]
    logprobs: Float[Array, " B"] | None
    dropped: Int[Array, ""]


class Engine:
    """Runs one batch: `start` prefills and draws the first tokens, `step` draws one more for each row.

    Programs are compiled just before they first run, timed apart (`compile_s`), and kept by the model for batches of
    the same shape. What a step consumes is donated, so that caches are updated in place.
    """

    def __init__(self, model: LanguageModel, batch: int, draw: Draw, seed: int):
        """For `batch` prompts at once."""
        self.model, self.draw = model, draw
        self.lie = lay(batch, model.mesh, model.options)
        self.compile_s = 0.0
        self._batch = batch
        self._seed = jnp.asarray(np.uint32(seed))
        self._graph, self._state = model.split()

    def start(
        self, tokens: Int[np.ndarray, "B S"], lengths: Int[np.ndarray, " B"], first_request: int, max_len: int
    ) -> tuple[np.ndarray, np.ndarray | None, int]:
        """Prefills right-padded prompts and draws the first token of each.

        Args:
          tokens: padded with anything.
          lengths: tokens of each prompt, at least 1.
          first_request: the number of the first prompt among all prompts of the call, for the random keys.
          max_len: the longest row, prompt and continuation together.

        Returns:
          New tokens `[B]`, their log-probabilities or None, pairs dropped by a capacity factor.
        """
        size = min(_bucket(max_len), self.model.config.context)
        padded = np.zeros((len(tokens), min(_bucket(tokens.shape[1]), self.model.config.context)), np.int32)
        padded[:, : tokens.shape[1]] = tokens
        requests = np.arange(len(tokens), dtype=np.int32) + np.int32(first_request)
        rows = [self.model.put_rows(a, self.lie) for a in (padded, lengths.astype(np.int32), requests)]
        self._requests = rows[2]
        self._decode: jax.stages.Compiled | None = None
        arguments = (self._state, *rows, self._seed)
        return self._run(self._program(_prefill, (self._graph, size, self.draw, self.lie), arguments), arguments)

    def step(self, active: Bool[np.ndarray, " B"]) -> tuple[np.ndarray, np.ndarray | None, int]:
        """Draws one more token for every row; rows that are not active are computed but go to no expert."""
        on_device = self.model.put_rows(active, self.lie)
        arguments = (self._state, self._step, on_device, self._requests, self._seed)
        # Looked up once: to hash a deep model's structure in every step costs as much as a small model's step.
        if self._decode is None:
            self._decode = self._program(_decode, (self._graph, self.draw, self.lie), arguments)
        return self._run(self._decode, arguments)

    def _program(self, function: Any, statics: tuple, arrays: tuple) -> jax.stages.Compiled:
        key = (function, statics, jax.tree.structure(arrays), *map(_signature, jax.tree.leaves(arrays)))
        if key not in self.model.programs:
            began = time.perf_counter()
            self.model.programs[key] = function.lower(*statics, *arrays).compile()
            self.compile_s += time.perf_counter() - began
        return self.model.programs[key]

    def _run(self, program: jax.stages.Compiled, arrays: tuple) -> tuple[np.ndarray, np.ndarray | None, int]:
        self._step, drawn = program(*arrays)
        logprobs = None if drawn.logprobs is None else replicated_to_host(drawn.logprobs)[: self._batch]
        return replicated_to_host(drawn.tokens)[: self._batch], logprobs, int(replicated_to_host(drawn.dropped))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _prefill(
    graph: Any,
    size: int,
    draw: Draw,
    lie: Lie,
    state: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    requests: jax.Array,
    seed: jax.Array,
) -> tuple[Step, Drawn]:
    decoder: Decoder = nnx.merge(graph, state)
    logits, caches, dropped = decoder.prefill(tokens, lengths, size, lie)
    seen = seen_from_prompt(tokens, lengths, logits.shape[-1]) if draw.penalty != 1 else None
    return _draw(logits, lengths, caches, seen, requests, seed, dropped, draw, lie)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,))
def _decode(
    graph: Any,
    draw: Draw,
    lie: Lie,
    state: Any,
    step: Step,
    active: jax.Array,
    requests: jax.Array,
    seed: jax.Array,
) -> tuple[Step, Drawn]:
    decoder: Decoder = nnx.merge(graph, state)
    logits, caches, dropped = decoder.decode(step.tokens, step.positions, active, step.caches, lie)
    return _draw(logits, step.positions + 1, caches, step.seen, requests, seed, dropped, draw, lie)


def _draw(
    logits: jax.Array,
    positions: jax.Array,
    caches: tuple[Cache, ...],
    seen: jax.Array | None,
    requests: jax.Array,
    seed: jax.Array,
    dropped: jax.Array,
    draw: Draw,
    lie: Lie,
) -> tuple[Step, Drawn]:
    """Draws the token at `positions` of each row from logits whose vocabulary is first put together."""
    with jax.named_scope("sample"):
        logits = place(logits, lie.stream.mesh, lie.stream.batch_spec)
        scores = logits if seen is None else repetition_penalty(logits, seen, draw.penalty)
        tokens = sample(scores, request_keys(seed, requests, positions), draw.filters)
        logprobs = logprobs_of(logits, tokens) if draw.logprobs else None
        seen = None if seen is None else mark_seen(seen, tokens)
    everywhere = functools.partial(place, mesh=lie.stream.mesh, spec=PartitionSpec())
    drawn = Drawn(everywhere(tokens), None if logprobs is None else everywhere(logprobs), dropped)
    rows = functools.partial(place, mesh=lie.stream.mesh, spec=lie.stream.batch_spec)
    return Step(rows(tokens), rows(positions), caches, None if seen is None else rows(seen)), drawn


def _bucket(length: int) -> int:
    return round_up(length, BUCKET)


def _signature(leaf: jax.Array) -> tuple:
    return leaf.shape, leaf.dtype, leaf.sharding
