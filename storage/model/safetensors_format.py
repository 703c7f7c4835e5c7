"""The safetensors format: dtype names, and the header with the position of each tensor.

A file consists of 8 bytes (little-endian length n of the header), n bytes of JSON with each
tensor's dtype, shape and byte range, and the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from storage.errors import CorruptFileError, ModelError
from storage.files.checked_json import is_count
from storage.object_store import Readable

MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors format itself."""

_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name such as "BF16"; ModelError if there is none."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise ModelError(f"dtype {name} is not supported; convert the model to BF16") from None


def safetensors_dtype(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype; ModelError if there is none."""
    try:
        return _NAMES[dtype]
    except KeyError:
        raise ModelError(f"safetensors has no {dtype}; use bfloat16") from None


@dataclass(frozen=True)
class TensorEntry:
    """The entry of one tensor in a header.

    file: weight file, relative to the model folder.
    dtype: safetensors name, e.g. "BF16".
    start, end: absolute byte offsets in the file, end exclusive.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path, file: str) -> list[TensorEntry]:
    """The tensors of a weight file on a disk, as `header_entries` gives them."""
    with open(path, "rb", buffering=0) as stream:
        return header_entries(stream, os.fstat(stream.fileno()).st_size, str(path), file)


def header_entries(stream: Readable, size: int, path: str, file: str) -> list[TensorEntry]:
    """The tensors of one weight file in the order of their bytes, header checked.

    stream: at the file's start. size: bytes of the file. path: for messages. file: the entries'
    `file`. Raises ModelError for an unsupported dtype, CorruptFileError if the header is malformed
    or does not cover the file's bytes exactly, without gap or overlap.
    """
    raw = raw_header(stream, size, path)
    try:
        header = json.loads(raw[8:].decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path}: the safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CorruptFileError(f"{path}: the safetensors header is not an object")
    header.pop("__metadata__", None)
    entries = [_entry(path, file, name, item, len(raw)) for name, item in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    position = len(raw)
    for entry in entries:
        if entry.start != position:
            raise CorruptFileError(
                f"{path}: tensor {entry.name} starts at byte {entry.start}, not at {position}: "
                "overlap or gap; download the file again"
            )
        position = entry.end
    if position != size:
        state = f"truncated, {position - size} bytes short" if position > size else "too long"
        raise CorruptFileError(f"{path}: {state}; download the file again")
    return entries


def raw_header(stream: Readable, size: int, path: str) -> bytes:
    """The 8 length bytes and the JSON header at the start of `stream`; `path` is for messages.

    Raises CorruptFileError if there are fewer bytes than that, or more than the format allows.
    """
    prefix = stream.read(8) or b""
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise CorruptFileError(
            f"{path}: not a safetensors file, or truncated; download the file again"
        )
    return prefix + (stream.read(length) or b"")


def _entry(path: str, file: str, name: str, item: object, base: int) -> TensorEntry:
    broken = CorruptFileError(f"{path}: the header entry of tensor {name!r} is malformed")
    if not isinstance(item, dict):
        raise broken
    dtype, shape, offsets = item.get("dtype"), item.get("shape"), item.get("data_offsets")
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise broken
    if len(offsets) != 2 or len(shape) > 64 or not all(map(is_count, [*shape, *offsets])):
        raise broken
    if dtype not in _DTYPES:
        raise ModelError(f"{path}: tensor {name} has dtype {dtype[:20]}, which is not supported")
    expected = math.prod(shape) * _DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise CorruptFileError(
            f"{path}: tensor {name} has {offsets[1] - offsets[0]} bytes, its shape needs {expected}"
        )
    return TensorEntry(name, file, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def read_into(file: Readable, raw: torch.Tensor, what: str) -> None:
    """Fill `raw` (uint8, 1-d, CPU) from an unbuffered file; CorruptFileError if it ends early."""
    view = raw.numpy().data
    done = 0
    while done < len(view):
        count = file.readinto(view[done : done + 2**30])
        if not count:
            raise CorruptFileError(f"{what}: the file ends too early; download it again")
        done += count


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's values as bytes, row-major; shares memory if it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def header_for(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The start of a safetensors file that holds `tensors` in this order.

    It depends on the arguments alone, so that the same job writes the same bytes; the safetensors
    library orders the metadata differently in every process.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": safetensors_dtype(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text = text.ljust((len(text) + 7) // 8 * 8)  # aligns the values to 8 bytes
    return len(text).to_bytes(8, "little") + text
