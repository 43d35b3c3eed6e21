"""Files to evaluate on, as rows of tokens.

The documents of a file stand one after another and are cut into rows of equal length (see `moejax.data.packing`), so
that each token but a document's first is predicted exactly once, from the tokens of its document that precede it in its
row. What continues a document in the next row sees nothing of the row before; longer rows therefore give lower losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moejax.config import ModelConfig
from moejax.data.corpus import Corpus, read_corpus
from moejax.data.encoder import DocumentEncoder
from moejax.errors import MoejaxError

LENGTH = 512


@dataclass(frozen=True, eq=False)
class Text:
    """A file's documents as tokens, and what to call it."""

    name: str
    corpus: Corpus


def read_texts(paths: Sequence[str | Path], encoder: DocumentEncoder, config: ModelConfig) -> list[Text]:
    """The files in memory.

    Args:
      paths: text or JSONL, see `moejax.data.documents.read_documents`.
      encoder: of the model's folder.
      config: the model's.

    Raises:
      MoejaxError: a mistake in a file, one with nothing to predict, or tokens that the model does not have.
    """
    texts = []
    for path, name in zip(paths, names_of(paths), strict=True):
        corpus = read_corpus(path, encoder)
        if not corpus.targets:
            raise MoejaxError(f"{path} has nothing to predict: no document has a second token; leave the file out")
        if (highest := int(corpus.tokens.max())) >= config.vocab_size:
            raise MoejaxError(
                f"{path}: the tokenizer in {encoder.folder} gives id {highest}, but the model's vocabulary ends at "
                f"{config.vocab_size - 1}; use the tokenizer that the model was trained with"
            )
        texts.append(Text(name, corpus))
    return texts


def names_of(paths: Sequence[str | Path]) -> list[str]:
    """For each file its name up to the first dot; where two are alike, the whole names, or else the paths.

    Raises:
      MoejaxError: a path is given twice.
    """
    whole = [str(path) for path in paths]
    if twice := next((path for path in whole if whole.count(path) > 1), None):
        raise MoejaxError(f"{twice} is given twice; each file is evaluated once")
    files = [Path(path).name for path in whole]
    short = [name.lstrip(".").partition(".")[0] for name in files]
    return next((names for names in (short, files) if len(set(names)) == len(names)), whole)


def longest_row(config: ModelConfig) -> int:
    """The most tokens that documents may be packed into one row of."""
    steady = all(rope.kind != "dynamic" and not rope.switches for rope in config.ropes)
    return config.context if steady else config.steady_length


def row_length(config: ModelConfig, asked: int | None) -> int:
    """The length of rows: as asked, or LENGTH, or what the model takes where that is less.

    Raises:
      MoejaxError: more than the model takes, or no token.
    """
    most = longest_row(config)
    if asked is None:
        return min(LENGTH, most)
    if asked < 1:
        raise MoejaxError(f"length={asked} must be at least 1")
    if asked > most:
        why = "the model's context" if most == config.context else "where this model's rope changes with a row's length"
        raise MoejaxError(f"length={asked} is over {most}, {why}; make it {most} at most")
    return asked
