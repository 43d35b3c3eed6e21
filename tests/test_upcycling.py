"""Dense checkpoints that become mixtures: the same function, from the same tensors, and one that can be trained."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense_cases import CONFIGS, write_dense
from flax import nnx
from safetensors.numpy import load_file, save_file

import moejax
from moejax.checkpoint.huggingface import load_parameters
from moejax.checkpoint.safetensors import CheckpointFiles
from moejax.checkpoint.source import read_json
from moejax.config import ModelConfig
from moejax.errors import MoejaxError
from moejax.families import read_config, unknown_fields
from moejax.language_model import role_of
from moejax.loading import abstract_decoder
from moejax.model import Options, lay
from moejax.opening import checkpoint_plan
from moejax.training.batch import NO_TARGET, Batch
from moejax.training.gradients import StepSettings
from moejax.training.state import TrainState
from moejax.training.step import TrainStep
from moejax.upcycling.copying import upcycle
from moejax.upcycling.families import dense_family_of

TOKENS = np.random.RandomState(0).randint(0, 96, (2, 24)).astype(np.int32)
SPREAD = 0.3
EXPERT_NAMES = {
    "mlp.gate_proj": "block_sparse_moe.experts.{e}.w1",
    "mlp.up_proj": "block_sparse_moe.experts.{e}.w3",
    "mlp.down_proj": "block_sparse_moe.experts.{e}.w2",
}


def relative_error(a, b) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


def dense_logits(folder: Path) -> np.ndarray:
    """Of the dense model, by the package's own dense layers on one device."""
    raw, mesh = read_json(folder, "config.json"), moejax.make_mesh("ep=1,tp=1")
    config = dense_family_of(raw["model_type"]).to_config(raw)
    graph, abstract = abstract_decoder(config, mesh, jnp.float32)
    with CheckpointFiles.open(folder) as files:
        wanted = {role_of(path): leaf for path, leaf in abstract.items()}
        loaded = load_parameters(files, checkpoint_plan(config, mesh), wanted)
    state = nnx.from_flat_state([(path, nnx.Param(loaded[role_of(path)])) for path in abstract])
    segments = jnp.ones(TOKENS.shape, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1], dtype=jnp.int32), TOKENS.shape)
    lie = lay(2, mesh, Options())
    logits = jax.jit(lambda state: nnx.merge(graph, state)(jnp.asarray(TOKENS), segments, positions, lie).logits)
    return np.asarray(logits(state))


def as_dense(config: ModelConfig) -> ModelConfig:
    """A mixture's config with the MLP of one expert."""
    (moe,) = {layer.moe for layer in config.layers}
    layers = (replace(layer, moe=None, dense_intermediate_size=moe.intermediate_size) for layer in config.layers)
    return replace(config, layers=tuple(layers), activation=moe.activation)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_mixture_config_says_what_the_dense_one_does(name, tmp_path):
    source = write_dense(tmp_path / "dense", name)
    written = upcycle(source, tmp_path / "moe", experts=4, top_k=2)
    raw = read_json(tmp_path / "moe", "config.json")
    assert as_dense(read_config(raw)) == dense_family_of(CONFIGS[name]["model_type"]).to_config(CONFIGS[name])
    assert read_config(raw) == written.config
    assert {layer.moe.num_experts for layer in written.config.layers} == {4}
    assert {layer.moe.num_experts_per_tok for layer in written.config.layers} == {2}
    assert {layer.moe.router.renormalise for layer in written.config.layers} == {True}
    assert unknown_fields(raw) == []
    assert raw["architectures"] == ["Qwen3MoeForCausalLM" if "qwen3" in name else "MixtralForCausalLM"]
    tensors = load_file(tmp_path / "moe" / "model.safetensors")
    shapes = checkpoint_plan(written.config, moejax.make_mesh("ep=1,tp=1")).shapes
    assert {tensor: value.shape for tensor, value in tensors.items()} == shapes
    assert written.parameters == sum(value.size for value in tensors.values())
    assert written.bytes == sum(value.nbytes for value in tensors.values())


@pytest.mark.parametrize("name", ["llama_hub", "qwen3_windows"])
def test_without_noise_it_computes_what_the_dense_model_does(name, tmp_path):
    source = write_dense(tmp_path / "dense", name)
    upcycle(source, tmp_path / "moe", experts=6, top_k=3)
    model = moejax.load(tmp_path / "moe", mesh=moejax.make_mesh("ep=2,tp=1"))
    out = model(TOKENS, output_router_logits=True)
    assert relative_error(out.logits, dense_logits(source)) < 1e-5
    assert len(np.unique(np.asarray(out.routed_experts[0]))) == 6


def test_experts_are_the_mlp_and_every_tensor_keeps_its_dtype(tmp_path):
    source = write_dense(tmp_path / "dense", "mistral_full", dtype="bfloat16", shards=3)
    (source / "tokenizer.json").write_text('{"a": 1}')
    upcycle(source, tmp_path / "moe", experts=3, top_k=1, max_shard_bytes=20_000)
    old = {name: value for file in source.glob("*.safetensors") for name, value in load_file(file).items()}
    files = sorted((tmp_path / "moe").glob("*.safetensors"))
    new = {name: value for file in files for name, value in load_file(file).items()}
    assert len(files) > 1 and all(file.stat().st_size < 25_000 for file in files)
    for name, value in old.items():
        part = next((part for part in EXPERT_NAMES if part in name), None)
        names = [name] if part is None else [name.replace(part, EXPERT_NAMES[part].format(e=e)) for e in range(3)]
        for copy in names:
            assert new[copy].dtype == value.dtype and np.array_equal(new.pop(copy), value)
    assert sorted(new) == [f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)]
    assert {(value.shape, value.dtype.name) for value in new.values()} == {((3, 32), "bfloat16")}
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "moe" / "tokenizer.json").read_text() == '{"a": 1}'
    assert (tmp_path / "moe" / "generation_config.json").exists()


def test_noise_and_routers_have_the_size_asked_for_and_follow_the_seed(tmp_path):
    source = write_dense(tmp_path / "dense", "llama_hub", dtype="bfloat16")
    folders = [tmp_path / name for name in ("first", "again", "other")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        upcycle(source, folder, experts=4, top_k=2, noise=SPREAD, seed=seed, dtype="float32")
    first, again, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == again != other
    old, new = load_file(source / "model.safetensors"), load_file(folders[0] / "model.safetensors")
    for old_part, new_part in EXPERT_NAMES.items():
        value = old[f"model.layers.1.{old_part}.weight"].astype(np.float32)
        copies = [new[f"model.layers.1.{new_part.format(e=e)}.weight"] for e in range(4)]
        noise = np.stack([copy - value for copy in copies]) / value.std()
        assert abs(noise.std() - SPREAD) < 0.1 * SPREAD and abs(noise.mean()) < 0.1 * SPREAD
        assert abs(np.corrcoef(noise.reshape(4, -1)) - np.eye(4)).max() < 0.1
    assert np.array_equal(new["model.norm.weight"], old["model.norm.weight"].astype(np.float32))
    routers = np.stack([new[f"model.layers.{layer}.block_sparse_moe.gate.weight"] for layer in range(2)])
    assert abs(routers.std() - 0.05) < 0.005
    assert read_json(folders[0], "config.json")["torch_dtype"] == "float32"


def batch_of(tokens: np.ndarray) -> Batch:
    targets = np.concatenate([tokens[:, 1:], np.full_like(tokens[:, :1], NO_TARGET)], 1)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Batch(*(jnp.asarray(a[None]) for a in (tokens, targets, np.ones_like(tokens), positions)))


def moved(before: dict, after: dict, role: str) -> float:
    """How far a parameter went in a step, at most."""
    return float(np.abs(after[role] - before[role]).max())


def test_it_trains_and_noise_lets_routers_learn_at_once(tmp_path):
    source = write_dense(tmp_path / "dense", "llama_bare")
    mesh, optimizer, shares = moejax.make_mesh("ep=1,tp=1"), optax.sgd(0.3), []
    config = upcycle(source, tmp_path / "moe0.0", experts=4, top_k=2).config
    upcycle(source, tmp_path / f"moe{SPREAD}", experts=4, top_k=2, noise=SPREAD)
    step = TrainStep(config, lay(2, mesh, Options()), optimizer, StepSettings())
    for noise in (0.0, SPREAD):
        model = moejax.load(tmp_path / f"moe{noise}", mesh=mesh)
        state = TrainState.of(model.parameters(), optimizer, mesh)
        losses, weights = [], []
        for _ in range(2):
            weights.append(jax.tree.map(np.array, state.params))
            state, metrics = step(state, batch_of(TOKENS))
            losses.append(float(metrics.loss))
        assert losses[1] < losses[0]
        shares.append(moved(*weights, "layers.0.moe.router") / moved(*weights, "layers.0.moe.down"))
    assert shares[0] < 1e-5 < 1e-2 < shares[1]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama_bare", {"attention_bias": True}, "attention_bias=true has no counterpart: attention has no biases in"),
        ("llama_bare", {"mlp_bias": True}, "mlp_bias=true is not supported"),
        ("llama_bare", {"sliding_window": 4}, "sliding_window=4 is not supported for llama"),
        ("llama_bare", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ("llama_bare", {"quantization_config": {"quant_method": "awq"}}, "quantization_config .* unquantised version"),
        ("mistral_window", {"layer_types": ["full_attention"] * 2}, "layer_types contradicts sliding_window=5"),
        ("qwen3_windows", {"max_window_layers": 1}, "max_window_layers=1 has no counterpart: all 2 layers have"),
        (
            "qwen3_windows",
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types=.* has no counterpart: all 2 layers have a window in qwen3_moe, or none",
        ),
        ("qwen3_bare", {"layer_types": ["sliding_attention"] * 2}, "layer_types=.* but there is no window"),
        (
            "llama_bare",
            {"model_type": "mixtral"},
            "'mixtral' cannot be upcycled; dense models of llama, mistral, qwen3",
        ),
        ("llama_bare", {"model_type": None}, "model_type=None cannot be upcycled"),
        ("llama_bare", {"num_hidden_layers": 1}, "9 unknown .*more layers or experts than config.json says"),
    ],
)
def test_what_a_mixture_cannot_express_is_refused(name, changes, message, tmp_path):
    source = write_dense(tmp_path / "dense", name, **changes)
    with pytest.raises(MoejaxError, match=message):
        upcycle(source, tmp_path / "moe", experts=4, top_k=2)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 2, "top_k": 3}, "num_experts_per_tok=3 is more than num_experts=2"),
        ({"experts": 0, "top_k": 1}, "num_local_experts=0 must be"),
        ({"experts": 2, "top_k": 1, "noise": -0.1}, "noise=-0.1 must be at least 0"),
        ({"experts": 2, "top_k": 1, "noise": float("nan")}, "noise=nan must be at least 0"),
        ({"experts": 2, "top_k": 1, "seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options, message, tmp_path):
    source = write_dense(tmp_path / "dense", "llama_bare")
    with pytest.raises(MoejaxError, match=message):
        upcycle(source, tmp_path / "moe", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_value_beyond_float16_leaves_nothing_behind(tmp_path):
    source = write_dense(tmp_path / "dense", "llama_bare")
    with pytest.raises(MoejaxError, match="exists already"):
        upcycle(source, source, experts=2, top_k=1)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(MoejaxError, match=r"layers.1.mlp.up_proj.weight has values beyond float16's range"):
        upcycle(source, tmp_path / "moe", experts=2, top_k=1, dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_untied_weights_win_over_a_config_that_ties_them(tmp_path):
    """As transformers decides it: see `settle_tied_head`."""
    source = write_dense(tmp_path / "dense", "llama_bare", tie_word_embeddings=True)
    upcycle(source, tmp_path / "moe", experts=2, top_k=1)
    assert read_json(tmp_path / "moe", "config.json")["tie_word_embeddings"] is False
