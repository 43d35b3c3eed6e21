"""Chat templates: the jinja programs in checkpoints that turn messages into a prompt.

They come from strangers, so they run in jinja's immutable sandbox, with the settings transformers renders them with.
"""

import functools
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moejax.checkpoint.source import read_json
from moejax.errors import MoejaxError
from moejax.inference.tokenizer import read_tokenizer_config

_REASONING = ("reasoning_content", "thinking", "reasoning")


def find_template(folder: Path) -> str:
    """A checkpoint's chat template: `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`.

    Where the config holds several named templates, the one called "default" is meant. Models that also see may keep
    theirs in `chat_template.json` alone.

    Raises:
        MoejaxError: there is none, or none called "default".
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise MoejaxError(
                f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); fetch it again"
            ) from error
    template = read_tokenizer_config(folder).get("chat_template")
    if template is None:
        template = read_json(folder, "chat_template.json", required=False).get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        if "default" not in template:
            raise MoejaxError(
                f"chat_template in {folder} has {sorted(map(str, template))} but no 'default'; rename one"
            )
        template = template["default"]
    if not isinstance(template, str):
        raise MoejaxError(f"{folder} has no chat template; leave --chat out, or put a chat_template.jinja there")
    return template


def render_chat(template: str, messages: Sequence[dict[str, Any]], special_tokens: dict[str, str]) -> str:
    """The prompt text for `messages`, ending where the assistant's answer starts.

    Args:
        template: jinja source.
        messages: such as [{"role": "user", "content": "Hello"}]; keys that hold None are left out. The reasoning of an
            earlier answer may be called "reasoning_content", "thinking" or "reasoning"; a template finds it under the
            first two. Whether it repeats that reasoning is its own affair.
        special_tokens: `Tokenizer.special_tokens`; the template sees them as variables.

    Raises:
        MoejaxError: the messages are no JSON objects, or the template cannot be compiled or fails, for instance because
            it refuses the order of the roles.
    """
    try:
        return render_messages(template, messages, special_tokens, answer_next=True)
    except TemplateError as error:
        raise MoejaxError(f"{error}; leave --chat out or mend it") from error


class TemplateError(MoejaxError):
    """A template that cannot be compiled, or that fails on these messages; says why, and no remedy."""


def render_messages(
    template: str, messages: Sequence[dict[str, Any]], special_tokens: dict[str, str], answer_next: bool
) -> str:
    """The text of `messages`, and with `answer_next` what an assistant's answer to them begins with.

    Raises:
        TemplateError: see there.
        MoejaxError: the messages are no JSON objects.
    """
    chat = {"messages": _plain(messages), "add_generation_prompt": answer_next}
    try:
        return _compile(template).render({**special_tokens, **chat, "tools": None, "documents": None})
    # The template is the checkpoint's program: whatever it raises (TypeError, OverflowError ...) is its own fault.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise TemplateError(f"the chat template failed: {reason} ({type(error).__name__})") from error


def _plain(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A copy made of JSON types alone: a template must not reach the methods of the caller's objects."""
    if not messages:
        raise MoejaxError("a chat needs at least one message")
    try:
        copies = json.loads(json.dumps(list(messages)))
    except (TypeError, ValueError) as error:
        raise MoejaxError(f"chat messages must be plain JSON: {error}") from error
    for message in copies:
        if not isinstance(message, dict):
            raise MoejaxError(f"a chat message must be a dict with 'role' and 'content', got {message!r:.80}")
    return [_named_twice({key: value for key, value in message.items() if value is not None}) for message in copies]


def _named_twice(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning under the name that most templates read, and under that of GPT-OSS (as transformers 5.23 does)."""
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    functions: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(functions)
    return environment.from_string(template)


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; a prompt holds its contents."""

    tags = {"generation"}  # noqa: RUF012 - declared by jinja

    def parse(self, parser: Parser) -> nodes.Scope:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
