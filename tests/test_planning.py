"""Reading compiled programs: their text by hand, and what the CPU's compiler makes of known products."""

import jax
import jax.numpy as jnp
import pytest

from moejax import MoejaxError, make_mesh
from moejax.planning.collectives import collectives
from moejax.planning.flops import dot_flops
from moejax.planning.hlo import Buffer, Program, buffers
from moejax.planning.schedule import flights
from moejax.planning.topologies import h100_mesh, tpu_mesh
from moejax.planning.weak_scaling import Cost, main, table

TEXT = """
HloModule jit_step, is_scheduled=true

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %g = f32[2,8]{1,0} all-gather(%x), replica_groups=GROUPS, dimensions={0}, metadata={op_name="jit(step)/while/gather"}
  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%i, %x)
}

ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %s = ((bf16[4,8]{1,0}), bf16[4,8]{1,0}) all-to-all-start(%a), replica_groups=[2,4]<=[4,2]T(1,0), x={"is_sync":SYNC}
  %k = (bf16[4,8]{1,0}, /*index=1*/u8[16]{0}) custom-call(%a), custom_call_target="mosaic_gpu", x={op_name="f/SCOPE/x"}
  %d = bf16[4,8]{1,0} all-to-all-done(%s)
  %i = s32[] constant(0)
  %t = (s32[], bf16[4,8]{1,0}) tuple(%i, %d)
  ROOT %w = (s32[], bf16[4,8]{1,0}) while(%t), condition=%body, body=%body
}
"""


def program(sync="false", scope="experts"):
    return Program.parse(TEXT.replace("SYNC", sync).replace("SCOPE", scope))


def test_bytes_of_types():
    assert [
        b.bytes for b in buffers("(pred[3], s4[4]{0}, bf16[2,3]{1,0:T(8,128)}, /*index=3*/f8e4m3fn[5], f32[], token[])")
    ] == [
        3,
        2,
        12,
        5,
        4,
        0,
    ]


def test_instructions_and_buffers():
    read = program()
    assert read.entry == "main" and read.looped == {"body"}
    kernel = read.computations["main"][2]
    assert (kernel.opcode, kernel.target, kernel.scope) == ("custom-call", "mosaic_gpu", "f/experts/x")
    assert kernel.result == (Buffer("bf16", (4, 8)), Buffer("u8", (16,))) and kernel.operands == ("a",)
    assert [line.name for line in read.kernels()] == ["g", "s", "k"]


@pytest.mark.parametrize(
    ("sync", "scope", "hidden"), [("false", "experts", True), ("true", "experts", False), ("false", "router", False)]
)
def test_a_transfer_hides_only_if_it_is_asynchronous_and_the_scope_computes(sync, scope, hidden):
    (flight,) = flights(program(sync, scope), "all-to-all")
    assert [line.name for line in flight.between] == ["k"]
    assert flight.hides_behind("experts") == hidden


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", "tp"),
        ("[4,2]<=[8]", "tp"),
        ("[2,4]<=[4,2]T(1,0)", "ep"),
        ("mesh['axis_0'=8] {'axis_0'}", "ep+tp"),
        ("mesh['x'=4,'y'=2] {'x'}", "ep"),
        ("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}", "ep"),
        ("{}", "ep+tp"),
    ],
)
def test_axes_of_replica_groups(groups, axes):
    inner, outer = collectives(TEXT.replace("GROUPS", groups), make_mesh("ep=4,tp=2"))
    assert inner.brief() == ("all-gather", axes, "bf16", 64) and inner.loop
    assert outer.brief() == ("all-to-all", "ep", "bf16", 64) and not outer.loop


def test_flops_of_products():
    def repeated(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0] @ w

    x, w = jnp.ones((16, 32)), jnp.ones((32, 32))
    text = jax.jit(repeated).lower(x, w).compile().as_text()
    assert dot_flops(Program.parse(text)) == 6 * 2 * 16 * 32 * 32


@pytest.mark.parametrize(
    ("make", "spec", "message"),
    [
        (h100_mesh, "ep=6,tp=2", 'mesh "ep=6,tp=2" has 12 devices, which do not fill machines of 8 H100s'),
        (tpu_mesh, "ep=3", 'mesh "ep=3" has 3 devices; slices of TPU v5p have 4, 8, 16, 32, 64, 128, 256'),
    ],
)
def test_meshes_that_no_machine_has_are_refused(make, spec, message):
    with pytest.raises(MoejaxError) as error:
        make(spec)
    assert str(error.value) == message


def test_weak_scaling_says_what_is_missing(capsys, tmp_path):
    assert main([str(tmp_path / "config.json")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["config.json", "--plot", "picture.gif"]) == 2
    assert "must end in one of" in capsys.readouterr().err


def test_weak_scaling_table():
    row = table([Cost(16, 100_000_000_000, 150_000_000_000, 44_040_192, 1_000_000, 2_000_000, 3_000_000)]).splitlines()[
        -1
    ]
    assert row == "| 2 | 16 | 100.0 | 150.0 | 44.0 | 1.0 | 2.0 | 3.0 |"
