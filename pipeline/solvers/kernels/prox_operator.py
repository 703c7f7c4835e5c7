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
`F` per unit of `x3`). See `two_largest_decided`; the bound is proved for three kept, and that
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

# Newton's method stops for an entry after its first step below the tolerance (the remaining error
# is about its square), or after this many steps. The latter happens only where two candidates, and
# so their objectives, nearly coincide; `tests/solvers/test_prox_operator.py` measures the excess.
NEWTON_STEPS = {torch.float32: 10, torch.float64: 14}
NEWTON_TOLERANCE = {torch.float32: 3e-4, torch.float64: 1e-7}

# Groups in one piece of the plain torch path, so that its temporaries stay in a cache.
_PIECE = 1 << 14
# Elements per thread that are converted at a time where the kernel cannot read z directly.
_CONVERTED = 1 << 18


def prox_operator(z: Tensor, lambda_: float | Tensor) -> Tensor:
    """The global minimizer of `½‖w − z‖² + λ r(w)` over every four consecutive entries.

    Args:
        z: (..., C), floating point, C divisible by 4. Not modified; may be non-contiguous.
        lambda_: λ ≥ 0, a number or a tensor of shape `z.shape[:-1]` (one value per row); infinity
            keeps the two largest.

    Returns:
        (..., C) in the dtype of `z`, a new tensor, with the signs and the order of `z`. Among equal
        magnitudes any one may be pruned. bfloat16 and float16 are computed in float32, float64 in
        float64. A NaN in a group, or as its λ, makes the whole group NaN.

    Raises:
        ValueError: C is not divisible by 4, λ is negative or of another shape, or z is not
            floating point.

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
    elif z.device.type == "cuda" and _triton_kernels() is not None:
        settings = (NEWTON_STEPS[compute], NEWTON_TOLERANCE[compute])
        result = _triton_kernels().prox_triton(rows.contiguous(), per_row, *settings)
    else:
        result = prox_torch(rows, per_row)
    return result.reshape(z.shape)


@cache
def _numba_kernels() -> Any:
    """The module with the CPU kernel; None where numba is not installed."""
    if find_spec("numba") is None:
        return None
    return import_module("pipeline.solvers.kernels.prox_numba")


@cache
def _triton_kernels() -> Any:
    """The module with the GPU kernel; None where Triton is not installed."""
    if find_spec("triton") is None:
        return None
    return import_module("pipeline.solvers.kernels.prox_triton")


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


def prox_torch(rows: Tensor, per_row: Tensor) -> Tensor:
    """`prox_operator` in plain torch operations, on any device.

    Args:
        rows: (R, C), C divisible by 4.
        per_row: (1,) or (R,), λ in the compute dtype (float32 or float64).

    Used where neither numba nor Triton is installed. The arithmetic is that of the kernels, but it
    makes many passes over temporaries.
    """
    groups = rows.reshape(-1, 4)
    result = torch.empty_like(groups)
    lam = per_row
    if len(per_row) > 1:
        lam = per_row.repeat_interleave(rows.shape[1] // 4)
    for start in range(0, len(groups), _PIECE):
        piece = slice(start, start + _PIECE)
        here = lam if len(lam) == 1 else lam[piece]
        result[piece] = _prox_groups(groups[piece].to(per_row.dtype), here).to(rows.dtype)
    return result.reshape(rows.shape)


# The comparators of a sorting network for four, largest first.
_NETWORK = ((0, 2), (1, 3), (0, 1), (2, 3), (1, 2))


def _prox_groups(z: Tensor, lam: Tensor) -> Tensor:
    """(n, 4) groups and (n,) or (1,) λ of one dtype -> (n, 4)."""
    magnitude = z.abs()
    # Sorted before scaling: λ may round two magnitudes, or two infinities, to the same value.
    sizes, swaps = list(magnitude.unbind(1)), []
    for i, j in _NETWORK:
        swap = sizes[i] < sizes[j]
        sizes[i], sizes[j] = (
            torch.where(swap, sizes[j], sizes[i]),
            torch.where(swap, sizes[i], sizes[j]),
        )
        swaps.append(swap)
    # 0·inf would be NaN: an infinite λ does not change zeros, λ = 0 does not change infinities.
    largest = torch.finfo(z.dtype).max
    scaled = (lam * torch.where(size > largest, largest, size) for size in sizes)
    u = [torch.where(m > 0, v, m) for m, v in zip(sizes, scaled, strict=True)]
    decided = two_largest_decided(*u)
    # A decided group may contain infinities: solve zeros in its place.
    v = [torch.where(decided, 0.0, value) for value in u]
    shrink = list(_shrinkage(*v))
    divisor = lam.clamp(min=torch.finfo(lam.dtype).tiny)
    shrink = [torch.where(decided, 0.0, value / divisor) for value in shrink]
    shrink[2] = shrink[2].masked_fill(decided, torch.inf)
    shrink[3] = shrink[3].masked_fill(decided, torch.inf)
    for (i, j), swap in zip(reversed(_NETWORK), reversed(swaps), strict=True):
        shrink[i], shrink[j] = (
            torch.where(swap, shrink[j], shrink[i]),
            torch.where(swap, shrink[i], shrink[j]),
        )
    left = (magnitude - torch.stack(shrink, 1)).clamp(min=0)
    # z itself where nothing is subtracted, so that -0.0 stays; +0.0 for every pruned entry.
    result = torch.where(left == magnitude, z, torch.where(z < 0, 0 - left, left))
    poison = magnitude.sum(1) + lam
    return torch.where(poison.isnan()[:, None], torch.nan, result)


def two_largest_decided(u1: Tensor, u2: Tensor, u3: Tensor, u4: Tensor) -> Tensor:
    """(n,) bool: True where keeping the two largest is proved optimal; False means "not known"."""
    slack = 0.5 + 0.5 * (u1 - u2)
    area = 0.5 * (u1 + u2) * u2
    side = slack + u3
    gain = torch.where(area < slack, area <= u3, 4 * slack * area < side * side)
    # NaN compares false, so it counts as decided; it is restored at the end.
    return ~(gain & (u1 < 2))


def _shrinkage(u1: Tensor, u2: Tensor, u3: Tensor, u4: Tensor) -> tuple[Tensor, ...]:
    """What the best candidate subtracts from each sorted `u`; infinity where it prunes."""
    two = 0.5 * (u3 * u3 + u4 * u4)
    b1, b2, b3 = _three_kept(u1, u2, u3)
    t1, t2, t3 = b2 * b3, b1 * b3, b1 * b2
    b1, b2, b3 = u1 - t1, u2 - t2, (u3 - t3).clamp(min=0)
    three = 0.5 * (t1 * t1 + t2 * t2 + (b3 - u3).square() + u4 * u4) + b1 * b2 * b3
    c1, c2, c3, c4 = _four_kept(u1, u2, u3, u4)
    f1, f2 = _pairs(c2, c3, c4), _pairs(c1, c3, c4)
    f3, f4 = _pairs(c1, c2, c4), _pairs(c1, c2, c3)
    c1, c2 = (u1 - f1).clamp(min=0), (u2 - f2).clamp(min=0)
    c3, c4 = (u3 - f3).clamp(min=0), (u4 - f4).clamp(min=0)
    four = (c1 - u1).square() + (c2 - u2).square() + (c3 - u3).square() + (c4 - u4).square()
    four = 0.5 * four + c1 * c2 * (c3 + c4) + c3 * c4 * (c1 + c2)
    take_four = (four <= three) & (four <= two)
    take_three = ~take_four & (three <= two)
    zero, gone = torch.zeros_like(u1), torch.full_like(u1, torch.inf)
    return (
        torch.where(take_four, f1, torch.where(take_three, t1, zero)),
        torch.where(take_four, f2, torch.where(take_three, t2, zero)),
        torch.where(take_four, f3, torch.where(take_three, t3, gone)),
        torch.where(take_four, f4, gone),
    )


def _pairs(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a * (b + c) + b * c


def _newton_step(
    at: Tensor, value: Tensor, slope: Tensor, low: Tensor, active: Tensor, tolerance: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of Newton's method to the left, not beyond `low`.

    Entries that are not `active` do not change, so that the result of a group does not depend on
    the groups computed with it. Returns the new values and which entries are still active.
    """
    # Without an upward slope there is no root: the lower bound is the candidate.
    following = torch.where(slope > 0, at - value / slope, low)
    following = torch.maximum(torch.minimum(following, at), low)
    following = torch.where(active, following, at)
    return following, active & (at - following > tolerance)


def _three_kept(u1: Tensor, u2: Tensor, u3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k1, k2 = (u1 - u3) * (u1 + u3), (u2 - u3) * (u2 + u3)
    tiny = torch.finfo(u1.dtype).tiny
    tolerance = NEWTON_TOLERANCE[u1.dtype] * u3
    low, active = -u3, torch.ones_like(u3, dtype=torch.bool)
    # The first step, from q = u3, where the roots are u1 and u2.
    area = u1 * u2
    slope = (area + u3 * (u1 * u1 + u2 * u2)).clamp(min=tiny)
    q = torch.maximum(u3 - 2 * area * (area / slope), low)
    for _ in range(NEWTON_STEPS[u1.dtype]):
        root1, root2 = (q * q + k1).sqrt(), (q * q + k2).sqrt()
        x1, x2 = u1 + root1, u2 + root2
        value = 0.5 * x1 * x2 + q - u3
        slope = 1 + 0.5 * q * (x1 / root2.clamp(min=tiny) + x2 / root1.clamp(min=tiny))
        q, active = _newton_step(q, value, slope, low, active, tolerance)
    root1, root2 = (q * q + k1).sqrt(), (q * q + k2).sqrt()
    return 0.5 * (u1 + root1), 0.5 * (u2 + root2), 0.5 * (u3 + q)


def _four_kept(u1: Tensor, u2: Tensor, u3: Tensor, u4: Tensor) -> tuple[Tensor, ...]:
    total = u1 + u2 + u3 + u4
    least = u1 + u2 + u3 - u4
    on_q = 2 * least >= 1
    k0 = (2 * least - 1).abs()
    lift = torch.where(on_q, torch.zeros_like(k0), k0)
    k1, k2, k3 = 4 * (u1 - u4) + lift, 4 * (u2 - u4) + lift, 4 * (u3 - u4) + lift
    outer = torch.where(on_q, 1.0, 0.5).to(u1.dtype)
    inner = 1.5 - outer
    low = torch.where(on_q, 1 - least, least)
    t = torch.where(on_q, ((1 - total).square() + 4 * u4).sqrt(), total)
    tiny = torch.finfo(u1.dtype).tiny
    tolerance = torch.full_like(t, NEWTON_TOLERANCE[u1.dtype])
    active = torch.ones_like(on_q)
    for _ in range(NEWTON_STEPS[u1.dtype]):
        square = t * t
        r0, r1 = (square + k0).sqrt(), (square + k1).sqrt()
        r2, r3 = (square + k2).sqrt(), (square + k3).sqrt()
        value = outer * r0 + 0.5 * (r1 + r2 + r3) + inner * t - 2
        slope = inner + t * (
            outer / r0.clamp(min=tiny)
            + 0.5 * (1 / r1.clamp(min=tiny) + 1 / r2.clamp(min=tiny) + 1 / r3.clamp(min=tiny))
        )
        t, active = _newton_step(t, value, slope, low, active, tolerance)
    square = t * t
    r0, r1 = (square + k0).sqrt(), (square + k1).sqrt()
    r2, r3 = (square + k2).sqrt(), (square + k3).sqrt()
    total, q = torch.where(on_q, r0, t), torch.where(on_q, t, r0)
    return tuple(0.5 * (total - 1 + root).clamp(min=0) for root in (r1, r2, r3, q))
