"""Documents to token ids, as a model is to see them."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from moejax.checkpoint.source import read_json
from moejax.data.answers import answer_mask, rendered_answers
from moejax.data.documents import Document
from moejax.errors import MoejaxError
from moejax.inference.chat import TemplateError, find_template, render_messages
from moejax.inference.tokenizer import Tokenizer

_GROUP = 1 << 20  # characters that are tokenised at a time, on all cores
_PIECE = 1 << 18  # characters of a long text that one core takes
_CUT = re.compile(r"(?<=\w)(?= \w)")
_SAMPLE = ("One", " two, three", " four: é", " 5")


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document's tokens.

    Attributes:
      ids: int32.
      learned: which of them are to be learned; None for all but the first.
      bytes: UTF-8 bytes of the text to be learned.
    """

    ids: Int[np.ndarray, " T"]
    learned: Bool[np.ndarray, " T"] | None
    bytes: int

    def mask(self) -> Bool[np.ndarray, " T"]:
        """`learned`, spelled out."""
        return np.arange(self.ids.size) > 0 if self.learned is None else self.learned


class DocumentEncoder:
    """Turns documents into tokens.

    A text becomes its tokens between the id that begins and the id that ends a document. A conversation becomes what
    the chat template makes of it; only the assistant's answers are to be learned.
    """

    def __init__(
        self, tokenizer: Tokenizer, begin: int | None, end: int | None, template: str | None, folder: Path
    ) -> None:
        """What `from_folder` finds in `folder`; `template` may be None where no document is a conversation."""
        self.tokenizer = tokenizer
        self.begin, self.end = begin, end
        self.template = template
        self.folder = folder

    @classmethod
    def from_folder(cls, folder: Path) -> "DocumentEncoder":
        """Of a model's or a tokenizer's folder.

        Documents begin with the tokenizer's bos token, else the config's, else with what ends them: the tokenizer's eos
        token, else the config's first. A model without any of these sees the bare text.

        Raises:
          MoejaxError: there is no tokenizer.json, or a file cannot be understood.
        """
        tokenizer = Tokenizer.from_folder(folder)
        if tokenizer is None:
            raise MoejaxError(f"tokenizer.json is missing in {folder}; make one with python -m moejax.tokenizer")
        config = read_json(folder, "config.json", required=False)
        end = _special_id(tokenizer, config, "eos")
        begin = _special_id(tokenizer, config, "bos")
        try:
            template = find_template(folder)
        except MoejaxError:  # conversations alone need one, and say so
            template = None
        return cls(tokenizer, end if begin is None else begin, end, template, folder)

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        highest = max(self.tokenizer.added_ids.values(), default=0)
        return max(self.tokenizer.vocab_size, highest + 1, (self.begin or 0) + 1, (self.end or 0) + 1)

    @property
    def fingerprint(self) -> str:
        """16 hex digits; encoders with the same give the same tokens."""
        parts = [self.tokenizer.fingerprint, self.tokenizer.special_tokens, self.begin, self.end, self.template]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def encode(self, documents: Iterable[Document]) -> Iterator[Encoded]:
        """The documents' tokens in order; a conversation may give several (see `rendered_answers`).

        Raises:
          MoejaxError: a conversation has no template, or one that does not fit it.
        """
        group: list[Document] = []
        size = 0
        for document in documents:
            if document.text is None:
                yield from self._encode_texts(group)
                group, size = [], 0
                yield from self._encode_chat(document)
                continue
            group.append(document)
            size += len(document.text)
            if size >= _GROUP:
                yield from self._encode_texts(group)
                group, size = [], 0
        yield from self._encode_texts(group)

    def _encode_texts(self, documents: Sequence[Document]) -> Iterator[Encoded]:
        texts = [document.text for document in documents if document.text is not None]
        pieces = [list(_pieces(text)) if self._may_cut else [text] for text in texts]
        ids = tokenise(self.tokenizer, (piece for parts in pieces for piece in parts))
        begin = [] if self.begin is None else [self.begin]
        end = [] if self.end is None else [self.end]
        for text, parts in zip(texts, pieces, strict=True):
            tokens = [np.array(part, np.int32) for part in (begin, *(next(ids) for _ in parts), end)]
            yield Encoded(np.concatenate(tokens), None, len(text.encode()))

    def _encode_chat(self, document: Document) -> Iterator[Encoded]:
        assert document.messages is not None
        if self.template is None:
            raise MoejaxError(f"{document.place} is a conversation; put its chat_template.jinja into {self.folder}")
        try:
            chats = rendered_answers(document.messages, self._render)
        except MoejaxError as error:
            remedy = "; mend the line or the template" if isinstance(error, TemplateError) else ""
            raise MoejaxError(f"{document.place}, chat template of {self.folder}: {error}{remedy}") from error
        for text, spans in chats:
            ids, places = self.tokenizer.encode_places(text)
            mask = answer_mask(places, spans)
            mask[:1] = False
            yield Encoded(np.array(ids, np.int32), mask, sum(len(text[a:b].encode()) for a, b in spans))

    def _render(self, messages: Sequence[dict[str, Any]], answer_next: bool) -> str:
        assert self.template is not None
        return render_messages(self.template, messages, self.tokenizer.special_tokens, answer_next)

    @functools.cached_property
    def _may_cut(self) -> bool:
        """Whether a text cut between two words has the same tokens; not where each text gets a prefix."""
        whole, *parts = self.tokenizer.encode_texts(["".join(_SAMPLE), *_SAMPLE])
        return whole == [index for part in parts for index in part]


def tokenise(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
    """Each text's ids, no special token added; many texts at a time, on all cores."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= _GROUP:
            yield from tokenizer.encode_texts(group)
            group, size = [], 0
    yield from tokenizer.encode_texts(group)


def _special_id(tokenizer: Tokenizer, config: dict[str, Any], name: str) -> int | None:
    token = tokenizer.special_tokens.get(f"{name}_token")
    if token is not None and (index := tokenizer.id_of(token)) is not None:
        return index
    index = config.get(f"{name}_token_id")
    if isinstance(index, list):
        index = index[0] if index else None
    return index if isinstance(index, int) else None


def _pieces(text: str) -> Iterator[str]:
    """A long text in pieces, cut between words: they are tokenised on several cores, and one takes little memory."""
    start = 0
    while len(text) - start > _PIECE and (cut := _CUT.search(text, start + _PIECE)):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]
