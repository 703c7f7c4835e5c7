"""MODEL on the command line: a local folder, a folder in an object store, or a hub id."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from cluster.terminal import shows_bars, terminal
from storage.errors import ModelError
from storage.files.names import printable
from storage.files.os_errors import raise_file_error
from storage.model.folder import Source
from storage.model.other_formats import refuse_other_formats
from storage.object_store import is_uri, place

MODEL_HELP = "local Hugging Face folder, s3:// or gs:// URI of one, or hub id"
"""What MODEL may be, for the help of the commands that take one."""

CONFIG_HELP = f"{MODEL_HELP}, or a config.json alone"
"""The same of the commands that read its config only."""

# What a download needs: weights as safetensors only, configs, tokenizers.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "README.md"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_model(model: str) -> Source:
    """The folder of MODEL; a hub id is downloaded into the hub's own cache.

    Raises `ModelError` for a path that is no folder, and for an id that cannot be fetched,
    `ConfigError` for a URI that cannot be used.
    """
    if is_uri(model):
        folder = place(model)
        return Source(folder, str(folder))
    path = Path(model)
    if path.is_dir():
        return Source(path.absolute(), printable(path.absolute().name))
    if path.suffix == ".gguf":
        refuse_other_formats(path.parent, path.parent)
    if path.exists() or not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise ModelError(
            f"{model} is not a model folder; name a folder with config.json, or a hub id"
        )
    from huggingface_hub import snapshot_download

    try:
        with _shown(model):
            downloaded = snapshot_download(model, allow_patterns=_WANTED)
    except Exception as error:  # the hub client raises its own, httpx's and OS errors
        raise_file_error(error)
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{model} is neither a local folder nor a model that the hub gives ({first})"
        ) from error
    return Source(Path(downloaded), model)


@contextlib.contextmanager
def _shown(model: str) -> Iterator[None]:
    """Says that the hub is asked, and on a terminal shows its client's bars: it may take hours."""
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    console = terminal()
    console.print(f"fetching {model} from the hub, once: it keeps a copy here", markup=False)
    if shows_bars(console):
        enable_progress_bars()
    try:
        yield
    finally:
        disable_progress_bars()


def config_source(model: str) -> Source:
    """MODEL for a plan: a folder, a config.json, or a hub id, of which the config alone is fetched.

    Raises `ModelError` as `resolve_model` does.
    """
    if is_uri(model):
        return resolve_model(model)
    path = Path(model)
    if path.is_file() and path.suffix == ".json":
        path = path.absolute()
        name = path.parent.name if path.name == "config.json" else path.stem
        return Source(path, printable(name))
    if path.exists() or not _HUB_ID.fullmatch(model) or model.startswith("."):
        return resolve_model(model)
    from huggingface_hub import hf_hub_download

    try:
        return Source(Path(hf_hub_download(model, "config.json")), model)
    except Exception as error:  # the hub client raises its own, httpx's and OS errors
        raise_file_error(error)
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{model} is neither a local folder, nor a config.json, nor a model that the hub gives "
            f"({first})"
        ) from error
