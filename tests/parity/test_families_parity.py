"""Every tiny model of the newer families against the transformers that is installed now, on the meshes that matter.

Needs the `parity` extra. `-m "parity and not slow"` only asks whether the goldens are still what transformers gives;
`-m "parity and slow"` runs everything. A family takes part by its module in `tiny_families`.
"""

import importlib
import json
import re
import warnings
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from test_golden_families import load_golden, relative_error, without_end
from tiny_families import CONFIGS, FIRST, gives_probabilities, skipped_masks

import moejax
from moejax.families import text_config
from moejax.twins.writing import write_checkpoint

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:::torch|transformers")]

MESHES = ("ep=1,tp=1", "ep=4,tp=2", "ep=2,tp=4")


@pytest.fixture(scope="session")
def make() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("golden.make_families")


@pytest.mark.parametrize("first", FIRST)
def test_goldens_are_what_the_installed_transformers_gives(make, first):
    golden = load_golden(first)
    now, _ = make.compute(first, int(golden["seed"]))
    assert set(golden) == set(now)
    for key, stored in golden.items():
        if stored.dtype == np.float32:
            assert relative_error(now[key], stored) <= 1e-5, key
        elif key.startswith("routed_experts"):
            assert np.array_equal(np.sort(now[key], axis=-1), np.sort(stored, axis=-1)), key
        else:
            assert np.array_equal(now[key], stored), key


@pytest.fixture(scope="module", params=CONFIGS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def now(make, name) -> dict[str, np.ndarray]:
    return make.settle(name)


@pytest.fixture(scope="module")
def reference(make, name, now):
    return make.reference(name, int(now["seed"]))


@pytest.fixture(scope="module")
def folder(name, now, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(name)
    return write_checkpoint(folder, without_end(CONFIGS[name]), int(now["seed"])).folder


@pytest.fixture(scope="module", params=MESHES, ids=lambda mesh: re.sub("[=,]", "", mesh))
def model(request, folder):
    jax.clear_caches()
    return moejax.load(folder, mesh=moejax.make_mesh(request.param), dtype="float32")


def of_both_rows(logits) -> np.ndarray:
    logits = np.asarray(logits)
    return np.concatenate([logits[0], logits[1, -4:]])


@pytest.mark.slow
def test_logits_hidden_states_and_routing(name, model, now):
    out = model(now["tokens"].astype(np.int32), output_router_logits=True, output_hidden_states=True)
    assert relative_error(of_both_rows(out.logits), now["logits"]) <= 1e-4
    for hidden, expected in zip(out.hidden_states, now["hidden_states"], strict=True):
        assert relative_error(np.asarray(hidden)[0, ::4], expected) <= 1e-4
    assert len(out.router_logits) == sum(key.startswith("router_logits") for key in now)
    for index, logits in enumerate(out.router_logits):
        logits = jax.nn.softmax(logits) if gives_probabilities(name) else logits
        assert relative_error(logits, now[f"router_logits_{index}"]) <= 1e-4
        chosen = np.sort(np.asarray(out.routed_experts[index]), axis=-1)
        assert np.array_equal(chosen, np.sort(now[f"routed_experts_{index}"], axis=-1))


@pytest.mark.slow
def test_attention_masks(make, name, model, reference, now):
    parts = importlib.import_module("golden.make")
    tokens = now["tokens"][:, :12]
    for variant, (mask, with_positions) in parts.mask_variants().items():
        if variant in skipped_masks(name):
            continue
        positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
        theirs = {"attention_mask": mask} | ({"position_ids": positions} if with_positions else {})
        ours = {"positions": positions.astype(np.int32)} if with_positions else {}
        expected = parts.forward(reference, tokens, **theirs).logits.numpy()
        logits = np.asarray(model(tokens.astype(np.int32), attention_mask=mask.astype(np.int32), **ours))
        assert relative_error(logits[mask == 1], expected[mask == 1]) <= 1e-4, variant


@pytest.mark.slow
def test_greedy_tokens_ragged_and_alone(make, model, now):
    prompts = [part.tolist() for part in np.split(now["prompts"], np.cumsum(make.PROMPT_LENGTHS)[:-1])]
    outs = moejax.generate(model, prompts, max_new_tokens=make.NEW_TOKENS, temperature=0.0)
    assert [list(out.tokens) for out in outs] == now["greedy"].tolist()
    if model.mesh.size > 1:
        return  # alone is a matter of the batch, and costs a program for each prompt
    for prompt, expected in zip(prompts, now["greedy"].tolist(), strict=True):
        (alone,) = moejax.generate(model, [prompt], max_new_tokens=make.NEW_TOKENS, temperature=0.0)
        assert list(alone.tokens) == expected


@pytest.mark.slow
def test_save_pretrained_loads_in_transformers_to_the_same_logits(make, name, model, now, tmp_path):
    """Loading raises where a tensor is missing or unknown to transformers."""
    moejax.save_pretrained(model, tmp_path)
    parts = importlib.import_module("golden.make")
    logits = parts.forward(parts.load_reference(tmp_path), now["tokens"]).logits
    assert relative_error(of_both_rows(logits), now["logits"]) <= 1e-5
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == text_config(CONFIGS[name])["model_type"]


@pytest.mark.slow
def test_transformers_own_files_load(reference, now, tmp_path):
    """The other direction, and the other spelling: transformers 5 writes rope_parameters and dtype."""
    reference.save_pretrained(tmp_path)
    assert "dtype" in json.loads((tmp_path / "config.json").read_text())
    model = moejax.load(tmp_path, mesh=moejax.make_mesh("ep=2,tp=2"), dtype="float32")
    assert relative_error(of_both_rows(model(now["tokens"].astype(np.int32))), now["logits"]) <= 1e-4
