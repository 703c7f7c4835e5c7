"""The proximal operator of the 2:4 regularizer, exactly.

Source: Kübler et al., "A Proximal Operator for Inducing 2:4-Sparsity". On a group `w` of four
the regularizer is `r(w) = |w1 w2 w3| + |w2 w3 w4| + |w3 w4 w1| + |w4 w1 w2|`, and the operator
is `argmin_w ½‖w − z‖² + λ r(w)`. The paper compares three candidates: the two largest kept,
the three largest kept, all four kept. It computes the latter two iteratively. Here each is a
root of a convex function of one variable, which Newton's method provably finds.

Derivation. The solution has the signs and the order of `z`, and only the product `λ z`
matters, so let `u1 ≥ u2 ≥ u3 ≥ u4 ≥ 0` be the sorted `λ|z|` and minimize
`F(x) = ½‖x − u‖² + e3(x)` over `x ≥ 0` (`e3`: sum of the four triple products). The answer
is `x = λ|w|`.

*Three kept* (`x4 = 0`). `x_i = u_i − P/x_i` with `P = x1 x2 x3`, hence
`2 x_i − u_i = ±sqrt(u_i² − 4P)`. A positive semidefinite Hessian forces the plus sign for 1
and 2 (there every `x_i ≤ 1`). With `q = 2 x3 − u3` of either sign the rest is
`k(q) = ½ (u1 + Q1)(u2 + Q2) + q − u3 = 0`, `Q_i = sqrt(q² + u_i² − u3²)`.

*Four kept*. `x_i² + (1 − s) x_i = u_i − p` with `s = Σ x` and `p` the sum of the pair
products; adding the four gives `p = (Σu − s)/2`, hence `2 x_i + 1 − s = ±sqrt(s² + c_i)`,
`c_i = 1 + 4 u_i − 2 Σu`. The Hessian is `diag(2 x_i + 1 − s)` plus a matrix with one negative
eigenvalue, so at a minimum at most the sign of the smallest entry is minus. With
`q = 2 x4 + 1 − s` of either sign, `h(q) = sqrt(q² − c_4) + ½ (q + Σ_{i<4} Q_i) − 2 = 0`,
`Q_i = sqrt(q² + 4 (u_i − u4))`. Where `c_4 > 0` the variable is `s` instead, with
`q = sqrt(s² + c_4)` (a negative `q` would be below `−s`, and `x4` below 0).

Every radicand is the variable squared plus a non-negative constant, so `k` and `h` are
convex, with at most two roots, and the determinant of the Hessian has the sign of the slope
(`Q1 Q2 k' / (x1 x2)` and `s Q1 Q2 Q3 h'`). So each candidate is at most one point, the larger
root, and Newton's method started to its right (`k(u3) ≥ 0`; `h ≥ 0` at `s = Σu`) descends
to it monotonically. If there is no root the iteration ends at the lower bound (the smallest entry
at 0), a feasible point that cannot win wrongly: the candidates are compared by `F`.

Few groups need this when `λ|z|` is large: with `α = (u1+u2)/2`, `β = (u1−u2)/2`, `g = ½+β`,
`a = α u2`, the two largest are optimal if `u1 ≥ 2` (no positive semidefinite Hessian) or
`a ≥ u3` where `a ≤ g`, `4 g a ≥ (g + u3)²` elsewhere (a lower bound of the change of
`F` per unit of `x3`). The kernels use it first; the bound is proved for three kept, and that
four kept is best only where three kept also beats two is an observation, without exception on
7·10⁶ groups.

Rounding. `λ|z|` is computed once, with no power of `z`, so that values of 1e30 do no harm. `w` is
`|z| − e2(the other x)/λ`, one step of the fixed-point equation, so a small `λ` loses no digits and
`λ = 0` returns `z` bit for bit. Where `F` underflows, the candidate with more entries is chosen,
which is the right one.
"""

from __future__ import annotations

import math
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime.threads import threads
from pipeline.solvers.kernels.on_gpu import triton_module
from pipeline.solvers.kernels.prox_torch import prox_torch, work

# Newton's method stops for an entry after its first step below the tolerance (the remaining error
# is about its square), or after this many steps. The latter happens only where two candidates, and
# so their objectives, nearly coincide; `tests/solvers/test_prox_operator.py` measures the excess.
NEWTON_STEPS = {torch.float32: 10, torch.float64: 14}
NEWTON_TOLERANCE = {torch.float32: 3e-4, torch.float64: 1e-7}

# Elements per thread that are converted at a time where the kernel cannot read z directly.
_CONVERTED = 1 << 18


def prox_operator(
    z: Tensor, lambda_: float | Tensor, *, kernels: str = "triton", steps: int | None = None
) -> Tensor:
    """The global minimizer of `½‖w − z‖² + λ r(w)` over every four consecutive entries.

    Args:
        z: (..., C), floating point, C divisible by 4. Not modified; may be non-contiguous.
        lambda_: λ ≥ 0, a number or a tensor of shape `z.shape[:-1]` (one value per row); infinity
            keeps the two largest.
        kernels: on a CUDA device `triton`, or `torch` for plain torch operations.
        steps: with plain torch operations the steps of Newton's method, for a result that need not
            be exact; None for all that exactness needs.

    Returns:
        (..., C) in the dtype of `z`, a new tensor, with the signs and the order of `z`. Among equal
        magnitudes any one may be pruned. bfloat16 and float16 are computed in float32, float64 in
        float64. A NaN in a group, or as its λ, makes the whole group NaN.

    Raises:
        ValueError: C is not divisible by 4, λ is negative or of another shape, or z is not
            floating point.
        ResourceError: z is on a CUDA device, and Triton is not installed.

    Source: Kübler et al., the proximal operator and its three candidates. How each candidate is
    computed is derived at the top of this module.
    """
    if z.dim() == 0 or z.shape[-1] % 4:
        raise ValueError(f"z must have a last dimension divisible by 4, got {tuple(z.shape)}")
    if not z.is_floating_point():
        raise ValueError(f"z must be floating point, got {z.dtype}: convert it first")
    z = z.detach()
    compute = torch.float64 if z.dtype == torch.float64 else torch.float32
    per_row = _lambda_per_row(z, lambda_, compute)
    if z.numel() == 0:
        return torch.empty_like(z)
    rows = z.reshape(-1, z.shape[-1])
    if z.device.type == "cpu" and _numba_kernels() is not None:
        result = _prox_cpu(rows, per_row, _numba_kernels())
    elif z.device.type == "cuda" and kernels == "triton":
        settings = (NEWTON_STEPS[compute], NEWTON_TOLERANCE[compute])
        result = _triton_kernels().prox_triton(rows.contiguous(), per_row, *settings)
    else:
        settings = (steps or NEWTON_STEPS[compute], 0.0 if steps else NEWTON_TOLERANCE[compute])
        result = prox_torch(rows, per_row, *settings)
    return result.reshape(z.shape)


@cache
def _numba_kernels() -> Any:
    """The module with the CPU kernel; None where numba is not installed."""
    if find_spec("numba") is None:
        return None
    return import_module("pipeline.solvers.kernels.prox_numba")


def _triton_kernels() -> Any:
    """The module with the GPU kernel. Raises `ResourceError` where Triton is not installed."""
    return triton_module("prox_triton")


def _prox_cpu(rows: Tensor, per_row: Tensor, kernels: Any) -> Tensor:
    """The numba kernel on (R, C); a dtype or layout it cannot read is converted in pieces."""
    settings = {
        "steps": NEWTON_STEPS[per_row.dtype],
        "tolerance": NEWTON_TOLERANCE[per_row.dtype],
    }
    result = torch.empty(rows.shape, dtype=rows.dtype)
    if rows.dtype == per_row.dtype and rows.is_contiguous():
        kernels.prox_numba(rows.numpy(), per_row.numpy(), result.numpy(), **settings)
        return result
    step = max(1, threads() * _CONVERTED // rows.shape[1])
    solved = torch.empty((min(step, len(rows)), rows.shape[1]), dtype=per_row.dtype)
    for start in range(0, len(rows), step):
        piece = rows[start : start + step].to(per_row.dtype).contiguous()
        here = per_row if len(per_row) == 1 else per_row[start : start + step]
        target = solved[: len(piece)]
        kernels.prox_numba(piece.numpy(), here.numpy(), target.numpy(), **settings)
        result[start : start + step] = target
    return result


def _lambda_per_row(z: Tensor, lambda_: float | Tensor, compute: torch.dtype) -> Tensor:
    """λ in the compute dtype: (1,) for a number, else (rows,)."""
    if not isinstance(lambda_, Tensor):
        if lambda_ < 0:
            raise ValueError(f"lambda_ must not be negative, got {lambda_}")
        number = math.inf if lambda_ > torch.finfo(compute).max else float(lambda_)
        return torch.full((1,), number, dtype=compute, device=z.device)
    if lambda_.shape == z.shape[:-1]:
        values = lambda_.detach().to(device=z.device, dtype=compute).reshape(-1)
    elif lambda_.dim() == 0:
        values = lambda_.detach().to(device=z.device, dtype=compute).reshape(1)
    else:
        raise ValueError(
            f"lambda_ must be a number or of shape {tuple(z.shape[:-1])}, "
            f"got {tuple(lambda_.shape)}"
        )
    # The kernels need one value per row in memory, which an expanded λ does not have.
    values = values.contiguous()
    if bool((values < 0).any()):
        raise ValueError("lambda_ must not be negative")
    return values


def operator_work(
    kernels: str, rows: int, columns: int, device: str, steps: int | None = None
) -> tuple[float, float]:
    """What an operator on (R, C) fp32 takes beside one kernel: kernels started and bytes moved.

    device: a torch device type. kernels, steps: as for `prox_operator`. 0 of both except for plain
    torch operations on a GPU.
    """
    if device == "cpu" or kernels == "triton":
        return 0.0, 0.0
    return work(rows * columns / 4, steps or NEWTON_STEPS[torch.float32])
