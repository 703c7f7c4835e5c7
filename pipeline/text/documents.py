"""Streams the documents of a text data set: local files, or a data set of the Hugging Face hub.

    .txt              the whole file is one document
    .jsonl            one JSON object per line, one document each
    .parquet, .arrow  one document per row (.arrow: IPC file or stream, as `datasets` writes it)
    ID, ID:CONFIG     a data set of the hub, streamed: `some/data`, `some/data:en`

`datasets` is imported for hub data sets only: local files do not need it. pyarrow is imported for
its two formats only, so that a missing file is refused at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from storage.errors import DataError, first_line

LOCAL_SUFFIXES = (".txt", ".jsonl", ".parquet", ".arrow")
DEFAULT_CONFIG = {"allenai/c4": "en", "Salesforce/wikitext": "wikitext-2-raw-v1"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
MAX_TEXT_BYTES = 1 << 30  # limit on a .txt file, which is read into memory as a whole
MAX_LINE_BYTES = 1 << 26  # limit on a line of .jsonl
_ROWS_AT_ONCE = 64  # few, as a row may have megabytes of text


def is_local(dataset: str) -> bool:
    """Whether `dataset` names a local file, which need not exist, rather than a hub data set."""
    path = Path(dataset)
    identifier = dataset.partition(":")[0]
    return (
        path.suffix.lower() in LOCAL_SUFFIXES
        or path.exists()
        or not _HUB_ID.fullmatch(identifier)
        or identifier.startswith(".")
    )


def check_dataset(dataset: str) -> None:
    """Raises `DataError` where `dataset` names a local file that is missing or of no known kind.

    Opens no file and asks no hub.
    """
    if is_local(dataset):
        _require_readable(Path(dataset))


def _require_readable(path: Path) -> None:
    if not path.exists():
        raise DataError(f"no such file: {path}: --dataset takes a file or the id of a hub data set")
    if not path.is_file():
        raise DataError(f"{path} is not a file: give one of its {', '.join(LOCAL_SUFFIXES)} files")
    if path.suffix.lower() not in LOCAL_SUFFIXES:
        raise DataError(
            f"{path}: unknown kind of file '{path.suffix}': give one that ends in "
            + ", ".join(LOCAL_SUFFIXES)
        )


def read_documents(
    dataset: str,
    text_column: str | None = None,
    *,
    splits: tuple[str, ...] = ("train",),
    revision: str | None = None,
) -> Iterator[str]:
    """Yield the documents of `dataset` in their order; reads only as far as they are consumed.

    text_column: None for the column `text`, or the only column of strings. splits: of a hub data
    set, the first of these that it has is read. revision: of a hub data set, the commit; None for
    the newest. Rows with null are skipped; empty rows are not, because they count when documents
    are joined with blank lines.

    Raises DataError, naming the file and the position in it, if the data is missing, of an unknown
    kind, cannot be decoded, has no text column, or has no text at all.
    """
    documents = (
        _local_documents(Path(dataset), text_column)
        if is_local(dataset)
        else _hub_documents(dataset, text_column, splits, revision)
    )
    some_text = False
    for document in documents:
        some_text = some_text or bool(document.strip())
        yield document
    if not some_text:
        raise DataError(f"{dataset} holds no text: give another --dataset")


def _local_documents(path: Path, text_column: str | None) -> Iterator[str]:
    readers: dict[str, Callable[[Path, str | None], Iterator[str]]] = {
        ".txt": _txt_documents,
        ".jsonl": _jsonl_documents,
        ".parquet": _parquet_documents,
        ".arrow": _arrow_documents,
    }
    _require_readable(path)
    reader = readers[path.suffix.lower()]
    try:
        yield from reader(path, text_column)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _txt_documents(path: Path, text_column: str | None) -> Iterator[str]:
    if text_column is not None:
        raise DataError(f"{path} is plain text and has no columns: leave out --text-column")
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise DataError(
            f"{path} is one document of more than {MAX_TEXT_BYTES >> 20} MiB: give it as .jsonl, "
            ".parquet or .arrow, which are read a document at a time"
        )
    yield _decoded(path.read_bytes(), path, line=1, offset=0).replace("\r\n", "\n")


def _decoded(data: bytes, path: Path, *, line: int, offset: int) -> str:
    """Decode UTF-8. offset, line: where `data` starts in `path`, for messages."""
    mark = 3 if offset == 0 and data.startswith(b"\xef\xbb\xbf") else 0
    try:
        return data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        place = mark + error.start
        raise DataError(
            f"{path} is not UTF-8: byte 0x{data[place]:02x} at offset {offset + place}, line "
            f"{line + data.count(10, 0, place)}: convert it, e.g. with iconv -t UTF-8"
        ) from error


def _jsonl_documents(path: Path, text_column: str | None) -> Iterator[str]:
    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        offset = 0
        with path.open("rb") as file:
            lines = iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")
            for number, raw in enumerate(lines, start=1):
                if len(raw) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path}, line {number} is longer than {MAX_LINE_BYTES >> 20} MiB: put one "
                        "document on a line"
                    )
                text = _decoded(raw, path, line=number, offset=offset)
                offset += len(raw)
                if not text.strip():
                    continue
                try:
                    row = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}, line {number} is not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise DataError(f"{path}, line {number} is not a JSON object")
                yield f"{path}, line {number}", row

    yield from _row_documents(str(path), rows(), text_column)


def _row_documents(
    name: str, rows: Iterable[tuple[str, dict[str, Any]]], text_column: str | None
) -> Iterator[str]:
    """The texts of rows. rows: (position for messages, column → value). name: of the data set."""
    column = text_column
    columns: dict[str, None] = {}  # an ordered set of all columns so far
    has_column = False
    for place, row in rows:
        columns |= dict.fromkeys(row)
        if column is None:
            strings = [key for key, value in row.items() if isinstance(value, str)]
            if "text" in row:
                column = "text"
            elif len(strings) == 1:
                column = strings[0]
            elif strings:
                raise _no_text_column(name, columns)
            else:
                continue  # only nulls: a later row decides
        has_column = has_column or column in row
        value = row.get(column)
        if value is None:
            continue
        if not isinstance(value, str):
            raise DataError(
                f"{place}: '{column}' is not a string but {type(value).__name__}: "
                "name the text's column with --text-column"
            )
        try:
            value.encode("utf-8")  # fails for half a surrogate pair, which JSON can escape
        except UnicodeEncodeError as error:
            raise DataError(f"{place}: '{column}' is not valid Unicode: {error}") from error
        yield value
    if columns and not has_column:
        raise _no_text_column(name, columns, text_column)


def _no_text_column(name: str, columns: Iterable[str], text_column: str | None = None) -> DataError:
    what = f"no column '{text_column}'" if text_column else "no column that is plainly the text"
    return DataError(f"{name} has {what}: choose one with --text-column: {', '.join(columns)}")


def _parquet_documents(path: Path, text_column: str | None) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            column = _column_of(file.schema_arrow, path, text_column)
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[column]):
                yield from _strings(batch.column(0), path)
    except pa.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file: {first_line(error)}") from error


def _arrow_documents(path: Path, text_column: str | None) -> Iterator[str]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            for batch in _arrow_batches(source):
                index = batch.schema.get_field_index(_column_of(batch.schema, path, text_column))
                column = batch.column(index)
                _validate(column, path)
                for start in range(0, len(column), _ROWS_AT_ONCE):
                    yield from _strings(column.slice(start, _ROWS_AT_ONCE), path)
    except pa.ArrowException as error:
        raise DataError(f"{path} is not a readable Arrow file: {first_line(error)}") from error


def _validate(column: Any, path: Path) -> None:
    """Checks a column first: Arrow trusts its offsets, and damaged ones would end the process."""
    import pyarrow as pa

    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" in str(error):
            raise DataError(f"{path} holds a string that is not UTF-8: {error}") from error
        raise


def _arrow_batches(source: Any) -> Iterator[Any]:
    """The record batches of an IPC file, or of an IPC stream (what `datasets` writes)."""
    import pyarrow as pa

    try:
        file = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        yield from pa.ipc.open_stream(source)
        return
    for index in range(file.num_record_batches):
        yield file.get_batch(index)


def _column_of(schema: Any, path: Path, text_column: str | None) -> str:
    from pyarrow import types

    def holds_text(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return bool(
            types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
        )

    strings = [field.name for field in schema if holds_text(field.type)]
    wanted = text_column or ("text" if "text" in strings else None)
    if wanted is None and len(strings) == 1:
        return str(strings[0])
    if wanted is None or wanted not in schema.names:
        raise _no_text_column(str(path), schema.names, text_column)
    if wanted not in strings:
        kind = schema.field(wanted).type
        raise DataError(f"{path}: '{wanted}' holds {kind}, not strings: choose with --text-column")
    return wanted


def _strings(column: Any, path: Path) -> Iterator[str]:
    try:
        values = column.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} holds a string that is not UTF-8: {error}") from error
    return (value for value in values if value is not None)


def hub_revision(dataset: str, wanted: str | None = None) -> str:
    """The present commit of a hub data set, at its branch, tag or commit `wanted` (None: newest).

    Raises DataError if the hub does not return one.
    """
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(dataset.partition(":")[0], revision=wanted).sha
    except Exception as error:
        raise _not_from_the_hub(dataset, error) from error
    if not commit:
        raise DataError(f"{dataset}: the hub names no commit of it")
    return str(commit)


def _not_from_the_hub(dataset: str, error: Exception) -> DataError:
    """The error for any failure: the hub's client and its parsers have no common base class."""
    return DataError(
        f"{dataset} is not a local file and cannot be read from the hub "
        f"({type(error).__name__}: {first_line(error)}): check the name and the network"
    )


def _hub_documents(
    dataset: str, text_column: str | None, splits: tuple[str, ...], revision: str | None
) -> Iterator[str]:
    try:
        import datasets  # imported here, because local files do not need it
    except ImportError as error:
        raise DataError(
            f"{dataset} is not a local file, and reading it from the hub needs "
            "`pip install datasets`"
        ) from error
    identifier, _, config = dataset.partition(":")
    try:
        parts = datasets.load_dataset(
            identifier,
            config or DEFAULT_CONFIG.get(identifier),
            streaming=True,
            revision=revision,
        )
        split = next((name for name in splits if name in parts), None)
        if split is None:
            raise DataError(f"{dataset} has no split {' or '.join(splits)}, but {', '.join(parts)}")
        rows = ((f"{dataset}, row {n}", row) for n, row in enumerate(parts[split], start=1))
        yield from _row_documents(dataset, rows, text_column)
    except DataError:
        raise
    except Exception as error:
        raise _not_from_the_hub(dataset, error) from error
