"""Models and whole jobs on `gs://`, against an emulator of Google Cloud Storage."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import storage.object_store
from cluster.command_line import run
from storage.errors import ResourceError
from storage.model.files import ModelFiles, fingerprint_weight_file
from storage.object_store import ObjectFolder
from tests.job.test_object_store_job import (
    Bench,
    changes_nothing,
    command,
    killed_at_the_second_file,
    objects,
    without_source,
)
from tests.storage.test_object_store import ends_after_a_failed_upload
from tests.support.google_server import google_server
from tests.support.jobs import contents, prune_here


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("google")
    with google_server(folder) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield Bench(folder, server)


@pytest.fixture(scope="module")
def expected(bench: Bench) -> dict[str, bytes]:
    """The output on a disk."""
    output = bench.folder / "expected"
    return without_source(contents(prune_here(bench.model, output, **bench.options).output))


def test_an_object_is_read_in_ranges(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.object_store, "PART_BYTES", 1000)
    bucket = bench.store()
    data = bytes(torch.randint(256, (23_456,), dtype=torch.uint8).tolist())
    with bucket.upload("a/x") as writer:
        writer.write(data[:10])
        writer.write(data[10:])
    for ahead in (False, True):
        with bucket.open("a/x", ahead=ahead) as file:
            assert file.size == len(data)
            assert file.read(9000) == data[:9000]
            file.seek(20_000)
            assert file.read(10_000) == data[20_000:]
            assert file.read(1) == b""
    assert bucket.files() == {"a/x": len(data)}
    state = bucket.state("a/x")
    with bucket.upload("a/x") as writer:
        writer.write(data)
    assert bucket.state("a/x") not in (None, state), "the same bytes, and another object"
    bucket.delete("a/x")
    bucket.delete("a/x")
    assert bucket.state("a/x") is None
    assert bucket.files() == {}
    with pytest.raises(ResourceError, match="no-such-bucket/models/x: "):
        ObjectFolder.parse("gs://no-such-bucket/models").open("x")


def test_a_process_ends_after_an_upload_that_failed(bench: Bench) -> None:
    ends_after_a_failed_upload(bench.store(), bench.server.environment)


def test_a_model_is_read_as_from_a_disk(bench: Bench) -> None:
    local = ModelFiles.open(bench.model)
    remote = ModelFiles.open(ObjectFolder.parse(bench.source))
    assert remote.tensors == local.tensors
    assert remote.identity() == local.identity()
    for name, entry in local.tensors.items():
        assert torch.equal(remote.read(name), local.read(name))
        if entry.shape[0] > 5:
            assert torch.equal(remote.read(name, (2, 5)), local.read(name, (2, 5)))
    for file in local.files:
        own = fingerprint_weight_file(bench.model, file)
        assert fingerprint_weight_file(remote.source, file) == own


def test_killed_while_it_sends_it_goes_on_from_store_to_store(
    bench: Bench, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output = bench.store() / "out"
    arguments = command(bench, output, tmp_path / "run")
    killed_at_the_second_file(bench, arguments, output, tmp_path)
    begun = len(bench.log())
    assert run(arguments) == 0
    assert without_source(objects(output)) == expected
    results = json.loads(output.read("prox24.json", 1 << 20) or b"")
    assert results["source"] == bench.source
    folder = output.path.partition("/")[2].replace("/", "%2F")
    sent = re.findall(rf'"PUT /upload/\S*&name={folder}%2F([^& ]+)', bench.log()[begun:])
    assert [n for n in sent if n.startswith("model-00001")] == []
    assert {n[:11] for n in sent if n.endswith(".safetensors")} == {"model-00002", "model-00003"}
    assert sent[-1] == "prox24.json"
    changes_nothing(arguments, output)


def test_no_credentials_are_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The client alone would ask a server that is not there for minutes."""

    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ResourceError, match="found no credentials .*GOOGLE_APPLICATION"):
        ObjectFolder.parse("gs://somewhere/model").files()
