"""The evaluation: one compiled program, over all rows of all files."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from moejax.data.encoder import DocumentEncoder
from moejax.data.packing import PackedRows, batches
from moejax.distributed import replicated_to_host
from moejax.errors import MoejaxError
from moejax.evaluation.results import Result
from moejax.evaluation.texts import Text, read_texts, row_length
from moejax.language_model import LanguageModel, put_rows
from moejax.model import Decoder, Lie, lay
from moejax.moe.usage import dropped_pairs, entropy_sums, pairs_by_expert
from moejax.training.batch import NO_TARGET, Batch
from moejax.training.cross_entropy import cross_entropy

BATCH = 8


@struct.dataclass
class Seen:
    """Sums over one batch; see `Result`."""

    nats: Float[Array, ""]
    tokens: Int[Array, ""]
    tokens_per_expert: Int[Array, "L E"]
    entropy: Float[Array, " L"]
    dropped: Int[Array, ""]


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Evaluates parameters, those of a model or of a training run at some step, with one program for all of them.

    Attributes:
      decoder: makes a decoder of the parameters; called while the program is traced, so that it may cast them.
      lie: how `batch` rows lie on the mesh, from `moejax.model.lay`.
      batch: rows that are computed together.
      length: tokens of a row.
    """

    decoder: Callable[[Any], Decoder]
    lie: Lie
    batch: int
    length: int

    def __call__(self, params: Any, text: Text, tick: Callable[[], None] | None = None) -> Result:
        """The result for one file; `tick` is called after each batch."""
        total: Any = None
        for seen in self._batches(params, text):
            total = jax.tree.map(np.add, total, seen) if total else seen
            if tick:
                tick()
        return Result(
            name=text.name,
            nats=float(total.nats),
            targets=text.corpus.targets,
            bytes=text.corpus.bytes,
            tokens=int(total.tokens),
            tokens_per_expert=total.tokens_per_expert,
            entropy_sum=total.entropy,
            dropped=int(total.dropped),
        )

    def batches(self, text: Text) -> int:
        """How many there are of a file."""
        return -(-len(PackedRows(text.corpus, self.length)) // self.batch)

    def _batches(self, params: Any, text: Text) -> Iterator[Any]:
        """What each batch shows, on the host, wide enough to be summed; one computes while the last one is read."""
        before: Seen | None = None
        for batch in batches(PackedRows(text.corpus, self.length), self.batch):
            running = self._program(params, self._put(batch))
            if before is not None:
                yield jax.tree.map(_wide, before)
            before = running
        if before is not None:
            yield jax.tree.map(_wide, before)

    @functools.cached_property
    def _program(self) -> Any:
        return jax.jit(self._run, out_shardings=NamedSharding(self.lie.stream.mesh, PartitionSpec()))

    def _run(self, params: Any, batch: Batch) -> Seen:
        decoder, real = self.decoder(params), batch.segments > 0
        states, details = decoder.hidden_states(batch.tokens, batch.segments, batch.positions, self.lie)
        head, bias = decoder.head()
        # Rows that fill up the mesh are zeros throughout, targets too.
        hits = (real & (batch.targets != NO_TARGET)).astype(jnp.float32)
        return Seen(
            nats=cross_entropy(states[-1], head, bias, batch.targets, hits, decoder.config, self.lie.stream),
            tokens=real.sum(dtype=jnp.int32),
            tokens_per_expert=pairs_by_expert(details),
            entropy=entropy_sums(details, real),
            dropped=dropped_pairs(details),
        )

    def _put(self, batch: Batch) -> Batch:
        return jax.tree.map(lambda a: put_rows(a, self.lie), batch)


def evaluate(
    model: LanguageModel, files: Sequence[str | Path], *, length: int | None = None, batch: int = BATCH
) -> list[Result]:
    """Loss, perplexity, bits per byte and experts' load of each file.

    Args:
      model: with a tokenizer.
      files: text or JSONL, see `moejax.data.documents.read_documents`.
      length: tokens of a row; None is 512, or what the model takes.
      batch: rows that are computed together.

    Raises:
      MoejaxError: a mistake in a file, no tokenizer, or sizes that the model does not take.
    """
    length = row_length(model.config, length)
    texts = read_texts(files, DocumentEncoder.from_folder(model.folder), model.config)
    evaluator, params = evaluator_of(model, length, batch)
    return [evaluator(params, text) for text in texts]


def evaluator_of(model: LanguageModel, length: int, batch: int) -> tuple[Evaluator, Any]:
    """The evaluator of a loaded model, and the parameters that it takes.

    Raises:
      MoejaxError: a batch of no row.
    """
    if batch < 1:
        raise MoejaxError(f"batch={batch} must be at least 1")
    graph, state = model.split()
    lie = lay(batch, model.mesh, model.options)
    return Evaluator(functools.partial(nnx.merge, graph), lie, batch, length), state


def _wide(sums: jax.Array) -> Any:
    """On the host, as f64 or int64."""
    array = replicated_to_host(sums)
    return array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
