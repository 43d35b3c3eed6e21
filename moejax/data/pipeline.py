"""What a training run reads: a mixture of files as packed batches, in an order that the seed alone decides.

Every file is an endless sequence of rows, epoch after epoch. Each epoch packs the documents in a new order and visits
the rows in a new order. The mixture deals rows from the files by their weights, and a batch is the next rows of it, of
which each process reads its own: where the reading stands is one number, whatever the processes.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from moejax.data.cache import cached_corpus
from moejax.data.corpus import Corpus
from moejax.data.encoder import DocumentEncoder
from moejax.data.packing import PackedRows, stacked
from moejax.data.sources import Source
from moejax.errors import MoejaxError
from moejax.training.batch import Batch

_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)  # batches made while the step runs
_ENDLESS = 1 << 48  # rows; grain counts them in floats too


class TrainingData(Iterator[Batch]):
    """Batches without an end; each is this process' share, numpy int32 [batch / process_count, length].

    Attributes:
      sources: as given.
      corpora: the tokens of each source.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: DocumentEncoder,
        *,
        batch: int,
        length: int,
        seed: int,
        cache: Path,
        process_index: int = 0,
        process_count: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Tokenises what `cache` does not hold, and starts at the first batch.

        Args:
          sources: the mixture.
          encoder: makes tokens of documents.
          batch: rows of the global batch.
          length: places of a row.
          seed: of the order.
          cache: the folder of tokenised files.
          process_index: which of the equal shares of a batch, one after another, to read.
          process_count: number of shares.
          progress: called with the bytes of the files that have been read, and their sum.

        Raises:
          MoejaxError: a mistake in a file, a file without anything to learn, or processes that do not divide the batch.
        """
        if not sources:
            raise MoejaxError("the mixture has no file; name at least one")
        if batch % process_count:
            raise MoejaxError(f"a batch of {batch} rows does not divide among {process_count} processes; change it")
        self.sources = tuple(sources)
        self._batch, self._length, self._seed = batch, length, seed
        self._share, self._shares = process_index, process_count
        self.corpora, self._digests = _corpora(self.sources, encoder, cache, progress)
        self._rows = _mixture(self.sources, self.corpora, length, seed)
        self._start(0)

    def __next__(self) -> Batch:
        """The next batch; its arrays have int32 [batch / process_count, length]."""
        batch = next(self._batches)
        self._taken += self._batch
        return batch

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes that a target stands for, on average over the mixture."""
        total = sum(source.weight for source in self.sources)
        pairs = zip(self.sources, self.corpora, strict=True)
        return sum(source.weight * corpus.bytes / corpus.targets for source, corpus in pairs) / total

    def state(self) -> dict[str, Any]:
        """Where the reading stands, as JSON: the rows taken, and what decides their order."""
        return {"rows": self._taken, **self._order()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`, which any number of processes and any size of the batch may have left.

        Raises:
          MoejaxError: it is the state of other data.
        """
        order = self._order()
        for name in sorted(order):
            if state.get(name) != order[name]:
                raise MoejaxError(
                    f"the data is not that of the run: its {name} was {state.get(name)}, now it is {order[name]}; "
                    "resume with the same files, weights, tokenizer, length and seed, or start a new run from the model"
                )
        self._start(int(state["rows"]))

    def close(self) -> None:
        """Ends the thread that reads ahead."""
        self._batches.close()

    def _order(self) -> dict[str, Any]:
        mixture = [
            [source.name, source.weight, digest] for source, digest in zip(self.sources, self._digests, strict=True)
        ]
        return {"length": self._length, "seed": self._seed, "sources": mixture}

    def _start(self, taken: int) -> None:
        if taken:
            self._batches.close()
        self._taken = taken
        each = self._batch // self._shares

        def row(index: int) -> Int[np.ndarray, "4 S"]:
            batch, within = divmod(int(index), each)
            found = self._rows[taken + batch * self._batch + self._share * each + within]
            assert found is not None  # grain's types allow for filters
            return found

        ours = grain.MapDataset.range(_ENDLESS).map(row)
        self._batches = iter(ours.batch(each, batch_fn=stacked).to_iter_dataset(_AHEAD))


class _Epochs(grain.MapDataset):
    """The packed rows of a corpus, each epoch's documents in an order of its own.

    Grain numbers the rows of later epochs on from those of the first.
    """

    def __init__(self, corpus: Corpus, length: int, seed: int) -> None:
        super().__init__()
        self._corpus, self._length, self._seed = corpus, length, seed
        self._count = len(PackedRows(corpus, length))
        self._packed = functools.lru_cache(maxsize=2)(self._pack)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Int[np.ndarray, "4 S"]:  # type: ignore[override]
        epoch, row = divmod(index, self._count)
        return self._packed(epoch)[row]

    def _pack(self, epoch: int) -> PackedRows:
        order = np.random.default_rng((self._seed, epoch)).permutation(self._corpus.ends.size)
        return PackedRows(self._corpus, self._length, order)


def _mixture(sources: Sequence[Source], corpora: Sequence[Corpus], length: int, seed: int) -> grain.MapDataset:
    """Rows of all sources, dealt by their weights, without an end."""
    seeds = np.random.SeedSequence(seed).generate_state(2 * len(sources)).reshape(-1, 2).tolist()
    endless = [
        _Epochs(corpus, length, of_documents).shuffle(seed=of_rows).repeat()
        for corpus, (of_documents, of_rows) in zip(corpora, seeds, strict=True)
    ]
    return grain.MapDataset.mix(endless, [source.weight for source in sources])


def _corpora(
    sources: Sequence[Source],
    encoder: DocumentEncoder,
    cache: Path,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[Corpus], list[str]]:
    paths = [Path(source.path).expanduser() for source in sources]
    sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]
    corpora, digests = [], []
    for index, path in enumerate(paths):
        tell = functools.partial(_tell, progress, sum(sizes[:index]), sum(sizes)) if progress else None
        corpus, digest = cached_corpus(path, encoder, cache, tell)
        if corpus.targets == 0:
            raise MoejaxError(f"{path} has no token to learn; leave it out")
        corpora.append(corpus)
        digests.append(digest)
        if tell:
            tell(sizes[index])
    return corpora, digests


def _tell(progress: Callable[[int, int], None], before: int, total: int, read: int) -> None:
    progress(before + read, total)
