"""Models in few bits that are damaged, changed, or not readable."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.command_line import run
from pipeline.formats.open_model import open_model
from storage.errors import CorruptFileError
from storage.model.files import fingerprint_weight_file
from tests.support.few_bits import (
    change_config,
    compressed_fp8_model,
    fp8_model,
)
from tests.support.few_bits_jobs import (
    BF16,
    JOB,
    NAME,
    OPTIONS,
    printed,
    refusal,
)
from tests.support.jobs import write_text
from tests.support.tiny_models import save_tiny_model


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    write_text(tmp_path / "text.txt")
    return fp8_model(save_tiny_model(tmp_path / "model", dtype=BF16), (16, 16))


def change_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    stored = load_file(folder / "model.safetensors")
    made = change(stored.pop(name))
    save_file(
        stored | ({} if made is None else {name: made.contiguous()}), folder / "model.safetensors"
    )


def nan_code(values: Tensor) -> Tensor:
    raw = values.view(torch.uint8).clone()
    raw[3, 5] = 0x7F
    return raw.view(values.dtype)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (NAME, nan_code, "NaN"),
        (f"{NAME}_scale_inv", lambda scales: scales * math.nan, "NaN"),
        (f"{NAME}_scale_inv", lambda scales: None, "without a weight_scale_inv beside it"),
        (f"{NAME}_scale_inv", lambda scales: scales[:3, :1], "has not the scales of blocks"),
    ],
)
def test_damaged_fp8(
    fp8: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    change: Callable[[Tensor], Tensor | None],
    says: str,
) -> None:
    change_tensor(fp8, name, change)
    text, output = fp8.parent / "text.txt", fp8.parent / "output"
    message = refusal(capsys, ["prune", str(fp8), str(output), *OPTIONS, str(text), *JOB])
    assert says in message
    assert NAME in message
    assert not output.exists()


def test_a_source_that_is_another_now(fp8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether it is by a scale alone: `verify` compares with what the files say now."""
    text, output = fp8.parent / "text.txt", fp8.parent / "output"
    exclude = ["--exclude", ".*up_proj"]
    job = ["prune", str(fp8), str(output), *OPTIONS, str(text), *JOB, *exclude]
    assert run(job) == 0
    before = open_model(fp8).identity()
    change_tensor(fp8, f"{NAME}_scale_inv", lambda scales: scales * 2)
    capsys.readouterr()
    assert run(["verify", str(output), "--source", str(fp8), "--json"]) == 1
    assert printed(capsys)["problems"] == [f"{NAME}: not pruned, but not the source's either"]
    change_config(fp8, quantization_config={"quant_method": "fp8", "weight_block_size": None})
    assert open_model(fp8).identity() != before


def test_a_scale_that_changes_while_a_job_runs(fp8: Path) -> None:
    """What a job has hashed are the dequantized values: another scale is found out, in a read of
    all rows or of some."""
    files = open_model(fp8)
    fingerprint = fingerprint_weight_file(files.source, "model.safetensors")
    assert fingerprint.tensors.keys() == files.tensors.keys()
    files.expected = fingerprint.tensors
    assert torch.equal(files.read(NAME, (3, 9)), files.read(NAME)[3:9])
    change_tensor(fp8, f"{NAME}_scale_inv", lambda scales: scales * 2)
    for rows in (None, (3, 9)):
        with pytest.raises(CorruptFileError, match="not what it was when the job began"):
            files.read(NAME, rows)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": "marlin-24"}, "the format 'marlin-24' of compressed-tensors cannot be read"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights in the format"),
        ({"config_groups": {}}, "no group of its quantization_config is that of model.layers.0."),
    ],
)
def test_what_compressed_tensors_has_besides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], says: str
) -> None:
    pytest.importorskip("compressed_tensors")
    source = compressed_fp8_model(save_tiny_model(tmp_path / "model", dtype=BF16))
    said = json.loads((source / "config.json").read_text())["quantization_config"]
    change_config(source, quantization_config=said | changes)
    assert says in refusal(capsys, ["plan", str(source), "--seqlen", "32"])


def test_the_library_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = compressed_fp8_model(save_tiny_model(tmp_path / "model", dtype=BF16))
    monkeypatch.setitem(__import__("sys").modules, "compressed_tensors.compressors", None)
    message = refusal(capsys, ["plan", str(source), "--seqlen", "32"])
    assert "pip install 'prox24[compressed]'" in message
