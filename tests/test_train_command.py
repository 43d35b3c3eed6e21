"""The train command: one run on every mesh, stopped and resumed to the bit, and what it says of mistakes."""

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import write_checkpoint
from tiny_configs import CONFIGS

import moejax
from moejax.commands import train
from moejax.commands.main import main
from moejax.commands.train_progress import LiveProgress
from moejax.training.sinks import read_records

RECIPE = """
steps = 40
dtype = "float32"
[model]
config = "{model}/config.json"
[data]
batch = 8
length = 16
root = "{root}"
mixture = [{{ path = "alice.txt", weight = 2 }}, {{ path = "bob.jsonl" }}]
[optimizer]
lr = 1e-2
warmup = 4
[losses]
z_weight = 1e-3
[checkpoint]
every = 100
[eval]
data = ["alice.txt"]
"""
WORDS = "the king said that his house stood by the sea and all the people came to see it".split()


OWN_FUNCTIONS = """
import jax.numpy as jnp
from moejax import Routing

def seven(views):
    return jnp.float32(7)

def last_experts(logits):
    experts = jnp.broadcast_to(jnp.array([6, 7], jnp.int32), (*logits.shape[:-1], 2))
    return Routing(weights=jnp.full(experts.shape, 0.5, jnp.float32), experts=experts)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A recipe, a model folder with the demo's tokenizer, and two small files of text."""
    root = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 30)) for _ in range(40)]
    (root / "alice.txt").write_text("".join(f"{text}\n<|endoftext|>\n" for text in texts[:30]))
    (root / "bob.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[30:]))
    model = write_checkpoint(root / "model", CONFIGS["mixtral_plain"] | {"vocab_size": 4096})
    (model / "tokenizer.json").write_bytes((Path(moejax.__file__).parent / "demo" / "tokenizer.json").read_bytes())
    (root / "recipe.toml").write_text(RECIPE.format(model=model, root=root))
    return root


def trained(files: Path, run: Path, *argv: str) -> int:
    return main(["train", "--config", str(files / "recipe.toml"), "--run", str(run), *argv])


def losses(run: Path) -> dict[int, float]:
    records = read_records(run / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return {record["step"]: record["loss"] for record in records}


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> Path:
    """Ten steps on one device without a break."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert trained(files, run, "--mesh", "ep=1,tp=1", "--steps", "10") == 0
    return run


def compare(run: Path, whole: Path) -> None:
    want, got = losses(whole), losses(run)
    assert got.keys() == want.keys()
    assert max(abs(got[step] / want[step] - 1) for step in want) < 1e-5
    assert got[10] < got[1] - 0.3


def test_records_have_the_names_of_the_schema(whole):
    records = read_records(whole / "metrics.jsonl")
    assert list(records[0]) == [
        *("step", "loss", "tokens_per_s", "tokens", "seconds", "learning_rate", "grad_norm"),
        *("balance_loss", "z_loss", "dropped", "skipped"),
        *(f"router/{name}/layer_{i:02}" for i in (0, 1) for name in ("load_max_over_mean", "entropy", "load")),
    ]
    assert [record["learning_rate"] for record in records[:6]] == pytest.approx(
        [0, 0.0025, 0.005, 0.0075, 0.01, 0.01], rel=1e-2
    )
    assert records[-1]["tokens"] == sum(round(r["tokens_per_s"] * r["seconds"]) for r in records)
    for record in records:
        assert sum(record["router/load/layer_01"]) == pytest.approx(1, abs=1e-4)
        assert record["router/load_max_over_mean/layer_01"] == pytest.approx(
            8 * max(record["router/load/layer_01"]), rel=1e-4
        )
        assert 0 < record["router/entropy/layer_00"] < math.log(8)
        assert record["dropped"] == record["skipped"] == 0
    assert list((whole / "tensorboard").glob("events.*"))


def test_a_run_that_is_stopped_goes_on_to_the_bit(files, whole, tmp_path, capsys):
    run = tmp_path / "stopped"
    assert trained(files, run, "--mesh", "ep=1,tp=1", "--steps", "4") == 0
    # What a process wrote of steps after its last save, before it was killed.
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    capsys.readouterr()
    settings = ("--set", "eval.every=5", "--set", "metrics.peak_flops=1e12", "--set", "data.root=.", "--json")
    paths = ("--set", f"data.mixture.0.path={files}/alice.txt", "--set", f"data.mixture.1.path={files}/bob.jsonl")
    evaluated = ("--set", f'eval.data=["{files}/alice.txt"]')
    assert trained(files, run, "--mesh", "ep=1,tp=1", "--steps", "10", "--resume", *settings, *paths, *evaluated) == 0
    assert losses(run) == losses(whole)
    printed = capsys.readouterr()
    assert "resuming" in printed.err
    assert "changed   eval.every from 0 to 5" in printed.err
    assert "step 10: loss on alice" in printed.err
    result, last = json.loads(printed.out), read_records(run / "metrics.jsonl")[-1]
    assert (result["step"], result["loss"], result["skipped"]) == (10, last["loss"], 0)
    assert result["mesh"] == {"ep": 1, "tp": 1}
    assert result["checkpoint"] == str(run / "checkpoints" / "10")
    assert result["eval"] == {name: last[name] for name in ("eval/loss/alice", "eval/bits_per_byte/alice")}
    assert sum(last["eval/router/load/alice/layer_00"]) == pytest.approx(1, abs=1e-4)
    assert 0 < last["mfu"] < 1
    assert trained(files, run, "--mesh", "ep=1,tp=1", "--steps", "10", "--resume", *paths, *evaluated) == 0
    assert "at step 10 already" in capsys.readouterr().err


def test_a_signal_saves_and_the_run_goes_on_on_another_mesh(files, whole, tmp_path, monkeypatch, capsys):
    run = tmp_path / "signalled"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    shown = LiveProgress.record

    def record(self, record):
        shown(self, record)
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # for the thread that notes it

    monkeypatch.setattr(LiveProgress, "record", record)
    assert trained(files, run, "--mesh", "ep=4,tp=2", "--steps", "10") == 143
    monkeypatch.undo()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    said = capsys.readouterr().err
    assert "SIGTERM: saving at the end of this step" in said
    assert [line.split()[0] for line in said.splitlines()[:4]] == ["mesh", "strategy", "attention", "memory"]
    assert "step 1/10 loss" in said
    assert list(losses(run)) == [1, 2, 3, 4]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["4"]
    # The run's own recipe serves where none is named.
    assert main(["train", "--run", str(run), "--mesh", "ep=1,tp=1", "--steps", "10", "--resume"]) == 0
    assert "after step 4" in capsys.readouterr().err
    compare(run, whole)


@pytest.mark.multihost
@pytest.mark.parametrize("spec", ["ep=2,tp=1", pytest.param("ep=1,tp=2", marks=pytest.mark.slow)])
def test_two_processes_read_their_shares_and_take_the_same_steps(spec, files, whole, tmp_path, run_processes):
    """Also where all devices need all rows, so that the processes exchange what they have read."""
    run = tmp_path / "run"
    argv = ["--config", str(files / "recipe.toml"), "--run", str(run), "--mesh", spec, "--steps", "10", "--json"]
    results = run_processes(2, ["-m", "moejax.train", *argv])
    assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
    assert json.loads(results[0].stdout)["step"] == 10
    assert results[1].stdout == ""
    compare(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["ep=4,tp=2", "ep=2,tp=4", "ep=8,tp=1"])
def test_every_mesh_goes_on_to_the_bit_and_takes_the_same_steps(spec, files, whole, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert trained(files, straight, "--mesh", spec, "--steps", "10") == 0
    compare(straight, whole)
    assert trained(files, broken, "--mesh", spec, "--steps", "6") == 0
    assert trained(files, broken, "--mesh", spec, "--steps", "10", "--resume") == 0
    assert losses(broken) == losses(straight)


def test_a_layer_whose_weights_are_not_finite_is_named_and_ends_the_run(files, tmp_path, capsys):
    """A model with weights: its tokenizer comes with it, and steps that are skipped leave it as it is."""
    model, run = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    for path in (files / "model").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][0] = np.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    data = ("--data", str(files / "alice.txt"), "--set", "optimizer.max_skipped=3", "--set", "accumulate=2")
    assert trained(files, run, "--mesh", "ep=1,tp=1", "--model", str(model), *data) == 1
    said = capsys.readouterr().err.splitlines()
    what = "the loss or a gradient is not finite, first in layer 1"
    assert f"step 1: {what}; its update is skipped (1 of 3 in a row)" in said[5]
    assert f"error: step 3: {what}" in said[-1]
    records = read_records(run / "metrics.jsonl")
    assert [(record["loss"], record["skipped"]) for record in records] == [(None, 1), (None, 2), (None, 3)]
    assert [record["bad_layer"] for record in records] == [1, 1, 1]
    assert not list((run / "checkpoints").iterdir())


def test_weights_of_a_folder_are_what_training_begins_with(files, tmp_path, monkeypatch):
    """The first loss is that of the loaded model on the first batch; router and balance loss may be anybody's."""
    run = tmp_path / "run"
    (tmp_path / "own_functions.py").write_text(OWN_FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    own = ("--set", "losses.balance=own_functions:seven", "--set", "losses.router=own_functions:last_experts")
    argv = ("--model", str(files / "model"), "--data", str(files / "alice.txt"), "--steps", "2", "--mesh", "ep=1,tp=1")
    assert trained(files, run, *argv, *own, "--set", "eval.every=1", "--json") == 0
    from own_functions import last_experts

    from moejax.data.encoder import DocumentEncoder
    from moejax.data.pipeline import TrainingData
    from moejax.data.sources import Source

    encoder = DocumentEncoder.from_folder(run / "model")
    source = Source(str(files / "alice.txt"))
    reading = TrainingData([source], encoder, batch=8, length=16, seed=0, cache=run / "cache")
    batch = next(reading)
    reading.close()
    model = moejax.load(files / "model", mesh=moejax.make_mesh("ep=1,tp=1"), router=last_experts)
    log_p = jax.nn.log_softmax(model(batch.tokens, segment_ids=batch.segments))
    chosen = np.take_along_axis(np.asarray(log_p), np.maximum(batch.targets, 0)[..., None], -1)[..., 0]
    assert losses(run)[1] == pytest.approx(-chosen[batch.targets >= 0].mean(), rel=1e-5)
    first, _ = read_records(run / "metrics.jsonl")
    assert first["balance_loss"] == 7.0
    assert first["router/load/layer_01"] == first["eval/router/load/alice/layer_01"] == [0, 0, 0, 0, 0, 0, 0.5, 0.5]
    assert (run / "model" / "tokenizer.json").is_file()
    assert json.loads((run / "model" / "config.json").read_text())["num_local_experts"] == 8


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "none.toml"], "cannot read the recipe none.toml"),
        ([], "--config is missing"),
        (["--config", "{recipe}", "--set", "optimizer.lrr=1"], "did you mean optimizer.lr?"),
        (["--config", "{recipe}", "--data", "none.txt"], "there is no file"),
        (["--config", "{recipe}", "--model", "none"], "there is no folder 'none'"),
        (["--config", "{recipe}", "--set", "data.length=4000"], "data.length=4000 is over the model's context of 128"),
        (["--config", "{recipe}", "--set", "losses.bias_update_rate=0.1"], "no router of this mixtral model has a"),
        (["--config", "{recipe}", "--set", "model.config=none.json"], "has no none.json"),
        (["--config", "{recipe}", "--steps", "0"], "'0' is not a whole number from 1"),
        (["--config", "{recipe}", "--mesh", "ep=4,pp=2"], 'unknown axis "pp"'),
        (["--config", "{recipe}", "--dtype", "float16"], "float16"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(argv, message, files, tmp_path, capsys):
    run = tmp_path / "run"
    argv = [word.format(recipe=files / "recipe.toml") for word in argv]
    assert main(["train", "--run", str(run), *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert message in err
    assert not run.exists()


def test_a_model_without_a_tokenizer_that_fits_is_refused(files, tmp_path, capsys):
    """Ids outside of the vocabulary would be trained on as if they were others."""
    run, model = tmp_path / "run", tmp_path / "model"
    model.mkdir()
    raw = json.loads((files / "model" / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | {"vocab_size": 4095}))
    for message in (f"tokenizer.json is missing in {model}", "has 4096 tokens, more than the model's vocab_size=4095"):
        assert trained(files, run, "--set", f"model.config={model}") == 2
        assert message in capsys.readouterr().err
        assert not run.exists()
        shutil.copy(files / "model" / "tokenizer.json", model)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "has a run already; continue it with --resume"),
        (["--resume", "--set", "seed=1"], "seed was 0 in this run and is 1 now"),
        (["--resume", "--set", "data.length=8"], "data.length was 16 in this run and is 8 now"),
        (["--resume", "--set", "data.mixture.1.weight=3"], "data.mixture.1.weight was 1.0 in this run and is 3.0 now"),
        (["--resume", "--data", "README.md"], "data.mixture"),
        (["--resume", "--model", "demo"], "model."),
    ],
)
def test_a_folder_with_a_run_is_not_taken_for_another(argv, message, files, whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    assert trained(files, whole, "--steps", "20", *argv) == 2
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before


def test_data_of_ones_own_need_no_files_of_the_recipe(files, tmp_path, capsys):
    """Neither its mixture nor what it evaluates."""
    argv = ("--data", str(files / "alice.txt"), "--steps", "1", "--mesh", "ep=1,tp=1")
    recipe = (files / "recipe.toml").read_text().replace('["alice.txt"]', '["none.txt"]\nevery = 1')
    (tmp_path / "recipe.toml").write_text(recipe.replace("bob.jsonl", "none.jsonl"))
    assert main(["train", "--config", str(tmp_path / "recipe.toml"), "--run", str(tmp_path / "run"), *argv]) == 0
    assert "nothing is evaluated but with --set eval.every=N" in capsys.readouterr().err
    assert not any(name.startswith("eval/") for name in read_records(tmp_path / "run" / "metrics.jsonl")[0])


def test_help_names_the_signals(capsys):
    assert train.main(["--help"]) == 0
    assert "SIGTERM" in capsys.readouterr().out


def test_what_is_not_installed_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "_EXTRA", ("optax", "no_such_library"))
    assert main(["train", "--run", str(tmp_path)]) == 2
    assert capsys.readouterr().err == 'error: train needs no_such_library; pip install "moejax[train]"\n'
