"""The tiny checkpoints against what transformers computed for them once: `golden/make.py` says what is in a file.

No golden holds a tie, in routing or in greedy choice, so routing and tokens are compared exactly.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tiny import CONFIGS, sparse_layers, write_checkpoint
from where import fitting

import moejax

FOLDER = Path(__file__).parent / "golden"
MASK_VARIANTS = ("right", "left", "left_positions", "hole")

# One mesh each, because compiling is what costs; the worst fits are chosen on purpose (6 experts on ep=4, 1 kv head on
# tp=4, batch 2 on ep=8).
MESHES = {
    "mixtral_plain": "ep=8,tp=1",
    "mixtral_dynamic": "ep=4,tp=2",
    "mixtral_llama3": "ep=2,tp=4",
    "qwen2_mixed": "ep=4,tp=2",
    "qwen2_sparse_step": "ep=1,tp=8",
    "qwen2_dynamic": "ep=3,tp=2",
    "qwen3_bias": "ep=2,tp=2",
    "qwen3_yarn": "ep=2,tp=4",
    "qwen3_llama3": "ep=1,tp=1",
    "olmoe_plain": "ep=3,tp=2",
    "olmoe_clip": "ep=1,tp=4",
    "olmoe_yarn": "ep=4,tp=2",
}
# Generation in the fast suite: the config of each family where most is switched on.
FAST_GENERATION = ("mixtral_dynamic", "qwen2_mixed", "qwen3_yarn", "olmoe_clip")


@dataclass(frozen=True)
class Case:
    name: str
    golden: dict[str, np.ndarray]
    model: object

    @property
    def prompts(self) -> list[list[int]]:
        ends = np.cumsum(self.golden["prompt_lengths"])
        return [prompt.tolist() for prompt in np.split(self.golden["prompts"], ends[:-1])]


def load_golden(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key].astype(np.int32) if file[key].dtype == np.int16 else file[key] for key in file.files}


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, tmp_path_factory) -> Case:
    name = request.param
    golden = load_golden(name)
    # Without end-of-sequence tokens all 64 tokens come.
    folder = write_checkpoint(
        tmp_path_factory.mktemp(name), CONFIGS[name] | {"eos_token_id": None}, seed=int(golden["seed"])
    )
    return Case(name, golden, moejax.load(str(folder), mesh=moejax.make_mesh(fitting(MESHES[name])), dtype="float32"))


@pytest.fixture(scope="module")
def output(case):
    return case.model(case.golden["tokens"], output_router_logits=True, output_hidden_states=True)


def relative_error(actual, expected: np.ndarray) -> float:
    """max|a - b| / max|b| of two arrays of the same shape."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def test_every_config_has_a_golden_and_a_mesh():
    assert set(CONFIGS) == set(MESHES) == {path.stem for path in FOLDER.glob("*.npz")}


def test_logits(case, output):
    logits = np.asarray(output.logits)
    assert logits.dtype == np.float32
    assert logits.shape == (2, 40, CONFIGS[case.name]["vocab_size"])
    assert relative_error(np.concatenate([logits[0], logits[1, -4:]]), case.golden["logits"]) <= 1e-4


def test_plain_call_returns_the_same_logits(case, output):
    assert relative_error(case.model(case.golden["tokens"]), np.asarray(output.logits)) <= 1e-6


def test_router_logits_and_routed_experts_have_one_entry_per_sparse_layer(case, output):
    layers = sparse_layers(CONFIGS[case.name])
    assert len(output.router_logits) == len(output.routed_experts) == len(layers)
    for layer in range(len(layers)):
        assert relative_error(output.router_logits[layer], case.golden["router_logits"][layer]) <= 1e-4
        chosen = np.asarray(output.routed_experts[layer])
        expected = case.golden["routed_experts"][layer]
        assert np.array_equal(np.sort(chosen, axis=-1), np.sort(expected, axis=-1))


def test_hidden_states_are_the_stream_before_and_after_each_layer_the_last_one_normed(case, output):
    expected = case.golden["hidden_states"]
    assert len(output.hidden_states) == len(expected)
    for layer, hidden in enumerate(output.hidden_states):
        assert relative_error(np.asarray(hidden)[0, ::4], expected[layer]) <= 1e-4


@pytest.mark.parametrize("variant", MASK_VARIANTS)
def test_attention_mask(case, variant):
    tokens = case.golden["mask_tokens"]
    mask, positions = np.ones_like(tokens), np.tile(np.arange(tokens.shape[1], dtype=np.int32), (2, 1))
    mask[1] = case.golden[f"mask_{variant}"]
    options = {"attention_mask": mask}
    if f"positions_{variant}" in case.golden:
        positions[1] = case.golden[f"positions_{variant}"]
        options["positions"] = positions
    logits = np.asarray(case.model(tokens, **options))
    compared = np.concatenate([logits[0, -1:], logits[1, mask[1] == 1]])
    assert relative_error(compared, case.golden[f"masked_{variant}"]) <= 1e-4


def generated(case: Case, prompts: list[list[int]]) -> list[list[int]]:
    return [list(out.tokens) for out in moejax.generate(case.model, prompts, max_new_tokens=64, temperature=0.0)]


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=() if name in FAST_GENERATION else pytest.mark.slow) for name in CONFIGS],
    indirect=True,
)
def test_64_greedy_tokens_of_a_ragged_batch(case):
    assert generated(case, case.prompts) == case.golden["greedy"].tolist()


@pytest.mark.slow
def test_64_greedy_tokens_of_each_prompt_alone(case):
    for prompt, expected in zip(case.prompts, case.golden["greedy"].tolist(), strict=True):
        assert generated(case, [prompt]) == [expected]
