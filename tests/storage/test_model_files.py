"""Reading a source model: what is refused, and that what is read is what safetensors reads."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from storage.errors import CorruptFileError, InputError, ModelError
from storage.model.files import (
    INDEX_FILE,
    ModelFiles,
    fingerprint_weight_file,
    safetensors_dtype,
    torch_dtype,
)
from storage.model.safetensors_format import tensor_bytes

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def tensors_of_many_dtypes() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 5, generator=generator)
    return {
        "bf16": values.bfloat16(),
        "f16": values.half(),
        "f32": values,
        "f64": values.double(),
        "i64": (values * 100).long(),
        "i8": (values * 10).to(torch.int8),
        "bool": values > 0,
        "f8": values.to(torch.float8_e4m3fn),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two weight files, an index, and a config."""
    folder = tmp_path / "model"
    folder.mkdir()
    everything = tensors_of_many_dtypes()
    names = list(everything)
    weight_map = {}
    for file, part in ((FIRST, names[:4]), (SECOND, names[4:])):
        save_file({name: everything[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def write_index(folder: Path, weight_map: dict[str, Any]) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def weight_map_of(folder: Path) -> dict[str, Any]:
    weight_map: dict[str, Any] = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    return weight_map


def with_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of a weight file, keeping the tensors' bytes."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def test_what_is_read_is_what_safetensors_reads(model: Path) -> None:
    files = ModelFiles.open(model)
    assert files.files == (FIRST, SECOND)
    assert files.config == {"model_type": "llama"}
    assert set(files.tensors) == set(tensors_of_many_dtypes())
    for file in files.files:
        with safe_open(model / file, "pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - it is not a dictionary
                expected = reader.get_tensor(name)
                found = files.read(name)
                assert found.dtype == expected.dtype
                assert found.shape == expected.shape
                assert bytes(tensor_bytes(found)) == bytes(tensor_bytes(expected))
                assert files.tensors[name].shape == tuple(expected.shape)


def test_some_rows_are_those_rows(model: Path) -> None:
    files = ModelFiles.open(model)
    for name in ("bf16", "f64", "bool"):
        whole = files.read(name)
        assert torch.equal(files.read(name, rows=(2, 5)), whole[2:5])
        assert files.read(name, rows=(3, 3)).shape == (0, 5)
    for rows in ((0, 7), (-1, 2), (4, 2)):
        with pytest.raises(IndexError, match="bf16"):
            files.read("bf16", rows=rows)
    with pytest.raises(IndexError, match="scalar"):
        files.read("scalar", rows=(0, 1))
    with pytest.raises(ModelError, match="no tensor nothing"):
        files.read("nothing")


def test_the_header_is_given_verbatim(model: Path) -> None:
    raw = (model / FIRST).read_bytes()
    header = ModelFiles.open(model).header_bytes(FIRST)
    assert raw.startswith(header)
    assert len(header) == 8 + int.from_bytes(raw[:8], "little")


def test_identity_changes_with_config_layout_and_nothing_else(model: Path) -> None:
    before = ModelFiles.open(model).identity()
    (model / "tokenizer.json").write_text("{}")
    assert ModelFiles.open(model).identity() == before
    (model / "config.json").write_text(json.dumps({"model_type": "opt"}))
    changed = ModelFiles.open(model).identity()
    with_header(model / FIRST, lambda header: header.update(__metadata__={"format": "np"}))
    assert len({before, changed, ModelFiles.open(model).identity()}) == 3


def test_a_real_model_saved_by_transformers(tiny_model: Callable[..., Path]) -> None:
    for folder in (tiny_model("llama", weight_files=2), tiny_model("qwen2")):
        files = ModelFiles.open(folder)
        assert files.index == (INDEX_FILE if len(files.files) > 1 else None)
        for file in files.files:
            fingerprint_weight_file(folder, file)


def test_dtype_names_go_both_ways() -> None:
    for tensor in tensors_of_many_dtypes().values():
        assert torch_dtype(safetensors_dtype(tensor.dtype)) == tensor.dtype
    with pytest.raises(ModelError, match="F4"):
        torch_dtype("F4")
    with pytest.raises(ModelError, match="complex64"):
        safetensors_dtype(torch.complex64)


def missing_folder(folder: Path) -> None:
    folder.rename(folder.with_name("away"))


def only_pickles(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


MISSING: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (missing_folder, "no such folder"),
    "config": (lambda f: (f / "config.json").unlink(), r"no config\.json"),
    "pickles only": (only_pickles, "save_pretrained"),
    "weights": (no_weights, "neither"),
    "weight file": (lambda f: (f / SECOND).unlink(), SECOND),
    "dangling link": (
        lambda f: ((f / SECOND).unlink(), (f / SECOND).symlink_to(f / "nowhere")),
        SECOND,
    ),
    "a folder in its place": (lambda f: ((f / SECOND).unlink(), (f / SECOND).mkdir()), SECOND),
    "a pipe in its place": (
        lambda f: ((f / SECOND).unlink(), os.mkfifo(f / SECOND)),
        "not a regular file",
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_named(model: Path, case: str) -> None:
    damage, message = MISSING[case]
    damage(model)
    with pytest.raises(ModelError, match=message):
        ModelFiles.open(model)


def cut(path: Path, count: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + count)


def set_length(path: Path, length: int) -> None:
    raw = path.read_bytes()
    path.write_bytes(length.to_bytes(8, "little") + raw[8:])


def shifted(header: dict[str, Any]) -> None:
    header["f32"]["data_offsets"] = [offset + 4 for offset in header["f32"]["data_offsets"]]


def onto_another(header: dict[str, Any]) -> None:
    header["bf16"]["data_offsets"] = header["f16"]["data_offsets"]


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "gap": (shifted, "overlap or gap"),
    "overlap": (onto_another, "overlap or gap"),
    "shape": (lambda h: h["f32"].update(shape=[6, 6]), "its shape needs"),
    "huge": (lambda h: h["f32"].update(shape=[2**62, 2**62]), "its shape needs"),
    "negative": (lambda h: h["f32"].update(shape=[-6, -5]), "malformed"),
    "bool": (lambda h: h["f32"].update(shape=[True, 30]), "malformed"),
    "offsets": (lambda h: h["f32"].update(data_offsets=[0]), "malformed"),
    "backwards": (lambda h: h["f32"]["data_offsets"].reverse(), "its shape needs"),
    "no dtype": (lambda h: h["f32"].pop("dtype"), "malformed"),
    "not an object": (lambda h: h.update(f32=[1]), "malformed"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(model: Path, case: str) -> None:
    change, message = HEADERS[case]
    with_header(model / FIRST, change)
    with pytest.raises(CorruptFileError, match=message) as caught:
        ModelFiles.open(model)
    assert FIRST in str(caught.value)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: cut(f / SECOND, -1), "truncated, 1 bytes short"),
    "appended": (lambda f: cut(f / SECOND, 1), "too long"),
    "empty": (lambda f: (f / SECOND).write_bytes(b""), "not a safetensors file"),
    "a header of 2^62 bytes": (lambda f: set_length(f / SECOND, 2**62), "not a safetensors file"),
    "a header cut short": (lambda f: set_length(f / SECOND, 20), "not JSON"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json"),
    "index is no JSON": (lambda f: (f / INDEX_FILE).write_bytes(b"\xff"), INDEX_FILE),
    "index is deep": (lambda f: (f / INDEX_FILE).write_text("[" * 200_000), INDEX_FILE),
    "index is empty": (lambda f: write_index(f, {}), "no weight_map"),
    "index names a number": (
        lambda f: write_index(f, {"f32": 3}),
        "puts tensor f32 in 3, ",
    ),
    "index names no tensor of a file": (
        lambda f: write_index(f, {k: v for k, v in weight_map_of(f).items() if k != "f32"}),
        "tensor f32 of .* is not in",
    ),
    "index names a tensor that is nowhere": (
        lambda f: write_index(f, weight_map_of(f) | {"more": FIRST}),
        "more in .* is in no file",
    ),
    "index names the wrong file": (
        lambda f: write_index(f, weight_map_of(f) | {"f32": SECOND}),
        f"but it is in {FIRST}",
    ),
    "a tensor twice": (
        lambda f: save_file(
            {name: torch.zeros(1) for name, file in weight_map_of(f).items() if file == SECOND}
            | {"f32": torch.zeros(1)},
            f / SECOND,
        ),
        "tensor f32 is in",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_damaged_is_named(model: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(model)
    with pytest.raises(CorruptFileError, match=message):
        ModelFiles.open(model)


def test_a_repeated_key_in_a_header_is_refused(tmp_path: Path, model: Path) -> None:
    entry = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    text = b"{" + entry + b"," + entry + b"}"
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    with pytest.raises(CorruptFileError, match="twice"):
        ModelFiles.open(model)


@pytest.mark.parametrize(
    "name", ["../stolen.safetensors", "a/../../stolen.safetensors", "ABSOLUTE"]
)
def test_an_index_cannot_lead_out_of_the_folder(model: Path, name: str) -> None:
    stolen = model.parent / "stolen.safetensors"
    save_file({"f32": torch.zeros(1)}, stolen)
    write_index(model, {"f32": str(stolen) if name == "ABSOLUTE" else name})
    with pytest.raises(CorruptFileError, match="out of the model folder"):
        ModelFiles.open(model)


def test_links_within_the_model_and_its_hub_cache_are_followed_and_no_others(
    model: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "hub" / "models--someone--something"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(cache / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert set(ModelFiles.open(snapshot).tensors) == set(tensors_of_many_dtypes())
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    assert set(ModelFiles.open(link).tensors) == set(tensors_of_many_dtypes())

    outside = tmp_path / "outside"
    (snapshot / SECOND).resolve().rename(outside)
    (snapshot / SECOND).unlink()
    (snapshot / SECOND).symlink_to(outside)
    with pytest.raises(CorruptFileError, match="outside the model"):
        ModelFiles.open(snapshot)


def test_a_link_out_of_an_ordinary_folder_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "config.json").rename(tmp_path / "config.json")
    (model / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(CorruptFileError, match="outside the model"):
        ModelFiles.open(model)


def test_fingerprint_is_the_hash_of_the_whole_file(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.model.files.CHUNK_BYTES", 16)  # tensors span many chunks
    for file in (FIRST, SECOND):
        found = fingerprint_weight_file(model, file)
        raw = (model / file).read_bytes()
        assert (found.file, found.bytes) == (file, len(raw))
        assert found.sha256 == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_weight_that_is_not_finite_is_named(
    tmp_path: Path, dtype: torch.dtype, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.model.files.CHUNK_BYTES", 64)
    weight = torch.zeros(40, 40, dtype=dtype)
    weight[39, 38] = bad
    save_file({"good": torch.zeros(3), "layers.0.weight": weight}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"a\.safetensors: tensor layers\.0\.weight holds NaN"):
        fingerprint_weight_file(tmp_path, "a.safetensors")


def test_integers_with_the_bits_of_nan_are_no_fault(tmp_path: Path) -> None:
    save_file({"mask": torch.full((4,), -1, dtype=torch.int32)}, tmp_path / "a.safetensors")
    fingerprint_weight_file(tmp_path, "a.safetensors")


def test_every_flip_of_a_header_byte_gives_our_errors_or_an_equal_layout(model: Path) -> None:
    path = model / FIRST
    good = path.read_bytes()
    length = 8 + int.from_bytes(good[:8], "little")
    refused = 0
    for position in range(length):
        raw = bytearray(good)
        raw[position] ^= 1 << (position % 8)
        path.write_bytes(raw)
        try:
            ModelFiles.open(model)
        except InputError:
            refused += 1
    assert refused > length // 2


def test_a_file_that_shrinks_after_opening_is_found(model: Path) -> None:
    files = ModelFiles.open(model)
    last = max(
        (entry for entry in files.tensors.values() if entry.file == FIRST), key=lambda e: e.end
    )
    cut(model / FIRST, -1)
    with pytest.raises(CorruptFileError, match=f"tensor {last.name}: the file ends too early"):
        files.read(last.name)
