"""What one pass over a block's inputs, and each overlap of disk and compute, is worth.

The same job with all of them, and without each:

    python benchmarks/overlap.py [--hidden 64] [--rounds 3]

One rank of one thread, the local executor, wanda, on a machine with a core to spare. The model is
narrow on purpose: the time of a forward pass grows with the width for each byte of activations,
so that narrow blocks on a CPU stand for wide ones on a GPU, where the disk is what holds up.
"Without" replaces, in this process only, the threads behind by a call that is waited for. Compared
are the shortest runs of each.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from pipeline.runtime.background import Background, Behind
from pipeline.worker.block_loader import BlockLoader
from pipeline.worker.block_worker import Advanced, BlockWorker
from tests.support.jobs import prune_here, write_text
from tests.support.tiny_models import save_tiny_model


def in_turn(
    _: Background, function: Callable[[Any], Any], items: Iterable[Any], depth: int = 1
) -> Iterator[Any]:
    """`Background.ahead`, not ahead."""
    return map(function, items)


def at_once(_: Behind, function: Callable[[], None]) -> None:
    """`Behind.add`, waited for."""
    function()


def later(_: BlockLoader, block: int) -> None:
    """`BlockLoader.ahead`, left to the time of use."""


def two_passes(
    self: BlockWorker, block: int, record: Any, shards: Any, stamp: str, limit: float | None = None
) -> Advanced:
    """`BlockWorker.advance` of one rank: the store is written, then read."""
    written = self.propagate(block, record, shards, stamp)
    return Advanced(written, self.calibrate(block + 1, written, limit))


WITHOUT: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "read ahead": (Background, "ahead", in_turn),
    "write behind": (Behind, "add", at_once),
    "next block's weights": (BlockLoader, "ahead", later),
    "one pass": (BlockWorker, "advance", two_passes),
}


def main() -> None:
    """Prints the shortest time of each way, and its ratio to the one with all overlaps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--nsamples", type=int, default=8192)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways = {"all": (), **{f"without {name}": (name,) for name in WITHOUT}}
    ways["without any"] = tuple(WITHOUT)
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_model(
            Path(folder, "model"), blocks=options.blocks, hidden=options.hidden,
            intermediate=2 * options.hidden, positions=options.seqlen,
        )  # fmt: skip
        text = write_text(Path(folder, "text.txt"), 8 * options.nsamples * options.seqlen)
        for number in range(options.rounds + 1):
            for way, names in ways.items():
                with contextlib.ExitStack() as stack:
                    for owner, attribute, function in (WITHOUT[name] for name in names):
                        stack.enter_context(mock.patch.object(owner, attribute, function))
                    output = Path(stack.enter_context(tempfile.TemporaryDirectory()), "output")
                    began = time.perf_counter()
                    prune_here(
                        model, output, dataset=str(text), method="wanda", batch_size=64,
                        nsamples=options.nsamples if number else 64, seqlen=options.seqlen,
                    )  # fmt: skip
                    seconds = time.perf_counter() - began
                if number:  # the first round, a short one, loads what is loaded once
                    best[way] = min(seconds, best.get(way, seconds))
    for way, seconds in best.items():
        print(f"{way:<30} {seconds:6.2f} s  {seconds / best['all']:.3f}")


if __name__ == "__main__":
    main()
