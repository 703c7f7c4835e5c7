"""What durability costs: the same job with hashing, fsync and records, and without, in turns.

    python benchmarks/overhead.py [--method METHOD] [--rounds N] [--model FOLDER]

Without means, in this process only: SHA-256 is a constant, fsync does nothing, and records are
kept in memory (an empty file tells that they exist). One thread, the local executor. Each round
runs both ways; compared are the shortest runs of each, since what else the machine does only ever
adds.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from storage.files.commit import make_directory
from tests.support.jobs import prune_here, write_text
from tests.support.tiny_models import save_tiny_model


class NoHash:
    """Stands in for a SHA-256."""

    def __init__(self, data: object = b"") -> None:
        pass

    def update(self, data: object) -> None:
        """Reads nothing."""

    def hexdigest(self) -> str:
        """The same for everything."""
        return "0" * 64


@contextlib.contextmanager
def without() -> Iterator[None]:
    """No hashing, no fsync, no records on disk."""
    records: dict[Path, dict[str, Any]] = {}

    def write(path: Path, payload: Mapping[str, Any], *, guard: object = None) -> None:
        make_directory(path.parent)
        path.touch()
        records[path] = dict(payload)

    def read(path: Path, schema: int) -> dict[str, Any]:
        return dict(records[path])

    def forget(*arguments: object, **options: object) -> None:
        pass

    instead = {
        "publish_json": write, "replace_json": write, "read_json": read, "write_status": forget,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        ours = [name for name in sys.modules if name.startswith(("storage.", "pipeline."))]
        for module in map(sys.modules.__getitem__, ours):
            for name, function in instead.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, function))
        stack.enter_context(mock.patch.object(hashlib, "sha256", NoHash))
        stack.enter_context(mock.patch.object(os, "fsync", forget))
        yield


@contextlib.contextmanager
def counted(waits: list[float]) -> Iterator[None]:
    """As it is; the wall seconds of each fsync go to `waits`."""
    fsync = os.fsync

    def wrapped(descriptor: int) -> None:
        began = time.perf_counter()
        fsync(descriptor)
        waits.append(time.perf_counter() - began)

    with mock.patch.object(os, "fsync", wrapped):
        yield


def timed(model: Path, text: Path, options: dict[str, Any]) -> tuple[float, float]:
    """Wall and processor seconds of one job, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        wall, processor = time.perf_counter(), time.process_time()
        prune_here(model, Path(folder, "output"), dataset=str(text), **options)
        return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    """Prints every round, and the ratios of the shortest."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", default="prox_admm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or save_tiny_model(
            Path(folder, "model"), blocks=options.blocks, hidden=512, intermediate=1536,
            positions=options.seqlen,
        )  # fmt: skip
        text = write_text(Path(folder, "text.txt"), 8 * options.nsamples * options.seqlen)
        job = {
            "method": options.method, "nsamples": options.nsamples, "seqlen": options.seqlen,
            "batch_size": 4,
        }  # fmt: skip
        timed(model, text, job | {"nsamples": 4})  # what is loaded once is loaded now
        runs: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
        for number in range(options.rounds):
            for kind in sorted(runs, reverse=bool(number % 2)):
                waits: list[float] = []
                with without() if kind == "without" else counted(waits):
                    runs[kind].append(timed(model, text, job))
                wall, processor = runs[kind][-1]
                print(
                    f"{kind:<8} wall {wall:.2f} s, processor {processor:.2f} s; "
                    f"{len(waits)} fsyncs in {sum(waits):.2f} s",
                    flush=True,
                )
    for index, what in enumerate(("wall", "processor")):
        best = {kind: min(run[index] for run in found) for kind, found in runs.items()}
        ratio = best["with"] / best["without"]
        print(f"{what}: {best['with']:.2f} / {best['without']:.2f} = {ratio:.4f}")


if __name__ == "__main__":
    main()
