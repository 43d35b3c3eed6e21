"""`model(tokens)`: what it takes, what it refuses, and the same logits on every mesh and strategy."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from moe_cases import relative
from tiny import CONFIGS, write_checkpoint

import moejax
from moejax.model import Options

RAW = CONFIGS["mixtral_plain"]
LAYERS, EXPERTS, CHOSEN, WIDTH, VOCAB = 2, 8, 2, 32, 96
BATCH, LENGTH = 4, 12
TOKENS = np.random.RandomState(0).randint(0, VOCAB, (BATCH, LENGTH))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), RAW)


@pytest.fixture(scope="module")
def model(mesh, folder) -> moejax.LanguageModel:
    """On one device. All tests that call it with `TOKENS`' shape and no flags share one compiled program."""
    return moejax.load(folder, mesh=mesh("ep=1,tp=1"))


@pytest.fixture(scope="module")
def parallel(mesh, folder) -> moejax.LanguageModel:
    return moejax.load(folder, mesh=mesh("ep=4,tp=2"))


@pytest.fixture(scope="module")
def logits(model) -> np.ndarray:
    return np.asarray(model(TOKENS))


@pytest.mark.parametrize(
    "form",
    [np.int8, np.uint8, np.int32, np.uint64, lambda x: x.tolist(), lambda x: jnp.asarray(x, jnp.int32)],
    ids=["int8", "uint8", "int32", "uint64", "lists", "jax"],
)
def test_any_whole_numbers_are_tokens(model, logits, form: Callable[[np.ndarray], Any]):
    assert np.array_equal(np.asarray(model(form(TOKENS))), logits)


def test_logits_are_f32_for_each_token(model, logits):
    assert logits.shape == (BATCH, LENGTH, VOCAB)
    assert logits.dtype == np.float32
    assert model(TOKENS).sharding.mesh == model.mesh


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, VOCAB]], "token id 96 (row 0, place 1) is outside the vocabulary, 0 to 95"),
        ([[1, 2], [3, -1]], "token id -1 (row 1, place 1) is outside the vocabulary, 0 to 95"),
        (np.full((1, 2), 2**63 + 5, np.uint64), "token id 9223372036854775813 (row 0, place 0) is outside"),
        ([[1.0, 2.0]], "tokens must be whole numbers [B, S], got float64 of shape [1, 2]"),
        ([[True, False]], "tokens must be whole numbers [B, S], got bool of shape [1, 2]"),
        ([1, 2, 3], "tokens must be whole numbers [B, S], got int64 of shape [3]"),
        ([[[1]]], "tokens must be whole numbers [B, S], got int64 of shape [1, 1, 1]"),
        ([], "tokens must be whole numbers [B, S], got float64 of shape [0]"),
        (np.zeros((0, 4), int), "tokens must be whole numbers [B, S], got int64 of shape [0, 4]"),
        (np.zeros((2, 0), int), "tokens must be whole numbers [B, S], got int64 of shape [2, 0]"),
        ("abc", "tokens must be whole numbers [B, S], got <U3 of shape []"),
        ([[2**70]], "tokens must be whole numbers [B, S], got object of shape [1, 1]"),
        ([[1, 2], [3]], "tokens must be one rectangle [B, S]; pad the rows and pass attention_mask="),
        (np.zeros((1, 129), int), "129 tokens are over the model's context of 128; shorten the rows"),
    ],
)
def test_tokens_that_are_none(model, tokens, message: str):
    with pytest.raises(moejax.MoejaxError) as caught:
        model(tokens)
    assert str(caught.value).startswith(message)


ONES = np.ones((BATCH, LENGTH), np.int64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_ids": ONES, "attention_mask": ONES}, "give segment_ids or attention_mask, not both"),
        (
            {"segment_ids": ONES[:, 1:]},
            "segment_ids or attention_mask must be whole numbers of the tokens' shape [4, 12]",
        ),
        ({"attention_mask": ONES * 0.5}, "segment_ids or attention_mask must be whole numbers of the tokens' shape"),
        ({"segment_ids": -ONES}, "segment_ids or attention_mask must be 0 to 2147483647, got -1 to -1"),
        ({"segment_ids": ONES << 32}, "segment_ids or attention_mask must be 0 to 2147483647, got 4294967296"),
        ({"attention_mask": [[1, 1], [1]]}, "segment_ids or attention_mask must be one rectangle of the tokens' shape"),
        ({"positions": -ONES}, "positions must be 0 to 2147483647, got -1 to -1"),
        ({"positions": ONES[:2]}, "positions must be whole numbers of the tokens' shape [4, 12], got int64 [2, 12]"),
    ],
)
def test_masks_segments_and_positions_that_do_not_fit(model, options: dict[str, Any], message: str):
    with pytest.raises(moejax.MoejaxError) as caught:
        model(TOKENS, **options)
    assert str(caught.value).startswith(message)


def test_right_padding_changes_nothing_before_it(model, logits):
    mask = np.arange(LENGTH) < np.array([12, 7, 1, 4])[:, None]
    tokens = np.where(mask, TOKENS, 3)
    masked = np.asarray(model(tokens, attention_mask=mask))
    assert np.isfinite(masked).all()
    assert relative(masked[mask], logits[mask]) <= 1e-6


def test_left_padding_with_the_positions_of_the_tokens_is_the_sequence_moved(model, logits):
    lengths = np.array([12, 7, 1, 4])
    mask = np.arange(LENGTH) >= LENGTH - lengths[:, None]
    tokens = np.full_like(TOKENS, 3)
    for row, length in enumerate(lengths):
        tokens[row, LENGTH - length :] = TOKENS[row, :length]
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    moved = np.asarray(model(tokens, attention_mask=mask, positions=positions))
    for row, length in enumerate(lengths):
        assert relative(moved[row, LENGTH - length :], logits[row, :length]) <= 1e-6
    # Without positions they are 0 .. S-1, as in transformers' forward; rotary embeddings see only their differences.
    unmoved = np.asarray(model(tokens, attention_mask=mask))
    assert relative(unmoved[mask], moved[mask]) <= 1e-5


def test_padding_only(model):
    assert np.isfinite(np.asarray(model(TOKENS, attention_mask=0 * ONES))).all()


def test_packed_sequences_are_each_alone(model, logits):
    first, second = 5, 4
    tokens, segments = np.full_like(TOKENS, 9), np.zeros_like(TOKENS)
    tokens[0, :first], segments[0, :first] = TOKENS[0, :first], 1
    tokens[0, first : first + second], segments[0, first : first + second] = TOKENS[1, :second], 2
    # A gap of padding between, and numbers that do not count up.
    tokens[1, :second], segments[1, :second] = TOKENS[1, :second], 7
    tokens[1, 6 : 6 + first], segments[1, 6 : 6 + first] = TOKENS[0, :first], 3
    packed = np.asarray(model(tokens, segment_ids=segments))
    assert relative(packed[0, :first], logits[0, :first]) <= 1e-6
    assert relative(packed[0, first : first + second], logits[1, :second]) <= 1e-6
    assert relative(packed[1, :second], logits[1, :second]) <= 1e-6
    assert relative(packed[1, 6 : 6 + first], logits[0, :first]) <= 1e-6


def test_positions_feed_the_rotary_embedding(model, logits):
    index = np.broadcast_to(np.arange(LENGTH), TOKENS.shape)
    assert np.array_equal(np.asarray(model(TOKENS, positions=index)), logits)
    assert relative(model(TOKENS, positions=index + 50), logits) <= 1e-5
    assert relative(model(TOKENS, positions=index * 3), logits) > 1e-2


@pytest.fixture(scope="module")
def details(model) -> moejax.Forward:
    """The first row is half padding."""
    mask = ONES.copy()
    mask[0, 6:] = 0
    return model(TOKENS, attention_mask=mask, output_router_logits=True, output_hidden_states=True)


def test_outputs_have_the_shapes_of_transformers(details, logits):
    pairs = BATCH * LENGTH
    assert [(x.shape, x.dtype) for x in details.router_logits] == [((pairs, EXPERTS), np.float32)] * LAYERS
    assert [(x.shape, x.dtype) for x in details.routed_experts] == [((pairs, CHOSEN), np.int32)] * LAYERS
    assert [x.shape for x in details.hidden_states] == [(BATCH, LENGTH, WIDTH)] * (LAYERS + 1)
    assert int(details.dropped) == 0
    assert relative(np.asarray(details.logits)[1:], logits[1:]) <= 1e-6


def test_routed_experts_are_the_best_of_the_router_logits_and_none_for_padding(details):
    padding = np.zeros((BATCH, LENGTH), bool)
    padding[0, 6:] = True
    for scores, experts in zip(details.router_logits, details.routed_experts, strict=True):
        best = np.argsort(-np.asarray(scores), axis=-1, kind="stable")[:, :CHOSEN]
        assert np.array_equal(np.asarray(experts), np.where(padding.reshape(-1, 1), -1, best))


def test_rows_cut_over_ep_by_default(parallel, logits):
    cut = parallel(TOKENS)
    assert cut.sharding.spec == PartitionSpec("ep", None, "tp")
    assert relative(cut, logits) <= 1e-5


@pytest.mark.parametrize(("strategy", "hidden"), [("auto", True), ("all_to_all", False)])
def test_a_batch_that_ep_does_not_divide(parallel, logits, details, strategy: str, hidden: bool):
    """Under auto every device holds all rows; the exchange fills up with empty rows, which are cut off again."""
    tokens, mask = np.concatenate([TOKENS, TOKENS[:1]]), np.concatenate([ONES, ONES[:1]])
    mask[0, 6:] = 0
    uneven = replace(parallel, options=Options(strategy))
    out = uneven(tokens, attention_mask=mask, output_router_logits=True, output_hidden_states=hidden)
    assert out.logits.shape == (5, LENGTH, VOCAB)
    assert relative(np.asarray(out.logits)[:4], details.logits) <= 1e-5
    assert relative(np.asarray(out.logits)[4], logits[0]) <= 1e-5
    pairs = BATCH * LENGTH
    for layer in range(LAYERS):
        assert out.routed_experts[layer].shape == (pairs + LENGTH, CHOSEN)
        assert np.array_equal(np.asarray(out.routed_experts[layer])[:pairs], np.asarray(details.routed_experts[layer]))
        assert relative(np.asarray(out.router_logits[layer])[:pairs], details.router_logits[layer]) <= 1e-5
    for got, want in zip(out.hidden_states, details.hidden_states if hidden else (), strict=True):
        assert relative(np.asarray(got)[:4], want) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["ep=2,tp=4", "ep=8,tp=1", "ep=3,tp=2"])
@pytest.mark.parametrize("strategy", ["auto", "all_to_all", "all_reduce"])
def test_every_mesh_and_strategy_gives_the_same_logits(mesh, folder, logits, spec: str, strategy: str):
    model = moejax.load(folder, mesh=mesh(spec), strategy=strategy)
    for rows in (4, 3):
        assert relative(model(TOKENS[:rows]), logits[:rows]) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["all_to_all", "all_reduce"])
def test_experts_that_ep_does_not_divide(mesh, tmp_path, strategy: str):
    folder = write_checkpoint(tmp_path, RAW | {"num_local_experts": 6})
    expected = moejax.load(folder, mesh=mesh("ep=1,tp=1"))(TOKENS)
    model = moejax.load(folder, mesh=mesh("ep=4,tp=2"), strategy=strategy)
    assert model.parameters()["layers.0.moe.gate_up"].shape[0] == 8
    assert relative(model(TOKENS), expected) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["ep=1,tp=1", "ep=2,tp=2"])
def test_long_sequences_are_scored_in_blocks_of_queries(mesh, tmp_path, spec: str):
    """1500 tokens, more than two blocks: the last tokens' logits are those of the last window alone."""
    raw = RAW | {"max_position_embeddings": 2048, "sliding_window": 40}
    model = moejax.load(write_checkpoint(tmp_path, raw), mesh=mesh(spec))
    tokens = np.random.RandomState(1).randint(0, VOCAB, (2, 1500))
    # Each of the two layers looks 39 tokens back.
    reach = LAYERS * 39
    short = np.asarray(model(tokens[:, -reach - 20 :]))
    assert relative(np.asarray(model(tokens))[:, -20:], short[:, -20:]) <= 1e-5


def test_new_values_of_parameters_count_and_so_does_a_new_decoder(mesh, folder, logits):
    """The decoder is taken apart once, its values are read at each call."""
    changed, other = (moejax.load(folder, mesh=mesh("ep=1,tp=1")) for _ in range(2))
    assert np.array_equal(changed(TOKENS), other(TOKENS))
    norm = changed.decoder.norm.weight
    norm[...] = 2 * norm[...]
    doubled = np.asarray(changed(TOKENS))
    assert relative(doubled, 2 * logits) <= 1e-5
    assert changed.structure() == other.structure() and changed.structure() is changed.structure()
    other.decoder = changed.decoder
    assert np.array_equal(other(TOKENS), doubled)


def test_bad_options_of_the_blocks_are_named_at_the_first_call(parallel):
    for options, message in [
        (Options(chunks=3), "chunks=3 does not divide the 2 expert slots of a device"),
        (Options("all_reduce", capacity_factor=1.0), "capacity_factor is for strategy all_to_all"),
    ]:
        with pytest.raises(moejax.MoejaxError, match=message):
            replace(parallel, options=options)(TOKENS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_factor": -1.0}, "capacity_factor=-1.0 must be above 0"),
        ({"capacity_factor": float("nan")}, "capacity_factor=nan must be above 0"),
        ({"strategy": "all_reduce", "chunks": 0}, "chunks=0 must be at least 1"),
    ],
)
def test_options_that_fit_no_model_are_refused_before_anything_is_read(options, message):
    with pytest.raises(moejax.MoejaxError, match=message):
        moejax.load("no such model", **options)


def test_every_public_name_explains_itself():
    # Router is an alias of a type, which can carry no text.
    for name in set(moejax.__all__) - {"Router"}:
        text = getattr(moejax, name).__doc__
        # What a dataclass writes for itself starts with its signature.
        assert text and not text.startswith(f"{name}("), name


def test_packed_sequences_past_the_trained_length_of_dynamic_rope_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path, CONFIGS["mixtral_dynamic"])
    model = moejax.load(folder, mesh=moejax.make_mesh("ep=1,tp=1"))
    length = model.config.max_position_embeddings + 1
    packed = np.repeat([[1, 2]], [length, 3], axis=1)
    with pytest.raises(
        moejax.MoejaxError, match=rf"row 0 packs several sequences, one of {length} tokens; with rope scaling by length"
    ):
        model(np.ones_like(packed), segment_ids=packed)
