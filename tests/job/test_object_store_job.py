"""Whole jobs from and to an object store, against a real S3-compatible server."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.command_line import run
from storage.errors import OutputError
from storage.object_store import ObjectFolder
from tests.storage.test_object_store import put
from tests.support.google_server import GoogleServer
from tests.support.injection import Injection
from tests.support.jobs import contents, prune_here, write_text
from tests.support.processes import Driver
from tests.support.s3_server import CREDENTIALS, S3Server
from tests.support.tiny_models import save_tiny_model


class Bench:
    """A model on a disk and in a store, and what it becomes on a disk."""

    def __init__(self, folder: Path, server: S3Server | GoogleServer) -> None:
        self.folder, self.server = folder, server
        self.source = f"{server.bucket('source')}/tiny"
        self.model = save_tiny_model(folder / "tiny", weight_files=3)
        (self.model / "README.md").write_text("---\nlicense: mit\n---\n")
        self.text = write_text(folder / "text.txt", 4096)
        self.options: dict[str, Any] = {
            "method": "wanda", "dataset": str(self.text), "reconstruct": "auto",
        }  # fmt: skip
        self.number = 0
        put(self.model, ObjectFolder.parse(self.source))

    def store(self) -> ObjectFolder:
        """A bucket's folder of one test."""
        self.number += 1
        return ObjectFolder.parse(f"{self.server.bucket(f'jobs-{self.number}')}/models")

    def log(self) -> str:
        """The server's, a line for each request, without its colours."""
        return re.sub(r"\x1b\[\d+m", "", self.server.log.read_text())


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, s3: S3Server) -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        bench = Bench(tmp_path_factory.mktemp("jobs"), s3)
        yield bench


@pytest.fixture(scope="module")
def expected(bench: Bench) -> dict[str, bytes]:
    """The output on a disk."""
    output = bench.folder / "expected"
    return without_source(contents(prune_here(bench.model, output, **bench.options).output))


def without_source(files: dict[str, bytes]) -> dict[str, bytes]:
    """Files of an output, but for the name of the model that it was made from."""
    results = json.loads(files["prox24.json"])
    del results["source"]
    changed = {"prox24.json": json.dumps(results).encode(), "README.md": b""}
    return files | changed


def objects(where: ObjectFolder) -> dict[str, bytes]:
    return {name: where.read(name, 1 << 30) or b"" for name in where.files()}


def command(bench: Bench, output: ObjectFolder, run_directory: Path, *more: str) -> list[str]:
    return [
        *(
            "prune",
            bench.source,
            str(output),
            "--run-dir",
            str(run_directory),
            "--executor",
            "local",
        ),
        *("--method", "wanda", "--dataset", str(bench.text), "--nsamples", "8"),
        *("--seqlen", "32", "--batch-size", "2", "--threads", "1", *more),
    ]


def killed_at_the_second_file(
    bench: Bench, arguments: list[str], output: ObjectFolder, folder: Path
) -> None:
    """A job's end by SIGKILL: its second weight file is in the store, and not recorded yet."""
    at = Injection(folder, r"before replace .*uploads/model-00002", signal.SIGKILL)
    driver = Driver(arguments, folder / "killed", bench.server.environment, injection=at)
    assert driver.wait() == -signal.SIGKILL, driver.errors()
    assert sorted(output.files()) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2)]


def changes_nothing(arguments: list[str], output: ObjectFolder) -> None:
    """The same command, when all is done: nothing is computed or written."""
    state = {name: output.state(name) for name in output.files()}
    assert run(arguments) == 0
    assert {name: output.state(name) for name in output.files()} == state


def test_from_store_to_store_gives_the_bytes_of_disks(
    bench: Bench, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output = bench.store() / "out"
    arguments = command(bench, output, tmp_path / "run")
    assert run(arguments) == 0
    assert without_source(objects(output)) == expected
    results = json.loads(output.read("prox24.json", 1 << 20) or b"")
    assert results["source"] == bench.source
    puts = re.findall(rf'"PUT /{output.path}/(\S+)', bench.log())
    assert puts[-1].startswith("prox24.json")
    said = b"".join(contents(tmp_path / "run").values())
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"].encode() not in said
    assert not (tmp_path / "run" / "uploads").exists()
    changes_nothing(arguments, output)


def test_an_output_is_replaced_only_if_asked(
    bench: Bench, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = bench.store() / "out"
    for name in ("prox24.json", "old.safetensors"):
        with output.upload(name) as writer:
            writer.write(b"{}")
    assert run(command(bench, output, tmp_path / "run")) == 2
    assert "exists and is not empty; --overwrite" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert objects(output) == {"prox24.json": b"{}", "old.safetensors": b"{}"}
    assert run(command(bench, output, tmp_path / "run", "--overwrite")) == 0
    assert without_source(objects(output)) == expected


def test_what_an_output_in_a_store_needs(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ObjectFolder.parse(bench.source)
    assert run(["prune", bench.source, "s3://source/out", "--executor", "local"]) == 2
    assert "--run-dir" in capsys.readouterr().err
    with pytest.raises(OutputError, match="holds the source"):
        prune_here(source, source, run_dir=str(tmp_path / "run"), **bench.options)
    arguments = command(bench, ObjectFolder.parse("s3://not-there/out"), tmp_path / "run")
    assert run(arguments) == 2
    assert "s3://not-there/out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_killed_while_it_sends_it_goes_on_with_what_is_missing(
    bench: Bench, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output = bench.store() / "out"
    arguments = command(bench, output, tmp_path / "run")
    killed_at_the_second_file(bench, arguments, output, tmp_path)
    begun = len(bench.log())
    resumed = Driver(arguments, tmp_path / "resumed", bench.server.environment)
    assert resumed.wait() == 0, resumed.errors()
    assert without_source(objects(output)) == expected
    sent = re.findall(r'"(?:PUT|POST) /\S*out/(model-\d+)', bench.log()[begun:])
    assert set(sent) == {"model-00002", "model-00003"}


def test_an_object_that_someone_changed_is_sent_again(
    bench: Bench, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output = bench.store() / "out"
    arguments = command(bench, output, tmp_path / "run")
    at = Injection(tmp_path, r"before replace .*uploads/model-00003", signal.SIGKILL)
    environment = bench.server.environment
    driver = Driver(arguments, tmp_path / "killed", environment, injection=at)
    assert driver.wait() == -signal.SIGKILL, driver.errors()
    for name in ("model-00001-of-00003.safetensors", "stranger"):
        with output.upload(name) as writer:
            writer.write(b"something else")
    assert run(arguments) == 0
    assert without_source(objects(output)) == expected


def test_a_stored_model_is_evaluated_and_planned(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = []
    for model in (bench.source, str(bench.model)):
        measure = ["eval", model, "--dataset", str(bench.text), "--seqlen", "64", "--nsamples", "2"]
        assert run([*measure, "--executor", "local", "--json"]) == 0
        figures.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert figures[0] == figures[1]
    begun = len(bench.log())
    plans = []
    for model in (bench.source, str(bench.model)):
        run(["plan", model, "--seqlen", "64", "--nsamples", "2", "--json"])
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0]["model"].pop("name") == bench.source
    assert plans[1]["model"].pop("name") == bench.model.name
    assert plans[0]["model"] == plans[1]["model"]
    read = re.findall(r'"GET /source/tiny/model-\S+ HTTP/1.1" (\d+)', bench.log()[begun:])
    assert read, "headers are read"
    assert set(read) == {"206"}, "and nothing is read whole"
