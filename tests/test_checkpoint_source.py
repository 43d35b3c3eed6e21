"""Which folder a model's name means; the hub is a cache made by hand, or a stand-in that fails as it does."""

import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from moejax.checkpoint.source import read_json, resolve
from moejax.errors import MoejaxError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A hub cache with one model, and no network."""
    repository = tmp_path / "hub/models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs/abc").write_text('{"model_type": "mixtral"}')
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_demo_is_the_embedded_model(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_json(resolve("demo"), "config.json")["model_type"]
    assert resolve("./demo") == Path("demo")


def test_a_folder_is_itself(tmp_path, monkeypatch):
    (tmp_path / "models/tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("models/tiny") == Path("models/tiny")
    assert resolve("~/models") == tmp_path / "models"


@pytest.mark.parametrize("name", ["org/name", "org/name@main", f"org/name@{COMMIT}"])
def test_a_cached_hub_id_needs_no_network(cache, name):
    assert resolve(name) == cache
    assert read_json(cache, "config.json") == {"model_type": "mixtral"}


def test_only_the_needed_files_are_asked_for(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *args, **options: asked.update(options, id=args) or "x"
    )
    resolve("org/name@v1.0")
    assert asked["id"] == ("org/name",) and asked["revision"] == "v1.0"
    published = ["config.json", "tokenizer.json", "model.safetensors", "model-00002-of-00019.safetensors"]
    published += ["model.safetensors.index.json", "generation_config.json", "chat_template.jinja"]
    published += ["model.safetensors-00001-of-00014.safetensors", "chat_template.json"]
    published += ["tiktoken.model", "qwen.tiktoken", "tokenizer.model"]
    unwanted = ["consolidated.00.safetensors", "pytorch_model.bin", "README.md", "original/model.pth", "x.py"]
    # GPT-OSS publishes its weights three times.
    unwanted += ["original/model--00001-of-00007.safetensors", "original/model.safetensors", "original/config.json"]
    unwanted += ["original/model.safetensors.index.json", "metal/model.bin", "onnx/tokenizer.json"]
    wanted = huggingface_hub.utils.filter_repo_objects(published + unwanted, allow_patterns=asked["allow_patterns"])
    assert sorted(wanted) == sorted(published)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no_such_folder",
            "there is no folder 'no_such_folder'; name an existing folder, a hub id such as org/name[@revision], "
            "or 'demo'",
        ),
        (
            "/a/b/c",
            "there is no folder '/a/b/c'; name an existing folder, a hub id such as org/name[@revision], or 'demo'",
        ),
        (
            "org/other",
            "org/other is not a folder here, not in the hub's cache, and the hub cannot be reached; "
            "connect once to download it, or name a folder",
        ),
        (
            "org/name@v2",
            "org/name at revision 'v2' is not a folder here, not in the hub's cache, and the hub cannot be reached; "
            "connect once to download it, or name a folder",
        ),
        (
            "org/na..me",
            "'org/na..me' is neither a folder here nor a model on the hub (a private one needs `hf auth login`)",
        ),
    ],
)
def test_unresolvable_names(cache, name, message):
    with pytest.raises(MoejaxError, match=f"^{re.escape(message)}$"):
        resolve(name)


def test_a_file_is_not_a_model(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(
        MoejaxError, match=r"is a file; name the folder that holds it, with config.json and the weights$"
    ):
        resolve(str(file))


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (errors.RepositoryNotFoundError, "'org/name' is neither a folder here nor a model on the hub"),
        (errors.GatedRepoError, "org/name is gated on the hub; accept its terms there and log in with `hf auth login`"),
        (errors.RevisionNotFoundError, "org/name has no revision 'v9' on the hub; name a branch, tag or commit of it"),
        (errors.HfHubHTTPError, "org/name at revision 'v9' is not a folder here, not in the hub's cache"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, failure, message):
    def refuse(*_, **__):
        response = SimpleNamespace(headers={}, request=None, status_code=404)
        raise failure("long text\nof several lines", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(MoejaxError, match=f"^{re.escape(message)}") as raised:
        resolve("org/name@v9")
    assert "\n" not in str(raised.value)
