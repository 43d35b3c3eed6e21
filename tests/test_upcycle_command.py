"""The upcycle command: what it prints and writes, and that its example runs."""

import json

import pytest
from dense_cases import write_dense

from moejax.checkpoint.source import read_json
from moejax.commands import upcycle
from moejax.commands.main import main


def test_a_dense_folder_becomes_a_mixture_whose_name_is_all_of_stdout(tmp_path, capsys):
    source = write_dense(tmp_path / "dense", "llama_hub", model_name="x", output_router_logits=True)
    folder = tmp_path / "moe"
    assert main(["upcycle", str(source), str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{folder}\n"
    assert err.splitlines() == [
        "dropped   model_name: a llama model does not read it",
        "dropped   output_router_logits: of no use to a dense model",
        "dropped   attention_bias: mixtral has no such option; it was off",
        "mixtral, 74,400 parameters, 298 kB",
    ]
    config = read_json(folder, "config.json")
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (8, 2)
    assert "output_router_logits" not in config


def test_json_and_options(tmp_path, capsys):
    source = write_dense(tmp_path / "dense", "qwen3_bare")
    arguments = [str(source), str(tmp_path / "moe"), "--experts", "4", "--top-k", "3", "--noise", "0.1", "--json"]
    assert upcycle.main([*arguments, "--seed", "1", "--dtype", "bfloat16"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["folder", "model_type", "parameters", "bytes", "dropped"]
    assert result["model_type"] == "qwen3_moe" and result["bytes"] == 2 * result["parameters"]
    config = read_json(tmp_path / "moe", "config.json")
    assert (config["num_experts"], config["num_experts_per_tok"], config["dtype"]) == (4, 3, "bfloat16")


def test_the_example_in_the_help_runs(tmp_path, monkeypatch, capsys):
    """With a tiny model in the hub's cache under the name that it gives."""
    assert upcycle.main(["--help"]) == 0
    words = capsys.readouterr().out.splitlines()[-1].split()
    assert words[:2] == ["moejax", "upcycle"]
    repository = tmp_path / "hub" / f"models--{words[2].replace('/', '--')}"
    write_dense(repository / "snapshots" / "abc", "qwen3_bare")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert upcycle.main([words[2], str(tmp_path / "moe"), *words[4:]]) == 0
    assert read_json(tmp_path / "moe", "config.json")["model_type"] == "qwen3_moe"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("missing", "there is no folder 'missing'"),
        ("demo", "model_type='qwen3_moe' cannot be upcycled; dense models of"),
    ],
)
def test_mistakes_are_one_line(model: str, message: str, tmp_path, capsys):
    assert upcycle.main([model, str(tmp_path / "moe")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
