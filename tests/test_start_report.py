"""The start-up report: its four lines, the bytes they count, and what --explain adds."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import CONFIGS, write_checkpoint

from moejax.language_model import LanguageModel
from moejax.loading import load
from moejax.start_report import bytes_by_class, explain_lines, human_bytes, report_lines, training_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mixtral"), CONFIGS["mixtral_plain"])


def lines(folder: Path, mesh: jax.sharding.Mesh, batch: int, **options: object) -> list[str]:
    return report_lines(load(folder, mesh=mesh, **options), batch)  # type: ignore[arg-type]


def test_four_lines_say_how_the_model_lies_on_the_mesh(folder: Path, mesh: Callable[[str], jax.sharding.Mesh]):
    # Experts: 8 of 3 x 32 x 48 in 2 layers; attention: 4 x 32 x 32 a layer; embedding and head: 96 x 32 each; other: a
    # router of 32 x 8 and two norms a layer, and the last norm. Four bytes each; ep cuts experts, tp all but other.
    whole = np.array([2 * 8 * 3 * 32 * 48, 2 * 4 * 32 * 32, 2 * 96 * 32, 2 * (32 * 8 + 2 * 32) + 32]) * 4
    experts, attention, embedding, other = map(human_bytes, whole / [8, 2, 2, 1])
    part = human_bytes((whole / [8, 2, 2, 1]).sum())
    assert lines(folder, mesh("ep=4,tp=2"), 8) == [
        "mesh      ep=4,tp=2 on 8 virtual cpu devices: 8 experts in 2 slots a device, 24 of 48 hidden columns each",
        "strategy  all_to_all for prefill and decode of 8 sequences: 8 rows are cut over ep=4, so tokens travel to "
        "their experts",
        "attention data parallel 4 x tensor parallel 2: 4 of 8 heads over 4 of 8 key/value heads a device",
        f"memory    {part} of {human_bytes(whole.sum())} parameters a device: experts {experts}, attention "
        f"{attention}, embedding {embedding}, other {other}",
    ]


def test_empty_slots_empty_rows_and_one_sequence_are_named(
    tmp_path: Path, mesh: Callable[[str], jax.sharding.Mesh], folder: Path
):
    six = write_checkpoint(tmp_path, CONFIGS["mixtral_dynamic"])
    assert lines(six, mesh("ep=4"), 1)[0] == (
        "mesh      ep=4,tp=1 on 4 virtual cpu devices: 6 experts in 2 slots a device (2 of 8 slots empty), "
        "37 of 37 hidden columns each"
    )
    padded = lines(folder, mesh("ep=4"), 1, strategy="all_to_all")[1]
    assert padded == ("strategy  all_to_all for prefill and decode of 1 sequence: asked for, 3 empty rows fill it up")
    assert lines(folder, mesh("ep=4"), 3, strategy="all_reduce")[1] == (
        "strategy  all_reduce for prefill and decode of 3 sequences: asked for"
    )


def test_a_model_without_experts_says_so(tmp_path: Path, mesh: Callable[[str], jax.sharding.Mesh]):
    raw = CONFIGS["qwen3_yarn"] | {"num_hidden_layers": 1, "mlp_only_layers": [0]}
    model = load(write_checkpoint(tmp_path, raw), mesh=mesh("ep=2,tp=2"))
    assert report_lines(model, 1)[0] == "mesh      ep=2,tp=2 on 4 virtual cpu devices; no layer has experts"
    assert explain_lines(model, 1, 16) == ["explain   no layer has experts, so there is nothing to exchange"]


def test_the_classes_hold_every_byte_and_the_fullest_device(folder: Path, mesh: Callable[[str], jax.sharding.Mesh]):
    model = load(folder, mesh=mesh("ep=2,tp=4"))
    classes = bytes_by_class(model.parameters().items())
    assert sum(whole for whole, _ in classes.values()) == sum(a.nbytes for a in model.parameters().values())
    held = [
        sum(a.addressable_data(i).nbytes for a in model.parameters().values()) for i in range(model.mesh.devices.size)
    ]
    assert sum(part for _, part in classes.values()) == max(held)


def explain(model: LanguageModel) -> list[str]:
    return explain_lines(model, 4, 16)


def test_explain_counts_the_bytes_of_one_layer(folder: Path, mesh: Callable[[str], jax.sharding.Mesh]):
    replicated = load(folder, mesh=mesh("ep=4,tp=2"), strategy="all_reduce")
    assert explain(replicated) == [
        "explain   prefill of 4 x 16 tokens, a layer: one all-reduce of 8.19 kB, each device computing its own "
        "experts' pairs",
        "explain   decode of 4 x 1 tokens, a layer: one all-reduce of 512 B, each device computing its own experts' "
        "pairs",
    ]
    # A device's 16 tokens choose 2 experts each: 8 pairs a receiver on average, 12 rows with the usual half more. There
    # and back, 4 cells of 12 rows of 16 of the 32 columns of 4 bytes; one token: a cell of one row.
    travelling = load(folder, mesh=mesh("ep=4,tp=2"), strategy="all_to_all")
    assert explain(travelling) == [
        f"explain   prefill of 4 x 16 tokens, a layer: cells of 12 rows, {human_bytes(2 * 4 * 12 * 16 * 4)} over ep "
        "there and back, repeated until nothing is left",
        f"explain   decode of 4 x 1 tokens, a layer: cells of 1 row, {human_bytes(2 * 4 * 1 * 16 * 4)} over ep there "
        "and back, repeated until nothing is left",
    ]
    dropping = load(folder, mesh=mesh("ep=4,tp=2"), capacity_factor=1.0)
    assert explain(dropping)[0].endswith(" over ep there and back, what does not fit is dropped")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (16_345_000, "16.3 MB"), (2.5e9, "2.5 GB"), (7e12, "7 TB")],
)
def test_bytes_for_people(count: float, text: str):
    assert human_bytes(count) == text


def test_before_training_it_counts_weights_and_optimizer(folder: Path, mesh: Callable[[str], jax.sharding.Mesh]):
    model = load(folder, mesh=mesh("ep=4,tp=2"))
    state = [*model.parameters().items()] * 3
    lines = training_lines(model, 16, 2, state)
    assert [line.split()[0] for line in lines] == ["mesh", "strategy", "attention", "memory"]
    assert "for steps of 2 times 8 sequences" in lines[1]
    whole = sum(array.nbytes for _, array in state)
    assert f"of {human_bytes(whole)} weights and optimizer in float32 a device: experts" in lines[3]
    assert "for steps of 7 sequences" in training_lines(model, 7, 1, state)[1]
