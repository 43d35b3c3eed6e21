"""Documents out of files: how they are cut, and every mistake of a user's data as one line."""

import gzip
import json
import lzma
from pathlib import Path

import pytest

from moejax.data.documents import Document, read_documents
from moejax.errors import MoejaxError


def texts(path: Path) -> list[str | None]:
    return [document.text for document in read_documents(path)]


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    open_file = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with open_file(path, "wb") as file:
        file.write(data)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz", "a.txt.gz", "a.py"])
def test_documents_of_text_end_with_their_mark(name: str, tmp_path):
    content = "one\n\ntwo  \n<|endoftext|>\n<|endoftext|>\nsay <|endoftext|>\r\né😀\r\n<|endoftext|>\r\nlast\n"
    path = write(tmp_path / name, content)
    assert texts(path) == ["one\n\ntwo  ", "say <|endoftext|>\r\né😀", "last\n"]
    assert [document.place for document in read_documents(path)] == [f"{path} line {n}" for n in (4, 8, 9)]


def test_a_text_without_a_mark_is_one_document(tmp_path):
    assert texts(write(tmp_path / "a.txt", b"\xef\xbb\xbfa\nb\n\n")) == ["a\nb\n\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz"])
def test_rows_are_texts_or_conversations(name: str, tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"text": "x\n<|endoftext|>\ny", "id": 1}, {"text": ""}, {"messages": messages}]
    path = write(tmp_path / name, "\n\n".join(map(json.dumps, rows)))
    first, second = read_documents(path)
    assert first == Document("x\n<|endoftext|>\ny", None, f"{path} line 1")
    assert second == Document(None, tuple(messages), f"{path} line 5")


def test_progress_ends_with_the_size_of_the_file_as_stored(tmp_path):
    path = write(tmp_path / "a.txt.xz", "word\n" * 5000)
    seen: list[int] = []
    list(read_documents(path, seen.append))
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1] == path.stat().st_size


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "holds no text; leave it out or fill it"),
        ("a.txt", "<|endoftext|>\n\n<|endoftext|>\n", "holds no text"),
        ("a.txt", b"fine\nna\xefve\n", "line 2 is not UTF-8 (byte 0xef at 2); re-encode it"),
        ("a.jsonl", "\n\n", "holds no text"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2 is not valid JSON (Expecting value"),
        ("a.jsonl", "[" * 100000, "line 1 is not valid JSON"),
        ("a.jsonl", '["a"]\n', 'line 1 is a JSON list, not an object with "text" or "messages"'),
        ("a.jsonl", '{"conversations": []}', "line 1 has neither \"text\" nor \"messages\" but ['conversations']"),
        ("a.jsonl", '{"text": "a", "messages": []}', 'line 1 has both "text" and "messages"; give it one'),
        ("a.jsonl", '{"text": 1}', 'line 1: "text" is a int; make it a string'),
        ("a.jsonl", '{"text": "\\ud83d"}', "line 1 holds '\\ud83d', half a character"),
        ("a.jsonl", '{"messages": []}', 'line 1: "messages" must be a list of at least one message'),
        ("a.jsonl", '{"messages": ["a"]}', 'a message must be an object with "role" and "content", got'),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "\"assistant\" to learn from, only of ['user']"),
        ("a.json", "{}", "name such a file *.jsonl"),
    ],
)  # fmt: skip
def test_mistakes_name_the_file_the_line_and_the_remedy(name: str, content: str | bytes, message: str, tmp_path):
    path = write(tmp_path / name, content)
    with pytest.raises(MoejaxError) as raised:
        list(read_documents(path))
    assert str(raised.value).startswith(str(path))
    assert message in str(raised.value)


@pytest.mark.parametrize("suffix", [".xz", ".gz"])
def test_broken_compressed_files(suffix: str, tmp_path):
    whole = write(tmp_path / f"a.txt{suffix}", "".join(f"{n * n}\n" for n in range(50000))).read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("other", b"plain text\n")):
        path = tmp_path / f"{name}.txt{suffix}"
        path.write_bytes(content)
        with pytest.raises(MoejaxError, match=r"is broken after line \d+ \(.*\); fetch or compress it again"):
            list(read_documents(path))


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(MoejaxError, match=r"missing.txt cannot be read \(No such file or directory\); check the path"):
        list(read_documents(tmp_path / "missing.txt"))
    with pytest.raises(MoejaxError, match="is a folder; name the files in it"):
        list(read_documents(tmp_path))
