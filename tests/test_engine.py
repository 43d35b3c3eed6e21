"""How generation is cut into programs and dispatches: none of it may show in what comes out."""

import re
import time
from dataclasses import replace
from math import prod
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import CONFIGS

import moejax
from moejax.families import read_config
from moejax.inference import engine as module
from moejax.inference.engine import Engine, cache_bucket, chunk_size
from moejax.inference.generate import Timing
from moejax.inference.steps import Draw, decode
from moejax.language_model import LanguageModel
from moejax.model import Decoder, Options

RAW = CONFIGS["mixtral_plain"] | {"num_hidden_layers": 1, "eos_token_id": None}
PROMPTS = [[7, 30, 12, 5], [40], [9, 8, 7, 6, 5, 4, 3, 2, 1]]
GREEDY = Draw(None, 1.0, False)


def random_model(mesh: jax.sharding.Mesh, raw: dict) -> LanguageModel:
    config = read_config(raw)
    decoder = Decoder(config, mesh=mesh, rngs=nnx.Rngs(0))
    return LanguageModel(config, decoder, mesh, Options(), Path(), raw, {}, None)


@pytest.fixture(scope="module")
def model(mesh) -> LanguageModel:
    return random_model(mesh("ep=1,tp=1"), RAW)


@pytest.mark.parametrize(
    ("longest", "rows", "size"),
    [
        (1, 1, 16),
        (16, 1, 16),
        (17, 1, 32),
        (500, 1, 512),
        (9000, 1, 512),
        (9000, 8, 512),
        (9000, 9, 256),
        (300, 64, 64),
    ],
)
def test_chunks_are_powers_of_two_within_the_bound(longest, rows, size):
    assert chunk_size(longest, rows, "cpu") == size
    assert chunk_size(9000, 10_000, "cpu") == module.LEAST_CHUNK


def test_a_gpu_runs_more_at_once():
    assert [chunk_size(9000, rows, "gpu") for rows in (1, 8, 64)] == [2048, 2048, 256]


def test_caches_come_in_few_sizes_and_waste_little():
    sizes = [cache_bucket(length) for length in range(1, 8193)]
    assert all(size >= length for length, size in enumerate(sizes, 1))
    assert all(size <= max(128, 1.25 * length) or size - length < 128 for length, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 20


def test_new_lengths_compile_nothing_new(mesh):
    fresh = random_model(mesh("ep=1,tp=1"), RAW)
    for length in (*range(1, 33), 50, 64, 77, 100, 127, 128):
        (out,) = moejax.generate(fresh, [[5] * length], max_new_tokens=4, eos_ids=[])
        assert len(out.tokens) == min(4, max(1, 128 - length))
    # The caches, a step, and the four widths of chunks up to 128 tokens.
    assert sum(map(len, fresh.programs.values())) == 6


def test_new_values_of_sampling_compile_nothing_new(mesh):
    fresh = random_model(mesh("ep=1,tp=1"), RAW)

    def programs(**options: float) -> int:
        moejax.generate(fresh, PROMPTS, max_new_tokens=4, eos_ids=[], **options)
        return sum(map(len, fresh.programs.values()))

    greedy = programs()
    assert greedy == 3  # the caches, a chunk, a step
    sampling = programs(temperature=0.7)
    assert sampling == greedy + 2
    others = ({"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 10**6, "top_p": 0.3, "min_p": 0.2, "seed": 5})
    assert [programs(temperature=temperature, **other) for temperature in (0.7, 1.3) for other in others] == [
        sampling
    ] * 8
    assert programs() == sampling
    penalised = programs(repetition_penalty=1.2)
    assert programs(repetition_penalty=0.8) == penalised > sampling


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.9, "top_k": 50, "repetition_penalty": 1.3, "seed": 3, "logprobs": True}]
)
def test_many_tokens_a_dispatch_are_those_of_one_a_dispatch(model, monkeypatch, options):
    monkeypatch.setattr(module, "STREAM_S", 1e9)
    whole = moejax.generate(model, PROMPTS, max_new_tokens=60, eos_ids=[], **options)
    # Ends of rows in the midst of a block, after the first token and after several, and one at the block's end.
    ends = [whole[0].tokens[1], whole[1].tokens[18]]
    timing = Timing()
    blocks = moejax.generate(model, PROMPTS, max_new_tokens=60, eos_ids=ends, timing=timing, **options)
    monkeypatch.setattr(module, "BLOCK", 1)
    alone = Timing()
    assert moejax.generate(model, PROMPTS, max_new_tokens=60, eos_ids=ends, timing=alone, **options) == blocks
    assert (timing.steps, timing.later_tokens) == (alone.steps, alone.later_tokens)
    for out, full in zip(blocks, whole, strict=True):
        first = min((full.tokens.index(end) for end in ends if end in full.tokens), default=59)
        assert out.tokens == full.tokens[: first + 1]


def test_dispatches_grow_as_long_as_a_stream_looks_alive(model, monkeypatch):
    monkeypatch.setattr(module, "STREAM_S", 1e9)
    engine = Engine(model, 1, GREEDY, 0)

    def taken(lefts: list[int], **bound: int) -> list[int]:
        engine.start(np.array([[1, 2]], np.int32), np.array([2]), 0, 100)
        return [len(engine.step(np.array([left], np.int32), **bound)[0]) for left in lefts]

    assert taken([90, 89, 87, 83, 75, 59, 27]) == [1, 2, 4, 8, 16, 32, 27]
    assert taken([60, 59, 57, 3]) == [1, 2, 4, 3]
    assert taken([60, 59, 57], most=2) == [1, 2, 2]
    monkeypatch.setattr(module, "STREAM_S", 0.0)
    assert taken([60, 59, 58]) == [1, 1, 1]


COPY = re.compile(r"= \w+\[([\d,]*)\]\S* copy\(")


def local_sizes(tree) -> list[int]:
    """Elements of one device's part of each array."""
    return [leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(("spec", "batch"), [("ep=1,tp=1", 1), pytest.param("ep=4,tp=2", 4, marks=pytest.mark.slow)])
def test_a_decoding_program_copies_neither_weights_nor_caches(mesh, spec, batch):
    """The loop over its steps reads weights where they lie and writes tokens into the caches that it was given."""
    raw = CONFIGS["qwen2_mixed"] | {"hidden_size": 48, "num_hidden_layers": 2, "sliding_window": 2048}
    kinds = ["full_attention", "sliding_attention"]
    model = random_model(mesh(spec), raw | {"layer_types": kinds, "max_position_embeddings": 4096})
    engine = Engine(model, batch, GREEDY, 0)
    engine.start(np.ones((batch, 4), np.int32), np.full(batch, 4), 0, 4000)
    caches = local_sizes(engine._step.caches)
    engine.step(np.ones(batch, np.int32))
    (programs,) = model.programs.values()
    (program,) = (compiled for (function, *_), compiled in programs.items() if function is decode)
    assert program.memory_analysis().alias_size_in_bytes >= 4 * sum(caches)
    copies = [prod(int(n) for n in dims.split(",") if n) for dims in COPY.findall(program.as_text())]
    assert copies, "the pattern finds none at all"
    # At most a block of keys is; what is as large as a weight, and no vector, is none.
    assert max(copies) < min(caches)
    weights = [size for size in local_sizes(engine._state) if size > 4 * 48]
    assert not set(copies) & set(weights)


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "batch"), [("ep=1,tp=1", 1), ("ep=4,tp=2", 8)])
def test_a_step_of_48_layers_compiles_within_a_minute(mesh, spec, batch):
    """In seconds of processor time, which other programs on the machine do not lengthen much."""
    raw = CONFIGS["qwen3_bias"] | {"num_hidden_layers": 48, "num_experts": 128, "num_experts_per_tok": 8}
    model = random_model(mesh(spec), raw | {"use_sliding_window": False, "mlp_only_layers": []})
    engine = Engine(model, batch, GREEDY, 0)
    engine.start(np.ones((batch, 4), np.int32), np.full(batch, 4), 0, 100)
    began = time.process_time()
    engine.step(np.ones(batch, np.int32))
    assert time.process_time() - began < 60


def test_a_capacity_factor_and_a_stop_string_keep_to_single_steps(model):
    rows = replace(model, options=Options(capacity_factor=1.0))
    assert module.BLOCK > 1
    from moejax.inference.generate import _most_steps, _Row
    from moejax.inference.generation_config import SamplingParams

    def row(stop: tuple[str, ...]) -> _Row:
        return _Row([1], 5, SamplingParams(stop=stop), None)

    assert _most_steps(rows, [row(("a",))]) == 1
    assert _most_steps(rows, [row(())]) == _most_steps(model, [row(("a",))]) == module.BLOCK
