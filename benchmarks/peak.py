"""A command's time, and the peak memory of all processes it starts, wherever they detach to."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_MARK = "PROX24_BENCHMARK"


@dataclass
class Peak:
    """Seconds of a command, and bytes at the moment when all its processes together held most.

    bytes: proportional set sizes without pages that files back (smaps_rollup: Pss_Anon and
    Pss_Shmem), summed over the processes. by_name: the same by process name at that moment.
    single: the largest that one process ever held.
    """

    seconds: float = 0.0
    bytes: int = 0
    single: int = 0
    by_name: dict[str, int] = field(default_factory=dict)


def run(
    command: Sequence[str],
    *,
    log: Path,
    environment: dict[str, str] | None = None,
    interval: float | None = 0.25,
) -> Peak:
    """Runs a command to its end, looking at its memory every `interval` seconds, or never.

    A look takes milliseconds of a core for every process, which shows in a time to be compared.
    Raises `CalledProcessError` where the command fails; its output is in `log`.
    """
    mark = uuid.uuid4().hex
    own = dict(os.environ, **(environment or {}), **{_MARK: mark})
    peak, over = Peak(), threading.Event()
    watcher = threading.Thread(target=_watch, args=(mark, peak, over, interval))
    with log.open("wb") as output:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=own)
        if interval is not None:
            watcher.start()
        status = process.wait()
        peak.seconds = time.monotonic() - began
    over.set()
    if interval is not None:
        watcher.join()
    if status:
        tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise subprocess.CalledProcessError(status, list(command), output=tail)
    return peak


def _watch(mark: str, peak: Peak, over: threading.Event, interval: float) -> None:
    known: dict[int, bool] = {}
    while not over.wait(interval):
        sizes: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            pid = int(entry.name)
            with contextlib.suppress(OSError):
                if pid not in known:
                    known[pid] = mark.encode() in (entry / "environ").read_bytes()
                if known[pid]:
                    sizes[pid] = _private(entry)
        total = sum(sizes.values())
        peak.single = max([peak.single, *sizes.values()])
        if total > peak.bytes:
            peak.bytes, peak.by_name = total, {}
            for pid, size in sizes.items():
                with contextlib.suppress(OSError):
                    name = (Path("/proc") / str(pid) / "comm").read_text().strip()
                    peak.by_name[name] = peak.by_name.get(name, 0) + size


def _private(entry: Path) -> int:
    wanted = ("Pss_Anon:", "Pss_Shmem:")
    lines = (entry / "smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(wanted))
