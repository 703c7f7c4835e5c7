"""Models in an object store, against a real S3-compatible server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import storage.object_store
from storage.errors import ConfigError, CorruptFileError, ModelError, ResourceError
from storage.model.files import INDEX_FILE, ModelFiles, fingerprint_weight_file
from storage.model.folder import STAGED_PREFIX
from storage.object_store import ObjectFolder, place
from tests.support.s3_server import CREDENTIALS, S3Server
from tests.support.tiny_models import save_tiny_model


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ObjectFolder:
    """A folder of the test's own."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    name = "".join(c for c in tmp_path.name.lower() if c.isalnum())[:50]
    return ObjectFolder.parse(f"{s3.bucket(f'b{name}')}/models")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", weight_files=2)


def put(folder: Path, where: ObjectFolder) -> ObjectFolder:
    """Copies a folder into the store."""
    for path in folder.rglob("*"):
        if path.is_file():
            with where.upload(path.relative_to(folder).as_posix()) as writer:
                writer.write(path.read_bytes())
    return where


def test_a_uri_is_taken_apart() -> None:
    folder = ObjectFolder.parse("s3://bucket//a/b/?region=eu-west-1&endpoint_override=h:1")
    assert (str(folder), folder.name) == ("s3://bucket/a/b", "b")
    assert ObjectFolder.parse(folder.uri) == folder
    assert str(ObjectFolder.parse("gcs://bucket/a")) == "gs://bucket/a"
    assert place("a") == Path("a").absolute()


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("s3://bucket", "a folder in it"),
        ("s3:///a", "name a bucket"),
        ("s3://bucket/../a", "name a bucket"),
        ("ftp://host/a", "not supported"),
        ("s3://bucket/a?access_key=SECRET", "no option"),
        ("s3://KEY:SECRET@bucket/a", "must not hold credentials"),
    ],
)
def test_a_uri_that_cannot_be_used_is_refused(uri: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as refusal:
        place(uri)
    assert "SECRET" not in str(refusal.value)


def test_a_place_is_named_without_pyarrow(repository: Path) -> None:
    """Commands that reach no store start without it, and without torch."""
    program = (
        "import sys\n"
        "import storage.files.commit, storage.files.damage, storage.files.hashing\n"
        "import storage.model.folder, storage.output.uploads\n"
        "import storage.run.directory, storage.run.lock, storage.run.status_file\n"
        "from storage.object_store import place\n"
        "place('s3://bucket/a')\n"
        "sys.exit(str(sorted({'numpy', 'pyarrow', 'torch'} & set(sys.modules))))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, capture_output=True, text=True
    )
    assert ended.stderr.strip() == "[]"


def test_an_object_is_read_in_ranges(bucket: ObjectFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.object_store, "PART_BYTES", 1000)
    data = bytes(torch.randint(256, (23_456,), dtype=torch.uint8).tolist())
    with bucket.upload("x") as writer:
        writer.write(data[:10])
        writer.write(data[10:])
    for ahead in (False, True):
        with bucket.open("x", ahead=ahead) as file:
            assert file.size == len(data)
            assert file.read(17) == data[:17]
            assert file.read(9000) == data[17:9017]
            file.seek(20_000)
            assert file.read(10_000) == data[20_000:]
            assert file.read(1) == b""
            file.seek(5)
            assert file.read(2000) == data[5:2005]
    assert bucket.files() == {"x": len(data)}
    assert bucket.state("x") is not None
    assert bucket.state("y") is None


@pytest.mark.slow  # the client waits longer each time
def test_what_fails_for_a_moment_is_tried_again(bucket: ObjectFolder, s3: S3Server) -> None:
    folder = bucket / "flaky"
    with folder.upload("x") as writer:
        writer.write(b"data" * 1000)
    with folder.open("x") as file:
        assert file.read(9) == b"datadatad"
    refused = [line for line in s3.log.read_text().splitlines() if " 503 " in line]
    assert all(any(method in line for line in refused) for method in ("POST", "PUT", "HEAD", "GET"))


def test_an_upload_that_fails_leaves_no_object(bucket: ObjectFolder) -> None:
    with pytest.raises(ZeroDivisionError), bucket.upload("x") as writer:
        writer.write(b"half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), bucket.upload("y") as writer:
        writer.write(bytes(30 << 20))  # parts of it are in the store by then
        raise ZeroDivisionError
    assert bucket.files() == {}


def ends_after_a_failed_upload(bucket: ObjectFolder, environment: dict[str, str]) -> None:
    """A process whose upload fails midway ends with its own error, and leaves no object."""
    program = (
        "import sys\n"
        "from storage.object_store import ObjectFolder\n"
        "with ObjectFolder.parse(sys.argv[1]).upload('x') as writer:\n"
        "    writer.write(bytes(30 << 20))\n"  # parts of it are in the store by then
        "    raise ZeroDivisionError\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, bucket.uri],
        env={**os.environ, **environment},
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "ZeroDivisionError"
    assert bucket.files() == {}


def test_a_process_ends_after_an_upload_that_failed(bucket: ObjectFolder, s3: S3Server) -> None:
    ends_after_a_failed_upload(bucket, s3.environment)


def test_what_the_store_refuses_is_one_line(bucket: ObjectFolder) -> None:
    with pytest.raises(ResourceError, match="nowhere/x: ") as refusal:
        ObjectFolder.parse("s3://no-such-bucket/nowhere").open("x")
    assert "\n" not in str(refusal.value)
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in str(refusal.value)


def test_a_model_is_read_as_from_a_disk(bucket: ObjectFolder, model: Path) -> None:
    local, remote = ModelFiles.open(model), ModelFiles.open(put(model, bucket))
    assert remote.tensors == local.tensors
    assert remote.identity() == local.identity()
    assert remote.parts() == local.parts()
    assert sorted(p.name for p in remote.folder.iterdir()) == sorted(
        p.name for p in model.iterdir() if p.suffix != ".safetensors"
    )
    for name, entry in local.tensors.items():
        assert torch.equal(remote.read(name), local.read(name))
        if entry.shape[0] > 5:
            assert torch.equal(remote.read(name, (2, 5)), local.read(name, (2, 5)))
    for file in local.files:
        assert fingerprint_weight_file(remote.source, file) == fingerprint_weight_file(model, file)


def test_staged_files_go_with_the_model(
    bucket: ObjectFolder, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.model.folder.tempfile, "gettempdir", lambda: str(tmp_path))
    left = tmp_path / f"{STAGED_PREFIX}left"  # by a process that was killed
    left.mkdir()
    (left / ".lock").touch()
    first = ModelFiles.open(put(model, bucket))
    second = ModelFiles.open(bucket)
    assert not left.exists()
    assert first.folder.is_dir(), "another's, that is in use, stays"
    assert second.folder != first.folder
    del first, second
    assert not list(tmp_path.glob(f"{STAGED_PREFIX}*"))


def break_file(where: ObjectFolder, name: str, change: Callable[[bytearray], None]) -> None:
    raw = bytearray(where.read(name, 1 << 30) or b"")
    change(raw)
    with where.upload(name) as writer:
        writer.write(raw)


def test_damage_is_found(bucket: ObjectFolder, model: Path) -> None:
    files = ModelFiles.open(put(model, bucket))
    name = files.files[1]
    tensor = next(t for t, entry in files.tensors.items() if entry.file == name)
    entry = files.tensors[tensor]
    files.expected = fingerprint_weight_file(files.source, name).tensors
    files.read(tensor)

    def flip(raw: bytearray) -> None:
        raw[entry.start] ^= 1

    break_file(bucket, name, flip)
    with pytest.raises(CorruptFileError, match=f"s3://.*{name}: tensor {tensor} is not what"):
        files.read(tensor, (0, 1))

    def nan(raw: bytearray) -> None:
        raw[entry.start : entry.start + 4] = b"\xff\xff\xff\x7f"

    break_file(bucket, name, nan)
    with pytest.raises(ModelError, match=f"{tensor} holds NaN"):
        fingerprint_weight_file(ModelFiles.open(bucket).source, name)
    break_file(bucket, name, lambda raw: raw.__delitem__(slice(-8, None)))
    with pytest.raises(CorruptFileError, match=f"{name}: truncated, 8 bytes short"):
        ModelFiles.open(bucket)
    bucket.delete(name)
    with pytest.raises(ModelError, match=f"{name}: missing"):
        ModelFiles.open(bucket)
    bucket.delete(INDEX_FILE)
    with pytest.raises(ModelError, match="neither model.safetensors nor"):
        ModelFiles.open(bucket)
    with pytest.raises(ModelError, match="no objects there"):
        ModelFiles.open(bucket / "nothing")


def test_an_index_cannot_lead_elsewhere(bucket: ObjectFolder, model: Path) -> None:
    put(model, bucket)
    with bucket.upload(INDEX_FILE) as writer:
        writer.write(b'{"weight_map": {"a": "../other/model.safetensors"}}')
    with pytest.raises(CorruptFileError, match="leads out of the model"):
        ModelFiles.open(bucket)
