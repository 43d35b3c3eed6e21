"""Files tokenised once: a folder of plain arrays for each file and tokenizer, mapped into memory when read.

A folder is written aside and renamed when it is whole, so that what has its name can be read. Processes that make the
same one at once each write their own; the first to be done is kept.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moejax.data.corpus import Corpus, token_dtype
from moejax.data.documents import read_documents
from moejax.data.encoder import DocumentEncoder, Encoded
from moejax.errors import MoejaxError

_FORMAT = 1
_ABANDONED = 3600  # seconds without a write after which a folder written aside belongs to nobody
_BUFFER = 1 << 20


def cached_corpus(
    path: str | Path, encoder: DocumentEncoder, cache: Path, progress: Callable[[int], None] | None = None
) -> tuple[Corpus, str]:
    """A file's documents as tokens, from `cache` when they are there, else written there first.

    Writing takes the memory of the longest document and of 8 bytes for each document. The folder's name depends on the
    file's path, size and time of change, and on all that decides the tokens.

    Args:
      path: the file.
      encoder: makes its tokens.
      cache: the folder of all such folders; made where it is missing.
      progress: called now and then with the bytes of the file (as stored) that have been read.

    Returns:
      The corpus, and a digest of its tokens: equal wherever they are equal.

    Raises:
      MoejaxError: a mistake in the file (see `read_documents`), or the cache cannot be written or read.
    """
    path = Path(path).expanduser()
    folder = cache / f"{path.name.partition('.')[0]}-{_key(path, encoder)}"
    if not folder.is_dir():
        documents = encoder.encode(read_documents(path, progress))
        try:
            _write(folder, documents, token_dtype(encoder.vocab_size))
        except OSError as error:
            raise MoejaxError(f"cannot write {folder} ({error.strerror or error}); make room or a way there") from error
    return _open(folder)


def _key(path: Path, encoder: DocumentEncoder) -> str:
    try:
        stored = path.resolve().stat()
    except OSError as error:
        raise MoejaxError(f"{path} cannot be read ({error.strerror or error}); check the path") from error
    identity = [_FORMAT, str(path.resolve()), stored.st_size, stored.st_mtime_ns, encoder.fingerprint]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def _write(folder: Path, documents: Iterator[Encoded], dtype: np.dtype) -> None:
    """Writes the folder aside and gives it its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    written = aside / folder.name  # its permissions are those of the user's other folders
    try:
        written.mkdir()
        _fill(written, documents, dtype)
        try:
            written.rename(folder)
        except OSError:
            if not folder.is_dir():  # where it is, another process was faster
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _fill(folder: Path, documents: Iterator[Encoded], dtype: np.dtype) -> None:
    ends, digest = array("q"), hashlib.sha256()
    tokens = size = targets = 0
    masked = False
    with (folder / "tokens.bin").open("wb", _BUFFER) as ids, (folder / "learned.bin").open("wb", _BUFFER) as learned:
        for document in documents:
            mask = document.mask()
            for file, part in ((ids, document.ids.astype(dtype).tobytes()), (learned, mask.tobytes())):
                file.write(part)
                digest.update(part)
            tokens += document.ids.size
            ends.append(tokens)
            targets += int(mask.sum())
            size += document.bytes
            masked |= document.learned is not None
    if not masked:
        (folder / "learned.bin").unlink()
    np.frombuffer(ends, np.int64).tofile(folder / "ends.bin")
    meta = {"tokens": tokens, "documents": len(ends), "dtype": dtype.name, "masked": masked}
    meta |= {"bytes": size, "targets": targets, "digest": digest.hexdigest()[:16]}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _sweep(folder: Path) -> None:
    """Removes what processes that were killed while they wrote this folder have left."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        with contextlib.suppress(OSError):
            if time.time() - max(path.stat().st_mtime for path in (left, *left.rglob("*"))) > _ABANDONED:
                shutil.rmtree(left, ignore_errors=True)


def _open(folder: Path) -> tuple[Corpus, str]:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        tokens = _mapped(folder / "tokens.bin", np.dtype(meta["dtype"]), meta["tokens"])
        ends = _mapped(folder / "ends.bin", np.dtype(np.int64), meta["documents"])
        learned = _mapped(folder / "learned.bin", np.dtype(np.bool), meta["tokens"]) if meta["masked"] else None
        return Corpus(tokens, ends, learned, meta["bytes"], meta["targets"]), meta["digest"]
    except (OSError, ValueError, KeyError) as error:
        raise MoejaxError(f"{folder} is damaged ({error}); delete it, and it is made anew") from error


def _mapped(path: Path, dtype: np.dtype, count: int) -> Any:
    """A file's array; not as the subclass that indexes slowly."""
    if path.stat().st_size != count * dtype.itemsize:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {count * dtype.itemsize}")
    return np.asarray(np.memmap(path, dtype, "r"))
