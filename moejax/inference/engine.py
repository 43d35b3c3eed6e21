"""Prefill and decode for one batch of prompts, as the host drives them."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from moejax.distributed import replicated_to_host
from moejax.inference.sampling import Filters
from moejax.inference.steps import BLOCK, Draw, Drawn, Requests, Step, begin, decode, prefill
from moejax.language_model import LanguageModel
from moejax.model import lay
from moejax.sharding import round_up

CHUNK = 512
"""The most tokens of a row that run at once in prefill."""
CHUNK_TOKENS = 4096
"""The most tokens of all rows together that do, as far as a chunk of LEAST_CHUNK allows: what bounds the memory."""
TIMES = {"gpu": 4}
"""On these platforms times as many: each chunk reads all weights, and 2,048 tokens do enough with them. On an H100
OLMoE-1B-7B runs 3,968 tokens in 62 ms by 512, 42 by 2,048 and 36 at once."""
LEAST_CHUNK = 16
STREAM_S = 0.1
"""Seconds between pieces of text."""


class Engine:
    """Runs one batch: `start` prefills and draws the first tokens, `step` draws more for each row.

    Programs are compiled just before they first run, timed apart (`compile_s`), and kept by the model for batches of
    the same shape. What a step consumes is donated, so that caches are updated in place.
    """

    def __init__(self, model: LanguageModel, batch: int, draw: Draw, seed: int, eos_ids: Sequence[int] = ()):
        """For `batch` prompts at once, which end at `eos_ids`."""
        self.model, self.draw = model, draw
        self.lie = lay(batch, model.mesh, model.options)
        self.compile_s = 0.0
        self._batch = batch
        self._seed = jnp.asarray(np.uint32(seed))
        # Filled up so that the number of ids does not shape the program.
        eos = np.full(round_up(max(len(eos_ids), 1), 8), -1, np.int32)
        eos[: len(eos_ids)] = eos_ids
        self._eos = self._put(eos)
        self._filters = draw.filters and self._operands(draw.filters)
        self._penalty = None if draw.penalty == 1 else self._put(np.float32(draw.penalty))
        self._graph, self._state = model.split()
        key = (model.structure(), jax.tree.structure(self._state), *map(_signature, jax.tree.leaves(self._state)))
        self._programs = model.programs.setdefault(key, {})

    def start(
        self, tokens: Int[np.ndarray, "B S"], lengths: Int[np.ndarray, " B"], first_request: int, max_len: int
    ) -> tuple[Int[np.ndarray, "1 B"], Float[np.ndarray, "1 B"] | None, int]:
        """Prefills right-padded prompts, chunk by chunk, and draws the first token of each.

        Args:
          tokens: padded with anything.
          lengths: tokens of each prompt, at least 1.
          first_request: the number of the first prompt among all prompts of the call, for the random keys.
          max_len: the longest row, prompt and continuation together.

        Returns:
          New tokens, their log-probabilities or None, pairs dropped by a capacity factor.
        """
        numbers = np.arange(len(tokens), dtype=np.int32) + np.int32(first_request)
        self._requests = Requests(
            lengths=self.model.put_rows(lengths.astype(np.int32), self.lie),
            numbers=self.model.put_rows(numbers, self.lie),
            seed=self._seed,
            eos=self._eos,
            filters=self._filters,
            penalty=self._penalty,
        )
        self._decode: jax.stages.Compiled | None = None
        self._budget = 1
        size = min(cache_bucket(max_len), self.model.config.context)
        statics, arguments = (size, self.draw.logprobs, self._penalty is not None, self.lie), (self._requests.lengths,)
        self._step: Step = self._program(begin, statics, arguments)(self._state, *arguments)
        return self._prefill(tokens)

    def _prefill(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, int]:
        width = chunk_size(tokens.shape[1], self.lie.rows, self.model.mesh.devices.flat[0].platform)
        padded = np.zeros((len(tokens), round_up(tokens.shape[1], width)), np.int32)
        padded[:, : tokens.shape[1]] = tokens
        program, drawn = None, []
        for first in range(0, padded.shape[1], width):
            chunk = self.model.put_rows(padded[:, first : first + width], self.lie)
            arguments = (self._step, chunk, self._put(np.int32(first)), self._requests)
            program = program or self._program(prefill, (self.lie,), arguments)
            self._step, new = program(self._state, *arguments)
            drawn.append(new)
        new_tokens, logprobs, _ = self._to_host(drawn[-1])
        return new_tokens, logprobs, sum(int(replicated_to_host(new.dropped)) for new in drawn)

    def step(
        self, left: Int[np.ndarray, " B"], most: int = BLOCK
    ) -> tuple[Int[np.ndarray, "n B"], Float[np.ndarray, "n B"] | None, int]:
        """Draws more tokens in one dispatch: 1 in the first after `start`, then ever twice as many, up to BLOCK.

        They stay as few as about STREAM_S bring, so that a stream of text looks alive, and end when no row goes on.

        Args:
          left: tokens that each row may still draw; rows with 0, and from an end-of-sequence id on, are computed but go
            to no expert, and what they draw has no meaning.
          most: a bound on the tokens of a row.
        """
        began, compiled = time.perf_counter(), self.compile_s
        new = self._draw(left, min(self._budget, most))
        seconds = time.perf_counter() - began - (self.compile_s - compiled)
        self._budget = max(1, min(2 * self._budget, BLOCK, int(STREAM_S / seconds * len(new[0]))))
        return new

    def _draw(self, left: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray | None, int]:
        """Up to `budget` tokens a row; hosts measure for themselves, and the least of their budgets counts."""
        devices = NamedSharding(self.model.mesh, PartitionSpec(self.model.mesh.axis_names))
        mine = np.full(self.model.mesh.size, budget, np.int32)
        budgets = jax.make_array_from_callback(mine.shape, devices, lambda index: mine[index])
        arguments = (self._step, self.model.put_rows(left, self.lie), budgets, self._requests)
        if self._decode is None:
            self._decode = self._program(decode, (self.lie,), arguments)
        self._step, drawn = self._decode(self._state, *arguments)
        return self._to_host(drawn)

    def _to_host(self, drawn: Drawn) -> tuple[np.ndarray, np.ndarray | None, int]:
        for array in jax.tree.leaves(drawn):  # a device's copies, each of which takes a while to begin
            array.copy_to_host_async()
        count = int(replicated_to_host(drawn.count))
        tokens, logprobs = (
            None if a is None else replicated_to_host(a)[:count, : self._batch] for a in (drawn.tokens, drawn.logprobs)
        )
        assert tokens is not None
        return tokens, logprobs, int(replicated_to_host(drawn.dropped))

    def _put(self, value: np.ndarray | np.number) -> jax.Array:
        """The same value on every device."""
        value = np.asarray(value)
        sharding = NamedSharding(self.model.mesh, PartitionSpec())
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    def _operands(self, filters: Filters) -> Filters:
        """As arrays, which any values share a program for."""
        return Filters(
            temperature=self._put(np.float32(filters.temperature)),
            top_k=self._put(np.int32(min(filters.top_k, self.model.config.vocab_size))),
            top_p=self._put(np.float32(filters.top_p)),
            min_p=self._put(np.float32(filters.min_p)),
        )

    def _program(self, function: Any, statics: tuple, arrays: tuple) -> jax.stages.Compiled:
        """The compiled `function` for what comes behind the model's structure, and behind its parameters."""
        key = (function, statics, jax.tree.structure(arrays), *map(_signature, jax.tree.leaves(arrays)))
        if key not in self._programs:
            began = time.perf_counter()
            self._programs[key] = function.lower(self._graph, *statics, self._state, *arrays).compile()
            self.compile_s += time.perf_counter() - began
        return self._programs[key]


def chunk_size(longest: int, rows: int, platform: str) -> int:
    """Tokens of a row that run at once in prefill, a power of two; `longest` is that of the prompts."""
    times = TIMES.get(platform, 1)
    bound = min(times * CHUNK, times * CHUNK_TOKENS // rows)
    return max(LEAST_CHUNK, min(_power_of_two(longest), 1 << max(bound, 1).bit_length() - 1))


def cache_bucket(length: int) -> int:
    """Places of a cache for `length` tokens: four sizes an octave, so that a new length seldom compiles anew."""
    return round_up(length, max(128, _power_of_two(length) // 8))


def _power_of_two(size: int) -> int:
    """The least that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()


def _signature(leaf: jax.Array) -> tuple:
    return leaf.shape, leaf.dtype, leaf.sharding
