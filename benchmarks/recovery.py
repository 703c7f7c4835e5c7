"""From a worker's death to work going on: a Ray job whose workers are killed, timed by its trace.

    python benchmarks/recovery.py [--kills 3] [--model FOLDER]

Each time one of two workers gets SIGKILL in the middle of a phase. Printed are the seconds until
the driver has begun to replace it (the loss was noticed and the other rank's end awaited), until
all ranks are joined again, and until a rank has finished its first piece of work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from tests.support.jobs import write_text
from tests.support.tiny_models import save_tiny_model

ROOT = Path(__file__).resolve().parent.parent


def spans(trace: Path) -> list[dict[str, Any]]:
    """The trace's events so far."""
    lines = trace.read_text(encoding="utf-8").splitlines()[1:] if trace.exists() else []
    found = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line.rstrip(",")))
    return [event for event in found if event.get("ph") == "X"]


def ranks(driver: psutil.Process) -> list[psutil.Process]:
    """The driver's workers that have joined, by what Ray calls their processes."""
    found = []
    for process in driver.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RankActor" in "".join(process.cmdline()[:1]):
                found.append(process)
    return found


def after(trace: Path, moment: float, names: tuple[str, ...], driver: bool) -> float:
    """Waits for the first span of these names that ends after `moment`; its end."""
    while True:
        for event in spans(trace):
            end = (event["ts"] + event["dur"]) / 1e6
            if event["name"] in names and (event["pid"] == 0) == driver and end > moment:
                return end
        time.sleep(0.2)


def main() -> None:
    """Prints one line a kill."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    phases = ("advance", "calibrate", "solve", "reduce")
    with tempfile.TemporaryDirectory() as folder:
        trace, text = Path(folder, "trace.json"), write_text(Path(folder, "text.txt"), 1 << 18)
        model = options.model or save_tiny_model(
            Path(folder, "model"), blocks=12, hidden=512, intermediate=1536, positions=512
        )
        command = [
            *(sys.executable, "-m", "cluster", "prune", str(model), str(Path(folder, "output"))),
            *("--dataset", str(text), "--nsamples", "64", "--seqlen", "512", "--workers", "2"),
            *("--threads", "1", "--trace", str(trace), "--max-attempts", "9"),
        ]
        log = Path(folder, "log")
        with log.open("w", encoding="utf-8") as output:
            driver = psutil.Popen(
                command, cwd=folder, stdout=output, stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        moment = time.time()
        for number in range(options.kills):
            after(trace, moment, phases, driver=True)
            time.sleep(random.Random(number).uniform(0.5, 1.5))
            victim = ranks(driver)[number % 2]
            victim.send_signal(signal.SIGKILL)
            moment = time.time()
            joined = after(trace, moment, ("recover",), driver=True)
            began = next(
                e["ts"] / 1e6
                for e in spans(trace)
                if e["name"] == "recover" and e["ts"] / 1e6 > moment
            )
            working = after(trace, joined, phases, driver=False)
            print(
                f"kill {number + 1}: noticed after {began - moment:.1f} s, joined again after "
                f"{joined - moment:.1f} s, first work done after {working - moment:.1f} s",
                flush=True,
            )
            moment = time.time()
        status = driver.wait()
        print(f"the job ended with status {status}")
        if status:
            print(log.read_text(encoding="utf-8")[-2000:])


if __name__ == "__main__":
    main()
