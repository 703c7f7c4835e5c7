"""Runs the Triton kernels in Triton's interpreter and compares them with the CPU's kernels.

`TRITON_INTERPRET=1 python -m tests.support.interpreted_kernels` prints a dict as JSON. The
interpreter computes with numpy, so its roots are exact; `approximate_roots` makes them wrong by up
to two ulps, as those of the hardware are.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from pipeline.config.solver import SolverSettings
from pipeline.solvers.kernels import prox_triton, sparsegpt_triton
from pipeline.solvers.kernels.cholesky import narrow_, upper_factor_
from pipeline.solvers.kernels.prox_operator import (
    NEWTON_STEPS,
    NEWTON_TOLERANCE,
    prox_operator,
)
from pipeline.solvers.registry import solver_for
from tests.support.prox_cases import adversarial, excess, objective
from tests.support.solver_cases import layer, statistics_of

_BLOCK = 16_384  # groups of a program: the interpreter's time is that of programs
LAMBDAS = (1e-30, 1e-3, 1.0, 1e4)


@contextlib.contextmanager
def approximate_roots(seed: int) -> Iterator[None]:
    """Roots and inverse roots that are wrong by up to two ulps, each at random."""
    generator = np.random.default_rng(seed)

    def wrong(exact: Any) -> Any:
        def operation(self: InterpreterBuilder, argument: TensorHandle) -> TensorHandle:
            value = exact(argument.data)
            ulps = generator.integers(-2, 3, value.shape).astype(value.dtype)
            return TensorHandle(
                value + ulps * np.finfo(value.dtype).eps / 2 * value, argument.dtype.scalar
            )

        return operation

    names = ("create_sqrt", "create_rsqrt")
    before = {name: getattr(InterpreterBuilder, name) for name in names}
    InterpreterBuilder.create_sqrt = wrong(np.sqrt)
    InterpreterBuilder.create_rsqrt = wrong(lambda data: 1 / np.sqrt(data))
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(InterpreterBuilder, name, method)


def interpreted(rows: Tensor, lam: Tensor, block: int = _BLOCK) -> Tensor:
    settings = (NEWTON_STEPS[lam.dtype], NEWTON_TOLERANCE[lam.dtype])
    return prox_triton.prox_triton(rows, lam, *settings, block=block)


def worst_excess(rows: Tensor, lam: Tensor, found: Tensor) -> float:
    """Of (R, C), λ (R,), over the float64 minimum, in allowances; per unit of λ|z|."""
    exact = prox_operator(rows.double(), lam.double())
    z, w, best = (matrix.reshape(-1, 4) for matrix in (rows, found, exact))
    each = lam.double().repeat_interleave(rows.shape[1] // 4)
    # In units of 1/λ, which keeps squares in range.
    z, w, best = (matrix.double() * each[:, None] for matrix in (z, w, best))
    ones = torch.ones_like(each)
    return excess(w, z, ones, objective(best, z, ones))


def operator_cases(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(R, C) and λ (R,): near-critical groups, ties, zeros and many magnitudes, at each λ."""
    z, lam = adversarial(6000, seed=7)
    u = (z * lam[:, None]).reshape(1, -1)
    g = torch.Generator().manual_seed(0)
    many = 10 ** (-12 * torch.rand(1, 2000, 4, generator=g, dtype=torch.float64))
    spread = torch.rand(1, 2000, 4, generator=g, dtype=torch.float64)
    u = torch.cat([u, (many[..., :1] * spread).reshape(1, -1), many.reshape(1, -1)], dim=1)
    per_row = torch.tensor(LAMBDAS, dtype=dtype)
    return (u / per_row.double()[:, None]).to(dtype), per_row


def check_operator(dtype: torch.dtype) -> dict[str, Any]:
    rows, lam = operator_cases(dtype)
    found = interpreted(rows, lam)
    results = {"excess": worst_excess(rows, lam, found)}
    small = (rows * lam[:, None]).abs().view(len(rows), -1, 4).amax(2) < prox_triton.SMALL[dtype]
    changed = 0
    for seed in (1, 2):
        with approximate_roots(seed):
            other = interpreted(rows, lam)
        kind = f"excess with approximate roots {seed}"
        results[kind] = worst_excess(rows, lam, other)
        differs = (other != found).view(len(rows), -1, 4).any(2)
        changed += int((differs & small).sum())
    # The check means something only if there are small groups and roots matter elsewhere.
    results |= {"small": int(small.sum()), "small changed": changed}
    results["others changed"] = int((differs & ~small).sum())
    return results


def check_tiny() -> dict[str, Any]:
    """λ|z| from 1e-45 to 1e-2 in fp32: every root wrong, the result that of the CPU."""
    g = torch.Generator().manual_seed(3)
    z = torch.rand(1, 4 * 4000, generator=g) * 10 ** (-43 * torch.rand(1, 16_000, generator=g) - 2)
    worst = 0.0
    for lam in (1e-20, 1.0):
        per_row = torch.tensor([lam])
        exact = prox_operator(z, per_row)
        for seed in (1, 2):
            with approximate_roots(seed):
                found = interpreted(z, per_row)
            sizes = z.view(-1, 4).abs().amax(1, keepdim=True).expand(-1, 4).reshape(1, -1)
            worst = max(worst, float(((found - exact).abs() / sizes.clamp(min=1e-45)).max()))
    return {"worst": worst}


def check_edges() -> dict[str, Any]:
    """Ties, zeros, denormals, infinities, NaN, and shapes that fill no block."""
    z = torch.tensor(
        [[1, 1, 1, 0], [1e30, -1e30, 5e29, -0.0], [1e-40, 2e-40, -0.0, 1e-44], [0, 0, 0, 0]]
    ).repeat(3, 3)
    results: dict[str, Any] = {}
    for lam in (0.0, 1e30, math.inf):
        found = interpreted(z, torch.tensor([lam]), block=32)
        results[f"λ {lam}"] = torch.equal(found, prox_operator(z, lam))
    half = torch.randn(3, 1028, generator=torch.Generator().manual_seed(0)).bfloat16()
    lam = torch.rand(3, generator=torch.Generator().manual_seed(1))
    in_half, in_full = interpreted(half, lam), interpreted(half.float(), lam)
    # The interpreter cuts bfloat16 off, where a GPU rounds.
    results["bfloat16"] = float(((in_half - in_full).abs() / in_full.abs().clamp(1e-30)).max())
    rows = [interpreted(half[i : i + 1], lam[i : i + 1], block=128) for i in range(3)]
    results["neighbours"] = torch.equal(torch.cat(rows), in_half)
    broken = z.clone()
    broken[0, 1] = math.nan
    found = interpreted(broken, torch.tensor([0.1]))
    results["NaN"] = bool(found[0, :4].isnan().all()) and int(found.isnan().sum()) == 4
    return results


def hostile_rows(columns: int) -> Tensor:
    """(24, C) fp32: ties, zeros of both signs, a spread of magnitudes, tiny and huge ones."""
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(24, columns, generator=g)
    weight[0], weight[1], weight[2] = 0.0, -0.0, 1.0
    weight[3] = torch.randint(0, 3, (columns,), generator=g).float()
    weight[4] = weight[4].round()
    weight[5] *= 1e-25
    weight[6] *= 1e-38
    weight[7] *= 1e15
    weight[8, ::3] = 0
    weight[9] = 10 ** (-30 * torch.rand(columns, generator=g))
    return weight


def factor_of(columns: int, dead: tuple[int, ...]) -> Tensor:
    """The upper factor (C, C) fp32 of an inverse Hessian with dead columns."""
    _, inputs = layer(columns=columns, tokens=columns, dead=dead)
    x = inputs.reshape(-1, columns).double()
    hessian = x.T @ x
    diagonal = hessian.diagonal()
    diagonal += torch.where(diagonal > 0, 0.01 * diagonal.mean(), 1.0)
    assert bool(upper_factor_(hessian))
    return narrow_(hessian)


def check_block(pattern: str, columns: int) -> dict[str, Any]:
    """One lazy block against the loop of the CPU, at once and row by row."""
    solver: Any = solver_for(SolverSettings(method="sparsegpt", pattern=pattern))
    dead = (5, 6)
    upper, weight = factor_of(columns, dead), hostile_rows(columns)
    weight[:, dead] = 0
    given = torch.zeros_like(weight, dtype=torch.bool)
    if not solver.pattern.structured:
        given = solver._above_threshold(weight, upper.diagonal())
    expected, mask = weight.clone(), given.clone()
    errors = solver._solve_block(expected, mask, upper, slice(0, columns))

    def by_kernel(rows: slice, tile: int) -> tuple[Tensor, Tensor, Tensor]:
        # Slices of wider matrices, as in a layer.
        wide = torch.nn.functional.pad(weight[rows], (3, 4))
        wide_mask = torch.nn.functional.pad(given[rows], (1, 1))
        ours, our_mask = wide[:, 3:-4], wide_mask[:, 1:-1]
        group, pruned = solver.pattern.group, solver.pattern.group - solver.pattern.keep
        lost = sparsegpt_triton.prune_block(
            ours, our_mask, upper, pruned=pruned, group=group, rows=tile
        )
        return ours, our_mask, lost

    found, found_mask, found_errors = by_kernel(slice(0, 24), 32)
    part = by_kernel(slice(7, 10), 2)
    size = expected.abs().amax(1, keepdim=True) + errors.abs().amax(1, keepdim=True) + 1e-45
    return {
        "masks": torch.equal(found_mask, mask),
        "weights": float(((found - expected).abs() / size).max()),
        "errors": float(((found_errors - errors).abs() / size).max()),
        "splits": all(
            torch.equal(one[7:10], other)
            for one, other in zip((found, found_mask, found_errors), part, strict=True)
        ),
        "kept": float(mask.double().mean()),
    }


def check_layer(pattern: str, blocksize: int) -> dict[str, Any]:
    """A whole layer with the kernel in place of the loop."""
    weight, inputs = layer(rows=16, columns=320, tokens=400, dead=(3,))
    statistics = statistics_of(inputs)
    settings = SolverSettings(method="sparsegpt", pattern=pattern, blocksize=blocksize)
    usual, ours = solver_for(settings), solver_for(settings)
    ours._solve_block = ours._solve_block_by_kernel  # type: ignore[attr-defined]
    expected, found = (each.solve(weight, each.prepare(statistics)) for each in (usual, ours))
    same = (expected.weight != 0) == (found.weight != 0)
    rows = same.all(dim=1)
    difference = (expected.weight - found.weight).abs().amax(dim=1)
    return {
        "rows with other masks": int((~rows).sum()),
        "difference": float(difference.max()),
        "objective": found.report.objective / expected.report.objective,
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[misc, assignment]
    results: dict[str, Any] = {
        "operator float32": check_operator(torch.float32),
        "operator float64": check_operator(torch.float64),
        "operator tiny": check_tiny(),
        "operator edges": check_edges(),
    }
    blocks = (("2:4", 128), ("4:8", 128), ("1:3", 129), ("unstructured:0.5", 128), ("20:36", 72))
    for pattern, columns in blocks:
        results[f"block {pattern}"] = check_block(pattern, columns)
    for pattern, blocksize in (("2:4", 128), ("2:4", 1000), ("unstructured:0.5", 64)):
        results[f"layer {pattern} {blocksize}"] = check_layer(pattern, blocksize)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
