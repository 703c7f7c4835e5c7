"""Solves on the fake GPU: where the host waits, and what is left on the GPU.

A wait inside a loop stops the GPU at every turn. So the number of waits of a solve may not depend
on how often its loops turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.solve import SolveConfig
from pipeline.config.solver import SolverSettings
from pipeline.runtime.device import tf32_products
from pipeline.solve_layer import solve_layer
from pipeline.solvers import base
from pipeline.solvers.inverse import DenseInverse
from pipeline.solvers.methods import prox_admm
from pipeline.solvers.refine import refine
from pipeline.solvers.registry import solver_for
from pipeline.statistics.accumulate import Accumulator
from storage.errors import NumericalError
from tests.support.fake_gpu import Record, fake_gpu
from tests.support.fake_gpu.jobs import check_no_cpu, check_products, in_iterations
from tests.support.solver_cases import layer

_PROX_CHECKS = 50  # iterations of `prox` between two waits


def saved(folder: Path, columns: int = 64, rows: int = 8) -> Path:
    """A layer in bf16 with more inputs than columns."""
    weight, inputs = layer(rows, columns, tokens=columns)
    path = folder / f"layer-{columns}.safetensors"
    save_file({"weight": weight.bfloat16(), "inputs": inputs.bfloat16()}, path)
    return path


def solve(path: Path, method: str, device: str, output: Path, **options: Any) -> dict[str, Any]:
    """The method's result on `device`."""
    config = SolveConfig(methods=method, device=device, output=str(output), threads=1, **options)
    return solve_layer(path, config)[method]


def solve_on_gpu(path: Path, method: str, output: Path, **options: Any) -> tuple[Any, Record]:
    """The method's result and what happened. Checks products, and that nothing is left behind."""
    with fake_gpu() as gpu:
        result = solve(path, method, "cuda", output, **options)
        check_products(gpu, None, options.get("gpu_products", "tf32") == "tf32")
        check_no_cpu(gpu)
    assert gpu.live == 0
    return result, gpu


SETTINGS: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "wanda": {"refine": "cg", "damping": 0.1},
    "sparsegpt": {},
    "prox": {"prox_growth": 1.2},
    "prox_admm": {"damping": 0.1},
    "prox_admm, auto": {"shrinkage": "auto"},
    "prox_admm, diagonal": {"shrinkage": "1"},
    "prox_admm, estimate": {"shrinkage": "estimate", "refine": "gradient", "refine_steps": 5},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_result_of_the_cpu(tmp_path: Path, name: str) -> None:
    method, path, options = name.partition(",")[0], saved(tmp_path), SETTINGS[name]
    found, _ = solve_on_gpu(path, method, tmp_path / "gpu", **options)
    expected = solve(path, method, "cpu", tmp_path / "cpu", **options)
    assert found["relative_error"] == pytest.approx(expected["relative_error"], rel=0.02)
    one, other = (
        load_file(tmp_path / device / f"{method}.safetensors")["weight"]
        for device in ("gpu", "cpu")
    )
    assert ((one != 0) == (other != 0)).float().mean() > 0.98
    if method in ("magnitude", "wanda", "sparsegpt", "prox"):
        assert torch.equal(one, other)


ITERATED: dict[str, dict[str, Any]] = {"prox": {"prox_growth": 1.2}, "prox_admm": {}}


@pytest.mark.parametrize("method", ITERATED)
def test_iterations_are_tf32_and_the_rest_is_not(tmp_path: Path, method: str) -> None:
    """In operations of the solver; the report says so."""
    path, options = saved(tmp_path), {"damping": 0.1, **ITERATED[method]}
    operations: dict[tuple[str, str, bool], int] = {}
    for products in ("tf32", "float32"):
        found, gpu = solve_on_gpu(path, method, tmp_path, gpu_products=products, **options)
        assert found["report"]["products"] == products
        for each, count in gpu.products.items():
            if each.place.startswith("pipeline/solvers/"):
                key = products, ("iterations" if in_iterations(each) else "rest"), each.tf32
                operations[key] = operations.get(key, 0) + count
    one = 2 * 16 * 64 * 64
    iterations = found["report"]["iterations"]
    assert operations["tf32", "iterations", True] == iterations * one
    assert operations["float32", "iterations", False] == iterations * one
    assert operations["tf32", "rest", False] >= 7 * one
    assert ("tf32", "rest", True) not in operations


def test_iterations_by_the_inputs_are_tf32(tmp_path: Path) -> None:
    weight, inputs = layer(16, 64, tokens=20)
    with fake_gpu() as gpu:
        statistics = Accumulator(64, "full", torch.device("cuda"), keep=True)
        statistics.add(inputs.reshape(-1, 64).to("cuda"), 2)
        solver = solver_for(SolverSettings())
        solved = solver.solve(weight.to("cuda"), solver.prepare(statistics.statistics()))
        check_products(gpu, None)
        iterated = [each for each in gpu.products if in_iterations(each)]
        assert {each.function for each in iterated} == {"LowRankInverse.multiply"}
        assert solved.report.products == "tf32"


@pytest.mark.parametrize("leak", ["it stays on", "it is on in refinement"])
def test_a_leak_of_tf32_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leak: str
) -> None:
    """The checks of this folder fail where the switch is turned on for good, or too early."""
    switch = torch.backends.cuda.matmul

    @contextmanager
    def left_on(allowed: bool) -> Iterator[None]:
        switch.allow_tf32 = allowed
        yield
        switch.allow_tf32 = allowed and leak == "it stays on"

    def refined(*arguments: Any) -> Any:
        with tf32_products(True):
            return refine(*arguments)

    if leak == "it stays on":
        monkeypatch.setattr(prox_admm, "tf32_products", left_on)
    else:
        monkeypatch.setattr(base, "refine", refined)
    try:
        with pytest.raises(AssertionError, match="tf32=True"):
            solve_on_gpu(saved(tmp_path), "prox_admm", tmp_path, damping=0.1)
    finally:
        switch.allow_tf32 = False


def test_tf32_is_off_after_a_failed_solve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise NumericalError("provoked")

    monkeypatch.setattr(DenseInverse, "multiply", fails)
    with fake_gpu(), pytest.raises(NumericalError, match="provoked"):
        solve(saved(tmp_path), "prox_admm", "cuda", tmp_path)
    assert not torch.backends.cuda.matmul.allow_tf32


# Method, settings, and what makes its loop longer.
LOOPS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "iterations of ADMM": (
        "prox_admm",
        {"admm_iterations": 8, "admm_first_iterations": 4},
        {"admm_iterations": 24, "admm_first_iterations": 12},
    ),
    "iterations of ADMM, 4:8": (
        "prox_admm",
        {"pattern": "4:8", "admm_iterations": 8, "admm_first_iterations": 4},
        {"pattern": "4:8", "admm_iterations": 16, "admm_first_iterations": 8},
    ),
    "conjugate gradients": (
        "wanda",
        {"refine": "cg", "refine_steps": 3},
        {"refine": "cg", "refine_steps": 15},
    ),
    "gradient descent": (
        "wanda",
        {"refine": "gradient", "refine_steps": 3},
        {"refine": "gradient", "refine_steps": 15},
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_no_wait_in_a_loop(tmp_path: Path, name: str) -> None:
    method, few, many = LOOPS[name]
    path = saved(tmp_path)
    _, short = solve_on_gpu(path, method, tmp_path, damping=0.1, **few)
    _, long = solve_on_gpu(path, method, tmp_path, damping=0.1, **many)
    assert sum(long.kernels.values()) > sum(short.kernels.values()) + 20
    assert where(long, short) == {}


def where(long: Record, short: Record) -> dict[tuple[str, str], int]:
    """The waits that one has more of: how many, by kind and place."""
    return dict(Counter(long.waits) - Counter(short.waits))


def test_no_wait_in_a_power_iteration(tmp_path: Path) -> None:
    """Its 64 products, and the 128 of two: all waits together are fewer."""
    _, gpu = solve_on_gpu(saved(tmp_path), "wanda", tmp_path, refine="gradient", refine_steps=1)
    assert gpu.waits_of() < 64


def test_prox_waits_once_in_fifty_iterations(tmp_path: Path) -> None:
    path = saved(tmp_path)
    found, gpu = solve_on_gpu(path, "prox", tmp_path, prox_growth=1.06)
    iterations = found["report"]["iterations"]
    assert iterations >= 2 * _PROX_CHECKS
    assert gpu.launches["prox_triton._operator"] == iterations
    often = [n for (_, place), n in gpu.waits.items() if "methods/prox.py" in place]
    assert sum(often) <= iterations // _PROX_CHECKS


@pytest.mark.parametrize("pattern", ["2:4", "unstructured:0.5"])
def test_sparsegpt_waits_in_no_column(tmp_path: Path, pattern: str) -> None:
    options = {"pattern": pattern, "blocksize": 32}
    _, narrow = solve_on_gpu(saved(tmp_path, 64), "sparsegpt", tmp_path, **options)
    _, wide = solve_on_gpu(saved(tmp_path, 192), "sparsegpt", tmp_path, **options)
    assert sum(wide.kernels.values()) > sum(narrow.kernels.values())
    assert where(wide, narrow) == {}


def test_an_inverse_waits_once_in_512_columns(tmp_path: Path) -> None:
    options = {"admm_iterations": 2, "admm_first_iterations": 1, "refine": "none", "damping": 0.1}
    _, narrow = solve_on_gpu(saved(tmp_path, 64), "prox_admm", tmp_path, **options)
    _, wide = solve_on_gpu(saved(tmp_path, 1024), "prox_admm", tmp_path, **options)
    more = where(wide, narrow)
    assert sum(more.values()) == 2 * 1, more  # two inverses, of two panels each
