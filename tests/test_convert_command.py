"""The convert command: the same tensors there and back, a run's weights from any mesh, in little memory."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file
from tiny import write_checkpoint
from tiny_configs import CONFIGS

import moejax
from moejax.benchmarks.random_weights import write_random_checkpoint
from moejax.commands import convert
from moejax.run_checkpoints.checkpoints import Checkpoints
from moejax.training.state import TrainState

# 6 experts of width 19, 6 heads on 1 key/value head, vocabulary 131: no mesh divides them.
RAW = CONFIGS["qwen3_yarn"] | {"num_hidden_layers": 2}


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same_tensors(got: Path, want: Path) -> None:
    a, b = tensors(got), tensors(want)
    assert a.keys() == b.keys()
    for name in b:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.fixture
def mixed(tmp_path):
    """A bfloat16 checkpoint with float32 routers, some companions, and a config in the hub's spelling."""
    folder = write_checkpoint(tmp_path / "mixed", RAW, dtype="bfloat16")
    values = load_file(folder / "model.safetensors")
    values |= {name: value.astype(np.float32) for name, value in values.items() if name.endswith("mlp.gate.weight")}
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(Path(moejax.__file__).parent / "demo" / "tokenizer.json", folder / "tokenizer.json")
    return folder


def test_there_and_back_gives_the_same_bytes(mixed, tmp_path, capsys):
    run, back = tmp_path / "run", tmp_path / "back"
    assert convert.main([str(mixed), str(run), "--to", "orbax"]) == 0
    assert capsys.readouterr().out == f"{run}\n"
    assert convert.main([str(run), str(back), "--to", "hf", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["folder"], result["layout"], result["step"], result["dtype"]) == (str(back), "hf", 0, "mixed")
    assert result["bytes"] == sum(value.nbytes for value in tensors(mixed).values())
    assert result["parameters"] == sum(value.size for value in tensors(mixed).values())
    assert_same_tensors(back, mixed)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (back / name).read_bytes() == (mixed / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "mixed", "run"]


@pytest.fixture(scope="module")
def run(mesh, tmp_path_factory):
    """A run's folder with steps 3 and 20, saved on ep=4,tp=2, and the model of step 20."""
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder / "start", RAW, dtype="bfloat16")
    model = moejax.load(folder / "start", mesh=mesh("ep=4,tp=2"), dtype="float32")
    with Checkpoints(folder / "checkpoints", keep_last=2) as checkpoints:
        for step in (3, 20):
            params = {role: jax.device_put(np.asarray(p) + step, p.sharding) for role, p in model.parameters().items()}
            state = TrainState.of(params, optax.adamw(1e-3), model.mesh)
            checkpoints.save(step, state, model.config, model.mesh)
    (folder / "model").mkdir()
    shutil.copyfile(folder / "start" / "config.json", folder / "model" / "config.json")
    return folder


@pytest.mark.parametrize(("source", "step"), [("", 20), ("checkpoints/3", 3)])
def test_a_run_s_weights_come_in_the_config_s_dtype(source, step, run, tmp_path, capsys):
    assert convert.main([str(run / source), str(tmp_path / "hf"), "--to", "hf", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["step"], result["dtype"]) == (step, "bfloat16")
    for name, start in tensors(run / "start").items():
        want = (start.astype(np.float32) + step).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(tensors(tmp_path / "hf")[name], want, err_msg=name)


def test_dtype_is_that_of_the_weights_and_of_the_config(run, tmp_path, capsys):
    assert convert.main([str(run), str(tmp_path / "hf"), "--to", "hf", "--dtype", "float32"]) == 0
    assert {value.dtype for value in tensors(tmp_path / "hf").values()} == {np.dtype(np.float32)}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "float32"
    assert moejax.load(tmp_path / "hf").parameters()["embed"].dtype == jnp.float32


def test_values_beyond_float16_are_refused(mixed, tmp_path, capsys):
    values = load_file(mixed / "model.safetensors")
    values["model.norm.weight"] = np.full_like(values["model.norm.weight"], 1e5)
    save_file(values, mixed / "model.safetensors", metadata={"format": "pt"})
    assert convert.main([str(mixed), str(tmp_path / "run"), "--to", "orbax"]) == 0
    assert convert.main([str(tmp_path / "run"), str(tmp_path / "hf"), "--to", "hf", "--dtype", "float16"]) == 2
    assert "error: model.norm.weight has values beyond float16's range (65504)" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixed", "run"]


def test_the_example_in_the_help_runs(tmp_path, capsys):
    assert convert.main(["--help"]) == 0
    words = capsys.readouterr().out.splitlines()[-1].split()
    assert words[:2] == ["moejax", "convert"]
    assert convert.main([str(tmp_path / "run") if "/" in word else word for word in words[2:]]) == 0
    assert convert.main([str(tmp_path / "run"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert_same_tensors(tmp_path / "hf", Path(moejax.__file__).parent / "demo")


def test_mistakes_are_one_line_and_leave_nothing(run, mixed, tmp_path, capsys):
    def refused(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert convert.main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n"), sorted(tmp_path.rglob("*"))) == ("", 1, before)
        return err

    target = tmp_path / "target"
    assert "is no run and no checkpoint of one" in refused(mixed, target, "--to", "hf")
    assert "is a run's already" in refused(run, target, "--to", "orbax")
    assert "--dtype goes with --to hf" in refused(mixed, target, "--to", "orbax", "--dtype", "float16")
    assert "there is no folder 'nowhere'" in refused("nowhere", target, "--to", "orbax")
    assert "exists already" in refused(mixed, mixed, "--to", "orbax")
    assert "exists already" in refused(run, mixed, "--to", "hf")
    assert "there is no checkpoint" in refused(run / "checkpoints" / "4", target, "--to", "hf")
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    assert "has no checkpoint yet" in refused(tmp_path / "new", target, "--to", "hf")
    damaged = shutil.copytree(run, tmp_path / "damaged")
    next((damaged / "checkpoints" / "20" / "state" / "d").iterdir()).unlink()
    assert "is missing; remove" in refused(damaged, target, "--to", "hf")
    (mixed / "model.safetensors").write_bytes((mixed / "model.safetensors").read_bytes()[:-8])
    assert "is truncated" in refused(mixed, target, "--to", "orbax")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(run_cli, tmp_path):
    """A model of 1.2 GB; its largest parameter has 17 MB."""
    (tmp_path / "hf").mkdir()
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 42, "vocab_size": 16000}
    write_random_checkpoint(tmp_path / "hf", CONFIGS["mixtral_plain"] | sizes, "bfloat16")
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size > 1.1e9
    for source, target, layout in (("hf", "run", "orbax"), ("run", "back", "hf")):
        arguments = ["moejax.convert", str(tmp_path / source), str(tmp_path / target), "--to", layout, "--json"]
        result = run_cli(arguments, timeout=600)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["peak_rss_bytes"] < 650e6
    assert (tmp_path / "back" / "model.safetensors").stat().st_size > 1.1e9
    assert_same_tensors(tmp_path / "back", tmp_path / "hf")
