from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

import moejax
from moejax.errors import MoejaxError
from moejax.inference.detokenize import TextStream
from moejax.inference.tokenizer import Tokenizer, require

DEMO_FOLDER = Path(moejax.__file__).parent / "demo"
DEMO = require(Tokenizer.from_folder(DEMO_FOLDER), DEMO_FOLDER)

_PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcé☕", "▁a", "▁▁"]


def _byte_fallback() -> Tokenizer:
    """In Llama's manner: the first space of a text is dropped, and byte tokens decode a whole run at a time."""
    backend = Backend(
        models.BPE({piece: i for i, piece in enumerate(_PIECES)}, [("▁", "a"), ("▁", "▁")], byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in _PIECES[:3]])
    return Tokenizer(backend, {})


LLAMA = _byte_fallback()
# Single-byte tokens, which make complete characters and broken ones alike.
_BYTES = "é☕🦜a".encode()
_LLAMA_BYTES = [3 + byte for byte in _BYTES]
_DEMO_VOCAB = Backend.from_file(str(DEMO_FOLDER / "tokenizer.json")).get_vocab()
_LETTERS = "".join(piece for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("é☕🦜a"))
_DEMO_BYTES = [_DEMO_VOCAB[letter] for letter in _LETTERS]
llama_ids = st.lists(
    st.one_of(st.integers(0, len(_PIECES) + 2), st.integers(259, len(_PIECES) - 1), st.sampled_from(_LLAMA_BYTES))
)
demo_ids = st.lists(st.one_of(st.integers(0, 4100), st.sampled_from(_DEMO_BYTES), st.just(0)), max_size=60)
texts = st.text(st.sampled_from("ab é☕🦜�\n"), max_size=40)


def expected(text: str, stop: tuple[str, ...]) -> str:
    """The text up to the stop string that is complete first: found one character at a time."""
    for end in range(1, len(text) + 1):
        ending = [string for string in stop if text[:end].endswith(string)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


def check(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...]) -> None:
    stream = TextStream(tokenizer, stop)
    pushed = "".join(stream.push(index) for index in ids)
    whole = tokenizer.decode(ids)
    assert pushed + stream.finish() == expected(whole, stop) == stream.text
    assert stream.stopped == any(string in whole for string in stop)


@given(demo_ids)
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_decoded_text(ids):
    check(DEMO, ids, ())


@given(llama_ids)
@settings(max_examples=150, deadline=None)
def test_pieces_join_for_byte_fallback_and_dropped_first_spaces(ids):
    check(LLAMA, ids, ())


@given(st.data(), st.sampled_from([DEMO, LLAMA]))
@settings(max_examples=150, deadline=None)
def test_pieces_end_before_the_first_stop_string(data, tokenizer):
    ids = data.draw(demo_ids if tokenizer is DEMO else llama_ids)
    whole = tokenizer.decode(ids)
    cuts = st.tuples(st.integers(0, max(len(whole) - 1, 0)), st.integers(1, 4)).map(
        lambda cut: whole[cut[0] : sum(cut)]
    )
    stop = data.draw(st.lists(st.one_of(cuts, st.text("ab �", max_size=3)).filter(bool), max_size=3))
    check(tokenizer, ids, tuple(stop))


@given(texts, st.lists(st.text(st.sampled_from("ab é☕🦜"), min_size=1, max_size=5), max_size=3))
@settings(max_examples=150, deadline=None)
def test_stop_strings_in_encoded_text(text, stop):
    check(DEMO, DEMO.encode(text), tuple(stop))
    check(LLAMA, LLAMA.encode(text), tuple(stop))


def test_a_character_of_several_tokens_appears_whole():
    stream = TextStream(DEMO)
    ids = DEMO.encode("a🦜b")
    assert len(ids) > 3
    assert [piece for index in ids if (piece := stream.push(index))] == ["a", "🦜", "b"]


def test_text_appears_as_soon_as_it_is_certain():
    stream = TextStream(DEMO, ("lo world",))
    pieces = [stream.push(index) for index in DEMO.encode("Hello moon, hello world, hello")]
    assert "".join(pieces) == stream.text == "Hello moon, hel"
    assert stream.stopped and stream.finish() == "" and stream.push(5) == ""
    # "lo" waits, for it could begin "lo world"; with " mo" it comes out.
    assert pieces[:5] == ["H", "el", "", "lo mo", "on"]


def test_overlapping_stop_strings_take_the_first_complete_one():
    for stop, text in {("abc", "bc"): "x", ("bc", "abcd"): "xa", ("abcd", "d"): "x"}.items():
        stream = TextStream(DEMO, stop)
        assert "".join(map(stream.push, DEMO.encode("xabcd"))) + stream.finish() == text


def test_what_could_have_become_a_stop_string_comes_out_in_the_end():
    stream = TextStream(DEMO, ("the end",))
    assert "".join(map(stream.push, DEMO.encode("this is the en"))) == "this is "
    assert stream.finish() == "the en" and not stream.stopped and stream.text == "this is the en"


@pytest.mark.parametrize("tokenizer", [DEMO, LLAMA], ids=["demo", "llama"])
@pytest.mark.parametrize("kind", ["words", "broken bytes"])
def test_cost_grows_with_the_number_of_tokens(tokenizer, kind, monkeypatch):
    word, byte = (40, _DEMO_BYTES[1]) if tokenizer is DEMO else (260, 3 + 0x80)
    ids = [word if kind == "words" else byte] * 500 + [word]
    decoded = []
    decode = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: decoded.append(len(ids)) or decode(self, ids))
    stream = TextStream(tokenizer)
    for index in ids:
        stream.push(index)
    stream.finish()
    assert sum(decoded) <= 10 * len(ids)


def test_a_model_without_tokenizer_yields_no_text():
    stream = TextStream(None)
    assert stream.push(3) == "" and stream.finish() == "" and stream.text == "" and not stream.stopped
    with pytest.raises(MoejaxError, match=r"stop strings \['x'\] need a tokenizer\.json"):
        TextStream(None, ("x",))
