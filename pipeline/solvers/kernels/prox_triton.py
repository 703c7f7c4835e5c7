"""The proximal operator as one pass over memory on a GPU, in Triton.

The mathematics and the names are those of `prox_operator`, the steps those of `prox_numba`. A
program keeps its groups in registers from the read to the write. It has one warp, so that ending
Newton's method when all its groups have converged needs no barrier. A group that has converged no
longer changes, so its result does not depend on its neighbours.

The hardware's fp32 roots are approximate, and those of `h` are near 1: where all λ|z| are small, an
ulp of such a root would be more than the x of the four kept. So no root is taken there.

This module imports Triton; `prox_operator` imports this module only where Triton is installed.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

# Where all λ|z| are below this, two steps of the fixed-point equation suffice: the error of what is
# subtracted is at most 108 u^4, with u the largest λ|z|, which is less than rounding u.
SMALL = {torch.float32: 2.0**-11, torch.float64: 2.0**-20}

# Groups in a program and its warps; `benchmarks/prox_operator.py --device cuda --sweep` compares.
# In float64 four groups in a thread would need more registers than there are.
BLOCKS = {torch.float32: 128, torch.float64: 32}
WARPS = 1


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _order(a, b):  # type: ignore[no-untyped-def]
    swap = a < b
    return tl.where(swap, b, a), tl.where(swap, a, b), swap


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _swap(a, b, swap):  # type: ignore[no-untyped-def]
    return tl.where(swap, b, a), tl.where(swap, a, b)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _scale(m, lam, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    # 0·inf would be NaN: an infinite λ does not change zeros, λ = 0 does not change infinities.
    return tl.where(m > 0, lam * tl.where(m > LARGEST, LARGEST, m), m)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _positive(x):  # type: ignore[no-untyped-def]
    return tl.where(x > 0, x, 0.0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _inverse_root(x):  # type: ignore[no-untyped-def]
    # A floor instead of zero: the hardware treats denormals as zero and returns infinity.
    return tl.rsqrt(tl.where(x > 1e-36, x, 1e-36))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _descend(at, value, slope, low, active, tolerance):  # type: ignore[no-untyped-def]
    # Without an upward slope there is no root: the lower bound is the candidate.
    # The square of the inverse root is 1 / slope without the corrections of a division: faster.
    inverse = _inverse_root(slope)
    following = tl.where(slope > 0, at - value * (inverse * inverse), low)
    following = tl.where(following < at, following, at)
    following = tl.where(following > low, following, low)
    following = tl.where(active > 0, following, at)
    return following, tl.where(at - following > tolerance, active, 0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _four_kept(u1, u2, u3, u4, active, STEPS: tl.constexpr, TOLERANCE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What keeping four subtracts, and its F: Newton's method on h."""
    total, least = u1 + u2 + u3 + u4, u1 + u2 + u3 - u4
    k0 = 2 * least - 1
    on_q = k0 >= 0
    lift = tl.where(on_q, 0.0, -k0)
    k0 = tl.abs(k0)
    k1, k2, k3 = 4 * (u1 - u4) + lift, 4 * (u2 - u4) + lift, 4 * (u3 - u4) + lift
    outer = tl.where(on_q, 1.0, 0.5)
    outer = outer.to(u1.dtype)
    inner = 1.5 - outer
    low = tl.where(on_q, 1 - least, least)
    t = tl.where(on_q, tl.sqrt((1 - total) * (1 - total) + 4 * u4), total)
    step = 0
    going = tl.max(active, 0)
    while going > 0:
        square = t * t
        i0, i1 = _inverse_root(square + k0), _inverse_root(square + k1)
        i2, i3 = _inverse_root(square + k2), _inverse_root(square + k3)
        roots = (square + k1) * i1 + (square + k2) * i2 + (square + k3) * i3
        value = outer * ((square + k0) * i0) + 0.5 * roots + (inner * t - 2)
        slope = inner + t * (outer * i0 + 0.5 * (i1 + i2 + i3))
        t, active = _descend(t, value, slope, low, active, TOLERANCE)
        step += 1
        going = tl.where(step < STEPS, tl.max(active, 0), 0)
    square = t * t
    r0, r1 = tl.sqrt(square + k0), tl.sqrt(square + k1)
    r2, r3 = tl.sqrt(square + k2), tl.sqrt(square + k3)
    shift = tl.where(on_q, r0, t) - 1
    x1, x2 = _positive(0.5 * (shift + r1)), _positive(0.5 * (shift + r2))
    x3, x4 = _positive(0.5 * (shift + r3)), _positive(0.5 * (shift + tl.where(on_q, t, r0)))
    s1, s2 = x2 * (x3 + x4) + x3 * x4, x1 * (x3 + x4) + x3 * x4
    s3, s4 = x1 * (x2 + x4) + x2 * x4, x1 * (x2 + x3) + x2 * x3
    x1, x2, x3, x4 = _positive(u1 - s1), _positive(u2 - s2), _positive(u3 - s3), _positive(u4 - s4)
    d1, d2, d3, d4 = x1 - u1, x2 - u2, x3 - u3, x4 - u4
    kept = 0.5 * (d1 * d1 + d2 * d2 + d3 * d3 + d4 * d4)
    kept += x1 * x2 * (x3 + x4) + x3 * x4 * (x1 + x2)
    return s1, s2, s3, s4, x4, kept


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _three_kept(u1, u2, u3, u4, active, STEPS: tl.constexpr, TOLERANCE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What keeping three subtracts, and its F: Newton's method on k."""
    k1, k2 = (u1 - u3) * (u1 + u3), (u2 - u3) * (u2 + u3)
    # The first step, from q = u3, where the roots are u1 and u2.
    area = u1 * u2
    slope = area + u3 * (u1 * u1 + u2 * u2)
    q = u3 - 2 * area * (area / tl.where(slope > 1e-36, slope, 1e-36))
    q = tl.where(q > -u3, q, -u3)
    step = 0
    going = tl.max(active, 0)
    while going > 0:
        square = q * q
        i1, i2 = _inverse_root(square + k1), _inverse_root(square + k2)
        x1, x2 = u1 + (square + k1) * i1, u2 + (square + k2) * i2
        value = 0.5 * x1 * x2 + (q - u3)
        slope = 1 + 0.5 * q * (x1 * i2 + x2 * i1)
        q, active = _descend(q, value, slope, -u3, active, TOLERANCE * u3)
        step += 1
        going = tl.where(step < STEPS, tl.max(active, 0), 0)
    square = q * q
    x1, x2 = 0.5 * (u1 + tl.sqrt(square + k1)), 0.5 * (u2 + tl.sqrt(square + k2))
    x3 = 0.5 * (u3 + q)
    s1, s2, s3 = x2 * x3, x1 * x3, x1 * x2
    x1, x2, x3 = _positive(u1 - s1), _positive(u2 - s2), _positive(u3 - s3)
    d1, d2, d3 = x1 - u1, x2 - u2, x3 - u3
    kept = 0.5 * (d1 * d1 + d2 * d2 + d3 * d3 + u4 * u4) + x1 * x2 * x3
    return s1, s2, s3, kept


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _pairs(a, b, c):  # type: ignore[no-untyped-def]
    return a * (b + c) + b * c


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _small(a, b, c, d):  # type: ignore[no-untyped-def]
    """What is subtracted where λ|z| is small: x = max(0, u - e2(the other x)), from x = u.

    There the Hessian is diagonally dominant on all of 0 ≤ x ≤ u: the solution is the minimum.
    """
    x1, x2 = _positive(a - _pairs(b, c, d)), _positive(b - _pairs(a, c, d))
    x3, x4 = _positive(c - _pairs(a, b, d)), _positive(d - _pairs(a, b, c))
    return _pairs(x2, x3, x4), _pairs(x1, x3, x4), _pairs(x1, x2, x4), _pairs(x1, x2, x3)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _shrinkage(a, b, c, d, STEPS: tl.constexpr, TOLERANCE: tl.constexpr, SMALL: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the best candidate subtracts from each sorted λ|z|; infinity where it prunes."""
    zero = tl.zeros_like(a)
    gone = zero + float("inf")
    slack, area = 0.5 + 0.5 * (a - b), 0.5 * (a + b) * b
    side = slack + c
    below = tl.where(area < slack, area, 4 * slack * area)
    above = tl.where(area < slack, c, side * side)
    # False for NaN, which is restored at the end.
    small = (below <= above) & (a < SMALL)
    open_ = ((below <= above) & (a < 2) & (a >= SMALL)).to(tl.int32)
    f1, f2, f3, f4 = _small(a, b, c, d)
    s1, s2 = tl.where(small, f1, zero), tl.where(small, f2, zero)
    s3, s4 = tl.where(small, f3, gone), tl.where(small, f4, gone)
    if tl.max(open_, 0) > 0:
        solve = open_ > 0
        a, b = tl.where(solve, a, 0.0), tl.where(solve, b, 0.0)
        c, d = tl.where(solve, c, 0.0), tl.where(solve, d, 0.0)
        f1, f2, f3, f4, x4, four = _four_kept(a, b, c, d, open_, STEPS, TOLERANCE)
        best = 0.5 * (c * c + d * d)
        take = solve & (four <= best)
        best = tl.where(take, four, best)
        s1, s2 = tl.where(take, f1, s1), tl.where(take, f2, s2)
        s3, s4 = tl.where(take, f3, s3), tl.where(take, f4, s4)
        # Where the Hessian is diagonally dominant on all of 0 ≤ x ≤ u, F is convex there, and a
        # stationary point with x4 > 0 is the minimum.
        certain = (x4 > 0) & (2 * (a + b + c) < 1)
        open_ = tl.where(certain, 0, open_)
        if tl.max(open_, 0) > 0:
            f1, f2, f3, three = _three_kept(a, b, c, d, open_, STEPS, TOLERANCE)
            take = (open_ > 0) & (three < best)
            s1, s2 = tl.where(take, f1, s1), tl.where(take, f2, s2)
            s3, s4 = tl.where(take, f3, s3), tl.where(take, gone, s4)
    # Rounding depends on the compiler: make sure that a smaller entry never loses less.
    s2 = tl.where(s2 > s1, s2, s1)
    s3 = tl.where(s3 > s2, s3, s2)
    s4 = tl.where(s4 > s3, s4, s3)
    return s1, s2, s3, s4


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _take(z, m, s, inverse):  # type: ignore[no-untyped-def]
    left = _positive(tl.where(s < float("inf"), m - s * inverse, 0.0))
    # z itself where nothing is subtracted, so that -0.0 stays; +0.0 for every pruned entry.
    return tl.where(left == m, z, tl.where(z < 0, 0 - left, left))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _operator(  # type: ignore[no-untyped-def]
    source,
    lambdas,
    target,
    groups,
    blocks,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    TOLERANCE: tl.constexpr,
    LARGEST: tl.constexpr,
    TINY: tl.constexpr,
    SMALL: tl.constexpr,
):
    """One program: BLOCK groups of one row of `groups`, which has one λ."""
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    lane = tl.arange(0, BLOCK)
    # Only the offset of the program can exceed 2³¹.
    base = (row.to(tl.int64) * groups + block * BLOCK) * 4
    places = base + (lane[:, None] * 4 + tl.arange(0, 4)[None, :])
    inside = (block * BLOCK + lane < groups)[:, None]
    lam = tl.load(lambdas + row)
    loaded = tl.load(source + places, mask=inside, other=0.0)
    z = loaded.to(lam.dtype)
    even, odd = tl.split(tl.reshape(z, (BLOCK, 2, 2)))
    z1, z3 = tl.split(even)
    z2, z4 = tl.split(odd)
    m1, m2, m3, m4 = tl.abs(z1), tl.abs(z2), tl.abs(z3), tl.abs(z4)
    # Sorted before scaling: λ may round two magnitudes, or two infinities, to the same value.
    a, c, swap_ac = _order(m1, m3)
    b, d, swap_bd = _order(m2, m4)
    a, b, swap_ab = _order(a, b)
    c, d, swap_cd = _order(c, d)
    b, c, swap_bc = _order(b, c)
    s1, s2, s3, s4 = _shrinkage(
        _scale(a, lam, LARGEST),
        _scale(b, lam, LARGEST),
        _scale(c, lam, LARGEST),
        _scale(d, lam, LARGEST),
        STEPS,
        TOLERANCE,
        SMALL,
    )
    s2, s3 = _swap(s2, s3, swap_bc)
    s3, s4 = _swap(s3, s4, swap_cd)
    s1, s2 = _swap(s1, s2, swap_ab)
    s2, s4 = _swap(s2, s4, swap_bd)
    s1, s3 = _swap(s1, s3, swap_ac)
    inverse = 1 / tl.where(lam > TINY, lam, TINY)
    even = tl.join(_take(z1, m1, s1, inverse), _take(z3, m3, s3, inverse))
    odd = tl.join(_take(z2, m2, s2, inverse), _take(z4, m4, s4, inverse))
    poison = m1 + m2 + m3 + m4 + lam
    w = tl.reshape(tl.join(even, odd), (BLOCK, 4))
    w = tl.where((poison != poison)[:, None], poison[:, None], w)
    tl.store(target + places, w.to(loaded.dtype), mask=inside)


def prox_triton(
    rows: Tensor,
    per_row: Tensor,
    steps: int,
    tolerance: float,
    *,
    block: int | None = None,
    warps: int = WARPS,
) -> Tensor:
    """The proximal operator of `rows`.

    Args:
        rows: (R, C) on a GPU, contiguous, any floating dtype.
        per_row: (1,) or (R,), λ in the compute dtype.
        steps, tolerance: the most steps and the tolerance of Newton's method.
        block, warps: groups and warps of a program, each a power of two.

    Returns:
        (R, C) in the dtype of `rows`.
    """
    result = torch.empty_like(rows)
    block = block or BLOCKS[per_row.dtype]
    groups = rows.numel() // 4 // len(per_row)
    blocks = triton.cdiv(groups, block)
    limits = torch.finfo(per_row.dtype)
    with torch.cuda.device(rows.device):
        _operator[(len(per_row) * blocks,)](
            rows,
            per_row,
            result,
            groups,
            blocks,
            BLOCK=block,
            STEPS=steps,
            TOLERANCE=tolerance,
            LARGEST=limits.max,
            TINY=limits.tiny,
            SMALL=SMALL[per_row.dtype],
            num_warps=warps,
            enable_fp_fusion=True,  # the default differs between versions of Triton
        )
    return result
