"""Inputs for the proximal operator, and what its results are judged by."""

from __future__ import annotations

import torch
from torch import Tensor


def regularizer(w: Tensor) -> Tensor:
    a, b, c, d = w.abs().unbind(-1)
    return a * b * c + b * c * d + c * d * a + d * a * b


def objective(w: Tensor, z: Tensor, lam: Tensor) -> Tensor:
    """½‖w − z‖² + λ r(w) in float64, per group."""
    w, z, lam = w.double(), z.double(), lam.double()
    return 0.5 * (w - z).square().sum(-1) + lam * regularizer(w)


def allowance(best: Tensor, z: Tensor) -> Tensor:
    """How far above the best objective a result may be."""
    return 1e-6 * best + 1e-12 * z.double().square().sum(-1)


def adversarial(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Groups with λ|z| around 1, ties, zeros and many magnitudes: (n, 4), (n,) in float64."""
    g = torch.Generator().manual_seed(seed)
    n = count // 6

    def uniform(low: float, high: float, columns: int) -> Tensor:
        return low + (high - low) * torch.rand((n, columns), generator=g, dtype=torch.float64)

    def normal() -> Tensor:
        return torch.randn((n, 4), generator=g, dtype=torch.float64)

    ties = torch.randint(0, 4, (n, 4), generator=g)
    u = torch.cat(
        [
            normal() * 10 ** uniform(-2, 0.5, 1),
            uniform(0, 1, 4) * uniform(0.3, 2, 1),
            uniform(0.3, 1.5, 1) * (1 + normal() * 10 ** uniform(-6, -0.3, 1)),
            torch.where(normal() > 0, 1.0, 10 ** uniform(-4, 0, 4)) * uniform(0.3, 1.5, 1),
            uniform(0, 1.5, 4).gather(1, ties),
            torch.where(normal() > 1.5, 0.0, 10 ** uniform(-4, 0.3, 4)),
        ]
    )
    lam = 10 ** (6 * torch.rand(len(u), generator=g, dtype=torch.float64) - 3)
    signs = torch.where(torch.rand(u.shape, generator=g) < 0.5, -1.0, 1.0)
    return u * signs / lam[:, None], lam


def excess(w: Tensor, z: Tensor, lam: Tensor, best: Tensor) -> float:
    """The largest excess over the best objective in units of the allowance."""
    units = (objective(w, z, lam) - best) / (allowance(best, z) + 1e-300)
    return float(units.max())
