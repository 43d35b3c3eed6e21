"""What a model has to do, counted: against published sizes and by hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moejax.benchmarks.work import Work, expert_values
from moejax.families import read_config

MODELS = Path(__file__).parents[1] / "configs" / "models"

# Billions of parameters that one token meets, embedding and head included, as the publishers state them
# (GPT-OSS without its embedding).
ACTIVE = {"mixtral-8x7b": 12.9, "qwen3-30b-a3b": 3.3, "olmoe-1b-7b": 1.3, "gpt-oss-20b": 3.6 + 0.58}


def work(name: str, dtype: str = "auto", **changes) -> Work:
    raw = json.loads((MODELS / name / "config.json").read_text())
    return Work.of(read_config(raw | changes), dtype)


@pytest.mark.parametrize("name", ACTIVE)
def test_a_token_meets_as_many_parameters_as_published(name):
    counted = work(name)
    config = counted.config
    routed = sum(expert_values(layer.moe) for layer in config.layers if layer.moe)
    ends = 2 * config.vocab_size * config.hidden_size
    assert (counted.matrices + routed + ends) / 1e9 == pytest.approx(ACTIVE[name], rel=0.02)


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2)])
def test_a_decode_step_of_olmoe_reads_its_weights_once(dtype, item):
    counted = work("olmoe-4l", dtype)
    attention, router, norms = 4 * 1024**2, 1024 * 64, 4 * 1024
    experts, head, last_norm = 8 * 3 * 1024**2, 32_000 * 1024, 1024
    once = 4 * (attention + router + norms + experts) + head + last_norm
    assert counted.decode_bytes(counted.expected_experts(1)) == item * once
    more = counted.decode_bytes((10, 8, 8, 8)) - counted.decode_bytes((8, 8, 8, 8))
    assert more == item * 2 * 3 * 1024**2


def test_a_tied_embedding_is_read_as_the_head():
    apart, tied = work("olmoe-4l"), work("olmoe-4l", tie_word_embeddings=True)
    assert apart.other_bytes == tied.other_bytes
    assert apart.matrices == tied.matrices


def test_expected_experts_are_those_of_uniform_routing():
    counted = work("olmoe-4l")
    rng = np.random.default_rng(0)
    draws = [len({e for _ in range(8) for e in rng.choice(64, 8, replace=False)}) for _ in range(2000)]
    assert counted.expected_experts(1) == pytest.approx((8.0,) * 4)
    assert counted.expected_experts(8)[0] == pytest.approx(np.mean(draws), rel=0.01)


def causal(tokens: int, window: int | None = None, chunk: int | None = None) -> int:
    """Keys that all tokens see together, one at a time."""
    seen = 0
    for query in range(tokens):
        first = 0 if window is None else max(0, query - window + 1)
        first = first if chunk is None else max(first, query // chunk * chunk)
        seen += query - first + 1
    return seen


def test_a_prompt_costs_its_active_matrices_its_attention_and_one_row_of_the_head():
    counted = work("mixtral-4l", sliding_window=100)
    active = 4 * (1024 * 1024 * 2 + 1024 * 512 * 2 + 1024 * 8 + 2 * 3 * 1024 * 3584)
    for tokens in (1, 64, 300):
        attention = 4 * 4 * 16 * 64 * causal(tokens, window=100)
        assert counted.prefill_flops(tokens) == 2 * active * tokens + attention + 2 * 32_000 * 1024


def test_chunked_and_full_attention_count_the_keys_that_each_sees():
    raw = json.loads((MODELS / "llama-4-scout-17b-16e" / "config.json").read_text())
    text = raw["text_config"] | {"attention_chunk_size": 96}
    counted = Work.of(read_config(raw | {"text_config": text}))
    mixers = [layer.mixer for layer in counted.config.layers]
    assert {mixer.chunk for mixer in mixers} == {96, None}
    more = counted.prefill_flops(300) - counted.prefill_flops(299)
    matrices = 2 * (counted.matrices + sum(expert_values(layer.moe) for layer in counted.config.layers))
    keys = [causal(300, chunk=m.chunk) - causal(299, chunk=m.chunk) for m in mixers]
    assert more == matrices + sum(4 * m.num_heads * m.head_dim * k for m, k in zip(mixers, keys, strict=True))


def test_packed_experts_are_read_packed():
    config = read_config(json.loads((MODELS / "gpt-oss-20b" / "config.json").read_text()))
    layers = tuple(replace(layer, moe=replace(layer.moe, packed=True)) for layer in config.layers)
    values, biases = 3 * 2880 * 2880, 3 * 2880
    for dtype, item in (("bfloat16", 2), ("float32", 4)):
        counted = Work.of(replace(config, layers=layers), dtype)
        assert counted.expert_bytes == (values * 4.25 / 8 + biases * item,) * 24
