"""The tokenizer command: what it prints and writes, and that its example runs."""

import json

import pytest

from moejax.commands import tokenizer as command
from moejax.commands.main import main
from moejax.inference.tokenizer import Tokenizer


@pytest.fixture
def files(tmp_path) -> list[str]:
    (tmp_path / "a.txt").write_text("the cat and the dog " * 20)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "é" * 50}))
    return [str(tmp_path / name) for name in ("a.txt", "b.jsonl")]


def test_the_folder_is_all_of_stdout_and_the_table_is_on_stderr(files, tmp_path, capsys):
    folder = tmp_path / "out"
    assert main(["tokenizer", "--data", *files, "--vocab-size", "270", "--out", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{folder}\n"
    assert err.splitlines()[-1] == "270 tokens"
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None and tokenizer.vocab_size == 270


def test_json(files, tmp_path, capsys):
    folder = tmp_path / "out"
    assert command.main(["--data", *files, "--vocab-size", "270", "--out", str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["folder"], result["vocab_size"]) == (str(folder), 270)
    assert [(file["path"], file["bytes"]) for file in result["files"]] == [(files[0], 400), (files[1], 100)]
    assert all(file["bytes_per_token"] == file["bytes"] / file["tokens"] > 1 for file in result["files"])


def test_the_example_in_the_help_runs(tmp_path, capsys):
    assert command.main(["--help"]) == 0
    words = capsys.readouterr().out.splitlines()[-1].split()
    assert words[:2] == ["moejax", "tokenizer"]
    assert command.main([*words[2:-1], str(tmp_path / "out")]) == 0


def test_mistakes_are_one_line_and_nothing_is_written(files, tmp_path, capsys):
    out = tmp_path / "out"
    for data, message in (("missing.txt", "missing.txt cannot be read"), (str(tmp_path), "is a folder")):
        assert command.main(["--data", files[0], data, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
        assert not out.exists()
    out.mkdir()
    (out / "tokenizer.json").write_text("{}")
    assert command.main(["--data", files[0], "--out", str(out)]) == 2
    assert "has a tokenizer.json already" in capsys.readouterr().err
    assert (out / "tokenizer.json").read_text() == "{}"
