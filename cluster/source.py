"""MODEL on the command line: a local folder, or a hub id that is downloaded first."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from storage.errors import ModelError

# What a download needs: weights as safetensors only, configs, tokenizers.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "README.md"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A model folder on this machine, and the name the user knows it by."""

    folder: Path
    name: str


def resolve_model(model: str) -> Source:
    """The folder of MODEL; a hub id is downloaded into the hub's own cache.

    Raises `ModelError` for a path that is no folder, and for an id that cannot be fetched.
    """
    path = Path(model)
    if path.is_dir():
        return Source(path.absolute(), path.absolute().name)
    if path.exists() or not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise ModelError(f"{model} is not a model folder (a folder with config.json)")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(model, allow_patterns=_WANTED)
    except Exception as error:  # the hub client raises its own, httpx's and OS errors
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{model} is neither a local folder nor a model that the hub gives ({first})"
        ) from error
    return Source(Path(folder), model)


def config_source(model: str) -> Source:
    """MODEL for a plan: a folder, a config.json, or a hub id, of which the config alone is fetched.

    Raises `ModelError` as `resolve_model` does.
    """
    path = Path(model)
    if path.is_file() and path.suffix == ".json":
        path = path.absolute()
        return Source(path, path.parent.name if path.name == "config.json" else path.stem)
    if path.exists() or not _HUB_ID.fullmatch(model) or model.startswith("."):
        return resolve_model(model)
    from huggingface_hub import hf_hub_download

    try:
        return Source(Path(hf_hub_download(model, "config.json")), model)
    except Exception as error:  # the hub client raises its own, httpx's and OS errors
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{model} is neither a local folder, nor a config.json, nor a model that the hub gives "
            f"({first})"
        ) from error
