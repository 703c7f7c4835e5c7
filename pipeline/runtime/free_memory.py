"""Free host memory of this machine, with the limit of its control group (container)."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def available_memory(cgroup: Path = _CGROUP) -> float:
    """Bytes that processes can allocate without swapping: the lower of machine and container."""
    free = float(psutil.virtual_memory().available)
    limit = _container_free(cgroup)
    return free if limit is None else min(free, limit)


def _container_free(cgroup: Path) -> float | None:
    """Free bytes below the limit of the container, with its file cache; None without a limit."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = (cgroup / limit).read_text().strip()
            now = int((cgroup / used).read_text())
            stat = (cgroup / limit).with_name("memory.stat").read_text()
            # No limit: version 2 of control groups has `max`, version 1 a huge number.
            if most == "max" or int(most) >= 1 << 60:
                return None
        except (OSError, ValueError):
            continue
        freeable = [int(line.split()[1]) for line in stat.splitlines() if line.split()[0] == cache]
        return float(int(most) - now + sum(freeable))
    return None
