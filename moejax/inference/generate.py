"""Continues prompts: text or ids in, text and ids out."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import jax
import numpy as np

from moejax.config import ModelConfig
from moejax.errors import MoejaxError
from moejax.inference.channels import Channels, ChannelStream, find_channels
from moejax.inference.chat import find_template, render_chat
from moejax.inference.detokenize import TextStream
from moejax.inference.engine import Engine
from moejax.inference.generation_config import SamplingParams, resolve_sampling
from moejax.inference.steps import BLOCK, Draw
from moejax.inference.tokenizer import Tokenizer, require
from moejax.language_model import LanguageModel

BATCH = 64
"""Prompts that run together; more are taken in turns, so that memory does not grow with their number."""

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Generation:
    """What came of one prompt.

    Attributes:
      text: the continuation, without special tokens and cut before a stop string; "" without a tokenizer. In a chat
        with a model that reasons, the answer alone.
      tokens: all new ids; an end-of-sequence id that ended them is the last one.
      finish_reason: "stop" (end-of-sequence id or stop string) or "length".
      logprobs: for each new token its natural log-probability under the model's own distribution, where asked for.
      prompt_tokens: how many tokens the prompt had.
      reasoning: in a chat, what the model wrote in its other channels; None where its tokenizer has no channels.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    logprobs: list[float] | None
    prompt_tokens: int
    reasoning: str | None = None

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message of a chat: append it and the next question to go on."""
        message = {"role": "assistant", "content": self.text}
        return message | {"reasoning_content": self.reasoning} if self.reasoning else message


@dataclass
class Timing:
    """Where the time went, in seconds, summed over batches; compilation stands apart.

    `first_s` is prompts in to first tokens out, `later_s` all steps after.
    """

    compile_s: float = 0.0
    first_s: float = 0.0
    later_s: float = 0.0
    later_tokens: int = 0
    steps: int = 0
    dropped: int = 0


@dataclass
class _Row:
    """One prompt under way."""

    prompt: list[int]
    room: int
    params: SamplingParams
    stream: TextStream | ChannelStream
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return 0 if self.finish else self.room - len(self.tokens)

    def push(self, token: int, logprob: float | None) -> str:
        """Takes one more token; returns the text that it settles."""
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token in self.params.eos_ids:
            self.finish = "stop"
            return self.stream.finish()
        text = self.stream.push(token)
        if self.stream.stopped:
            self.finish = "stop"
        elif len(self.tokens) >= self.room:
            self.finish = "length"
            text += self.stream.finish()
            # The end may have been held back as the beginning of a stop string, or completed one.
            self.finish = "stop" if self.stream.stopped else "length"
        return text

    def result(self) -> Generation:
        logprobs = self.logprobs if self.params.logprobs else None
        reasoning = self.stream.reasoning if isinstance(self.stream, ChannelStream) else None
        finish = self.finish or "length"
        return Generation(self.stream.text, self.tokens, finish, logprobs, len(self.prompt), reasoning)


def generate(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] | str | None = None,
    eos_ids: Sequence[int] | None = None,
    logprobs: bool = False,
    max_model_len: int | None = None,
    chat: bool = False,
    on_text: Callable[[int, str], None] | None = None,
    on_reasoning: Callable[[int, str], None] | None = None,
    timing: Timing | None = None,
) -> list[Generation]:
    """Continues each prompt until an end-of-sequence id, a stop string or the length.

    Settings left at None are the checkpoint's (`generation_config.json`), else greedy decoding of 32 tokens. The same
    seed gives the same tokens on every mesh (in f32): each prompt, by its number, and each position has its own key.

    Args:
      model: from `moejax.load`.
      prompts: texts, or lists of token ids; with `chat`, texts or lists of `{"role", "content"}` messages.
      max_new_tokens: most tokens to add; a prompt near the end of the context gets fewer.
      temperature: 0 is greedy.
      top_k, top_p, min_p: filters of sampling, in this order.
      repetition_penalty: above 1 makes tokens that were there already less likely.
      seed: of the random numbers.
      stop: strings that end a continuation; they are not part of its text. In a chat they end the answer.
      eos_ids: token ids that end it, in place of the checkpoint's; `[]` for none.
      logprobs: return the log-probability of each new token.
      max_model_len: a context shorter than the model's own, prompt and continuation together.
      chat: wrap each prompt in the checkpoint's chat template, and tell reasoning from the answer.
      on_text: called with (prompt number, new text) as text appears.
      on_reasoning: called likewise with new text of the reasoning.
      timing: filled with seconds and counts.

    Raises:
      MoejaxError: a setting out of range, an empty prompt, ids outside the vocabulary, a prompt over the context.
    """
    params = settle(
        model,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        eos_ids=eos_ids,
        logprobs=logprobs,
    )
    ids = encode_prompts(model, prompts, chat)
    context = _context(model.config, max_model_len)
    tokenizer = model.tokenizer
    if params.stop:
        require(tokenizer, model.folder)
    timing = timing if timing is not None else Timing()
    channels = find_channels(tokenizer) if chat else None
    rows = [
        _Row(
            prompt,
            _room(params, i, len(prompt), context),
            params,
            _stream(tokenizer, channels, prompt, params.stop, partial(on_reasoning, i) if on_reasoning else None),
        )
        for i, prompt in enumerate(ids)
    ]
    for first in range(0, len(rows), BATCH):
        _run_batch(model, rows[first : first + BATCH], first, params, on_text, timing)
    return [row.result() for row in rows]


def settle(model: LanguageModel, **overrides: Any) -> SamplingParams:
    """The settings of one call: the caller's, else the checkpoint's, else the defaults."""
    return resolve_sampling(overrides, model.generation_config, model.config.eos_ids)


def encode_prompts(model: LanguageModel, prompts: Sequence[Prompt], chat: bool = False) -> list[list[int]]:
    """Token ids of each prompt, checked.

    Raises:
      MoejaxError: no prompts, an empty one, text without a tokenizer, ids outside the vocabulary.
    """
    prompts = _listed(prompts)
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise MoejaxError(
            f"prompts must be a list of texts or of id lists, got {type(prompts).__name__}; wrap it in [ ]"
        )
    if not prompts:
        raise MoejaxError("there are no prompts; give at least one")
    return [_encode(model, i, _listed(prompt), chat) for i, prompt in enumerate(prompts)]


def _encode(model: LanguageModel, number: int, prompt: Any, chat: bool) -> list[int]:
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        kind = "a text or a list of messages" if chat else "a text or a list of token ids"
        raise MoejaxError(f"prompt {number} must be {kind}, got {prompt!r:.60}")
    if chat:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        tokenizer = require(model.tokenizer, model.folder)
        ids = tokenizer.encode_chat(render_chat(find_template(model.folder), messages, tokenizer.special_tokens))
    elif isinstance(prompt, str):
        ids = require(model.tokenizer, model.folder).encode(prompt)
    else:
        ids = _whole_numbers(number, prompt)
    if not ids:
        raise MoejaxError(f"prompt {number} is empty; give at least one token")
    for token in ids:
        if not 0 <= token < model.config.vocab_size:
            raise MoejaxError(
                f"prompt {number}: token id {token} is outside the vocabulary, 0 to {model.config.vocab_size - 1}"
            )
    return ids


def _stream(
    tokenizer: Tokenizer | None,
    channels: Channels | None,
    prompt: list[int],
    stop: tuple[str, ...],
    on_reasoning: Callable[[str], None] | None,
) -> TextStream | ChannelStream:
    if tokenizer is None or channels is None:
        return TextStream(tokenizer, stop)
    return ChannelStream(tokenizer, channels, prompt, stop, on_reasoning)


def _listed(value: Any) -> Any:
    """Arrays as the lists they stand for."""
    return value.tolist() if isinstance(value, np.ndarray | jax.Array) else value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _whole_numbers(number: int, prompt: Sequence[Any]) -> list[int]:
    if not all(_is_whole(token) for token in prompt):
        raise MoejaxError(f"prompt {number} must be a text or a list of token ids, got {str(prompt)[:60]!r}")
    return [int(token) for token in prompt]


def _context(config: ModelConfig, max_model_len: int | None) -> int:
    if max_model_len is None:
        return config.context
    if not _is_whole(max_model_len) or not 1 <= max_model_len <= config.context:
        raise MoejaxError(
            f"max_model_len={max_model_len!r} must be a whole number, 1 to the model's context of {config.context}"
        )
    return max_model_len


def _room(params: SamplingParams, number: int, length: int, context: int) -> int:
    """Tokens to add. A prompt that fills the context still gets the one token that follows it."""
    if length > context:
        raise MoejaxError(f"prompt {number} has {length} tokens, over the context of {context}; shorten it")
    return min(params.new_tokens(length), max(1, context - length))


def _run_batch(
    model: LanguageModel,
    rows: list[_Row],
    first: int,
    params: SamplingParams,
    on_text: Callable[[int, str], None] | None,
    timing: Timing,
) -> None:
    """Prefills, then steps until every row has finished; times what the caller waits for, host work included."""
    # The last token of a row is drawn but never run, so it needs no place in the cache.
    longest = max(len(row.prompt) + row.room - 1 for row in rows)
    draw = Draw(params.filters, params.repetition_penalty, params.logprobs)
    began = time.perf_counter()
    engine = Engine(model, len(rows), draw, params.seed, params.eos_ids)

    def accept(new: tuple[np.ndarray, np.ndarray | None, int]) -> int:
        """Hands each row its tokens of one dispatch, step by step; returns how many were still wanted."""
        drawn, scores, dropped = new
        timing.dropped += dropped
        wanted = 0
        for step in range(len(drawn)):
            live = [i for i, row in enumerate(rows) if row.finish is None]
            wanted += len(live)
            for i in live:
                text = rows[i].push(int(drawn[step, i]), None if scores is None else float(scores[step, i]))
                if on_text and text:
                    on_text(first + i, text)
        return wanted

    accept(engine.start(*_rectangle(rows, longest), first, longest))
    compiled, prefilled = engine.compile_s, time.perf_counter()
    timing.first_s += prefilled - began - compiled
    while any(row.finish is None for row in rows):
        if _outgrown(rows, model.config.recomputed_after):
            new = engine.start(*_rectangle(rows, longest), first, longest)
        else:
            new = engine.step(np.array([row.left for row in rows], np.int32), most=_most_steps(model, rows))
        timing.steps += len(new[0])
        timing.later_tokens += accept(new)
    timing.later_s += time.perf_counter() - prefilled - (engine.compile_s - compiled)
    timing.compile_s += engine.compile_s


def _rectangle(rows: list[_Row], longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Each row's tokens so far, right-padded, and how many; of a row that is through not more than `longest`."""
    texts = [(row.prompt + row.tokens)[:longest] for row in rows]
    lengths = np.array([len(text) for text in texts], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for i, text in enumerate(texts):
        tokens[i, : lengths[i]] = text
    return tokens, lengths


def _most_steps(model: LanguageModel, rows: list[_Row]) -> int:
    """Steps after which the host must look: where a cache no longer holds, and where a stop string frees capacity."""
    if model.options.capacity_factor is not None and rows[0].params.stop:
        return 1
    limit = model.config.recomputed_after
    if limit is None:
        return BLOCK
    rooms = [limit + 1 - len(row.prompt) - len(row.tokens) for row in rows if row.finish is None]
    return min((room for room in rooms if room > 0), default=BLOCK)


def _outgrown(rows: list[_Row], limit: int | None) -> bool:
    """Whether a row under way has just passed the length from which its cache no longer holds."""
    if limit is None:
        return False
    return any(row.finish is None and len(row.prompt) + len(row.tokens) == limit + 1 for row in rows)
