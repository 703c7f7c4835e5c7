"""NVIDIA's driver, as the kernel shows it. Imports nothing large."""

from __future__ import annotations

import re
from pathlib import Path

DRIVER_FILE = Path("/proc/driver/nvidia/version")


def driver_version() -> str | None:
    """The version of the driver of this machine; None without one, or where it is not told."""
    try:
        text = DRIVER_FILE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    version = re.search(r"Kernel Module[^\d]*(\d+\.[\d.]+)", text)
    return version[1] if version else None
