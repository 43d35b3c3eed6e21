"""The table of mistakes: each is one line on stderr and exit code 2, whatever the tool was asked to do."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import CONFIGS, write_checkpoint

from moejax.commands.main import main

RAW = CONFIGS["mixtral_plain"] | {"num_hidden_layers": 1}
INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"
W1 = "model.layers.0.block_sparse_moe.experts.0.w1.weight"

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sound"), RAW, shards=2)


def config(**fields: object) -> Damage:
    return edit("config.json", lambda content: content.update(fields))


def edit(name: str, change: Callable[[dict], object]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


def write(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    """The checkpoint in one file, its tensors changed."""

    def damage(folder: Path) -> None:
        held = {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
        change(held)
        save_file(held, folder / "model.safetensors")

    return damage


def unchanged(folder: Path) -> None:
    pass


def truncate(folder: Path) -> None:
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:-100])


IDS = ["--prompt-ids", "1,2,3"]
TEXT = ["--prompt", "Once"]

# (name, damage to a sound checkpoint, the command line after `--model M`, the line after "error: "); a line is literal
# but for {M}, the folder, and {ANY}, text that is another's to write.
WITH_A_MODEL: list[tuple[str, Damage, list[str], str]] = [
    (
        "config.json missing",
        lambda folder: (folder / "config.json").unlink(),
        ["generate", *IDS],
        "{M} has no config.json; name the folder of a Hugging Face model",
    ),
    (
        "config.json broken",
        write("config.json", b"{"),
        ["generate", *IDS],
        "{M}/config.json is not valid JSON ({ANY}); correct it or download it again",
    ),
    (
        "model_type unknown",
        config(model_type="llama"),
        ["generate", *IDS],
        "model_type='llama' is not supported; supported are mixtral, {ANY}",
    ),
    (
        "rope unsupported",
        config(rope_scaling={"type": "su", "factor": 2.0}),
        ["verify"],
        "rope_scaling.rope_type='su' is not supported; "
        "one of default, linear, dynamic, yarn, llama3, longrope, proportional is",
    ),
    (
        "quantised",
        config(quantization_config={"bits": 4}),
        ["generate", *IDS],
        "{M} is quantised with quant_method=None; moejax reads mxfp4, and fp8 with a weight_block_size: take another "
        "version of the checkpoint",
    ),
    (
        "more chosen than there are",
        config(num_experts_per_tok=9),
        ["generate", *IDS],
        "num_experts_per_tok=9 is more than num_experts=8; a token cannot choose more experts than there are",
    ),
    (
        "weights missing",
        lambda folder: [file.unlink() for file in folder.glob("*.safetensors*")],
        ["generate", *IDS],
        "{M} has no weights: neither model.safetensors nor model.safetensors.index.json",
    ),
    (
        "shard missing",
        lambda folder: (folder / FIRST).unlink(),
        ["verify"],
        f"{{M}}/{FIRST} is missing, though {INDEX} lists it; download it",
    ),
    (
        "shard truncated",
        truncate,
        ["generate", *IDS],
        f"{{M}}/{FIRST} is truncated: its header promises {{ANY}} bytes and it has {{ANY}}; download it again",
    ),
    (
        "tensor mis-shaped",
        tensors(lambda held: held.update({W1: np.zeros((32, 48), np.float32)})),
        ["generate", *IDS],
        f"the tensors in {{M}} do not fit its config.json: 1 of another shape ({W1} is [32, 48] and should be "
        "[48, 32]); are both files of the same model?",
    ),
    (
        "tensor missing",
        tensors(lambda held: held.pop("lm_head.weight")),
        ["verify"],
        "the tensors in {M} do not fit its config.json: 1 missing (lm_head.weight); are both files of the same model?",
    ),
    (
        "tensor unknown",
        tensors(lambda held: held.update(other=np.zeros(1, np.float32))),
        ["generate", *IDS],
        "the tensors in {M} do not fit its config.json: 1 unknown (other); are both files of the same model?",
    ),
    (
        "tensor listed twice",
        lambda folder: (folder / INDEX).write_text(
            (folder / INDEX).read_text().replace('"weight_map": {', f'"weight_map": {{"{W1}": "{FIRST}", ', 1)
        ),
        ["generate", *IDS],
        f"{{M}}/{INDEX} lists {W1} twice; download it again",
    ),
    (
        "file outside the folder",
        edit(INDEX, lambda content: content["weight_map"].update({W1: "../x.safetensors"})),
        ["generate", *IDS],
        f"{{M}}/{INDEX} places tensor {W1} outside the checkpoint's folder, in '../x.safetensors'; "
        "do not trust this checkpoint",
    ),
    (
        "generation_config.json broken",
        write("generation_config.json", b"[1]"),
        ["generate", *IDS],
        "{M}/generation_config.json holds a JSON list, not an object; download it again",
    ),
    (
        "generation_config.json out of range",
        write("generation_config.json", b'{"do_sample": true, "top_p": 3}'),
        ["generate", *IDS],
        "generation_config.json: top_p=3 is out of range; it must be a number, {ANY}; mend the file or give the value "
        "explicitly",
    ),
    (
        "tokenizer missing",
        unchanged,
        ["generate", *TEXT],
        "tokenizer.json is missing in {M}; pass token ids with --prompt-ids instead of text",
    ),
    (
        "tokenizer broken",
        write("tokenizer.json", b"{}"),
        ["generate", *TEXT],
        "{M}/tokenizer.json is not a readable tokenizer ({ANY}); fetch the file again",
    ),
    (
        "id outside the vocabulary",
        unchanged,
        ["generate", "--prompt-ids", "5", "--prompt-ids", "1,96"],
        "prompt 1: token id 96 is outside the vocabulary, 0 to 95",
    ),
    (
        "negative id",
        unchanged,
        ["generate", "--prompt-ids=-1"],
        "prompt 0: token id -1 is outside the vocabulary, 0 to 95",
    ),
    (
        "prompt over the context",
        unchanged,
        ["generate", "--prompt-ids", ",".join(["7"] * 129)],
        "prompt 0 has 129 tokens, over the context of 128; shorten it",
    ),
    (
        "max_model_len over the context",
        unchanged,
        ["generate", *IDS, "--max-model-len", "129"],
        "max_model_len=129 must be a whole number, 1 to the model's context of 128",
    ),
    (
        "capacity under all_reduce",
        unchanged,
        ["generate", *IDS, "--mesh", "ep=2", "--strategy", "all_reduce", "--capacity-factor", "1.5"],
        "capacity_factor is for strategy all_to_all; all_reduce sends no rows and can drop none",
    ),
    (
        "chunks that do not divide",
        unchanged,
        ["generate", *IDS, "--mesh", "ep=2", "--strategy", "all_to_all", "--chunks", "3"],
        "chunks=3 does not divide the 4 expert slots of a device",
    ),
    (
        "stop text without a tokenizer",
        unchanged,
        ["generate", *IDS, "--stop", "end"],
        "tokenizer.json is missing in {M}; pass token ids with --prompt-ids instead of text",
    ),
]

TOO_LATE = (
    "mesh {mesh} needs {n} devices, but JAX has already started with 8 cpu devices in this process; make the mesh "
    'before any other use of JAX, or call jax.config.update("jax_num_cpu_devices", {n}) right after importing it'
)
SEE = " (see moejax generate --help)"
RANGE = " is out of range; it must be "

# (command line, the line after "error: ")
WITH_THE_DEMO: list[tuple[list[str], str]] = [
    (["generate", *TEXT, "--mesh", "ep=0"], 'mesh "ep=0": axis ep has size 0; it must be at least 1'),
    (
        ["generate", *TEXT, "--mesh", "ep=2,dp=2"],
        'mesh "ep=2,dp=2": unknown axis "dp"; the axes are ep (experts) and tp (tensors)',
    ),
    (["verify", "--meshes", "ep=two"], 'mesh "ep=two": the size "two" of axis ep is not a whole number'),
    (["generate", *TEXT, "--mesh", "ep=16"], TOO_LATE.format(mesh="ep=16,tp=1", n=16)),
    (["verify", "--meshes", "ep=1", "ep=4,tp=4"], TOO_LATE.format(mesh="ep=4,tp=4", n=16)),
    (
        ["generate", *TEXT, "--tp-size", "8", "--ep-size", "3"],
        "--tp-size 8, all devices, is not a multiple of the expert-parallel size 3",
    ),
    (
        ["generate", *TEXT, "--moe-ep-size", "2", "--mesh", "ep=4"],
        "--moe-ep-size 2 means --mesh ep=2,tp=1, which contradicts --mesh ep=4; give only one of them",
    ),
    (["generate", *TEXT, "--temperature=-1"], "temperature=-1.0" + RANGE + "a number, {ANY}"),
    (["generate", *TEXT, "--temperature", "nan"], "temperature=nan" + RANGE + "a number, {ANY}"),
    (["generate", *TEXT, "--top-p", "1.5"], "top_p=1.5" + RANGE + "a number, {ANY}"),
    (["generate", *TEXT, "--min-p", "2"], "min_p=2.0" + RANGE + "a number, {ANY}"),
    (["generate", *TEXT, "--top-k=-1"], "top_k=-1" + RANGE + "a whole number, {ANY}"),
    (["generate", *TEXT, "--repetition-penalty", "0"], "repetition_penalty=0.0" + RANGE + "a number, {ANY}"),
    (["generate", *TEXT, "--max-new-tokens", "0"], "max_new_tokens=0" + RANGE + "a whole number, at least 1"),
    (["generate", *TEXT, "--seed=-1"], "seed=-1" + RANGE + "a whole number, {ANY}"),
    (["generate", *TEXT, "--stop", ""], "{ANY}stop{ANY}"),
    (
        ["generate", *TEXT, "--capacity-factor", "nan"],
        "argument --capacity-factor: 'nan' is not a number above 0" + SEE,
    ),
    (["generate", *TEXT, "--capacity-factor", "0"], "argument --capacity-factor: '0' is not a number above 0" + SEE),
    (["generate", *TEXT, "--chunks", "two"], "argument --chunks: invalid int value: 'two'" + SEE),
    (["generate", *TEXT, "--dtype", "int8"], "argument --dtype: invalid choice: 'int8' (choose from {ANY})" + SEE),
    (
        ["generate", *TEXT, "--strategy", "ring"],
        "argument --strategy: invalid choice: 'ring' (choose from {ANY})" + SEE,
    ),
    (["verify", "--strategies"], "argument --strategies: expected at least one argument (see moejax verify --help)"),
    (["generate", *TEXT, "--chat"], "{M} has no chat template; leave --chat out, or put a chat_template.jinja there"),
    (["generate", "--prompt", ""], "prompt 0 is empty; give at least one token"),
    (["generate", "--prompt-ids", "1,,2"], '--prompt-ids "1,,2" is not a list of whole numbers such as 1,2,3'),
    (["generate", "--prompt-ids", ""], '--prompt-ids "" is not a list of whole numbers such as 1,2,3'),
    (["generate", *TEXT, "--prompt-file", "x"], "--prompt and --prompt-file were given together; use one of them"),
    (["generate", *TEXT, *IDS], "--prompt and --prompt-ids were given together; use one of them"),
    (
        ["generate", "--prompt-file", "no/such.txt"],
        "cannot read the prompt file no/such.txt: No such file or directory",
    ),
    (["generate", "--prompt-file", "."], "cannot read the prompt file .: Is a directory"),
    (["generate", "--prompt", "caf\udce9"], "prompt 'caf\\udce9' is not valid UTF-8 at character 3; re-encode it"),
    (
        ["generate", *TEXT, "--model", "no such model"],
        "there is no folder 'no such model'; name an existing folder, a hub id such as org/name[@revision], or 'demo'",
    ),
    (
        ["generate", *TEXT, "--model", __file__],
        f"{__file__} is a file; name the folder that holds it, with config.json and the weights",
    ),
    (
        ["generate", *TEXT, "--num-processes", "2"],
        "--coordinator and --process-id missing: several processes need all of "
        "--coordinator HOST:PORT, --num-processes N and --process-id I",
    ),
    (["generate", "--no-such"], "unrecognized arguments: --no-such" + SEE),
    (["verfy"], "unknown command 'verfy'; did you mean verify? (see moejax --help)"),
    ([], "which command? one of {ANY} (see moejax --help)"),
]


def refuse(argv: list[str], line: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Runs the command line; `{M}` in the line is the folder."""
    assert main(argv) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    *_, last = err.splitlines()
    pattern = re.escape(f"error: {line}").replace(re.escape("{M}"), re.escape(str(folder)))
    assert re.fullmatch(pattern.replace(re.escape("{ANY}"), ".*"), last), err
    assert err.count("error: ") == 1


@pytest.mark.parametrize(
    ("damage", "argv", "line"), [row[1:] for row in WITH_A_MODEL], ids=[r[0] for r in WITH_A_MODEL]
)
def test_a_mistake_with_a_model(
    damage: Damage, argv: list[str], line: str, sound: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    damage(folder)
    before = sorted(tmp_path.rglob("*"))
    refuse(
        [argv[0], "--model", str(folder), "--mesh" if argv[0] == "generate" else "--meshes", "ep=1", *argv[1:]],
        line,
        folder,
        capfd,
    )
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("argv", "line"), WITH_THE_DEMO, ids=[" ".join(argv)[:60] for argv, _ in WITH_THE_DEMO])
def test_a_mistake_with_the_demo(argv: list[str], line: str, capfd: pytest.CaptureFixture[str]):
    import moejax

    jax.devices()
    refuse(argv, line, Path(moejax.__file__).parent / "demo", capfd)


def test_a_platform_that_is_not_there(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def without_the_setting(name: str, value: object) -> None:
        assert (name, value) == ("jax_platforms", "cuda")

    monkeypatch.setattr(jax.config, "update", without_the_setting)
    line = (
        'platform cuda is not available ({ANY}); pip install "moejax[cuda12]" (or "moejax[cuda13]"), '
        "or use --platform cpu"
    )
    refuse(["generate", *TEXT, "--platform", "cuda"], line, Path(), capfd)


@pytest.mark.parametrize("command", ["generate", "verify"])
def test_torchrun(command: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    line = (
        "started under torchrun, which runs one process for each GPU, but one moejax process drives all GPUs of a "
        "host: start it plainly on one host, and on several hosts once on each with --coordinator HOST:PORT, "
        "--num-processes N and --process-id I"
    )
    refuse([command], line, Path(), capfd)


def test_prompts_that_are_not_text(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"caf\xe9")
    line = f"the prompt file {file} is not UTF-8 text (unexpected end of data at byte 3)"
    refuse(["generate", "--prompt-file", str(file)], line, tmp_path, capfd)
    with file.open(encoding="utf-8") as stream:
        monkeypatch.setattr("sys.stdin", stream)
        line = "standard input is not UTF-8 text (unexpected end of data at byte 3)"
        refuse(["generate"], line, tmp_path, capfd)
