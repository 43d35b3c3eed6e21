"""Evaluations: every target once with the context of its row, sums that no mesh and no batching changes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from text_cases import DOCUMENTS, ids_of, write_readable, write_texts

import moejax
from moejax.data.encoder import DocumentEncoder
from moejax.errors import MoejaxError
from moejax.evaluation.evaluator import Evaluator, evaluate, evaluator_of
from moejax.evaluation.results import together
from moejax.evaluation.texts import names_of, read_texts, row_length
from moejax.families import read_config
from moejax.model import lay

LENGTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_readable(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def plain(folder, files, mesh):
    model = moejax.load(folder, mesh=mesh("ep=1,tp=1"))
    return evaluate(model, files, length=LENGTH, batch=2)


def windows(documents) -> list[list[int]]:
    """The ids of each piece of a document that lies in one row, and the target after its last one."""
    pieces, room = [], LENGTH
    for document in documents:
        ids = ids_of(document)
        start = 0
        while start < len(ids) - 1:
            count = min(room, len(ids) - 1 - start)
            pieces.append(ids[start : start + count + 1])
            start, room = start + count, room - count or LENGTH
    return pieces


@pytest.mark.parametrize(("number", "part"), [(0, slice(0, 2)), (1, slice(2, 4))])
def test_sums_are_those_of_each_piece_alone(number, part, plain, folder, mesh):
    model, result = moejax.load(folder, mesh=mesh("ep=1,tp=1")), plain[number]
    nats, targets, pairs, entropy, tokens = 0.0, 0, np.zeros((2, 8), int), np.zeros(2), 0
    pieces = windows(DOCUMENTS[part])
    rows = np.zeros((len(pieces), LENGTH), int)
    for row, piece in zip(rows, pieces, strict=True):
        row[: len(piece) - 1] = piece[:-1]
    out = model(rows, output_router_logits=True)
    log_p = np.asarray(jax.nn.log_softmax(out.logits), np.float64)
    for row, piece in enumerate(pieces):
        count = len(piece) - 1
        nats -= log_p[row, np.arange(count), piece[1:]].sum()
        targets += count
        for layer in range(2):
            within = slice(row * LENGTH, row * LENGTH + count)
            pairs[layer] += np.bincount(np.asarray(out.routed_experts[layer])[within].ravel(), minlength=8)
            router = jax.nn.log_softmax(out.router_logits[layer][within])
            entropy[layer] -= float((jnp.exp(router) * router).sum())
        tokens += count
    assert result.targets == targets == sum(len(ids_of(text)) - 1 for text in DOCUMENTS[part])
    assert result.loss == pytest.approx(nats / targets, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / targets), rel=1e-5)
    assert result.bytes == sum(len(text.encode()) for text in DOCUMENTS[part])
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / result.bytes, rel=1e-6)
    np.testing.assert_array_equal(result.tokens_per_expert, pairs)
    np.testing.assert_allclose(result.load, pairs / (2 * tokens))
    np.testing.assert_allclose(result.entropy, entropy / tokens, rtol=1e-5)
    assert result.dropped == 0


@pytest.mark.parametrize(
    ("spec", "batch", "strategy"), [("ep=4,tp=2", 3, "all_to_all"), ("ep=4,tp=2", 5, "all_reduce")]
)
def test_no_mesh_and_no_batch_changes_a_result(spec, batch, strategy, plain, folder, files, mesh):
    model = moejax.load(folder, mesh=mesh(spec), strategy=strategy)
    for one, other in zip(plain, evaluate(model, files, length=LENGTH, batch=batch), strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert (other.name, other.targets, other.bytes, other.tokens) == (one.name, one.targets, one.bytes, one.tokens)
        np.testing.assert_array_equal(other.tokens_per_expert, one.tokens_per_expert)
        np.testing.assert_allclose(other.entropy, one.entropy, rtol=1e-5)


def test_one_program_takes_all_files_and_parameters_of_a_run(plain, folder, files, mesh):
    model = moejax.load(folder, mesh=mesh("ep=1,tp=1"))
    texts = read_texts(files, DocumentEncoder.from_folder(folder), model.config)
    graph, state = model.split()

    def halved_again(params) -> moejax.model.Decoder:
        return nnx.merge(graph, jax.tree.map(lambda p: p * 2, params))

    evaluator = Evaluator(halved_again, lay(2, model.mesh, model.options), batch=2, length=LENGTH)
    ticks = []
    params = jax.tree.map(lambda p: p / 2, state)
    results = [evaluator(params, text, lambda: ticks.append(1)) for text in texts]
    assert [result.loss for result in results] == pytest.approx([result.loss for result in plain], rel=1e-6)
    assert len(ticks) == sum(map(evaluator.batches, texts))
    assert evaluator(state, texts[0]).loss != pytest.approx(plain[0].loss, rel=1e-3)
    assert evaluator._program._cache_size() == 1


def test_all_together_weighs_targets_and_bytes_alike(plain):
    total = together(plain)
    assert total.loss == pytest.approx(sum(r.loss * r.targets for r in plain) / sum(r.targets for r in plain))
    assert total.bits_per_byte * total.bytes == pytest.approx(sum(r.bits_per_byte * r.bytes for r in plain))
    np.testing.assert_allclose(total.load.sum(1), 1)


def test_files_are_named_as_briefly_as_tells_them_apart():
    assert names_of(["a/chat.valid.txt.xz", "a/code.valid.txt.xz"]) == ["chat", "code"]
    assert names_of(["a/chat.valid.txt", "a/chat.train.txt"]) == ["chat.valid.txt", "chat.train.txt"]
    assert names_of(["a/chat.txt", "b/chat.txt"]) == ["a/chat.txt", "b/chat.txt"]
    with pytest.raises(MoejaxError, match=r"a\.txt is given twice"):
        names_of(["a.txt", "b.txt", "a.txt"])


def test_rows_are_as_long_as_the_model_takes(folder):
    from tiny_configs import CONFIGS

    config = read_config(CONFIGS["mixtral_plain"])
    assert row_length(config, None) == 128
    assert row_length(config, 7) == 7
    with pytest.raises(MoejaxError, match=r"length=129 is over 128, the model's context; make it 128 at most"):
        row_length(config, 129)
    with pytest.raises(MoejaxError, match="length=0 must be at least 1"):
        row_length(config, 0)
    with pytest.raises(MoejaxError, match="is over 32, where this model's rope changes with a row's length"):
        row_length(read_config(CONFIGS["mixtral_dynamic"]), 33)


def test_mistakes(folder, files, mesh, tmp_path):
    model = moejax.load(folder, mesh=mesh("ep=1,tp=1"))
    with pytest.raises(MoejaxError, match="batch=0 must be at least 1"):
        evaluator_of(model, LENGTH, 0)
    with pytest.raises(MoejaxError, match=r"missing\.txt cannot be read"):
        evaluate(model, [tmp_path / "missing.txt"])
    small = read_config({**model.raw_config, "vocab_size": 40})
    with pytest.raises(MoejaxError, match=r"gives id \d+, but the model's vocabulary ends at 39"):
        read_texts(files, DocumentEncoder.from_folder(folder), small)
