"""Documents as tokens: what frames them, and which tokens of a conversation are to be learned."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from chat_cases import HARMONY, THINK
from data_cases import CHATML, byte_encoder, byte_folder

from moejax.data import encoder as module
from moejax.data.documents import Document
from moejax.data.encoder import DocumentEncoder
from moejax.errors import MoejaxError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hé?"},
    {"role": "assistant", "content": "Ho 😀"},
    {"role": "user", "content": "What?"},
    {"role": "assistant", "content": " Nothing."},
]
# Two that render an earlier answer otherwise than the last one: another mark, and reasoning dropped.
REASONS = """{%- for m in messages %}{{ '<' + m.role + '>' }}
    {%- if m.role == 'assistant' and loop.last %}{{ '(so) ' }}{% endif %}{{ m.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
OPENS = CHATML.replace("assistant\\n' }}", "assistant\\n<think>' }}")


def conversation(*messages: dict[str, str]) -> Document:
    return Document(None, messages, "a.jsonl line 7")


def learned(encoder: DocumentEncoder, *messages: dict[str, str]) -> list[tuple[str, str]]:
    """Of each text: all of it, and what is to be learned of it."""
    decode = encoder.tokenizer.decode
    found = []
    for one in encoder.encode([conversation(*messages)]):
        assert one.learned is not None
        answers = decode(one.ids[one.learned].tolist(), skip_special=False)
        assert one.bytes == len(answers.encode())
        found.append((decode(one.ids.tolist(), skip_special=False), answers))
    return found


def test_a_text_stands_between_what_begins_and_what_ends_a_document(tmp_path):
    encoder = byte_encoder(tmp_path)
    (one, two) = encoder.encode([Document("é\n", None, ""), Document("b", None, "")])
    assert (one.ids[0], one.ids[-1], one.ids.size, one.bytes) == (0, 0, 5, 3)
    assert one.ids.dtype == np.int32
    assert encoder.tokenizer.decode(two.ids.tolist(), skip_special=False) == "<|endoftext|>b<|endoftext|>"
    assert one.learned is None and one.mask().tolist() == [False, *[True] * 4]


@pytest.mark.parametrize(
    ("tokenizer", "config", "frame"),
    [
        ({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, {"bos_token_id": 5, "eos_token_id": 6}, (257, 258)),
        ({"eos_token": "<|im_end|>"}, None, (258, 258)),
        ({}, {"bos_token_id": 5, "eos_token_id": [6, 7]}, (5, 6)),
        ({}, {"bos_token_id": None, "eos_token_id": 6}, (6, 6)),
        ({}, None, (None, None)),
    ],
)
def test_the_frame_comes_from_the_tokenizer_then_from_the_config(tokenizer, config, frame, tmp_path):
    folder = byte_folder(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    encoder = DocumentEncoder.from_folder(folder)
    assert (encoder.begin, encoder.end) == frame
    (one,) = encoder.encode([Document("ab", None, "")])
    assert one.ids.size == 2 + 2 * (frame[0] is not None)


def test_answers_with_their_marks_are_learned(tmp_path):
    ((text, answers),) = learned(byte_encoder(tmp_path, CHATML), *CHAT)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHé?<|im_end|>\n")
    assert answers == "Ho 😀<|im_end|>\n Nothing.<|im_end|>\n"


def test_where_answers_change_once_they_are_past_each_has_a_text_of_its_own(tmp_path):
    encoder = byte_encoder(tmp_path, REASONS)
    found = learned(encoder, *CHAT)
    assert found == [
        ("<system>Be brief.<user>Hé?<assistant>(so) Ho 😀", "(so) Ho 😀"),
        ("<system>Be brief.<user>Hé?<assistant>Ho 😀<user>What?<assistant>(so)  Nothing.", "(so)  Nothing."),
    ]
    ((text, answer),) = learned(encoder, *CHAT[:3])
    assert (text, answer) == found[0]


def test_templates_of_reasoning_models(tmp_path):
    texts = learned(byte_encoder(tmp_path / "harmony", HARMONY), *CHAT[1:])
    assert [answer for _, answer in texts] == [
        "<|channel|>final<|message|>Ho 😀<|return|>",
        "<|channel|>final<|message|> Nothing.<|return|>",
    ]
    assert "<|channel|>final<|message|>Ho 😀<|end|>" in texts[1][0]
    with pytest.raises(MoejaxError, match="does not render an answer right after the prompt for it"):
        learned(byte_encoder(tmp_path / "think", THINK), *CHAT[1:])


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (OPENS, CHAT, "it does not render an answer right after the prompt for it, so that nothing says where the"),
        (CHATML, CHAT[2:], "the conversation begins with an answer; put a user's or a system's message before it"),
        ("{{ raise_exception('roles!') }}", CHAT, "the chat template failed: roles! (TemplateError); mend the line or"),
        ("{{ messages[0].role }}", CHAT, "it does not render an answer right after"),
    ],
)
def test_what_cannot_be_learned_from_names_the_line_and_the_template(template, messages, message, tmp_path):
    with pytest.raises(MoejaxError) as raised:
        learned(byte_encoder(tmp_path, template), *messages)
    assert str(raised.value).startswith(f"a.jsonl line 7, chat template of {tmp_path}: {message}")


def test_conversations_need_a_template_and_texts_do_not(tmp_path):
    encoder = byte_encoder(tmp_path)
    with pytest.raises(MoejaxError, match=r"a.jsonl line 7 is a conversation; put its chat_template.jinja into"):
        list(encoder.encode([conversation(*CHAT)]))
    with pytest.raises(MoejaxError, match=r"tokenizer.json is missing in .*nothing; make one with"):
        DocumentEncoder.from_folder(tmp_path / "nothing")


def test_texts_and_conversations_keep_their_order(tmp_path):
    encoder = byte_encoder(tmp_path, CHATML)
    mixed = [Document("a", None, ""), conversation(*CHAT), Document("b", None, ""), Document("c", None, "")]
    assert [one.learned is None for one in encoder.encode(mixed)] == [True, False, True, True]
    assert [encoder.tokenizer.decode(one.ids.tolist()) for one in encoder.encode(mixed)][2:] == ["b", "c"]


def test_long_texts_have_the_tokens_of_the_whole(tmp_path, monkeypatch):
    from moejax.data.bpe import train_bpe, write_tokenizer

    words = random.Random(1).choices(["the", "cat", "sat;", "on", "a", "mat.\n", "2 3", "\n\n ", "é_"], k=3000)
    text = " ".join(words)
    path = tmp_path / "a.txt"
    path.write_text(text)
    write_tokenizer(train_bpe([path], 300), tmp_path / "bpe")
    encoder = DocumentEncoder.from_folder(tmp_path / "bpe")
    (whole,) = encoder.encode([Document(text, None, "")])
    monkeypatch.setattr(module, "_PIECE", 100)
    monkeypatch.setattr(module, "_GROUP", 1000)
    assert len(list(module._pieces(text))) > 80
    (pieces,) = encoder.encode([Document(text, None, "")])
    assert pieces.ids.tolist() == whole.ids.tolist()


def test_a_tokenizer_that_marks_the_start_of_a_text_gets_it_whole(tmp_path, monkeypatch):
    folder = byte_folder(tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    monkeypatch.setattr(module, "_PIECE", 10)
    (one,) = DocumentEncoder.from_folder(folder).encode([Document("word " * 50, None, "")])
    assert one.ids.size == 2 + 251


def test_fingerprints_tell_apart_what_gives_other_tokens(tmp_path):
    def fingerprint(name: str, *options: str) -> str:
        return DocumentEncoder.from_folder(byte_folder(tmp_path / name, *options)).fingerprint

    same = fingerprint("a", CHATML)
    assert same == fingerprint("b", CHATML)
    assert len({same, fingerprint("c", REASONS), fingerprint("d"), fingerprint("e", CHATML, "<|im_start|>")}) == 4
    longer: Path = byte_folder(tmp_path / "f", CHATML)
    raw = json.loads((longer / "tokenizer.json").read_text())
    raw["pre_tokenizer"]["use_regex"] = False
    (longer / "tokenizer.json").write_text(json.dumps(raw))
    assert DocumentEncoder.from_folder(longer).fingerprint != same
