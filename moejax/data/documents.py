"""The documents of a text or JSONL file, compressed or not, one at a time."""

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moejax.errors import MoejaxError

END_OF_DOCUMENT = "<|endoftext|>"
"""The line that ends a document in a text file."""

_OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
_REPORT_EVERY = 1024  # lines

Line = tuple[int, str]


@dataclass(frozen=True, slots=True)
class Document:
    """A text, or a conversation; the other one is None.

    Attributes:
      text: as it stands in the file.
      messages: such as {"role": "user", "content": "Hello"}, at least one of them the assistant's.
      place: file and line where it ends, for error messages.
    """

    text: str | None
    messages: tuple[dict[str, Any], ...] | None
    place: str


def read_documents(path: str | Path, progress: Callable[[int], None] | None = None) -> Iterator[Document]:
    """The documents of a file, in order; those without a character are left out.

    The name says what it holds: one JSON object a line in *.jsonl, text in all others. There the line <|endoftext|>,
    with the line break before it, ends a document; without one the file is one document. A further .xz or .gz is
    decompressed.

    Args:
      path: the file.
      progress: called now and then with the bytes of the file (as stored) that have been read.

    Raises:
      MoejaxError: the file is missing, broken, not UTF-8 or empty, or a line of JSONL is not what it should be.
    """
    path = Path(path).expanduser()
    inner = path.with_suffix("") if path.suffix in _OPENERS else path
    if inner.suffix == ".json":
        raise MoejaxError(f"{path}: one JSON object a line is read, no other JSON; name such a file *.jsonl")
    parse = _rows if inner.suffix == ".jsonl" else _texts
    empty = True
    for document in parse(_lines(path, progress), path):
        empty = False
        yield document
    if empty:
        raise MoejaxError(f"{path} holds no text; leave it out or fill it")


def _texts(lines: Iterator[Line], path: Path) -> Iterator[Document]:
    parts: list[str] = []
    number = 0
    for number, line in lines:
        if line.rstrip("\r\n") != END_OF_DOCUMENT:
            parts.append(line)
            continue
        if text := "".join(parts).removesuffix("\n").removesuffix("\r"):
            yield Document(text, None, f"{path} line {number}")
        parts = []
    if parts:
        yield Document("".join(parts), None, f"{path} line {number}")


def _rows(lines: Iterator[Line], path: Path) -> Iterator[Document]:
    for number, line in lines:
        if line.strip():
            document = _document(line, f"{path} line {number}")
            if document.text != "":
                yield document


def _document(line: str, place: str) -> Document:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MoejaxError(f"{place} is not valid JSON ({error}); put one object on each line") from error
    if not isinstance(row, dict):
        raise MoejaxError(f'{place} is a JSON {type(row).__name__}, not an object with "text" or "messages"')
    if ("text" in row) == ("messages" in row):
        both = 'both "text" and "messages"' if "text" in row else f'neither "text" nor "messages" but {sorted(row)}'
        raise MoejaxError(f"{place} has {both}; give it one of the two")
    if "messages" in row:
        return Document(None, _checked_messages(row["messages"], place), place)
    if not isinstance(row["text"], str):
        raise MoejaxError(f'{place}: "text" is a {type(row["text"]).__name__}; make it a string')
    _refuse_surrogates(row["text"], place)
    return Document(row["text"], None, place)


def _checked_messages(messages: Any, place: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise MoejaxError(f'{place}: "messages" must be a list of at least one message')
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise MoejaxError(f'{place}: a message must be an object with "role" and "content", got {message!r:.80}')
    if not any(message["role"] == "assistant" for message in messages):
        roles = sorted({message["role"] for message in messages})
        raise MoejaxError(f'{place} has no message of the role "assistant" to learn from, only of {roles}')
    _refuse_surrogates(json.dumps(messages, ensure_ascii=False), place)
    return tuple(messages)


def _refuse_surrogates(text: str, place: str) -> None:
    """JSON can spell half a UTF-16 pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MoejaxError(f"{place} holds {text[error.start]!a}, half a character; write it as UTF-8") from error


def _lines(path: Path, progress: Callable[[int], None] | None) -> Iterator[Line]:
    """Each line with its number from 1, line breaks kept, without the mark that some editors put before UTF-8."""
    number = 0
    try:
        with path.open("rb") as stored, _OPENERS.get(path.suffix, lambda file: file)(stored) as lines:
            for number, line in enumerate(lines, 1):
                yield number, _decoded(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, path, number)
                if progress and number % _REPORT_EVERY == 0:
                    progress(stored.tell())
            if progress:
                progress(stored.tell())
    except IsADirectoryError as error:
        raise MoejaxError(f"{path} is a folder; name the files in it, such as {path}/*.train.txt.xz") from error
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        reason = str(error) or type(error).__name__
        raise MoejaxError(f"{path} is broken after line {number} ({reason}); fetch or compress it again") from error
    except OSError as error:
        raise MoejaxError(f"{path} cannot be read ({error.strerror or error}); check the path") from error


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise MoejaxError(
            f"{path} line {number} is not UTF-8 (byte 0x{line[error.start]:02x} at {error.start}); "
            f"re-encode it, such as with iconv -f WINDOWS-1252 -t UTF-8"
        ) from error
