"""Models and whole jobs on `gs://`, against an emulator of Google Cloud Storage."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import storage.object_store
from cluster.command_line import run
from storage.errors import ResourceError
from storage.model_files import ModelFiles, fingerprint_weight_file
from storage.object_store import ObjectFolder
from tests.google_server import google_server
from tests.injection import Injection
from tests.jobs import contents, prune_here
from tests.processes import Driver
from tests.test_object_store_job import Bench, command, objects, without_source


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
    bucket = bench.store()
    program = (
        "import sys\n"
        "from storage.object_store import ObjectFolder\n"
        "with ObjectFolder.parse(sys.argv[1]).upload('x') as writer:\n"
        "    writer.write(bytes(30 << 20))\n"  # parts of it are in the store by then
        "    raise ZeroDivisionError\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, bucket.uri],
        env={**os.environ, **bench.server.environment},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "ZeroDivisionError"
    assert bucket.files() == {}


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
    # The second weight file is in the store, and not recorded yet.
    at = Injection(tmp_path, r"before replace .*uploads/model-00002", signal.SIGKILL)
    environment = bench.server.environment
    driver = Driver(arguments, tmp_path / "killed", environment, injection=at)
    assert driver.wait() == -signal.SIGKILL, driver.errors()
    assert sorted(output.files()) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2)]
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
    # The same command, when all is done: nothing is computed or written.
    state = {name: output.state(name) for name in output.files()}
    assert run(arguments) == 0
    assert {name: output.state(name) for name in output.files()} == state


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
