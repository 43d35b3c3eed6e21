"""The eval command: its JSON, its tables, its picture, and mistakes in one line."""

import json
from pathlib import Path

import pytest
from text_cases import write_readable, write_texts

from moejax.commands import eval as command
from moejax.commands.main import main

ROOT = Path(__file__).parents[1]
HERE = ["--platform", "cpu", "--mesh", "ep=1,tp=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_readable(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return [str(path) for path in write_texts(tmp_path_factory.mktemp("texts"))]


def test_json_tables_and_picture(folder, files, tmp_path, capsys):
    picture = tmp_path / "load.svg"
    arguments = ["--model", str(folder), "--data", *files, "--length", "32", "--batch", "2", *HERE]
    assert main(["eval", *arguments, "--json", "--plot", str(picture)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["mesh"] == {"ep": 1, "tp": 1}
    assert (result["length"], result["batch"], result["dtype"], result["layers"]) == (32, 2, "float32", [0, 1])
    assert [(file["name"], file["path"]) for file in result["files"]] == [("plain", files[0]), ("rows", files[1])]
    for part in (*result["files"], result["all"]):
        assert [len(load) for load in part["load"]] == [8, 8]
        assert part["load_max_over_mean"] == pytest.approx([8 * max(load) for load in part["load"]])
        assert len(part["router_entropy"]) == 2
    assert result["all"]["targets"] == sum(file["targets"] for file in result["files"])
    assert result["bits_per_byte"] == {file["name"]: file["bits_per_byte"] for file in result["files"]}
    assert picture.read_text().count('class="title"') == 2

    assert command.main(arguments) == 0
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["file", "loss", "perplexity", "bits/byte", "targets", "bytes"]
    assert [line[:2] for line in lines[2:5]] == [
        [part["name"], f"{part['loss']:.4f}"] for part in (*result["files"], result["all"])
    ]
    assert ["layer", "plain", "rows"] in lines
    ratio = result["files"][0]["load_max_over_mean"][1]
    assert lines[-1][0] == "1" and lines[-1][2] == f"{ratio:.2f}x"
    assert len(err.splitlines()) == 4


def test_the_example_in_the_help_runs(capsys, monkeypatch):
    assert command.main(["--help"]) == 0
    words = capsys.readouterr().out.splitlines()[-1].split()
    assert words[:2] == ["moejax", "eval"]
    monkeypatch.chdir(ROOT)
    assert command.main([*words[2:], "--length", "64", "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["all"]["bits_per_byte"] < 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "missing.txt"], "missing.txt cannot be read"),
        (["--data", "README.md", "README.md"], "README.md is given twice"),
        (["--data", "README.md", "--length", "99999"], "length=99999 is over "),
        (["--data", "README.md", "--batch", "0"], "batch=0 must be at least 1"),
        (["--data", "README.md", "--plot", "load.png"], "--plot load.png must end in .svg"),
        (["--data", "README.md", "--plot", "nowhere/load.svg"], "--plot nowhere/load.svg: there is no folder nowhere"),
        (["--model", "missing", "--data", "README.md"], "there is no folder 'missing'"),
        ([], "the following arguments are required: --data"),
    ],
)
def test_mistakes_are_one_line(options, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert command.main([*options, "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and message in err
