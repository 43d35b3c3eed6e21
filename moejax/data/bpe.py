"""A byte-level BPE tokenizer, learned from files of documents."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from moejax.data.documents import END_OF_DOCUMENT, Document, read_documents
from moejax.data.encoder import tokenise
from moejax.errors import MoejaxError
from moejax.inference.tokenizer import Tokenizer

_BYTES = 256


@dataclass(frozen=True, slots=True)
class Counted:
    """A file's text in UTF-8 bytes and in tokens."""

    path: str
    bytes: int
    tokens: int

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(self.tokens, 1)


def train_bpe(paths: Sequence[str | Path], vocab_size: int, bars: bool = False) -> Backend:
    """Learns merges from all files together, each counting as much as it is long.

    Every byte is a token, so that any text has one and is had back from it. Texts are split as GPT-2's are. The end of
    a document is the special token 0.

    Args:
      paths: files of documents (see `read_documents`); of conversations the contents of the messages count.
      vocab_size: number of tokens in the end; fewer where the files hold no pair twice any more.
      bars: whether `tokenizers` shows on stderr how far it is.

    Raises:
      MoejaxError: a mistake in a file, or a vocabulary without room for the bytes.
    """
    if vocab_size <= _BYTES:
        raise MoejaxError(
            f"--vocab-size {vocab_size} must be above {_BYTES}: there are {_BYTES} bytes and one special token"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=bars,
    )
    texts = (text for path in paths for document in read_documents(path) for text in _texts(document))
    backend.train_from_iterator(texts, trainer)
    return backend


def write_tokenizer(backend: Backend, folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, as transformers reads them.

    Raises:
      MoejaxError: a tokenizer is there already, or the folder cannot be written.
    """
    refuse_existing(folder)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_DOCUMENT,
        "eos_token": END_OF_DOCUMENT,
        "clean_up_tokenization_spaces": False,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The tokenizer last: it is what a folder is known by.
        _replace(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
        _replace(folder / "tokenizer.json", backend.to_str(pretty=True) + "\n")
    except OSError as error:
        raise MoejaxError(f"cannot write {folder} ({error.strerror or error}); name another folder") from error


def refuse_existing(folder: Path) -> None:
    """A tokenizer is never overwritten: a model's weights fit one alone.

    Raises:
      MoejaxError: there is one.
    """
    if (folder / "tokenizer.json").exists():
        raise MoejaxError(f"{folder} has a tokenizer.json already; name another folder or move it away")


def count_tokens(tokenizer: Tokenizer, path: str | Path, progress: Callable[[int], None] | None = None) -> Counted:
    """How many bytes of text a file has, and how many tokens they become.

    Args:
      tokenizer: makes the tokens.
      path: a file of documents; of conversations the contents of the messages count.
      progress: called now and then with the bytes of the file that have been read.

    Raises:
      MoejaxError: a mistake in the file.
    """
    size = 0

    def texts() -> Iterator[str]:
        nonlocal size
        for document in read_documents(path, progress):
            for text in _texts(document):
                size += len(text.encode())
                yield text

    tokens = sum(len(ids) for ids in tokenise(tokenizer, texts()))
    return Counted(str(path), size, tokens)


def _texts(document: Document) -> Iterator[str]:
    """The text, or the contents of the messages that have one."""
    if document.text is not None:
        yield document.text
    for message in document.messages or ():
        if isinstance(message.get("content"), str):
            yield message["content"]


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
