"""The twin command: what it prints and writes, and that its example runs."""

import json
from pathlib import Path

import pytest

from moejax.checkpoint.source import read_json
from moejax.commands import twin
from moejax.commands.main import main
from moejax.opening import Checkpoint

MODELS = Path(__file__).parents[1] / "configs" / "models"


def test_a_config_file_becomes_a_folder_whose_name_is_all_of_stdout(tmp_path, capsys):
    folder = tmp_path / "twin"
    assert main(["twin", str(MODELS / "qwen3-30b-a3b" / "config.json"), str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{folder}\n"
    rows = [line.split() for line in err.splitlines()]
    assert rows[0] == ["field", "before", "after"]
    assert ["num_experts", "128", "8"] in rows
    assert err.splitlines()[-1].endswith(" kB")
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.config.num_experts == 8


def test_json_seed_and_dtype(tmp_path, capsys):
    files = []
    for seed in ("1", "1", "2"):
        folder = tmp_path / f"twin{len(files)}"
        arguments = [str(MODELS / "mixtral-8x7b"), str(folder), "--json", "--seed", seed, "--dtype", "bfloat16"]
        assert twin.main(arguments) == 0
        result = json.loads(capsys.readouterr().out)
        assert list(result) == ["folder", "model_type", "parameters", "bytes"]
        assert result["folder"] == str(folder)
        assert result["model_type"] == "mixtral"
        assert result["bytes"] == 2 * result["parameters"]
        assert read_json(folder, "config.json")["torch_dtype"] == "bfloat16"
        files.append((folder / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_the_example_in_the_help_runs(tmp_path, capsys):
    assert twin.main(["--help"]) == 0
    words = capsys.readouterr().out.splitlines()[-1].split()
    assert words[:2] == ["moejax", "twin"]
    assert twin.main([*words[2:-1], str(tmp_path / "twin")]) == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("missing", "there is no folder 'missing'"),
        (str(MODELS), "has no config.json"),
    ],
)
def test_mistakes_are_one_line(config: str, message: str, tmp_path, capsys):
    assert twin.main([config, str(tmp_path / "twin")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "twin").exists()
