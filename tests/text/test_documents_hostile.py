"""Text data sets that are damaged, odd or immense: the right documents or a DataError."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.text import rows as text_rows
from pipeline.text.documents import TextFile, read_documents
from storage.errors import DataError
from tests.support.hostile import HOSTILE, Watch, dump, examples, spoiled
from tests.support.processes import CONTEXT
from tests.support.texts import calibration_ids, evaluation_ids
from tests.support.tiny_models import byte_tokenizer

TEXTS = ["one", "", None, "zwei\n\nund drei", "  ", "𝟜 quatre", "x" * 3000]
KINDS = (".txt", ".jsonl", ".parquet", ".arrow")


def write(path: Path, texts: list[Any], kind: Any = None) -> Path:
    """The texts as a data set of the kind that the name's ending tells."""
    if path.suffix == ".txt":
        path.write_text("\n".join(text or "" for text in texts), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(dump({"id": 7, "text": text}) + "\n" for text in texts))
    else:
        column = pa.array(texts, kind or pa.string())
        table = pa.table({"id": list(range(len(texts))), "text": column})
        if path.suffix == ".parquet":
            pq.write_table(table, path, row_group_size=3)
        else:
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=3)
    return path


@examples(250)
@given(data=st.data())
def test_damaged_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "documents"
    folder.mkdir(exist_ok=True)
    path = write(folder / f"d{data.draw(st.sampled_from(KINDS))}", TEXTS)
    path.write_bytes(data.draw(spoiled(path.read_bytes())))

    def read() -> None:
        assert all(isinstance(text, str) for text in read_documents(str(path)))

    Watch(folder).run(read)


@examples(150)
@given(rows=st.lists(st.one_of(st.sampled_from(HOSTILE), st.text()), min_size=1, max_size=5))
def test_rows_of_anything(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    folder = tmp_path_factory.getbasetemp() / "rows"
    folder.mkdir(exist_ok=True)
    path = folder / "d.jsonl"
    text = "".join(dump({"text": row}) + "\n" for row in rows)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    plain = [row for row in rows if isinstance(row, str)]
    fine = all(row is None or isinstance(row, str) for row in rows) and "\ud800" not in plain

    def read() -> None:
        found = list(read_documents(str(path)))
        assert all(isinstance(text, str) for text in found)
        assert not fine or found == plain

    Watch(folder).run(read)


# Offsets of two strings of 1,000 and 77 bytes, damaged: Arrow itself would crash on them.
OFFSETS = [[0, 2**31 - 1, 2**31 - 1], [0, -5, 3], [0, 1000, 2**30], [0, 3, 1], [-(2**31), 0, 0]]


def _read(path: str) -> None:
    try:
        list(read_documents(path))
    except DataError:
        return
    raise AssertionError("damaged offsets were accepted")


@pytest.mark.parametrize("offsets", OFFSETS)
def test_offsets_that_lead_out_of_an_arrow_file(tmp_path: Path, offsets: list[int]) -> None:
    """In a process of its own, since what it is about ends with a bus error."""
    path = write(tmp_path / "d.arrow", ["a" * 1000, "b" * 77])
    raw, good = path.read_bytes(), np.array([0, 1000, 1077], dtype=np.int32).tobytes()
    assert raw.count(good) == 1
    path.write_bytes(raw.replace(good, np.array(offsets, dtype=np.int32).tobytes()))
    process: Any = CONTEXT.Process(target=_read, args=(str(path),))
    process.start()
    process.join()
    assert process.exitcode == 0, signal.strsignal(-process.exitcode)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_lot(tmp_path: Path, kind: str) -> None:
    """Nulls are skipped, empty documents kept, and long lines read as they are."""
    texts = [None, "", "a\r\nb" if kind != ".txt" else "a\nb", " ", "y" * 5_000_000, None, "ende"]
    path = write(tmp_path / f"d{kind}", texts)
    found = list(read_documents(str(path)))
    if kind == ".txt":
        (document,) = found
        assert isinstance(document, TextFile)
        assert "".join(document.pieces()) == path.read_text(encoding="utf-8")
    else:
        assert found == [text for text in texts if text is not None]


STRINGS = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", STRINGS, ids=str)
def test_bytes_that_are_not_utf8_in_columns(tmp_path: Path, kind: Any) -> None:
    raw = pa.array([b"fine", b"na\xefve"], pa.binary())
    values = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    column = values.dictionary_encode() if pa.types.is_dictionary(kind) else values.cast(kind)
    table = pa.table({"text": column})
    with pa.ipc.new_stream(str(tmp_path / "d.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_documents(str(tmp_path / "d.arrow")))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2]),
        pa.array([["a"], ["b"]]),
        pa.array([{"a": "b"}, None]),
        pa.array([b"a", b"b"], pa.binary()),
        pa.nulls(2),
    ],
    ids=lambda column: str(column.type),
)
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_column_of_another_type_is_refused(tmp_path: Path, column: Any, suffix: str) -> None:
    table, path = pa.table({"text": column}), tmp_path / f"d{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    for name in (None, "text"):
        with pytest.raises(DataError, match="--text-column"):
            list(read_documents(str(path), name))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts", [[], [""], [None, None], [" ", "\n"]])
def test_no_text_at_all(tmp_path: Path, kind: str, texts: list[Any]) -> None:
    path = str(write(tmp_path / f"d{kind}", texts))
    tokenizer = byte_tokenizer()
    for read in (
        lambda: list(read_documents(path)),
        lambda: calibration_ids(tokenizer, path, None, 1, 4, 0),
        lambda: evaluation_ids(tokenizer, path, None, 4),
    ):
        with pytest.raises(DataError, match=r"d\.\w+ holds no text"):
            read()


def test_a_line_too_long_to_be_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_rows, "MAX_LINE_BYTES", 1 << 20)
    long = "x" * ((1 << 20) + 1)
    with pytest.raises(DataError, match="line 2 is longer than 1 MiB"):
        list(read_documents(str(write(tmp_path / "d.jsonl", ["a", long, "b"]))))


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_file_is_read_in_little_memory(tmp_path: Path, kind: str) -> None:
    """100 MB in rows of 100 kB, 1.6 GB of a text, or a line of 1.6 GB that is mostly a hole."""
    path = tmp_path / f"d{kind}"
    if kind in (".txt", ".jsonl"):
        with path.open("wb") as file:
            if kind == ".jsonl":
                file.write(b'{"text": "' + b"ab " * 40_000 + b'"}\n')
                file.truncate(1_600_000_000)
            else:
                for _ in range(1600):
                    file.write(b"some words " * 90_909 + b"\n")
    else:
        rows = pa.array(["ab " * 33_000] * 40)
        schema = pa.schema({"text": pa.string()})
        batch = pa.record_batch([rows], schema=schema)
        opened: Callable[..., Any] = pq.ParquetWriter if kind == ".parquet" else pa.ipc.new_file
        with opened(str(path), schema) as writer:
            for _ in range(25):
                writer.write_batch(batch)

    def read() -> None:
        tokens = calibration_ids(byte_tokenizer(), str(path), None, 2, 64, 0)
        assert tokens.shape == (2, 64)

    def refuse() -> None:
        with pytest.raises(DataError, match="line 2 is longer than"):
            read()

    Watch(tmp_path).run(refuse if kind == ".jsonl" else read)


class Endless:
    """A stream of empty documents, with an end where a test would otherwise not end."""

    def __init__(self) -> None:
        self.taken = 0

    def __call__(self, *_: object, **__: object) -> Iterator[tuple[str, dict[str, Any]]]:
        while True:
            self.taken += 1
            assert self.taken < 1_000_000, "the stream of empty documents is never left"
            yield "a row", {"text": ""}


def test_an_endless_stream_of_empty_documents_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Endless()
    monkeypatch.setattr("pipeline.text.documents._hub_rows", stream)
    assert calibration_ids(byte_tokenizer(), "some/data", None, 2, 8, 0).shape == (2, 8)
    assert stream.taken < 100_000
