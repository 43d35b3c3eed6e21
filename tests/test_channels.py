"""Reasoning told from the answer, token by token; the oracle splits the whole text by regular expressions."""

import re
from collections.abc import Iterable

import pytest
from chat_cases import GEMMA_MARKS, HARMONY, HARMONY_MARKS, THINK, THINK_MARKS, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.inference.channels import ChannelStream, find_channels
from moejax.inference.chat import render_chat
from moejax.inference.tokenizer import Tokenizer

TOKENIZERS = {
    "harmony": tokenizer_of(HARMONY_MARKS),
    "think": tokenizer_of(THINK_MARKS, special=False),
    "gemma": tokenizer_of(GEMMA_MARKS),
}
START = {"harmony": "<|start|>assistant", "think": "[assistant]\n", "gemma": "<|turn>model\n"}


def read(kind: str, text: str, prompt: str | None = None, stop: tuple[str, ...] = ()) -> tuple[str, str, bool]:
    """Answer, reasoning and whether a stop string came; the pieces must join to them."""
    tokenizer = TOKENIZERS[kind]
    channels = find_channels(tokenizer)
    assert channels is not None
    told: list[str] = []
    start = tokenizer.encode_chat(START[kind] if prompt is None else prompt)
    stream = ChannelStream(tokenizer, channels, start, stop, told.append)
    pieces = []
    for index in tokenizer.encode_chat(text):
        pieces.append(stream.push(index))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    assert "".join(told) == stream.reasoning and all(told)
    return stream.text, stream.reasoning, stream.stopped


@pytest.mark.parametrize(
    ("text", "answer", "reasoning"),
    [
        (
            "<|channel|>analysis<|message|>thoughts é<|end|>"
            "<|start|>assistant<|channel|>final<|message|>answer ☕<|return|>",
            "answer ☕",
            "thoughts é",
        ),
        ("<|channel|>final<|message|>answer<|return|>", "answer", ""),
        # The length runs out: in a header, in the reasoning, in the answer.
        ("<|channel|>analysis", "", ""),
        ("<|channel|>analysis<|message|>thoughts", "", "thoughts"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b", "b", "a"),
        # A call: a recipient before the channel or after it, and a type.
        (
            "<|channel|>analysis<|message|>look<|end|>"
            '<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{"a": 1}<|call|>',
            "",
            'look\n{"a": 1}',
        ),
        (" to=f<|channel|>commentary<|message|>{}<|call|>", "", "{}"),
        ("<|channel|>commentary to=f <|constrain|>json<|message|>{}<|end|>", "", "{}"),
        # Several messages of a kind stand on lines of their own.
        (
            "<|channel|>analysis<|message|>a\n<|end|><|start|>assistant<|channel|>commentary<|message|>\n b<|end|>"
            "<|start|>assistant<|channel|>final<|message|>c<|end|><|start|>assistant<|channel|>final<|message|>d",
            "c\nd",
            "a\nb",
        ),
        ("<|channel|>finally<|message|>x<|end|>", "", "x"),
    ],
)
def test_the_final_channel_is_the_answer(text, answer, reasoning):
    assert read("harmony", text) == (answer, reasoning, False)


@pytest.mark.parametrize(
    ("prompt", "text", "answer", "reasoning"),
    [
        ("[assistant]\n", "<think>\nthoughts\n</think>\n\nanswer", "answer", "thoughts"),
        ("[assistant]\n<think>\n", "thoughts\n\nmore\n</think>\n\nanswer\n", "answer", "thoughts\n\nmore"),
        ("[assistant]<think>", "thoughts", "", "thoughts"),
        # The template has closed it: the model is not to reason.
        ("[assistant]\n<think>\n\n</think>\n\n", "answer", "answer", ""),
        ("[assistant]\n", "answer", "answer", ""),
        ("</think>", "answer", "answer", ""),
        # What an earlier turn or a question says opens nothing.
        ("[user]\nwhat is <think> for?\n[assistant]\n", "answer", "answer", ""),
        ("[assistant]\n<think>\nold\n</think>\n\nold\n[user]\n?\n[assistant]\n", "answer", "answer", ""),
        ("[assistant]\n<think>\nold\n</think>\n\nold\n[assistant]\n<think>\n", "new</think>answer", "answer", "new"),
    ],
)
def test_text_before_the_closing_mark_is_reasoning_where_it_was_opened(prompt, text, answer, reasoning):
    assert read("think", text, prompt) == (answer, reasoning, False)


@pytest.mark.parametrize(
    ("prompt", "text", "answer", "reasoning"),
    [
        ("<|turn>model\n", "<|channel>thought\nwhy\n<channel|>answer", "answer", "why"),
        ("<|turn>model\n<|channel>thought\n<channel|>", "answer", "answer", ""),
        ("<|turn>model\n<|channel>thought\n", "a thought<channel|>answer", "answer", "a thought"),
    ],
)
def test_the_label_of_a_channel_is_left_out(prompt, text, answer, reasoning):
    assert read("gemma", text, prompt) == (answer, reasoning, False)


def test_a_template_may_open_the_answer_itself():
    opened = "<|start|>assistant<|channel|>final<|message|>"
    assert read("harmony", "answer<|return|>", opened) == ("answer", "", False)
    # No message was opened at all: another template than the tokenizer's own.
    assert read("harmony", "answer", "[assistant]\n") == ("answer", "", False)


def test_stop_strings_end_the_answer_alone():
    text = "<think>one. two.\n\n</think>\n\nthree. four"
    assert read("think", text, stop=(". ",)) == ("three", "one. two.", True)
    # The lines before the answer are none of its own.
    assert read("think", text + "\n\nfive", stop=("\n\n",)) == ("three. four", "one. two.", True)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_tokenizer_says_which_form_it_is(kind):
    marks = {"harmony": HARMONY_MARKS, "think": THINK_MARKS, "gemma": GEMMA_MARKS}[kind]
    channels = find_channels(TOKENIZERS[kind])
    assert channels is not None and set(channels.markers) <= set(marks)
    assert find_channels(tokenizer_of(marks[1:])) is None


def test_other_models_have_no_channels():
    assert find_channels(None) is None
    assert find_channels(tokenizer_of(("<|endoftext|>",))) is None


BODY = st.text(st.sampled_from("ab é☕\n.<|>"), max_size=12)


@given(st.lists(st.tuples(st.sampled_from(["analysis", "final", "commentary to=f"]), BODY), max_size=5))
@settings(max_examples=150, deadline=None)
def test_harmony_against_the_whole_text(messages):
    text = "<|start|>assistant".join(f"<|channel|>{channel}<|message|>{body}<|end|>" for channel, body in messages)
    found = re.findall(r"<\|channel\|>([^<]*)<\|message\|>(.*?)<\|end\|>", text, re.DOTALL)
    assert read("harmony", text) == (
        lines(body for channel, body in found if channel == "final"),
        lines(body for channel, body in found if channel != "final"),
        False,
    )


@given(BODY, st.lists(st.tuples(BODY, BODY), max_size=3))
@settings(max_examples=150, deadline=None)
def test_think_against_the_whole_text(before, pairs):
    text = before + "".join(f"<think>{thought}</think>{answer}" for thought, answer in pairs)
    thoughts = re.findall(r"<think>(.*?)</think>", text, re.DOTALL)
    answers = re.split(r"<think>.*?</think>", text, flags=re.DOTALL)
    assert read("think", text) == (lines(answers), lines(thoughts), False)


def lines(sections: Iterable[str]) -> str:
    return "\n".join(section.strip() for section in sections if section.strip())


@pytest.mark.parametrize(("kind", "template"), [("harmony", HARMONY), ("think", THINK)])
def test_several_turns(kind, template):
    """An answer goes back as a message; the template drops the reasoning of earlier turns itself."""
    tokenizer: Tokenizer = TOKENIZERS[kind]
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two", "reasoning_content": "secret"},
        {"role": "user", "content": "three"},
    ]
    prompt = render_chat(template, chat, {})
    assert "two" in prompt and "secret" not in prompt
    text = "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b"
    assert read(kind, text if kind == "harmony" else "a</think>b", prompt) == ("b", "a", False)
    assert tokenizer.decode(tokenizer.encode_chat(prompt), skip_special=False) == prompt
