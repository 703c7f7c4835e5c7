"""`prox24 solve`: runs several methods on one saved layer and compares their results."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.pattern import Pattern
from pipeline.config.solve import SolveConfig
from pipeline.config.solver import AUTO, ESTIMATE, SolverSettings
from pipeline.runtime.device import choose_device, make_deterministic
from pipeline.runtime.stopwatch import device_peak, host_peak, reset_peaks
from pipeline.solvers.auto_shrinkage import NOT_COMPARED, choose_regularization
from pipeline.solvers.base import naming
from pipeline.solvers.objective import relative_error
from pipeline.solvers.registry import solver_for
from pipeline.solvers.stored import as_stored
from pipeline.solvers.types import Statistics
from pipeline.statistics.accumulate import Accumulator, merged
from storage.errors import ConfigError, DataError, NumericalError
from storage.files.commit import replace_file
from storage.model.safetensors_format import header_for, tensor_bytes
from storage.run.layer_files import SavedLayer, read_layer_file

_REMEDY = "use a larger --damping, or leave the method out of --methods"


def solve_layer(path: Path, config: SolveConfig) -> dict[str, dict[str, Any]]:
    """Solves the layer saved at `path` with each of the config's methods, in their order.

    Returns per method: `relative_error` (per cent, undamped, on the evaluation sequences; None
    where the layer's outputs are 0 there, and those of the pruned one are not),
    `seconds` of the solve (with factorization and, for `--shrinkage auto`, the choice),
    `peak_memory_bytes` of the solve alone, and the solve's `report`. With `config.output` each
    pruned weight is written to `METHOD.safetensors` there, in the layer's dtype.

    Raises an `InputError` for a bad file or option, `NumericalError` for NaN or Inf.
    """
    make_deterministic(config.threads or len(os.sched_getaffinity(0)))
    device = choose_device(config.device)
    layer = read_layer_file(path)
    Pattern.parse(config.pattern).check_columns(layer.weight.shape[1])
    for name in ("weight", "inputs", "hessian"):
        tensor = getattr(layer, name)
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise NumericalError(f"{path}: `{name}` holds NaN or Inf")
    fit, evaluation = _statistics(layer, config, device)
    weight = layer.weight.to(device)
    results = {}
    for method in methods_of(config):
        with naming([f"{path.stem} by {method}"]):
            solution, metrics = _solve(weight, fit, config.solver_settings(method), device)
        metrics["relative_error"] = relative_error(solution, weight, evaluation)
        results[method] = metrics
        if config.output is not None:
            _write(Path(config.output) / f"{method}.safetensors", solution)
    return results


def methods_of(config: SolveConfig) -> list[str]:
    """The methods to run; `all` leaves out those that do not support the pattern.

    Raises `ConfigError` for an unknown method.
    """
    names = config.named_methods()
    if config.methods == "all":
        return [name for name in names if _supports_pattern(config, name)]
    return names


def _supports_pattern(config: SolveConfig, method: str) -> bool:
    try:
        solver_for(config.solver_settings(method))
    except ConfigError:
        return False
    return True


def _solve(
    weight: Tensor, halves: tuple[Statistics, ...], settings: SolverSettings, device: torch.device
) -> tuple[Tensor, dict[str, Any]]:
    """The pruned weight (R, C) in its dtype, and the metrics of its solve."""
    reset_peaks(device)
    before = host_peak()
    _synchronize(device)
    began = time.perf_counter()
    notes: list[str] = []
    if settings.shrinkage == AUTO:
        choice = choose_regularization({"": weight}, (halves[0], halves[1]), settings)
        if choice is None:
            settings, notes = dataclasses.replace(settings, shrinkage=ESTIMATE), [NOT_COMPARED]
        else:
            settings = dataclasses.replace(
                settings, shrinkage=choice.shrinkage, damping=choice.damping
            )
    solver = solver_for(settings)
    solution = solver.solve(weight, solver.prepare(merged(halves)))
    _synchronize(device)
    seconds = time.perf_counter() - began
    stored, more = as_stored(solution.weight, weight.dtype, _REMEDY)
    report = solution.report.to_json()
    report["deviations"] = [*notes, *report["deviations"], *more]
    metrics: dict[str, Any] = {"relative_error": None, "seconds": seconds}
    peak = device_peak(device) if device.type == "cuda" else host_peak() - before
    metrics["peak_memory_bytes"] = peak
    metrics["report"] = report
    return stored, metrics


def _statistics(
    layer: SavedLayer, config: SolveConfig, device: torch.device
) -> tuple[tuple[Statistics, ...], Statistics]:
    """The statistics to solve with (two halves for `--shrinkage auto`) and to evaluate with."""
    halves = any(config.solver_settings(method).shrinkage == AUTO for method in methods_of(config))
    if layer.inputs is None:
        if layer.hessian is None:  # read_layer_file has refused such a file
            raise DataError("the layer has neither inputs nor a Hessian")
        if halves or config.fit_sequences or config.evaluate_sequences:
            raise ConfigError(
                "the layer's file has a `hessian`, not `inputs`: --shrinkage auto, "
                "--fit-sequences and --evaluate-sequences need the inputs"
            )
        hessian = layer.hessian.to(device=device, dtype=torch.float32)
        whole = Statistics(
            columns=hessian.shape[0],
            tokens=layer.tokens,
            sequences=layer.sequences,
            diagonal=hessian.diagonal().clone(),
            hessian=hessian,
        )
        return (whole,), whole
    fit = layer.inputs[sequence_numbers(config.fit_sequences, layer.sequences)]
    evaluated = layer.inputs[sequence_numbers(config.evaluate_sequences, layer.sequences)]
    parts = [fit]
    if halves:
        # Halves of the sequences; with a single sequence, halves of its tokens.
        dim = 0 if fit.shape[0] > 1 else 1
        parts = list(fit.tensor_split(2, dim=dim))
    return tuple(_sum(part, device) for part in parts), _sum(evaluated, device)


def _sum(inputs: Tensor, device: torch.device) -> Statistics:
    """The statistics of inputs (sequences, tokens, C)."""
    total = Accumulator(inputs.shape[-1], "full", device)
    for sequence in inputs:
        total.add(sequence.to(device), sequences=1)
    return total.statistics()


def sequence_numbers(text: str | None, count: int) -> list[int]:
    """The numbers that a text like `0,2,5:8` lists; None: all below `count`.

    Raises `ConfigError` for another form, or for numbers of `count` or more.
    """
    if text is None:
        return list(range(count))
    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, colon, last = part.partition(":")
            numbers += range(int(first or 0), int(last or count)) if colon else [int(first)]
    except ValueError:
        raise ConfigError(f"sequences {text!r}: give numbers and ranges, as in 0,2,5:8") from None
    if not numbers or not all(0 <= number < count for number in numbers):
        raise ConfigError(f"sequences {text!r}: the layer's file holds {count}, numbered from 0")
    return numbers


def _write(path: Path, weight: Tensor) -> None:
    tensors = {"weight": weight.cpu().contiguous()}
    with replace_file(path) as writer:
        writer.write(header_for(tensors, {}))
        writer.write(tensor_bytes(tensors["weight"]))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
