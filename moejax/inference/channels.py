"""Chats with reasoning models: which new tokens are reasoning and which are the answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from moejax.inference.detokenize import TextStream
from moejax.inference.tokenizer import Tokenizer


class _Place(Enum):
    """Where the text after a marker belongs."""

    HEADER = "header"  # names the channel of the message that follows
    MESSAGE = "message"  # answer or reasoning, as the header says
    REASONING = "reasoning"
    ANSWER = "answer"


@dataclass(frozen=True, slots=True)
class Channels:
    """How a kind of models tells reasoning from answer: by tokens that the tokenizer lists as added ones.

    Attributes:
        markers: those tokens; where the text after each belongs. The first opens what a prompt may end with.
        label: a word that the reasoning begins with and that is no part of it.
    """

    markers: Mapping[str, _Place]
    label: str = ""


FORMS = (
    # GPT-OSS: <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>
    Channels(
        {
            "<|start|>": _Place.HEADER,
            "<|channel|>": _Place.HEADER,
            "<|message|>": _Place.MESSAGE,
            "<|end|>": _Place.HEADER,
            "<|return|>": _Place.HEADER,
        }
    ),
    # Qwen, GLM, MiniMax, DeepSeek, Kimi: <think>...</think>...
    Channels({"<think>": _Place.REASONING, "</think>": _Place.ANSWER}),
    # Gemma 4: <|channel>thought\n...<channel|>...
    Channels({"<|channel>": _Place.REASONING, "<channel|>": _Place.ANSWER}, label="thought"),
)
_ANSWERING = "final"  # the one channel of GPT-OSS that is meant for the user


def find_channels(tokenizer: Tokenizer | None) -> Channels | None:
    """The form whose markers the tokenizer holds; None for a model that has no channels."""
    held = tokenizer.added_ids if tokenizer else {}
    return next((form for form in FORMS if form.markers.keys() <= held.keys()), None)


class ChannelStream:
    """Turns one answer's tokens into text as `TextStream` does, and hands reasoning to a callback.

    The answer and the reasoning have no white space at their ends. Several messages of one kind stand on lines of
    their own. What no marker has assigned is the answer.

    Args:
        tokenizer: of the model.
        channels: `find_channels` of it.
        prompt: token ids; what its end has opened (a header, <think>) goes on in the first new token.
        stop: strings that end the answer; in the reasoning they mean nothing.
        on_reasoning: called with new text of the reasoning.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        channels: Channels,
        prompt: Sequence[int],
        stop: tuple[str, ...] = (),
        on_reasoning: Callable[[str], None] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._places = {tokenizer.added_ids[name]: place for name, place in channels.markers.items()}
        self._place = _Place.ANSWER
        self._header: list[int] = []
        self._answer = _Side(tokenizer, stop)
        self._reasoning = _Side(tokenizer, label=channels.label)
        self._on_reasoning = on_reasoning
        self._resume(prompt)

    @property
    def text(self) -> str:
        """The answer so far; after `finish` the whole."""
        return self._answer.text

    @property
    def reasoning(self) -> str:
        """The reasoning so far; after `finish` the whole."""
        return self._reasoning.text

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self._answer.stopped

    def push(self, index: int) -> str:
        """Takes the next token id and returns the text of the answer that is now certain."""
        if index in self._places:
            rest = self.finish()
            self._move(index)
            return rest
        if self._place is _Place.ANSWER:
            return self._answer.push(index)
        if self._place is _Place.REASONING:
            self._tell(self._reasoning.push(index))
        else:
            self._header.append(index)
        return ""

    def finish(self) -> str:
        """Ends what is under way and returns the rest of the answer."""
        self._tell(self._reasoning.close())
        return self._answer.close()

    def _move(self, marker: int) -> None:
        self._place = self._places[marker]
        if self._place is _Place.MESSAGE:
            # "final", or such as "commentary to=functions.search json".
            channel = self._tokenizer.decode(self._header).split()[:1]
            self._place = _Place.ANSWER if channel == [_ANSWERING] else _Place.REASONING
        self._header = []

    def _resume(self, prompt: Sequence[int]) -> None:
        """Reads the prompt from its last opening marker on. Text there is an earlier turn's, or a quotation."""
        opener = next(iter(self._places))
        last = max((at for at, index in enumerate(prompt) if index == opener), default=len(prompt))
        for index in prompt[last:]:
            if index in self._places:
                self._move(index)
            elif self._place is _Place.HEADER:
                self._header.append(index)
            elif not self._side.is_blank(index):
                self._place = _Place.ANSWER
                return

    @property
    def _side(self) -> "_Side":
        return self._answer if self._place is _Place.ANSWER else self._reasoning

    def _tell(self, text: str) -> None:
        if text and self._on_reasoning:
            self._on_reasoning(text)


class _Side:
    """The answer, or the reasoning: its sections, each of them decoded by itself."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), label: str = "") -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._label = label
        self._stream: TextStream | None = None  # of the section under way, from its first token with text
        self._gap = ""  # white space that appears once text follows
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def is_blank(self, index: int) -> bool:
        """Whether a section does not begin with this token yet. Dropped here, so that no stop string meets it."""
        return self._tokenizer.decode([index]).strip() in ("", self._label)

    def push(self, index: int) -> str:
        if self._stream is None:
            if self.is_blank(index):
                return ""
            self._stream = TextStream(self._tokenizer, self._stop)
            self._gap = "\n" if self._parts else ""
        return self._release(self._stream.push(index))

    def close(self) -> str:
        """Ends the section under way, if there is one, and returns the rest of its text."""
        if self._stream is None:
            return ""
        released = self._release(self._stream.finish())
        self._stream = None
        return released

    def _release(self, new: str) -> str:
        assert self._stream is not None
        self.stopped = self.stopped or self._stream.stopped
        text = self._gap + new
        released = text.rstrip()
        self._gap = text[len(released) :]
        if released:
            self._parts.append(released)
        return released
