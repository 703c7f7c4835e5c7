"""Arrow stores: bit-exact, readable with plain pyarrow, mapped without a copy, damage found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from storage.errors import CorruptFileError, InputError, RunDirectoryError
from storage.files.commit import sha256_file
from storage.run.activations import (
    open_activation_shard,
    read_tokens,
    write_activation_shard,
    write_tokens,
)

SEQLEN, HIDDEN = 24, 16
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make_batches(dtype: torch.dtype, sizes: tuple[int, ...] = (4, 4, 3)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for size in sizes:
        batch = torch.randn(size, SEQLEN, HIDDEN, generator=generator).to(dtype)
        batch[0, 0, :4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")]).to(dtype)
        batches.append(batch)
    return batches


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_read_has_the_bits_that_were_written(tmp_path: Path, dtype: torch.dtype) -> None:
    batches = make_batches(dtype)
    whole = torch.cat(batches)
    path = tmp_path / "shard.arrow"
    stored = write_activation_shard(path, iter(batches), block=7, index=3)
    assert (stored.name, stored.rows, stored.bytes) == ("shard.arrow", 11, path.stat().st_size)
    assert stored.sha256 == sha256_file(path)
    with open_activation_shard(path, sha256=stored.sha256) as shard:
        assert (shard.rows, shard.seqlen, shard.hidden) == (11, SEQLEN, HIDDEN)
        assert (shard.dtype, shard.block, shard.index) == (dtype, 7, 3)
        for start in range(11):
            for stop in range(start + 1, 12):
                part = shard.read(start, stop)
                assert part.dtype == dtype
                assert bits(part) == bits(whole[start:stop])
        for start, stop in ((0, 12), (-1, 2), (3, 3)):
            with pytest.raises(IndexError):
                shard.read(start, stop)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_pyarrow_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    batches = make_batches(dtype)
    path = tmp_path / "shard.arrow"
    write_activation_shard(path, batches, block=2, index=5)
    table = pa.ipc.open_file(str(path)).read_all()
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    name = str(dtype).removeprefix("torch.")
    assert metadata == {
        "schema_version": "1",
        "kind": "activations",
        "dtype": name,
        "stored_as": "uint16" if dtype == torch.bfloat16 else name,
        "shape": json.dumps([SEQLEN, HIDDEN]),
        "block": "2",
        "shard": "5",
    }
    column = table.column("hidden_states")
    assert [len(chunk) for chunk in column.chunks] == [4, 4, 3]
    values = np.concatenate([chunk.to_numpy_ndarray() for chunk in column.chunks])
    assert values.shape == (11, SEQLEN, HIDDEN)
    if dtype == torch.bfloat16:
        # As the metadata tell: the bits are the upper half of a float32's.
        values = (values.astype(np.uint32) << 16).view(np.float32)
    expected = torch.cat(batches).float().numpy()
    np.testing.assert_array_equal(values.astype(np.float32), expected)


def mapped_ranges(path: Path) -> list[tuple[int, int]]:
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            first, last = line.split()[0].split("-")
            ranges.append((int(first, 16), int(last, 16)))
    return ranges


@pytest.mark.parametrize("dtype", DTYPES)
def test_reading_copies_nothing(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "shard.arrow"
    write_activation_shard(path, make_batches(dtype), block=0, index=0)
    before = pa.total_allocated_bytes()
    shard = open_activation_shard(path, sha256=None)
    parts = [shard.read(0, 4), shard.read(1, 3), shard.read(9, 11)]
    assert pa.total_allocated_bytes() == before
    ((first, last),) = mapped_ranges(path)
    for part in parts:
        assert first <= part.data_ptr()
        assert part.data_ptr() + part.numel() * part.element_size() <= last
    assert parts[1].data_ptr() == parts[0][1].data_ptr()

    # The map lives as long as a tensor needs it, and not longer.
    shard.close()
    kept = parts[0].clone()
    assert bits(parts[0]) == bits(kept)
    del parts, part, shard
    assert mapped_ranges(path) == []


def test_rows_across_record_batches_are_joined_in_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "shard.arrow"
    batches = make_batches(torch.float32)
    write_activation_shard(path, batches, block=0, index=0)
    with open_activation_shard(path, sha256=None) as shard:
        part = shard.read(3, 9)
        ((first, last),) = mapped_ranges(path)
        assert not first <= part.data_ptr() < last
        assert bits(part) == bits(torch.cat(batches)[3:9])


def test_a_model_that_writes_to_its_input_does_not_spoil_the_file(tmp_path: Path) -> None:
    path = tmp_path / "shard.arrow"
    stored = write_activation_shard(path, make_batches(torch.float32), block=0, index=0)
    with open_activation_shard(path, sha256=stored.sha256) as shard:
        shard.read(0, 4).add_(1)
    assert sha256_file(path) == stored.sha256


def test_the_same_batches_give_the_same_bytes(tmp_path: Path) -> None:
    batches = make_batches(torch.bfloat16)
    strided = [batch.transpose(1, 2).contiguous().transpose(1, 2) for batch in batches]
    assert not strided[0].is_contiguous()
    first = write_activation_shard(tmp_path / "a", batches, block=1, index=1)
    second = write_activation_shard(tmp_path / "b", strided, block=1, index=1)
    assert first.sha256 == second.sha256


@pytest.mark.parametrize(
    "batches",
    [
        [],
        [torch.zeros(2, 3)],
        [torch.zeros(2, 3, 4, dtype=torch.float64)],
        [torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)],
        [torch.zeros(2, 3, 4), torch.zeros(2, 3, 4).half()],
    ],
    ids=["none", "2-d", "float64", "another shape", "another dtype"],
)
def test_batches_that_do_not_fit_leave_no_file(tmp_path: Path, batches: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"shard\.arrow"):
        write_activation_shard(tmp_path / "shard.arrow", batches, block=0, index=0)
    assert list(tmp_path.iterdir()) == []


def test_a_sequence_too_long_for_arrow_is_refused(tmp_path: Path) -> None:
    huge = torch.empty(1, device="meta").expand(1, 2**16, 2**15)
    with pytest.raises(InputError, match="--seqlen"):
        write_activation_shard(tmp_path / "shard.arrow", [huge], block=0, index=0)


@pytest.mark.parametrize("largest", [2**31 - 1, 2**31], ids=["int32", "int64"])
def test_tokens_come_back(tmp_path: Path, largest: int) -> None:
    tokens = torch.arange(6 * 8).view(6, 8)
    tokens[5, 7] = largest
    path = tmp_path / "tokens.arrow"
    stored = write_tokens(path, tokens)
    assert (stored.rows, stored.sha256) == (6, sha256_file(path))
    found, counted = read_tokens(path, sha256=stored.sha256)
    assert counted is None
    assert found.dtype == torch.int64
    assert torch.equal(found, tokens)
    found[0, 0] = 99  # a copy: it may be written to
    table = pa.ipc.open_file(str(path)).read_all()
    assert table.schema.names == ["input_ids"]
    assert table.schema.field("input_ids").type.shape == [8]
    stored_as = table.schema.metadata[b"stored_as"].decode()
    assert stored_as == ("int32" if largest < 2**31 else "int64")


def test_tokens_of_another_type_are_refused(tmp_path: Path) -> None:
    for tokens in (torch.zeros(3, dtype=torch.int64), torch.zeros(3, 3), torch.empty(0, 2).long()):
        with pytest.raises(ValueError, match=r"tokens\.arrow"):
            write_tokens(tmp_path / "tokens.arrow", tokens)


# -- the tokens that count ----------------------------------------------------------------------


def counted_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 99, (6, 8), generator=generator)
    return tokens, torch.rand(6, 8, generator=generator) < 0.5


def test_the_tokens_that_count_come_back(tmp_path: Path) -> None:
    tokens, counted = counted_tokens()
    path = tmp_path / "tokens.arrow"
    stored = write_tokens(path, tokens, counted)
    found, chosen = read_tokens(path, sha256=stored.sha256)
    assert torch.equal(found, tokens)
    assert chosen is not None
    assert chosen.dtype == torch.bool
    assert torch.equal(chosen, counted)
    column = pa.ipc.open_file(str(path)).read_all().column("counted").combine_chunks()
    assert column.to_numpy_ndarray().tolist() == counted.int().tolist()
    other = write_tokens(tmp_path / "other.arrow", tokens, ~counted)
    assert other.sha256 != stored.sha256


def test_what_counts_must_fit_the_tokens(tmp_path: Path) -> None:
    tokens, counted = counted_tokens()
    for wrong in (counted[:, :7], counted.int(), counted[:5], torch.zeros_like(counted)):
        with pytest.raises(ValueError, match=r"tokens\.arrow: counted"):
            write_tokens(tmp_path / "tokens.arrow", tokens, wrong)


def columns_of(table: pa.Table) -> dict[str, pa.Array]:
    return {name: table.column(name).combine_chunks() for name in table.schema.names}


def tensors_of(values: torch.Tensor) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(values.numpy())


WRONG_MASKS = {
    "a value of 2": lambda counted: ("counted", 2 * counted.to(torch.uint8)),
    "no token": lambda counted: ("counted", torch.zeros_like(counted, dtype=torch.uint8)),
    "another shape": lambda counted: ("counted", counted[:, :4].to(torch.uint8)),
    "another dtype": lambda counted: ("counted", counted.to(torch.int32)),
    "another name": lambda counted: ("wanted", counted.to(torch.uint8)),
}


@pytest.mark.parametrize("wrong", WRONG_MASKS)
def test_a_damaged_column_of_what_counts_is_refused(tmp_path: Path, wrong: str) -> None:
    """Also where no hash is compared."""
    tokens, counted = counted_tokens()
    path = tmp_path / "tokens.arrow"
    write_tokens(path, tokens, counted)
    table = pa.ipc.open_file(str(path)).read_all()
    name, values = WRONG_MASKS[wrong](counted)
    columns = {"input_ids": columns_of(table)["input_ids"], name: tensors_of(values)}
    changed = pa.table(columns).replace_schema_metadata(table.schema.metadata)
    with pa.ipc.new_file(str(path), changed.schema) as writer:
        writer.write_table(changed)
    with pytest.raises(CorruptFileError, match=r"tokens\.arrow: not a readable tokens file"):
        read_tokens(path)


def test_every_flipped_byte_of_what_counts_is_found_by_the_hash(tmp_path: Path) -> None:
    path = tmp_path / "tokens.arrow"
    stored = write_tokens(path, *counted_tokens())
    good = path.read_bytes()
    for position in range(0, len(good), 11):
        raw = bytearray(good)
        raw[position] ^= 1
        path.write_bytes(raw)
        with pytest.raises(CorruptFileError, match=r"tokens\.arrow"):
            read_tokens(path, sha256=stored.sha256)


def test_every_flipped_byte_is_found_by_the_hash(tmp_path: Path) -> None:
    path = tmp_path / "shard.arrow"
    batch = torch.zeros(1, 2, 4, dtype=torch.bfloat16)
    stored = write_activation_shard(path, [batch], block=0, index=0)
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        raw = bytearray(good)
        raw[position] ^= 0x10
        path.write_bytes(raw)
        with pytest.raises(CorruptFileError, match=r"shard\.arrow"):
            open_activation_shard(path, sha256=stored.sha256)


def test_without_a_hash_damage_gives_our_errors_only(tmp_path: Path) -> None:
    path = tmp_path / "shard.arrow"
    write_activation_shard(path, [torch.zeros(1, 2, 4)], block=0, index=0)
    good = path.read_bytes()
    damaged = [b"", b"ARROW1\0\0", good[:-1], good[: len(good) // 2], good[8:]]
    refused = 0
    for raw in damaged:
        path.write_bytes(raw)
        with pytest.raises(CorruptFileError, match=r"shard\.arrow"):
            open_activation_shard(path, sha256=None)
    for position in range(0, len(good), 3):
        flipped = bytearray(good)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        try:
            with open_activation_shard(path, sha256=None) as shard:
                shard.read(0, shard.rows)
        except (InputError, IndexError):
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("sha256", [None, "0" * 64])
def test_a_missing_file_is_named(tmp_path: Path, sha256: str | None) -> None:
    with pytest.raises(CorruptFileError, match=r"shard\.arrow"):
        open_activation_shard(tmp_path / "shard.arrow", sha256=sha256)


def test_one_kind_is_not_taken_for_the_other(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens.arrow", torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(CorruptFileError, match="not a readable activations file"):
        open_activation_shard(tmp_path / "tokens.arrow", sha256=None)
    write_activation_shard(tmp_path / "shard.arrow", [torch.zeros(1, 2, 4)], block=0, index=0)
    with pytest.raises(CorruptFileError, match="not a readable tokens file"):
        read_tokens(tmp_path / "shard.arrow")


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens.arrow"
    write_tokens(path, torch.ones(2, 3, dtype=torch.int64))
    table = pa.ipc.open_file(str(path)).read_all()
    newer = {**table.schema.metadata, b"schema_version": b"2"}
    table = table.replace_schema_metadata(newer)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(RunDirectoryError, match="schema_version is 2"):
        read_tokens(path)
