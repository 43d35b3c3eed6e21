"""The layout of exchange cells: over all waves every pair travels once, and both ends agree on what a row holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import compiled

from moejax import Routing, make_plan
from moejax.moe.router import NOWHERE
from moejax.moe.strategies.cells import Cells, grouped_rows

SENDERS, TOKENS, CHOSEN, PER_CELL = 3, 6, 2, 2
SLOTS = SENDERS * PER_CELL
MOST_WAVES = TOKENS * CHOSEN
CELLS = [Cells(rows=1), Cells(rows=5), Cells(rows=TOKENS * CHOSEN)]
DROPPING = [Cells(rows=PER_CELL * rows, per_expert=rows) for rows in (1, 3)]


@st.composite
def all_senders(draw):
    """Experts `[SENDERS, TOKENS, CHOSEN]`, from evenly spread to a single crowd, with holes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    pool = draw(st.sampled_from([SLOTS, 3, 2]))
    experts = [[rng.permutation(pool)[:CHOSEN] for _ in range(TOKENS)] for _ in range(SENDERS)]
    holes = rng.random((SENDERS, TOKENS, CHOSEN)) < draw(st.sampled_from([0.0, 0.3, 0.9]))
    return np.where(holes, NOWHERE, experts).astype(np.int32)


@functools.cache
def simulated(cells):
    """What senders and receivers compute, each from what it knows."""

    @compiled
    def run(experts):
        def send(own):
            plan = make_plan(Routing(jnp.ones(own.shape), own), SLOTS)
            return plan.counts, *cells.places(plan, SENDERS)

        def receive(received, wave):
            layout = cells.layout(received, wave)
            return layout, grouped_rows(layout, cells.rows)

        counts, cell, place = jax.vmap(send)(experts)
        by_receiver = counts.reshape(SENDERS, SENDERS, PER_CELL).swapaxes(0, 1)
        over_waves = jax.vmap(receive, (None, 0))
        layouts, groups = jax.vmap(over_waves, (0, None))(by_receiver, jnp.arange(MOST_WAVES, dtype=jnp.int32))
        return cell, place, cells.waves(by_receiver), cells.dropped(by_receiver), layouts, groups

    return run


def sent_rows(cells, experts, cell, place, waves):
    """(wave, receiver, sender, row) -> expert, from the senders' side."""
    rows = {}
    for sender in range(SENDERS):
        for pair, expert in enumerate(experts[sender].reshape(-1)):
            wave, row = divmod(int(place[sender, pair]), cells.rows)
            if wave < waves:
                key = (wave, int(cell[sender, pair]), sender, row)
                assert expert != NOWHERE and key not in rows
                rows[key] = int(expert)
    return rows


def expected_rows(layouts, waves):
    """The same from the receivers' side, who know counts only."""
    first, size = map(np.asarray, layouts)
    rows = {}
    for receiver, wave, sender, local in np.ndindex(SENDERS, waves, SENDERS, PER_CELL):
        begin = first[receiver, wave, sender, local]
        for row in range(begin, begin + size[receiver, wave, sender, local]):
            key = (wave, receiver, sender, row)
            assert key not in rows
            rows[key] = receiver * PER_CELL + local
    return rows


@settings(max_examples=60, deadline=None)
@given(all_senders(), st.sampled_from(CELLS + DROPPING))
def test_both_ends_agree_and_each_pair_travels_once(experts, cells):
    cell, place, waves, dropped, layouts, (source, sizes) = simulated(cells)(experts)
    sent = sent_rows(cells, experts, cell, place, int(waves))
    assert sent == expected_rows(layouts, int(waves))
    assert len(sent) + int(dropped) == (experts != NOWHERE).sum()
    assert cells.per_expert is not None or int(dropped) == 0
    check_grouping(cells, sent, np.asarray(source), np.asarray(sizes), int(waves))


def check_grouping(cells, sent, source, sizes, waves):
    """Received rows, sorted by expert then sender; nothing else is picked."""
    for receiver, wave in np.ndindex(SENDERS, waves):
        arrived = sorted((e, s, row) for (w, r, s, row), e in sent.items() if (w, r) == (wave, receiver))
        picked = source[receiver, wave]
        assert picked[: len(arrived)].tolist() == [s * cells.rows + row for _, s, row in arrived]
        assert (picked[len(arrived) :] == SENDERS * cells.rows).all()
        counts = np.bincount([e - receiver * PER_CELL for e, *_ in arrived], minlength=PER_CELL)
        assert sizes[receiver, wave].tolist() == counts.tolist()


@settings(max_examples=30, deadline=None)
@given(all_senders(), st.sampled_from(CELLS))
def test_no_more_waves_than_the_fullest_cell_needs(experts, cells):
    waves = int(simulated(cells)(experts)[2])
    fullest = max(
        ((own // PER_CELL == device) & (own != NOWHERE)).sum() for own in experts for device in range(SENDERS)
    )
    assert waves == max(1, -(-fullest // cells.rows))


@settings(max_examples=30, deadline=None)
@given(all_senders(), st.sampled_from(DROPPING))
def test_what_finds_no_room_comes_latest(experts, cells):
    _, place, waves, *_ = simulated(cells)(experts)
    for sender in range(SENDERS):
        own = experts[sender].reshape(-1)
        kept = np.asarray(place[sender]) < int(waves) * cells.rows
        for expert in range(SLOTS):
            mine = kept[own == expert]
            assert mine.tolist() == [i < cells.per_expert for i in range(len(mine))]
