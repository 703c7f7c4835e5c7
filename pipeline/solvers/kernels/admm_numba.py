"""An ADMM iteration without its matrix product, as one pass over memory on a CPU, with numba.

The arithmetic is that of `prox_admm.advance_torch`, with the operator from `prox_numba`.
This module imports numba; `prox_admm` imports this module only where numba is installed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from pipeline.runtime.threads import in_pieces, shares
from pipeline.solvers.kernels.prox_numba import (
    BUFFER,
    GROUPS_OF_A_THREAD,
    LAMBDA,
    PIECE,
    Array,
    compiled,
    load,
    solve,
    store,
)


@compiled
def _advance(  # type: ignore[no-untyped-def]
    product, dual, sparse, linear, numbers, start, stop, steps, tolerance
):
    """Groups start to stop of flat arrays, in place. The last piece is padded with zeros."""
    strength, relaxation, shrink, rho = numbers[0], numbers[1], numbers[2], numbers[3]
    rest = product.dtype.type(1) - relaxation
    buffer = np.zeros(BUFFER, product.dtype)
    places, inner_places = np.zeros(PIECE + 1, np.int64), np.zeros(PIECE + 1, np.int64)
    z, result = np.zeros(4 * PIECE, product.dtype), np.zeros(4 * PIECE, product.dtype)
    for j in range(PIECE):
        buffer[LAMBDA + j] = strength
    for first in range(4 * start, 4 * stop, 4 * PIECE):
        count = min(4 * PIECE, 4 * stop - first)
        here = slice(first, first + count)
        dense, old, kept, line = product[here], dual[here], sparse[here], linear[here]
        for i in range(count):
            z[i] = old[i] + (relaxation * dense[i] + rest * kept[i])
        z[count:] = 0
        load(z, buffer)
        solve(buffer, places, inner_places, steps, tolerance)
        store(z, buffer, result)
        for i in range(count):
            left = (z[i] - result[i]) * shrink
            kept[i] = result[i]
            old[i] = left
            dense[i] = line[i] + rho * (result[i] - left)


def stepper_numba(
    dual: Array, sparse: Array, linear: Array, *, steps: int
) -> Callable[[Tensor, tuple[float, float, float, float]], None]:
    """`prox_admm.stepper` on (R, C) float32 arrays, C-contiguous; steps: of Newton's method."""
    flat = tuple(matrix.reshape(-1) for matrix in (dual, sparse, linear))
    no_tolerance = np.float32(0)

    def step(product: Tensor, numbers: tuple[float, float, float, float]) -> None:
        dense, values = product.numpy().reshape(-1), np.array(numbers, np.float32)
        in_pieces(
            lambda part: _advance(dense, *flat, values, part.start, part.stop, steps, no_tolerance),
            shares(dense.size // 4, GROUPS_OF_A_THREAD),
        )

    return step
