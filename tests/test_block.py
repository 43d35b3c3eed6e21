"""What a layer adds up: norms around branches, a dense MLP beside the experts, a scale of the output."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, NormConfig, RouterConfig
from moejax.mesh import make_mesh
from moejax.moe.layer import Parallel
from moejax.moe.params import ExpertParams
from moejax.moe.reference import dense_moe, plain_mlp
from moejax.moe.router import router_for
from moejax.nn.block import Block
from moejax.nn.places import Places
from moejax.nn.stream import Stream

EPS = 1e-3
ATTENTION = AttentionConfig(2, 2, 8)
MOE = MoEConfig(16, 8, 6, 2, activation="gelu_tanh", router=RouterConfig(expert_scale=True))


def run(layer, x, silent):
    """The first block of a model of such layers on ep=2, tp=2, vectors random and matrix `silent` zero; its output."""
    config = ModelConfig("any", 8, 16, 8, NormConfig(EPS, "rms_wide"), True, (layer,), activation="gelu_tanh")
    mesh, random = make_mesh("ep=2,tp=2"), np.random.default_rng(0)
    with jax.set_mesh(mesh):
        block = Block(config, 0, mesh=mesh, rngs=nnx.Rngs(0), dtype=jnp.float32)
        state = nnx.to_flat_state(nnx.state(block, nnx.Param))
        for path, param in state:
            if param[...].ndim == 1:
                param[...] = jnp.asarray(1 + 0.3 * random.normal(size=param.shape), jnp.float32)
            if path == silent:
                param[...] = jnp.zeros_like(param[...])
        ones = jnp.ones(x.shape[:2], jnp.int32)
        places = Places.of(config, jnp.cumsum(ones, 1) - 1, ones.sum(1))
        parallel = Parallel(batch_axes=(), strategy="all_reduce")
        y, details = nnx.jit(lambda b, x: b(x, places, ones, Stream(mesh, False), parallel))(block, x)
    return {".".join(path): np.asarray(param[...]) for path, param in state}, np.asarray(y), details


def rms(x, weight):
    return x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + EPS) * weight


def test_experts_beside_a_dense_mlp_by_hand():
    x = np.random.default_rng(1).normal(size=(2, 3, 16)).astype(np.float32)
    layer = LayerConfig(ATTENTION, MOE, 12, branch_norms=True, output_scale=True)
    p, y, details = run(layer, jnp.asarray(x), silent=("attention", "o"))
    dense = plain_mlp(jnp.asarray(rms(x, p["mlp_norm.weight"])), p["mlp.gate_up"], p["mlp.down"], "gelu_tanh")
    logits = rms(x, p["router_norm.weight"]) / 4 @ p["moe.router"]
    np.testing.assert_allclose(details.router_logits, logits, atol=1e-5)
    routing = router_for(MOE)(jnp.asarray(logits), expert_scale=jnp.asarray(p["moe.expert_scale"]))
    routing = jax.tree.map(lambda a: a.reshape(6, -1), routing)
    experts = ExpertParams(jnp.asarray(p["moe.gate_up"]), jnp.asarray(p["moe.down"]))
    sparse = dense_moe(jnp.asarray(rms(x, p["moe_norm.weight"])).reshape(6, 16), experts, routing, "gelu_tanh")
    both = rms(dense, p["mlp_out_norm.weight"]) + rms(sparse.reshape(x.shape), p["moe_out_norm.weight"])
    want = (x + rms(both, p["out_norm.weight"])) * p["output_scale"]
    np.testing.assert_allclose(y, want, atol=1e-5)


def test_what_attention_adds_passes_its_norm():
    """One token sees only itself, so attention is its value through the output projection."""
    x = np.random.default_rng(2).normal(size=(2, 1, 16)).astype(np.float32)
    layer = LayerConfig(ATTENTION, None, 12, branch_norms=True)
    p, y, _ = run(layer, jnp.asarray(x), silent=("mlp", "down"))
    hidden = rms(x, p["attention_norm.weight"])[:, 0]
    added = sum(hidden @ p["attention.v"][:, head] @ p["attention.o"][head] for head in range(2))
    np.testing.assert_allclose(y[:, 0], x[:, 0] + rms(added, p["attention_out_norm.weight"]), atol=1e-5)
