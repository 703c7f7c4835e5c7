"""The proximal operator as one pass over memory on a CPU, compiled by numba.

The mathematics and the names are those of `prox_operator`. A piece of `PIECE` groups is read into a
buffer that stays in the first-level cache, processed there, and written. Loops over groups have no
branches and no carried values, so LLVM vectorizes them. No fast-math flag is set: each group is
rounded the same at any position, and NaN and infinity are handled as IEEE 754 says. Newton's
method runs over packed lists of the groups that need it. An entry that has converged no longer
changes, and the iteration ends when all entries have converged.

This module imports numba; `prox_operator` imports this module only where numba is installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.runtime.threads import in_pieces, shares

GROUPS_OF_A_THREAD = 1 << 12  # below this another thread does not pay
PIECE = 256  # groups in a buffer: 24 float32 arrays of this length are 24 KiB
_LANES = 64  # lists are padded with zeros to a multiple of this, which any vector width divides

# Arrays in the buffer, by their first index. One base pointer with constant offsets, because LLVM
# cannot prove that many separate arrays do not overlap. 1 to 4: sorted, largest first.
LAMBDA = 0
_U1, _U2, _U3, _U4 = PIECE, 2 * PIECE, 3 * PIECE, 4 * PIECE
_S1, _S2, _S3, _S4 = 5 * PIECE, 6 * PIECE, 7 * PIECE, 8 * PIECE  # to subtract; infinity prunes
_OPEN = 9 * PIECE  # 1 where keeping the two largest is not proved optimal
# Packed lists.
_P1, _P2, _P3, _P4 = 10 * PIECE, 11 * PIECE, 12 * PIECE, 13 * PIECE
_E1, _E2, _E3, _E4 = 14 * PIECE, 15 * PIECE, 16 * PIECE, 17 * PIECE
_BEST = 18 * PIECE  # F of the best candidate so far
_NEWTON = 19 * PIECE  # the variable of Newton's method
_ACTIVE = 20 * PIECE  # 1 until it has converged
_K0, _K1, _K2, _K3 = 21 * PIECE, 22 * PIECE, 23 * PIECE, 24 * PIECE
_ON_Q = 25 * PIECE  # 1 where the variable is q, 1/2 where it is s
BUFFER = 26 * PIECE

Array = NDArray[Any]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    options = {"error_model": "numpy", "nogil": True, "boundscheck": False}
    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # no directory that numba could write its cache to
        return numba.njit(**options)(function)  # type: ignore[no-any-return]


@compiled
def load(z, buffer):  # type: ignore[no-untyped-def]
    """Sort |z| within each group, scale it by λ, and mark the groups that need Newton's method."""
    real = z.dtype.type
    zero, half, one, two, four = real(0), real(0.5), real(1), real(2), real(4)
    largest, infinity = real(np.finfo(z.dtype).max), real(np.inf)
    for j in range(PIECE):
        lam = buffer[LAMBDA + j]
        a, b, c, d = abs(z[4 * j]), abs(z[4 * j + 1]), abs(z[4 * j + 2]), abs(z[4 * j + 3])
        # Sorted before scaling: λ may round two magnitudes, or two infinities, to the same value.
        a, c = (c if a < c else a), (a if a < c else c)
        b, d = (d if b < d else b), (b if b < d else d)
        a, b = (b if a < b else a), (a if a < b else b)
        c, d = (d if c < d else c), (c if c < d else d)
        b, c = (c if b < c else b), (b if b < c else c)
        # 0·inf would be NaN: an infinite λ does not change zeros, λ = 0 does not change infinities.
        a = lam * (largest if a > largest else a) if a > zero else a
        b = lam * (largest if b > largest else b) if b > zero else b
        c = lam * (largest if c > largest else c) if c > zero else c
        d = lam * (largest if d > largest else d) if d > zero else d
        slack = half + half * (a - b)
        area = half * (a + b) * b
        side = slack + c
        below = area if area < slack else four * slack * area
        above = c if area < slack else side * side
        buffer[_OPEN + j] = one if (below <= above) & (a < two) else zero
        buffer[_U1 + j], buffer[_U2 + j] = a, b
        buffer[_U3 + j], buffer[_U4 + j] = c, d
        buffer[_S1 + j], buffer[_S2 + j] = zero, zero
        buffer[_S3 + j], buffer[_S4 + j] = infinity, infinity


@compiled
def _pack(buffer, places, flag, count, source, to):  # type: ignore[no-untyped-def]
    """Gather the four `source` arrays where `flag` is set; returns the number packed."""
    zero = buffer.dtype.type(0)
    packed = 0
    for j in range(count):
        places[packed] = j
        packed += 1 if buffer[flag + j] > zero else 0
    for i in range(packed):
        j = places[i]
        for k in range(4):
            buffer[to + k * PIECE + i] = buffer[source + k * PIECE + j]
    return packed


@compiled
def _start_four(buffer, count):  # type: ignore[no-untyped-def]
    real = buffer.dtype.type
    zero, half, one, two, four = real(0), real(0.5), real(1), real(2), real(4)
    for j in range(count):
        u1, u2, u3, u4 = buffer[_P1 + j], buffer[_P2 + j], buffer[_P3 + j], buffer[_P4 + j]
        total, least = u1 + u2 + u3 + u4, u1 + u2 + u3 - u4
        k0 = two * least - one
        on_q = k0 >= zero
        lift = zero if on_q else -k0
        buffer[_K0 + j] = abs(k0)
        buffer[_K1 + j] = four * (u1 - u4) + lift
        buffer[_K2 + j] = four * (u2 - u4) + lift
        buffer[_K3 + j] = four * (u3 - u4) + lift
        buffer[_ON_Q + j] = one if on_q else half
        start = math.sqrt((one - total) * (one - total) + four * u4)
        buffer[_NEWTON + j] = start if on_q else total
        buffer[_ACTIVE + j] = one


@compiled
def _newton_four(buffer, count, tolerance):  # type: ignore[no-untyped-def]
    """One step of Newton's method on h; returns the number of entries not yet converged."""
    real = buffer.dtype.type
    zero, half, one, two, most = real(0), real(0.5), real(1), real(2), real(1.5)
    going = 0
    for j in range(count):
        t = buffer[_NEWTON + j]
        square = t * t
        r0, r1 = math.sqrt(square + buffer[_K0 + j]), math.sqrt(square + buffer[_K1 + j])
        r2, r3 = math.sqrt(square + buffer[_K2 + j]), math.sqrt(square + buffer[_K3 + j])
        outer = buffer[_ON_Q + j]
        inner = most - outer
        value = outer * r0 + half * (r1 + r2 + r3) + inner * t - two
        # The slope is inner + t·(outer/r0 + ½(1/r1 + 1/r2 + 1/r3)), times the product of roots.
        r01, r23 = r0 * r1, r2 * r3
        product = r01 * r23
        slope = inner * product + t * (half * (r01 * (r2 + r3) + r0 * r23) + outer * (r1 * r23))
        least = buffer[_P1 + j] + buffer[_P2 + j] + buffer[_P3 + j] - buffer[_P4 + j]
        low = one - least if outer > half else least
        # Without an upward slope there is no root: the lower bound is the candidate.
        following = t - value * product / slope if slope > zero else low
        following = following if following < t else t
        following = following if following > low else low
        active = buffer[_ACTIVE + j]
        following = following if active > zero else t
        moving = t - following > tolerance
        buffer[_NEWTON + j] = following
        buffer[_ACTIVE + j] = active if moving else zero
        going += 1 if moving else 0
    return going


@compiled
def _finish_four(buffer, count):  # type: ignore[no-untyped-def]
    """The better of keeping four and keeping two, and whether keeping three has to be tried."""
    real = buffer.dtype.type
    zero, half, one, two = real(0), real(0.5), real(1), real(2)
    infinity = real(np.inf)
    for j in range(count):
        u1, u2, u3, u4 = buffer[_P1 + j], buffer[_P2 + j], buffer[_P3 + j], buffer[_P4 + j]
        t = buffer[_NEWTON + j]
        square = t * t
        r0, r1 = math.sqrt(square + buffer[_K0 + j]), math.sqrt(square + buffer[_K1 + j])
        r2, r3 = math.sqrt(square + buffer[_K2 + j]), math.sqrt(square + buffer[_K3 + j])
        on_q = buffer[_ON_Q + j] > half
        shift = (r0 if on_q else t) - one
        x1, x2, x3 = half * (shift + r1), half * (shift + r2), half * (shift + r3)
        x4 = half * (shift + (t if on_q else r0))
        x1, x2 = x1 if x1 > zero else zero, x2 if x2 > zero else zero
        x3, x4 = x3 if x3 > zero else zero, x4 if x4 > zero else zero
        s1, s2 = x2 * (x3 + x4) + x3 * x4, x1 * (x3 + x4) + x3 * x4
        s3, s4 = x1 * (x2 + x4) + x2 * x4, x1 * (x2 + x3) + x2 * x3
        x1, x2 = u1 - s1 if u1 > s1 else zero, u2 - s2 if u2 > s2 else zero
        x3, x4 = u3 - s3 if u3 > s3 else zero, u4 - s4 if u4 > s4 else zero
        d1, d2, d3, d4 = x1 - u1, x2 - u2, x3 - u3, x4 - u4
        kept4 = half * (d1 * d1 + d2 * d2 + d3 * d3 + d4 * d4) + (
            x1 * x2 * (x3 + x4) + x3 * x4 * (x1 + x2)
        )
        kept2 = half * (u3 * u3 + u4 * u4)
        better = kept4 <= kept2
        buffer[_E1 + j], buffer[_E2 + j] = s1 if better else zero, s2 if better else zero
        buffer[_E3 + j], buffer[_E4 + j] = s3 if better else infinity, s4 if better else infinity
        buffer[_BEST + j] = kept4 if better else kept2
        # Where the Hessian is diagonally dominant on all of 0 ≤ x ≤ u, F is convex there, and a
        # stationary point with x4 > 0 is the minimum.
        certain = (x4 > zero) & (two * (u1 + u2 + u3) < one)
        buffer[_ACTIVE + j] = zero if certain else one


@compiled
def _start_three(buffer, count):  # type: ignore[no-untyped-def]
    """The first step of Newton's method on k, from q = u3, where the roots are u1 and u2."""
    real = buffer.dtype.type
    one, two, tiny = real(1), real(2), real(np.finfo(buffer.dtype).tiny)
    for j in range(count):
        u1, u2, u3 = buffer[_P1 + j], buffer[_P2 + j], buffer[_P3 + j]
        area = u1 * u2
        slope = area + u3 * (u1 * u1 + u2 * u2)
        q = u3 - two * area * (area / (slope if slope > tiny else tiny))
        buffer[_NEWTON + j] = q if q > -u3 else -u3
        buffer[_ACTIVE + j] = one


@compiled
def _newton_three(buffer, count, tolerance):  # type: ignore[no-untyped-def]
    """One step of Newton's method on k; returns the number of entries not yet converged."""
    real = buffer.dtype.type
    zero, half = real(0), real(0.5)
    going = 0
    for j in range(count):
        u1, u2, u3 = buffer[_P1 + j], buffer[_P2 + j], buffer[_P3 + j]
        q = buffer[_NEWTON + j]
        square = q * q
        r1 = math.sqrt(square + (u1 - u3) * (u1 + u3))
        r2 = math.sqrt(square + (u2 - u3) * (u2 + u3))
        x1, x2 = u1 + r1, u2 + r2
        value = half * x1 * x2 + q - u3
        # The slope is 1 + ½ q (x1/r2 + x2/r1), times the product of roots.
        product = r1 * r2
        slope = product + half * q * (x1 * r1 + x2 * r2)
        following = q - value * product / slope if slope > zero else -u3
        following = following if following < q else q
        following = following if following > -u3 else -u3
        active = buffer[_ACTIVE + j]
        following = following if active > zero else q
        moving = q - following > tolerance * u3
        buffer[_NEWTON + j] = following
        buffer[_ACTIVE + j] = active if moving else zero
        going += 1 if moving else 0
    return going


@compiled
def _finish_three(buffer, count):  # type: ignore[no-untyped-def]
    """What keeping three subtracts, and its F."""
    real = buffer.dtype.type
    zero, half = real(0), real(0.5)
    for j in range(count):
        u1, u2, u3, u4 = buffer[_P1 + j], buffer[_P2 + j], buffer[_P3 + j], buffer[_P4 + j]
        q = buffer[_NEWTON + j]
        square = q * q
        x1 = half * (u1 + math.sqrt(square + (u1 - u3) * (u1 + u3)))
        x2 = half * (u2 + math.sqrt(square + (u2 - u3) * (u2 + u3)))
        x3 = half * (u3 + q)
        s1, s2, s3 = x2 * x3, x1 * x3, x1 * x2
        x1, x2 = u1 - s1 if u1 > s1 else zero, u2 - s2 if u2 > s2 else zero
        x3 = u3 - s3 if u3 > s3 else zero
        d1, d2, d3 = x1 - u1, x2 - u2, x3 - u3
        buffer[_K1 + j], buffer[_K2 + j], buffer[_K3 + j] = s1, s2, s3
        buffer[_K0 + j] = half * (d1 * d1 + d2 * d2 + d3 * d3 + u4 * u4) + x1 * x2 * x3


@compiled
def store(z, buffer, result):  # type: ignore[no-untyped-def]
    """Undo the sorting of what is to be subtracted, and subtract it."""
    real = z.dtype.type
    zero, one = real(0), real(1)
    tiny, infinity = real(np.finfo(z.dtype).tiny), real(np.inf)
    for j in range(PIECE):
        lam = buffer[LAMBDA + j]
        z1, z2, z3, z4 = z[4 * j], z[4 * j + 1], z[4 * j + 2], z[4 * j + 3]
        m1, m2, m3, m4 = abs(z1), abs(z2), abs(z3), abs(z4)
        a, b, c, d = m1, m2, m3, m4
        swap_ac, swap_bd = a < c, b < d
        a, c = (c if swap_ac else a), (a if swap_ac else c)
        b, d = (d if swap_bd else b), (b if swap_bd else d)
        swap_ab, swap_cd = a < b, c < d
        b = a if swap_ab else b
        c = d if swap_cd else c
        swap_bc = b < c
        s1, s2, s3, s4 = buffer[_S1 + j], buffer[_S2 + j], buffer[_S3 + j], buffer[_S4 + j]
        s2, s3 = (s3 if swap_bc else s2), (s2 if swap_bc else s3)
        s1, s2 = (s2 if swap_ab else s1), (s1 if swap_ab else s2)
        s3, s4 = (s4 if swap_cd else s3), (s3 if swap_cd else s4)
        s1, s3 = (s3 if swap_ac else s1), (s1 if swap_ac else s3)
        s2, s4 = (s4 if swap_bd else s2), (s2 if swap_bd else s4)
        inverse = one / (lam if lam > tiny else tiny)
        w1 = m1 - s1 * inverse if s1 < infinity else zero
        w2 = m2 - s2 * inverse if s2 < infinity else zero
        w3 = m3 - s3 * inverse if s3 < infinity else zero
        w4 = m4 - s4 * inverse if s4 < infinity else zero
        w1, w2 = w1 if w1 > zero else zero, w2 if w2 > zero else zero
        w3, w4 = w3 if w3 > zero else zero, w4 if w4 > zero else zero
        # z itself where nothing is subtracted, so that -0.0 stays; +0.0 for every pruned entry.
        w1 = z1 if w1 == m1 else (zero - w1 if z1 < zero else w1)
        w2 = z2 if w2 == m2 else (zero - w2 if z2 < zero else w2)
        w3 = z3 if w3 == m3 else (zero - w3 if z3 < zero else w3)
        w4 = z4 if w4 == m4 else (zero - w4 if z4 < zero else w4)
        poison = m1 + m2 + m3 + m4 + lam
        broken = poison != poison
        result[4 * j] = poison if broken else w1
        result[4 * j + 1] = poison if broken else w2
        result[4 * j + 2] = poison if broken else w3
        result[4 * j + 3] = poison if broken else w4


@compiled
def _fill_up(buffer, count):  # type: ignore[no-untyped-def]
    """Pad a packed list with zeros to whole vectors; returns the padded length."""
    filled = (count + _LANES - 1) // _LANES * _LANES
    for k in range(4):
        for i in range(count, filled):
            buffer[_P1 + k * PIECE + i] = 0
    return filled


@compiled
def solve(buffer, places, inner_places, steps, tolerance):  # type: ignore[no-untyped-def]
    """Newton's method for the open groups of a loaded piece; sets what is to be subtracted."""
    real = buffer.dtype.type
    packed = _pack(buffer, places, _OPEN, PIECE, _U1, _P1)
    if packed == 0:
        return
    filled = _fill_up(buffer, packed)
    _start_four(buffer, filled)
    for _ in range(steps):
        if _newton_four(buffer, filled, tolerance) == 0:
            break
    _finish_four(buffer, filled)
    # _P1 to _P4 are read at or after the index being written, so they can be packed in place.
    inner = _pack(buffer, inner_places, _ACTIVE, packed, _P1, _P1)
    if inner > 0:
        filled = _fill_up(buffer, inner)
        _start_three(buffer, filled)
        for _ in range(steps):
            if _newton_three(buffer, filled, tolerance) == 0:
                break
        _finish_three(buffer, filled)
    for i in range(inner):
        j = inner_places[i]
        if buffer[_K0 + i] < buffer[_BEST + j]:
            buffer[_E1 + j], buffer[_E2 + j] = buffer[_K1 + i], buffer[_K2 + i]
            buffer[_E3 + j], buffer[_E4 + j] = buffer[_K3 + i], real(np.inf)
    for i in range(packed):
        j = places[i]
        for k in range(4):
            buffer[_S1 + k * PIECE + j] = buffer[_E1 + k * PIECE + i]


@compiled
def _run(z, lam, groups, start, stop, result, steps, tolerance):  # type: ignore[no-untyped-def]
    """Groups start to stop of flat `z`. groups: number of groups that share one entry of `lam`."""
    buffer = np.zeros(BUFFER, z.dtype)
    places, inner_places = np.zeros(PIECE + 1, np.int64), np.zeros(PIECE + 1, np.int64)
    tail, tail_result = np.zeros(4 * PIECE, z.dtype), np.zeros(4 * PIECE, z.dtype)
    for j in range(PIECE):
        buffer[LAMBDA + j] = lam[0]
    for first in range(start, stop, PIECE):
        here = min(PIECE, stop - first)
        if lam.size > 1:
            for j in range(here):
                buffer[LAMBDA + j] = lam[(first + j) // groups]
        if here == PIECE:
            piece = z[4 * first : 4 * first + 4 * PIECE]
            load(piece, buffer)
            solve(buffer, places, inner_places, steps, tolerance)
            store(piece, buffer, result[4 * first : 4 * first + 4 * PIECE])
        else:
            tail[: 4 * here] = z[4 * first : 4 * stop]
            load(tail, buffer)
            solve(buffer, places, inner_places, steps, tolerance)
            store(tail, buffer, tail_result)
            result[4 * first : 4 * stop] = tail_result[: 4 * here]


def prox_numba(z: Array, lam: Array, result: Array, *, steps: int, tolerance: float) -> None:
    """Write the proximal operator of `z` into `result`.

    Args:
        z, result: (R, C), float32 or float64, C-contiguous.
        lam: (1,) or (R,), of the same dtype.
        steps, tolerance: the most steps and the tolerance of Newton's method.
    """
    arguments = (z.reshape(-1), lam, max(z.shape[1] // 4, 1))
    rest = (result.reshape(-1), steps, z.dtype.type(tolerance))
    in_pieces(
        lambda part: _run(*arguments, part.start, part.stop, *rest),
        shares(z.size // 4, GROUPS_OF_A_THREAD),
    )
