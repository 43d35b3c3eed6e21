"""What training reads: epochs that hold every target once, weights, shares of processes, and exact resumption."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from data_cases import CHATML, byte_encoder

from moejax.data.pipeline import TrainingData
from moejax.data.sources import Source, short_name
from moejax.errors import MoejaxError
from moejax.training.batch import Batch

LENGTH = 16


@pytest.fixture
def encoder(tmp_path):
    return byte_encoder(tmp_path / "tokenizer", CHATML)


def text_file(path: Path, letters: str, documents: int, seed: int = 0) -> str:
    """Documents of different lengths, of these letters alone."""
    random = np.random.default_rng(seed)
    texts = ["".join(random.choice(list(letters), size)) for size in random.integers(1, 50, documents)]
    path.write_text("\n<|endoftext|>\n".join([*texts, ""]))
    return str(path)


def opened(sources: Sequence[Source], encoder, tmp_path, **options) -> TrainingData:
    return TrainingData(
        sources, encoder, **{"batch": 4, "length": LENGTH, "seed": 1, "cache": tmp_path / "cache"} | options
    )


def take(data: TrainingData, count: int) -> list[np.ndarray]:
    """Each batch as int32 [4, B, S]."""
    return [np.stack([b.tokens, b.targets, b.segments, b.positions]) for b in (next(data) for _ in range(count))]


def pairs(batches: Sequence[np.ndarray]) -> dict[tuple[int, int], int]:
    """How often each token is followed by each target."""
    found = np.concatenate([batch[:2].reshape(2, -1) for batch in batches], axis=1)
    found = found[:, found[1] >= 0]
    kinds, counts = np.unique(found, axis=1, return_counts=True)
    return {(int(a), int(b)): int(n) for (a, b), n in zip(kinds.T, counts, strict=True)}


def test_an_epoch_has_every_target_once_and_the_next_another_order(encoder, tmp_path):
    source = Source(text_file(tmp_path / "a.txt", "abcdef", 60))
    data = opened([source], encoder, tmp_path, batch=1)
    (corpus,) = data.corpora
    rows = -(-corpus.targets // LENGTH)
    assert 60 < rows < 150
    expected: dict[tuple[int, int], int] = {}
    starts = [0, *corpus.ends[:-1].tolist()]
    for start, end in zip(starts, corpus.ends.tolist(), strict=True):
        tokens = corpus.tokens[start:end].tolist()
        for pair in pairwise(tokens):
            expected[pair] = expected.get(pair, 0) + 1
    epochs = [take(data, rows) for _ in range(3)]
    for epoch in epochs:
        assert pairs(epoch) == expected
    tokens = [np.concatenate(epoch, axis=1)[0] for epoch in epochs]
    assert not (tokens[0] == tokens[1]).all() and not (tokens[1] == tokens[2]).all()
    # Documents are packed in another order too: the rows themselves differ.
    assert {row.tobytes() for row in tokens[0]} != {row.tobytes() for row in tokens[1]}


def test_a_file_smaller_than_a_row_is_read_again_and_again(encoder, tmp_path):
    (tmp_path / "a.txt").write_text("hi")
    data = opened([Source(str(tmp_path / "a.txt"))], encoder, tmp_path)
    batch = next(data)
    assert isinstance(batch, Batch)
    assert (batch.tokens[:, :3] == batch.tokens[0, :3]).all()
    assert ((batch.targets >= 0).sum(1) == 3).all()
    assert data.bytes_per_token == 2 / 3


def test_weights_are_shares_of_the_rows(encoder, tmp_path):
    sources = [
        Source(text_file(tmp_path / "a.txt", "a", 50), weight=1),
        Source(text_file(tmp_path / "b.txt", "b", 5), weight=0.5),
        Source(text_file(tmp_path / "c.txt", "c", 500), weight=3),
    ]
    data = opened(sources, encoder, tmp_path, batch=9)
    rows = np.concatenate(take(data, 40), axis=1)[0]
    ids = [encoder.tokenizer.encode_texts([letter])[0][0] for letter in "abc"]
    shares = [int((rows == index).any(1).sum()) for index in ids]
    assert shares == [80, 40, 240]
    rates = [corpus.bytes / corpus.targets for corpus in data.corpora]
    assert data.bytes_per_token == pytest.approx((rates[0] + 0.5 * rates[1] + 3 * rates[2]) / 4.5)


def test_the_seed_alone_decides(encoder, tmp_path):
    sources = [Source(text_file(tmp_path / f"{name}.txt", name, 50)) for name in ("ab", "cd")]
    one, same, other = (np.stack(take(opened(sources, encoder, tmp_path, seed=s), 6)) for s in (1, 1, 2))
    assert (one == same).all()
    assert not (one == other).all()


def test_processes_read_their_parts_of_the_same_batches(encoder, tmp_path):
    sources = [Source(text_file(tmp_path / f"{name}.txt", name, 50)) for name in ("ab", "cd")]
    whole = np.stack(take(opened(sources, encoder, tmp_path), 6))
    for count in (2, 4):
        parts = [
            np.stack(take(opened(sources, encoder, tmp_path, process_index=i, process_count=count), 6))
            for i in range(count)
        ]
        assert {part.shape for part in parts} == {(6, 4, 4 // count, LENGTH)}
        assert (np.concatenate(parts, axis=2) == whole).all()


@pytest.mark.parametrize("done", [0, 1, 37])
def test_resumption_is_exact_with_any_number_of_processes(done: int, encoder, tmp_path):
    sources = [Source(text_file(tmp_path / f"{name}.txt", name, 20), weight=len(name)) for name in ("ab", "c")]
    data = opened(sources, encoder, tmp_path)
    take(data, done)
    state = json.loads(json.dumps(data.state()))
    assert state["rows"] == 4 * done
    rest = np.stack(take(data, 30))
    resumed = opened(sources, encoder, tmp_path)
    take(resumed, 2)
    resumed.restore(state)
    assert (np.stack(take(resumed, 30)) == rest).all()
    assert resumed.state() == data.state()
    parts = []
    for i in range(2):
        part = opened(sources, encoder, tmp_path, process_index=i, process_count=2)
        part.restore(state)
        parts.append(np.stack(take(part, 30)))
        assert part.state() == data.state()
    assert (np.concatenate(parts, axis=2) == rest).all()


def test_a_batch_of_another_size_goes_on_with_the_next_row(encoder, tmp_path):
    sources = [Source(text_file(tmp_path / "ab.txt", "ab", 40))]
    data = opened(sources, encoder, tmp_path)
    take(data, 3)
    larger = opened(sources, encoder, tmp_path, batch=8)
    larger.restore(data.state())
    assert (take(larger, 1)[0] == np.concatenate(take(data, 2), axis=1)).all()


def test_the_state_of_other_data_is_refused(encoder, tmp_path):
    path = text_file(tmp_path / "ab.txt", "ab", 20)
    state = opened([Source(path)], encoder, tmp_path).state()
    for options in ({"seed": 2}, {"length": 8}):
        with pytest.raises(MoejaxError, match=f"not that of the run: its {next(iter(options))} was "):
            opened([Source(path)], encoder, tmp_path, **options).restore(state)
    for sources in ([Source(path, weight=2)], [Source(path), Source(path)]):
        with pytest.raises(MoejaxError, match="not that of the run: its sources was "):
            opened(sources, encoder, tmp_path).restore(state)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = elsewhere / "ab.txt"
    moved.write_bytes(Path(path).read_bytes())
    opened([Source(str(moved))], encoder, tmp_path).restore(state)
    moved.write_text("ab")
    with pytest.raises(MoejaxError, match="not that of the run: its sources was "):
        opened([Source(str(moved))], encoder, tmp_path).restore(state)


def test_only_answers_of_conversations_are_targets(encoder, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "?" * n}, {"role": "assistant", "content": "y" * (n % 7 + 1)}]}
        for n in range(1, 40)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = opened([Source(str(tmp_path / "a.jsonl"))], encoder, tmp_path, batch=1)
    (corpus,) = data.corpora
    places = int(corpus.tokens.size - corpus.ends.size)
    batches = take(data, -(-places // LENGTH))
    targets = np.concatenate(batches, axis=1)[1]
    answers = "".join("y" * (n % 7 + 1) for n in range(1, 40))
    text = encoder.tokenizer.decode(targets[targets >= 0].tolist(), skip_special=False)
    assert text.count("y") == len(answers)
    assert text.count("<|im_end|>") == text.count("\n") == 39
    assert "?" not in text and "<|im_start|>" not in text


def test_progress_covers_all_files(encoder, tmp_path):
    sources = [Source(text_file(tmp_path / f"{name}.txt", name, 20)) for name in ("ab", "c")]
    total = sum(Path(source.path).stat().st_size for source in sources)
    seen: list[tuple[int, int]] = []
    opened(sources, encoder, tmp_path, progress=lambda *parts: seen.append(parts))
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    assert {whole for _, whole in seen} == {total}


def test_mistakes(encoder, tmp_path):
    path = text_file(tmp_path / "ab.txt", "ab", 20)
    with pytest.raises(MoejaxError, match="no file; name at least one"):
        opened([], encoder, tmp_path)
    with pytest.raises(MoejaxError, match="a batch of 4 rows does not divide among 3 processes"):
        opened([Source(path)], encoder, tmp_path, process_count=3)
    with pytest.raises(MoejaxError, match=r"missing\.txt cannot be read"):
        opened([Source(path), Source(str(tmp_path / "missing.txt"))], encoder, tmp_path)
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(MoejaxError, match=f"weight {weight} must be above 0"):
            Source(path, weight)


def test_names_of_sources():
    assert Source("data/chat.train.txt.xz").name == "chat"
    assert Source("a", name="b").name == "b"
    names = {"a.b.jsonl.gz": "a.b", "x.py": "x.py", ".txt": ".txt", "code.valid.txt": "code"}
    assert {path: short_name(path) for path in names} == names
