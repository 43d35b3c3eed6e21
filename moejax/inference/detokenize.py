"""Text that appears while tokens are still coming."""

from moejax.errors import MoejaxError
from moejax.inference.tokenizer import Tokenizer

# Decoded again with each token, as left context. Byte-level tokens hold at least one byte and a character at most four,
# so four tokens always contain the character that is still incomplete; decoders that treat the first token of a text
# specially (dropping its leading space) have done so before the new token.
_CONTEXT = 4
_REPLACEMENT = "\ufffd"


class TextStream:
    """Turns one sequence's tokens into text, piece by piece, until a stop string appears.

    The pieces joined equal `tokenizer.decode` of all the ids, cut before the first stop string: the one that is
    complete first, and of those that end together the longest. Each token costs a decode of at most eight tokens. Runs
    of byte tokens (<0x..>) wait for their end, because one invalid byte changes the text of the whole run.

    Args:
        tokenizer: None for a model that has only ids; all text is then empty.
        stop: strings that end the text; none of them empty.

    Raises:
        MoejaxError: stop strings without a tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: tuple[str, ...] = ()) -> None:
        if stop and tokenizer is None:
            raise MoejaxError(
                f"stop strings {list(stop)} need a tokenizer.json, and this model has none; leave them out"
            )
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []  # left context, then the tokens whose text has not settled
        self._settled = 0  # characters of the text of _ids that have been handed on
        self._held = ""  # settled text that could be the beginning of a stop string
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All the text returned so far; after `finish`, or once stopped, the whole text."""
        return "".join(self._parts)

    def push(self, index: int) -> str:
        """Takes the next token id and returns the text that is now certain, often empty."""
        if self._tokenizer is None or self.stopped or self._tokenizer.is_silent(index):
            return ""
        self._ids.append(index)
        if index in self._tokenizer.byte_ids:
            return ""
        text = self._tokenizer.decode(self._ids)
        new = text[self._settled : _settled_length(text)]
        self._settled += len(new)
        if len(self._ids) >= 2 * _CONTEXT:
            self._forget(text)
        return self._release(new)

    def finish(self) -> str:
        """Returns the rest of the text; no token may follow."""
        if self._tokenizer is None or self.stopped:
            return ""
        new = self._tokenizer.decode(self._ids)[self._settled :]
        self._ids, self._settled = [], 0
        released = self._release(new)
        if self.stopped:
            return released
        rest, self._held = self._held, ""
        self._parts.append(rest)
        return released + rest

    def _forget(self, text: str) -> None:
        """Keeps the last tokens as context. What had not settled lies at their end, whatever came before them."""
        assert self._tokenizer is not None
        unsettled = len(text) - self._settled
        self._ids = self._ids[-_CONTEXT:]
        self._settled = len(self._tokenizer.decode(self._ids)) - unsettled

    def _release(self, new: str) -> str:
        """Settled text up to a stop string, or up to where one may have begun."""
        text = self._held + new
        cut = _first_stop(text, self._stop)
        if cut is not None:
            self.stopped, self._held = True, ""
        else:
            cut = len(text) - _stop_prefix(text, self._stop)
            self._held = text[cut:]
        self._parts.append(text[:cut])
        return text[:cut]


def _settled_length(text: str) -> int:
    """Length without one final U+FFFD: further bytes may complete it to a character. Earlier ones are beyond repair."""
    return len(text) - text.endswith(_REPLACEMENT)


def _first_stop(text: str, stop: tuple[str, ...]) -> int | None:
    """Where the stop string begins that ends first; independent of how tokens cut the text."""
    found = [(at + len(string), at) for string in stop if (at := text.find(string)) >= 0]
    return min(found)[1] if found else None


def _stop_prefix(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` with which a stop string begins."""
    longest = min(len(text), max((len(string) for string in stop), default=1) - 1)
    for length in range(longest, 0, -1):
        if any(string.startswith(text[-length:]) for string in stop):
            return length
    return 0
