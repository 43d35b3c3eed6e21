"""Packed rows: no target lost or told twice, segments and positions as attention wants them."""

from itertools import pairwise

import numpy as np
from data_cases import corpus_of
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.data.packing import PackedRows, batches

DOCUMENTS = st.lists(st.integers(0, 30), min_size=1, max_size=12)


def test_rows_by_hand():
    corpus = corpus_of([[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]])
    rows = PackedRows(corpus, 4)
    assert len(rows) == 2
    tokens, targets, segments, positions = rows[0]
    assert tokens.tolist() == [1, 2, 5, 6]
    assert targets.tolist() == [2, 3, 6, 7]
    assert segments.tolist() == [1, 1, 2, 2]
    assert positions.tolist() == [0, 1, 0, 1]
    tokens, targets, segments, positions = rows[1]
    assert tokens.tolist() == [7, 8, 9, 11]
    assert targets.tolist() == [8, 9, 10, 12]
    assert segments.tolist() == [1, 1, 1, 2]
    assert positions.tolist() == [0, 1, 2, 0]


def test_the_last_row_and_the_last_batch_end_with_padding():
    corpus = corpus_of([[1, 2, 3, 4], [5, 6, 7]])
    (batch,) = batches(PackedRows(corpus, 4), 3)
    assert {a.dtype for a in (batch.tokens, batch.targets, batch.segments, batch.positions)} == {np.dtype(np.int32)}
    assert batch.tokens.tolist() == [[1, 2, 3, 5], [6, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.targets.tolist() == [[2, 3, 4, 6], [7, -1, -1, -1], [-1, -1, -1, -1]]
    assert batch.segments.tolist() == [[1, 1, 1, 2], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_only_what_is_to_be_learned_is_a_target():
    corpus = corpus_of([[1, 2, 3, 4], [5, 6]], [[False, False, True, False], [False, True]])
    row = PackedRows(corpus, 4)[0]
    assert row[0].tolist() == [1, 2, 3, 5]
    assert row[1].tolist() == [-1, 3, -1, 6]
    assert corpus.targets == 2


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS, st.integers(1, 9), st.randoms(use_true_random=False), st.integers(1, 4))
def test_every_token_but_the_first_of_a_document_is_a_target_once(lengths, length, random, batch):
    # Ids are all different, so that a target names its place in the corpus.
    bounds = np.cumsum([0, *lengths])
    documents = [list(range(a, b)) for a, b in pairwise(bounds)]
    order = random.sample(range(len(documents)), len(documents))
    corpus = corpus_of(documents)
    rows = PackedRows(corpus, length, np.array(order))
    packed = list(batches(rows, batch))
    assert len(rows) == -(-corpus.targets // length)
    targets = np.concatenate([b.targets.ravel() for b in packed]) if packed else np.empty(0, np.int32)
    expected = [index for number in order for index in documents[number][1:]]
    assert targets[targets >= 0].tolist() == expected
    for b in packed:
        assert b.tokens.shape == (batch, length)
        assert ((b.targets >= 0) == (b.segments > 0)).all()
        used = b.segments > 0
        assert (b.tokens[used] + 1 == b.targets[used]).all()
        for tokens, segments, positions in zip(b.tokens, b.segments, b.positions, strict=True):
            for segment in range(1, segments.max() + 1):
                mine = np.flatnonzero(segments == segment)
                assert (np.diff(mine) == 1).all() and mine.size  # one piece, and no number is left out
                assert positions[mine].tolist() == list(range(mine.size))
                assert len({np.searchsorted(bounds, tokens[i], side="right") for i in mine}) == 1  # of one document
