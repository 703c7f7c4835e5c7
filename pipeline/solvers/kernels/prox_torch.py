"""The proximal operator in plain torch operations, on any device.

For a GPU on which the user does without Triton, and for a CPU without numba. The mathematics is
that of `prox_operator`. An operation is a kernel and a pass over memory on a GPU, so groups are
processed in large pieces, as arrays over groups, and what three and four kept have in common is
done for both at once: some 100 operations a piece, and 29 for each step of Newton's method.

All steps are made; an entry that has converged no longer changes, so that a result depends neither
on the other groups of its piece nor on a wait for the device. Where a λ|z| is 2 or more, the two
largest are optimal, and λ|z| may be cut off; elsewhere the comparison of the candidates decides.

Shapes: n groups. 4n: (4, n), the entries of the groups, largest first where sorted.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Groups in a piece. On a CPU its arrays stay in a cache; elsewhere an operation takes longer than
# its start, and the arrays of a piece take 250 MiB in fp32.
_PIECE_ON_CPU = 1 << 14
PIECE = 1 << 20
_TWO_KEPT, _LARGEST = 2.0, 4.0  # λ|z| from which on two are kept, and where it is cut off
_LONGEST_STEP = 8.0


def prox_torch(rows: Tensor, per_row: Tensor, steps: int, tolerance: float) -> Tensor:
    """The proximal operator of `rows`.

    Args:
        rows: (R, C), C divisible by 4, any floating dtype.
        per_row: (1,) or (R,), λ in the compute dtype (float32 or float64).
        steps, tolerance: the steps and the tolerance of Newton's method.

    Returns:
        (R, C) in the dtype of `rows`.
    """
    groups = rows.reshape(-1, 4)
    result = torch.empty_like(groups)
    lam = per_row
    if len(per_row) > 1:
        lam = per_row.repeat_interleave(rows.shape[1] // 4)
    piece = _PIECE_ON_CPU if rows.device.type == "cpu" else PIECE
    for start in range(0, len(groups), piece):
        here = slice(start, start + piece)
        z = groups[here].T.to(per_row.dtype).contiguous()
        own = lam if len(lam) == 1 else lam[here]
        result[here] = _solved(z, own, steps, tolerance).T
    return result.reshape(rows.shape)


def work(groups: float, steps: int) -> tuple[float, float]:
    """Kernels that a GPU starts for that many groups of fp32, and bytes that it reads and writes.

    By counting operations and their arguments.
    """
    pieces = -(-groups // PIECE)
    return pieces * (118 + 30 * steps), groups * (2900.0 + 564.0 * steps)


def _solved(z: Tensor, lam: Tensor, steps: int, tolerance: float) -> Tensor:
    """4n entries z and (n,) or (1,) λ of one dtype -> 4n."""
    magnitude = z.abs()
    # Sorted before scaling: λ may round two magnitudes, or two infinities, to the same value.
    u, swaps = _sort(magnitude)
    # 0·inf is NaN: an infinite λ does not change zeros, λ = 0 does not change infinities.
    u = u.mul_(lam).nan_to_num_(nan=0.0, posinf=_LARGEST).clamp_(max=_LARGEST)
    limits = torch.finfo(lam.dtype)
    shrink = _shrinkage(u, steps, tolerance).div_(lam.clamp(min=limits.tiny, max=limits.max))
    left = (magnitude - _unsort(shrink, swaps)).clamp_(min=0)
    # z itself where nothing is subtracted, so that -0.0 stays; +0.0 for every pruned entry.
    result = torch.where(left == magnitude, z, left.copysign(z).add_(0.0))
    return result.masked_fill_((magnitude.sum(0) + lam).isnan(), torch.nan)


def _sort(values: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """4n values, largest first, by the network (0 2)(1 3), (0 1)(2 3), (1 2); and its exchanges."""
    upper, lower = values[:2], values[2:]
    first = upper < lower
    pairs = torch.empty_like(values).view(2, 2, -1)
    torch.maximum(upper, lower, out=pairs[0])
    torch.minimum(upper, lower, out=pairs[1])
    left, right = pairs[:, 0], pairs[:, 1]
    second = left < right
    result = torch.empty_like(values)
    torch.maximum(left, right, out=result[0::2])
    torch.minimum(left, right, out=result[1::2])
    third = result[1] < result[2]
    middle = torch.minimum(result[1], result[2])
    torch.maximum(result[1], result[2], out=result[1])
    result[2] = middle
    return result, (first, second, third)


def _unsort(values: Tensor, swaps: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The inverse of the exchanges of `_sort`, on other 4n values."""
    first, second, third = swaps
    middle = torch.where(third, values[1], values[2])
    torch.where(third, values[2], values[1], out=values[1])
    values[2] = middle
    left, right = values[0::2], values[1::2]
    pairs = torch.empty_like(values).view(2, 2, -1)
    torch.where(second, right, left, out=pairs[:, 0])
    torch.where(second, left, right, out=pairs[:, 1])
    result = torch.empty_like(values)
    torch.where(first, pairs[1], pairs[0], out=result[:2])
    torch.where(first, pairs[0], pairs[1], out=result[2:])
    return result


def _shrinkage(u: Tensor, steps: int, tolerance: float) -> Tensor:
    """What the best candidate subtracts from the sorted 4n u; infinity where it prunes."""
    x = _stationary_points(u, steps, tolerance)
    # e2 of the other three: the other of its pair times the sum of the pair beyond, and so on.
    pairs = x.view(2, 2, 2, -1)
    beyond_sums, beyond_products = pairs.sum(2).flip(1), _products(pairs).flip(1)
    subtract = torch.addcmul(
        beyond_products.unsqueeze(2), pairs.flip(2), beyond_sums.unsqueeze(2)
    ).view(2, 4, -1)
    subtract[1, 3].fill_(torch.inf)
    kept = (u - subtract).clamp_(min=0)
    pairs = kept.view(2, 2, 2, -1)
    triples = pairs.sum(2).mul_(_products(pairs).flip(1)).sum(1)
    # Twice F of each candidate.
    four, three = (kept - u).square_().sum(1).add_(triples, alpha=2)
    two = u[2:].square().sum(0).masked_fill_(u[0] >= _TWO_KEPT, -1)
    # Made on the device: a copy from the host would wait.
    largest = u.new_zeros(4, 1)
    largest[2:].fill_(torch.inf)
    best = torch.where(three <= two, subtract[1], largest)
    return torch.where(four <= torch.minimum(three, two), subtract[0], best)


def _products(pairs: Tensor) -> Tensor:
    return pairs[:, :, 0] * pairs[:, :, 1]


def _stationary_points(u: Tensor, steps: int, tolerance: float) -> Tensor:
    """(2, 4, n): x of four kept and of three kept, by Newton's method on h and on k together."""
    four, three = _Four(u), _Three(u)
    at = torch.stack((four.start(), three.start()))
    low = torch.stack((four.low, -u[2]))
    done = torch.stack((torch.full_like(u[2], tolerance), tolerance * u[2]))
    active, value, slope = torch.ones_like(at), torch.empty_like(at), torch.empty_like(at)
    tiny = torch.finfo(u.dtype).tiny
    for step in range(steps):
        four.evaluate(at[0], value[0], slope[0])
        three.evaluate(at[1], value[1], slope[1])
        # Without an upward slope there is no root: the step ends below `low`.
        value.div_(slope.clamp_(min=tiny)).clamp_(min=0, max=_LONGEST_STEP).mul_(active)
        at.sub_(value)
        if step + 1 < steps:
            active.mul_(value > done)
    at = torch.maximum(at, low)
    x = torch.empty((2, *u.shape), dtype=u.dtype, device=u.device)
    four.finish(at[0], x[0])
    three.finish(at[1], x[1])
    return x


class _Four:
    """h: twice its value is the sum of four roots, r0 a second time where on q, and of t."""

    def __init__(self, u: Tensor) -> None:
        self.total, least = u.sum(0), torch.sub(u[0] + u[1] + u[2], u[3])
        self.u4 = u[3]
        k0 = (2 * least).sub_(1)
        self.on_q = k0 >= 0
        # Not 0: a root may then be divided by.
        lift = k0.clamp(max=-torch.finfo(u.dtype).tiny)
        # k1, k2, k3 and k0.
        self.k = torch.empty_like(u)
        torch.sub(u[:3], u[3], out=self.k[:3]).mul_(4).sub_(lift)
        torch.sub(k0, lift, alpha=2, out=self.k[3])
        self.again = self.on_q.to(u.dtype)
        self.of_t = 2 - self.again
        self.low = torch.where(self.on_q, 1 - least, least)

    def start(self) -> Tensor:
        """A point to the right of the root."""
        square = (1 - self.total).square_().add_(self.u4, alpha=4)
        return torch.where(self.on_q, square.sqrt_(), self.total)

    def _roots(self, t: Tensor) -> Tensor:
        return torch.addcmul(self.k, t, t).sqrt_()

    def evaluate(self, t: Tensor, value: Tensor, slope: Tensor) -> None:
        """Writes twice h and twice its slope at t (n,)."""
        roots = self._roots(t)
        torch.sum(roots, 0, out=value)
        value.addcmul_(self.again, roots[3]).addcmul_(self.of_t, t).sub_(4)
        inverse = roots.reciprocal_()
        torch.sum(inverse, 0, out=slope)
        slope.addcmul_(self.again, inverse[3]).mul_(t).add_(self.of_t)

    def finish(self, t: Tensor, x: Tensor) -> None:
        """Writes x, 4n."""
        roots = self._roots(t)
        shift = torch.where(self.on_q, roots[3], t).sub_(1)
        roots[3] = torch.where(self.on_q, t, roots[3])
        torch.add(roots, shift, out=x).mul_(0.5).clamp_(min=0)


class _Three:
    """k, with the derivatives multiplied by the product of the roots."""

    def __init__(self, u: Tensor) -> None:
        self.pair, self.u3 = u[:2], u[2]
        self.k = (self.pair - self.u3).mul_(self.pair + self.u3)

    def start(self) -> Tensor:
        """The first step, from q = u3, where the roots are u1 and u2."""
        area = self.pair[0] * self.pair[1]
        slope = self.pair.square().sum(0).mul_(self.u3).add_(area)
        slope.clamp_(min=torch.finfo(slope.dtype).tiny)
        q = torch.addcmul(self.u3, area, area.div(slope), value=-2)
        return torch.maximum(q, -self.u3)

    def _roots(self, q: Tensor) -> Tensor:
        return torch.addcmul(self.k, q, q).sqrt_()

    def evaluate(self, q: Tensor, value: Tensor, slope: Tensor) -> None:
        """Writes k and its slope at q (n,), both times the product of the roots."""
        roots = self._roots(q)
        sums = self.pair + roots
        product = roots[0] * roots[1]
        torch.sub(q, self.u3, out=value)
        value.addcmul_(sums[0], sums[1], value=0.5).mul_(product)
        torch.sum(roots.mul_(sums), 0, out=slope)
        slope.mul_(q).mul_(0.5).add_(product)

    def finish(self, q: Tensor, x: Tensor) -> None:
        """Writes x, 4n, with x4 = 0."""
        torch.add(self.pair, self._roots(q), out=x[:2])
        torch.add(self.u3, q, out=x[2])
        x[3].zero_()
        x.mul_(0.5)
