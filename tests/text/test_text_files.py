"""Data sets in the files that others write: kinds, compressions, folders, and what is no such."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.text import files as text_files
from pipeline.text.documents import TextFile, read_documents
from pipeline.text.files import check_dataset, is_local, local_identity
from pipeline.text.long_text import PIECE, token_ids, token_stream
from pipeline.text.odd_text import oddity
from storage.errors import DataError, InputError
from tests.support.file_faults import as_a_plain_user
from tests.support.processes import CONTEXT
from tests.support.tiny_models import byte_tokenizer

TEXTS = ["one", 'zwei, "drei"\n\nund 4', "ünï 中文", "", "last\tone"]
ROWS = [{"url": f"u{n}", "text": text, "n": n} for n, text in enumerate(TEXTS)]


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
}


def as_csv(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def contents() -> dict[str, bytes]:
    """Ending → the rows as other programs write them."""
    compact = [json.dumps(row) for row in ROWS]
    return {
        ".jsonl": "\n".join(compact).encode(),
        ".ndjson": ("\n".join(compact) + "\n").encode(),
        ".json": json.dumps(ROWS, ensure_ascii=False).encode(),
        ".JSON": json.dumps(ROWS, indent=2).encode("utf-8-sig"),
        ".json as lines": "\n".join(compact).encode(),
        ".json one after another": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
        ".csv": as_csv(ROWS, ","),
        ".tsv": as_csv(ROWS, "\t"),
    }


@pytest.mark.parametrize("compression", list(COMPRESS))
@pytest.mark.parametrize("form", list(contents()))
def test_rows_of_text_files(tmp_path: Path, form: str, compression: str) -> None:
    path = tmp_path / f"c4-train.00000-of-01024{form.split()[0]}{compression}"
    path.write_bytes(COMPRESS[compression](contents()[form]))
    assert is_local(str(path))
    check_dataset(str(path))
    read = read_documents(str(path))
    assert list(read) == TEXTS
    assert read.describe() == {
        "read": "column `text`",
        "files": 1,
        "rows": 5,
        "rows_without_text": 0,
    }


def test_zstd(tmp_path: Path) -> None:
    """As `zstd` writes it, through pyarrow's own stream."""
    path = tmp_path / "d.jsonl.zst"
    with pa.OSFile(str(path), "wb") as sink, pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(contents()[".jsonl"])
    check_dataset(str(path))
    assert list(read_documents(str(path))) == TEXTS


def test_a_column_a_dotted_name_and_a_struct(tmp_path: Path) -> None:
    """A column named `a.b` beside a struct `a{b}`, in every kind that can hold them."""
    rows = [{"a": {"b": f"inner {n}", "c": 1}, "a.b": f"outer {n}", "m": None} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "both.parquet")
    (tmp_path / "both.json").write_text(json.dumps(rows))
    inner = [{"a": row["a"]} for row in rows]
    pq.write_table(pa.Table.from_pylist(inner), tmp_path / "inner.parquet")
    (tmp_path / "inner.jsonl").write_text("\n".join(map(json.dumps, inner)))
    outer = [{"a.b": row["a.b"]} for row in rows]
    pq.write_table(pa.Table.from_pylist(outer), tmp_path / "outer.parquet")
    for name in ("both.parquet", "both.json", "outer.parquet"):
        assert list(read_documents(str(tmp_path / name), "a.b")) == [f"outer {n}" for n in range(3)]
    for name in ("inner.parquet", "inner.jsonl"):
        assert list(read_documents(str(tmp_path / name), "a.b")) == [f"inner {n}" for n in range(3)]
    with pytest.raises(DataError, match="holds no text|no column"):
        list(read_documents(str(tmp_path / "inner.parquet"), "a.x"))


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "first"}\n'))
    (tmp_path / "b" / "c.json").write_text('[{"text": "second"}]')
    (tmp_path / "d.txt").write_text("third")
    (tmp_path / "README.md").write_text("# not text")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "e.txt").write_text("hidden")
    read = read_documents(str(tmp_path))
    assert list(read) == ["first", "second", "third"]
    assert read.describe()["files"] == 3
    assert read.describe()["read"] == "column `text` and plain text"


def test_no_single_row_decides(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"title": "a"}\n{"title": "b", "text": "the text"}\n{"title": "c"}\n')
    read = read_documents(str(path))
    assert list(read) == ["the text"]
    assert read.describe()["rows_without_text"] == 2
    rows = [{"messages": [{"role": "user", "content": "x"}]}] * 300 + [{"text": "late"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"line 301 has a column `text`, but .* --text-column"):
        list(read_documents(str(path)))


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_of_save_to_disk(tmp_path: Path, whole: bool) -> None:
    folder = tmp_path / "saved"
    data = datasets.Dataset.from_list(ROWS)
    if whole:
        data.save_to_disk(str(folder), num_shards=2)
    else:
        datasets.DatasetDict({"test": data.select([0]), "train": data}).save_to_disk(str(folder))
    assert list(read_documents(str(folder))) == TEXTS
    if not whole:
        assert list(read_documents(str(folder), splits=("test",))) == TEXTS[:1]
        identity = local_identity(str(folder))
        datasets.DatasetDict({"test": data.select([1]), "train": data}).save_to_disk(str(folder))
        assert local_identity(str(folder)) != identity
        datasets.DatasetDict({"test": data.select([0]), "train": data}).save_to_disk(str(folder))
        with pytest.raises(DataError, match="no split validation, but test, train"):
            list(read_documents(str(folder), splits=("validation",)))
    selected = data.select([3, 1])
    selected.save_to_disk(str(tmp_path / "selected"))
    assert list(read_documents(str(tmp_path / "selected"))) == [TEXTS[3], TEXTS[1]]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "d.jsonl",
            gzip.compress(b"{}"),
            r"is a gzip file, not \.jsonl text: rename it to d\.jsonl\.gz",
        ),
        ("d.txt", b"\x28\xb5\x2f\xfd rest", r"is a zstd file, .* d\.txt\.zst"),
        ("d.csv", b"PAR1....", r"is a Parquet file, .* end in \.parquet"),
        ("d.json", b"PK\x03\x04rest", "is a zip file, .* unpack it"),
        ("d.jsonl.gz", b'{"text": "plain"}', "is not a gzip file, as its name says"),
        ("d.json.gz", bz2.compress(b"[]"), "is not a gzip file, as its name says, but a bzip2"),
        ("d.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9999)[:-20], "not a readable gzip file"),
        ("d.json", b'[{"text": "a"}', "is cut off|is not JSON"),
        ("d.json", b'[{"text": "a"}] x', "text after its list"),
        ("d.json", b'{"data": [1, 2]}', r"no column `text`.*data \(a list of int\)"),
        ("d.json", b"[1, 2]", "object 1 is not a JSON object"),
        ("d.csv", b"id,text\n1,a,b\n", "line 2 has not as many cells as the header"),
        ("d.csv", b'text\n"a', "is not CSV"),
        ("d.csv", b"text\nna\xefve\n", "is not UTF-8"),
        ("d.json", b'[{"text": "na\xefve"}]', "is not UTF-8"),
    ],
)
def test_files_that_are_not_what_they_seem(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        list(read_documents(str(path)))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def _check_as_a_plain_user(dataset: str) -> None:
    as_a_plain_user()
    with pytest.raises((InputError, OSError), match="denied"):
        check_dataset(dataset)


def test_nothing_in_a_folder_is_left_out_in_silence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    os.symlink("gone", tmp_path / "b.jsonl")
    with pytest.raises(InputError, match=r"b\.jsonl.*gone"):
        check_dataset(str(tmp_path))
    (tmp_path / "b.jsonl").unlink()
    denied = tmp_path / "denied"
    denied.mkdir()
    (denied / "c.txt").write_text("more text")
    denied.chmod(0)
    process: Any = CONTEXT.Process(target=_check_as_a_plain_user, args=(str(tmp_path),))
    process.start()
    process.join()
    denied.chmod(0o755)
    assert process.exitcode == 0


def test_a_link_to_nothing_is_no_hub_data_set(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink("gone.parquet", "data")
    with pytest.raises(DataError, match=r"no such file: data \(a link to nothing\)"):
        check_dataset("data")


# --- one large text ---


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_large_text_in_pieces_is_the_text(tmp_path: Path, newline: str) -> None:
    text = "".join(f"Zeile {n}: häßlich 中文 😀{newline}" for n in range(60_000))
    path = tmp_path / "d.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    (document,) = read_documents(str(path))
    assert isinstance(document, TextFile)
    plain = text.replace("\r\n", "\n")
    assert "".join(document.pieces()) == plain
    size = path.stat().st_size
    for start in (3, 4, 17, 100_001, 100_002, 100_003, size - 5):
        part = "".join(document.pieces(start, start + 1000))
        assert part.replace("\r", "") in plain
        assert len(part.encode()) >= min(1000, size - start) - 6 - part.count("\n")
    path.write_bytes(text.encode() + b"\xef bad")
    with pytest.raises(DataError, match=rf"0xef at offset {len(text.encode())}, line 60001"):
        list(document.pieces())


def test_pieces_have_the_tokens_of_the_whole(shared: Path, smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    text = (shared / "data" / "wikitext2-valid.txt").read_text(encoding="utf-8")[: 5 * PIECE]
    whole = token_ids(tokenizer, text)
    for step, needed in ((997, 10), (50_000, len(whole))):
        parts = [text[start : start + step] for start in range(0, len(text), step)]
        assert np.array_equal(np.concatenate(list(token_stream(tokenizer, parts, needed))), whole)


@pytest.mark.parametrize("text", ["", "a", "ab " * PIECE, "a" * PIECE * 2, "é中😀 \n\t" * 30_000])
def test_pieces_of_odd_texts(text: str) -> None:
    tokenizer = byte_tokenizer()
    parts = [text[start : start + 10_007] for start in range(0, len(text), 10_007)]
    streamed = np.concatenate([np.zeros(0, np.int64), *token_stream(tokenizer, parts, 100)])
    assert np.array_equal(streamed, token_ids(tokenizer, text))


# --- identity and what is said ---


def test_a_data_sets_identity_is_its_content(tmp_path: Path, monkeypatch: Any) -> None:
    first, second = tmp_path / "x" / "d", tmp_path / "y" / "d"
    for folder in (first, second):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text("a" * 5000)
        (folder / "b.txt").write_text("b")
    identity = local_identity(str(first))
    assert identity == local_identity(str(second))
    assert identity["hashed"] == "2 files: every file"
    (second / "b.txt").write_text("c")
    assert identity != local_identity(str(second))
    monkeypatch.setattr(text_files, "_HASHED_WHOLE", 1000)
    monkeypatch.setattr(text_files, "_PIECE", 10)
    sampled = local_identity(str(first))
    assert "above 1 GiB" in sampled["hashed"]
    (first / "a.txt").write_text("a" * 4999 + "b")
    assert local_identity(str(first)) != sampled


@pytest.mark.parametrize(
    ("text", "odd"),
    [
        ("It was the best of times. " * 20, None),
        ("1234 5678 " * 50, "100 % of the text's characters are digits"),
        ("0a1b2c3d" * 50, "hardly a space"),
        ("deadbeefcafe" * 50, "hardly a space"),
        ("吾輩は猫である。名前はまだ無い。" * 30, None),
        ("สวัสดีชาวโลก" * 30, None),
        ("1234", None),
    ],
)
def test_what_is_no_text_is_said_so(text: str, odd: str | None) -> None:
    said = oddity(text)
    assert said is None if odd is None else odd in str(said)
