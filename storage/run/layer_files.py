"""A layer file: one layer's weight with its inputs or Hessian, for `prox24 solve`.

So a single layer can be solved again, on another machine too, for instance to study a bad result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from storage.errors import CorruptFileError, DataError
from storage.files.commit import replace_file
from storage.files.names import by_utf8_name
from storage.files.os_errors import require_readable
from storage.model.safetensors_format import header_for, tensor_bytes


def _hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the tensors' bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


@dataclass(frozen=True)
class SavedLayer:
    """A layer as `prox24 solve` reads it.

    weight: (R, C). inputs: (sequences, tokens, C) or None. hessian: (C, C) fp32 *sum* of x xᵀ over
    `tokens` tokens, or None. At least one of the two is given.
    """

    weight: torch.Tensor
    inputs: torch.Tensor | None
    hessian: torch.Tensor | None
    tokens: int
    sequences: int


def write_layer_file(
    path: Path,
    *,
    weight: torch.Tensor,
    hessian: torch.Tensor,
    tokens: int,
    sequences: int,
    guard: Callable[[], None] | None = None,
) -> None:
    """Writes `weight` (R, C) and `hessian` (C, C), the sum over `tokens` tokens, to `path`.

    The file appears complete or not at all. `guard` runs just before, and may raise to prevent it.
    Raises `ResourceError` if the disk is full.
    """
    tensors = {"hessian": hessian.cpu().contiguous(), "weight": weight.cpu().contiguous()}
    metadata = {
        "tokens": str(tokens),
        "sequences": str(sequences),
        "sha256": _hash(tensors),
    }
    with replace_file(path, guard) as writer:
        writer.write(header_for(tensors, metadata))
        for tensor in tensors.values():
            writer.write(tensor_bytes(tensor))


def read_layer_file(path: Path) -> SavedLayer:
    """Reads a layer file: the tensor `weight` (R, C), and `inputs` or `hessian`.

    `inputs` is (sequences, tokens, C) or (tokens, C); `hessian` (C, C) needs the metadata `tokens`.
    If the metadata have `sha256`, it is compared.

    Raises `DataError` if the file or one of these is missing, `CorruptFileError` if it is damaged.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file; name a .safetensors file with a saved layer")
    require_readable(path)  # the library's error would not name it
    try:
        with by_utf8_name(path) as readable, safe_open(readable, framework="pt") as file:
            names = set(file.keys())
            metadata = file.metadata() or {}
            tensors = {
                name: file.get_tensor(name)
                for name in ("weight", "inputs", "hessian")
                if name in names
            }
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{path}: not a safetensors file, or damaged ({error})") from error
    if "sha256" in metadata and metadata["sha256"] != _hash(tensors):
        raise CorruptFileError(
            f"{path}: altered since it was written; save the layer again with prune --save-layers "
            "in a new run directory"
        )
    weight, inputs, hessian = (tensors.get(name) for name in ("weight", "inputs", "hessian"))
    if weight is None or weight.dim() != 2:
        raise DataError(f"{path} holds no `weight` of shape (R, C)")
    if inputs is not None:
        inputs = inputs[None] if inputs.dim() == 2 else inputs
        if inputs.dim() != 3 or inputs.shape[-1] != weight.shape[1]:
            raise DataError(f"{path}: `inputs` must have shape (sequences, tokens, C)")
        return SavedLayer(weight, inputs, hessian, inputs[..., 0].numel(), inputs.shape[0])
    if hessian is None:
        raise DataError(f"{path} holds neither `inputs` nor `hessian`")
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        raise DataError(f"{path}: `hessian` must have shape (C, C)")
    if not metadata.get("tokens", "").isdigit() or int(metadata["tokens"]) < 1:
        raise DataError(f"{path}: a `hessian` needs its number of `tokens` in the file's metadata")
    sequences = metadata.get("sequences", "1")
    return SavedLayer(
        weight,
        None,
        hessian,
        int(metadata["tokens"]),
        int(sequences) if sequences.isdigit() else 1,
    )
