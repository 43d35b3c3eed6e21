"""Text to ids and back, from a checkpoint's `tokenizer.json`."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from moejax.errors import MoejaxError

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Files that hold a tokenizer in a form that is not read: why, and what makes a tokenizer.json of them.
_TIKTOKEN = (
    "cannot take its place (it lacks the pattern that splits text, which is in the model's own Python code): "
    "make one with transformers.integrations.tiktoken.convert_tiktoken_to_fast"
)
_OTHER_FORMS = {
    "tiktoken.model": _TIKTOKEN,
    "*.tiktoken": _TIKTOKEN,
    "tokenizer.model": (
        "cannot take its place: make one with transformers' "
        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    ),
}


class Tokenizer:
    """A checkpoint's tokenizer, with the behaviour of transformers' AutoTokenizer over the same files.

    Attributes:
        special_tokens: named special tokens as strings, such as {"bos_token": "<s>"}; chat templates use them.
        special_ids: ids that `decode` leaves out.
        added_ids: id of each added token, special or not, by its text.
        byte_ids: ids of the byte tokens <0x00> to <0xFF>, when runs of them decode together; otherwise empty.
    """

    def __init__(self, backend: Backend, config: dict[str, Any]) -> None:
        # Length limits stored for training must not cut a prompt, nor pad it.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = _named_special_tokens(config)
        # The backend goes on skipping a token that was special once, even if the config takes the mark away.
        before = _special_ids(backend)
        _add_missing(backend, config, self.special_tokens)
        self.special_ids = before | _special_ids(backend)
        self.added_ids = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
        self.byte_ids = _byte_fallback_ids(backend)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer | None":
        """Reads `tokenizer.json`, with `tokenizer_config.json` where there is one.

        Returns:
            None when the folder has no `tokenizer.json`; `require` makes that the user's error once text is needed.

        Raises:
            MoejaxError: a file is there and cannot be understood.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            backend = Backend.from_file(str(path))
        # The Rust side raises bare Exception, for bad JSON and for JSON that is no tokenizer alike.
        except Exception as error:
            raise MoejaxError(
                f"{path} is not a readable tokenizer ({_one_line(error)}); fetch the file again"
            ) from error
        config = read_tokenizer_config(folder)
        try:
            return cls(backend, config)
        except (AttributeError, TypeError, ValueError) as error:
            raise MoejaxError(
                f"{folder / 'tokenizer_config.json'} lists a malformed token ({_one_line(error)})"
            ) from error

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model's vocabulary may be padded to more."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that `tokenizer.json`'s post-processor adds.

        `add_bos_token` and `add_eos_token` of `tokenizer_config.json` are not consulted: transformers 5 drops both
        whenever a `tokenizer.json` is there.

        Raises:
            MoejaxError: `text` holds a surrogate, as a command line does when its bytes are not UTF-8.
        """
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of a rendered chat. The template has already written the special tokens; none is added."""
        return self._encode(text, add_special_tokens=False)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts, on all cores; no special token is added."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, none added, and for each the characters of `text` that it stands for: first, and one past."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    @property
    def fingerprint(self) -> str:
        """16 hex digits; tokenizers with the same give the same ids."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()[:16]

    def id_of(self, token: str) -> int | None:
        """The id of a token spelled as in the vocabulary."""
        return self._backend.token_to_id(token)

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Text of `ids`; ids outside the vocabulary, such as a model's padding rows, give nothing.

        No clean-up of spaces: off by default in transformers, and never done there for BPE vocabularies.
        """
        return self._backend.decode(ids, skip_special_tokens=skip_special)

    def is_silent(self, index: int) -> bool:
        """Whether `decode` gives nothing for this id: a special token, or one the vocabulary lacks."""
        return index in self.special_ids or not self._backend.id_to_token(index)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MoejaxError(
                f"prompt {text!a:.60} is not valid UTF-8 at character {error.start}; re-encode it"
            ) from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids


def require(tokenizer: Tokenizer | None, folder: Path) -> Tokenizer:
    """The tokenizer, or the error for a model that has none where text is asked for.

    Raises:
        MoejaxError: there is no tokenizer.
    """
    if tokenizer is None:
        raise MoejaxError(_missing(folder))
    return tokenizer


def _missing(folder: Path) -> str:
    for pattern, remedy in _OTHER_FORMS.items():
        for path in sorted(folder.glob(pattern)):
            return (
                f"tokenizer.json is missing in {folder}; {path.name} {remedy}, or pass token ids with --prompt-ids "
                "instead of text"
            )
    return f"tokenizer.json is missing in {folder}; pass token ids with --prompt-ids instead of text"


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json` as a dict, empty without the file.

    `special_tokens_map.json` is laid over it where older checkpoints (no `added_tokens_decoder`) keep the names there.

    Raises:
        MoejaxError: a file is not a JSON object.
    """
    config = _read_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    return config | _read_object(folder / "special_tokens_map.json")


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise MoejaxError(f"{path} is not valid JSON ({_one_line(error)}); fetch the file again") from error
    if not isinstance(value, dict):
        raise MoejaxError(f"{path} holds a JSON {type(value).__name__}, not an object; fetch the file again")
    return value


def _named_special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Every `*_token` entry; a token is written as a string or as an object with `content`."""
    contents = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token")
    }
    return {name: content for name, content in contents.items() if isinstance(content, str)}


def _special_ids(backend: Backend) -> frozenset[int]:
    return frozenset(index for index, token in backend.get_added_tokens_decoder().items() if token.special)


def _add_missing(backend: Backend, config: dict[str, Any], named: dict[str, str]) -> None:
    """Adds what `tokenizer_config.json` knows beyond `tokenizer.json`, as transformers does.

    An entry of `added_tokens_decoder` that differs from the added token in `tokenizer.json` replaces it; a named
    special token that neither lists is added at the next free id.
    """
    known = list(backend.get_added_tokens_decoder().values())
    listed = [AddedToken(**entry) for _, entry in sorted(config.get("added_tokens_decoder", {}).items(), key=_index)]
    contents = {token.content for token in known + listed}
    missing = [token for token in listed if repr(token) not in map(repr, known)]
    missing += [AddedToken(content, special=True) for content in named.values() if content not in contents]
    for token in missing:
        token.special = token.special or token.content in named.values()
    backend.add_tokens(missing)


def _index(entry: tuple[str, Any]) -> int:
    return int(entry[0])


def _byte_fallback_ids(backend: Backend) -> frozenset[int]:
    """Ids of <0x00> to <0xFF> for a ByteFallback decoder, which decodes a run of them as one piece of UTF-8."""
    decoder = json.loads(backend.to_str())["decoder"] or {}
    stages = decoder.get("decoders", [decoder])
    if not any(stage.get("type") == "ByteFallback" for stage in stages):
        return frozenset()
    return frozenset(index for token, index in backend.get_vocab().items() if _BYTE_TOKEN.fullmatch(token))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
