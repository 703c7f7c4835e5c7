"""The run lock, with real processes that are killed, stopped and woken."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage.errors import RunDirectoryError
from storage.files import commit
from storage.files.temporary import temporary_name
from storage.run import lock
from storage.run.lock import RunLock

REPOSITORY = Path(__file__).resolve().parent.parent.parent

# Takes the lock, says so, then obeys one-word commands from standard input and answers each.
HOLDER = """
import os, signal, socket, sys
from pathlib import Path
from storage.files import commit
from storage.run import lock
from storage.errors import Prox24Error

directory, host = Path(sys.argv[1]), sys.argv[2]
if host:
    socket.gethostname = lambda: host
stop_in_guard = False

def guard():
    run_lock.assert_held()
    if stop_in_guard:
        os.kill(os.getpid(), signal.SIGSTOP)

try:
    with lock.RunLock(directory, heartbeat_seconds=0.05) as run_lock:
        print("held", run_lock.nonce, flush=True)
        for line in sys.stdin:
            try:
                if line == "assert\\n":
                    run_lock.assert_held()
                elif line == "freeze and publish\\n":
                    stop_in_guard = True
                    commit.publish_json(
                        directory / "record.json", {"schema_version": 1, "who": "child"},
                        guard=guard,
                    )
                print("fine", flush=True)
            except Prox24Error as error:
                print(type(error).__name__, error, flush=True)
except Prox24Error as error:
    print("refused", error, flush=True)
"""


class Holder:
    """A process that wants the lock. `answer` is what it said about that."""

    def __init__(self, directory: Path, host: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(directory), host],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def read(self) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 60)
        assert ready, "the holder does not answer"
        return self.process.stdout.readline().strip()

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Callable[..., Holder]]:
    made: list[Holder] = []

    def make(host: str = "") -> Holder:
        made.append(Holder(tmp_path / "run", host))
        return made[-1]

    yield make
    for one in made:
        one.end()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def lock_files(run: Path) -> list[Path]:
    return sorted(run.glob("lock-*"))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def age_of_the_heartbeat(run: Path) -> float:
    owner = lock.read_owner(run)
    assert owner is not None
    return time.time() - owner.heartbeat


def test_held_inside_and_gone_after(run: Path) -> None:
    with RunLock(run) as held:
        held.assert_held()
        assert lock_files(run) == [held.path]
        owner = lock.read_owner(run)
        assert owner is not None
        assert (owner.pid, owner.nonce) == (os.getpid(), held.nonce)
        assert lock.is_alive(owner) is True
    assert list(run.iterdir()) == []
    assert lock.read_owner(run) is None
    with pytest.raises(RunDirectoryError, match="not held"):
        held.assert_held()
    with RunLock(run) as again:
        assert again.nonce != owner.nonce


def test_a_live_owner_is_named(run: Path, holder: Callable[..., Holder]) -> None:
    first = holder()
    assert first.read().startswith("held")
    with pytest.raises(RunDirectoryError) as caught, RunLock(run):
        pass
    assert f"process {first.pid} on " in str(caught.value)
    assert "last heartbeat 20" in str(caught.value)
    second = holder()
    assert f"process {first.pid} on " in second.read()
    first.tell("assert")
    assert first.read() == "fine"


def test_an_owner_that_has_just_been_stopped_is_alive(
    run: Path, holder: Callable[..., Holder]
) -> None:
    first = holder()
    assert first.read().startswith("held")
    first.signal(signal.SIGSTOP)
    until(lambda: is_stopped(first.pid))
    with pytest.raises(RunDirectoryError, match=f"process {first.pid} on "):
        RunLock(run, stale_seconds=60).__enter__()
    first.signal(signal.SIGCONT)
    first.tell("assert")
    assert first.read() == "fine"


def test_an_owner_that_stays_stopped_is_replaced(run: Path, holder: Callable[..., Holder]) -> None:
    """After a countdown; it finds out when it wakes up."""
    first = holder()
    assert first.read().startswith("held")
    first.signal(signal.SIGSTOP)
    until(lambda: is_stopped(first.pid))
    until(lambda: age_of_the_heartbeat(run) > 0.3)
    waits: list[str] = []
    with RunLock(run, stale_seconds=0.3, on_wait=lambda seconds, who: waits.append(who)) as mine:
        assert f"process {first.pid} on " in waits[0]
        assert "last heartbeat" in waits[0]
        first.signal(signal.SIGCONT)
        first.tell("assert")
        assert "another process took the run over" in first.read()
        mine.assert_held()
        assert lock_files(run) == [mine.path]


def test_an_owner_that_was_stopped_and_goes_on_keeps_it(
    run: Path, holder: Callable[..., Holder]
) -> None:
    """As after a laptop's sleep: the heartbeat is old, but it moves again."""
    first = holder()
    assert first.read().startswith("held")
    first.signal(signal.SIGSTOP)
    until(lambda: is_stopped(first.pid))
    until(lambda: age_of_the_heartbeat(run) > 1)
    with pytest.raises(RunDirectoryError, match=f"process {first.pid} on "):
        RunLock(
            run, stale_seconds=1, on_wait=lambda seconds, who: first.signal(signal.SIGCONT)
        ).__enter__()
    first.tell("assert")
    assert first.read() == "fine"


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_a_killed_owner_is_replaced_without_waiting(
    run: Path, holder: Callable[..., Holder], reaped: bool
) -> None:
    first = holder()
    assert first.read().startswith("held")
    first.signal(signal.SIGKILL)
    if reaped:
        first.process.wait()
    else:
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    waits: list[float] = []
    with RunLock(run, on_wait=lambda seconds, who: waits.append(seconds)) as held:
        assert lock_files(run) == [held.path]
    assert waits == []


def rewrite(path: Path, **changes: object) -> None:
    """Change a lock file as if it had been written so."""
    record = commit.read_json(path, lock.LOCK_SCHEMA) | changes
    path.unlink()
    commit.publish_json(path, record)


@pytest.mark.parametrize(
    "changes",
    [{"process_start": "1"}, {"boot_id": "another boot", "heartbeat": 1.0}],
    ids=["the pid is another's now", "the machine was booted"],
)
def test_a_pid_in_use_again_is_not_taken_for_the_owner(
    run: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    with RunLock(run) as first:
        kept = first.path.read_bytes()
    left = run / "lock-0.json"
    left.write_bytes(kept)  # names this very process, which is alive
    with pytest.raises(RunDirectoryError, match=f"process {os.getpid()} on "):
        RunLock(run).__enter__()
    rewrite(left, **changes)
    waits: list[float] = []
    with RunLock(run, on_wait=lambda seconds, who: waits.append(seconds)):
        assert not left.exists()
    assert waits == []


@pytest.mark.parametrize("killer", [None, signal.SIGKILL], ids=["beating", "killed"])
def test_another_hosts_heartbeat_decides(
    run: Path, holder: Callable[..., Holder], killer: signal.Signals | None
) -> None:
    other = holder(host="elsewhere")
    assert other.read().startswith("held")
    waits: list[float] = []
    mine = RunLock(run, stale_seconds=1.5, on_wait=lambda seconds, who: waits.append(seconds))
    if killer is None:
        with pytest.raises(RunDirectoryError, match=f"process {other.pid} on elsewhere"):
            mine.__enter__()
        assert waits
        return
    other.signal(killer)
    other.process.wait()
    with mine:
        mine.assert_held()
    assert len(waits) >= 2
    assert waits == sorted(waits, reverse=True)
    assert 0 < waits[-1] < waits[0] <= 1.5


def test_another_machine_of_the_same_name_is_not_taken_for_a_dead_process(run: Path) -> None:
    with RunLock(run) as first:
        kept = first.path.read_bytes()
    left = run / "lock-0.json"
    left.write_bytes(kept)
    rewrite(left, boot_id="of the other machine", heartbeat=time.time())
    waits: list[float] = []
    with RunLock(run, stale_seconds=0.3, on_wait=lambda seconds, who: waits.append(seconds)):
        pass
    assert waits


def test_a_frozen_owner_that_wakes_up_changes_nothing(
    run: Path, holder: Callable[..., Holder]
) -> None:
    other = holder(host="elsewhere")
    assert other.read().startswith("held")
    other.signal(signal.SIGSTOP)
    until(lambda: is_stopped(other.pid))
    with RunLock(run, heartbeat_seconds=3600, stale_seconds=0.3) as mine:
        before = mine.path.read_bytes()
        other.signal(signal.SIGCONT)
        other.tell("assert")
        assert "another process took the run over" in other.read()
        assert other.process.stdin is not None
        other.process.stdin.close()  # it leaves its lock
        other.process.wait()
        mine.assert_held()
        assert mine.path.read_bytes() == before
        assert lock_files(run) == [mine.path]


def test_an_owner_frozen_within_its_commit_cannot_commit_after_a_takeover(
    run: Path, holder: Callable[..., Holder]
) -> None:
    other = holder(host="elsewhere")
    assert other.read().startswith("held")
    other.tell("freeze and publish")  # stops itself between the check of the lock and the link
    until(lambda: is_stopped(other.pid))
    with RunLock(run, stale_seconds=0.3) as mine:
        other.signal(signal.SIGCONT)
        assert "took the run directory over" in other.read()
        assert not (run / "record.json").exists()
        record = {"schema_version": 1, "who": "parent"}
        commit.publish_json(run / "record.json", record, guard=mine.assert_held)
    assert commit.read_json(run / "record.json", 1)["who"] == "parent"


def test_of_many_that_take_over_at_once_exactly_one_holds_it(
    run: Path, holder: Callable[..., Holder]
) -> None:
    for _ in range(2):
        dead = holder()
        assert dead.read().startswith("held")
        dead.signal(signal.SIGKILL)
        dead.process.wait()
        takers = [holder() for _ in range(4)]
        answers = [taker.read() for taker in takers]
        assert sum(answer.startswith("held") for answer in answers) == 1
        assert all(answer.startswith(("held", "refused")) for answer in answers)
        for taker in takers:
            taker.end()
        with RunLock(run):
            assert len(lock_files(run)) == 1


def test_a_held_lock_that_is_removed_by_hand_is_noticed(run: Path) -> None:
    with RunLock(run) as held:
        held.path.unlink()
        with pytest.raises(RunDirectoryError, match="took the run over"):
            held.assert_held()


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 2000, b'{"schema_version": 9}'])
def test_an_unreadable_lock_is_waited_for(run: Path, content: bytes) -> None:
    run.mkdir()
    (run / "lock-0.json").write_bytes(content)
    waits: list[float] = []

    def note(seconds: float, who: str) -> None:
        assert "cannot be read" in who
        waits.append(seconds)

    with RunLock(run, stale_seconds=0.2, on_wait=note) as held:
        assert lock_files(run) == [held.path]
    assert waits


def test_taking_the_lock_removes_what_was_not_committed(run: Path) -> None:
    record = run / "checkpoints" / "block-000" / "record.json"
    commit.publish_json(record, {"schema_version": 1})
    temporary = temporary_name(record)
    temporary.write_bytes(b"{")
    with RunLock(run):
        assert not temporary.exists()
        assert record.exists()


def test_the_heartbeat_moves_and_a_forked_child_leaves_the_lock_alone(run: Path) -> None:
    with RunLock(run, heartbeat_seconds=0.02) as held:
        before = json.loads(held.path.read_bytes())["heartbeat"]

        def moved() -> bool:
            owner = lock.read_owner(run)
            return owner is not None and owner.heartbeat > before

        until(moved)
        child = os.fork()
        if child == 0:
            held.__exit__(None, None, None)
            os._exit(0)
        os.waitpid(child, 0)
        held.assert_held()
