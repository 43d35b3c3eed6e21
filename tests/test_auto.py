"""Which strategy runs and how a batch lies on the mesh, from static shapes alone."""

import pytest
from jax.sharding import PartitionSpec

import moejax
from moejax.model import Options, lay
from moejax.moe.auto import STRATEGIES, check_strategy, choose


@pytest.mark.parametrize(
    ("strategy", "rows", "ep", "chosen", "reason"),
    [
        ("auto", 5, 1, "all_reduce", "one device along ep holds all experts"),
        ("auto", 8, 4, "all_to_all", "8 rows are cut over ep=4, so tokens travel to their experts"),
        ("auto", 4, 4, "all_to_all", "4 rows are cut over ep=4, so tokens travel to their experts"),
        ("auto", 1, 4, "all_reduce", "ep=4 does not divide a single row, so every device holds all tokens"),
        ("auto", 6, 4, "all_reduce", "ep=4 does not divide 6 rows, so every device holds all tokens"),
        ("all_to_all", 1, 4, "all_to_all", "asked for"),
        ("all_reduce", 8, 4, "all_reduce", "asked for"),
    ],
)
def test_the_choice_and_its_reason(strategy: str, rows: int, ep: int, chosen: str, reason: str):
    choice = choose(strategy, rows, ep)
    assert (choice.strategy, choice.reason) == (chosen, reason)


def test_an_unknown_strategy_is_named_with_those_there_are():
    for name in STRATEGIES:
        check_strategy(name)
    for refused in (lambda: check_strategy("ring"), lambda: choose("ring", 4, 2)):
        with pytest.raises(moejax.MoejaxError) as caught:
            refused()
        assert str(caught.value) == "strategy 'ring' is unknown; choose one of auto, all_to_all, all_reduce"


@pytest.mark.parametrize(
    ("batch", "options", "strategy", "rows", "cut"),
    [
        (8, Options(), "all_to_all", 8, True),
        (5, Options(), "all_reduce", 5, False),
        (5, Options("all_to_all"), "all_to_all", 8, True),
        (8, Options("all_reduce"), "all_reduce", 8, False),
        (5, Options(capacity_factor=1.0), "all_to_all", 8, True),
    ],
)
def test_rows_are_cut_and_filled_up_only_where_tokens_travel(mesh, batch, options, strategy, rows, cut):
    lie = lay(batch, mesh("ep=4,tp=2"), options)
    assert (lie.choice.strategy, lie.rows, lie.stream.cut) == (strategy, rows, cut)
    assert lie.stream.batch_spec == (PartitionSpec("ep") if cut else PartitionSpec(None))
    assert lie.parallel.batch_axes == (("ep",) if cut else ())


def test_one_expert_device_cuts_nothing_and_chunks_are_for_the_exchange_only(mesh):
    assert not lay(8, mesh("ep=1,tp=2"), Options("all_to_all")).stream.cut
    assert lay(8, mesh("ep=4,tp=1"), Options(chunks=2)).parallel.chunks == 2
    assert lay(5, mesh("ep=4,tp=1"), Options(chunks=2)).parallel.chunks == 1
