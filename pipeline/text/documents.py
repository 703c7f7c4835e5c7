"""Streams the documents of a text data set: local files (see `pipeline.text.files`), or the hub's.

    ID, ID:CONFIG     a data set of the Hugging Face hub, streamed: `some/data`, `some/data:en`

`datasets` is imported for hub data sets only: local files do not need it. pyarrow is imported for
its formats and for compressed files only, so that a missing file is refused at once.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.text.columns import Conversation, Form, columns_read, find_form, text_of
from pipeline.text.files import TextPath, check_files, is_local, text_files, unreadable
from pipeline.text.rows import (
    Row,
    damaged_or_unreadable,
    not_utf8,
    open_text,
    rows_of,
    schema_names,
)
from storage.errors import DataError, first_line

DEFAULT_CONFIG = {"allenai/c4": "en", "Salesforce/wikitext": "wikitext-2-raw-v1"}
# A data set's form is decided by so many rows at most, of at most so many characters.
_HEAD_ROWS, _HEAD_CHARACTERS = 256, 1 << 20
_PIECE_BYTES = 1 << 16
WHOLE_BYTES = 1 << 20  # a text file up to this size is read at once


@dataclass(frozen=True)
class TextFile:
    """A text file that is read in pieces. size: in bytes; None where it is compressed, and can be
    read from its start only."""

    file: TextPath
    size: int | None

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """The text from byte `start` to `stop`, with `\\n` for `\\r\\n`.

        Characters that `start` or `stop` cut are left out. Raises DataError for what is not UTF-8.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        held, offset, lines = "", start, 1
        try:
            with open_text(self.file) as opened:
                if start:
                    opened.seek(start)
                while data := opened.read(_at_most(_PIECE_BYTES, offset, stop)):
                    skipped = _skipped(data, start) if offset == start else 0
                    offset += skipped
                    text = held + self._decoded(decoder, data[skipped:], offset, lines)
                    offset, lines = offset + len(data) - skipped, lines + data.count(10)
                    held = "\r" if text.endswith("\r") else ""
                    yield text[: len(text) - len(held)].replace("\r\n", "\n")
        except OSError as error:
            raise damaged_or_unreadable(self.file, error) from error
        rest = held if stop else held + self._decoded(decoder, b"", offset, lines)
        if rest:
            yield rest

    def _decoded(self, decoder: Any, data: bytes, offset: int, line: int) -> str:
        """`data`, which is at byte `offset`, in line `line` (from where reading began)."""
        try:
            return str(decoder.decode(data, final=not data))
        except UnicodeDecodeError as error:
            held = len(error.object) - len(data)  # bytes of the piece before
            raise not_utf8(self.file.path, error, offset - held, line) from error


def _at_most(size: int, offset: int, stop: int | None) -> int:
    return size if stop is None else min(size, stop - offset)


def _skipped(data: bytes, start: int) -> int:
    """How many of a file's first bytes are a mark, or of a character that starts before them."""
    if not start:
        return 3 if data.startswith(codecs.BOM_UTF8) else 0
    return next((n for n, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)


Document = str | Conversation | TextFile


class Documents:
    """The documents of a data set in their order; iterating reads only as far as it is consumed.

    forms: what was read as the text, in words, once it is known. rows, without: rows that were read
    so far, and those of them that had no text.

    Rows with null are skipped; empty rows are not, because they count when documents are joined
    with blank lines.
    """

    def __init__(
        self,
        dataset: str,
        text_column: str | None = None,
        *,
        splits: Sequence[str] = ("train",),
        revision: str | None = None,
    ) -> None:
        """text_column: see `columns.find_form`; None for `text` or a known form. splits: of a hub
        data set or a `DatasetDict`, the first of these that it has is read. revision: of a hub data
        set, the commit; None for the newest."""
        self.dataset, self._column = dataset, text_column
        self._splits, self._revision = tuple(splits), revision
        self.forms: list[str] = []
        self.rows, self.without, self.files = 0, 0, 0

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents.

        Raises DataError, naming the file and the position in it, if the data is missing, of an
        unknown kind, cannot be decoded, has no column that is plainly the text, or no text at all.
        """
        some_text = False
        local = is_local(self.dataset)
        for document in self._local() if local else self._hub():
            some_text = some_text or not isinstance(document, str) or bool(document.strip())
            yield document
        if not some_text:
            where, what = "", "another --dataset"
            if self.rows:
                where = f" in {' or '.join(self.forms)}, in {self.rows:,} rows"
                what += ", or choose with --text-column"
            raise DataError(f"{self.dataset} holds no text{where}: give {what}")

    def one_text(self) -> TextFile | None:
        """The text file that the data set is, if it is one that is read in pieces."""
        if not is_local(self.dataset):
            return None
        files = text_files(self.dataset, self._splits)
        if len(files) > 1 or files[0].kind != ".txt":
            return None
        document = self._plain(files[0])
        return document if isinstance(document, TextFile) else None

    def describe(self) -> dict[str, Any]:
        """What was read so far, as JSON."""
        rows = {"rows": self.rows, "rows_without_text": self.without} if self.rows else {}
        return {"read": " and ".join(self.forms), "files": self.files, **rows}

    def _local(self) -> Iterator[Document]:
        files = text_files(self.dataset, self._splits)
        check_files(files)
        form: Form | None = None
        for file in files:
            self.files += 1
            if file.kind == ".txt":
                self._use("plain text")
                yield self._plain(file)
                continue
            name = str(file.path)
            declared = schema_names(file)
            if form is None:
                head = [row for _, row in _head(rows_of(file))]
                if not head and not declared:
                    continue
                form = find_form(name, head, self._column, declared or ())
            elif declared is not None:
                find_form(name, [], "+".join(form.columns[:1]), declared)
            yield from self._documents(name, form, rows_of(file, columns_read(form)))

    def _plain(self, file: TextPath) -> str | TextFile:
        if self._column is not None:
            raise DataError(
                f"{file.path} is plain text and has no columns: leave out --text-column"
            )
        try:
            size = file.path.stat().st_size
        except OSError as error:
            raise unreadable(file.path, error) from error
        whole = TextFile(file, None if file.compression else size)
        if whole.size is not None and whole.size > WHOLE_BYTES:
            return whole
        pieces, characters = [], 0
        for piece in whole.pieces():
            pieces.append(piece)
            characters += len(piece)
            if characters > WHOLE_BYTES:
                return whole
        return "".join(pieces)

    def _documents(self, name: str, form: Form, rows: Iterator[Row]) -> Iterator[Document]:
        self._use(form.describe())
        some = False
        columns: dict[str, None] = {}
        for place, row in rows:
            self.rows += 1
            columns |= dict.fromkeys(row)
            document = text_of(form, row, place)
            if document is None:
                self.without += 1
                continue
            some = True
            yield document
        if columns and not some and not any(name in columns for name in columns_read(form)):
            raise DataError(
                f"{name} has no column '{form.columns[0]}': choose one with --text-column: "
                + ", ".join(columns)
            )

    def _use(self, form: str) -> None:
        if form not in self.forms:
            self.forms.append(form)

    def _hub(self) -> Iterator[Document]:
        rows = _hub_rows(self.dataset, self._splits, self._revision)
        head = _head(rows)
        if head:
            form = find_form(self.dataset, [row for _, row in head], self._column)
            yield from self._documents(self.dataset, form, itertools.chain(head, rows))


def _head(rows: Iterator[Row]) -> list[Row]:
    """The first rows, by which a form is decided."""
    head: list[Row] = []
    characters = 0
    for place, row in itertools.islice(rows, _HEAD_ROWS):
        head.append((place, row))
        characters += _characters_of(row)
        if characters > _HEAD_CHARACTERS:
            break
    return head


def _characters_of(row: Mapping[str, Any]) -> int:
    return sum(len(value) if isinstance(value, str | bytes | list) else 1 for value in row.values())


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


def _hub_rows(dataset: str, splits: Sequence[str], revision: str | None) -> Iterator[Row]:
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
        for number, row in enumerate(parts[split], start=1):
            yield f"{dataset}, row {number}", row
    except DataError:
        raise
    except Exception as error:
        raise _not_from_the_hub(dataset, error) from error


def read_documents(
    dataset: str,
    text_column: str | None = None,
    *,
    splits: Sequence[str] = ("train",),
    revision: str | None = None,
) -> Documents:
    """The documents of `dataset`; see `Documents`."""
    return Documents(dataset, text_column, splits=splits, revision=revision)
