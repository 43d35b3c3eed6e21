"""Where a rendered conversation has what the assistant is to learn."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from moejax.errors import MoejaxError

Render = Callable[[Sequence[dict[str, Any]], bool], str]
Spans = list[tuple[int, int]]
Rendered = tuple[str, Spans]


def rendered_answers(messages: Sequence[dict[str, Any]], render: Render) -> list[Rendered]:
    """The conversation as text, and from where to where the assistant's answers go in it, in characters.

    An answer begins where the prompt for it ends and ends where the conversation up to it ends, with the marks that the
    template writes there. Templates that render an earlier answer otherwise than the last one (they drop its reasoning,
    or close it with another mark) give one text for each answer, as a model that is asked for it sees it.

    Args:
      messages: the conversation.
      render: of the first messages and whether an answer is to come next.

    Raises:
      MoejaxError: an answer does not begin with its prompt, so that nothing says where it begins.
    """
    found: list[Rendered] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise MoejaxError("the conversation begins with an answer; put a user's or a system's message before it")
        prompt, until = render(messages[:index], True), render(messages[: index + 1], False)
        if not until.startswith(prompt) or len(until) == len(prompt):
            raise MoejaxError(
                "it does not render an answer right after the prompt for it, so that nothing says where the answer "
                f"begins (message {index + 1}); mend it, or write such conversations as text"
            )
        found.append((until, [(len(prompt), len(until))]))
    whole = render(messages, False)
    if all(whole.startswith(until) for until, _ in found):
        return [(whole, [span for _, spans in found for span in spans])]
    return found


def answer_mask(places: Iterable[tuple[int, int]], spans: Spans) -> Bool[np.ndarray, " T"]:
    """Which tokens stand for characters of a span, whole or in part; `places` are their characters."""
    begins, ends = np.array(list(places), np.int64).reshape(-1, 2).T
    mask = np.zeros(begins.size, bool)
    for low, high in spans:
        # A token that stands for no character (a space that was trimmed off) belongs where it stands.
        mask |= (begins < high) & (np.maximum(ends, begins + 1) > low)
    return mask
