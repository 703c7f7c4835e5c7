"""Text data sets to tokens. The byte tokenizer makes one token of one byte, so counts are exact."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.text.documents import read_documents
from pipeline.text.tokenizer import load_tokenizer
from storage.errors import DataError, ModelError
from tests.support.texts import calibration_ids, evaluation_ids
from tests.support.tiny_models import byte_tokenizer

Writer = Callable[[Path, dict[str, list[Any]]], Path]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def write_jsonl(path: Path, columns: dict[str, list[Any]]) -> Path:
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    pq.write_table(pa.table(columns), path.with_suffix(".parquet"), row_group_size=3)
    return path.with_suffix(".parquet")


def write_arrow_file(path: Path, columns: dict[str, list[Any]]) -> Path:
    table = pa.table(columns)
    with pa.ipc.new_file(str(path.with_suffix(".arrow")), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path.with_suffix(".arrow")


def write_arrow_stream(path: Path, columns: dict[str, list[Any]]) -> Path:
    table = pa.table(columns)
    with pa.ipc.new_stream(str(path.with_suffix(".arrow")), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path.with_suffix(".arrow")


WRITERS: list[Writer] = [write_jsonl, write_parquet, write_arrow_file, write_arrow_stream]
columnar = pytest.mark.parametrize("write", WRITERS)


def text_file(path: Path, data: str | bytes) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


# --- documents ---


@columnar
def test_rows_come_in_order_without_nulls(tmp_path: Path, write: Writer) -> None:
    texts = ["one", None, "", "a\n\nb", "ünïcödé", "x" * 3_000_000, "last"]
    path = write(tmp_path / "d", {"url": ["u"] * 7, "text": texts, "n": list(range(7))})
    assert list(read_documents(str(path))) == [text for text in texts if text is not None]


@columnar
def test_no_column_is_guessed_to_be_the_text(tmp_path: Path, write: Writer) -> None:
    path = write(tmp_path / "d", {"id": [1, 2], "content": ["a", "b"]})
    with pytest.raises(DataError, match=r"id \(a number, 1\), content \(a string, 'a'\)"):
        list(read_documents(str(path)))
    assert list(read_documents(str(path), "content")) == ["a", "b"]


@columnar
def test_a_named_column_wins(tmp_path: Path, write: Writer) -> None:
    path = write(tmp_path / "d", {"text": ["a", "b"], "summary": ["c", "d"]})
    assert list(read_documents(str(path), "summary")) == ["c", "d"]


@columnar
@pytest.mark.parametrize("column", [None, "body"])
def test_no_text_column_lists_the_columns(
    tmp_path: Path, write: Writer, column: str | None
) -> None:
    path = write(tmp_path / "d", {"title": ["a"], "summary": ["b"]})
    with pytest.raises(
        DataError, match=r"--text-column: title \(a string, 'a'\), summary"
    ) as caught:
        list(read_documents(str(path), column))
    assert str(path) in str(caught.value)
    assert column is None or f"no column '{column}'" in str(caught.value)


@columnar
def test_a_column_that_is_not_text_is_refused(tmp_path: Path, write: Writer) -> None:
    path = write(tmp_path / "d", {"text": [1, 2]})
    with pytest.raises(DataError, match="--text-column"):
        list(read_documents(str(path), "text"))


@columnar
@pytest.mark.parametrize("texts", [[], [None, None], ["", "  \n"]])
def test_rows_without_text_are_no_data(tmp_path: Path, write: Writer, texts: list[Any]) -> None:
    column = texts if write is write_jsonl else pa.array(texts, pa.string())
    path = write(tmp_path / "d", {"text": column})
    with pytest.raises(DataError, match=f"{path.name} holds no text"):
        list(read_documents(str(path)))


def test_dictionary_encoded_and_large_strings_are_text(tmp_path: Path) -> None:
    for kind in (pa.dictionary(pa.int32(), pa.string()), pa.large_string(), pa.string_view()):
        column = pa.array(["a", "b", "a"]).cast(kind)
        path = write_arrow_file(tmp_path / "d", {"text": column})
        assert list(read_documents(str(path))) == ["a", "b", "a"]


def test_plain_text_is_one_document(tmp_path: Path) -> None:
    path = text_file(tmp_path / "d.txt", b"\xef\xbb\xbffirst\r\n\r\nsecond\n")
    assert list(read_documents(path)) == ["first\n\nsecond\n"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_bytes_that_are_not_utf8_are_located(tmp_path: Path, mark: bytes) -> None:
    path = text_file(tmp_path / "latin.txt", mark + b"one\ntwo\nna\xefve\n")
    with pytest.raises(DataError, match=f"0xef at offset {10 + len(mark)}, line 3"):
        list(read_documents(path))
    lines = b'{"text": "ok"}\n{"text": "na\xefve"}\n'
    path = text_file(tmp_path / "latin.jsonl", lines)
    with pytest.raises(DataError, match="0xef at offset 27, line 2"):
        list(read_documents(path))
    # Arrow can hold such bytes under a string type without noticing.
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xef\x20")]
    )
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_documents(str(write_arrow_file(tmp_path / "latin", {"text": bad}))))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a"', "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('["text"]', "line 2 is not a JSON object"),
        ('{"text": 5}', "line 2: 'text' is not a string but a number, 5"),
        ('{"text": "\\ud800"}', "line 2: 'text' is not valid Unicode"),
    ],
)
def test_a_bad_line_of_jsonl_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = text_file(tmp_path / "d.jsonl", '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=reason):
        list(read_documents(path))


def test_jsonl_rows_may_lack_keys_and_lines_may_be_blank(tmp_path: Path) -> None:
    rows = '{"text": null}\n\n{"id": 1, "text": "a"}\n{"id": 2}\n  \n{"text": "b", "x": "y"}\n'
    path = text_file(tmp_path / "d.jsonl", rows)
    assert list(read_documents(path)) == ["a", "b"]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("data", [b"", b"nonsense" * 100])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str, data: bytes) -> None:
    path = text_file(tmp_path / f"d{suffix}", data)
    with pytest.raises(DataError, match=f"{path} is not a readable"):
        list(read_documents(path))


@pytest.mark.parametrize("write", WRITERS[1:])
def test_a_truncated_file_is_named(tmp_path: Path, write: Writer) -> None:
    path = write(tmp_path / "d", {"text": [str(n) * 1000 for n in range(50)]})
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(DataError, match=f"read.* {path}|{path} is not a readable"):
        list(read_documents(str(path)))


def test_what_is_no_data_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file: .*gone\.txt"):
        list(read_documents(str(tmp_path / "gone.txt")))
    with pytest.raises(DataError, match="no such file: nowhere.jsonl"):
        list(read_documents("nowhere.jsonl"))
    with pytest.raises(DataError, match=r"holds no file of \.txt, \.jsonl"):
        list(read_documents(str(tmp_path)))
    with pytest.raises(DataError, match=r"unknown kind of file '\.xls'"):
        list(read_documents(text_file(tmp_path / "d.xls", "a,b\n")))
    with pytest.raises(DataError, match="holds no text"):
        list(read_documents(text_file(tmp_path / "empty.txt", "")))
    with pytest.raises(DataError, match="has no columns"):
        list(read_documents(text_file(tmp_path / "d.txt", "words"), "text"))


# --- tokens ---


def test_exactly_enough_tokens_are_all_used(tmp_path: Path, tokenizer: Any) -> None:
    text = "".join(chr(97 + n % 26) for n in range(40))
    path = text_file(tmp_path / "d.txt", text)
    tokens = calibration_ids(tokenizer, path, None, nsamples=5, seqlen=8, seed=0)
    assert tokens.shape == (5, 8)
    assert tokens.dtype == torch.int64
    pieces = sorted(tokenizer.decode(row) for row in tokens)
    assert pieces == sorted(text[i : i + 8] for i in range(0, 40, 8))


@columnar
def test_one_token_too_few_names_the_count(tmp_path: Path, tokenizer: Any, write: Writer) -> None:
    # Joined with blank lines: 10 + 2 + 10 + 2 + 15 = 39 tokens, of which no document has 20.
    path = str(write(tmp_path / "d", {"text": ["a" * 10, "b" * 10, "c" * 15]}))
    assert calibration_ids(tokenizer, path, None, 1, 39, 0).shape == (1, 39)
    with pytest.raises(DataError, match="holds 39 tokens, fewer than 2 × 20 = 40"):
        calibration_ids(tokenizer, path, None, 2, 20, 0)
    with pytest.raises(DataError, match="holds 39 tokens, fewer than 2 × 20 = 40"):
        evaluation_ids(tokenizer, path, None, 20, nsamples=2)
    with pytest.raises(DataError, match="holds 39 tokens, fewer than one sequence of 40"):
        evaluation_ids(tokenizer, path, None, 40)


@pytest.mark.parametrize("seed", range(20))
def test_crops_of_one_text_do_not_overlap_and_follow_the_seed(
    tmp_path: Path, tokenizer: Any, seed: int
) -> None:
    numbers = "".join(f"{n:04d}" for n in range(250))  # position p is read off the tokens at p
    path = text_file(tmp_path / "d.txt", numbers)
    state = random.getstate(), torch.get_rng_state()
    tokens = calibration_ids(tokenizer, path, None, 12, 75, seed)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    starts = [numbers.index(tokenizer.decode(row)) for row in tokens]
    gaps = [b - a for a, b in zip(sorted(starts), sorted(starts)[1:], strict=False)]
    assert min(gaps) >= 75
    assert torch.equal(tokens, calibration_ids(tokenizer, path, None, 12, 75, seed))
    assert not torch.equal(tokens, calibration_ids(tokenizer, path, None, 12, 75, seed + 1))


def test_crops_reach_all_of_the_text(tmp_path: Path, tokenizer: Any) -> None:
    numbers = "".join(f"{n:04d}" for n in range(250))
    path = text_file(tmp_path / "d.txt", numbers)
    covered = torch.zeros(len(numbers))
    for seed in range(60):
        for row in calibration_ids(tokenizer, path, None, 4, 100, seed):
            start = numbers.index(tokenizer.decode(row))
            covered[start : start + 100] += 1
    assert covered[:100].any()
    assert covered[-100:].any()
    assert covered[50:-50].all()
    assert covered.max() < 60


@columnar
def test_long_documents_give_one_crop_each(tmp_path: Path, tokenizer: Any, write: Writer) -> None:
    letters = [chr(97 + n) for n in range(26)]
    texts = [text for letter in letters for text in ("short", letter * 30, "short", letter * 40)]
    path = str(write(tmp_path / "d", {"text": texts}))
    tokens = calibration_ids(tokenizer, path, None, 10, 30, seed=3)
    decoded = [tokenizer.decode(row) for row in tokens]
    assert all(text == text[0] * 30 for text in decoded)  # never across documents
    first_documents = {letter * 30 for letter in letters[:5]}
    assert set(decoded) != first_documents  # drawn at random, not the first ten
    other = calibration_ids(tokenizer, path, None, 10, 30, seed=4)
    assert not torch.equal(tokens, other)


def test_short_documents_are_joined_in_their_order(tmp_path: Path, tokenizer: Any) -> None:
    texts = [f"paragraph {n:03d}" for n in range(200)]
    joined = "\n\n".join(texts)
    path = str(write_jsonl(tmp_path / "d", {"text": texts}))
    for row in calibration_ids(tokenizer, path, None, 8, 64, seed=0):
        assert tokenizer.decode(row) in joined


def test_evaluation_cuts_the_joined_text(tmp_path: Path, tokenizer: Any) -> None:
    path = str(write_jsonl(tmp_path / "d", {"text": ["", "abcdef", "", "ghi"]}))
    joined = "\n\nabcdef\n\n\n\nghi"  # 15 tokens
    for nsamples, expected in ((None, 3), (2, 2)):
        tokens = evaluation_ids(tokenizer, path, None, 4, nsamples)
        assert tokens.dtype == torch.int64
        assert [tokenizer.decode(row) for row in tokens] == [
            joined[4 * i : 4 * i + 4] for i in range(expected)
        ]


# --- tokenizers ---


def test_the_tokenizer_of_a_model_folder(tiny_model: Callable[..., Path]) -> None:
    for architecture in ("llama", "qwen2"):
        tokenizer: Any = load_tokenizer(tiny_model(architecture))
        assert tokenizer("héé").input_ids == byte_tokenizer()("héé").input_ids


def test_a_folder_without_a_tokenizer(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama", tokenizer=False)
    with pytest.raises(ModelError, match="tokenizer") as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    (folder / "tokenizer.json").write_text("{broken")
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(folder)


def test_real_text_and_a_real_tokenizer(shared: Path, smollm2: Path) -> None:
    tokenizer: Any = load_tokenizer(smollm2)
    path = shared / "data" / "wikitext2-valid.txt"
    ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8"), verbose=False).input_ids)
    tokens = evaluation_ids(tokenizer, str(path), None, 1024)
    assert torch.equal(tokens.flatten(), ids[: len(ids) // 1024 * 1024])
    windows = ids.unfold(0, 64, 1)
    drawn = calibration_ids(tokenizer, str(path), None, 16, 64, 0)
    assert all(bool((windows == row).all(1).any()) for row in drawn)
