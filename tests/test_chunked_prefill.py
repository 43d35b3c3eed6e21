"""Prompts that run chunk by chunk leave what they leave in one piece, whatever way a layer keeps its past."""

from pathlib import Path

import numpy as np
import pytest
from moe_cases import relative
from tiny import CONFIGS as FORMER
from tiny_families import CONFIGS

import moejax
from moejax.inference import engine
from moejax.twins.writing import write_checkpoint

CHUNK = 8
# Rows that end in the first chunk, at the end of one, and past the length from which a dynamic rope grows.
LENGTHS = (3, 16, 61, 41)
CASES = [
    "deepseek_v2_lite",  # latents, and a rope that follows the row's length
    pytest.param("llama4_text_interleaved", marks=pytest.mark.slow),  # rings of chunks of 7
    pytest.param("qwen3_next_grouped", marks=pytest.mark.slow),  # a convolution and a recurrent state
    pytest.param("mixtral_dynamic", marks=pytest.mark.slow),  # rings of 7, and a rope that follows the length
    pytest.param("phimoe_longrope", marks=pytest.mark.slow),  # rings of 11, rows that are run anew past 16 tokens
    pytest.param("gpt_oss_defaults", marks=pytest.mark.slow),  # rings of 5 with sinks, and full attention
    pytest.param("gemma4_text_published", marks=pytest.mark.slow),  # keys that are values
    pytest.param("qwen2_mixed", marks=pytest.mark.slow),  # rings of 9
]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch):
    def use() -> None:
        monkeypatch.setattr(engine, "CHUNK", CHUNK)
        monkeypatch.setattr(engine, "LEAST_CHUNK", CHUNK)

    return use


def prompts_for(model: moejax.LanguageModel, lengths: tuple[int, ...]) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, model.config.vocab_size, length).tolist() for length in lengths]


def generated(model: moejax.LanguageModel, lengths: tuple[int, ...]) -> tuple[list[list[int]], np.ndarray]:
    settings = {"temperature": 0.0, "repetition_penalty": 1.3, "eos_ids": [], "logprobs": True}
    outs = moejax.generate(model, prompts_for(model, lengths), max_new_tokens=6, **settings)
    return [out.tokens for out in outs], np.array([out.logprobs for out in outs])


@pytest.mark.parametrize("name", CASES)
def test_a_ragged_batch_equals_one_chunk(mesh, tmp_path: Path, small_chunks, name: str):
    write_checkpoint(tmp_path, {**FORMER, **CONFIGS}[name], seed=1)
    model = moejax.load(tmp_path, mesh=mesh("ep=4,tp=2"), dtype="float32")
    tokens, logprobs = generated(model, LENGTHS)
    small_chunks()
    tokens_in_chunks, logprobs_in_chunks = generated(model, LENGTHS)
    assert tokens_in_chunks == tokens
    assert relative(logprobs_in_chunks, logprobs) <= (1e-4 if model.config.recurrent else 1e-5)
    # Beside the program for 64 tokens at once one more, whatever the number of chunks.
    assert sum(map(len, model.programs.values())) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_mixed", "qwen3_next_grouped"])
def test_a_single_row_equals_one_chunk(mesh, tmp_path: Path, small_chunks, name: str):
    """Replicated over ep, where every device holds some heads."""
    write_checkpoint(tmp_path, {**FORMER, **CONFIGS}[name], seed=1)
    model = moejax.load(tmp_path, mesh=mesh("ep=4,tp=2"), dtype="float32")
    tokens, logprobs = generated(model, (61,))
    small_chunks()
    tokens_in_chunks, logprobs_in_chunks = generated(model, (61,))
    assert tokens_in_chunks == tokens
    assert relative(logprobs_in_chunks, logprobs) <= (1e-4 if model.config.recurrent else 1e-5)
