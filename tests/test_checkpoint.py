"""Loading onto meshes, saving from them, and the two inverse to each other."""

import itertools
import json
import os
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_oracle import abstract, expected_parameters, mesh_plan
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file
from tiny import CONFIGS, write_checkpoint

from moejax.checkpoint.huggingface import check, load_parameters, settle_tied_head
from moejax.checkpoint.pieces import Piece, extents, within, within_source
from moejax.checkpoint.safetensors import CheckpointFiles
from moejax.checkpoint.saving import save_checkpoint
from moejax.errors import MoejaxError
from moejax.families import FAMILIES, read_config

MESHES = [(1, 1), (4, 2), (2, 4), (1, 8)]


def make_mesh(ep: int, tp: int):
    return jax.make_mesh((ep, tp), ("ep", "tp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: ep * tp])


def read_all(folder: Path) -> dict[str, np.ndarray]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def load(folder: Path, config, mesh, dtype=None, progress=None):
    """Parameters, and what they should be in the checkpoint's own dtype."""
    expected = expected_parameters(read_all(folder), config, mesh)
    dtype = dtype or expected["norm.weight"].dtype
    plan = mesh_plan(config, mesh)
    with CheckpointFiles.open(folder) as files:
        check(plan, files, FAMILIES[config.model_type].ignored_tensors)
        return load_parameters(files, plan, abstract(expected, config, mesh, dtype), progress), expected


def assert_same(parameters, expected, dtype=None):
    assert parameters.keys() == expected.keys()
    for role, value in expected.items():
        wanted = value.astype(dtype or value.dtype)
        got = np.asarray(parameters[role])
        assert got.dtype == wanted.dtype and got.shape == wanted.shape, role
        assert got.tobytes() == wanted.tobytes(), role


@pytest.mark.parametrize("name", ["mixtral_dynamic", "qwen2_mixed", "qwen3_bias", "olmoe_clip"])
@pytest.mark.parametrize(("ep", "tp"), MESHES)
def test_round_trip_is_exact(tmp_path, name, ep, tp):
    folder = write_checkpoint(tmp_path / "read", CONFIGS[name], shards=3)
    config, mesh = read_config(CONFIGS[name]), make_mesh(ep, tp)
    parameters, expected = load(folder, config, mesh)
    assert_same(parameters, expected)
    raw = json.loads((folder / "config.json").read_text())
    save_checkpoint(parameters, mesh_plan(config, mesh), raw, [folder / "generation_config.json"], tmp_path / "written")
    original, written = read_all(folder), read_all(tmp_path / "written")
    assert written.keys() == original.keys()
    for tensor, value in original.items():
        assert written[tensor].dtype == value.dtype and written[tensor].shape == value.shape, tensor
        assert written[tensor].tobytes() == value.tobytes(), tensor
    assert sorted(file.name for file in (tmp_path / "written").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert json.loads((tmp_path / "written/config.json").read_text()) == raw


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_dtypes_are_cast_as_numpy_casts(tmp_path, stored, wanted):
    folder = write_checkpoint(tmp_path, CONFIGS["qwen3_llama3"], dtype=stored)
    parameters, expected = load(folder, read_config(CONFIGS["qwen3_llama3"]), make_mesh(2, 2), jnp.dtype(wanted))
    assert_same(parameters, expected, jnp.dtype(wanted))


def test_large_tensors_are_read_in_blocks(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, CONFIGS["qwen2_mixed"])
    monkeypatch.setattr("moejax.checkpoint.huggingface._BLOCK_BYTES", 300)
    parameters, expected = load(folder, read_config(CONFIGS["qwen2_mixed"]), make_mesh(2, 2), jnp.bfloat16)
    assert_same(parameters, expected, jnp.bfloat16)


def test_only_the_needed_bytes_are_read(tmp_path, monkeypatch):
    """Every distinct shard once: each tensor's bytes once a mesh, kv heads once a shard that needs them."""
    folder = write_checkpoint(tmp_path, CONFIGS["mixtral_plain"], dtype="bfloat16", shards=2)
    config, mesh = read_config(CONFIGS["mixtral_plain"]), make_mesh(4, 2)
    reads = []
    original = os.preadv

    def counting(descriptor, buffers, offset):
        count = original(descriptor, buffers, offset)
        reads.append((descriptor, range(offset, offset + count)))
        return count

    monkeypatch.setattr(os, "preadv", counting)
    load(folder, config, mesh)
    stored = sum(value.nbytes for value in read_all(folder).values())
    times = Counter((descriptor, byte) for descriptor, span in reads for byte in span)
    assert len(times) == stored and set(times.values()) == {1}


def test_a_region_is_read_without_its_surroundings(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, CONFIGS["mixtral_plain"])
    calls = []
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: calls.append(original(*args)) or calls[-1])
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    with CheckpointFiles.open(folder) as files:
        columns = files.read(name, (slice(2, 7), slice(10, 14)))
        assert calls == [16] * 5
        rows = files.read(name, (slice(2, 7), slice(0, 48)))
        assert calls[5:] == [5 * 48 * 4]
    whole = read_all(folder)[name]
    assert np.array_equal(columns, whole[2:7, 10:14]) and np.array_equal(rows, whole[2:7])


def test_short_reads_are_continued(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, CONFIGS["mixtral_plain"])
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: original(fd, [buffers[0][:100]], at))
    parameters, expected = load(folder, read_config(CONFIGS["mixtral_plain"]), make_mesh(1, 1))
    assert_same(parameters, expected)


def test_progress_counts_every_distinct_byte(tmp_path):
    folder = write_checkpoint(tmp_path, CONFIGS["qwen2_mixed"])
    calls = []
    _, expected = load(
        folder, read_config(CONFIGS["qwen2_mixed"]), make_mesh(2, 2), progress=lambda *done: calls.append(done)
    )
    total = sum(value.nbytes for value in expected.values())
    assert calls[-1] == (total, total)
    assert {of for _, of in calls} == {total}
    assert all(a < b for (a, _), (b, _) in itertools.pairwise(calls))


def test_donating_one_parameter_leaves_its_replicas_and_others_alone(tmp_path):
    """On CPU replicas share the memory that was read into; a program that overwrites its argument must not see that."""
    folder = write_checkpoint(tmp_path, CONFIGS["mixtral_plain"])
    parameters, expected = load(folder, read_config(CONFIGS["mixtral_plain"]), make_mesh(4, 2))
    replicas = [shard.data for shard in parameters["norm.weight"].addressable_shards]
    changed = jax.jit(lambda x: x + 1, donate_argnums=0)(replicas[0])
    assert np.array_equal(np.asarray(changed), expected["norm.weight"] + 1)
    assert all(np.array_equal(np.asarray(replica), expected["norm.weight"]) for replica in replicas[1:])


def test_links_into_a_hub_cache_are_followed(tmp_path):
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmoe_plain"], shards=2)
    snapshot, blobs = tmp_path / "snapshots/0123abcd", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / f"{number:064}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064}")
    parameters, expected = load(snapshot, read_config(CONFIGS["olmoe_plain"]), make_mesh(2, 2))
    assert_same(parameters, expected)


def test_saving_in_several_files(tmp_path):
    folder = write_checkpoint(tmp_path / "read", CONFIGS["qwen2_mixed"])
    config, mesh = read_config(CONFIGS["qwen2_mixed"]), make_mesh(2, 2)
    parameters, _ = load(folder, config, mesh)
    raw = json.loads((folder / "config.json").read_text())
    target = tmp_path / "deep/er/written"
    save_checkpoint(
        parameters,
        mesh_plan(config, mesh),
        raw,
        [],
        target,
        dict.fromkeys(parameters, "bfloat16"),
        max_shard_bytes=20_000,
    )
    files = sorted(target.glob("*.safetensors"))
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert [file.name for file in files] == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert all(sum(value.nbytes for value in load_file(file).values()) <= 20_000 for file in files)
    original, written = read_all(folder), read_all(target)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in written.values())
    for tensor, value in original.items():
        assert written[tensor].tobytes() == value.astype(ml_dtypes.bfloat16).tobytes(), tensor
    assert json.loads((target / "config.json").read_text()) == raw | {"torch_dtype": "bfloat16"}
    reloaded, expected = load(target, config, make_mesh(1, 1))
    assert_same(reloaded, expected)


def test_a_failed_save_leaves_nothing(tmp_path):
    folder = write_checkpoint(tmp_path / "read", CONFIGS["mixtral_plain"])
    config, mesh = read_config(CONFIGS["mixtral_plain"]), make_mesh(1, 1)
    parameters, _ = load(folder, config, mesh)
    with pytest.raises(MoejaxError, match=r"^cannot write .*/written: No such file or directory$"):
        save_checkpoint(parameters, mesh_plan(config, mesh), {}, [folder / "absent.json"], tmp_path / "written")
    assert [entry.name for entry in tmp_path.iterdir()] == ["read"]


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_beside_tied_embeddings(tmp_path, equal):
    """Equal: tied. Different: the config is wrong and each is used, as transformers does."""
    raw = CONFIGS["mixtral_dynamic"]
    folder = write_checkpoint(tmp_path / "read", raw | {"tie_word_embeddings": False})
    tensors = read_all(folder)
    if equal:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    rewrite(folder, tensors)
    config, names = read_config(raw), FAMILIES["mixtral"].names
    with CheckpointFiles.open(folder) as files:
        settled, files = settle_tied_head(config, names, files)
        assert settled.tie_word_embeddings is equal
        check(mesh_plan(settled, make_mesh(1, 1)), files)
        assert ("lm_head.weight" in files.tensors) is not equal


def test_empty_tensors_are_no_parameters(tmp_path):
    """Transformers writes shared experts of width 0 where a config has none of them."""
    raw = CONFIGS["mixtral_dynamic"]
    folder = write_checkpoint(tmp_path, raw)
    rewrite(folder, read_all(folder) | {"model.layers.0.nothing.weight": np.zeros((0, 4), np.float32)})
    with CheckpointFiles.open(folder) as files:
        check(mesh_plan(read_config(raw), make_mesh(1, 1)), files)


def test_tied_embeddings_of_which_only_the_head_is_stored(tmp_path):
    raw = CONFIGS["mixtral_dynamic"]
    folder = write_checkpoint(tmp_path, raw)
    tensors = read_all(folder)
    rewrite(folder, {("lm_head.weight" if "embed" in name else name): value for name, value in tensors.items()})
    config, mesh = read_config(raw), make_mesh(1, 1)
    expected = expected_parameters(tensors, config, mesh)
    with CheckpointFiles.open(folder) as files:
        settled, files = settle_tied_head(config, FAMILIES["mixtral"].names, files)
        plan = mesh_plan(settled, mesh)
        check(plan, files)
        assert_same(load_parameters(files, plan, abstract(expected, config, mesh, np.float32)), expected)


def rewrite(folder: Path, tensors) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_pieces_cut_by_parameter_and_by_tensor():
    piece = Piece((3, slice(0, 8), 1, slice(2, 6)), "t", (slice(10, 14), slice(0, 8)), transpose=True)
    assert within(piece, (slice(0, 3), slice(0, 8), slice(0, 2), slice(0, 9))) is None
    assert within(piece, (slice(2, 4), slice(4, 8), slice(0, 2), slice(3, 9))) == Piece(
        (1, slice(0, 4), 1, slice(0, 3)), "t", (slice(11, 14), slice(4, 8)), transpose=True
    )
    assert within_source(piece, (slice(12, 20), slice(0, 8))) == Piece(
        (3, slice(0, 8), 1, slice(4, 6)), "t", (slice(0, 2), slice(0, 8)), transpose=True
    )
    assert within_source(piece, (slice(14, 20), slice(0, 8))) is None
    assert extents(piece.box) == (1, 8, 1, 4)


def test_pieces_may_take_every_other_row():
    piece = Piece((0, slice(0, 5), 1), "t", (slice(2, 3), slice(1, 10, 2)))
    assert within(piece, (slice(0, 1), slice(2, 4), slice(1, 2))) == Piece(
        (0, slice(0, 2), 0), "t", (slice(2, 3), slice(5, 8, 2))
    )
    assert within_source(piece, (slice(2, 3), slice(4, 8))) == Piece(
        (0, slice(2, 4), 1), "t", (slice(0, 1), slice(1, 4, 2))
    )
    assert within_source(piece, (slice(2, 3), slice(4, 5))) is None
    assert extents(piece.source) == (1, 5)
