"""(H~ + rho I)^-1 as ADMM applies it: a dense matrix, or a low-rank form where inputs are few.

With n inputs X (n, C) in place of the Hessian, H~ = U^T U + diag(r), where
U = sqrt((1 - a) / n) X D^-1 and r is what U^T U lacks of a unit diagonal: shrinkage a and damping,
which is not a multiple of the identity after scaling. With the diagonal matrix E = diag(r) + rho I,
Woodbury's identity gives

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
from pipeline.solvers.types import Team


class Inverse(Protocol):
    """A symmetric (C, C) matrix."""

    def multiply(self, rows: Tensor, out: Tensor) -> None:
        """Writes `rows` (R, C) fp32 times the matrix into `out` (R, C)."""
        ...

    def diagonal(self) -> Tensor:
        """The diagonal (C,) fp32."""
        ...


@dataclass(frozen=True)
class DenseInverse:
    """An inverse as a (C, C) fp32 matrix."""

    matrix: Tensor

    def multiply(self, rows: Tensor, out: Tensor) -> None:
        """See `Inverse`."""
        torch.mm(rows, self.matrix, out=out)

    def diagonal(self) -> Tensor:
        """See `Inverse`."""
        return self.matrix.diagonal()


@dataclass(frozen=True)
class LowRankInverse:
    """diag(entries) - factor^T factor: entries (C,), factor (n, C), both fp32."""

    entries: Tensor
    factor: Tensor

    def multiply(self, rows: Tensor, out: Tensor) -> None:
        """See `Inverse`; two products (R, C) x (C, n) instead of one (R, C) x (C, C)."""
        torch.mul(rows, self.entries, out=out)
        out.addmm_(rows @ self.factor.T, self.factor, alpha=-1)

    def diagonal(self) -> Tensor:
        """See `Inverse`."""
        return self.entries - self.factor.square().sum(dim=0)


def inverse_of(
    problem: ScaledHessian, rho: float, buffer: Tensor | None, team: Team | None = None
) -> Inverse | None:
    """(H~ + rho I)^-1; None where H~ + rho I is not positive definite to working precision.

    buffer: (C, C) fp32 that the inverse is written into; None with inputs in place of the Hessian.
    team: who computes the inverse of a Hessian together, see `invert_`.
    """
    if problem.statistics.inputs is None:
        buffer = problem.write(rho, buffer)
        return DenseInverse(buffer) if bool(invert_(buffer, team)) else None
    rows_nC = problem.scaled_inputs()
    extra = problem.ridge + rho
    if not bool((extra > 0).all()):
        return None
    entries = 1 / extra
    core = (rows_nC * entries) @ rows_nC.T
    core.diagonal().add_(1)
    lower, info = torch.linalg.cholesky_ex(core)
    if int(info):
        return None
    factor = torch.linalg.solve_triangular(lower, rows_nC * entries, upper=False)
    return LowRankInverse(entries, factor)
