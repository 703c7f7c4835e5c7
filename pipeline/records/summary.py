"""`report/summary.json`: a job's errors by block, seconds by kind of work, and peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pipeline.reconstruct.results import PHASES as RECONSTRUCTION_PHASES
from pipeline.reconstruct.results import result_of, totals
from pipeline.records.block import block_error
from pipeline.records.schemas import ACTIVATIONS_SCHEMA, SUMMARY_SCHEMA
from pipeline.records.times import Work, by_worker, sum_counts, timeline
from pipeline.runtime.stopwatch import peak_memory
from storage.errors import CorruptFileError
from storage.files.commit import read_json, replace_json
from storage.run.checkpoints import BlockRecord
from storage.run.directory import RunDirectory

# Kinds of work that the summary names; the rest of the wall time is "other".
KINDS = ("forward", "hessian", "reduce", "choose", "solve", "train", "io", "load")


def summarize(
    run: RunDirectory, records: Sequence[BlockRecord], note: Callable[[str], None]
) -> dict[str, Any]:
    """The metrics of a finished job, over all its runs; each phase counts in its committed attempt.

    reconstruction: the totals of the blocks' reconstructions; see `pipeline.reconstruct.results`.

    wall: seconds of all phases at the driver. seconds: the same time by kind of work, each the mean
    over ranks; "other" (waiting, dispatch) makes up the rest. memory: peak bytes of the driver
    (since its start) and of the largest worker (a Ray worker's by phase). workers, timeline: see
    `pipeline.records.times`. counts: see `pipeline.runtime.stopwatch`.

    blocks: the same of each block. Its `counts` and `phases` (wall `seconds`, peak bytes of the
    largest worker) include the computation of its inputs. `masks`: see
    `pipeline.solvers.mask_counts`. `reconstruct`: see `pipeline.reconstruct.results`; None
    where the block was not reconstructed.

    If a file of times is damaged, `note` is called with its name, and the sums lack it.
    """
    work = [part for record in records for part in _work(record)]
    for block in range(len(records)):
        path = run.report() / f"inputs-{block:03d}.json"
        if path.exists():
            try:
                made = read_json(path, ACTIVATIONS_SCHEMA)
            except CorruptFileError:
                note(f"{path}: damaged; the summary lacks the times in it")
            else:
                work.append(Work(block, made.get("workers", []), made["phases"]))
    phases = [phase for part in work for phase in part.phases.values()]
    wall = sum(phase["wall"] for phase in phases)
    seconds = {kind: _mean_over_ranks(phases, kind) for kind in KINDS}
    seconds["other"] = max(0.0, wall - sum(seconds.values()))
    workers = by_worker(work)
    return {
        "schema_version": SUMMARY_SCHEMA,
        "blocks": [
            _block(record, [part for part in work if part.block == record.block])
            for record in records
        ],
        "reconstruction": totals(result_of(record.results) for record in records),
        "wall": wall,
        "seconds": seconds,
        "memory": _peaks(peak_memory(), phases),
        "workers": workers,
        "timeline": timeline(work, workers),
        "counts": sum_counts(phases),
    }


def write_summary(
    run: RunDirectory, summary: dict[str, Any], guard: Callable[[], None] | None = None
) -> None:
    """Writes `report/summary.json`; `guard` as in `replace_json`."""
    replace_json(run.report() / "summary.json", summary, guard=guard)


def read_summary(run: RunDirectory) -> dict[str, Any]:
    """Reads `report/summary.json`. Raises `CorruptFileError` if it is missing or damaged."""
    return read_json(run.report() / "summary.json", SUMMARY_SCHEMA)


def _work(record: BlockRecord) -> list[Work]:
    """A block's solve and its reconstruction, which a resumed job may do with other workers."""
    results = record.results
    workers, phases = results.get("workers", []), results["phases"]
    if "solve_workers" not in results:
        return [Work(record.block, workers, phases)]
    trained = {name: phase for name, phase in phases.items() if name in RECONSTRUCTION_PHASES}
    solved = {name: phase for name, phase in phases.items() if name not in trained}
    return [
        Work(record.block, results["solve_workers"], solved),
        Work(record.block, workers, trained),
    ]


def _block(record: BlockRecord, work: Sequence[Work]) -> dict[str, Any]:
    """A block's metrics. work: the phases of this block alone."""
    results = record.results
    phases = [phase for part in work for phase in part.phases.items()]
    return {
        "block": record.block,
        "relative_error": block_error(record),
        "attempt": record.attempt,
        "world": record.world,
        "workers": results.get("workers", []),
        "failures": results.get("failures", []),
        "seconds": results["seconds"],
        "memory": _peaks(results["driver_memory"], results["phases"].values()),
        "counts": sum_counts(phase for _, phase in phases),
        "phases": {name: _phase(phase) for name, phase in phases},
        "groups": results["groups"],
        "choices": results["choices"],
        "reconstruct": result_of(results),
        "costs": results["costs"],
        "layers": {name: layer.results for name, layer in record.layers.items()},
        "masks": results.get("masks", {}),
    }


def _mean_over_ranks(phases: Iterable[dict[str, Any]], kind: str) -> float:
    means = [
        sum(float(rank.get(kind, 0.0)) for rank in phase["ranks"]) / len(phase["ranks"])
        for phase in phases
    ]
    return sum(means)


def _phase(phase: dict[str, Any]) -> dict[str, Any]:
    return {"seconds": phase["wall"], **_largest(phase["memory"])}


def _peaks(driver: dict[str, Any], phases: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Peak bytes of the driver and of the largest worker in any of the phases."""
    largest = _largest([memory for phase in phases for memory in phase["memory"]])
    return {
        "driver_rss_bytes": int(driver["rss_bytes"]),
        "worker_rss_bytes": largest["rss_bytes"],
        "worker_device_bytes": largest["device_bytes"],
    }


def _largest(workers: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {
        key: max((int(memory.get(key, 0)) for memory in workers), default=0)
        for key in ("rss_bytes", "device_bytes")
    }
