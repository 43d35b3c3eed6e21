"""Router losses against the transformers that is installed. Run with `-m parity`."""

import importlib
import warnings

import jax
import numpy as np
import pytest
from flax import nnx
from loss_views import SEGMENTS, SOFTMAX, random_views
from moe_cases import compiled, relative
from tiny import CONFIGS, write_checkpoint

import moejax
from moejax.model import lay
from moejax.moe.balance import router_views, switch_balance

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:::torch|transformers")]


@pytest.fixture(scope="module")
def torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = importlib.import_module("torch")
    with torch.enable_grad():  # golden.make, which other tests of this process may have imported, turns them off
        yield torch


def theirs(torch, family, logits, chosen, mask):
    """transformers' loss, and its gradients in the logits of each layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    flat = [torch.tensor(np.asarray(a).reshape(-1, a.shape[-1]), requires_grad=True) for a in logits]
    mask = None if mask is None else torch.tensor(np.asarray(mask, np.int64))
    loss = modeling.load_balancing_loss_func(tuple(flat), logits[0].shape[-1], chosen, mask)
    loss.backward()
    return loss.item(), [a.grad.numpy().reshape(logits[0].shape) for a in flat]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "phimoe"])
@pytest.mark.parametrize("masked", [True, False])
def test_switch_balance_is_transformers_load_balancing_loss(torch, family, masked):
    segments = SEGMENTS if masked else np.ones_like(SEGMENTS)
    views = random_views(SOFTMAX, 3, segments)
    logits = [view.logits for view in views]

    def loss(logits):
        return switch_balance([view.replace(logits=of) for view, of in zip(views, logits, strict=True)])

    value, gradients = compiled(jax.value_and_grad(loss))(logits)
    want, wanted = theirs(torch, family, logits, SOFTMAX.num_experts_per_tok, segments > 0 if masked else None)
    assert float(value) == pytest.approx(want, rel=1e-6)
    np.testing.assert_allclose(gradients, wanted, rtol=1e-4, atol=1e-8)


def test_a_whole_model_s_loss_is_transformers_aux_loss(torch, tmp_path):
    """Through transformers' own forward pass, padding masked; and the gradients that reach the routers and beyond."""
    folder = write_checkpoint(tmp_path / "model", CONFIGS["mixtral_plain"])
    lengths = np.array([9, 12, 5, 12])
    mask = np.arange(12) < lengths[:, None]
    tokens = np.random.default_rng(0).integers(0, 96, mask.shape, np.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = importlib.import_module("transformers")
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        inputs = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
        aux = peer(**inputs, output_router_logits=True).aux_loss
        aux.backward()

    model = moejax.load(folder, mesh=moejax.make_mesh("ep=4,tp=2"))
    lie = lay(4, model.mesh, model.options)
    graph, state = model.split()
    positions = np.where(mask, np.arange(12), 0)
    batch = [model.put_rows(a.astype(np.int32), lie) for a in (tokens, mask, positions)]

    def loss(state, tokens, segments, positions):
        _, details = nnx.merge(graph, state).hidden_states(tokens, segments, positions, lie)
        return switch_balance(router_views(details, segments, model.config))

    value, gradients = compiled(jax.value_and_grad(loss))(state, *batch)
    assert float(value) == pytest.approx(aux.item(), rel=1e-5)
    for ours, layer in zip(gradients["layers"].values(), peer.model.layers, strict=True):
        assert relative(ours["moe"]["router"][...], layer.mlp.gate.weight.grad.numpy().T) < 1e-4
    assert relative(gradients["embed"][...], peer.model.embed_tokens.weight.grad.numpy()) < 1e-4
