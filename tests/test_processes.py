"""Two processes of four virtual devices against one process of eight, and what they must agree on first."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import CONFIGS, write_checkpoint

from moejax.commands.main import main
from moejax.loading import load

pytestmark = pytest.mark.multihost

RAW = CONFIGS["mixtral_plain"]
MESH = "ep=4,tp=2"
MODES = ("--json", "--dtype", "float32")

# The command line, with standard input and prompts for process 0 alone, and with its reads of weights counted.
DRIVER = """
import io, json, os, sys
from moejax import distributed
from moejax.commands.main import main

class Unread:
    def isatty(self):
        raise AssertionError("only process 0 reads standard input")
    read = isatty

settings, argv = json.loads(sys.argv[1]), sys.argv[2:]
sys.stdin = io.StringIO(settings["stdin"]) if argv[-1] == "0" else Unread()
if argv[-1] == settings.get("other_code"):
    distributed.code_hash = lambda: "0123456789abcdef"
preadv, count = os.preadv, 0

def counted(*arguments):
    global count
    got = preadv(*arguments)
    count += got
    return got

os.preadv = counted
code = main(argv)
print("bytes read:", count, file=sys.stderr)
sys.exit(code)
"""


def driver(*argv: str, **settings: str) -> list[str]:
    return ["-c", DRIVER, json.dumps({"stdin": ""} | settings), *argv]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the demo's tokenizer, so that it continues text."""
    import moejax

    folder = write_checkpoint(tmp_path_factory.mktemp("text"), RAW | {"vocab_size": 4096, "num_hidden_layers": 1})
    tokenizer = Path(moejax.__file__).parent / "demo" / "tokenizer.json"
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return folder


def alone(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON of the same command in this process, which has eight devices."""
    capsys.readouterr()
    assert main(argv) == 0
    return json.loads(capsys.readouterr().out)


def bytes_of_shards(folder: Path, mesh: jax.sharding.Mesh, half: int) -> int:
    """Bytes in the file of what four of the eight devices hold, each distinct part once."""
    itemsize = next(iter(load_file(folder / "model.safetensors").values())).itemsize
    mine = {device.id for device in list(mesh.devices.flat)[4 * half : 4 * half + 4]}
    elements = 0
    for array in load(folder, mesh=mesh).parameters().values():
        shards = [shard for shard in array.addressable_shards if shard.device.id in mine]
        elements += sum({str(shard.index): int(np.prod(shard.data.shape)) for shard in shards}.values())
    return elements * itemsize


def test_generate_gives_the_tokens_of_one_process_and_reads_only_its_own_slices(
    folder: Path,
    run_processes: Callable[..., list[Any]],
    mesh: Callable[[str], jax.sharding.Mesh],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    argv = ["generate", "--model", str(folder), "--mesh", MESH, *MODES, "--max-new-tokens", "12", "--seed", "5"]
    argv += ["--temperature", "0.9", "--top-k", "40", "--strategy", "all_to_all"]
    text = "Once upon a time"
    done = run_processes(2, driver(*argv, stdin=text + "\n"))
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    assert done[1].stdout == ""
    result = json.loads(done[0].stdout)
    assert done[0].stdout.count("\n") == 1
    expected = alone([*argv, "--prompt", text], capsys)
    assert result["outputs"] == expected["outputs"]
    assert len(result["outputs"][0]["tokens"]) == 12
    assert (result["mesh"], result["usage"]) == ({"ep": 4, "tp": 2}, expected["usage"])
    # Only process 0 reports.
    assert "mesh      ep=4,tp=2 on 8 virtual cpu devices of 2 processes: 8 experts" in done[0].stderr
    assert "mesh      " not in done[1].stderr
    for half, process in enumerate(done):
        assert f"bytes read: {bytes_of_shards(folder, mesh(MESH), half)}\n" in process.stderr


@pytest.mark.parametrize("strategy", [pytest.param("all_to_all", marks=pytest.mark.slow), "all_reduce"])
def test_verify_gives_the_rows_of_one_process(
    strategy: str, tmp_path: Path, run_processes: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
):
    folder = write_checkpoint(tmp_path, RAW | {"num_hidden_layers": 1})
    argv = ["verify", "--model", str(folder), "--meshes", MESH, "--strategies", strategy, *MODES]
    done = run_processes(2, ["-m", "moejax", *argv])
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    assert done[1].stdout == ""
    result, expected = json.loads(done[0].stdout), alone(argv, capsys)
    (row,), (wanted,) = result.pop("rows"), expected.pop("rows")
    assert row.pop("max_rel_err") == pytest.approx(wanted.pop("max_rel_err"), abs=1e-6, rel=0)
    assert (row, result) == (wanted, {"ok": True})


def test_another_model_folder_is_named_on_every_process(tmp_path: Path, run_processes: Callable[..., list[Any]]):
    for number, name in enumerate(("a", "b")):
        write_checkpoint(tmp_path / name, CONFIGS["mixtral_plain"] | {"num_hidden_layers": 1 + number})
    each = {number: ["--model", str(tmp_path / name)] for number, name in enumerate(("a", "b"))}
    refused(
        run_processes(2, driver("generate", "--mesh", MESH, *MODES), each=each),
        f"the processes disagree on --model: process 0 has {tmp_path / 'a'}, process 1 has {tmp_path / 'b'}; "
        "start all of them with the same --model",
    )


def test_another_option_is_named_on_every_process(run_processes: Callable[..., list[Any]]):
    argv = driver("generate", "--mesh", MESH, *MODES, other_code="1")
    refused(
        run_processes(2, argv, each={0: ["--seed", "1"], 1: ["--seed", "2"]}),
        "the processes disagree on --seed: process 0 has 1, process 1 has 2; start all of them with the same --seed",
    )


def test_other_code_is_named_on_every_process(run_processes: Callable[..., list[Any]]):
    from moejax import distributed

    refused(
        run_processes(2, driver("generate", "--mesh", MESH, *MODES, other_code="1")),
        f"the processes disagree on code: process 0 has {distributed.code_hash()}, process 1 has 0123456789abcdef; "
        "start all of them with the same code",
    )


def test_prompts_of_process_0_reach_all(run_processes: Callable[..., list[Any]]):
    # A prompt that only process 0 was given is refused by both, with the same words: both know it.
    ids = ",".join(["3"] * 1025)
    refused(
        run_processes(2, driver("generate", "--mesh", MESH, *MODES), each={0: ["--prompt-ids", ids]}),
        "prompt 0 has 1025 tokens, over the context of 1024; shorten it",
    )


def refused(done: list[Any], line: str) -> None:
    for process in done:
        assert (process.returncode, process.stdout) == (2, ""), process.stderr
        assert f"error: {line}" in process.stderr.splitlines(), process.stderr
        assert "Traceback" not in process.stderr
