"""The reconstruction of a solved block: epoch by epoch, until the held-out loss stops falling."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from pipeline.config.reconstruct import Reconstruct
from pipeline.loop.executor import Executor
from pipeline.loop.rank import Call, Rank, call
from pipeline.messages import Observed, Outcome, TrainedRows
from pipeline.reconstruct.schedule import goes_on
from pipeline.records.times import PhaseTimes
from pipeline.runtime.progress import Progress
from pipeline.solvers.mask_counts import merge_mask_counts
from storage.files.hashing import StoredFile
from storage.run.checkpoints import BlockRecord, LayerRecord, LayerSlice

T = TypeVar("T")


class Steps(Protocol):
    """What a reconstruction needs of `pipeline.loop.block_steps.BlockSteps`."""

    executor: Executor
    progress: Progress
    attempts: int

    def inputs(
        self, block: int, *, observe: bool = False
    ) -> tuple[list[StoredFile], Observed | None]:
        """The shards of a block's inputs."""
        ...

    def targets(self, block: int, times: dict[str, PhaseTimes]) -> list[StoredFile]:
        """The shards of the targets of its outputs."""
        ...

    def timed(self, times: dict[str, PhaseTimes], phase: Call[T]) -> list[Outcome[T]]:
        """Runs a phase on every rank."""
        ...

    def stamp(self) -> str:
        """A part of the names of new files."""
        ...


def reconstruct(
    steps: Steps, how: Reconstruct, solved: BlockRecord, failures: Sequence[str]
) -> BlockRecord:
    """Trains the block that `solved` records; the record of what is best on held-out sequences.

    That may be the solved block itself: where no epoch lowers their loss, or a loss is not finite.
    """
    began, block = time.perf_counter(), solved.block
    times: dict[str, PhaseTimes] = {}
    shards, _ = steps.inputs(block)
    targets = steps.targets(block, times)
    steps.progress.phase("reconstruct", block)
    begin = call(Rank.begin_training, block, solved, shards, targets)
    parts = [
        _train_part(steps, how, (block, part), times)
        for part in range(steps.timed(times, begin)[0].value)
    ]
    outcomes = steps.timed(times, call(Rank.end_training, block, steps.stamp()))
    trained = [outcome.value for outcome in outcomes]
    lower = any(part["kept"] != "solved" for part in parts)
    record = with_rows(solved, trained) if lower else solved
    earlier = solved.results
    results = {
        **record.results,
        "phases": earlier["phases"] | {name: phase.to_json() for name, phase in times.items()},
        "seconds": earlier["seconds"] + time.perf_counter() - began,
        "solve_workers": earlier["workers"],  # a resumed job may have others now
        "workers": steps.executor.workers(),
        "failures": list(dict.fromkeys([*earlier["failures"], *failures])),
        "reconstruct": together(parts)
        | {"untrained": untrained(solved, trained), "norms": len(record.norms)},
    }
    return dataclasses.replace(
        record, attempt=steps.attempts, world=steps.executor.world, results=results
    )


def _train_part(
    steps: Steps, how: Reconstruct, which: tuple[int, int], times: dict[str, PhaseTimes]
) -> dict[str, Any]:
    """Trains a part of a block, which is (block, part); what a record says of it."""
    block, part = which
    losses = [steps.timed(times, call(Rank.begin_part, block, part))[0].value]
    learned: list[float] = []
    varying: set[str] = set()
    for epoch in range(how.epochs):
        if not goes_on(losses, how.epochs):
            break
        steps.progress.phase(f"reconstruct {epoch + 1}/{how.epochs}", block)
        outcomes = steps.timed(times, call(Rank.train, block, epoch))
        varying.update(name for outcome in outcomes for name in outcome.value.varying)
        trained = outcomes[0].value
        learned.append(trained.learned)
        losses.append(trained.held_out)
    steps.timed(times, call(Rank.end_part, block))
    return in_words(losses, learned) | {"varying": sorted(varying)}


def in_words(losses: Sequence[float], learned: Sequence[float]) -> dict[str, Any]:
    """What a record says of a reconstruction, as JSON.

    losses: of the held-out sequences, before the first epoch and after each. learned: of the others
    during each epoch. `before`, `after`: of the held-out ones, before the first epoch and of what
    is kept; `kept`: after which epoch that was, or "solved". `finite`: whether all losses were;
    those that were not are left out.
    """
    finite = [(loss, number) for number, loss in enumerate(losses) if math.isfinite(loss)]
    best, number = min(finite, default=(None, 0), key=lambda item: (item[0], -item[1]))
    return {
        "before": losses[0] if math.isfinite(losses[0]) else None,
        "after": best,
        "kept": number or "solved",
        "epochs": len(learned),
        "held_out": [loss for loss in losses if math.isfinite(loss)],
        "learned": [loss for loss in learned if math.isfinite(loss)],
        "finite": all(map(math.isfinite, [*losses, *learned])),
    }


def together(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The parts of a block as one, in the same words; `kept`: of how many epochs in all.

    `parts`: of each, if there are several. `before` and `after` are None without any.
    """
    if len(parts) == 1:
        return parts[0]
    kept = sum(part["kept"] for part in parts if part["kept"] != "solved")
    return {
        "before": parts[0]["before"] if parts else None,
        "after": parts[-1]["after"] if parts else None,
        "kept": kept or "solved",
        "epochs": sum(part["epochs"] for part in parts),
        "held_out": [loss for part in parts for loss in part["held_out"]],
        "learned": [loss for part in parts for loss in part["learned"]],
        "finite": all(part["finite"] for part in parts),
        "varying": sorted({name for part in parts for name in part["varying"]}),
        "parts": list(parts),
    }


def with_rows(solved: BlockRecord, trained: Sequence[TrainedRows]) -> BlockRecord:
    """The solved record with the trained rows in place of the layers' solved ones, and norms."""
    layers, norms = {}, {}
    for name, layer in solved.layers.items():
        slices = _slices(name, trained)
        layers[name] = dataclasses.replace(layer, slices=slices) if slices else layer
    for name, dtype in trained[0].norms.items():
        slices = _slices(name, trained)
        norms[name] = LayerRecord((max(part.stop for part in slices), 1), dtype, slices, {})
    masks = dict(solved.results["masks"])
    for name in {name for part in trained for name in part.masks}:
        masks[name] = merge_mask_counts([p.masks[name] for p in trained if name in p.masks])
    named = {part.file for item in (*layers.values(), *norms.values()) for part in item.slices}
    written: list[StoredFile] = [part.file for part in trained if part.file is not None]
    files = [file for file in (*solved.files, *written) if file.name in named]
    results = {**solved.results, "masks": masks}
    return dataclasses.replace(
        solved, files=tuple(files), layers=layers, norms=norms, results=results
    )


def _slices(name: str, trained: Sequence[TrainedRows]) -> tuple[LayerSlice, ...]:
    """Where the trained rows of a layer or norm are."""
    return tuple(
        LayerSlice(part.file.name, *part.ranges[name])
        for part in trained
        if part.file is not None and name in part.ranges
    )


def untrained(solved: BlockRecord, trained: Sequence[TrainedRows]) -> list[str]:
    """The layers that were not trained: experts with too few tokens."""
    known = {name for part in trained for name in part.ranges}
    return [name for name in solved.layers if name not in known]
