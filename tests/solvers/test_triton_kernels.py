"""The Triton kernels without a GPU: compiled for three of them, and interpreted.

Triton's wheel compiles without a driver. Its interpreter must be chosen before it is imported, and
a test process must not change what torch does, so both run in processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton's wheel is not installed (Linux on x86-64 only)")

GPUS = ("A100", "H100", "B200")
SPARSEGPT = ("2:4, 128", "4:8, 128", "unstructured:0.5, 128", "1:3, 129", "2:4, 256")
KERNELS = (
    *(f"proximal operator, {dtype}" for dtype in ("fp32", "bf16", "fp64")),
    "trial launch",
    *(f"SparseGPT's block, {block} columns" for block in SPARSEGPT),
)
Processes = dict[str, subprocess.Popen[str]]


@pytest.fixture(scope="module")
def processes(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Both programs, started together."""
    folder = tmp_path_factory.mktemp("triton")
    # An own cache, so that all kernels are compiled in fact.
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder), "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = str(repository)
    variables = {"compiled": {}, "interpreted": {"TRITON_INTERPRET": "1"}}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", f"tests.support.{name}_kernels"],
            cwd=repository,
            env=environment | extra,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, extra in variables.items()
    }
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


def result_of(process: subprocess.Popen[str]) -> Any:
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return json.loads(out)


@pytest.fixture(scope="module")
def compiled(processes: Processes) -> dict[tuple[str, str], dict[str, int]]:
    rows = result_of(processes["compiled"])
    return {(row["kernel"], row["gpu"]): row for row in rows}


@pytest.fixture(scope="module")
def interpreted(processes: Processes) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = result_of(processes["interpreted"])
    return results


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_without_spills(
    kernel: str, gpu: str, compiled: dict[tuple[str, str], dict[str, int]]
) -> None:
    assert len(compiled) == len(KERNELS) * len(GPUS)
    usage = compiled[kernel, gpu]
    assert usage["stack"] == 0
    assert 0 < usage["registers"] < 255


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_operator_finds_the_minimum(dtype: str, interpreted: dict[str, dict[str, Any]]) -> None:
    """With exact roots, and with roots that are wrong by up to two ulps, as a GPU's are."""
    result = interpreted[f"operator {dtype}"]
    excesses = [value for name, value in result.items() if name.startswith("excess")]
    assert len(excesses) == 3
    assert max(excesses) <= 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_small_groups_do_not_depend_on_roots(
    dtype: str, interpreted: dict[str, dict[str, Any]]
) -> None:
    result = interpreted[f"operator {dtype}"]
    assert result["small changed"] == 0
    # The roots were wrong in fact, and there were small groups.
    assert result["small"] > 1000
    assert result["others changed"] > 1000


def test_tiny_values_are_those_of_the_cpu(interpreted: dict[str, dict[str, Any]]) -> None:
    assert interpreted["operator tiny"]["worst"] < 1e-6


def test_edges_of_the_operator(interpreted: dict[str, dict[str, Any]]) -> None:
    result = interpreted["operator edges"]
    assert result.pop("bfloat16") <= 2**-7
    assert result == dict.fromkeys(("λ 0.0", "λ 1e+30", "λ inf", "neighbours", "NaN"), True)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:3", "unstructured:0.5", "20:36"])
def test_a_lazy_block_is_that_of_the_cpu(
    pattern: str, interpreted: dict[str, dict[str, Any]]
) -> None:
    """Ties, zeros, dead columns, huge and tiny values; at once, and some rows alone."""
    result = interpreted[f"block {pattern}"]
    assert result["masks"]
    assert result["weights"] <= 1e-6
    assert result["errors"] <= 1e-6
    assert result["splits"]
    assert 0.2 < result["kept"] < 0.8


@pytest.mark.parametrize("case", ["2:4 128", "2:4 1000", "unstructured:0.5 64"])
def test_a_layer_is_that_of_the_cpu(case: str, interpreted: dict[str, dict[str, Any]]) -> None:
    """Lazy blocks of one call of the kernel, and one that takes several."""
    result = interpreted[f"layer {case}"]
    assert result["rows with other masks"] == 0
    assert result["difference"] <= 1e-4
    assert result["objective"] == pytest.approx(1, abs=1e-4)
