"""A training step: the loss is that of the logits, gradients on every mesh are one device's, steps lower the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from moe_cases import compiled, relative
from tiny import write_checkpoint
from tiny_configs import CONFIGS

import moejax
from moejax.language_model import role_of
from moejax.model import lay
from moejax.training.batch import NO_TARGET, Batch
from moejax.training.step import TrainState, next_token_loss, train_step

RAW = CONFIGS["mixtral_plain"]
B, S = 8, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), RAW)


def batch_of(model, lie) -> Batch:
    """Rows of two texts and some padding."""
    rng = np.random.default_rng(0)
    segments = np.repeat(np.repeat([[1, 2, 0]], B, 0), [5, 4, 3], 1)
    positions = np.tile([*range(5), *range(4), 0, 0, 0], (B, 1))
    tokens = rng.integers(0, RAW["vocab_size"], (B, S))
    following = np.roll(segments, -1, 1)
    following[:, -1] = 0
    targets = np.where((segments > 0) & (segments == following), np.roll(tokens, -1, 1), NO_TARGET)
    return Batch(*(model.put_rows(a.astype(np.int32), lie) for a in (tokens, targets, segments, positions)))


def value_and_gradients(folder, mesh):
    from flax import nnx

    model = moejax.load(folder, mesh=mesh)
    lie = lay(B, mesh, model.options)
    graph, state = model.split()
    run = jax.value_and_grad(lambda state, batch: next_token_loss(nnx.merge(graph, state), batch, lie))
    loss, gradients = compiled(run)(state, batch_of(model, lie))
    return loss, {role_of(path): leaf[...] for path, leaf in nnx.to_flat_state(gradients)}


def test_loss_is_that_of_the_logits(folder, mesh):
    model = moejax.load(folder, mesh=mesh("ep=1,tp=1"))
    batch = batch_of(model, lay(B, model.mesh, model.options))
    logits = model(batch.tokens, segment_ids=batch.segments)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.roll(batch.tokens, -1, 1)[..., None], -1)[..., 0]
    within = [*range(4), *range(5, 8)]  # places whose next token is of the same text
    assert relative(value_and_gradients(folder, model.mesh)[0], -chosen[:, np.array(within)].mean()) < 1e-6


@pytest.mark.parametrize("spec", ["ep=4,tp=2", pytest.param("ep=8,tp=1", marks=pytest.mark.slow)])
def test_gradients_are_those_of_one_device(spec, folder, mesh):
    want_loss, want = value_and_gradients(folder, mesh("ep=1,tp=1"))
    loss, gradients = value_and_gradients(folder, mesh(spec))
    assert relative(loss, want_loss) < 1e-6
    assert gradients.keys() == want.keys()
    for name, gradient in gradients.items():
        assert relative(gradient, want[name]) < 1e-4, name


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_steps_lower_the_loss(dtype, folder, mesh):
    """The master weights stay f32, where they lie; the state is consumed; all steps run the same program."""
    model = moejax.load(folder, mesh=mesh("ep=4,tp=2"))
    lie = lay(B, model.mesh, model.options)
    optimizer, batch = optax.adamw(1e-2), batch_of(model, lie)
    graph, _ = model.split()
    state = TrainState.of(model.decoder, optimizer)
    shardings = jax.tree.map(lambda p: p.sharding, state)
    losses, programs = [], train_step._cache_size()
    for _ in range(3):
        old, (state, loss) = state, train_step(graph, optimizer, lie, dtype, state, batch)
        losses.append(float(loss))
    assert losses[0] > losses[1] > losses[2]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert jax.tree.map(lambda p: p.sharding, state) == shardings
    assert train_step._cache_size() == programs + 1
