"""How one call generates: the caller's wishes, the checkpoint's `generation_config.json`, and the defaults."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moejax.errors import MoejaxError
from moejax.inference.sampling import Filters

# Fields that change transformers' tokens and that nothing here obeys, with the values at which they do nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "constraints": ([],),
    "force_words_ids": ([],),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "sequence_bias": ({}, []),
    "bad_words_ids": ([],),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "watermarking_config": (),
    "token_healing": (False,),
    "max_time": (),
}
_UNSUPPORTED_WHEN_SAMPLING: dict[str, tuple[Any, ...]] = {
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
}
_TRANSFORMERS_TOP_K = 50  # what transformers 5.23 samples with where do_sample is true and top_k absent


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Everything that decides how a sequence is continued and when it ends.

    Attributes:
        max_new_tokens: most tokens to generate.
        max_length: most tokens of prompt and continuation together; takes the place of `max_new_tokens` when given.
        temperature: 0 is greedy; sampling divides the logits by it.
        top_k: 0 is off.
        top_p: 1 is off.
        min_p: 0 is off.
        repetition_penalty: 1 is off; applies to greedy decoding too.
        seed: of the random numbers; each prompt and position has its own key.
        eos_ids: token ids that end a sequence.
        stop: strings that end a sequence.
        logprobs: whether to return each token's log-probability.
        ignored: fields of `generation_config.json` that ask for something unsupported, as "name=value", for a warning.

    Raises:
        MoejaxError: a value is outside its range.
    """

    max_new_tokens: int = 32
    max_length: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    eos_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    ignored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _integer("max_new_tokens", self.max_new_tokens, 1)
        if self.max_length is not None:
            _integer("max_length", self.max_length, 1)
        if self.temperature != 0:
            # Between these, quotients of any model's logits stay finite in f32 and still tell tokens apart.
            _number("temperature", self.temperature, 1e-4, 1e4, "0 (greedy), or 0.0001 to 10000")
        _integer("top_k", self.top_k, 0)
        _number("top_p", self.top_p, 0, 1, "0 to 1 (off)")
        _number("min_p", self.min_p, 0, 1, "0 (off) to 1")
        _number("repetition_penalty", self.repetition_penalty, 1e-4, 1e4, "0.0001 to 10000 (1 is off)")
        _integer("seed", self.seed, 0, 2**32 - 1)
        for index in self.eos_ids:
            _integer("eos token id", index, 0)
        if not all(isinstance(string, str) and string for string in self.stop):
            raise MoejaxError(f"stop strings must not be empty, got {list(self.stop)}; leave empty ones out")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def filters(self) -> Filters | None:
        """How the distribution is narrowed; None where the best token is taken."""
        return (
            None
            if self.greedy
            else Filters(float(self.temperature), int(self.top_k), float(self.top_p), float(self.min_p))
        )

    def new_tokens(self, prompt_length: int) -> int:
        """Most tokens to generate after a prompt of `prompt_length` tokens.

        Raises:
            MoejaxError: `max_length` leaves no room.
        """
        if self.max_length is None:
            return self.max_new_tokens
        if prompt_length >= self.max_length:
            raise MoejaxError(
                f"the prompt has {prompt_length} tokens and max_length={self.max_length} allows no more for prompt and "
                "continuation together; pass --max-new-tokens"
            )
        return self.max_length - prompt_length


def resolve_sampling(
    overrides: Mapping[str, Any], generation_config: Mapping[str, Any], model_eos_ids: Sequence[int]
) -> SamplingParams:
    """Settles each setting: the caller's explicit value, else the checkpoint's, else the default.

    Decoding is greedy unless the checkpoint says `do_sample: true` or the caller asks for sampling:

    - An explicit temperature decides by itself: 0 is greedy, whatever else is given, and more than 0 samples.
    - An explicit top_k, top_p or min_p that filters anything samples, at the checkpoint's temperature or 1.
    - The checkpoint's temperature, top_k, top_p and min_p hold for any sampling. Where it says `do_sample: true` and
      gives no top_k, that is 50, as in transformers 5.23; a caller's own sampling is not filtered unasked.

    The checkpoint's `max_new_tokens`, or else its `max_length`, holds when the caller gives no `max_new_tokens`; its
    `eos_token_id` replaces the model's, its `stop_strings` hold when the caller gives none.

    Args:
        overrides: fields of SamplingParams; None means not given.
        generation_config: `generation_config.json`, empty when there is none.
        model_eos_ids: `ModelConfig.eos_ids`.

    Raises:
        MoejaxError: a value, the caller's or the checkpoint's, is outside its range.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    given |= {name: _as_tuple(given[name]) for name in ("eos_ids", "stop") if name in given}
    SamplingParams(**given)  # refuses the caller's own mistakes, so that what fails below is the checkpoint's
    stated = {name: value for name, value in generation_config.items() if value is not None}
    settings = _lengths(given, stated) | _distribution(given, stated)
    settings["repetition_penalty"] = stated.get("repetition_penalty", 1.0)
    settings["eos_ids"] = _as_tuple(stated.get("eos_token_id", tuple(model_eos_ids)))
    settings["stop"] = _as_tuple(stated.get("stop_strings", ()))
    settings |= given
    try:
        return SamplingParams(**settings, ignored=_ignored(stated, sampling=settings["temperature"] != 0))
    except MoejaxError as error:
        raise MoejaxError(f"generation_config.json: {error}; mend the file or give the value explicitly") from error


def _lengths(given: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    if "max_new_tokens" in given:
        return {}
    for name in ("max_new_tokens", "max_length"):
        if name in stated:
            return {name: stated[name]}
    return {}


def _distribution(given: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Temperature and filters without the caller's values, which are laid over them; see `resolve_sampling`."""
    asked = given.get("top_k", 0) != 0 or given.get("top_p", 1) != 1 or given.get("min_p", 0) != 0
    sampling_checkpoint = stated.get("do_sample") is True
    if given.get("temperature") == 0 or not (asked or sampling_checkpoint or "temperature" in given):
        return {"temperature": 0.0}
    return {
        "temperature": stated.get("temperature", 1.0),
        "top_k": stated.get("top_k", _TRANSFORMERS_TOP_K if sampling_checkpoint else 0),
        "top_p": stated.get("top_p", 1.0),
        "min_p": stated.get("min_p", 0.0),
    }


def _ignored(stated: Mapping[str, Any], sampling: bool) -> tuple[str, ...]:
    neutral = _UNSUPPORTED | _UNSUPPORTED_WHEN_SAMPLING if sampling else _UNSUPPORTED
    return tuple(
        f"{name}={value!s:.40}" for name, value in stated.items() if name in neutral and value not in neutral[name]
    )


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        allowed = f"{low} to {high}" if high is not None else f"at least {low}"
        raise MoejaxError(f"{name}={value!r} is out of range; it must be a whole number, {allowed}")


def _number(name: str, value: Any, low: float, high: float, allowed: str) -> None:
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not real or not low <= value <= high:
        raise MoejaxError(f"{name}={value!r} is out of range; it must be a number, {allowed}")
