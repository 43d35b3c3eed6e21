"""What `moejax generate` shows while a single prompt's text is made."""

from typing import Self

from moejax import distributed
from moejax.commands.session import console


def think(text: str) -> None:
    """Reasoning on stderr, dimmed where that is a terminal; stdout holds answers alone."""
    if distributed.is_main():
        console.print(text, end="", style="dim", markup=False, highlight=False, soft_wrap=True)


class Transcript:
    """A line that something is compiled, then the text as it comes: answers on stdout, reasoning on stderr.

    Args:
        lead: what stands before the text. It waits for the first, so that stdout stays empty when something turns out
            to be wrong. None shows no text.
    """

    def __init__(self, lead: str | None) -> None:
        self._lead = lead
        self._began = False
        self._thinking = False
        self._status = console.status("compiling")

    def __enter__(self) -> Self:
        if console.is_terminal and distributed.is_main():
            self._status.start()
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self._status.stop()
        if self._lead is not None and (failure is None or (failure is KeyboardInterrupt and self._began)):
            self._begin()
            self._end_reasoning()
            print(flush=True)

    def answer(self, _: int, text: str) -> None:
        """New text of the answer, or of a continuation."""
        self._status.stop()
        if self._lead is not None:
            self._begin()
            self._end_reasoning()
            print(text, end="", flush=True)

    def reason(self, _: int, text: str) -> None:
        """New text of the reasoning."""
        self._status.stop()
        if self._lead is not None:
            self._begin()
            self._thinking = True
            think(text)

    def _begin(self) -> None:
        if not self._began:
            print(self._lead, end="", flush=True)
        self._began = True

    def _end_reasoning(self) -> None:
        if self._thinking:
            think("\n")
        self._thinking = False
