"""Sinks: lines that survive a kill, event files that TensorBoard reads, and resuming in the middle of both."""

import json
import struct
from pathlib import Path

import pytest

from moejax.errors import MoejaxError
from moejax.training.sinks import JsonLines, TensorBoard, read_records


def record(step: int, **more) -> dict:
    return {"step": step, "loss": 1 / step, **more}


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of all events; a file holds length, checksum, event and checksum one after another."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.glob("events.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 16 + size
    return found


def test_lines_are_there_at_once_and_go_on_where_the_run_resumes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, after=0)
    for step in (1, 2, 3):
        sink.write(record(step, bad=float("nan"), load=[0.5, 0.5]))
        assert json.loads(path.read_text().splitlines()[-1]) == record(step, bad=None, load=[0.5, 0.5])
    sink.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [one["step"] for one in read_records(path)] == [1, 2, 3]
    sink = JsonLines(path, after=2)
    sink.write(record(3, again=True))
    sink.close()
    assert [(one["step"], "again" in one) for one in read_records(path)] == [(1, False), (2, False), (3, True)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_begins_anew_drops_all_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    JsonLines(path, after=0).close()
    assert path.read_text() == ""


def test_a_file_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    with pytest.raises(MoejaxError, match="cannot write"):
        JsonLines(tmp_path / "none" / "metrics.jsonl", after=0)


def test_event_files_hold_the_numbers(tmp_path):
    sink = TensorBoard(tmp_path, after=0)
    sink.write(record(1, **{"router/entropy/layer_00": 2.0, "router/load/layer_00": [1.0], "bad": float("inf")}))
    sink.write(record(2))
    sink.close()
    assert scalars(tmp_path) == [(1, "loss", 1.0), (1, "router/entropy/layer_00", 2.0), (2, "loss", 0.5)]
