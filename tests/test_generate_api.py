"""`moejax.generate`: where sequences end, what sampling depends on, and what the caches hold.

The context is 16 tokens, so that every call with the same number of prompts runs the same compiled programs.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from moe_cases import relative
from tiny import CONFIGS, write_checkpoint

import moejax
from moejax.inference import generate as module
from moejax.inference.engine import Engine
from moejax.inference.generate import Timing
from moejax.inference.steps import Draw

DEMO = Path(moejax.__file__).parent / "demo"
CONTEXT = 16
# One layer: compiling is what costs, and each layer has its own cache in the ring test below and in the goldens.
RAW = CONFIGS["mixtral_plain"] | {
    "vocab_size": 4096,
    "max_position_embeddings": CONTEXT,
    "num_hidden_layers": 1,
    "eos_token_id": None,
}
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} >"
PROMPTS = [[7, 300, 12, 5], [4000], [9, 8, 7, 6, 5, 4, 3, 2, 1]]
SAMPLED: dict[str, Any] = {
    "temperature": 0.9,
    "top_k": 200,
    "top_p": 0.95,
    "min_p": 0.001,
    "repetition_penalty": 1.3,
    "logprobs": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), RAW)
    (folder / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    config = {"chat_template": TEMPLATE, "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def model(mesh, folder) -> moejax.LanguageModel:
    return moejax.load(folder, mesh=mesh("ep=1,tp=1"))


@pytest.fixture(scope="module")
def greedy(model) -> list[moejax.Generation]:
    return moejax.generate(model, PROMPTS, max_new_tokens=10)


@pytest.fixture(scope="module")
def sampled(model) -> list[moejax.Generation]:
    return moejax.generate(model, PROMPTS, max_new_tokens=10, seed=3, **SAMPLED)


def tokens(outs: Sequence[moejax.Generation]) -> list[list[int]]:
    return [out.tokens for out in outs]


def alone(model, prompt, **options) -> moejax.Generation:
    (out,) = moejax.generate(model, [prompt], **options)
    return out


def best_tokens(model, sequences: Sequence[Sequence[int]], width: int) -> list[list[int]]:
    """The model's best next token after each token of each sequence, by forward passes without a cache."""
    rows = np.zeros((len(sequences), width), np.int32)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence)] = sequence
    best = np.asarray(model(rows)).argmax(-1)
    return [row[: len(sequence)].tolist() for row, sequence in zip(best, sequences, strict=True)]


def test_greedy_tokens_are_the_best_of_the_model_without_a_cache(model, greedy):
    for prompt, out in zip(PROMPTS, greedy, strict=True):
        assert len(out.tokens) == min(10, CONTEXT - len(prompt))
    whole = [prompt + out.tokens for prompt, out in zip(PROMPTS, greedy, strict=True)]
    best = best_tokens(model, whole, CONTEXT)
    assert [row[len(prompt) - 1 : -1] for row, prompt in zip(best, PROMPTS, strict=True)] == tokens(greedy)


def test_what_comes_back(model, greedy):
    for prompt, out in zip(PROMPTS, greedy, strict=True):
        assert (out.prompt_tokens, out.finish_reason, out.logprobs) == (len(prompt), "length", None)
        assert out.text == model.tokenizer.decode(out.tokens)


def test_a_ragged_batch_is_each_prompt_alone(model, greedy):
    assert [alone(model, prompt, max_new_tokens=10).tokens for prompt in PROMPTS] == tokens(greedy)


def test_more_prompts_than_run_together_keep_their_numbers(model, greedy, sampled, monkeypatch):
    """Alone in its batch too, a prompt draws with the random key of its number."""
    monkeypatch.setattr(module, "BATCH", 1)
    timing = Timing()
    later = moejax.generate(model, PROMPTS, max_new_tokens=10, seed=3, timing=timing, **SAMPLED)
    assert tokens(later) == tokens(sampled)
    assert timing.later_tokens == sum(len(out.tokens) - 1 for out in later) == timing.steps


def test_sampling_follows_the_seed_and_the_number_of_the_prompt(model, greedy, sampled):
    again = moejax.generate(model, PROMPTS, max_new_tokens=10, seed=3, **SAMPLED)
    assert tokens(again) == tokens(sampled) != tokens(greedy)
    assert tokens(moejax.generate(model, PROMPTS, max_new_tokens=10, seed=4, **SAMPLED)) != tokens(sampled)
    same = moejax.generate(model, [PROMPTS[0]] * 3, max_new_tokens=10, seed=3, **SAMPLED)
    assert same[0].tokens == sampled[0].tokens
    assert same[0].tokens != same[1].tokens != same[2].tokens


def test_logprobs_are_those_of_the_model(model, sampled):
    rows = np.zeros((3, CONTEXT), np.int32)
    for row, prompt, out in zip(rows, PROMPTS, sampled, strict=True):
        row[: len(prompt) + len(out.tokens)] = prompt + out.tokens
    expected = np.asarray(jax.nn.log_softmax(model(rows), axis=-1))
    for row, prompt, out in zip(range(3), PROMPTS, sampled, strict=True):
        places = np.arange(len(out.tokens)) + len(prompt) - 1
        np.testing.assert_allclose(out.logprobs, expected[row, places, out.tokens], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "strategy", "options"),
    [
        ("ep=4,tp=2", "all_to_all", SAMPLED),
        ("ep=2,tp=4", "auto", {}),
        pytest.param("ep=4,tp=2", "auto", SAMPLED, marks=pytest.mark.slow),
        pytest.param("ep=4,tp=2", "all_to_all", {}, marks=pytest.mark.slow),
        pytest.param("ep=2,tp=4", "all_to_all", SAMPLED, marks=pytest.mark.slow),
        pytest.param("ep=2,tp=4", "all_reduce", SAMPLED, marks=pytest.mark.slow),
        pytest.param("ep=1,tp=8", "auto", SAMPLED, marks=pytest.mark.slow),
        pytest.param("ep=3,tp=2", "auto", SAMPLED, marks=pytest.mark.slow),
    ],
)
def test_the_same_tokens_on_every_mesh(mesh, folder, greedy, sampled, spec, strategy, options):
    expected = sampled if options else greedy
    parallel = moejax.load(folder, mesh=mesh(spec), strategy=strategy)
    timing = Timing()
    outs = moejax.generate(parallel, PROMPTS, max_new_tokens=10, seed=3, timing=timing, **options)
    assert tokens(outs) == tokens(expected)
    if options:
        for out, other in zip(outs, expected, strict=True):
            np.testing.assert_allclose(out.logprobs, other.logprobs, rtol=1e-4, atol=1e-5)
    assert timing.dropped == 0
    # What a step leaves lies as it found it, so that one program serves all steps.
    assert sum(map(len, parallel.programs.values())) == 3


def first_new(found: list[int]) -> int:
    """A place after the first whose token did not come before."""
    return next(place for place in range(2, len(found)) if found[place] not in found[:place])


def test_an_end_of_sequence_id_ends_its_row_only(model, greedy):
    end = first_new(greedy[0].tokens)
    eos = greedy[0].tokens[end]
    outs = moejax.generate(model, PROMPTS, max_new_tokens=10, eos_ids=[4095, eos])
    for out, full in zip(outs, greedy, strict=True):
        stopped = eos in full.tokens
        assert out.tokens == (full.tokens[: full.tokens.index(eos) + 1] if stopped else full.tokens)
        assert out.finish_reason == ("stop" if stopped else "length")
    assert tokens(moejax.generate(model, PROMPTS, max_new_tokens=10, eos_ids=eos)) == tokens(outs)


def test_the_checkpoints_own_end_of_sequence_ids(model, greedy):
    end = first_new(greedy[0].tokens)
    eos = greedy[0].tokens[end]
    stops = replace(model, config=replace(model.config, eos_ids=(eos,)))
    assert alone(stops, PROMPTS[0], max_new_tokens=10).tokens == greedy[0].tokens[: end + 1]
    assert alone(stops, PROMPTS[0], max_new_tokens=10, eos_ids=[]).tokens == greedy[0].tokens
    listed = replace(stops, generation_config={"eos_token_id": [4095, greedy[0].tokens[0]]})
    out = alone(listed, PROMPTS[0], max_new_tokens=10)
    assert (out.tokens, out.finish_reason) == (greedy[0].tokens[:1], "stop")


def test_generation_config_is_respected(mesh, model, folder, sampled, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(folder / name)
    eos = sampled[0].tokens[first_new(sampled[0].tokens)]
    stated = {name: value for name, value in SAMPLED.items() if name != "logprobs"}
    stated |= {"do_sample": True, "max_new_tokens": 10, "eos_token_id": [eos]}
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    configured = replace(moejax.load(tmp_path, mesh=model.mesh), programs=model.programs)
    outs = moejax.generate(configured, PROMPTS, seed=3, logprobs=True)
    expected = moejax.generate(model, PROMPTS, seed=3, max_new_tokens=10, eos_ids=[eos], **SAMPLED)
    assert outs == expected
    assert outs[0].finish_reason == "stop"


def test_stop_strings_end_the_text_before_them(model, greedy):
    full = greedy[0]
    decode = model.tokenizer.decode
    # The second token's last character and the third's first.
    cut = len(decode(full.tokens[:2]))
    stop = full.text[cut - 1 : cut + 1]
    out = alone(model, PROMPTS[0], max_new_tokens=10, stop=stop)
    assert out.text == full.text[: full.text.index(stop)]
    assert out.finish_reason == "stop"
    assert out.tokens == full.tokens[: len(out.tokens)]
    assert stop in decode(out.tokens) and stop not in decode(out.tokens[:-1])
    both = alone(model, PROMPTS[0], max_new_tokens=10, stop=["never written", stop])
    assert both == out


def test_a_stop_string_that_never_comes_holds_nothing_back(model, greedy):
    full = greedy[0]
    assert alone(model, PROMPTS[0], max_new_tokens=10, stop=full.text[-2:] + "and more") == full


def test_text_comes_in_pieces_that_join_to_the_whole(model, greedy):
    pieces: dict[int, list[str]] = {0: [], 1: [], 2: []}
    moejax.generate(model, PROMPTS, max_new_tokens=10, on_text=lambda row, text: pieces[row].append(text))
    assert ["".join(pieces[row]) for row in range(3)] == [out.text for out in greedy]
    assert all(text for texts in pieces.values() for text in texts)
    assert len(pieces[0]) > 3


def test_lengths(model, greedy):
    one = alone(model, PROMPTS[0], max_new_tokens=1)
    assert (one.tokens, one.finish_reason) == (greedy[0].tokens[:1], "length")
    single = alone(model, PROMPTS[1], max_new_tokens=1000)
    assert (len(single.tokens), single.finish_reason) == (CONTEXT - 1, "length")
    assert single.tokens[:10] == greedy[1].tokens
    limited = alone(model, PROMPTS[0], max_new_tokens=10, max_model_len=6)
    assert (limited.tokens, limited.finish_reason) == (greedy[0].tokens[:2], "length")


def test_a_prompt_that_fills_the_context_gets_one_token(model):
    prompt = list(range(100, 100 + CONTEXT))
    out = alone(model, prompt, max_new_tokens=5)
    assert (len(out.tokens), out.finish_reason) == (1, "length")
    assert out.tokens == [best_tokens(model, [prompt, [1], [1]], CONTEXT)[0][-1]]
    short = alone(model, PROMPTS[0], max_new_tokens=5, max_model_len=4)
    assert len(short.tokens) == 1


def test_text_prompts_are_their_ids(model):
    assert alone(model, "Once upon", max_new_tokens=4) == alone(
        model, model.tokenizer.encode("Once upon"), max_new_tokens=4
    )


@pytest.mark.parametrize("form", [np.array, lambda p: np.array(p, np.uint16), tuple, jax.numpy.array])
def test_ids_may_be_arrays(model, greedy, form):
    assert alone(model, form(PROMPTS[0]), max_new_tokens=10) == greedy[0]
    assert moejax.generate(model, form([PROMPTS[0]]), max_new_tokens=10) == [greedy[0]]


def test_chat_wraps_each_prompt_in_the_template(model):
    text = model.tokenizer.encode("[user] Hi >")
    wrapped = alone(model, [{"role": "user", "content": "Hi"}], chat=True, max_new_tokens=4)
    assert wrapped == alone(model, "Hi", chat=True, max_new_tokens=4)
    # The template writes the beginning-of-text token itself.
    assert wrapped == alone(model, model.tokenizer.encode_chat("<|endoftext|>[user] Hi >"), max_new_tokens=4)
    assert wrapped.prompt_tokens == len(text) + 1


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there are no prompts; give at least one"),
        ([[]], {}, "prompt 0 is empty; give at least one token"),
        ([[1], [2, 4096]], {}, "prompt 1: token id 4096 is outside the vocabulary, 0 to 4095"),
        ([[-1]], {}, "prompt 0: token id -1 is outside the vocabulary"),
        ([[1.0]], {}, "prompt 0 must be a text or a list of token ids, got '[1.0]'"),
        ([[True]], {}, "prompt 0 must be a text or a list of token ids, got '[True]'"),
        ([[[1, 2]]], {}, "prompt 0 must be a text or a list of token ids, got '[[1, 2]]'"),
        ([1, 2, 3], {}, "prompt 0 must be a text or a list of token ids, got 1"),
        (np.array([1, 2]), {}, "prompt 0 must be a text or a list of token ids, got 1"),
        ([None], {}, "prompt 0 must be a text or a list of token ids, got None"),
        ([b"Once"], {}, "prompt 0 must be a text or a list of token ids, got b'Once'"),
        ([{"role": "user"}], {}, "prompt 0 must be a text or a list of token ids, got {'role': 'user'}"),
        ([5], {"chat": True}, "prompt 0 must be a text or a list of messages, got 5"),
        ([[5]], {"chat": True}, "a chat message must be a dict with 'role' and 'content', got 5"),
        ("Once", {}, "prompts must be a list of texts or of id lists, got str; wrap it in [ ]"),
        ({"a": 1}, {}, "prompts must be a list of texts or of id lists, got dict; wrap it in [ ]"),
        (np.array(1), {}, "prompts must be a list of texts or of id lists, got int; wrap it in [ ]"),
        ([[1] * 17], {}, "prompt 0 has 17 tokens, over the context of 16; shorten it"),
        ([[1] * 5], {"max_model_len": 4}, "prompt 0 has 5 tokens, over the context of 4; shorten it"),
        ([[1]], {"max_model_len": 17}, "max_model_len=17 must be a whole number, 1 to the model's context of 16"),
        ([[1]], {"max_model_len": 0}, "max_model_len=0 must be a whole number, 1 to the model's context of 16"),
        ([[1]], {"max_model_len": 7.5}, "max_model_len=7.5 must be a whole number, 1 to the model's context of 16"),
        ([[1]], {"max_model_len": "7"}, "max_model_len='7' must be a whole number, 1 to the model's context of 16"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 is out of range; it must be a whole number, at least 1"),
        ([[1]], {"temperature": -0.5}, "temperature=-0.5 is out of range"),
        ([[1]], {"stop": ""}, "stop strings must not be empty"),
    ],
)
def test_mistakes(model, prompts, options: dict[str, Any], message: str):
    with pytest.raises(moejax.MoejaxError) as caught:
        moejax.generate(model, prompts, **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_without_a_tokenizer_there_are_only_ids(model, greedy):
    mute = replace(model, tokenizer=None)
    out = alone(mute, PROMPTS[0], max_new_tokens=10)
    assert (out.text, out.tokens) == ("", greedy[0].tokens)
    for prompts, options in ((["Once"], {}), ([[1]], {"stop": "a"}), (["Once"], {"chat": True})):
        with pytest.raises(moejax.MoejaxError, match=r"tokenizer\.json is missing in .*; pass token ids"):
            moejax.generate(mute, prompts, **options)


def test_drops_under_a_capacity_factor_are_counted(mesh, folder):
    tight = moejax.load(folder, mesh=mesh("ep=2,tp=1"), capacity_factor=0.25)
    timing = Timing()
    moejax.generate(tight, PROMPTS, max_new_tokens=1, timing=timing)
    # 14 prompt tokens choose 2 experts each; a cell holds at least one row.
    assert 0 < timing.dropped < 14 * 2
    assert (timing.steps, timing.later_tokens) == (0, 0)


WINDOWED = ["qwen3_bias", "mixtral_llama3", "qwen2_mixed", "qwen2_sparse_step"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "qwen3_bias" else pytest.mark.slow) for name in WINDOWED]
)
def test_rings_hold_their_window_and_decode_past_it(mesh, tmp_path, name):
    """Every window is passed several times over, in the prompt of one row and in the continuation of the other."""
    raw = CONFIGS[name] | {"eos_token_id": None}
    model = moejax.load(write_checkpoint(tmp_path, raw), mesh=mesh("ep=1,tp=1"))
    prompts = [[5, 6, 7], list(range(10, 41))]
    outs = moejax.generate(model, prompts, max_new_tokens=33)
    whole = [prompt + out.tokens for prompt, out in zip(prompts, outs, strict=True)]
    best = best_tokens(model, whole, 64)
    assert [row[len(prompt) - 1 : -1] for row, prompt in zip(best, prompts, strict=True)] == tokens(outs)

    engine = Engine(model, 2, Draw(None, 1.0, False), 0)
    rows = np.zeros((2, 31), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    engine.start(rows, np.array([3, 31]), 0, 31 + 33 - 1)
    caches = engine._step.caches
    places = [layer.mixer.window or model.config.context for layer in model.config.layers]
    assert [cache.k.shape[2] for cache in caches] == places
    assert all(cache.k.shape == cache.v.shape for cache in caches)
    # A step consumes the caches: they are updated in place, not copied.
    new, _, _ = engine.step(np.array([32, 32], np.int32))
    assert new.tolist() == [[out.tokens[1] for out in outs]]
    assert all(cache.k.is_deleted() and cache.v.is_deleted() for cache in caches)
    assert engine.compile_s == 0


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["ep=1,tp=1", "ep=2,tp=2"])
def test_a_prompt_of_several_query_blocks(mesh, tmp_path, spec):
    raw = CONFIGS["mixtral_plain"] | {"max_position_embeddings": 2048, "eos_token_id": None}
    model = moejax.load(write_checkpoint(tmp_path, raw), mesh=mesh(spec))
    prompts = [np.random.RandomState(0).randint(0, 96, 1500).tolist(), [3, 4]]
    outs = moejax.generate(model, prompts, max_new_tokens=8, logprobs=True)
    whole = [prompt + out.tokens for prompt, out in zip(prompts, outs, strict=True)]
    best = best_tokens(model, whole, 1508)
    assert [row[len(prompt) - 1 : -1] for row, prompt in zip(best, prompts, strict=True)] == tokens(outs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(mesh, folder, model, dtype):
    half = moejax.load(folder, mesh=mesh("ep=2,tp=2"), dtype=dtype)
    rows = np.random.RandomState(0).randint(0, 4096, (2, CONTEXT))
    assert relative(half(rows), model(rows)) <= 0.1
    outs = moejax.generate(half, PROMPTS, max_new_tokens=10, logprobs=True)
    assert [len(out.tokens) for out in outs] == [10, 10, 7]
    assert half.parameters()["embed"].dtype == dtype
