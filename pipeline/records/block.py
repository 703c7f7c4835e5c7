"""The record of a pruned block: made from the ranks' results, and checked when it is read.

To `storage` a record's results are any JSON. Its checksum detects damage; the checks here detect a
record of another version, or one that prox24 did not write.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.messages import SolvedSlices
from pipeline.reconstruct.results import check_result, result_of
from pipeline.solvers.mask_counts import merge_mask_counts
from pipeline.solvers.types import SolveReport, merge_reports
from storage.errors import CorruptFileError
from storage.run.checkpoints import BlockRecord, LayerRecord, LayerSlice, read_block_record

_FIELDS = {field.name: str(field.type) for field in dataclasses.fields(SolveReport)}


def read_record(path: Path) -> BlockRecord:
    """The committed record of a block.

    Raises `CorruptFileError`, naming the path, if it is missing, damaged, or lacks what this
    version writes.
    """
    record = read_block_record(path)
    try:
        for layer in record.layers.values():
            _require(layer.results.keys() == _FIELDS.keys(), "a report lacks fields")
            for name, value in layer.results.items():
                _require(_fits(value, _FIELDS[name]), f"{name} of a report")
        results = record.results
        _require(_is_number(results["seconds"]), "seconds")
        for name in ("groups", "costs", "choices"):
            _require(name in results, name)
        check_result(result_of(results))
        for phase in results["phases"].values():
            check_phase(phase)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CorruptFileError(
            f"{path}: not as this prox24 writes it ({error}); delete it to redo the block"
        ) from error
    return record


def check_phase(phase: Mapping[str, Any]) -> None:
    """Raises ValueError, LookupError, TypeError or AttributeError unless it is a `PhaseTimes`."""
    _require(_is_number(phase["wall"]) and bool(phase["ranks"]), "times of a phase")
    for numbers in (*phase["ranks"], *phase["memory"], *phase["counts"]):
        _require(all(_is_number(value) for value in numbers.values()), "numbers of a rank")
    for span in phase.get("spans", ()):  # records of older versions have none
        numbers = (span["start"], span["seconds"], *span["ranks"])
        _require(all(map(_is_number, numbers)), "spans of a phase")


def _fits(value: object, annotation: str) -> bool:
    """Whether a JSON value fits the type of a field of `SolveReport`."""
    if annotation.startswith("tuple"):
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if annotation.endswith("| None") and value is None:
        return True
    if annotation.startswith("float"):
        return _is_number(value)
    if annotation.startswith("int"):
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    """A finite number that float arithmetic can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def block_record(
    block: int,
    attempt: int,
    world: int,
    layers: Mapping[str, tuple[tuple[int, int], str]],
    solved: Sequence[SolvedSlices],
    results: dict[str, Any],
) -> BlockRecord:
    """The record that names all ranks' row slices, with one merged report per layer.

    layers: name → ((R, C), safetensors dtype). solved: one entry per rank and pass. results: facts
    of the block as a whole.
    """
    records, masks = {}, {}
    for name, (shape, dtype) in layers.items():
        parts = [part for part in solved if name in part.ranges]
        parts.sort(key=lambda part: part.ranges[name])
        slices = [
            LayerSlice(file.stored.name, *file.ranges[name])
            for part in parts
            for file in part.files
            if name in file.ranges
        ]
        reports = [dict(part.reports[name]) for part in parts]
        masks[name] = merge_mask_counts([report.pop("mask") for report in reports])
        report = merge_reports([SolveReport.from_json(each) for each in reports])
        records[name] = LayerRecord(
            shape=shape, dtype=dtype, slices=tuple(slices), results=report.to_json()
        )
    return BlockRecord(
        block=block,
        attempt=attempt,
        world=world,
        files=tuple(file.stored for part in solved for file in part.files),
        layers=records,
        results={**results, "masks": masks},
    )


def block_error(record: BlockRecord) -> float | None:
    """A block's relative error in per cent: the sum of its layers' objectives, divided by that of
    their objectives with all weights zero. None if the divisor is zero."""
    reports = [SolveReport.from_json(layer.results) for layer in record.layers.values()]
    zero = sum(report.objective_zero for report in reports)
    return 100 * sum(report.objective for report in reports) / zero if zero > 0 else None


def deviations_in_words(record: BlockRecord, prefix: str) -> list[str]:
    """A line for each way in which layers of a block were not solved as asked, naming them.

    prefix: the block's name in the model, with a dot.
    """
    layers: dict[str, list[str]] = {}
    for name, layer in record.layers.items():
        for deviation in layer.results["deviations"]:
            layers.setdefault(deviation, []).append(prefix + name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {deviation}"
        for deviation, names in layers.items()
    ]
