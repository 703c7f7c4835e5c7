"""The probes of a node. Each runs in a process of its own (`run_probe`) and returns JSON values.

    python -m pipeline.doctor.probes NAME '{"argument": ...}'

Nothing large is imported before a probe needs it: they are for nodes where that fails.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.doctor.run_probe import MARK
from pipeline.runtime.nvidia import driver_version

VERSIONS_OF = ("torch", "triton", "ray", "transformers", "safetensors", "numpy", "pyarrow", "numba")
"""Packages whose versions must be the same on all nodes."""

_CODE = ("storage", "pipeline", "actors", "cluster")
_DIGITS = 12
_SMI_SECONDS = 20.0


def versions() -> dict[str, Any]:
    """Versions of Python, of packages by their metadata, and of prox24: with a hash of its code."""
    from pipeline.version import VERSION

    found: dict[str, str] = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return {
        "versions": found | {"prox24": f"{VERSION} ({code_hash()})"},
        "executable": sys.executable,
        "system": platform.platform(),
    }


def code_hash() -> str:
    """The first digits of a SHA-256 of all Python files of prox24, wherever they lie."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for package in _CODE:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(path.read_bytes())
    return digest.hexdigest()[:_DIGITS]


def torch_build() -> dict[str, Any]:
    """torch's version and build, the CUDA devices that it sees, and why it sees none."""
    import torch

    found: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "devices": [],
        "error": None,
    }
    if torch.version.cuda is None and torch.version.hip is None:
        return found
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            capability = f"{properties.major}.{properties.minor}"
            found["devices"].append(
                {"name": properties.name, "capability": capability, "free": free, "total": total}
            )
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        found["error"] = " ".join(str(error).split())
    return found


def driver() -> dict[str, Any]:
    """NVIDIA's driver, the newest CUDA that it runs, and the GPUs that the system has.

    From nvidia-smi, and, where that is missing or fails, from what the kernel shows.
    """
    found: dict[str, Any] = {"cuda": None, "gpus": _device_files(), "error": None}
    found["version"] = driver_version()
    if shutil.which("nvidia-smi") is None:
        return found
    heading, error = _run("nvidia-smi")
    for name, pattern in (("version", "Driver Version"), ("cuda", "CUDA Version")):
        if match := re.search(rf"{pattern}: *([\d.]+)", heading):
            found[name] = match.group(1)
    if error is None:
        listed, error = _run("nvidia-smi", "-L")
        found["gpus"] = max(found["gpus"], len(re.findall(r"^GPU \d+:", listed, re.M)))
    found["error"] = error
    return found


def kernel() -> dict[str, Any]:
    """Whether Triton compiles and runs a kernel on the first GPU, and what it says if not."""
    import torch

    from pipeline.solvers.kernels.on_gpu import trial_launch
    from storage.errors import ResourceError

    began = time.monotonic()
    try:
        trial_launch(torch.device("cuda", 0))
    except ResourceError as error:
        return {"error": str(error)}
    return {"error": None, "seconds": time.monotonic() - began}


def space() -> dict[str, Any]:
    """Bytes free: of memory, /tmp, /dev/shm; and how many files a process may hold open."""
    from pipeline.runtime.free_memory import available_memory

    shared = Path("/dev/shm")
    return {
        "memory": available_memory(),
        "temporary": [tempfile.gettempdir(), shutil.disk_usage(tempfile.gettempdir()).free],
        "shared_memory": shutil.disk_usage(shared).free if shared.is_dir() else None,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "cores": len(os.sched_getaffinity(0)),
    }


def folder(path: str, mark: Mapping[str, str] | None, rank: int) -> dict[str, Any]:
    """Bytes free in a folder, whether a file can be written there, and what it does not share.

    mark: the driver's marker there, as `storage.run.shared_folders` has it, which is answered as
    `rank`; None: only this machine is asked.
    """
    from storage.run.shared_folders import Marked, SharedFolder, answer

    if not Path(path).is_dir():
        return {"problem": "no such folder"}
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"prox24")
    except OSError as error:
        return {"problem": f"cannot be written to ({error.strerror})"}
    found: dict[str, Any] = {"free": shutil.disk_usage(path).free, "problem": None}
    if mark is not None:
        shared = SharedFolder("the folder", path, mark["prefix"])
        problems = answer([Marked(shared, mark["place"], mark["word"])], rank)
        found["problem"] = "; ".join(problems) or None
    return found


def total(**arguments: Any) -> dict[str, Any]:
    """The sum over all workers, see `pipeline.doctor.sums`."""
    from pipeline.doctor.sums import sum_over_workers

    return sum_over_workers(**arguments)


PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    "versions": versions,
    "torch": torch_build,
    "driver": driver,
    "kernel": kernel,
    "space": space,
    "folder": folder,
    "sum": total,
}


def _device_files() -> int:
    """GPUs of which the system has a device file."""
    return sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in Path("/dev").iterdir())


def _run(*command: str) -> tuple[str, str | None]:
    """What a command prints, and why it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS)
    except subprocess.TimeoutExpired:
        return "", f"{command[0]} hangs: no answer in {_SMI_SECONDS:g} s"
    except OSError as error:
        return "", f"{command[0]}: {error.strerror}"
    said = " ".join((done.stderr or done.stdout).split())
    return done.stdout, f"{command[0]} fails: {said}" if done.returncode else None


if __name__ == "__main__":
    print(MARK + json.dumps(PROBES[sys.argv[1]](**json.loads(sys.argv[2]))), flush=True)
    os._exit(0)  # what a library does at its end may hang
