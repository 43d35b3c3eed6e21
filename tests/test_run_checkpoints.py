"""Checkpoints of a run: exact on the same mesh and on others, whole or refused, and only those that are to be kept."""

import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import write_checkpoint
from tiny_configs import CONFIGS

import moejax
from moejax.errors import MoejaxError
from moejax.run_checkpoints import sealing
from moejax.run_checkpoints.checkpoints import Checkpoints
from moejax.run_checkpoints.neutral import NeutralForm
from moejax.run_checkpoints.stored import StoredState

# 6 experts of width 19, 6 heads on 1 key/value head, vocabulary 131: no mesh divides them.
RAW = CONFIGS["qwen3_yarn"] | {"num_hidden_layers": 2}
DATA = {"epoch": 1, "rows": [3, 4]}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), RAW)


def scaled(leaf, factor, sharding):
    return jax.device_put(np.asarray(leaf) * np.asarray(factor, leaf.dtype), sharding)


def state_on(folder, mesh, optimizer=OPTIMIZER, cut=None):
    """The model's config and a state: its weights, moments that differ from them, and counters.

    `cut` names an axis of the mesh that cuts the first axis of q_norm, as a master weight may lie otherwise than the
    model takes it.
    """
    model = moejax.load(folder, mesh=mesh)
    params, everywhere = model.parameters(), NamedSharding(mesh, PartitionSpec())
    for role in params if cut else ():
        if role.endswith("q_norm"):
            params[role] = jax.device_put(params[role], NamedSharding(mesh, PartitionSpec(cut)))
    number = iter(range(2, 1000))

    def moment(path, leaf):
        role = getattr(path[-1], "key", None)
        return (
            scaled(params[role], next(number), params[role].sharding)
            if role in params
            else scaled(leaf + 7, 1, everywhere)
        )

    moments = jax.tree_util.tree_map_with_path(moment, optimizer.init(params))
    return model.config, {"params": params, "optimizer": moments, "step": jax.device_put(jnp.int32(5), everywhere)}


def like(state):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def saved(folder, mesh, tmp_path_factory):
    """A run's checkpoints: step 5, saved on ep=4,tp=2."""
    target = tmp_path_factory.mktemp("run") / "checkpoints"
    config, state = state_on(folder, mesh("ep=4,tp=2"), cut="ep")
    with Checkpoints(target) as checkpoints:
        checkpoints.save(5, state, config, mesh("ep=4,tp=2"), data_state=DATA)
    return target


@pytest.mark.parametrize("spec", ["ep=4,tp=2", "ep=2,tp=4", "ep=1,tp=1"])
def test_a_state_comes_back_to_the_bit_on_any_mesh(spec, saved, folder, mesh):
    config, want = state_on(folder, mesh(spec), cut="ep")
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.latest() == 5
        state, data = checkpoints.restore(5, like(want), config, mesh(spec))
    assert_same(state, want)
    assert data == DATA


def test_what_is_stored_is_of_no_mesh(saved, folder, mesh):
    _, alone = state_on(folder, mesh("ep=1,tp=1"))
    leaves, _ = jax.tree_util.tree_flatten_with_path(alone["optimizer"])
    stored = StoredState.open(saved / "5")
    assert {f"params.{role}": leaf.shape for role, leaf in alone["params"].items()}.items() <= {
        name: leaf.shape for name, leaf in stored.arrays.items()
    }.items()
    assert len(stored.arrays) == len(alone["params"]) + len(leaves) + 1
    assert stored.arrays["optimizer.1.0.mu.embed"].shape == (RAW["vocab_size"], RAW["hidden_size"])
    plain = ocp.PyTreeCheckpointer().restore(
        saved / "5" / "state", restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in stored.arrays}
    )
    for role, parameter in alone["params"].items():
        np.testing.assert_array_equal(plain[f"params.{role}"], parameter)


def test_a_form_that_is_neutral_already_costs_nothing(tmp_path, mesh):
    folder = write_checkpoint(tmp_path / "model", CONFIGS["mixtral_plain"])
    config, state = state_on(folder, mesh("ep=4,tp=2"))
    arrays = NeutralForm(config, mesh("ep=4,tp=2"), state).of(state)
    assert all(a is b for a, b in zip(arrays.values(), jax.tree.leaves(state), strict=True))


def test_experts_stay_cut_over_the_mesh_where_it_does_not_divide_them(folder, mesh):
    config, state = state_on(folder, mesh("ep=4,tp=2"))
    abstract = NeutralForm(config, mesh("ep=4,tp=2"), like(state)).abstract
    experts = abstract["params.layers.1.moe.gate_up"]
    assert experts.shape == (6, 36, 2, 19)
    assert experts.sharding.shard_shape(experts.shape) == (6, 9, 1, 19)


def test_the_state_may_be_consumed_while_it_is_written(folder, mesh, tmp_path):
    config, state = state_on(folder, mesh("ep=1,tp=1"))
    want, wanted = jax.tree.map(np.array, state), like(state)
    step = jax.jit(lambda state: jax.tree.map(lambda a: a + jnp.ones((), a.dtype), state), donate_argnums=0)
    with Checkpoints(tmp_path, keep_last=3) as checkpoints:
        for number in range(3):
            checkpoints.save(number, state, config, mesh("ep=1,tp=1"))
            state = step(state)
        for number in range(3):
            got, _ = checkpoints.restore(number, wanted, config, mesh("ep=1,tp=1"))
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_array_equal(a, b)
            want = jax.tree.map(lambda a: a + np.ones((), a.dtype), want)


def kept(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_the_newest_and_the_best_are_kept_also_after_a_restart(folder, mesh, tmp_path):
    one = mesh("ep=1,tp=1")
    config, state = state_on(folder, one)
    scores = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: float("nan"), 6: 4.0}
    for steps in ((1, 2, 3, 4), (5, 6)):
        with Checkpoints(tmp_path, keep_last=2, keep_best=2) as checkpoints:
            for step in steps:
                checkpoints.save(step, state, config, one, score=scores[step])
    assert kept(tmp_path) == [2, 4, 5, 6]
    assert json.loads((tmp_path / "2" / "metrics" / "metrics").read_text()) == {"score": 1.0}


def test_what_an_interrupted_save_left_is_no_checkpoint_and_goes(saved, tmp_path):
    target = shutil.copytree(saved, tmp_path / "run")
    shutil.copytree(saved / "5", target / "9.orbax-checkpoint-tmp")
    with Checkpoints(target) as checkpoints:
        assert checkpoints.latest() == 5
    assert [path.name for path in target.iterdir()] == ["5"]


def test_a_save_that_fails_is_told_and_leaves_the_one_before(folder, mesh, tmp_path, monkeypatch):
    one = mesh("ep=1,tp=1")
    config, state = state_on(folder, one)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, config, one)
    checkpoints.wait()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sealing, "seal", full)
    checkpoints.save(2, state, config, one)
    with pytest.raises(
        MoejaxError, match=f"cannot keep checkpoints in {tmp_path}: No space left on device; make room or name"
    ):
        checkpoints.close()
    assert kept(tmp_path) == [1]
    with Checkpoints(tmp_path) as again:
        assert again.latest() == 1
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_damaged_checkpoint_is_refused(saved, tmp_path):
    state = shutil.copytree(saved / "5", tmp_path / "5") / "state"
    files = [file for file in state.rglob("*") if file.is_file() and file.name != "commit_success.txt"]
    assert len(files) > 8
    for file in files:
        whole = file.read_bytes()
        flipped = bytes([whole[0] ^ 1]) + whole[1:]
        for damaged in (
            None,
            b"",
            whole[: len(whole) // 2],
            whole[:-1],
            *([flipped] if file.suffix != ".json" else []),
        ):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            with pytest.raises(MoejaxError, match=rf"{file} .+; remove {tmp_path}/5, and the checkpoint before it is"):
                StoredState.open(tmp_path / "5")
            file.write_bytes(whole)
    assert StoredState.open(tmp_path / "5").data == DATA


def test_a_checkpoint_of_another_model_or_optimizer_is_refused(saved, folder, mesh, tmp_path):
    one = mesh("ep=1,tp=1")
    config, state = state_on(folder, one, optax.sgd(1e-3, momentum=0.9))
    with Checkpoints(saved) as checkpoints:
        with pytest.raises(MoejaxError, match=r"missing \(optimizer.0.trace.embed, .*left over \(optimizer.1.0.count"):
            checkpoints.restore(5, like(state), config, one)
        with pytest.raises(MoejaxError, match=r"there is no checkpoint .*/6"):
            checkpoints.restore(6, like(state), config, one)
        wider = write_checkpoint(tmp_path / "model", RAW | {"vocab_size": 132})
        config, state = state_on(wider, one)
        with pytest.raises(MoejaxError, match=r"params.embed is float32 \[131, 36\] and should be float32 \[132, 36\]"):
            checkpoints.restore(5, like(state), config, one)
        state["params"] = {role: p.astype(jnp.bfloat16) for role, p in state["params"].items()}
        with pytest.raises(MoejaxError, match=r"should be bfloat16"):
            checkpoints.restore(5, like(state), config, one)


def test_mistakes_are_told(saved, folder, mesh, tmp_path):
    config, state = state_on(folder, mesh("ep=1,tp=1"))
    with pytest.raises(MoejaxError, match="keep_last=0 must be at least 1"):
        Checkpoints(tmp_path, keep_last=0)
    (tmp_path / "file").touch()
    with pytest.raises(MoejaxError, match=f"cannot keep checkpoints in {tmp_path}/file"):
        Checkpoints(tmp_path / "file")
    with Checkpoints(saved) as checkpoints, pytest.raises(MoejaxError, match=r"checkpoints/5 is there already"):
        checkpoints.save(5, state, config, mesh("ep=1,tp=1"))
