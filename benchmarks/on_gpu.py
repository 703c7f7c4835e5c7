"""All that waits for a GPU, in ten minutes and one file: for whoever has one for a quarter hour.

Doctor, the tests marked `cuda`, a whole job with a kill and a resume (`gpu_job.py`), the plan of
that job against what was measured, and wide solves (`gpu_solve.py`). It needs torch, transformers,
accelerate, safetensors, pyarrow and what prox24's command line imports, but neither Ray nor
datasets, and downloads nothing. Each part has a limit of its own, and what fails or is missing is
written down; the file is written after every part.

    python benchmarks/on_gpu.py --file on_gpu.json
    python benchmarks/on_gpu.py --file on_gpu.json --tiny      # on a CPU, to try the script
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

_TAIL = 4000
_METHOD = "prox_admm"


@dataclass(frozen=True)
class Sizes:
    """How large the parts are. cuda: whether they run on a GPU. seconds: the limits of parts."""

    cuda: bool
    job: dict[str, int]
    shapes: tuple[str, ...]
    seconds: dict[str, float]

    @property
    def device(self) -> str:
        """The device of all parts."""
        return "cuda" if self.cuda else "cpu"


LARGE = Sizes(
    cuda=True,
    job={"hidden": 4096, "intermediate": 14336, "blocks": 4, "nsamples": 64, "seqlen": 2048},
    shapes=("8192x8192", "8192x28672"),
    seconds={"doctor": 90, "tests": 150, "job": 210, "plan": 30, "solve": 120},
)
TINY = Sizes(
    cuda=False,
    job={"hidden": 128, "intermediate": 192, "blocks": 3, "nsamples": 4, "seqlen": 64},
    shapes=("64x128",),
    seconds={"doctor": 120, "tests": 120, "job": 240, "plan": 60, "solve": 120},
)


def main() -> int:
    """Runs the parts; 0 if all succeeded, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--file", type=Path, required=True, help="where the results are written")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on the CPU")
    parser.add_argument("--minutes", type=float, default=10.0, help="the most that all parts take")
    parser.add_argument(
        "--parts", default="doctor,tests,job,plan,solve", help="which, with commas between"
    )
    options = parser.parse_args()
    sizes = TINY if options.tiny else LARGE
    end = time.monotonic() + 60 * options.minutes
    results: dict[str, Any] = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "sizes": vars(sizes)}
    with tempfile.TemporaryDirectory(prefix="prox24-on-gpu-") as folder:
        for name in options.parts.split(","):
            left = min(sizes.seconds[name], end - time.monotonic())
            print(f"{name}: at most {max(left, 0):.0f} s", file=sys.stderr, flush=True)
            began = time.monotonic()
            part = PARTS[name](sizes, Path(folder), left, results) if left > 1 else _late()
            results[name] = {"seconds": round(time.monotonic() - began, 1), **part}
            print(f"{name}: {summary(results[name])}", file=sys.stderr, flush=True)
            options.file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0 if all(results[name]["ok"] for name in options.parts.split(",")) else 1


def summary(part: Mapping[str, Any]) -> str:
    """One line: whether it succeeded, and its last words if not."""
    if part["ok"]:
        return f"ok in {part['seconds']} s"
    said = str(part.get("log", "")).strip().splitlines() or ["nothing was said"]
    return f"FAILED after {part['seconds']} s: {said[-1]}"


def _late() -> dict[str, Any]:
    return {"ok": False, "log": "no time was left for it (--minutes)"}


@dataclass(frozen=True)
class _Ran:
    """A command that has ended, or was ended. status: its exit status; None if it was killed."""

    status: int | None
    output: str
    log: str

    def part(self, good: Sequence[int] = (0,)) -> dict[str, Any]:
        """Whether it succeeded, and the end of its log."""
        return {"ok": self.status in good, "status": self.status, "log": self.log[-_TAIL:]}


def _run(command: Sequence[str], seconds: float) -> _Ran:
    """Runs a command of the repository with this Python, and kills all of it after `seconds`."""
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "RAY_ADDRESS": "",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=REPOSITORY, env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        return _Ran(None, output, f"{errors}\nkilled after {seconds:.0f} s")
    return _Ran(process.returncode, output, errors or output)


def doctor(
    sizes: Sizes, folder: Path, seconds: float, results: Mapping[str, Any]
) -> dict[str, Any]:
    """`prox24 doctor` on this machine: driver, torch, Triton's trial launch, NCCL alone."""
    arguments = ["--executor", "local", "--json", "--folder", str(folder)]
    ran = _run(["-m", "cluster", "doctor", *arguments], seconds)
    part = ran.part()
    with contextlib.suppress(ValueError):
        part["doctor"] = json.loads(ran.output)
        wrong = [f for f in part["doctor"]["findings"] if f["state"] == "wrong"]
        part["log"] = "; ".join(f"{f['check']}: {f['found']}" for f in wrong) or part["log"]
    return part


def tests(sizes: Sizes, folder: Path, seconds: float, results: Mapping[str, Any]) -> dict[str, Any]:
    """The tests marked `cuda`; only their files are imported, for others need Ray."""
    marked = [
        str(path.relative_to(REPOSITORY))
        for path in sorted((REPOSITORY / "tests").rglob("test_*.py"))
        if "mark.cuda" in path.read_text(encoding="utf-8")
    ]
    options = ["-q", "-rfE", "-m", "cuda", "-p", "no:cacheprovider"]
    ran = _run(["-m", "pytest", *options, "--continue-on-collection-errors", *marked], seconds)
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)", ran.output)
    part = ran.part() | {"files": marked, "counts": {what: int(n) for n, what in counts}}
    if not part["ok"]:
        part["log"] = (ran.output + ran.log)[-_TAIL:]
    elif sizes.cuda and "passed" not in part["counts"]:
        part |= {"ok": False, "log": "no test ran: torch sees no GPU"}
    return part


def job(sizes: Sizes, folder: Path, seconds: float, results: Mapping[str, Any]) -> dict[str, Any]:
    """`gpu_job.py`: uninterrupted, and killed and resumed; the bytes must be the same."""
    options = [word for name, size in sizes.job.items() for word in (f"--{name}", str(size))]
    command = ["benchmarks/gpu_job.py", f"--folder={folder / 'job'}", f"--method={_METHOD}"]
    ran = _run([*command, "--device", sizes.device, *options], seconds)
    part = ran.part()
    if part["ok"]:
        start = ran.output.rindex("{\n", 0, ran.output.index('"same_bytes_after_kill"'))
        part["job"] = json.loads(ran.output[start:])
        part["ok"] = part["job"]["same_bytes_after_kill"]
        if not part["ok"]:
            part["log"] = "the resumed job wrote other bytes"
    return part


def plan(sizes: Sizes, folder: Path, seconds: float, results: Mapping[str, Any]) -> dict[str, Any]:
    """`prox24 plan` of that job, and its phases against the job's, in seconds and bytes."""
    whole = folder / "job" / "whole.run" / "report" / "summary.json"
    if not whole.exists():
        return {"ok": False, "log": "there is no finished job to compare with"}
    where = ["--gpus", "1", "--gpu", gpu_kind(results)] if sizes.cuda else ["--threads", "1"]
    command = ["-m", "cluster", "plan", str(folder / "job" / "model"), "--executor", "local"]
    options = ["--nsamples", str(sizes.job["nsamples"]), "--seqlen", str(sizes.job["seqlen"])]
    ran = _run([*command, "--json", "--method", _METHOD, *options, *where], seconds)
    part = ran.part(good=(0, 3))
    if part["ok"]:
        planned = json.loads(ran.output)
        part["gpu"] = gpu_kind(results) if sizes.cuda else None
        part["rates"] = planned["machine"]["rates"]
        part["phases"] = planned_and_measured(planned, json.loads(whole.read_text()))
    return part


def planned_and_measured(
    planned: Mapping[str, Any], measured: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """For each phase of the blocks: seconds and peak bytes, planned and measured, and the ratio.

    planned: as `prox24 plan --json` prints it. measured: a job's summary.json.
    """
    found: dict[str, dict[str, Any]] = {}
    for block in measured["blocks"]:
        for name, phase in block["phases"].items():
            own = found.setdefault(name, {"measured_seconds": 0.0, "measured_device_bytes": 0})
            own["measured_seconds"] += phase["seconds"]
            peak = max(own["measured_device_bytes"], phase["device_bytes"])
            own["measured_device_bytes"] = peak
    for name, phase in planned["phases"].items():
        own = found.setdefault(name, {})
        own |= {
            "planned_seconds": phase["seconds"],
            "planned_device_bytes": phase.get("device_bytes"),
        }
        if own.get("measured_seconds"):
            own["planned_over_measured"] = phase["seconds"] / own["measured_seconds"]
    return found


def gpu_kind(results: Mapping[str, Any]) -> str:
    """The data sheet of the GPU that doctor has seen; of an H100 for one that has none."""
    from pipeline.planning.rates import GPUS

    try:
        build = results["doctor"]["doctor"]["nodes"][0]["answers"]["torch"]["value"]
        name = build["devices"][0]["name"].lower()
    except (KeyError, IndexError, TypeError):
        return "H100"
    fits = [kind for kind in GPUS if all(part in name for part in kind.lower().split("-"))]
    return max(fits, key=len, default="H100")


def solve(sizes: Sizes, folder: Path, seconds: float, results: Mapping[str, Any]) -> dict[str, Any]:
    """`gpu_solve.py`: wide layers, with and without TF32; what was measured until the limit."""
    ran = _run(
        ["benchmarks/gpu_solve.py", "--device", sizes.device, "--shapes", *sizes.shapes], seconds
    )
    part = ran.part()
    lines = []
    for line in ran.output.splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return part | {"solves": lines[1:]}


Part = Callable[[Sizes, Path, float, Mapping[str, Any]], dict[str, Any]]
PARTS: dict[str, Part] = {
    "doctor": doctor,
    "tests": tests,
    "job": job,
    "plan": plan,
    "solve": solve,
}


if __name__ == "__main__":
    sys.exit(main())
