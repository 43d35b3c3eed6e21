"""A tokenizer learned from text: reversible on any text, and the same in moejax and transformers."""

import json
import lzma
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.data.bpe import count_tokens, train_bpe, write_tokenizer
from moejax.data.encoder import DocumentEncoder
from moejax.errors import MoejaxError
from moejax.inference.tokenizer import Tokenizer

STORY = "Once upon a time there was a cat. The cat sat on the mat.\n\n\tIt said: naïve 😀!\n"
HARD = "a\tb\r\n\n  \u200d👩\u200d👩\u200d👧 \x00\x7f 漢字 e\u0301 <|endoftext|> \ufeff\U0010ffff   "


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bpe")
    with lzma.open(root / "a.txt.xz", "wt", encoding="utf-8") as file:
        file.write((STORY + "<|endoftext|>\n") * 3)
    messages = [{"role": "user", "content": "zyzzy zyzzy"}, {"role": "assistant", "content": "zyzzy", "name": "qqq"}]
    (root / "b.jsonl").write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"text": "zyzzy"}))
    backend = train_bpe([root / "a.txt.xz", root / "b.jsonl"], 300)
    write_tokenizer(backend, root / "out")
    return root / "out"


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


def test_the_vocabulary(folder, tokenizer):
    assert tokenizer.vocab_size == 300
    assert tokenizer.added_ids == {"<|endoftext|>": 0}
    assert tokenizer.special_ids == {0}
    encoder = DocumentEncoder.from_folder(folder)
    assert (encoder.begin, encoder.end, encoder.vocab_size) == (0, 0, 300)
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_what_all_files_repeat_becomes_one_token(tokenizer):
    assert len(tokenizer.encode("zyzzy")) == 1
    assert len(tokenizer.encode(" cat")) == 1
    assert len(tokenizer.encode("user")) == 4  # a role is not text
    assert len(tokenizer.encode("qqq")) == 3


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_had_back(tokenizer, text):
    for one in (text, HARD + text):
        assert tokenizer.decode(tokenizer.encode(one), skip_special=False) == one


def test_counting(folder, tokenizer):
    counted = count_tokens(tokenizer, folder.parent / "a.txt.xz")
    text = STORY.removesuffix("\n")
    assert (counted.bytes, counted.tokens) == (3 * len(text.encode()), 3 * len(tokenizer.encode(text)))
    assert counted.bytes_per_token == counted.bytes / counted.tokens > 1.5


def test_mistakes(folder, tmp_path):
    with pytest.raises(MoejaxError, match=r"has a tokenizer\.json already"):
        write_tokenizer(train_bpe([folder.parent / "b.jsonl"], 257), folder)
    with pytest.raises(MoejaxError, match="--vocab-size 256 must be above 256"):
        train_bpe([folder.parent / "b.jsonl"], 256)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": }\n')
    with pytest.raises(MoejaxError, match=r"a.jsonl line 2 is not valid JSON"):
        train_bpe([tmp_path / "a.jsonl"], 300)
    with pytest.raises(MoejaxError, match="cannot write"):
        write_tokenizer(train_bpe([folder.parent / "b.jsonl"], 257), tmp_path / "a.jsonl")


@pytest.mark.parity
def test_transformers_reads_it_with_the_same_ids(folder, tokenizer):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    for theirs in (AutoTokenizer.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)):
        assert theirs(STORY + HARD)["input_ids"] == tokenizer.encode(STORY + HARD)
        assert theirs.decode(theirs(HARD)["input_ids"]) == HARD
        assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (0, 0, 300)
