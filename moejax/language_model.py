"""A loaded model as people hold it: parameters on a mesh, its tokenizer, and compiled calls."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from moejax.config import ModelConfig
from moejax.errors import MoejaxError
from moejax.inference.tokenizer import Tokenizer
from moejax.model import Decoder, Forward, Lie, Options, lay


@dataclass(eq=False)
class LanguageModel:
    """A decoder on a mesh. `moejax.load` makes one; `moejax.generate` continues prompts with it.

    Attributes:
      config: sizes and switches.
      decoder: the flax.nnx module, parameters in place. New values may be put into it, new modules may not.
      mesh: with axes ("ep", "tp").
      options: strategy, capacity factor, chunks.
      folder: where the checkpoint is.
      raw_config: config.json as it was read; of a model of several modalities, the text part.
      generation_config: generation_config.json, or {}.
      tokenizer: None where the folder has no tokenizer.json.
      left_out: parts of the checkpoint that are not of the decoder, by name.
      programs: compiled generation steps, by the decoder's structure and then by shape, kept for later calls.
    """

    config: ModelConfig
    decoder: Decoder
    mesh: Mesh
    options: Options
    folder: Path
    raw_config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tokenizer: Tokenizer | None
    left_out: tuple[str, ...] = ()
    programs: dict[Any, Any] = field(default_factory=dict, repr=False)
    _taken: "_Parts | None" = field(default=None, init=False, repr=False)

    def __call__(
        self,
        tokens: ArrayLike | Sequence[Sequence[int]],
        *,
        segment_ids: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        output_router_logits: bool = False,
        output_hidden_states: bool = False,
    ) -> Float[Array, "B S V"] | Forward:
        """Logits for every token of whole sequences; compiled once for each shape.

        Args:
          tokens: token ids `[B, S]`, checked against the vocabulary on the host.
          segment_ids: `[B, S]` of packed sequences: 0 is padding, attention stays within a segment, positions restart.
          positions: `[B, S]` for the rotary embedding; by default those of the segment, or 0 .. S-1.
          attention_mask: `[B, S]`, 1 for tokens and 0 for padding, as transformers' forward takes it: positions are
            0 .. S-1 all the same. Not together with segment_ids.
          output_router_logits: give router logits and chosen experts too.
          output_hidden_states: give the embeddings and every layer's output too.

        Returns:
          f32 logits `[B, S, V]`, or a `Forward` with `.logits`, `.router_logits[l]`, `.routed_experts[l]` and
          `.hidden_states` where one of the outputs was asked for.

        Raises:
          MoejaxError: ids outside the vocabulary, shapes that do not fit, or a sequence over the context.
        """
        ids = check_tokens(tokens, self.config)
        segments, places = _segments_and_positions(ids.shape, segment_ids, positions, attention_mask)
        _check_packing(self.config, segments, places)
        lie = lay(ids.shape[0], self.mesh, self.options)
        arrays = (self.put_rows(a, lie) for a in (ids, segments, places))
        flags = bool(output_router_logits), bool(output_hidden_states)
        out = _forward(*self.split(), *arrays, lie, ids.shape[0], *flags)
        return out if any(flags) else out.logits

    def split(self) -> tuple[Any, Any]:
        """The decoder as compiled functions take it: its static structure and its parameters as they are now."""
        parts = self._parts()
        return parts.structure.graph, nnx.from_flat_state(parts.variables)

    def structure(self) -> "Structure":
        """The same structure as a key, hashed once."""
        return self._parts().structure

    def _parts(self) -> "_Parts":
        """Taken apart once, since for a deep decoder that takes as long as a short prompt."""
        if self._taken is None or self._taken.decoder is not self.decoder:
            self._taken = _Parts.of(self.decoder)
        return self._taken

    def parameters(self) -> dict[str, jax.Array]:
        """Role -> array, such as "layers.0.moe.gate_up"."""
        return {role_of(path): leaf[...] for path, leaf in nnx.to_flat_state(self.split()[1])}

    def put_rows(self, rows: np.ndarray, lie: Lie) -> jax.Array:
        """See `put_rows`."""
        return put_rows(rows, lie)


def put_rows(rows: np.ndarray, lie: Lie) -> jax.Array:
    """A host array `[B, ...]` on the mesh, filled up with rows of zeros to `lie.rows` and cut as the stream is."""
    full = np.zeros((lie.rows, *rows.shape[1:]), rows.dtype)
    full[: len(rows)] = rows
    sharding = NamedSharding(lie.stream.mesh, lie.stream.batch_spec)
    return jax.make_array_from_callback(full.shape, sharding, lambda index: full[index])


class Structure:
    """A decoder's structure that equals others by value; its hash, which takes a millisecond, is kept."""

    def __init__(self, graph: Any):
        """Wraps what `nnx.split` gives."""
        self.graph, self._hash = graph, hash(graph)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and (self.graph is other.graph or self.graph == other.graph)


@dataclass(frozen=True, slots=True)
class _Parts:
    """A decoder, its structure, and the variables in it by path."""

    decoder: Decoder
    structure: Structure
    variables: Sequence[tuple[Any, nnx.Variable]]

    @classmethod
    def of(cls, decoder: Decoder) -> "_Parts":
        nodes = nnx.iter_graph(decoder)
        variables = [(path, node) for path, node in nodes if isinstance(node, nnx.Variable)]
        return cls(decoder, Structure(nnx.split(decoder)[0]), variables)


def role_of(path: Sequence[Any]) -> str:
    """A parameter's dotted name from its path in the module."""
    return ".".join(str(part) for part in path)


def check_tokens(tokens: Any, config: ModelConfig) -> Int[np.ndarray, "B S"]:
    """Token ids as int32 `[B, S]`.

    Raises:
      MoejaxError: not whole numbers in two dimensions, ids outside the vocabulary, or sequences over the context.
    """
    try:
        ids = np.asarray(tokens)
    except ValueError as error:
        raise MoejaxError("tokens must be one rectangle [B, S]; pad the rows and pass attention_mask=") from error
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or 0 in ids.shape:
        raise MoejaxError(f"tokens must be whole numbers [B, S], got {ids.dtype} of shape {list(ids.shape)}")
    outside = (ids < 0) | (ids >= config.vocab_size)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise MoejaxError(
            f"token id {ids[row, column]} (row {row}, place {column}) is outside the vocabulary, "
            f"0 to {config.vocab_size - 1}"
        )
    if ids.shape[1] > config.context:
        raise MoejaxError(f"{ids.shape[1]} tokens are over the model's context of {config.context}; shorten the rows")
    return ids.astype(np.int32)


def _segments_and_positions(
    shape: tuple[int, ...], segment_ids: Any, positions: Any, attention_mask: Any
) -> tuple[np.ndarray, np.ndarray]:
    if segment_ids is not None and attention_mask is not None:
        raise MoejaxError("give segment_ids or attention_mask, not both: both say what is padding")
    given = segment_ids if segment_ids is not None else attention_mask
    segments = np.ones(shape, np.int32) if given is None else _integers("segment_ids or attention_mask", given, shape)
    if attention_mask is not None:
        segments = (segments != 0).astype(np.int32)
    if positions is not None:
        return segments, _integers("positions", positions, shape)
    index = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    if segment_ids is None:
        return segments, index
    starts = np.ones(shape, bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return segments, index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)


def _check_packing(config: ModelConfig, segments: np.ndarray, positions: np.ndarray) -> None:
    """Some rope follows the length of a row, so that sequences packed in one row would not be as each alone."""
    real = segments > 0
    longest = np.max(positions, where=real, initial=-1) + 1
    steady = all(rope.kind != "dynamic" and not rope.switches for rope in config.ropes)
    if steady or longest <= config.steady_length:
        return
    packed = [len(np.unique(row[row > 0])) > 1 for row in segments]
    if any(packed):
        raise MoejaxError(
            f"row {packed.index(True)} packs several sequences, one of {longest} tokens; with rope scaling by length, "
            f"sequences over {config.steady_length} tokens need rows of their own"
        )


def _integers(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise MoejaxError(f"{name} must be one rectangle of the tokens' shape {list(shape)}") from error
    if array.shape != shape or not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        raise MoejaxError(
            f"{name} must be whole numbers of the tokens' shape {list(shape)}, got {array.dtype} {list(array.shape)}"
        )
    if not 0 <= array.min() <= array.max() < 2**31:
        raise MoejaxError(f"{name} must be 0 to {2**31 - 1}, got {array.min()} to {array.max()}")
    return array.astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7, 8))
def _forward(
    graph: Any,
    state: Any,
    tokens: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    lie: Lie,
    batch: int,
    router_logits: bool,
    hidden_states: bool,
) -> Forward:
    decoder = nnx.merge(graph, state)
    out = decoder(tokens, segments, positions, lie, router_logits=router_logits, hidden_states=hidden_states)
    if batch == lie.rows:
        return out
    pairs = batch * tokens.shape[1]
    return Forward(
        logits=out.logits[:batch],
        router_logits=tuple(x[:pairs] for x in out.router_logits),
        routed_experts=tuple(x[:pairs] for x in out.routed_experts),
        hidden_states=tuple(x[:batch] for x in out.hidden_states),
        dropped=out.dropped,
    )
