"""Settings of router losses, a user's own, corrections; and all of it through a decoder, the same on every mesh."""

import functools
import sys
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from loss_views import SIGMOID, SOFTMAX, random_views
from moe_cases import FAST, compiled, normal, relative
from tiny import write_checkpoint
from tiny_configs import CONFIGS

import moejax
from moejax import MoejaxError, Routing
from moejax.families import read_config
from moejax.language_model import role_of
from moejax.model import lay
from moejax.moe.balance import router_views
from moejax.moe.jitter import Jitter
from moejax.moe.losses import BALANCE, LossSettings, router_losses, updated_correction, weighted_sum
from moejax.moe.router import router_for
from moejax.planning.collectives import collectives

MESHES = ("ep=1,tp=1", "ep=4,tp=2", "ep=2,tp=4", "ep=8,tp=1")
RAW = CONFIGS["mixtral_plain"]
ROWS = 6  # neither 4 nor 8 devices divide them
# Two texts and padding; one text; three texts, one of a single token; padding first.
LENGTHS = [[(1, 5), (2, 4), (0, 3)], [(1, 12)], [(1, 1), (2, 7), (3, 4)], [(0, 4), (1, 8)], [(1, 6), (2, 6)], [(0, 12)]]
EARLIER = np.arange(16, dtype=np.int32).reshape(2, 8) % 5


def squared_load(views):
    """A user's own balance loss."""
    return sum(jnp.square(view.mean(view.scores())).sum() for view in views)


def first_experts(logits):
    """A user's own router, which looks at the logits for weights alone."""
    chosen = jnp.zeros_like(logits[..., :2], jnp.int32) + jnp.arange(2, dtype=jnp.int32)
    return Routing(jax.nn.sigmoid(logits[..., :2]), chosen)


@pytest.fixture(autouse=True)
def mine(monkeypatch):
    """The module `mine` of a user."""
    module = ModuleType("mine")
    vars(module).update(
        squared_load=squared_load,
        router=first_experts,
        of_layers=lambda views: jnp.ones(len(views)),
        whole=lambda views: jnp.int32(1),
    )
    monkeypatch.setitem(sys.modules, "mine", module)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), RAW)


def batch_of(model, lie):
    """Tokens, segments, positions."""
    segments = np.array([[i for i, n in row for _ in range(n)] for row in LENGTHS], np.int32)
    positions = np.array([[p for i, n in row for p in (range(n) if i else [0] * n)] for row in LENGTHS], np.int32)
    tokens = np.random.default_rng(0).integers(0, RAW["vocab_size"], segments.shape, np.int32)
    return [model.put_rows(a, lie) for a in (tokens, segments, positions)]


@functools.cache
def run(folder, spec):
    """Each loss, the routers' logits and choices, the gradients of all losses together, what the program moves."""
    mesh = moejax.make_mesh(spec)
    model = moejax.load(folder, mesh=mesh, strategy="all_to_all")
    lie = lay(ROWS, mesh, model.options)
    graph, state = model.split()
    names = [*BALANCE, "mine:squared_load"]

    def losses(state, batch, key):
        tokens, segments, positions = batch
        decoder = nnx.merge(graph, state)
        _, details = decoder.hidden_states(tokens, segments, positions, lie, Jitter(key, 0.3))
        views = router_views(details, segments, model.config, jnp.asarray(EARLIER))
        found = {name: router_losses(LossSettings(name))(views) for name in names}
        values = {name: value["balance"] for name, value in found.items()} | {"z": found["switch"]["z"]}
        return sum(values.values()), (values, [(d.router_logits, d.routing.experts) for d in details])

    arguments = (state, batch_of(model, lie), jax.random.key(0))
    program = jax.jit(jax.value_and_grad(losses, has_aux=True)).lower(*arguments).compile(FAST)
    (_, (values, routers)), gradients = program(*arguments)
    named = {role_of(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(gradients)}
    values = {name: float(value) for name, value in values.items()}
    routers = [[np.asarray(a)[:ROWS] for a in router] for router in routers]
    return values, routers, named, collectives(program.as_text(), mesh)


@pytest.mark.parametrize("spec", MESHES[1:])
def test_values_and_gradients_are_those_of_one_device(spec, folder):
    """Through two layers and their noise, with ragged texts, padding, and rows that only fill up the mesh."""
    want, want_routers, wanted, _ = run(folder, MESHES[0])
    values, routers, gradients, moved = run(folder, spec)
    for (logits, experts), (want_logits, want_experts) in zip(routers, want_routers, strict=True):
        real = want_experts[..., 0] >= 0
        np.testing.assert_array_equal(experts, want_experts)
        assert relative(logits[real], want_logits[real]) < 1e-5
    assert values == pytest.approx(want, rel=1e-6)
    assert len(set(want.values())) == len(want)
    for name, gradient in gradients.items():
        assert relative(gradient, wanted[name]) < 1e-4, name
    assert all(np.abs(wanted[f"layers.{layer}.moe.router"]).max() > 1e-3 for layer in range(2))
    # The losses move sums, counts and nothing else; over ep no part of the program gathers anything but counts.
    of_losses = [c for c in moved if "router_losses" in c.scope]
    assert {c.kind for c in of_losses} == {"all-reduce"}
    assert sum(c.bytes for c in of_losses) < 1000
    assert {c.dtype for c in moved if c.kind == "all-gather" and "ep" in c.axes} == {"s32"}


def test_inference_has_no_noise(folder, mesh):
    """So its router logits are not those of the training pass above."""
    model = moejax.load(folder, mesh=mesh("ep=1,tp=1"))
    tokens, segments, positions = batch_of(model, lay(ROWS, model.mesh, model.options))
    quiet = model(tokens, segment_ids=segments, positions=positions, output_router_logits=True).router_logits
    real = np.asarray(segments).reshape(-1) > 0
    for (noisy, _), logits in zip(run(folder, MESHES[0])[1], quiet, strict=True):
        assert relative(noisy.reshape(real.size, -1)[real], np.asarray(logits)[real]) > 0.05


def test_noise_is_the_layer_s_and_the_key_s(folder, mesh):
    """Amount 0 is no noise; noise stays within its bounds; experts read the input as it is."""
    moe = moejax.load(folder, mesh=mesh("ep=1,tp=1")).decoder.layers[0].moe
    x, key = normal(np.random.default_rng(0), 2, 30, RAW["hidden_size"]), jax.random.key(3)
    noisy = compiled(lambda x, noise: (noise(x), *moe.with_details(x, jitter=noise)))
    seen, y, details = noisy(x, Jitter(key, 0.3).of_layer(1))
    ratio = np.asarray(seen / x)
    assert ratio.min() == pytest.approx(0.7, abs=0.01) and ratio.max() == pytest.approx(1.3, abs=0.01)
    np.testing.assert_allclose(details.router_logits, compiled(moe.router_logits)(seen), rtol=1e-5, atol=1e-5)
    by_hand, _ = compiled(lambda x, seen: moe.with_details(x, router_input=seen))(x, seen)
    np.testing.assert_allclose(y, by_hand, rtol=1e-5, atol=1e-5)
    other = [noisy(x, noise)[0] for noise in (Jitter(key, 0.3), Jitter(jax.random.key(4), 0.3).of_layer(1))]
    assert all(np.abs(seen - a).max() > 0.1 for a in other)
    quiet = noisy(x, Jitter(key, 0.0))[2].router_logits
    np.testing.assert_array_equal(quiet, compiled(lambda x: moe.with_details(x)[1].router_logits)(x))
    assert Jitter(key, 0.3)(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_user_s_router_is_that_of_every_layer(folder, mesh):
    model = moejax.load(folder, mesh=mesh("ep=2,tp=1"), router=first_experts)
    assert [layer.moe.route for layer in model.decoder.layers] == [first_experts] * 2
    out = model(np.arange(8).reshape(2, 4), output_router_logits=True)
    assert {tuple(row) for chosen in out.routed_experts for row in np.asarray(chosen).tolist()} == {(0, 1)}


def test_corrections_move_against_the_load():
    """By the rate, each layer by itself; not where the load is the mean."""
    correction = jnp.array([[0.5, 0.0, -0.1], [0.0, 0.0, 0.0]])
    load = jnp.array([[9, 6, 3], [4, 4, 4]], jnp.int32)
    got = updated_correction(correction, load, 0.01)
    np.testing.assert_allclose(got, [[0.49, 0.0, -0.09], [0, 0, 0]], atol=1e-7)
    assert got.dtype == jnp.float32


def test_corrections_level_a_skewed_load():
    """Tokens that prefer few experts spread over all in some hundred updates."""
    logits = normal(np.random.default_rng(0), 512, 5) + jnp.array([2.0, 1.0, 0.0, -1.0, -2.0])

    @compiled
    def load_after(steps):
        def step(_, correction):
            return updated_correction(correction, load(correction), 0.01)

        def load(correction):
            experts = router_for(SIGMOID)(logits, correction=correction).experts
            return (experts[..., None] == jnp.arange(5, dtype=jnp.int32)).sum((0, 1), dtype=jnp.int32)

        return load(jax.lax.fori_loop(0, steps, step, jnp.zeros(5)))

    skewed, level = np.asarray(load_after(0)), np.asarray(load_after(200))
    assert skewed.max() > 2 * skewed.mean() and level.max() < 1.1 * level.mean()
    assert skewed.sum() == level.sum() == 1024


def test_no_loss_trains_a_correction():
    logits = normal(np.random.default_rng(0), 16, 5)

    def weights(correction, logits):
        return (router_for(SIGMOID)(logits, correction=correction).weights ** 2)[:, 0].sum()

    of_correction, of_logits = compiled(jax.grad(weights, (0, 1)))(jnp.arange(5) / 10, logits)
    assert not np.asarray(of_correction).any() and np.asarray(of_logits).any()


def test_weights_choose_what_is_learned():
    losses = {"balance": jnp.float32(3), "z": jnp.float32(5)}
    assert float(weighted_sum(losses, LossSettings(balance_weight=0.1, z_weight=0.01))) == pytest.approx(0.35)
    assert float(weighted_sum(losses | {"z": jnp.float32(jnp.nan)}, LossSettings(balance_weight=2))) == 6
    assert float(weighted_sum(losses, LossSettings(balance_weight=0))) == 0


def test_none_is_no_balance_loss_and_a_model_without_experts_has_none_at_all():
    views = random_views(SOFTMAX, 1)
    got = router_losses(LossSettings("none"))(views)
    assert got["balance"] == 0 and got["z"] > 0
    assert {float(value) for value in router_losses(LossSettings())([]).values()} == {0.0}
    assert router_losses(LossSettings(z_weight=0.1)) is router_losses(LossSettings(z_weight=0.1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"balance": "swich"}, "balance='swich' is none of none, switch, sequence, global; did you mean 'switch'?"),
        ({"balance": "entropy"}, 'a loss of your own is "package.module:function"'),
        ({"balance": "mine:"}, "balance='mine:' names no function; write package.module:function"),
        ({"router": "mine"}, "router='mine' names no function; write package.module:function"),
        ({"balance_weight": -0.1}, "balance_weight=-0.1 must be at least 0"),
        ({"z_weight": float("nan")}, "z_weight=nan must be at least 0"),
        ({"bias_update_rate": float("inf")}, "bias_update_rate=inf must be at least 0"),
        ({"jitter": 1.0}, r"jitter=1.0 must be below 1 \(0.01 is usual\)"),
    ],
)
def test_settings_out_of_range_are_refused(given, message):
    with pytest.raises(MoejaxError, match=message.replace("?", r"\?")):
        LossSettings(**given)


def test_a_bias_update_needs_a_correction():
    settings = LossSettings("none", bias_update_rate=0.001)
    with pytest.raises(MoejaxError, match="no router of this mixtral model has a correction"):
        settings.check(read_config(RAW))
    LossSettings().check(read_config(RAW))


def test_a_user_s_loss_is_found_and_held_to_one_number():
    views = random_views(SOFTMAX, 1)
    for name, given in (("of_layers", r"float32 of shape \[1\]"), ("whole", r"int32 of shape \[\]")):
        with pytest.raises(MoejaxError, match=f"balance='mine:{name}' gave {given}; a balance loss is one float"):
            router_losses(LossSettings(f"mine:{name}"))(views)
    with pytest.raises(MoejaxError, match="has no squared_lode; did you mean squared_load"):
        router_losses(LossSettings("mine:squared_lode"))
