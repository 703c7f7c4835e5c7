"""One driver at a time on a run directory.

A lock is a file `lock-NONCE.json`; its name is never used twice. A process that wants the lock
first judges the owners of the existing lock files, then creates a lock file, then lists the
directory again. If it lists only files whose owners it has judged dead, it owns the lock and
deletes those; otherwise it deletes its file and starts over. There is never more than one owner: if
there were two, the one that listed later would have seen the other's file. No lock file is ever
replaced, so a process that continues late cannot regain a lost lock: its heartbeat goes to a file
that no longer has a name.

Judging an owner: for a process on this host (same name, boot and process namespace) the kernel
tells whether it lives, and the lock of a dead one is taken over at once. For a process on another
host only the heartbeat is visible: if it does not move for a time, the lock is taken over. A
process on this host that lives but has had no heartbeat for that long (stopped, or blocked in the
kernel) is treated in the same way. This is safe even if the former owner lives and continues.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import logging
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from storage.errors import CorruptFileError, RunDirectoryError
from storage.files.checked_json import decode_json, encode_json, is_count
from storage.files.commit import fsync_directory, make_directory, open_regular_file
from storage.files.listing import files_below, listed
from storage.files.os_errors import explained
from storage.files.temporary import is_temporary, temporary_name

logger = logging.getLogger(__name__)

LOCK_SCHEMA = 1
_RECORD_BYTES = 1024  # fixed, so that a heartbeat overwrites the whole record in one write
_MAX_ROUNDS = 100
_CLAIM_SECONDS = 0.5  # a claim that lost against another is deleted well within this


@dataclass(frozen=True)
class Owner:
    """The owner of a run directory: a process on a host.

    process_start: clock ticks since boot, "" if unknown. heartbeat: Unix time in seconds of the
    last one. pid_namespace, boot_id: `pid` and `process_start` are comparable only if these agree.
    """

    host: str
    pid: int
    process_start: str
    boot_id: str
    pid_namespace: str
    nonce: str
    heartbeat: float

    def describe(self) -> str:
        """For messages: process, host and last heartbeat."""
        beat = datetime.datetime.fromtimestamp(self.heartbeat, datetime.UTC)
        return f"process {self.pid} on {self.host} (last heartbeat {beat:%Y-%m-%d %H:%M:%S} UTC)"


def read_owner(directory: Path) -> Owner | None:
    """The present owner, or a dead one whose lock file is left; None without one. Only reads."""
    owners = [owner for path in _lock_files(directory) if (owner := _parse(_read(path), path))]
    return max(owners, key=lambda owner: owner.heartbeat, default=None)


def is_alive(owner: Owner) -> bool | None:
    """Whether the owner's process exists; None if this host cannot tell."""
    here = _this_process("")
    if owner.host != here.host:
        return None
    if owner.boot_id != here.boot_id:
        # This host before its reboot; or, if the heartbeat is newer than the boot, another machine
        # of the same name.
        return False if owner.heartbeat < _boot_time() else None
    if owner.pid_namespace != here.pid_namespace:
        return None
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    start = _process_start(owner.pid)
    return start is None or start == owner.process_start


class RunLock:
    """Context manager that owns a run directory; a thread writes the heartbeat.

    directory: created if missing. heartbeat_seconds: time between heartbeats. stale_seconds: the
    lock of an owner on another host, or of one on this host that lives but has had no heartbeat for
    this long, is taken over if its heartbeat does not move for this long. on_wait: called about
    once a second while waiting, with the seconds that remain and a text that names the owner.

    Entering raises RunDirectoryError, naming host, process and last heartbeat, if the owner lives.
    It also deletes all temporary files in the directory, so that a displaced owner can no longer
    commit anything (see `storage.files.commit`).
    """

    def __init__(
        self,
        directory: Path,
        heartbeat_seconds: float = 5,
        *,
        stale_seconds: float = 30,
        on_wait: Callable[[float, str], None] | None = None,
    ) -> None:
        self.directory = directory
        self._heartbeat_seconds = heartbeat_seconds
        self._stale_seconds = stale_seconds
        self._on_wait = on_wait
        self._owner: Owner | None = None
        self._descriptor = -1
        self._pid = os.getpid()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def nonce(self) -> str:
        """32 hexadecimal digits, unique to this ownership; RunDirectoryError if not held."""
        return self._held().nonce

    @property
    def path(self) -> Path:
        """The lock file; RunDirectoryError if not held."""
        return _lock_path(self.directory, self._held().nonce)

    def assert_held(self) -> None:
        """Raise RunDirectoryError if another process has taken the lock over."""
        path = self.path
        # Its name is unique, so it suffices that it exists; damage lasts until the next heartbeat.
        if _read(path) is None:
            raise RunDirectoryError(
                f"{self.directory}: another process took the run over; let that one go on"
            )

    def __enter__(self) -> RunLock:
        for _ in range(_MAX_ROUNDS):
            make_directory(self.directory)  # each time: a process that gives up may remove it
            dead = {path for path in _lock_files(self.directory) if self._judge(path)}
            with explained(self.directory / "lock"):
                won = self._claim(dead)
            if won:
                return self
            time.sleep(random.uniform(0.02, 0.2))  # another process claimed at the same time
        raise RunDirectoryError(f"{self.directory}: too many processes want it; start one only")

    def __exit__(self, *_: object) -> None:
        if self._owner is None or self._pid != os.getpid():
            return  # a forked child does not give up its parent's lock
        path = self.path
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        os.close(self._descriptor)
        self._owner, self._thread = None, None
        try:
            path.unlink(missing_ok=True)
        except BaseException:
            path.unlink(missing_ok=True)  # a signal interrupted it; further ones are ignored
            raise
        with contextlib.suppress(FileNotFoundError):
            fsync_directory(self.directory)

    def _held(self) -> Owner:
        if self._owner is None:
            raise RunDirectoryError(f"{self.directory}: the lock is not held")
        return self._owner

    def _judge(self, path: Path) -> bool:
        """True if the owner of the lock file `path` is dead or frozen, False if the file is gone.

        Waits up to `stale_seconds` for a heartbeat where that must decide. Raises RunDirectoryError
        if the owner lives.
        """
        content = _read(path)
        if content is None:
            return False
        owner = _parse(content, path)
        alive = is_alive(owner) if owner is not None else None
        if alive is False:
            logger.info("taking over %s: its owner is dead", path)
            return True
        if alive and owner is not None and _age(owner) < self._stale_seconds:
            if _goes_away(path):
                return False
            raise self._refusal(owner)
        # Also if this machine was suspended: a live owner's heartbeat is then old, but moves soon.
        deadline = time.monotonic() + self._stale_seconds
        while (remaining := deadline - time.monotonic()) > 0:
            if self._on_wait is not None:
                self._on_wait(remaining, _named(owner))
            time.sleep(min(1.0, remaining))
            now = _read(path)
            if now is None:
                return False
            if now != content:
                raise self._refusal(_parse(now, path) or owner)
        return True

    def _refusal(self, owner: Owner | None) -> RunDirectoryError:
        return RunDirectoryError(
            f"{self.directory}: in use by {_named(owner)}; wait for it, stop it, or use another "
            "--run-dir"
        )

    def _claim(self, dead: set[Path]) -> bool:
        """Create a lock file. If the others are all in `dead`, own the lock and return True."""
        owner = _this_process(secrets.token_hex(16))
        path = _lock_path(self.directory, owner.nonce)
        temporary = temporary_name(path)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.pwrite(descriptor, _encode(owner), 0)
            os.fsync(descriptor)
            os.rename(temporary, path)
            fsync_directory(self.directory)
            found = set(_lock_files(self.directory))
            won = path in found and found <= dead | {path}
            if won:
                for other in dead:
                    other.unlink(missing_ok=True)
                _remove_temporaries(self.directory, path)
                fsync_directory(self.directory)
        except FileNotFoundError:
            won = False  # another process took the lock and deleted the temporary file
        except BaseException:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            temporary.unlink(missing_ok=True)
            raise
        if not won:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return False
        self._owner, self._descriptor, self._pid = owner, descriptor, os.getpid()
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()
        return True

    def _beat(self) -> None:
        owner = self._held()
        while not self._stop.wait(self._heartbeat_seconds):
            try:
                # In place, through the descriptor: no effect if the file was deleted.
                os.pwrite(self._descriptor, _encode(replace(owner, heartbeat=time.time())), 0)
                os.fsync(self._descriptor)
            except OSError as error:
                logger.warning("heartbeat of %s failed: %s", self.directory, error)


def _lock_path(directory: Path, nonce: str) -> Path:
    return directory / f"lock-{nonce}.json"


def _lock_files(directory: Path) -> list[Path]:
    return listed(directory, "lock-*.json")


def require_owner(lock_file: str | None) -> None:
    """For workers, before they write: raise RunDirectoryError if their driver was displaced.

    lock_file: path of the driver's lock file; None if there is no lock. No data depends on this
    check, as a worker's files have unique names; it keeps late workers from leaving files behind.
    """
    if lock_file is not None and _read(Path(lock_file)) is None:
        raise RunDirectoryError(
            f"{Path(lock_file).parent}: another process took the run over; let that one go on"
        )


def _remove_temporaries(directory: Path, lock_file: Path) -> None:
    """Deletes the temporary files of former owners, and none of a later owner.

    They are listed first. If this process still owns the lock after that, all of them are older
    than any later owner. As no name is used twice, they can be deleted safely however late.
    """
    found = [path for path in files_below(directory) if is_temporary(path)]
    if lock_file.exists():
        for path in found:
            path.unlink(missing_ok=True)


def _named(owner: Owner | None) -> str:
    return owner.describe() if owner is not None else "a process whose lock cannot be read"


def _age(owner: Owner) -> float:
    """Seconds since the last heartbeat of an owner on this host; abs, as the clock may be reset."""
    return abs(time.time() - owner.heartbeat)


def _read(path: Path) -> bytes | None:
    """The bytes of a lock file; None if it is gone. b"" for a link or a pipe: unreadable.

    The file is opened anew each time, to see what other hosts wrote.
    """
    try:
        with open_regular_file(path) as file:
            return file.read(16 * _RECORD_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EINVAL):
            return b""
        raise


def _goes_away(path: Path) -> bool:
    """Whether a lock file is deleted soon: then it was a claim that its process gave up."""
    deadline = time.monotonic() + _CLAIM_SECONDS
    while time.monotonic() < deadline:
        if not path.exists():
            return True
        time.sleep(0.02)
    return False


def _encode(owner: Owner) -> bytes:
    path = Path("lock")
    text = encode_json({"schema_version": LOCK_SCHEMA, **asdict(owner)}, path)
    return text.ljust(_RECORD_BYTES - 1) + b"\n"


def _parse(content: bytes | None, path: Path) -> Owner | None:
    """The owner that a lock file names; None if the file is gone or unreadable."""
    if content is None:
        return None
    try:
        record = decode_json(content, path, LOCK_SCHEMA)
    except (CorruptFileError, RunDirectoryError):
        return None
    del record["schema_version"]
    try:
        owner = Owner(**record)
    except TypeError:
        return None
    valid = is_count(owner.pid) and 0 < owner.pid < 2**31 and _is_time(owner.heartbeat)
    return owner if valid else None


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < 2**36


def _this_process(nonce: str) -> Owner:
    pid = os.getpid()
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot_id = ""
    start = _process_start(pid) or ""
    return Owner(socket.gethostname(), pid, start, boot_id, namespace, nonce, time.time())


def _process_start(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; "dead" for a zombie; None if unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The command name, in parentheses, may contain anything; the state is the first field after it.
    fields = stat[stat.rindex(")") + 1 :].split()
    return "dead" if fields[0] in "ZXx" else fields[19]


def _boot_time() -> float:
    """Unix time at which this machine booted; 0 if unknown, so that no owner counts as dead."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) for line in lines if line.startswith("btime ")), 0.0)


STAMP_DIGITS = 12
"""Digits of the lock's nonce in the names of its owner's files."""
