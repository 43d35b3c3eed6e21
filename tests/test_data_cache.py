"""Files tokenised once: what is kept, when it is made anew, and what interrupted or parallel writers leave."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from data_cases import CHATML, byte_encoder

from moejax.data import cache as module
from moejax.data.cache import cached_corpus
from moejax.data.corpus import read_corpus
from moejax.errors import MoejaxError

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]}


@pytest.fixture
def encoder(tmp_path):
    return byte_encoder(tmp_path / "tokenizer", CHATML)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "words.train.txt"
    path.write_text("one\n<|endoftext|>\ntwo é\n<|endoftext|>\n")
    return path


def refuse(*_: object) -> None:
    raise AssertionError("it was tokenised again")


@pytest.mark.parametrize("rows", [[{"text": "one"}, {"text": "é"}], [{"text": "one"}, CHAT]])
def test_what_is_read_from_the_cache_is_what_is_in_the_file(rows, encoder, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    fresh = read_corpus(path, encoder)
    first, digest = cached_corpus(path, encoder, tmp_path / "cache")
    monkeypatch.setattr(module, "read_documents", refuse)
    again, same = cached_corpus(path, encoder, tmp_path / "cache")
    assert digest == same
    for corpus in (first, again):
        assert corpus.tokens.dtype == fresh.tokens.dtype == np.uint16
        assert corpus.tokens.tolist() == fresh.tokens.tolist()
        assert corpus.ends.tolist() == fresh.ends.tolist()
        assert (corpus.bytes, corpus.targets) == (fresh.bytes, fresh.targets)
        assert (corpus.learned is None) == (fresh.learned is None) == (CHAT not in rows)
        if corpus.learned is not None and fresh.learned is not None:
            assert corpus.learned.tolist() == fresh.learned.tolist()


def test_another_file_or_another_tokenizer_is_another_folder(encoder, text, tmp_path):
    cache = tmp_path / "cache"
    _, first = cached_corpus(text, encoder, cache)
    assert [path.name.startswith("words-") for path in cache.iterdir()] == [True]
    _, other = cached_corpus(text, byte_encoder(tmp_path / "other"), cache)
    assert first == other  # the template, which makes no difference here, is a part of the name alone
    text.write_text("one\n<|endoftext|>\ntwo e!\n<|endoftext|>\n")
    changed, second = cached_corpus(text, encoder, cache)
    assert first != second
    assert changed.bytes == 9
    os.utime(text, ns=(0, 0))
    _, third = cached_corpus(text, encoder, cache)
    assert third == second
    assert len(list(cache.iterdir())) == 4


def test_a_mistake_in_the_file_leaves_nothing(encoder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(MoejaxError, match=r"rows\.jsonl line 2"):
        cached_corpus(path, encoder, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(MoejaxError, match=r"missing\.txt cannot be read"):
        cached_corpus(tmp_path / "missing.txt", encoder, tmp_path / "cache")


def test_writers_at_the_same_time_do_not_disturb_each_other(encoder, text, tmp_path, monkeypatch):
    meet, fill, results = threading.Barrier(4), module._fill, []

    def together(*args: object) -> None:
        meet.wait(20)
        fill(*args)
        meet.wait(20)

    def write() -> None:
        results.append(cached_corpus(text, encoder, tmp_path / "cache"))

    monkeypatch.setattr(module, "_fill", together)
    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({digest for _, digest in results}) == 1
    assert [corpus.tokens.size for corpus, _ in results] == [3 + 6 + 4] * 4
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_what_a_killed_writer_left_goes_once_it_is_old(encoder, text, tmp_path):
    cache = tmp_path / "cache"
    cached_corpus(text, encoder, cache)
    (folder,) = cache.iterdir()
    left = {age: cache / f".{folder.name}.{age}" / folder.name for age in ("young", "old")}
    for path in left.values():
        path.mkdir(parents=True)
        (path / "tokens.bin").write_bytes(b"ab")
    for path in (left["old"] / "tokens.bin", left["old"], left["old"].parent):
        os.utime(path, (0, 0))
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    cached_corpus(text, encoder, cache)
    assert sorted(path.name for path in cache.iterdir()) == [f".{folder.name}.young", folder.name]


def test_a_damaged_folder_and_one_that_cannot_be_made(encoder, text, tmp_path):
    cached_corpus(text, encoder, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    with (folder / "tokens.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(MoejaxError, match=r"is damaged \(tokens\.bin has 27 bytes, not 26\); delete it"):
        cached_corpus(text, encoder, tmp_path / "cache")
    with pytest.raises(MoejaxError, match=r"cannot write .*words\.train\.txt/.* \("):
        cached_corpus(text, encoder, text)
