import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

import moejax
from moejax.errors import MoejaxError
from moejax.inference.tokenizer import Tokenizer, require

DEMO = Path(moejax.__file__).parent / "demo"


def demo_tokenizer() -> Tokenizer:
    return require(Tokenizer.from_folder(DEMO), DEMO)


def write_byte_fallback(folder: Path) -> None:
    """A small tokenizer in Llama's manner: Metaspace words, byte tokens for everything else, BOS in front."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcé", "▁a", "ab", "▁▁"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b"), ("▁", "▁")]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in pieces[:3]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("text", ["", "Once upon a time", "naïve café ☕ 🦜", " two  spaces\n\ttab", "Hello , world ."])
def test_text_survives_the_round_trip_unchanged(text):
    tokenizer = demo_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_left_out_unless_asked_for():
    tokenizer = demo_tokenizer()
    ids = [0, *tokenizer.encode("Hi"), 0]
    assert tokenizer.decode(ids) == "Hi"
    assert tokenizer.decode(ids, skip_special=False) == "<|endoftext|>Hi<|endoftext|>"
    assert tokenizer.special_ids == {0} and tokenizer.vocab_size == 4096


def test_ids_beyond_the_vocabulary_decode_to_nothing():
    tokenizer = demo_tokenizer()
    assert tokenizer.decode([4096, *tokenizer.encode("Hi"), 10_000]) == "Hi"
    assert tokenizer.is_silent(10_000) and tokenizer.is_silent(0) and not tokenizer.is_silent(5)


def test_post_processor_adds_bos_to_prompts_and_not_to_chats(tmp_path):
    write_byte_fallback(tmp_path)
    tokenizer = require(Tokenizer.from_folder(tmp_path), tmp_path)
    plain = tokenizer.encode_chat("a b")
    assert tokenizer.encode("a b") == [1, *plain]
    # A chat's text brings its BOS along, and it stays the only one.
    assert tokenizer.encode_chat("<s>a").count(1) == 1
    assert tokenizer.decode(tokenizer.encode("a ☕b")) == "a ☕b"


def test_bos_and_eos_switches_of_the_config_do_nothing_beside_tokenizer_json(tmp_path):
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    config = {"add_bos_token": True, "add_eos_token": True, "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = require(Tokenizer.from_folder(tmp_path), tmp_path)
    # What AutoTokenizer of transformers 5.23 gives for these two files.
    assert tokenizer.encode("Hello there .") == [40, 699, 79, 501, 1509]


def test_named_tokens_come_as_strings_and_missing_ones_are_added(tmp_path):
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    config = {"bos_token": {"content": "<|endoftext|>"}, "eos_token": "<eos>", "pad_token": None, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = require(Tokenizer.from_folder(tmp_path), tmp_path)
    assert tokenizer.special_tokens == {"bos_token": "<|endoftext|>", "eos_token": "<eos>"}
    assert tokenizer.encode("<eos>") == [4096] and tokenizer.decode([4096]) == ""


def test_added_tokens_of_the_config_replace_those_of_tokenizer_json(tmp_path):
    backend = Backend.from_file(str(DEMO / "tokenizer.json"))
    backend.add_tokens([AddedToken("<tool>", special=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    listed = {
        "0": entry | {"content": "<|endoftext|>", "special": False},
        "4096": entry | {"content": "<tool>", "special": True},
        "4097": entry | {"content": "<think>", "special": False},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    tokenizer = require(Tokenizer.from_folder(tmp_path), tmp_path)
    # As AutoTokenizer of transformers 5.23 prints it: once special, token 0 stays so.
    assert tokenizer.decode([0, 4096, 4097]) == "<think>"
    assert tokenizer.special_ids == {0, 4096}
    assert tokenizer.added_ids == {"<|endoftext|>": 0, "<tool>": 4096, "<think>": 4097}


def test_special_tokens_map_of_older_checkpoints_is_read(tmp_path):
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    assert require(Tokenizer.from_folder(tmp_path), tmp_path).special_tokens == {"eos_token": "<|endoftext|>"}


def test_stored_truncation_and_padding_do_not_touch_prompts(tmp_path):
    backend = Backend.from_file(str(DEMO / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = require(Tokenizer.from_folder(tmp_path), tmp_path)
    assert tokenizer.encode("Hello there .") == [40, 699, 79, 501, 1509]


def test_a_folder_without_tokenizer_says_so_when_text_is_needed(tmp_path):
    assert Tokenizer.from_folder(tmp_path) is None
    with pytest.raises(MoejaxError, match=r"tokenizer\.json is missing in .*; pass token ids with --prompt-ids"):
        require(None, tmp_path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("tiktoken.model", "convert_tiktoken_to_fast"),
        ("qwen.tiktoken", "convert_tiktoken_to_fast"),
        ("tokenizer.model", r"AutoTokenizer\.from_pretrained\(folder\)\.save_pretrained\(folder\)"),
    ],
)
def test_a_tokenizer_in_another_form_is_named_with_what_makes_it_readable(tmp_path, name, remedy):
    (tmp_path / name).write_bytes(b"aGk= 0\n")
    assert Tokenizer.from_folder(tmp_path) is None
    wanted = rf"^tokenizer\.json is missing in .*; {name} cannot take its place.*: make one with .*{remedy}, or pass "
    with pytest.raises(MoejaxError, match=wanted) as caught:
        require(None, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json is not a readable tokenizer \(.*\); fetch"),
        ("tokenizer.json", '{"model": 3}', r"tokenizer\.json is not a readable tokenizer \(.*\); fetch"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not valid JSON \(.*\); fetch"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json holds a JSON list, not an object"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": {"content": "a"}}}',
            r"lists a malformed token \(.*'x'",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": "a"}}', r"lists a malformed token \("),
        ("tokenizer_config.json", '{"added_tokens_decoder": ["a"]}', r"lists a malformed token \("),
    ],
)
def test_broken_files_give_one_line(tmp_path, name, content, message):
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(MoejaxError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_refused():
    with pytest.raises(MoejaxError, match=r"'a\\udcff' is not valid UTF-8 at character 1"):
        demo_tokenizer().encode("a\udcff")
