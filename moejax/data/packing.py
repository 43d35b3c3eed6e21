"""Documents packed into rows of equal length, several in a row, none of their targets lost.

A document of n tokens has n - 1 places, each a token and the one that follows it. The places of all documents stand one
after another, and rows are cut from them: every place of a row has a target, and a document that is longer than the row
goes on in the next one as a segment of its own, which begins with the target of the row's last place.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from moejax.data.corpus import Corpus
from moejax.training.batch import NO_TARGET, Batch


class PackedRows:
    """The rows of a corpus; any of them can be had alone.

    Attributes:
      length: places in a row.
    """

    def __init__(self, corpus: Corpus, length: int, order: Int[np.ndarray, " D"] | None = None) -> None:
        """Packs the documents as they stand, or in the order of their indices in `order`."""
        self.length = length
        self._corpus = corpus
        starts = np.concatenate([np.zeros(1, np.int64), corpus.ends[:-1]])
        places = np.maximum(corpus.ends - starts - 1, 0)
        if order is not None:
            starts, places = starts[order], places[order]
        self._ends = np.cumsum(places)
        # From the number of a place among all places to the token that stands there.
        self._to_tokens = starts - (self._ends - places)
        self._begins = self._ends - places

    def __len__(self) -> int:
        return -(-int(self._ends[-1]) // self.length) if self._ends.size else 0

    def __getitem__(self, index: int) -> Int[np.ndarray, "4 S"]:
        """One row: tokens, targets, segments and positions, int32; the last row may end with padding."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        low = index * self.length
        high = min(low + self.length, int(self._ends[-1]))
        first, last = np.searchsorted(self._ends, [low, high - 1], side="right")
        pieces = slice(first, last + 1)
        begins = np.maximum(self._begins[pieces], low)
        counts = np.minimum(self._ends[pieces], high) - begins
        places = np.arange(low, high)
        here = places + np.repeat(self._to_tokens[pieces], counts)
        row = np.zeros((4, self.length), np.int32)
        row[1] = NO_TARGET
        used = row[:, : high - low]
        used[0] = self._corpus.tokens[here]
        used[1] = self._corpus.tokens[here + 1]
        if self._corpus.learned is not None:
            used[1][~self._corpus.learned[here + 1]] = NO_TARGET
        # A document without a place, a single token, takes no number.
        used[2] = np.repeat(np.cumsum(counts > 0), counts)
        used[3] = places - np.repeat(begins, counts)
        return row


def batches(rows: PackedRows, batch: int) -> Iterator[Batch]:
    """All rows in order, `batch` at a time, int32 [batch, S]; the last batch is filled up with rows of padding."""
    for first in range(0, len(rows), batch):
        found = [rows[index] for index in range(first, min(first + batch, len(rows)))]
        yield stacked([*found, *[_padding(rows.length)] * (batch - len(found))])


def stacked(rows: Sequence[Int[np.ndarray, "4 S"]]) -> Batch:
    """Rows as a batch of arrays of the host."""
    return Batch(*np.stack(rows, axis=1))


def _padding(length: int) -> Int[np.ndarray, "4 S"]:
    row = np.zeros((4, length), np.int32)
    row[1] = NO_TARGET
    return row
