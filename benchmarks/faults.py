"""Kills a tiny job at each of its commit points, resumes it, and counts what comes out.

    python benchmarks/faults.py [--signal SIGKILL|SIGTERM|SIGINT|SIGSTOP] [--every N]

A point counts as byte-identical if, after the signal, everything that is committed is whole, and
the same command then ends with the bytes, and the files, of a job that nothing disturbed. With
SIGSTOP the job is frozen, replaced by a second driver, and woken when that one is done. All are
jobs of two blocks, two ranks and two weight files on the local executor, in processes of their own.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.job.test_frozen import replaced_and_woken
from tests.support.kill_matrix import Matrix, fast_folder, kill_and_resume


def main() -> None:
    """Tries the points, two at a time, and prints the failures and the count."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--signal", default="SIGKILL")
    parser.add_argument("--every", type=int, default=1, help="try each N-th point only")
    options = parser.parse_args()
    number = signal.Signals[options.signal]
    with tempfile.TemporaryDirectory(dir=fast_folder()) as folder:
        matrix = Matrix(Path(folder))

        def identical(at: int) -> bool:
            try:
                if number == signal.SIGSTOP:
                    replaced_and_woken(matrix, at)
                else:
                    kill_and_resume(matrix, at, number)
            except AssertionError as error:
                print(f"point {at} ({matrix.points[at]}): {error}", flush=True)
                return False
            return True

        began = time.perf_counter()
        tried = range(0, len(matrix.points), options.every)
        with ThreadPoolExecutor(2) as pool:
            good = sum(pool.map(identical, tried))
        print(
            f"{number.name}: {len(tried)} of {len(matrix.points)} points tried, {good} "
            f"byte-identical, {time.perf_counter() - began:.0f} s"
        )


if __name__ == "__main__":
    main()
