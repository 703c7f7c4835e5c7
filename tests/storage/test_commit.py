"""The commit protocol: whole or not at all, first writer wins, killed at every system call."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from storage.errors import CorruptFileError, NumericalError, ResourceError, RunDirectoryError
from storage.files import commit
from storage.files.hashing import StoredFile
from storage.files.temporary import is_temporary

REPOSITORY = Path(__file__).resolve().parent.parent.parent

# A child runs one action and gets a real SIGKILL just before (or just after) its n-th system call
# that changes the directory. It exits with 0 when it makes fewer calls than that.
KILLED_CHILD = """
import os, signal, sys
from pathlib import Path
from storage.files import commit

directory, action, when, nth = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
count = 0

def counted(function):
    def call(*args, **kwargs):
        global count
        count += 1
        if when == "before" and count == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if when == "after" and count == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

for name in ("fsync", "link", "replace", "unlink"):
    setattr(os, name, counted(getattr(os, name)))
new = {"schema_version": 1, "who": "new"}
if action == "publish":
    commit.publish_json(directory / "record.json", new)
elif action == "replace":
    commit.replace_json(directory / "record.json", new)
else:
    with commit.write_new_file(directory / "data.bin") as writer:
        writer.write(b"x" * 100_000)
"""


def killed(directory: Path, action: str, when: str, nth: int) -> bool:
    """Run the child; True if it was killed, False if it came to its end."""
    command = [sys.executable, "-c", KILLED_CHILD, str(directory), action, when, str(nth)]
    code = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
    assert code in (0, -signal.SIGKILL)
    return code != 0


def leftovers(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if not is_temporary(path)]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_published_record_is_whole_or_absent_wherever_the_process_dies(
    tmp_path: Path, when: str
) -> None:
    seen = set()
    for nth in range(1, 20):
        directory = tmp_path / str(nth)
        directory.mkdir()
        died = killed(directory, "publish", when, nth)
        path = directory / "record.json"
        seen.add(path.exists())
        if path.exists():
            assert commit.read_json(path, 1)["who"] == "new"
        assert leftovers(directory) in ([], [path])
        commit.publish_json(path, {"schema_version": 1, "who": "new"})
        if not died:
            break
    assert not died
    assert seen == {True, False}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_replaced_record_is_the_old_or_the_new_one(tmp_path: Path, when: str) -> None:
    seen = set()
    for nth in range(1, 20):
        directory = tmp_path / str(nth)
        directory.mkdir()
        path = directory / "record.json"
        commit.replace_json(path, {"schema_version": 1, "who": "old"})
        died = killed(directory, "replace", when, nth)
        seen.add(commit.read_json(path, 1)["who"])
        if not died:
            break
    assert not died
    assert seen == {"old", "new"}


def test_a_new_file_is_hashed_while_written(tmp_path: Path) -> None:
    path = tmp_path / "made" / "too" / "data.bin"
    with commit.write_new_file(path) as writer:
        writer.write(b"abc")
        writer.write(memoryview(b"\0" * 10_000))
        assert writer.tell() == 10_003
    data = b"abc" + b"\0" * 10_000
    assert path.read_bytes() == data
    stored = writer.stored(path.name, rows=3)
    assert stored.sha256 == hashlib.sha256(data).hexdigest() == commit.sha256_file(path)
    assert stored == StoredFile("data.bin", commit.sha256_bytes(data), 10_003, 3)
    assert StoredFile.from_json(json.loads(json.dumps(stored.to_json()))) == stored


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"

    def write_half_of_it() -> None:
        with commit.write_new_file(path) as writer:
            writer.write(b"half")
            raise KeyError("x")

    with pytest.raises(KeyError):
        write_half_of_it()
    assert list(tmp_path.iterdir()) == []


def test_a_taken_name_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"first")
    with pytest.raises(FileExistsError), commit.write_new_file(path) as writer:
        writer.write(b"second")
    assert path.read_bytes() == b"first"


def test_the_first_record_wins_and_the_same_one_again_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    first = {"schema_version": 1, "error": 0.1, "pair": (1, 2)}
    commit.publish_json(path, first)
    commit.publish_json(path, first)
    with pytest.raises(FileExistsError):
        commit.publish_json(path, {"schema_version": 1, "error": 0.2})
    assert commit.read_json(path, 1) == {"schema_version": 1, "error": 0.1, "pair": [1, 2]}
    assert list(tmp_path.iterdir()) == [path]


def test_a_guard_that_raises_prevents_the_commit(tmp_path: Path) -> None:
    def displaced() -> None:
        raise RunDirectoryError("the lock is another's")

    record = {"schema_version": 1}
    for write in (commit.publish_json, commit.replace_json):
        with pytest.raises(RunDirectoryError, match="another's"):
            write(tmp_path / "record.json", record, guard=displaced)
    assert list(tmp_path.iterdir()) == []


def test_who_was_swept_by_a_new_owner_cannot_commit_any_more(tmp_path: Path) -> None:
    def frozen_while_another_takes_over() -> None:
        for path in tmp_path.iterdir():
            if is_temporary(path):
                path.unlink()

    record = {"schema_version": 1}
    for write in (commit.publish_json, commit.replace_json):
        with pytest.raises(RunDirectoryError, match="took the run directory over"):
            write(tmp_path / "record.json", record, guard=frozen_while_another_takes_over)
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_byte_of_a_record_is_found(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record = {"schema_version": 1, "error": 0.125, "rows": [10, 20], "name": "layers.0"}
    commit.publish_json(path, record)
    good = path.read_bytes()
    messages = []
    for position in range(len(good)):
        for flip in (1, 0x80):
            path.write_bytes(
                good[:position] + bytes([good[position] ^ flip]) + good[position + 1 :]
            )
            try:
                read = commit.read_json(path, 1)
            except CorruptFileError as error:
                messages.append(str(error))
            else:
                assert read == record  # white space only
    assert len(messages) > len(good)
    assert all(str(path) in message for message in messages)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"schema_version": 1}', b"\xff\xfe", b"[" * 100_000, b"1" * 9999],
    ids=["empty", "cut", "list", "null", "no checksum", "not text", "deep", "long number"],
)
def test_a_file_that_is_no_record_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"record\.json"):
        commit.read_json(path, 1)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match=r"record\.json"):
        commit.read_json(tmp_path / "record.json", 1)


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    commit.publish_json(path, {"schema_version": 2})
    with pytest.raises(RunDirectoryError, match="schema_version is 2, this prox24 reads 1"):
        commit.read_json(path, 1)


@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_a_figure_that_is_not_finite_is_not_recorded(tmp_path: Path, figure: float) -> None:
    record = {"schema_version": 1, "layers": {"mlp.up_proj": [{"rows": 8}, {"error": figure}]}}
    said = rf"record\.json: not written, layers\.mlp\.up_proj\[1\]\.error is {figure}"
    with pytest.raises(NumericalError, match=said):
        commit.publish_json(tmp_path / "record.json", record)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "a\\b", 3, None])
def test_a_file_entry_cannot_lead_out_of_its_directory(name: object) -> None:
    entry = {"name": name, "sha256": "0" * 64, "bytes": 1, "rows": 0}
    with pytest.raises(CorruptFileError, match=r"block-003/record\.json"):
        StoredFile.from_json(entry, "block-003/record.json")


def test_verify_file(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"abc")
    commit.verify_file(path, commit.sha256_bytes(b"abc"))
    for content in (b"abd", b"ab", b""):
        path.write_bytes(content)
        with pytest.raises(CorruptFileError, match=r"data\.bin"):
            commit.verify_file(path, commit.sha256_bytes(b"abc"))
    path.unlink()
    with pytest.raises(CorruptFileError, match=r"data\.bin"):
        commit.verify_file(path, commit.sha256_bytes(b"abc"))


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    # /dev/full gives the true ENOSPC of the kernel; the writer's file is redirected to it.
    path = tmp_path / "data.bin"

    def write_to_a_full_disk() -> None:
        with commit.write_new_file(path) as writer:
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, writer.fileno())
            os.close(full)
            writer.write(b"x" * 2**20)

    with pytest.raises(ResourceError, match="make room"):
        write_to_a_full_disk()
    assert list(tmp_path.iterdir()) == []


def test_two_processes_publish_and_one_wins(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from storage.files import commit
        sys.stdin.read(1)
        try:
            commit.publish_json(Path(sys.argv[1]), {"schema_version": 1, "who": sys.argv[2]})
        except FileExistsError:
            sys.exit(3)
        """
    )
    path = tmp_path / "record.json"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(path), str(who)],
            stdin=subprocess.PIPE,
            cwd=REPOSITORY,
        )
        for who in range(4)
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.close()
    codes = [child.wait() for child in children]
    assert sorted(codes) == [0, 3, 3, 3]
    assert commit.read_json(path, 1)["who"] == str(codes.index(0))
    assert list(tmp_path.iterdir()) == [path]
