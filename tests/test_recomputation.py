"""Rows that outgrow a length from which all of their keys are turned otherwise: they are run anew."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import moejax
from moejax.families import read_config
from moejax.language_model import LanguageModel
from moejax.model import Decoder, Options

RAW = {
    "model_type": "phimoe",
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "sliding_window": 9,
    "max_position_embeddings": 64,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 2.0],
        "long_factor": [1.0, 2.0],
        "short_mscale": 1.0,
        "long_mscale": 4.0,
        "original_max_position_embeddings": 12,
    },
}
PROMPTS = [[7], [5, 3, 80, 9, 41, 2, 77], list(range(12)), list(range(20, 33))]


@pytest.fixture(scope="module")
def model(mesh):
    config, place = read_config(RAW), mesh("ep=1,tp=1")
    decoder = Decoder(config, mesh=place, rngs=nnx.Rngs(0))
    decoder.embed[...] = decoder.embed[...] * 8
    return LanguageModel(config, decoder, place, Options(), Path(), RAW, {}, None)


def test_tokens_are_those_of_runs_over_whole_sequences(model):
    outputs = moejax.generate(model, PROMPTS, max_new_tokens=20, temperature=0.0, eos_ids=[])
    texts = [prompt + output.tokens for prompt, output in zip(PROMPTS, outputs, strict=True)]
    padded = np.zeros((len(texts), 33), np.int32)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    for step in range(20):
        mask = np.arange(33) < (lengths + step)[:, None]
        logits = np.asarray(model(padded, attention_mask=mask))
        best = logits[np.arange(len(texts)), lengths + step - 1].argmax(-1)
        assert best.tolist() == [output.tokens[step] for output in outputs]
    assert len({token for output in outputs for token in output.tokens}) > 5


@pytest.mark.slow
def test_without_it_they_differ(model):
    """So the test above would see a cache that is kept."""
    (rope,) = model.config.ropes
    layers = tuple(
        replace(layer, mixer=replace(layer.mixer, rope=replace(rope, recomputes=False)))
        for layer in model.config.layers
    )
    kept = replace(model.config, layers=layers)
    decoder = Decoder(kept, mesh=model.mesh, rngs=nnx.Rngs(0))
    decoder.embed[...] = decoder.embed[...] * 8
    other = replace(model, config=kept, decoder=decoder, programs={})
    settings = {"max_new_tokens": 20, "temperature": 0.0, "eos_ids": [], "logprobs": True}
    (new,), (old,) = (moejax.generate(m, PROMPTS[:1], **settings) for m in (model, other))
    assert new.logprobs[:12] == pytest.approx(old.logprobs[:12], abs=1e-5)
    assert abs(new.logprobs[12] - old.logprobs[12]) > 1e-4
