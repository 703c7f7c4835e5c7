"""Memory of a full-Hessian solve: two C x C fp32 beyond the given Hessian, workspace included.

A process of its own counts resident bytes, so that what a library allocates counts too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

COLUMNS, ROWS = 2048, 16

PROGRAM = """
import json, sys
import torch
from pipeline.runtime.stopwatch import host_peak, reset_peaks
from pipeline.config.solver import SolverSettings
from pipeline.solvers.types import Statistics
from pipeline.solvers.registry import solver_for

torch.set_num_threads(1)
method, columns, rows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
settings = SolverSettings(
    method=method, refine="cg", refine_steps=2, shrinkage=0.1,
    admm_iterations=4, admm_first_iterations=2, prox_growth=3.0,
)
solver = solver_for(settings)

def problem(columns):
    inputs = torch.randn(128, columns)
    hessian = torch.empty(columns, columns)
    torch.mm(inputs.T, inputs, out=hessian)
    return torch.randn(rows, columns), Statistics(
        columns=columns, tokens=128, sequences=1, hessian=hessian
    )

weight, statistics = problem(512)  # compiles, and starts the libraries
solver.solve(weight, solver.prepare(statistics))
weight, statistics = problem(columns)
reset_peaks(torch.device("cpu"))
before = host_peak()
solver.solve(weight, solver.prepare(statistics))
print(json.dumps(host_peak() - before))
"""


@pytest.mark.parametrize("method", ["sparsegpt", "prox", "prox_admm"])
def test_a_solve_holds_two_matrices_beyond_the_hessian(repository: Path, method: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, method, str(COLUMNS), str(ROWS)],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    )
    used = json.loads(done.stdout)
    matrix = 4 * COLUMNS * COLUMNS
    panels = 6 * COLUMNS * 512 * 4  # of O(C): six of 512 columns in fp32
    rows = 20 * ROWS * COLUMNS * 4
    assert used > matrix / 2  # it did count
    assert used <= 2 * matrix + panels + rows
    if method == "prox_admm":
        assert used <= matrix + panels + rows
