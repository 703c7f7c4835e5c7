"""config.json and the index of a source model: JSON that someone else has written.

The index says in which weight file each tensor is. transformers takes the files' word, not its.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage.errors import CorruptFileError, ModelError
from storage.files.small_file import read_small
from storage.model.adapter import refuse_adapter_alone
from storage.model.folder import WEIGHTS, ModelFolder, inside
from storage.model.other_formats import refuse_other_formats
from storage.model.safetensors_format import TensorEntry

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the source model; CorruptFileError if it is not one.

    Raises errors as `read_small` does.
    """
    raw = read_small(path)
    try:
        data = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CorruptFileError(f"{path}: not a JSON object")
    return data


def weight_map(source: ModelFolder) -> dict[str, str] | None:
    """Tensor → weight file, from the index; None if there is a single weight file.

    The single file has precedence, as in transformers.
    """
    if source.exists(SINGLE_FILE):
        return None
    if not source.exists(INDEX_FILE):
        refuse_adapter_alone(source.folder, source.place)
        refuse_other_formats(source.folder, source.place)
        raise ModelError(f"{source.place}: neither {SINGLE_FILE} nor {INDEX_FILE}")
    path = inside(source.folder, INDEX_FILE)
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(f"{path}: no weight_map; download the file again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(WEIGHTS):
            raise CorruptFileError(
                f"{path}: puts tensor {name} in {file!r}, which is not a {WEIGHTS} file"
            )
    for file in set(weight_map.values()):
        source.require(file)
    return weight_map


def index_contradictions(
    weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]
) -> dict[str, str]:
    """Tensor → what the index says of it that the weight files do not, or the other way round."""
    found = {}
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            where = f"is in {tensors[name].file}" if name in tensors else "is in no file"
            found[name] = f"{INDEX_FILE} puts tensor {name} in {file}, but it {where}"
    for name, entry in tensors.items():
        if name not in weight_map:
            found[name] = f"tensor {name} of {entry.file} is not in {INDEX_FILE}"
    return found
