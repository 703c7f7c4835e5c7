"""Streams the rows of a data file, each with its place for messages, at a bounded memory.

A row is a dict from column to value. Files of text are decoded a line, or a piece, at a time;
Parquet and Arrow files are read by pyarrow, a few rows at a time, only in the columns asked for.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.text.files import TextPath, unreadable
from storage.errors import DataError, InputError, first_line
from storage.files.names import by_utf8_name

Row = tuple[str, dict[str, Any]]
"""A row's place, for messages, and its values by column."""

MAX_LINE_BYTES = 1 << 26  # limit on a line of .jsonl, on a value of .json and on a cell of .csv
_ROWS_AT_ONCE = 64  # few, as a row may have megabytes of text
_JSON_PIECE = 1 << 16  # characters that are read at a time


def rows_of(file: TextPath, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of a file that has rows, in order.

    columns: those that are wanted of a Parquet or Arrow file, where others need not be read; None
    for all.

    Raises DataError, naming the file and the place, for what cannot be read or decoded.
    """
    readers: dict[str, Callable[[], Iterator[Row]]] = {
        ".jsonl": lambda: _json_lines(file),
        ".ndjson": lambda: _json_lines(file),
        ".json": lambda: _json_values(file),
        ".csv": lambda: _csv_rows(file, ","),
        ".tsv": lambda: _csv_rows(file, "\t"),
        ".parquet": lambda: _parquet_rows(file.path, columns),
        ".arrow": lambda: _arrow_rows(file.path, columns),
    }
    try:
        yield from readers[file.kind]()
    except OSError as error:
        raise damaged_or_unreadable(file, error) from error


def damaged_or_unreadable(file: TextPath, error: OSError) -> InputError:
    """The error of a failed read; a codec reports a damaged file as an OSError without a number."""
    if error.errno is None or (file.compression is not None and error.filename is None):
        return DataError(
            f"{file.path} is not a readable {file.compression or file.kind} file: "
            f"{first_line(error)}: it is damaged or cut off"
        )
    return unreadable(file.path, error)


def open_text(file: TextPath) -> BinaryIO:
    """The decompressed bytes of a file of text; OSError as of `open`."""
    if file.compression is None:
        return file.path.open("rb")
    import pyarrow as pa

    source = file.path.open("rb")
    try:
        stream = pa.CompressedInputStream(pa.PythonFile(source, mode="r"), file.compression)
    except BaseException:
        source.close()
        raise
    return io.BufferedReader(_Decompressed(stream, source), 1 << 16)


class _Decompressed(io.RawIOBase):
    """pyarrow's stream as a raw stream of Python's, which can read lines."""

    def __init__(self, stream: Any, source: BinaryIO) -> None:
        self._stream, self._source = stream, source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._source.close()
        super().close()


def not_utf8(path: Path, error: UnicodeDecodeError, offset: int, line: int) -> DataError:
    """The error for what is not UTF-8. offset, line: where the bytes of `error` start in `path`."""
    line += error.object.count(10, 0, error.start)
    return DataError(
        f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
        f"{offset + error.start}, line {line}: convert it, e.g. with iconv -t UTF-8"
    )


def decoded(data: bytes, path: Path, *, line: int, offset: int) -> str:
    """Decode UTF-8. offset, line: where `data` starts in `path`, for messages."""
    mark = 3 if offset == 0 and data.startswith(b"\xef\xbb\xbf") else 0
    try:
        return data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error, offset + mark, line) from error


def _json_lines(file: TextPath) -> Iterator[Row]:
    offset = 0
    with open_text(file) as opened:
        lines = iter(lambda: opened.readline(MAX_LINE_BYTES + 1), b"")
        for number, raw in enumerate(lines, start=1):
            if len(raw) > MAX_LINE_BYTES:
                raise DataError(
                    f"{file.path}, line {number} is longer than {MAX_LINE_BYTES >> 20} MiB: put "
                    "one document on a line"
                )
            text = decoded(raw, file.path, line=number, offset=offset)
            offset += len(raw)
            if not text.strip():
                continue
            place = f"{file.path}, line {number}"
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place} is not JSON: {error}") from error
            yield place, _object(row, place)


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place} is not a JSON object")
    return value


def _json_values(file: TextPath) -> Iterator[Row]:
    """The objects of a .json file: those of a list, or one after another, at any line breaks."""
    with open_text(file) as opened:
        buffer = _JsonBuffer(file.path, io.TextIOWrapper(opened, "utf-8-sig", newline=""))
        try:
            in_list = buffer.skip("") == "["
            if in_list:
                buffer.take(1)
            number = 0
            while (head := buffer.skip("," if in_list and number else "")) not in ("", "]"):
                number += 1
                place = f"{file.path}, object {number}"
                yield place, _object(buffer.value(place), place)
            if (head == "]") != in_list:
                raise DataError(f"{file.path} is not JSON: its list does not end: it is cut off")
            if in_list:
                buffer.take(1)
                if buffer.skip(""):
                    raise DataError(f"{file.path} is not JSON: there is text after its list")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file.path} is not UTF-8: {error}: convert it, e.g. with iconv -t UTF-8"
            ) from error


class _JsonBuffer:
    """The part of a JSON text that is not decoded yet."""

    def __init__(self, path: Path, stream: io.TextIOWrapper) -> None:
        self._path, self._stream, self._text, self._at = path, stream, "", 0
        self._decoder = json.JSONDecoder()

    def _more(self, size: int) -> bool:
        piece = self._stream.read(size)
        self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)

    def take(self, count: int) -> None:
        """Drops characters."""
        self._at += count

    def skip(self, separator: str) -> str:
        """Drops whitespace, one `separator` and whitespace; returns the next character, or ""."""
        while True:
            while self._at < len(self._text):
                letter = self._text[self._at]
                if letter == separator:
                    separator = ""
                elif not letter.isspace():
                    return letter
                self._at += 1
            if not self._more(_JSON_PIECE):
                return ""

    def value(self, place: str) -> Any:
        """The value that starts here."""
        size = _JSON_PIECE
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                # A number could go on; an object ends with its brace.
                if end < len(self._text) or isinstance(value, dict | list | str):
                    self._at = end
                    return value
            except RecursionError as error:
                raise DataError(f"{place} is not JSON: {error}") from error
            except ValueError as error:
                if len(self._text) - self._at > MAX_LINE_BYTES:
                    raise DataError(
                        f"{place} is not JSON, or longer than {MAX_LINE_BYTES >> 20} MiB: give "
                        "a list of objects, one document each"
                    ) from error
                if not self._more(size):
                    raise DataError(f"{place} is not JSON: {error}") from error
                size *= 2  # so that a long value is tried a few times only
                continue
            if not self._more(size):
                self._at = end
                return value


def _csv_rows(file: TextPath, delimiter: str) -> Iterator[Row]:
    with open_text(file) as opened:
        text = io.TextIOWrapper(opened, "utf-8-sig", newline="")
        csv.field_size_limit(MAX_LINE_BYTES)
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                place = f"{file.path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(
                        f"{place} has not as many cells as the header ({len(row)} columns): quote "
                        f"cells that hold a {'tab' if delimiter != ',' else 'comma'}"
                    )
                yield place, row
        except csv.Error as error:
            raise DataError(
                f"{file.path}, line {reader.line_num} is not CSV: {error}: write it with quotes "
                "around every text"
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file.path} is not UTF-8: {error}: convert it, e.g. with iconv -t UTF-8"
            ) from error


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with by_utf8_name(path) as readable, pq.ParquetFile(readable) as file:
            names = _wanted(file.schema_arrow.names, columns)
            number = 0
            # pyarrow also returns `a{b}` for the column `a.b`: columns are taken by name below.
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=names):
                yield from _batch_rows(batch, names, path, number)
                number += batch.num_rows
    except pa.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file: {first_line(error)}") from error


def _wanted(names: Sequence[str], columns: Sequence[str] | None) -> list[str]:
    return [name for name in names if columns is None or name in columns]


def _arrow_rows(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    import pyarrow as pa

    try:
        with by_utf8_name(path) as readable, pa.memory_map(str(readable)) as source:
            number = 0
            for batch in _arrow_batches(source):
                names = _wanted(batch.schema.names, columns)
                for name in names:
                    _validate(batch.column(batch.schema.get_field_index(name)), path)
                for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                    part = batch.slice(start, _ROWS_AT_ONCE)
                    yield from _batch_rows(part, names, path, number + start)
                number += batch.num_rows
    except pa.ArrowException as error:
        raise DataError(f"{path} is not a readable Arrow file: {first_line(error)}") from error


def _batch_rows(batch: Any, names: Sequence[str], path: Path, first: int) -> Iterator[Row]:
    """The rows of a record batch. first: number of the batch's first row in the file."""
    try:
        values = {
            name: batch.column(batch.schema.get_field_index(name)).to_pylist() for name in names
        }
    except UnicodeDecodeError as error:
        raise DataError(f"{path} holds a string that is not UTF-8: {error}") from error
    for index in range(batch.num_rows):
        row = {name: column[index] for name, column in values.items()}
        yield f"{path}, row {first + index + 1}", row


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


def schema_names(file: TextPath) -> list[str] | None:
    """The columns that a Parquet or Arrow file declares; None for a file of another kind.

    Raises DataError if the file is not of its kind.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.kind == ".parquet":
            with by_utf8_name(file.path) as readable, pq.ParquetFile(readable) as opened:
                return list(opened.schema_arrow.names)
        if file.kind == ".arrow":
            with by_utf8_name(file.path) as name, pa.memory_map(str(name)) as source:
                try:
                    return list(pa.ipc.open_file(source).schema.names)
                except pa.ArrowInvalid:
                    source.seek(0)
                    return list(pa.ipc.open_stream(source).schema.names)
    except pa.ArrowException as error:
        kind = "Parquet" if file.kind == ".parquet" else "Arrow"
        raise DataError(
            f"{file.path} is not a readable {kind} file: {first_line(error)}"
        ) from error
    except OSError as error:
        raise damaged_or_unreadable(file, error) from error
    return None
