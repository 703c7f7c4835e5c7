"""From submit to the first block on a warm cluster: where the seconds go.

    python benchmarks/startup.py MODEL --text wikitext2-valid.txt [--submit] [--runs 3]

Starts Ray on this machine once (its nodes are warm then, its workers are not), and begins a job on
it as often as asked, by `prox24 prune --ray-address` or with --submit by `ray job submit` from this
checkout (which needs `ray[default]`). Each job is stopped when its status names the first block.
Afterwards `ray stop` ends every Ray of this machine, so it refuses to run beside another.
"before the status": the interpreter, imports, the connection, and for a submitted job Ray's own
agent, upload and supervisor. The other parts are the job's own, from its status.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from storage.files.commit import read_json

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
os.environ["PATH"] = f"{BIN}:{os.environ['PATH']}"  # whose Python a submitted job runs
ADDRESS = "127.0.0.1:6399"
DASHBOARD = "127.0.0.1:8299"


@contextmanager
def cluster() -> Iterator[None]:
    """Ray with two CPUs on this machine, the only one here."""
    if any(process.info["name"] == "gcs_server" for process in psutil.process_iter(["name"])):
        sys.exit("a Ray runs on this machine already, and would be stopped with this one")
    dashboard = ["--include-dashboard=true", f"--dashboard-port={DASHBOARD.rpartition(':')[2]}"]
    port = ADDRESS.rpartition(":")[2]
    start = ["start", "--head", f"--port={port}", "--num-cpus=2"]
    log = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([BIN / "ray", "get-auth-token", "--generate"], check=True, **log)  # type: ignore[call-overload]
    subprocess.run([BIN / "ray", *start, *dashboard], check=True, **log)  # type: ignore[call-overload]
    try:
        yield
    finally:
        subprocess.run([BIN / "ray", "stop", "--force"], check=False, **log)  # type: ignore[call-overload]


def one(model: Path, text: Path, submit: bool) -> dict[str, float]:
    """Seconds of each part until the first block began, and of all."""
    with tempfile.TemporaryDirectory() as folder:
        output, status = Path(folder, "output"), Path(folder, "output.run", "status.json")
        prune = ["prune", model, output, "--dataset", text, "--ray-address", ADDRESS]
        prune += ["--workers", "2", "--threads", "1", "--nsamples", "16", "--seqlen", "512"]
        ours = ["-m", "cluster", *map(str, prune)]
        command: list[str | Path] = [sys.executable, *ours]
        if submit:
            job = ["job", "submit", "--address", f"http://{DASHBOARD}", "--working-dir", str(ROOT)]
            command = [BIN / "ray", *job, "--", "python", *ours]
        began = time.time()
        with Path(folder, "log").open("w", encoding="utf-8") as log:
            job_process = psutil.Popen(
                list(map(str, command)), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            while True:
                found = read_json(status, 1) if status.exists() else {}
                if found.get("block") is not None:
                    break
                if job_process.poll() is not None:
                    sys.exit(Path(folder, "log").read_text(encoding="utf-8")[-2000:])
                time.sleep(0.02)
            parts = {"before the status": found["started"] - began, **found["around_blocks"]}
            return parts | {"all": found["block_started"] - began}
        finally:
            drivers = [p for p in psutil.process_iter(["cmdline"]) if str(output) in command_of(p)]
            for process in drivers:
                process.send_signal(signal.SIGTERM)
            psutil.wait_procs([*drivers, job_process], timeout=60)


def command_of(process: psutil.Process) -> list[str]:
    """What a process was started with; of this one nothing."""
    return (process.info["cmdline"] or []) if process.pid != os.getpid() else []


def main() -> None:
    """Prints a line a job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--submit", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with cluster():
        for number in range(options.runs):
            parts = one(options.model.resolve(), options.text.resolve(), options.submit)
            said = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
            print(f"job {number + 1}: {said} s", flush=True)


if __name__ == "__main__":
    main()
