"""(H~ + rho I)^-1 as ADMM applies it: held as a matrix, or as what few inputs leave of one.

With n inputs X (n, C), H~ is U^T U + diag(r) with U = sqrt((1 - a) / n) X D^-1 and r what the unit
diagonal lacks: shrinkage and damping, which in these coordinates is no multiple of the identity.
So with E = diag(r) + rho I, which is diagonal all the same, Woodbury's identity gives

    (U^T U + E)^-1 = E^-1 - E^-1 U^T (I + U E^-1 U^T)^-1 U E^-1 = E^-1 - V^T V,
    V = L^-1 U E^-1,    L L^T = I + U E^-1 U^T   (n, n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.solvers.hessian import ScaledHessian
from pipeline.solvers.kernels.cholesky import invert_


class Inverse(Protocol):
    """A symmetric (C, C) that rows are multiplied by."""

    def multiply(self, rows: Tensor, out: Tensor) -> None:
        """`rows` (R, C) fp32 times it, into `out`."""
        ...

    def diagonal(self) -> Tensor:
        """(C,): its diagonal."""
        ...


@dataclass(frozen=True)
class HeldInverse:
    """An inverse that is written out, (C, C)."""

    matrix: Tensor

    def multiply(self, rows: Tensor, out: Tensor) -> None:
        """See `Inverse`."""
        torch.mm(rows, self.matrix, out=out)

    def diagonal(self) -> Tensor:
        """See `Inverse`."""
        return self.matrix.diagonal()


@dataclass(frozen=True)
class LowRankInverse:
    """diag(plain) - factor^T factor: plain (C,), factor (n, C), fp32."""

    plain: Tensor
    factor: Tensor

    def multiply(self, rows: Tensor, out: Tensor) -> None:
        """See `Inverse`; two products (R, C) x (C, n) in place of one (R, C) x (C, C)."""
        torch.mul(rows, self.plain, out=out)
        out.addmm_(rows @ self.factor.T, self.factor, alpha=-1)

    def diagonal(self) -> Tensor:
        """See `Inverse`."""
        return self.plain - self.factor.square().sum(dim=0)


def inverse_of(problem: ScaledHessian, rho: float, buffer: Tensor | None) -> Inverse | None:
    """(H~ + rho I)^-1, or None where that was not positive definite to working precision.

    buffer: (C, C) fp32 that the inverse is written into; of inputs none is needed.
    """
    if problem.statistics.inputs is None:
        buffer = problem.write(rho, buffer)
        return HeldInverse(buffer) if bool(invert_(buffer)) else None
    rows_nC = problem.scaled_inputs()
    extra = problem.ridge + rho
    if not bool((extra > 0).all()):
        return None
    plain = 1 / extra
    core = (rows_nC * plain) @ rows_nC.T
    core.diagonal().add_(1)
    lower, info = torch.linalg.cholesky_ex(core)
    if int(info):
        return None
    factor = torch.linalg.solve_triangular(lower, rows_nC * plain, upper=False)
    return LowRankInverse(plain, factor)
