"""What this machine has free: host memory, seen through the control group's limit."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def available_memory(cgroup: Path = _CGROUP) -> float:
    """Bytes that processes may still take without swapping; the lower of machine and container."""
    free = float(psutil.virtual_memory().available)
    limit = _container_free(cgroup)
    return free if limit is None else min(free, limit)


def _container_free(cgroup: Path) -> float | None:
    """What a container's limit leaves, file cache counted as free; None where there is none."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = (cgroup / limit).read_text().strip()
            now = int((cgroup / used).read_text())
            stat = (cgroup / limit).with_name("memory.stat").read_text()
            # Without a limit version 2 says `max`, version 1 a number beyond any machine.
            if most == "max" or int(most) >= 1 << 60:
                return None
        except (OSError, ValueError):
            continue
        freeable = [int(line.split()[1]) for line in stat.splitlines() if line.split()[0] == cache]
        return float(int(most) - now + sum(freeable))
    return None
