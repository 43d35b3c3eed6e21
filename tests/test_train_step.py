"""A training step: the loss is that of the logits, every mesh learns as one device does, parts add up to one batch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from moe_cases import relative
from tiny import write_checkpoint
from tiny_configs import CONFIGS
from tiny_families import CONFIGS as FAMILIES

import moejax
from moejax.families import read_config
from moejax.model import Options, lay
from moejax.moe.losses import LossSettings
from moejax.training.batch import NO_TARGET, Batch
from moejax.training.gradients import StepSettings
from moejax.training.state import TrainState, random_parameters
from moejax.training.step import TrainStep

# Meshes pad its experts, hidden width, heads and vocabulary, and repeat key/value heads. Of one expert alone the
# renormalised weight is 1 whatever the router says: its gradient would be rounding, which Adam makes large.
RAW = CONFIGS["olmoe_clip"] | {"num_hidden_layers": 2, "num_experts_per_tok": 2}
B, S = 8, 12


def host_batch(raw=RAW, rows=B) -> Batch:
    """Rows of two texts and some padding."""
    rng = np.random.default_rng(0)
    segments = np.repeat(np.repeat([[1, 2, 0]], rows, 0), [5, 4, 3], 1)
    positions = np.tile([*range(5), *range(4), 0, 0, 0], (rows, 1))
    tokens = rng.integers(0, raw["vocab_size"], (rows, S))
    following = np.roll(segments, -1, 1)
    following[:, -1] = 0
    targets = np.where((segments > 0) & (segments == following), np.roll(tokens, -1, 1), NO_TARGET)
    return Batch(*(a.astype(np.int32) for a in (tokens, targets, segments, positions)))


class Run:
    """A few steps of one model on one mesh."""

    def __init__(self, mesh, raw=RAW, optimizer=None, parts=1, **settings):
        self.config, self.optimizer = read_config(raw), optimizer or optax.adamw(optax.linear_schedule(0, 1e-2, 4))
        batch = host_batch(raw)
        lie = lay(B // parts, mesh, Options())
        self.batch = jax.tree.map(lambda a: jnp.asarray(a.reshape(parts, -1, S)), batch)
        self.step = TrainStep(self.config, lie, self.optimizer, StepSettings(**settings))
        self.state = TrainState.of(random_parameters(self.config, mesh), self.optimizer, mesh)

    def take(self, count):
        metrics = []
        for _ in range(count):
            self.state, told = self.step(self.state, self.batch)
            metrics.append(jax.device_get(told))
        return metrics


LOSSES = LossSettings(balance="global", balance_weight=0.02, z_weight=1e-3, jitter=0.05)


@pytest.fixture(scope="module")
def alone(mesh):
    run = Run(mesh("ep=1,tp=1"), clip=1.0, losses=LOSSES)
    return run, run.take(3)


def test_loss_is_that_of_the_logits(mesh, tmp_path):
    raw = CONFIGS["mixtral_plain"]
    model = moejax.load(write_checkpoint(tmp_path, raw), mesh=mesh("ep=1,tp=1"))
    batch, optimizer = host_batch(raw), optax.sgd(0.0)
    logits = model(batch.tokens, segment_ids=batch.segments)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]
    step = TrainStep(model.config, lay(B, model.mesh, model.options), optimizer, StepSettings())
    state = TrainState.of(model.parameters(), optimizer, model.mesh)
    _, metrics = step(state, jax.tree.map(lambda a: jnp.asarray(a[None]), batch))
    assert metrics.targets == (batch.targets != NO_TARGET).sum() == B * (4 + 3)
    assert relative(metrics.loss, -chosen[batch.targets != NO_TARGET].mean()) < 1e-6
    assert metrics.tokens_per_expert.sum() == len(model.config.layers) * B * 9 * 2


@pytest.mark.parametrize(
    "spec", ["ep=2,tp=4", *(pytest.param(spec, marks=pytest.mark.slow) for spec in ("ep=4,tp=2", "ep=8,tp=1"))]
)
def test_every_mesh_learns_as_one_device(spec, alone, mesh):
    """Loss, norm and routing of three steps, and their gradients as Adam's mean has them, in copies and padding too."""
    there = Run(mesh(spec), clip=1.0, losses=LOSSES)
    here, want = alone
    for a, b in zip(there.take(3), want, strict=True):
        assert relative(a.loss, b.loss) < 1e-6
        assert relative(a.grad_norm, b.grad_norm) < 1e-5
        np.testing.assert_array_equal(a.tokens_per_expert, b.tokens_per_expert)
        assert relative(a.router_entropy, b.router_entropy) < 1e-4
        assert relative(a.balance_loss, b.balance_loss) < 1e-5
        assert relative(a.z_loss, b.z_loss) < 1e-5
        assert a.finite and a.bad_layer == -1
    # Not the weights: Adam divides by a gradient's own size, so that where one is rounding, the weights differ by it.
    forms, moments = there.step._forms, there.state.optimizer[0].mu
    for role, value in here.state.optimizer[0].mu.items():
        assert relative(moments[role], forms[role].expand(value)) < 1e-4, role


def test_masters_lie_over_both_axes(mesh):
    """f32, cut over ep too where an axis allows; a step leaves them where they are and all steps run one program."""
    run = Run(mesh("ep=4,tp=2"), dtype=jnp.bfloat16)
    before = jax.tree.map(lambda p: p.sharding, run.state)
    assert "ep" in str(run.state.params["layers.0.attention.q"].sharding.spec)
    assert "ep" in str(run.state.optimizer[0].nu["embed"].sharding.spec)
    abstract = TrainState.abstract(run.config, run.optimizer, mesh("ep=4,tp=2"))
    assert jax.tree.map(lambda p: (p.shape, p.dtype, p.sharding), abstract) == jax.tree.map(
        lambda p: (p.shape, p.dtype, p.sharding), run.state
    )
    old, losses = run.state, [m.loss for m in run.take(3)]
    assert losses[0] >= losses[1] > losses[2]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))
    assert {leaf.dtype for leaf in jax.tree.leaves(run.state.params)} == {jnp.dtype("float32")}
    assert jax.tree.map(lambda p: p.sharding, run.state) == before
    assert run.step.program._cache_size() == 1


def test_parts_of_a_batch_add_up(mesh):
    one = mesh("ep=1,tp=1")
    whole, parts = Run(one), Run(one, parts=2)
    for a, b in zip(parts.take(3), whole.take(3), strict=True):
        assert relative(a.loss, b.loss) < 1e-6
        assert relative(a.grad_norm, b.grad_norm) < 1e-4
        assert a.targets == b.targets
        np.testing.assert_array_equal(a.tokens_per_expert, b.tokens_per_expert)


def test_a_step_that_is_not_finite_changes_nothing(mesh):
    """It is told, with the layer, and training goes on with the next batch."""
    run = Run(mesh("ep=1,tp=1"))
    good = run.state.params["layers.1.attention.v"]
    run.state.params["layers.1.attention.v"] = good.at[0, 0, 0].set(jnp.nan)
    before = jax.device_get(run.state)
    (metrics,) = run.take(1)
    assert not metrics.finite and metrics.bad_layer == 1
    after = jax.device_get(run.state)
    assert after.step == before.step + 1
    jax.tree.map(np.testing.assert_array_equal, after.replace(step=0), before.replace(step=0))
    run.state.params["layers.1.attention.v"] = good
    (metrics,) = run.take(1)
    assert metrics.finite and metrics.bad_layer == -1


@pytest.mark.parametrize("spec", ["ep=4,tp=2"])
def test_remat_computes_the_same_and_repeats_no_collective(spec, mesh):
    plain, again = (Run(mesh(spec), remat=remat) for remat in (False, True))

    def collectives(run):
        text = run.step.program.lower(run.state, run.batch, run.step.room(run.state.params)).compile().as_text()
        return {kind: len(re.findall(rf" {kind}\(", text)) for kind in ("all-to-all", "all-gather", "all-reduce")}

    assert collectives(again) == collectives(plain)
    for a, b in zip(again.take(2), plain.take(2), strict=True):
        assert relative(a.loss, b.loss) < 1e-6
        assert relative(a.grad_norm, b.grad_norm) < 1e-5


def test_corrections_follow_the_load_and_nothing_else(mesh):
    """Up for experts below the mean load, down above; neither gradients nor the decay of weights touch them."""
    settings = LossSettings(balance="none", bias_update_rate=0.01)
    run = Run(mesh("ep=1,tp=1"), FAMILIES["glm4_moe_sparse"], optax.adamw(1e-3), losses=settings)
    sparse = [f"layers.{i}.moe.correction" for i, layer in enumerate(run.config.layers) if layer.moe]
    before = jax.device_get(run.state.params)
    (metrics,) = run.take(1)
    for role, load in zip(sparse, metrics.tokens_per_expert, strict=True):
        want = before[role] + 0.01 * np.sign(load.mean() - load)
        np.testing.assert_allclose(run.state.params[role], want, rtol=1e-6)
