"""What tests of whole jobs share: small jobs run in process, and what their output must be."""

from __future__ import annotations

import json
import random
import string
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.config.prune import PruneConfig
from pipeline.loop.rank import Call
from pipeline.messages import Outcome
from pipeline.prune import PruneResult, prune
from pipeline.records.tokens import CutTokens, cut_tokens
from pipeline.runtime.progress import Silent
from pipeline.worker.local_executor import LocalExecutor
from storage.object_store import Place

# Small enough for seconds, with two activation shards at least.
# A report takes longer than all the rest: tests of reports ask for one.
# Most tests are of the solve, whose weights a reconstruction would change.
SMALL: dict[str, Any] = {
    "nsamples": 8, "seqlen": 32, "batch_size": 2, "threads": 1, "no_report": True,
    "reconstruct": "none",
}  # fmt: skip


def write_text(path: Path, characters: int = 8192, seed: int = 0) -> Path:
    """A text of random letters and spaces; each is one token of the tiny models."""
    alphabet = string.ascii_letters + "     "
    text = "".join(random.Random(seed).choices(alphabet, k=characters))
    path.write_text(text, encoding="utf-8")
    return path


def prune_here(
    model: Place,
    output: Place,
    *,
    executor: LocalExecutor | None = None,
    cut: CutTokens = cut_tokens,
    progress: Silent | None = None,
    **options: Any,
) -> PruneResult:
    """A job on the local executor in this process; `options` are those of `PruneConfig`."""
    if "dataset" not in options and isinstance(output, Path):
        options["dataset"] = str(write_text(output.parent / "text.txt"))
    options = SMALL | options
    config = PruneConfig(executor="local", **options)
    world = config.workers or 1

    def make() -> LocalExecutor:
        return executor or LocalExecutor(world, config.threads or 1)

    return prune(model, output, config, make, progress or Silent(), cut=cut)


class Interrupted(Exception):
    """Stands for a kill between two phases."""


class StopsAt(LocalExecutor):
    """Ends the job before the given number of a phase's calls."""

    def __init__(self, world: int, phase: str, calls: int) -> None:
        super().__init__(world, 1)
        self._phase, self._left = phase, calls

    def run(self, calls: Sequence[Call[Any]]) -> list[Outcome[Any]]:
        if calls[0].phase == self._phase:
            self._left -= 1
            if self._left < 0:
                raise Interrupted
        return super().run(calls)


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file below `folder`."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model folder, read by safetensors alone."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                yield name, file.get_tensor(name)


def header(path: Path) -> Any:
    """The JSON header of a safetensors file: names, dtypes, shapes, offsets, metadata."""
    with path.open("rb") as file:
        return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))


def fits(weight: Tensor, keep: int, group: int) -> bool:
    """Whether no `group` consecutive entries of a row hold more than `keep` non-zeros."""
    return int((weight != 0).reshape(-1, group).sum(dim=1).max()) <= keep


def is_linear_of_a_block(name: str) -> bool:
    """By the names that the four tiny families give their linears."""
    layers = ("proj.weight", "fc1.weight", "fc2.weight")
    return ".layers." in name and name.endswith(layers)


def check_output(source: Path, output: Path, keep: int = 2, group: int = 4) -> None:
    """The pruned model has the source's layout; linears fit the pattern, all else is the same."""
    assert {p.name for p in output.iterdir()} == {p.name for p in source.iterdir()} | {
        "README.md",
        "prox24.json",
    }
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            assert header(output / path.name) == header(path)
        elif path.name != "README.md":
            assert (output / path.name).read_bytes() == path.read_bytes()
    before = dict(tensors(source))
    pruned = 0
    for name, tensor in tensors(output):
        if is_linear_of_a_block(name):
            pruned += 1
            assert fits(tensor, keep, group), name
            assert not torch.equal(tensor, before[name])
            # No more is pruned than the pattern asks for, but where an input is never above 0.
            if not name.endswith("fc2.weight"):
                assert (tensor != 0).float().mean() > 0.98 * keep / group
        else:
            assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    assert pruned > 0
