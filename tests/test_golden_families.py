"""The first tiny model of each newer family against what transformers computed: see `golden/make_families.py`.

A family costs what it compiles, so each is loaded once, on the mesh that fits worst, and runs one forward pass (with
and without padding, the same program) and one generation. The quick suite generates where the past is kept or read in a
way that no family before has; the others' forward passes say the same of them.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from tiny import CONFIGS as FORMER
from tiny_families import CONFIGS, FIRST, gives_probabilities
from where import fitting

import moejax
from moejax.families import read_config
from moejax.model import Forward
from moejax.twins.writing import write_checkpoint

FOLDER = Path(__file__).parent / "golden" / "families"
PROMPTS = (1, 9, 23)
PADDING, SHOWN = 9, (9, 12, 20, 27)
# What decides how a mixer keeps and reads the past.
SWITCHES = ("window", "chunk", "sinks", "gate", "keys_are_values", "temperature")


class Case(NamedTuple):
    name: str
    golden: dict[str, np.ndarray]
    model: Any
    output: Forward


def load_golden(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key].astype(np.int32) if file[key].dtype == np.int16 else file[key] for key in file.files}


def without_end(raw: dict[str, Any]) -> dict[str, Any]:
    """The config without end-of-sequence tokens, so that all new tokens come."""
    inner = {"text_config": without_end(raw["text_config"])} if "text_config" in raw else {}
    return {**raw, "eos_token_id": None, **inner}


@pytest.fixture(scope="module", params=FIRST)
def case(request, tmp_path_factory) -> Case:
    name = request.param
    golden = load_golden(name)
    folder = tmp_path_factory.mktemp(name)
    write_checkpoint(folder, without_end(CONFIGS[name]), seed=int(golden["seed"]))
    model = moejax.load(folder, mesh=moejax.make_mesh(fitting("ep=4,tp=2")), dtype="float32")
    output = model(golden["tokens"], output_router_logits=True, output_hidden_states=True)
    return Case(name, golden, model, output)


def ways_of_keeping(raw: dict[str, Any]) -> set[tuple]:
    config = read_config(raw)
    mixers, recomputes = [layer.mixer for layer in config.layers], config.recomputed_after is not None
    return {(type(m), recomputes, *(bool(getattr(m, switch, None)) for switch in SWITCHES)) for m in mixers}


def with_new_ways() -> list[str]:
    """The first configs that keep the past in a way that those before them, and the former families, do not."""
    seen = set().union(*map(ways_of_keeping, FORMER.values()))
    chosen = []
    for name in FIRST:
        ways = ways_of_keeping(CONFIGS[name])
        chosen += [name] * (not ways <= seen)
        seen |= ways
    return chosen


def relative_error(actual, expected: np.ndarray) -> float:
    """max|a - b| / max|b| of two arrays of the same shape."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def test_every_family_has_a_golden():
    assert set(FIRST) == {path.stem for path in FOLDER.glob("*.npz")}


def test_logits(case):
    logits = np.asarray(case.output.logits)
    assert relative_error(np.concatenate([logits[0], logits[1, -4:]]), case.golden["logits"]) <= 1e-4


def test_hidden_states(case):
    expected = case.golden["hidden_states"]
    assert len(case.output.hidden_states) == len(expected)
    for layer, hidden in enumerate(case.output.hidden_states):
        assert relative_error(np.asarray(hidden)[0, ::4], expected[layer]) <= 1e-4, layer


def test_router_logits_and_routed_experts(case):
    sparse = len(case.output.router_logits)
    assert sparse == sum(key.startswith("router_logits") for key in case.golden)
    for index in range(sparse):
        logits = case.output.router_logits[index]
        if gives_probabilities(case.name):
            logits = jax.nn.softmax(logits)
        assert relative_error(logits, case.golden[f"router_logits_{index}"]) <= 1e-4, index
        chosen, expected = np.asarray(case.output.routed_experts[index]), case.golden[f"routed_experts_{index}"]
        np.testing.assert_array_equal(np.sort(chosen, axis=-1), np.sort(expected, axis=-1))


def test_left_padding(case):
    mask = np.ones_like(case.golden["tokens"])
    mask[1, :PADDING] = 0
    out = case.model(case.golden["tokens"], attention_mask=mask, output_router_logits=True, output_hidden_states=True)
    logits = np.asarray(out.logits)
    assert relative_error(np.concatenate([logits[0, -1:], logits[1, list(SHOWN)]]), case.golden["masked"]) <= 1e-4


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=() if name in with_new_ways() else pytest.mark.slow) for name in FIRST],
    indirect=True,
)
def test_48_greedy_tokens_of_a_ragged_batch(case):
    ends = np.cumsum(PROMPTS)[:-1]
    prompts = [prompt.tolist() for prompt in np.split(case.golden["prompts"], ends)]
    outs = moejax.generate(case.model, prompts, max_new_tokens=48, temperature=0.0)
    assert [list(out.tokens) for out in outs] == case.golden["greedy"].tolist()
