"""Templates of reasoning models, rendered as the transformers that is installed now renders them."""

import importlib
from pathlib import Path

import pytest
from chat_cases import HARMONY, THINK

import moejax
from moejax.inference.chat import render_chat

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:::torch|transformers")]

DEMO = Path(moejax.__file__).parent / "demo"


@pytest.mark.parametrize("template", [HARMONY, THINK], ids=["harmony", "think"])
@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("last", ["user", "assistant"])
def test_several_turns_with_reasoning(template, name, last):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", name: "greet\n"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you", name: "leave"},
    ][: 4 if last == "user" else 5]
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(DEMO / "tokenizer.json"))
    expected = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert render_chat(template, messages, {}) == expected
