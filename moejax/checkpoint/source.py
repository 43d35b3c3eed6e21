"""Where a model comes from: a folder, the embedded demo, or the Hugging Face hub."""

import importlib.resources
import json
import re
from pathlib import Path
from typing import Any

from moejax.errors import MoejaxError

DEMO = "demo"

_WANTED = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    # A tokenizer in another form, so that the error can name it.
    "tiktoken.model",
    "*.tiktoken",
    "tokenizer.model",
    # One file, shards, and shards as Qwen3.5 names them: model.safetensors-00001-of-00014.safetensors.
    "model*.safetensors",
    "model.safetensors.index.json",
]
_HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def resolve(name: str) -> Path:
    """The folder of a model named by a folder, a hub id `org/name[@revision]`, or "demo" (the embedded model).

    A hub id is downloaded into the hub's own cache, only the files that are needed; what is cached works without a
    network and with HF_HUB_OFFLINE=1. A folder named demo is reached as "./demo".

    Raises:
        MoejaxError: there is no such model, or it is neither cached nor reachable.
    """
    if name == DEMO:
        return Path(str(importlib.resources.files("moejax") / DEMO))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise MoejaxError(f"{name} is a file; name the folder that holds it, with config.json and the weights")
    match = _HUB_ID.fullmatch(name)
    if not match:
        raise MoejaxError(
            f"there is no folder {name!r}; name an existing folder, a hub id such as org/name[@revision], or {DEMO!r}"
        )
    return _download(match["repository"], match["revision"])


def _download(repository: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=_WANTED))
    except errors.GatedRepoError as error:
        raise MoejaxError(
            f"{repository} is gated on the hub; accept its terms there and log in with `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise MoejaxError(
            f"{repository!r} is neither a folder here nor a model on the hub (a private one needs `hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise MoejaxError(
            f"{repository} has no revision {revision!r} on the hub; name a branch, tag or commit of it"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        raise MoejaxError(
            f"{repository}{at} is not a folder here, not in the hub's cache, and the hub cannot be reached; "
            "connect once to download it, or name a folder"
        ) from error


def read_json(folder: Path, name: str, required: bool = True) -> dict[str, Any]:
    """A JSON object from a file of a model's folder; empty if the file may be absent and is.

    Raises:
        MoejaxError: the file is required and absent, cannot be read, or is not a JSON object.
    """
    file = folder / name
    if not file.exists():
        if required:
            raise MoejaxError(f"{folder} has no {name}; name the folder of a Hugging Face model")
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise MoejaxError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise MoejaxError(f"{file} is not valid JSON ({error}); correct it or download it again") from error
    if not isinstance(content, dict):
        raise MoejaxError(f"{file} holds a JSON {type(content).__name__}, not an object; download it again")
    return content
