import math

import pytest

from moejax.errors import MoejaxError
from moejax.inference.generation_config import SamplingParams, resolve_sampling
from moejax.inference.sampling import Filters

SAMPLED = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05}


@pytest.mark.parametrize(
    ("overrides", "stated", "expected"),
    [
        ({}, {}, None),
        ({}, {"temperature": 0.6, "top_p": 0.9}, None),
        ({}, {"do_sample": False, "temperature": 0.6}, None),
        ({}, SAMPLED, Filters(0.6, 20, 0.95, 0.05)),
        ({}, {"do_sample": True}, Filters(1.0, 50, 1.0, 0.0)),
        ({}, {"do_sample": True, "top_k": None}, Filters(1.0, 50, 1.0, 0.0)),
        ({}, {"do_sample": True, "top_k": 0}, Filters(1.0, 0, 1.0, 0.0)),
        ({"temperature": 0}, SAMPLED, None),
        ({"temperature": 0.0, "top_p": 0.5}, {}, None),
        ({"temperature": 0.8}, {}, Filters(0.8)),
        ({"temperature": 0.8}, SAMPLED, Filters(0.8, 20, 0.95, 0.05)),
        ({"temperature": 0.8}, {"top_p": 0.9}, Filters(0.8, 0, 0.9)),
        ({"temperature": 0.8, "top_k": 0, "top_p": 1.0}, SAMPLED, Filters(0.8, 0, 1.0, 0.05)),
        ({"top_p": 0.5}, {}, Filters(1.0, 0, 0.5)),
        ({"top_k": 3}, {"temperature": 0.7}, Filters(0.7, 3)),
        ({"min_p": 0.1}, SAMPLED, Filters(0.6, 20, 0.95, 0.1)),
        ({"top_k": 0, "top_p": 1.0, "min_p": 0.0}, {}, None),
        ({"temperature": None, "top_k": None}, SAMPLED, Filters(0.6, 20, 0.95, 0.05)),
    ],
)
def test_who_decides_the_distribution(overrides, stated, expected):
    params = resolve_sampling(overrides, stated, ())
    assert params.filters == expected and params.greedy == (expected is None)


def test_defaults():
    assert resolve_sampling({}, {}, (2,)) == SamplingParams(max_new_tokens=32, temperature=0.0, eos_ids=(2,))


def test_repetition_penalty_of_the_checkpoint_holds_for_greedy_decoding():
    params = resolve_sampling({}, {"repetition_penalty": 1.05}, ())
    assert params.greedy and params.repetition_penalty == 1.05
    assert resolve_sampling({"repetition_penalty": 1.0}, {"repetition_penalty": 1.05}, ()).repetition_penalty == 1.0


@pytest.mark.parametrize(
    ("overrides", "stated", "eos_ids"),
    [
        ({}, {}, (2, 3)),
        ({}, {"eos_token_id": 7}, (7,)),
        ({}, {"eos_token_id": [7, 8]}, (7, 8)),
        ({}, {"eos_token_id": None}, (2, 3)),
        ({"eos_ids": ()}, {"eos_token_id": 7}, ()),
        ({"eos_ids": [9]}, {"eos_token_id": 7}, (9,)),
    ],
)
def test_eos_ids(overrides, stated, eos_ids):
    assert resolve_sampling(overrides, stated, (2, 3)).eos_ids == eos_ids


@pytest.mark.parametrize(
    ("overrides", "stated", "stop"),
    [
        ({}, {"stop_strings": "END"}, ("END",)),
        ({}, {"stop_strings": ["a", "b"]}, ("a", "b")),
        ({"stop": ["c"]}, {"stop_strings": ["a", "b"]}, ("c",)),
        ({"stop": "c"}, {}, ("c",)),
    ],
)
def test_stop_strings(overrides, stated, stop):
    assert resolve_sampling(overrides, stated, ()).stop == stop


@pytest.mark.parametrize(
    ("overrides", "stated", "after_ten"),
    [
        ({}, {}, 32),
        ({}, {"max_new_tokens": 5}, 5),
        ({}, {"max_length": 100}, 90),
        ({}, {"max_new_tokens": 5, "max_length": 100}, 5),
        ({"max_new_tokens": 7}, {"max_length": 100}, 7),
        ({"max_new_tokens": 7}, {"max_new_tokens": 5}, 7),
    ],
)
def test_lengths(overrides, stated, after_ten):
    assert resolve_sampling(overrides, stated, ()).new_tokens(10) == after_ten


def test_a_prompt_beyond_max_length_is_refused():
    params = resolve_sampling({}, {"max_length": 10}, ())
    assert params.new_tokens(9) == 1
    with pytest.raises(MoejaxError, match=r"prompt has 10 tokens .* max_length=10 .*; pass --max-new-tokens"):
        params.new_tokens(10)


def test_what_transformers_would_obey_and_we_do_not_is_named():
    stated = {
        "num_beams": 4,
        "no_repeat_ngram_size": 3,
        "suppress_tokens": [1, 2],
        "bos_token_id": 1,
        "use_cache": True,
    }
    assert resolve_sampling({}, stated, ()).ignored == (
        "num_beams=4",
        "no_repeat_ngram_size=3",
        "suppress_tokens=[1, 2]",
    )
    (entry,) = resolve_sampling({}, {"suppress_tokens": list(range(500))}, ()).ignored
    assert entry.startswith("suppress_tokens=[0, 1, ") and len(entry) < 80


def test_neutral_values_are_not_named():
    neutral = {
        "num_beams": 1,
        "no_repeat_ngram_size": 0,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "bad_words_ids": None,
        "suppress_tokens": [],
        "sequence_bias": {},
        "guidance_scale": 1.0,
        "encoder_repetition_penalty": 1.0,
        "min_length": 0,
    }
    assert resolve_sampling({}, SAMPLED | neutral, ()).ignored == ()


def test_unsupported_filters_are_named_only_when_sampling():
    stated = {"typical_p": 0.9, "eta_cutoff": 1e-3, "top_h": 0.4}
    assert resolve_sampling({}, stated, ()).ignored == ()
    assert resolve_sampling({"temperature": 1.0}, stated, ()).ignored == (
        "typical_p=0.9",
        "eta_cutoff=0.001",
        "top_h=0.4",
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_new_tokens", 0, "max_new_tokens=0 is out of range; it must be a whole number, at least 1"),
        ("max_new_tokens", 1.5, "max_new_tokens=1.5 is out of range; it must be a whole number, at least 1"),
        ("max_length", 0, "max_length=0 is out of range; it must be a whole number, at least 1"),
        (
            "temperature",
            -0.1,
            r"temperature=-0.1 is out of range; it must be a number, 0 \(greedy\), or 0.0001 to 10000",
        ),
        ("temperature", math.nan, "temperature=nan is out of range"),
        ("temperature", 1e-9, "temperature=1e-09 is out of range"),
        ("temperature", "hot", "temperature='hot' is out of range"),
        ("top_k", -1, "top_k=-1 is out of range; it must be a whole number, at least 0"),
        ("top_k", True, "top_k=True is out of range"),
        ("top_p", 1.1, r"top_p=1.1 is out of range; it must be a number, 0 to 1 \(off\)"),
        ("top_p", -0.1, "top_p=-0.1 is out of range"),
        ("min_p", 2, r"min_p=2 is out of range; it must be a number, 0 \(off\) to 1"),
        ("repetition_penalty", 0, r"repetition_penalty=0 is out of range; .* 0.0001 to 10000 \(1 is off\)"),
        ("repetition_penalty", math.inf, "repetition_penalty=inf is out of range"),
        ("seed", -1, "seed=-1 is out of range; it must be a whole number, 0 to 4294967295"),
        ("seed", 2**32, "seed=4294967296 is out of range"),
        ("eos_ids", (1, -2), "eos token id=-2 is out of range"),
        ("stop", ("a", ""), r"stop strings must not be empty, got \['a', ''\]"),
    ],
)
def test_values_out_of_range_are_named(field, value, message):
    with pytest.raises(MoejaxError, match=f"^{message}"):
        resolve_sampling({field: value}, {}, ())


def test_a_mistake_in_the_file_is_blamed_on_the_file():
    with pytest.raises(
        MoejaxError, match=r"^generation_config\.json: top_p=7 is out of range; .* give the value explicitly"
    ):
        resolve_sampling({}, {"do_sample": True, "top_p": 7}, ())
    assert resolve_sampling({"top_p": 0.5}, {"do_sample": True, "top_p": 7}, ()).top_p == 0.5
