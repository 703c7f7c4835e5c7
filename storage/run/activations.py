"""Activation shards and calibration tokens as Arrow IPC files.

pyarrow reads them: `pyarrow.ipc.open_file(path).read_all()` gives a table with a column of
fixed-shape tensors, `hidden_states` (seqlen, hidden) or `input_ids` (seqlen,), one row per
sequence. Where only some tokens count, a second column `counted` (seqlen,) has 1 for these and 0
for the others, as uint8. Arrow has no bfloat16: such values are stored as uint16 with the same
bits, the upper half of a float32's. The schema metadata are those of the first column:

    schema_version  "1"                     kind       "activations" or "tokens"
    dtype           e.g. "bfloat16"         stored_as  e.g. "uint16"
    shape           e.g. "[2048, 4096]"     block, shard   decimal numbers (activations only)
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch.utils.dlpack import from_dlpack

from storage.errors import ConfigError, CorruptFileError, RunDirectoryError
from storage.files.commit import open_regular_file, verify_file, write_new_file
from storage.files.hashing import StoredFile
from storage.files.os_errors import is_damage

ARROW_SCHEMA = 1

_STORED_AS: dict[torch.dtype, tuple[Any, torch.dtype]] = {
    torch.float32: (pa.float32(), torch.float32),
    torch.float16: (pa.float16(), torch.float16),
    torch.bfloat16: (pa.uint16(), torch.uint16),
    torch.int32: (pa.int32(), torch.int32),
    torch.int64: (pa.int64(), torch.int64),
    torch.uint8: (pa.uint8(), torch.uint8),
}
_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in _STORED_AS}
_ACTIVATIONS = (torch.float32, torch.float16, torch.bfloat16)
# Kind of file -> its columns: the first is always there, the second may be.
_COLUMNS = {"activations": ("hidden_states",), "tokens": ("input_ids", "counted")}


def write_activation_shard(
    path: Path, batches: Iterable[torch.Tensor], *, block: int, index: int
) -> StoredFile:
    """Write the inputs of `block` for some sequences to the new file `path`.

    batches: tensors (n, seqlen, hidden) on any device, float32, float16 or bfloat16, all of the
    same dtype, seqlen and hidden; n may differ. Each becomes a record batch. index: number of the
    activation shard. The file is durable when this returns, and absent if it raises.

    Raises ValueError for no batches or unequal ones, FileExistsError if `path` exists,
    ResourceError if the disk is full.
    """
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError(f"{path}: no batches to write")
    if first.dim() != 3 or first.dtype not in _ACTIVATIONS:
        raise ValueError(f"{path}: a batch is {first.dtype} {tuple(first.shape)}")
    numbers = {"block": str(block), "shard": str(index)}
    everything = itertools.chain([first], iterator)
    return _write(path, "activations", first.dtype, ((batch,) for batch in everything), numbers)


def write_tokens(
    path: Path, tokens: torch.Tensor, counted: torch.Tensor | None = None
) -> StoredFile:
    """Write token ids (nsamples, seqlen) int64 to the new file `path`, as int32 if they fit.

    counted: (nsamples, seqlen) bool, at least one of them True; None for a file without it. Errors
    as in `write_activation_shard`.
    """
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or not tokens.numel():
        raise ValueError(f"{path}: tokens are {tokens.dtype} {tuple(tokens.shape)}")
    fits = int(tokens.min()) >= -(2**31) and int(tokens.max()) < 2**31
    columns = [tokens.to(torch.int32) if fits else tokens]
    if counted is not None:
        if counted.shape != tokens.shape or counted.dtype != torch.bool or not counted.any():
            raise ValueError(f"{path}: counted is {counted.dtype} {tuple(counted.shape)}")
        columns.append(counted.to(torch.uint8))
    return _write(path, "tokens", torch.int64, [tuple(columns)], {})


def _write(
    path: Path,
    kind: str,
    dtype: torch.dtype,
    batches: Iterable[tuple[torch.Tensor, ...]],
    numbers: dict[str, str],
) -> StoredFile:
    """Writes record batches, each given as a tensor (n, *shape) for every column.

    dtype: of the first column's values, which may be stored in another one.
    """
    writer: Any = None
    shape: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    rows = 0
    with write_new_file(path) as file:
        for batch in batches:
            if writer is None:
                shape, dtypes = tuple(batch[0].shape[1:]), tuple(c.dtype for c in batch)
                schema = _schema(kind, dtype, dtypes, shape, numbers)
                writer = pa.ipc.new_file(file, schema)
            for column, expected in zip(batch, dtypes, strict=True):
                if tuple(column.shape[1:]) != shape or column.dtype != expected:
                    raise ValueError(f"{path}: a batch is {column.dtype} {tuple(column.shape)}")
            writer.write_batch(pa.record_batch(list(map(_array, batch)), schema=schema))
            rows += batch[0].shape[0]
        writer.close()
    return file.stored(path.name, rows)


def _schema(
    kind: str,
    dtype: torch.dtype,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    numbers: dict[str, str],
) -> Any:
    """The schema of a file of tensors of `shape`. dtypes: as stored, one for each column."""
    metadata = {
        "schema_version": str(ARROW_SCHEMA),
        "kind": kind,
        "dtype": str(dtype).removeprefix("torch."),
        "stored_as": str(_STORED_AS[dtypes[0]][1]).removeprefix("torch."),
        "shape": json.dumps(shape),
        **numbers,
    }
    fields = [
        pa.field(name, _tensor_type(_STORED_AS[stored][0], shape), nullable=False)
        for name, stored in zip(_COLUMNS[kind], dtypes, strict=False)
    ]
    return pa.schema(fields, metadata=metadata)


def _array(column: torch.Tensor) -> Any:
    """A tensor (n, *shape) as an Arrow array of n tensors."""
    (arrow_type, bits), shape = _STORED_AS[column.dtype], tuple(column.shape[1:])
    values = column.detach().cpu().contiguous().view(bits).view(-1).numpy()
    flat = pa.Array.from_buffers(arrow_type, values.size, [None, pa.py_buffer(values)])
    storage = pa.FixedSizeListArray.from_arrays(flat, math.prod(shape))
    return pa.ExtensionArray.from_storage(_tensor_type(arrow_type, shape), storage)


def _tensor_type(arrow_type: Any, shape: tuple[int, ...]) -> Any:
    if not 0 < math.prod(shape) < 2**31:
        raise ConfigError(
            f"a sequence of shape {shape} does not fit one Arrow row of 2^31 values; lower --seqlen"
        )
    return pa.fixed_shape_tensor(arrow_type, shape)


class ActivationShard:
    """One activation shard, mapped into memory; made by `open_activation_shard`.

    rows: number of sequences, each (seqlen, hidden). dtype: of the values. block: number of the
    block whose inputs they are. index: number of the activation shard.
    """

    def __init__(self, path: Path, batches: list[torch.Tensor], metadata: dict[str, str]) -> None:
        self.path = path
        self._batches = batches
        self._starts = list(itertools.accumulate((len(b) for b in batches), initial=0))
        self.rows = self._starts[-1]
        self.seqlen, self.hidden = batches[0].shape[1:]
        self.dtype = batches[0].dtype
        self.block = int(metadata["block"])
        self.index = int(metadata["shard"])

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Sequences start:stop as a tensor (stop - start, seqlen, hidden) on the CPU.

        Within one record batch this is a view of the mapped file, without a copy. Do not write to
        it: later reads of this shard would see the change, though the file would not. Across record
        batches the rows are copied together. Raises IndexError for rows out of range.
        """
        if not 0 <= start < stop <= self.rows:
            raise IndexError(f"{self.path} has {self.rows} sequences: no {start}:{stop}")
        parts = []
        for number in range(bisect.bisect_right(self._starts, start) - 1, len(self._batches)):
            first = self._starts[number]
            if first >= stop:
                break
            parts.append(self._batches[number][max(start - first, 0) : stop - first])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def close(self) -> None:
        """Drop the mapping; it ends when the last tensor read from it is gone."""
        self._batches = []
        self._starts = [0]
        self.rows = 0

    def __enter__(self) -> ActivationShard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_activation_shard(path: Path, *, sha256: str | None) -> ActivationShard:
    """Map an activation shard into memory; nothing is copied, and pages are read on first use.

    sha256: of the file, compared first; None for no comparison. Raises CorruptFileError if the file
    is missing, altered or not an activation shard, RunDirectoryError for another schema version.
    """
    (batches, *_), metadata = _open(path, "activations", 3, sha256)
    try:
        return ActivationShard(path, batches, metadata)
    except (KeyError, ValueError) as error:
        raise CorruptFileError(f"{path}: malformed schema metadata") from error


def read_tokens(path: Path, sha256: str | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token ids (nsamples, seqlen) int64, and which of them count, (nsamples, seqlen) bool.

    Both are copies; the second is None for a file without it. Errors as in `open_activation_shard`.
    """
    (ids, *more), _ = _open(path, "tokens", 2, sha256)
    tokens = torch.cat(ids).to(torch.int64, copy=True)
    if not more:
        return tokens, None
    counted = torch.cat(more[0])
    if bool((counted > 1).any()) or not bool(counted.any()):
        raise CorruptFileError(f"{path}: not a readable tokens file (values of `counted`)")
    return tokens, counted.bool()


def _open(
    path: Path, kind: str, dims: int, sha256: str | None
) -> tuple[list[list[torch.Tensor]], dict[str, str]]:
    """Views (n, *shape) of the record batches of each column, and the schema metadata."""
    if sha256 is not None:
        verify_file(path, sha256)
    try:
        with open_regular_file(path) as file:
            # Copy-on-write: a model that writes to its input changes this view, not the file. On a
            # read-only mapping the kernel would kill the process.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        reader = pa.ipc.open_file(pa.py_buffer(mapped))
        raw = reader.schema.metadata or {}
        metadata = {key.decode(): value.decode() for key, value in raw.items()}
        if metadata["schema_version"] != str(ARROW_SCHEMA):
            raise RunDirectoryError(
                f"{path}: schema_version is {metadata['schema_version']}, this prox24 reads "
                f"{ARROW_SCHEMA}; use the version that wrote it, or a new run directory"
            )
        if metadata["kind"] != kind or reader.num_record_batches == 0:
            raise ValueError(f"not {kind}")
        names, known = reader.schema.names, _COLUMNS[kind]
        if not names or tuple(names) != known[: len(names)]:
            raise ValueError(f"its columns are {names}")
        shape = tuple(json.loads(metadata["shape"]))
        dtype, stored = _BY_NAME[metadata["dtype"]], getattr(torch, metadata["stored_as"])
        columns: list[list[torch.Tensor]] = [[] for _ in names]
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            batch.validate()
            for index, views in enumerate(columns):
                view = _view(batch.column(index), torch.uint8 if index else stored, shape, dims)
                views.append(view.view(dtype) if kind == "activations" else view)
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        if isinstance(error, OSError) and not is_damage(error):
            raise
        raise CorruptFileError(f"{path}: not a readable {kind} file ({error})") from error
    return columns, metadata


def _view(column: Any, stored: torch.dtype, shape: tuple[int, ...], dims: int) -> torch.Tensor:
    """A record batch's column as a tensor (n, *shape) of the stored dtype, sharing its memory."""
    if not isinstance(column.type, pa.FixedShapeTensorType) or tuple(column.type.shape) != shape:
        raise ValueError("the column does not have the shape in the metadata")
    if len(shape) != dims - 1 or column.null_count:
        raise ValueError("nulls, or another number of dimensions")
    flat: torch.Tensor = from_dlpack(column.storage.flatten())
    if flat.dtype != stored:
        raise ValueError(f"values are {flat.dtype}, not {stored}")
    return flat.view(len(column), *shape)
