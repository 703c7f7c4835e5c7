"""The objective that every solver minimizes and every report states.

L(W) = tr((W - W0) H (W - W0)^T), with H the mean of x x^T, without damping and shrinkage. It is
computed row by row. Shapes: R rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.solvers.types import Statistics, percentage

_COLUMN_CHUNK = 256
# Rows in float64 at once; on a CPU for each thread.
_ROW_CHUNK_CPU = 512
_ROW_CHUNK = 2048


def objective(weight: Tensor, original: Tensor, statistics: Statistics | None) -> Tensor:
    """L of every row: (R, C), (R, C) of any float dtype -> (R,) float64.

    With only the diagonal of H it is sum_j dW_j^2 H_jj; without statistics, H = I.
    Products are float64, one panel of H at a time, and only on and above the diagonal blocks. An
    optimized dW lies where H is small: fp32 would lose the digits in which two solvers differ.
    Raises ValueError where shapes differ.
    """
    if weight.shape != original.shape:
        raise ValueError(f"shapes differ: {tuple(weight.shape)} and {tuple(original.shape)}")
    rows, columns = weight.shape
    total = torch.zeros(rows, dtype=torch.float64, device=weight.device)
    diagonal, hessian, inputs, tokens = None, None, None, 1
    if statistics is not None:
        diagonal, hessian = statistics.diagonal, statistics.hessian
        inputs = statistics.inputs
        tokens = max(statistics.tokens, 1)
    step = _ROW_CHUNK_CPU if weight.device.type == "cpu" else _ROW_CHUNK
    for top in range(0, rows, step):
        part = slice(top, min(top + step, rows))
        change = weight[part].double() - original[part].double()
        if inputs is not None:
            total[part] = (change @ inputs.double().T).square().sum(dim=1) / tokens
            continue
        if hessian is None:
            moments = 1.0 if diagonal is None else diagonal.double() / tokens
            total[part] = (change.square() * moments).sum(dim=1)
            continue
        summed = total[part]
        for left in range(0, columns, _COLUMN_CHUNK):
            panel = slice(left, min(left + _COLUMN_CHUNK, columns))
            entries = hessian[: panel.stop, panel].double()
            # H is symmetric: the blocks above the diagonal blocks count twice.
            product = change[:, panel] @ entries[left:]
            product.addmm_(change[:, :left], entries[:left], alpha=2)
            summed += (product * change[:, panel]).sum(dim=1)
        summed /= tokens
    # H is positive semidefinite, so a negative value is rounding.
    return total.clamp_(min=0)


def total_of_rows(values: Tensor) -> float:
    """The sum of (R,) float64 values, independent of how the rows are cut into slices.

    Each value is first rounded to 24 bits. Sums of such numbers are exact in float64 as long as no
    value is 2^16 times another.
    """
    mantissa, exponent = torch.frexp(values)
    return float(torch.ldexp((mantissa * 2**24).round() / 2**24, exponent).sum())


def statistic_name(statistics: Statistics | None) -> str:
    """The form of H that `objective` uses: "full", "diagonal" or "none"."""
    if statistics is not None and statistics.full:
        return "full"
    return "diagonal" if statistics is not None and statistics.diagonal is not None else "none"


def relative_error(weight: Tensor, original: Tensor, statistics: Statistics | None) -> float | None:
    """100 * L(W) / L(0) over all rows, in percent; None where it is undefined (see `percentage`).

    Raises ValueError where shapes differ.
    """
    lost = float(objective(weight, original, statistics).sum())
    zero = float(objective(torch.zeros_like(weight), original, statistics).sum())
    return percentage(lost, zero)
