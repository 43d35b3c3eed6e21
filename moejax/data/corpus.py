"""Tokenised documents, one after another in one array."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from moejax.data.documents import read_documents
from moejax.data.encoder import DocumentEncoder, Encoded


@dataclass(frozen=True, slots=True)
class Corpus:
    """The tokens of many documents, in memory or mapped from a file.

    Attributes:
      tokens: of all documents, uint16 or uint32 (`token_dtype`).
      ends: where each document ends in `tokens`, int64.
      learned: which tokens are to be learned, where not all are; never a document's first.
      bytes: UTF-8 bytes of the text that is to be learned, the denominator of bits per byte.
      targets: tokens that are to be learned; a document's first is not.
    """

    tokens: Int[np.ndarray, " T"]
    ends: Int[np.ndarray, " D"]
    learned: Bool[np.ndarray, " T"] | None
    bytes: int
    targets: int

    @classmethod
    def of(cls, documents: Iterable[Encoded], vocab_size: int) -> "Corpus":
        """All of them in memory."""
        kept = list(documents)
        dtype = token_dtype(vocab_size)
        tokens = np.concatenate([np.empty(0, dtype), *(one.ids.astype(dtype) for one in kept)])
        ends = np.cumsum([one.ids.size for one in kept], dtype=np.int64)
        masks = [one.mask() for one in kept]
        learned = None if all(one.learned is None for one in kept) else np.concatenate(masks)
        return cls(tokens, ends, learned, sum(one.bytes for one in kept), sum(int(mask.sum()) for mask in masks))


def read_corpus(path: str | Path, encoder: DocumentEncoder, progress: Callable[[int], None] | None = None) -> Corpus:
    """A file's documents in memory, in order: for an evaluation, which reads them once.

    Raises:
      MoejaxError: a mistake in the file (see `read_documents`), or a conversation that the chat template does not fit.
    """
    return Corpus.of(encoder.encode(read_documents(path, progress)), encoder.vocab_size)


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrower of uint16 and uint32 that holds all ids."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
