"""`moejax.load` and `moejax.save_pretrained`: names, dtypes, meshes, and the way back to a folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import load_file
from tiny import CONFIGS, tensor_shapes, write_checkpoint

import moejax

RAW = CONFIGS["mixtral_plain"]
DEMO = Path(moejax.__file__).parent / "demo"
TOKENS = np.random.RandomState(0).randint(0, RAW["vocab_size"], (2, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), RAW)


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    """A bf16 checkpoint with everything beside the weights that a hub folder has."""
    folder = write_checkpoint(tmp_path_factory.mktemp("complete"), RAW, dtype="bfloat16", shards=2)
    (folder / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    (folder / "generation_config.json").write_text('{"do_sample": true, "eos_token_id": [2, 5]}')
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "README.md").write_text("not part of a model")
    return folder


def dtypes(model: moejax.LanguageModel) -> set[str]:
    return {parameter.dtype.name for parameter in model.parameters().values()}


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_dtype_auto_is_the_checkpoints(mesh, tmp_path, stored):
    folder = write_checkpoint(tmp_path, RAW, dtype=stored)
    assert dtypes(moejax.load(folder, mesh=mesh("ep=2,tp=2"))) == {stored}


@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_a_named_dtype_converts(mesh, folder, wanted):
    model = moejax.load(str(folder), mesh=mesh("ep=1,tp=1"), dtype=wanted)
    assert dtypes(model) == {wanted}
    stored = load_file(folder / "model.safetensors")["lm_head.weight"]
    held = np.asarray(model.parameters()["lm_head"])
    assert np.array_equal(held, stored.astype({"bfloat16": ml_dtypes.bfloat16}.get(wanted, wanted)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "dtype 'float64' is unknown; choose auto, float32, bfloat16, float16"),
        ({"strategy": "ring"}, "strategy 'ring' is unknown; choose one of auto, all_to_all, all_reduce"),
        ({"mesh": "ep=4,tp=2"}, "mesh='ep=4,tp=2' is no jax.sharding.Mesh; make one with moejax.make_mesh"),
    ],
)
def test_bad_arguments(folder, options: dict[str, Any], message: str):
    with pytest.raises(moejax.MoejaxError) as caught:
        moejax.load(folder, **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("axes", [("dp", "tp"), ("tp", "ep")])
def test_a_mesh_with_other_axes_is_refused(folder, axes: tuple[str, str]):
    with pytest.raises(moejax.MoejaxError) as caught:
        moejax.load(folder, mesh=jax.make_mesh((2, 2), axes, axis_types=(AxisType.Auto,) * 2))
    assert str(caught.value) == f'the mesh has axes {axes}; models run on ("ep", "tp"), see moejax.make_mesh'


def test_no_mesh_takes_all_devices_with_at_most_one_expert_a_device(folder, tmp_path):
    assert dict(moejax.load(folder).mesh.shape) == {"ep": 8, "tp": 1}
    few = write_checkpoint(tmp_path, RAW | {"num_local_experts": 6})
    assert dict(moejax.load(few).mesh.shape) == {"ep": 4, "tp": 2}


def test_the_mesh_is_kept_and_explicit_axes_are_taken_as_automatic(mesh, folder):
    wanted = mesh("ep=2,tp=2")
    assert moejax.load(folder, mesh=wanted).mesh == wanted
    explicit = jax.make_mesh((2, 2), ("ep", "tp"), axis_types=(AxisType.Explicit,) * 2)
    assert moejax.load(folder, mesh=explicit).mesh == wanted


def test_parameters_lie_where_the_mesh_says(mesh, folder):
    parameters = moejax.load(folder, mesh=mesh("ep=4,tp=2")).parameters()
    experts, head = parameters["layers.0.moe.gate_up"], parameters["lm_head"]
    assert experts.shape == (8, 32, 2, 48)
    assert {shard.data.shape for shard in experts.addressable_shards} == {(2, 32, 2, 24)}
    assert {shard.data.shape for shard in head.addressable_shards} == {(48, 32)}


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(mesh, tmp_path, tied):
    raw = RAW | {"tie_word_embeddings": tied}
    model = moejax.load(write_checkpoint(tmp_path / "in", raw), mesh=mesh("ep=2,tp=1"))
    assert ("lm_head" in model.parameters()) != tied
    moejax.save_pretrained(model, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(tensor_shapes(raw))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == tied


def test_progress_ends_at_the_total(mesh, folder):
    seen: list[tuple[int, int]] = []
    moejax.load(folder, mesh=mesh("ep=2,tp=2"), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_saved_model_gives_the_same_logits_on_another_mesh(mesh, folder, tmp_path):
    moejax.save_pretrained(moejax.load(folder, mesh=mesh("ep=3,tp=2")), tmp_path / "saved")
    original, saved = (moejax.load(path, mesh=mesh("ep=1,tp=1")) for path in (folder, tmp_path / "saved"))
    assert np.array_equal(np.asarray(saved(TOKENS)), np.asarray(original(TOKENS)))


def test_companions_are_copied_and_weights_keep_the_loaded_dtype(mesh, complete, tmp_path):
    moejax.save_pretrained(moejax.load(complete, mesh=mesh("ep=2,tp=2"), dtype="float16"), tmp_path / "saved")
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    companions = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    assert names == companions | {"config.json", "model.safetensors"}
    for name in companions:
        assert (tmp_path / "saved" / name).read_bytes() == (complete / name).read_bytes()
    assert {tensor.dtype.name for tensor in load_file(tmp_path / "saved" / "model.safetensors").values()} == {"float16"}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == "float16"
    again = moejax.load(tmp_path / "saved", mesh=mesh("ep=1,tp=1"))
    assert dtypes(again) == {"float16"}
    assert again.generation_config == {"do_sample": True, "eos_token_id": [2, 5]}
    assert again.tokenizer is not None


def test_saving_in_shards(mesh, folder, tmp_path):
    moejax.save_pretrained(moejax.load(folder, mesh=mesh("ep=2,tp=2")), tmp_path / "saved", max_shard_bytes=100_000)
    sizes = [file.stat().st_size for file in (tmp_path / "saved").glob("model-*.safetensors")]
    assert len(sizes) > 1
    assert (tmp_path / "saved" / "model.safetensors.index.json").is_file()
    assert max(sizes) < 110_000


@pytest.mark.parametrize("occupy", [lambda path: path.write_text(""), lambda path: (path / "sub").mkdir(parents=True)])
def test_an_occupied_path_is_refused_and_left_alone(mesh, folder, tmp_path, occupy: Callable[[Path], Any]):
    model = moejax.load(folder, mesh=mesh("ep=1,tp=1"))
    path = tmp_path / "there"
    occupy(path)
    with pytest.raises(moejax.MoejaxError, match=r"there exists already; save into a new or empty folder"):
        moejax.save_pretrained(model, path)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(moejax.MoejaxError, match=r"exists already"):
        moejax.save_pretrained(model, folder)
    moejax.save_pretrained(model, tmp_path / "new" / "below")
    assert (tmp_path / "new" / "below" / "config.json").is_file()


def test_the_demo_is_the_default(mesh):
    model = moejax.load(mesh=mesh("ep=4,tp=2"))
    assert (model.folder, model.config.model_type, model.config.context) == (DEMO, "qwen3_moe", 1024)
    assert dtypes(model) == {"bfloat16"}
    assert model.tokenizer is not None
    assert model.tokenizer.vocab_size <= model.config.vocab_size


@pytest.mark.slow
def test_the_demo_writes_text(mesh):
    model = moejax.load("demo", mesh=mesh("ep=4,tp=2"))
    (out,) = moejax.generate(model, ["Once upon a time"], max_new_tokens=16)
    assert out.finish_reason == "length"
    assert len(out.tokens) == 16
    assert len(out.text.split()) >= 5


def test_a_folder_without_a_tokenizer_loads(mesh, folder):
    assert moejax.load(folder, mesh=mesh("ep=1,tp=1")).tokenizer is None
