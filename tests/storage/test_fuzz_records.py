"""A job's own files, fuzzed: records, tokens, activation shards, row slices, saved layers.

A record's checksum finds accidents. Here the checksum is made to fit, as an adversary or another
version would, so that what is behind it is tried as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.solve import SolveConfig
from pipeline.loop.rank import Call
from pipeline.messages import Outcome
from pipeline.records.block import block_error, read_record
from pipeline.records.manifest import (
    check_manifest,
    expect_source,
    read_manifest,
    require_fingerprints,
)
from pipeline.records.status import find_run_directory, read_status
from pipeline.solve_layer import solve_layer
from pipeline.worker.local_executor import LocalExecutor
from storage.errors import Prox24Error
from storage.files.hashing import StoredFile
from storage.model.files import ModelFiles, WeightFileFingerprint
from storage.run.activations import open_activation_shard, read_tokens
from storage.run.checkpoints import read_layer, verify_record
from storage.run.directory import RunDirectory
from storage.run.layer_files import write_layer_file
from storage.run.lock import RunLock
from tests.support.hostile import Watch, documents, dump, examples, spoiled
from tests.support.jobs import prune_here
from tests.support.tiny_models import save_tiny_model

NAMES = ("../../outside.arrow", "../outside.arrow", "link.arrow", "record.json")


class Stopped(LocalExecutor):
    """Ends the job in its second block."""

    def run(self, calls: Sequence[Call[Any]]) -> list[Outcome[Any]]:
        if calls[0].phase == "solve" and calls[0].block == 1:
            raise Prox24Error("stopped")
        return super().run(calls)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a job that ended in its second block."""
    folder = tmp_path_factory.mktemp("fuzz-run")
    model = save_tiny_model(folder / "model", hidden=8, intermediate=8)
    options = {"shrinkage": "auto", "nsamples": 4, "seqlen": 16, "workers": 2}
    run = folder / "output.run"
    with pytest.raises(Prox24Error):
        prune_here(model, folder / "output", executor=Stopped(2, 1), **options)
    with RunLock(run) as lock:
        raw = lock.path.read_bytes()
    (run / f"lock-{'0' * 32}.json").write_bytes(raw)
    (folder / "outside.arrow").write_bytes((run / "tokens.arrow").read_bytes())
    (run / "link.arrow").symlink_to(folder / "outside.arrow")
    return run


def sealed(document: Any) -> bytes:
    """The text of a record with a checksum that fits, as far as there can be one."""
    text = dump(document)
    try:
        body = json.loads(text)
        if not isinstance(body, dict):
            return text.encode("ascii")
        body.pop("checksum", None)
        compact = json.dumps(body, sort_keys=True, separators=(",", ":"))
        body["checksum"] = hashlib.sha256(compact.encode("ascii")).hexdigest()
        return json.dumps(body).encode("ascii")
    except (ValueError, RecursionError, AttributeError):
        return text.encode("utf-8", "surrogatepass")


def with_file(run: Path, path: Path, raw: bytes, reader: Callable[[], object], *more: Path) -> None:
    """Runs a reader while a file has other contents; it may read `run` and `more`."""
    before = path.read_bytes()
    path.write_bytes(raw)
    try:
        Watch(run, *more).run(reader)
    finally:
        path.write_bytes(before)


def mutated(data: st.DataObject, raw: bytes) -> bytes:
    """A record spoiled in its bytes, or in its structure with a checksum that fits."""
    if data.draw(st.booleans()):
        return data.draw(spoiled(raw))
    return sealed(data.draw(documents(json.loads(raw), NAMES)))


def read_block(run: RunDirectory, block: int) -> None:
    directory = run.checkpoints(block)
    record = read_record(run.record(block))
    block_error(record)
    verify_record(directory, record)
    for layer in record.layers:
        read_layer(directory, record, layer, verify=False)


@examples(200)
@given(data=st.data())
def test_block_record(good: Path, data: st.DataObject) -> None:
    run = RunDirectory(good)
    path = run.record(0)
    with_file(good, path, mutated(data, path.read_bytes()), lambda: read_block(run, 0))


@examples(200)
@given(data=st.data())
def test_tokens_and_activation_shards(good: Path, data: st.DataObject) -> None:
    run = RunDirectory(good)
    shard = next(run.activations(1).glob("*.arrow"))

    def read_shard() -> None:
        with open_activation_shard(shard, sha256=None) as opened:
            opened.read(0, opened.rows).float().sum()

    def tokens() -> None:
        ids, counted = read_tokens(run.tokens())
        assert counted is None or counted.shape == ids.shape

    path, reader = data.draw(st.sampled_from([(shard, read_shard), (run.tokens(), tokens)]))
    with_file(good, path, data.draw(spoiled(path.read_bytes())), reader)


@examples(200)
@given(data=st.data())
def test_status(good: Path, data: st.DataObject) -> None:
    run = RunDirectory(good)
    files = [run.manifest, run.record(0), good / "status.json", next(good.glob("lock-*.json"))]
    path = data.draw(st.sampled_from(files))
    raw = mutated(data, path.read_bytes())
    with_file(good, path, raw, lambda: json.dumps(read_status(find_run_directory(good))))


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz-layer") / "layer.safetensors"
    hessian = torch.eye(8) * 3 + 1
    write_layer_file(path, weight=torch.randn(4, 8), hessian=hessian, tokens=16, sequences=2)
    solve_layer(path, SolveConfig(methods="magnitude", threads=1))
    return path


@examples(200)
@given(data=st.data())
def test_layer_file(layer: Path, data: st.DataObject) -> None:
    raw = layer.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    if data.draw(st.booleans()):
        changed = data.draw(spoiled(raw))
    else:
        text = dump(data.draw(documents(json.loads(raw[8:end])))).encode("utf-8", "surrogatepass")
        changed = len(text).to_bytes(8, "little") + text + raw[end:]
    config = SolveConfig(methods="magnitude,wanda", threads=1)
    with_file(layer.parent, layer, changed, lambda: solve_layer(layer, config))


def read_run_json(run: RunDirectory, source: ModelFiles, job: dict[str, Any]) -> None:
    """All that a resumed job and its workers do with it."""
    manifest = read_manifest(run)
    assert manifest is not None
    check_manifest(run, manifest, job, source)
    tokens = StoredFile.from_json(manifest["tokens"], str(run.manifest))
    read_tokens(run.path / tokens.name, sha256=tokens.sha256)
    require_fingerprints(run, manifest, [WeightFileFingerprint("model.safetensors", 1, "0", {})])


@examples(150)
@given(data=st.data())
def test_run_json(good: Path, data: st.DataObject) -> None:
    run, source = RunDirectory(good), ModelFiles.open(good.parent / "model")
    raw = run.manifest.read_bytes()
    job, changed = json.loads(raw)["job"], mutated(data, raw)

    def read() -> None:
        read_run_json(run, source, job)
        expect_source(run, source)
        for name in source.tensors:
            source.read(name)

    with_file(good, run.manifest, changed, read, good.parent / "model")
