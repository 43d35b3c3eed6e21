"""What travels over each mesh axis, read from the compiled programs."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from moe_cases import FAST, Block, cell_rows

import moejax
from moejax import Routing, moe
from moejax.model import Options, lay
from moejax.moe.params import expert_specs
from moejax.planning.collectives import collectives

BLOCK = Block(tokens=32, width=16, hidden=12, experts=8, chosen=2, shared=8, gated=True)
SCALED = dataclasses.replace(BLOCK, bias=True, scales_input=True)
WHOLE_ROWS = dataclasses.replace(BLOCK, width=18)
TIGHT = dataclasses.replace(BLOCK, tokens=4, chosen=1)  # one pair a device cannot overflow a cell: no loop at all


def placed(mesh, block, strategy, routing):
    """Tokens, weights and routing as they lie before a block of a model."""

    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    cut = PartitionSpec("ep") if strategy == "all_to_all" and mesh.shape["ep"] > 1 else PartitionSpec()
    params = block.params()
    live = {axis: axis if mesh.shape[axis] > 1 else None for axis in ("ep", "tp")}
    specs = expert_specs(mesh, params, live["ep"], live["tp"])
    params = jax.tree.map(put, params, specs)
    return put(block.x(), cut), params, jax.tree.map(lambda a: put(a, cut), routing)


@functools.cache
def program(spec, block, strategy, chunks=1):
    mesh = moejax.make_mesh(spec)
    arguments = placed(mesh, block, strategy, balanced(block))
    function = jax.jit(functools.partial(moe, mesh=mesh, strategy=strategy, chunks=chunks, **block.options))
    run = function.lower(*arguments).compile(FAST)
    return collectives(run.as_text(), mesh), run(*arguments)


def balanced(block):
    """As many pairs for every device, so that one wave is enough."""
    first = np.arange(block.tokens) % block.experts
    experts = np.stack([(first + 3 * k) % block.experts for k in range(block.chosen)], 1)
    return Routing(jnp.ones(experts.shape), jnp.asarray(experts, jnp.int32))


def brief(found, loop):
    return Counter(c.brief() for c in found if c.loop == loop)


@pytest.mark.parametrize("block", [BLOCK, WHOLE_ROWS, SCALED])
def test_a_replicated_stream_has_one_all_reduce(block):
    """Shared expert and hidden width inside it; also where tp does not divide the rows."""
    found, (y, accounting) = program("ep=4,tp=2", block, "all_reduce")
    size = block.tokens * block.width * 4
    assert [c.brief() for c in found] == [("all-reduce", "ep+tp", "f32", size)]
    assert (float(accounting.ep_bytes), float(accounting.tp_bytes)) == (size, 0)
    assert y.sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("spec", "axis"),
    [("ep=1,tp=1", None), ("ep=4,tp=1", "ep"), ("ep=1,tp=4", "tp")],
)
@pytest.mark.parametrize("strategy", ["all_reduce", "all_to_all"])
def test_axes_of_one_device_have_no_collective(spec, axis, strategy):
    found, (_, accounting) = program(spec, BLOCK, strategy)
    assert {c.axes for c in found} == ({(axis,)} if axis else set())
    sent = {name: sum(c.bytes for c in found if c.axes == (name,) and not c.loop) for name in ("ep", "tp")}
    assert sent == {"ep": float(accounting.ep_bytes), "tp": float(accounting.tp_bytes)}


@pytest.mark.parametrize(
    ("spec", "block", "chunks"),
    [
        ("ep=4,tp=2", BLOCK, 1),
        ("ep=4,tp=2", BLOCK, 2),
        ("ep=4,tp=2", TIGHT, 1),
        ("ep=4,tp=2", SCALED, 1),
        pytest.param("ep=2,tp=4", BLOCK, 4, marks=pytest.mark.slow),
        pytest.param("ep=4,tp=2", dataclasses.replace(BLOCK, shared=0, gated=False), 1, marks=pytest.mark.slow),
    ],
)
def test_all_to_all_sends_shares(spec, block, chunks):
    """The exact list, so nothing gathers weights or tokens; and its bytes, with one wave, are the accounting's."""
    found, (y, accounting) = program(spec, block, "all_to_all", chunks)
    ep, tp = (int(part.split("=")[1]) for part in spec.split(","))
    tokens, width = block.tokens // ep, block.width
    rows = ep * cell_rows(tokens, block.chosen, ep, chunks)
    exchange = Counter(
        {
            ("all-to-all", "ep", "f32", 4 * rows * width // tp): 2 * chunks,
            ("all-gather", "tp", "f32", 4 * rows * width // tp): chunks,
            ("reduce-scatter", "tp", "f32", 4 * rows * width): chunks,
        }
    )
    once = Counter(
        {
            ("all-gather", "ep", "s32", 4 * block.experts): 1,
            ("all-gather", "tp", "f32", 4 * tokens * width // tp): 1,
        }
    )
    if block.shared:
        once += Counter({("reduce-scatter", "tp", "f32", 4 * tokens * width): 1})
    assert brief(found, loop=False) == exchange + once
    assert brief(found, loop=True) == (Counter() if block is TIGHT else exchange)
    check_bytes(found, accounting)
    assert y.sharding.is_equivalent_to(NamedSharding(moejax.make_mesh(spec), PartitionSpec("ep")), 2)


def test_all_to_all_sends_whole_rows_where_tp_does_not_divide_them():
    """tp=4 and 18 columns: one all-reduce over tp, outside of the loop."""
    found, (_, accounting) = program("ep=2,tp=4", WHOLE_ROWS, "all_to_all")
    rows = 2 * cell_rows(16, 2, 2, 1)
    payload = Counter({("all-to-all", "ep", "f32", 4 * rows * 18): 2})
    once = Counter({("all-gather", "ep", "s32", 32): 1, ("all-reduce", "tp", "f32", 4 * 16 * 18): 1})
    assert brief(found, loop=False) == payload + once
    assert brief(found, loop=True) == payload
    check_bytes(found, accounting)


def check_bytes(found, accounting):
    assert int(accounting.waves) == 1
    assert sum(c.bytes for c in found if c.axes == ("ep",) and not c.loop) == float(accounting.ep_bytes)
    assert sum(c.bytes for c in found if c.axes == ("tp",) and not c.loop) == float(accounting.tp_bytes)


@functools.cache
def demo():
    return moejax.load("demo", mesh=moejax.make_mesh("ep=4,tp=2"), dtype="float32")


def decode_step(batch, room=16):
    """The collectives of one decoding step of the whole model, and what it gives."""
    model = demo()
    lie = lay(batch, model.mesh, Options())
    graph, state = model.split()

    def decode(state, tokens, positions, lengths, caches):
        return nnx.merge(graph, state).extend(tokens, positions, lengths, caches, lie)

    one = model.put_rows(np.full((batch, 1), 8, np.int32), lie)
    lengths = model.put_rows(np.full(batch, 9, np.int32), lie)
    caches = jax.eval_shape(lambda state: nnx.merge(graph, state).empty_caches(room, lie), state)
    share = model.decoder.layers[0].attention.share(lie.stream)
    sharding = NamedSharding(model.mesh, share.cache_spec)
    caches = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), caches)
    lowered = jax.jit(decode).lower(state, one, one, lengths, caches)
    return collectives(lowered.compile(FAST).as_text(), model.mesh), model.config


def test_a_replicated_decoding_step_has_two_all_reduces_a_layer():
    """Batch 1: attention's, the mixture's, and around all layers that of the embedding over tp; no gather anywhere."""
    found, config = decode_step(batch=1)
    token = 4 * config.hidden_size
    assert Counter(c.kind for c in found) == {"all-reduce": 2 * config.num_layers + 1}
    scopes = Counter(next(s for s in ("attention", "combine", "embed") if s in c.scope) for c in found)
    assert scopes == {"attention": config.num_layers, "combine": config.num_layers, "embed": 1}
    assert {c.brief() for c in found if "embed" not in c.scope} == {("all-reduce", "ep+tp", "f32", token)}


def test_a_cut_decoding_step_exchanges_rows_only():
    """Batch 8 over ep=4: over ep two payload exchanges a layer and the counts; attention sums over tp."""
    found, config = decode_step(batch=8)
    over_ep = Counter((c.kind, c.dtype) for c in found if "ep" in c.axes and not c.loop)
    assert over_ep == {("all-to-all", "f32"): 2 * config.num_layers, ("all-gather", "s32"): config.num_layers}
    attention = [c for c in found if "attention" in c.scope]
    assert [c.brief() for c in attention] == [
        ("all-reduce", "tp", "f32", 2 * 4 * config.hidden_size)
    ] * config.num_layers
