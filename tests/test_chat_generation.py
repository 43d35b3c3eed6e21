"""`moejax.generate(..., chat=True)` of a reasoning model whose tokens are written down here: no model runs."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from chat_cases import HARMONY, HARMONY_MARKS, THINK, THINK_MARKS, tokenizer_of

import moejax
from moejax.inference import generate as module

HARMONY_TEXT = (
    "<|channel|>analysis<|message|>why. not<|end|><|start|>assistant<|channel|>final<|message|>It is. So<|return|>"
)
THINK_TEXT = "why. not\n</think>\n\nIt is. So\n"
QUESTION = [{"role": "user", "content": "Is it?"}]
Generate = Callable[..., list[moejax.Generation]]


class Scripted:
    """In the place of the engine: each row's tokens are given; after them come zeros."""

    script: Sequence[Sequence[int]] = ()
    compile_s = 0.0

    def __init__(self, model: object, rows: int, *_: object) -> None:
        self._rows, self._at = rows, 0

    def start(self, *_: object) -> tuple[np.ndarray, None, int]:
        return self.step()

    def step(self, *_: object, most: int = 1) -> tuple[np.ndarray, None, int]:
        at, self._at = self._at, self._at + 1
        return np.array([[row[at] if at < len(row) else 0 for row in self.script[: self._rows]]]), None, 0


@pytest.fixture(params=["harmony", "think"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def model(kind, tmp_path) -> Any:
    harmony = kind == "harmony"
    (tmp_path / "chat_template.jinja").write_text(HARMONY if harmony else THINK)
    tokenizer = tokenizer_of(HARMONY_MARKS if harmony else THINK_MARKS)
    eos = tokenizer.added_ids.get("<|return|>", 1)
    config = SimpleNamespace(context=1000, vocab_size=tokenizer.vocab_size, eos_ids=(2, eos), recomputed_after=None)
    options = SimpleNamespace(capacity_factor=None)
    return SimpleNamespace(tokenizer=tokenizer, folder=tmp_path, config=config, options=options, generation_config={})


@pytest.fixture
def run(model, kind, monkeypatch) -> Generate:
    """Generates for one question a row; the model writes `text`, in the form of its kind."""
    monkeypatch.setattr(module, "Engine", Scripted)
    ids = model.tokenizer.encode_chat(HARMONY_TEXT if kind == "harmony" else THINK_TEXT)

    def run(rows: int = 1, chat: bool = True, **options: Any) -> list[moejax.Generation]:
        monkeypatch.setattr(Scripted, "script", [[*ids, 1]] * rows)
        prompts = [QUESTION if chat else [5, 6]] * rows
        return moejax.generate(model, prompts, chat=chat, **{"max_new_tokens": 200} | options)

    return run


def test_the_text_is_the_answer_and_the_tokens_are_all(run, model, kind):
    (out,) = run()
    assert (out.text, out.reasoning, out.finish_reason) == ("It is. So", "why. not", "stop")
    whole = model.tokenizer.decode(out.tokens, skip_special=False)
    assert whole.startswith(HARMONY_TEXT if kind == "harmony" else THINK_TEXT)
    assert out.message == {"role": "assistant", "content": "It is. So", "reasoning_content": "why. not"}


def test_pieces_of_the_answer_and_of_the_reasoning_come_apart(run):
    told: list[tuple[str, int, str]] = []
    run(
        rows=2,
        on_text=lambda row, text: told.append(("answer", row, text)),
        on_reasoning=lambda row, text: told.append(("reasoning", row, text)),
    )
    for row in range(2):
        mine = [(side, text) for side, of, text in told if of == row]
        assert "".join(text for side, text in mine if side == "reasoning") == "why. not"
        assert "".join(text for side, text in mine if side == "answer") == "It is. So"
        assert [side for side, _ in mine] == sorted((side for side, _ in mine), reverse=True)


def test_prompts_in_turns_keep_their_numbers(run, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 1)
    rows: list[int] = []
    run(rows=3, on_reasoning=lambda row, _: rows.append(row))
    assert sorted(set(rows)) == [0, 1, 2]


def test_a_stop_string_ends_the_answer_and_not_the_reasoning(run):
    (out,) = run(stop=". ")
    assert (out.text, out.reasoning, out.finish_reason) == ("It is", "why. not", "stop")


def test_the_length_may_run_out_before_the_answer(run, kind):
    (out,) = run(max_new_tokens=6 if kind == "harmony" else 3)
    assert (out.text, out.reasoning, out.finish_reason) == ("", "why", "length")
    assert out.message["content"] == ""


def test_without_chat_nothing_is_told_apart(run, model):
    (out,) = run(chat=False)
    assert out.reasoning is None
    assert out.text == model.tokenizer.decode(out.tokens[:-1])
    assert "why. not" in out.text and out.message == {"role": "assistant", "content": out.text}


def test_the_answer_goes_back_as_a_message(run, model):
    (out,) = run()
    chat = [*QUESTION, out.message, {"role": "user", "content": "So?"}]
    (ids,) = module.encode_prompts(model, [chat], chat=True)
    prompt = model.tokenizer.decode(ids, skip_special=False)
    assert "It is. So" in prompt and "So?" in prompt and "why" not in prompt
