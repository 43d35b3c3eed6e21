"""A tokenizer and templates for chats with reasoning models, in the manner of those that are published."""

from collections.abc import Sequence

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from moejax.inference.tokenizer import Tokenizer

HARMONY_MARKS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
THINK_MARKS = ("<think>", "</think>")
GEMMA_MARKS = ("<|channel>", "<channel|>")

# A system header that each chat begins with, a developer's message for the caller's own, earlier reasoning dropped.
HARMONY = """{%- macro header() %}
    {%- if model_identity is not defined %}
        {%- set model_identity = "You are a tiny model." %}
    {%- endif %}
    {{- model_identity ~ "\\n" }}
    {{- "Today: " + strftime_now("%Y") + "\\n" }}
    {%- if reasoning_effort is not defined %}
        {%- set reasoning_effort = "medium" %}
    {%- endif %}
    {{- "Reasoning: " + reasoning_effort }}
    {%- if builtin_tools is defined and builtin_tools is not none %}
        {{- "\\nTools: " ~ builtin_tools | join(", ") }}
    {%- endif %}
{%- endmacro %}
{{- "<|start|>system<|message|>" }}{{ header() }}{{ "<|end|>" }}
{%- set turns = messages %}
{%- if messages[0].role in ["developer", "system"] %}
    {{- "<|start|>developer<|message|># Instructions\\n\\n" + messages[0].content + "<|end|>" }}
    {%- set turns = messages[1:] %}
{%- endif %}
{%- for turn in turns %}
    {%- if turn.role == "assistant" %}
        {%- if "content" in turn and "<|channel|>" in turn.content or "<|channel|>" in (turn.thinking or "") %}
            {{- raise_exception("a message must not hold channels") }}
        {%- endif %}
        {%- if loop.last and not add_generation_prompt %}
            {%- if "thinking" in turn %}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + turn.thinking + "<|end|>" }}
            {%- endif %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + turn.content + "<|return|>" }}
        {%- else %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + turn.content + "<|end|>" }}
        {%- endif %}
    {%- else %}
        {{- "<|start|>" + turn.role + "<|message|>" + turn.content + "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}
    {{- "<|start|>assistant" }}
{%- endif %}"""

# Reasoning after the last question is kept; the template opens the next answer's.
THINK = """{%- set ns = namespace(last=-1) %}
{%- for turn in messages %}
    {%- if turn.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for turn in messages %}
    {{- "[" + turn.role + "]\\n" }}
    {%- if turn.role == "assistant" and loop.index0 > ns.last and turn.reasoning_content %}
        {{- "<think>\\n" + turn.reasoning_content.strip("\\n") + "\\n</think>\\n\\n" }}
    {%- endif %}
    {{- turn.content + "\\n" }}
{%- endfor %}
{{- "[assistant]\\n<think>\\n" }}"""


def byte_level(marks: Sequence[str], special: bool = True) -> Backend:
    """One token for each byte and for the words that channels are called by, then the marks."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in ("thought", "final", "analysis", "assistant"):
        merges += [(word[:end], word[end]) for end in range(1, len(word))]
    pieces = dict.fromkeys([*letters, *(left + right for left, right in merges)])
    backend = Backend(models.BPE({piece: index for index, piece in enumerate(pieces)}, list(dict.fromkeys(merges))))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    add = backend.add_special_tokens if special else backend.add_tokens
    add([AddedToken(mark, special=special, normalized=False) for mark in marks])
    return backend


def tokenizer_of(marks: Sequence[str], special: bool = True) -> Tokenizer:
    return Tokenizer(byte_level(marks, special), {})
