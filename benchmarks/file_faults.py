"""Puts every fault on every file and folder that a command touches, and counts what it answers.

    python benchmarks/file_faults.py [SCENE ...] [--show]

SCENE: names of `tests.support.file_scenes.SCENES`; all without any. `--show` prints each answer. A
case is right if the command ends with exit code 2 and one line that names the file and a remedy,
and the same command without the fault then ends as an undisturbed one; or if it ends so at once,
since the file does not matter, or is made again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.file_scenes import SCENES
from tests.support.kill_matrix import fast_folder


def main() -> None:
    """Plays the scenes, and prints a line for each, and for each case that is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("scenes", nargs="*", metavar="SCENE")
    parser.add_argument("--show", action="store_true", help="print each answer")
    options = parser.parse_args()
    for name in options.scenes or SCENES:
        with tempfile.TemporaryDirectory(dir=fast_folder()) as folder:
            began, scene = time.perf_counter(), SCENES[name](Path(folder))
            cases = scene.cases()
            refused = wrong = 0
            for case in cases:
                problem = scene.problem(case)
                answer = (scene.said.splitlines() or [""])[-1].replace(folder, "")
                refused += answer.startswith("prox24: ")
                if problem is not None:
                    wrong += 1
                    print(f"WRONG {case}: {problem.replace(folder, '')}", flush=True)
                elif options.show and answer.startswith("prox24: "):
                    print(f"  {case}: {answer}")
            print(
                f"{name}: {len({case.path for case in cases})} files and folders, {len(cases)} "
                f"cases: {refused} refused in one line, {len(cases) - refused} done all the same; "
                f"{wrong} wrong; {time.perf_counter() - began:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
