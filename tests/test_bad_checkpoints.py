"""Damaged, incomplete and wrong checkpoints, and bad model names: one clear line each."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoint_oracle import abstract, expected_parameters, mesh_plan
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file
from tiny import CONFIGS, write_checkpoint

from moejax.checkpoint.huggingface import check, load_parameters, settle_tied_head
from moejax.checkpoint.safetensors import CheckpointFiles
from moejax.checkpoint.saving import save_checkpoint
from moejax.checkpoint.source import read_json
from moejax.errors import MoejaxError
from moejax.families import FAMILIES, read_config

RAW = CONFIGS["mixtral_llama3"]
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
W1 = "model.layers.0.block_sparse_moe.experts.0.w1.weight"

Damage = Callable[[Path], None]


def single(change: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    """Damage to a checkpoint of one file: its tensors, changed."""

    def damage(folder: Path) -> None:
        tensors = {name: value for name in (FIRST, SECOND) for name, value in load_file(folder / name).items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def shard(change: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    """Damage to the first of two files, the index left as it is."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / FIRST)
        change(tensors)
        save_file(tensors, folder / FIRST)

    return damage


def index(change: Callable[[dict[str, str]], object]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return damage


def write(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content) and None


def cut_short(folder: Path) -> None:
    content = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(content[:-100])


def pickled_only(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def no_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def listed_twice(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{HEAD}": "{FIRST}", ', 1))


def load(folder: Path, dtype=np.float32):
    config = read_config(RAW)
    mesh = jax.make_mesh((1, 1), ("ep", "tp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    with CheckpointFiles.open(folder) as files:
        config, files = settle_tied_head(config, FAMILIES["mixtral"].names, files)
        plan = mesh_plan(config, mesh)
        check(plan, files, FAMILIES["mixtral"].ignored_tensors)
        tensors = {
            name: files.read(name, tuple(slice(0, n) for n in files.tensors[name].shape)) for name in plan.shapes
        }
        expected = expected_parameters(tensors, config, mesh)
        return load_parameters(files, plan, abstract(expected, config, mesh, dtype)), plan


NOT_FIT = "the tensors in F do not fit its config.json: "
MORE = "; the files hold more layers or experts than config.json says"
FEWER = "; the files hold fewer layers or experts than config.json says, or are incomplete"
SAME = "; are both files of the same model?"

# (name, damage, the whole message; F stands for the folder)
CASES = [
    ("no weights", no_weights, f"F has no weights: neither model.safetensors nor {INDEX}"),
    (
        "pickled only",
        pickled_only,
        "F has only pickled weights (pytorch_model.bin), and moejax never unpickles; convert them: load them in "
        "transformers and call save_pretrained(folder), which writes safetensors",
    ),
    (
        "no index",
        lambda folder: (folder / INDEX).unlink(),
        f"F has {FIRST} but neither model.safetensors nor {INDEX}; download the index, which names the files",
    ),
    (
        "index is no JSON",
        write(INDEX, b"{"),
        f"F/{INDEX} is not a safetensors index: a JSON object with a weight_map; download it again",
    ),
    (
        "index has no map",
        write(INDEX, b"[1]"),
        f"F/{INDEX} is not a safetensors index: a JSON object with a weight_map; download it again",
    ),
    (
        "index map is empty",
        write(INDEX, b'{"weight_map": {}}'),
        f"F/{INDEX} has no usable weight_map (tensor name -> file name); download it again",
    ),
    ("tensor listed twice", listed_twice, f"F/{INDEX} lists {HEAD} twice; download it again"),
    (
        "absolute path",
        index(lambda names: names.update({HEAD: "/etc/x.safetensors"})),
        f"F/{INDEX} places tensor {HEAD} outside the checkpoint's folder, in '/etc/x.safetensors'; "
        "do not trust this checkpoint",
    ),
    (
        "escaping path",
        index(lambda names: names.update({HEAD: "a/../../x.safetensors"})),
        f"F/{INDEX} places tensor {HEAD} outside the checkpoint's folder, in 'a/../../x.safetensors'; "
        "do not trust this checkpoint",
    ),
    (
        "shard missing",
        lambda folder: (folder / FIRST).unlink(),
        f"F/{FIRST} is missing, though {INDEX} lists it; download it",
    ),
    (
        "shard truncated",
        cut_short,
        f"F/{FIRST} is truncated: its header promises SIZE bytes and it has LESS; download it again",
    ),
    (
        "header broken",
        write(FIRST, struct.pack("<Q", 8) + b"nonsense" + bytes(100)),
        f"F/{FIRST} is not a sound safetensors file (REASON); download it again",
    ),
    ("empty file", write(FIRST, b""), f"F/{FIRST} is not a sound safetensors file (REASON); download it again"),
    (
        "git-lfs pointer",
        write(FIRST, b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"),
        f"F/{FIRST} is a git-lfs pointer and holds no weights; run `git lfs pull` in its folder",
    ),
    (
        "tensor not in its shard",
        shard(lambda tensors: tensors.pop(HEAD)),
        f"{INDEX} places tensor {HEAD} in F/{FIRST}, which does not hold it; download both again",
    ),
    (
        "tensor in the wrong shard",
        index(lambda names: names.update({HEAD: SECOND})),
        f"{INDEX} places tensor {HEAD} in F/{SECOND}, which does not hold it; download both again",
    ),
    (
        "tensor in two shards",
        shard(lambda tensors: tensors.update({EMBED: np.zeros((96, 48), np.float32)})),
        f"tensor {EMBED} is in both F/{FIRST} and F/{SECOND}; one must go",
    ),
    (
        "tensor not in the index",
        shard(lambda tensors: tensors.update(other=np.zeros(1))),
        f"tensor other is in F/{FIRST} but not in {INDEX}; download both again",
    ),
    ("missing", single(lambda tensors: tensors.pop(EMBED)), f"{NOT_FIT}1 missing ({EMBED}){SAME}"),
    (
        "expert missing",
        single(lambda tensors: tensors.pop(W1)),
        f"{NOT_FIT}1 missing ({W1}){FEWER}",
    ),
    (
        "unknown",
        single(lambda tensors: tensors.update(other=np.zeros(1), another=np.zeros(1))),
        f"{NOT_FIT}2 unknown (another, other){SAME}",
    ),
    (
        "too many experts",
        single(lambda tensors: tensors.update({W1.replace("experts.0", "experts.4"): tensors[W1]})),
        f"{NOT_FIT}1 unknown ({W1.replace('experts.0', 'experts.4')}){MORE}",
    ),
    (
        "too many layers",
        single(lambda tensors: tensors.update({W1.replace("layers.0", "layers.2"): tensors[W1]})),
        f"{NOT_FIT}1 unknown ({W1.replace('layers.0', 'layers.2')}){MORE}",
    ),
    (
        "of another shape",
        single(lambda tensors: tensors.update({W1: np.zeros((48, 32), np.float32)})),
        f"{NOT_FIT}1 of another shape ({W1} is [48, 32] and should be [32, 48]){SAME}",
    ),
    (
        "several faults",
        single(lambda tensors: [tensors.pop(EMBED), tensors.update({f"x{n}": np.zeros(1) for n in range(4)})]),
        f"{NOT_FIT}1 missing ({EMBED}); 4 unknown (x0, x1, x2, ...){SAME}",
    ),
    (
        "quantised",
        single(lambda tensors: tensors.update({W1: tensors[W1].astype(np.int8)})),
        f"tensor {W1} in F/model.safetensors is stored as I8; moejax reads F32, F16, BF16: "
        "take the checkpoint's unquantised version",
    ),
]


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_bad_checkpoint_is_one_clear_line(tmp_path, damage, message):
    folder = write_checkpoint(tmp_path, RAW, shards=2)
    damage(folder)
    with pytest.raises(MoejaxError) as raised:
        load(folder)
    pattern = re.escape(message.replace("F/", f"{folder}/").replace("F ", f"{folder} "))
    for word, meaning in (("SIZE", r"\d+"), ("LESS", r"\d+"), ("REASON", r"[^\n]+")):
        pattern = pattern.replace(word, meaning)
    assert re.fullmatch(pattern, str(raised.value)), raised.value


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    folder = write_checkpoint(tmp_path, RAW)
    file = folder / "model.safetensors"
    with CheckpointFiles.open(folder) as files:
        last = max(files.tensors, key=lambda name: files.tensors[name].offset)
        end = files.tensors[last].offset
        file.write_bytes(file.read_bytes()[:end])
        message = f"{file} ended at byte {end} while it was read: it changed since it was opened; load again"
        with pytest.raises(MoejaxError, match=re.escape(message)):
            files.read(last, tuple(slice(0, extent) for extent in files.tensors[last].shape))


def test_values_beyond_float16_are_refused_and_not_made_infinite(tmp_path):
    folder = write_checkpoint(tmp_path, RAW, shards=2)
    single(lambda tensors: tensors[W1].__setitem__((3, 4), 1e5))(folder)
    message = f"{W1} has values beyond float16's range (65504); load it as bfloat16 or float32"
    with pytest.raises(MoejaxError, match=re.escape(message)):
        load(folder, np.float16)


@pytest.mark.parametrize("occupied", ["a folder with files", "a file"])
def test_saving_over_something_is_refused(tmp_path, occupied):
    folder = write_checkpoint(tmp_path / "read", RAW)
    target = folder if occupied == "a folder with files" else folder / "config.json"
    parameters, plan = load(folder)
    message = f"{target} exists already; save into a new or empty folder, or remove it first"
    with pytest.raises(MoejaxError, match=f"^{re.escape(message)}$"):
        save_checkpoint(parameters, plan, RAW, [], target)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "F has no config.json; name the folder of a Hugging Face model"),
        ("config.json", "{]", "F/config.json is not valid JSON (REASON); correct it or download it again"),
        ("config.json", "[]", "F/config.json holds a JSON list, not an object; download it again"),
        ("config.json", b"\xff\xfe", "F/config.json is not valid JSON (REASON); correct it or download it again"),
    ],
)
def test_bad_json(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MoejaxError) as raised:
        read_json(tmp_path, name)
    pattern = re.escape(message.replace("F", str(tmp_path), 1)).replace("REASON", "[^\n]+")
    assert re.fullmatch(pattern, str(raised.value))


def test_optional_json_may_be_absent(tmp_path):
    assert read_json(tmp_path, "generation_config.json", required=False) == {}
