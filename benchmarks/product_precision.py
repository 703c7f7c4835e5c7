"""What the precision of a solve's products costs in its error, by emulation on a CPU.

    python benchmarks/product_precision.py                        # the golden layers: a few minutes
    python benchmarks/product_precision.py --synthetic 4096x128   # columns x rows

On a GPU the products of `prox_admm`'s iterations are TF32: operands rounded to a mantissa of
10 bits, products exact, sums fp32. Here the operands are rounded in the same way and multiplied in
fp32. All else of a solve (the inverse, the operator, refinement, the reported objective) is as on a
GPU. What is not emulated: the tensor cores' own rounding of the sums.

`plain` and `centered`: the two forms of an iteration, see `pipeline/solvers/methods/prox_admm.py`.

Each layer is solved on its first half of inputs; errors are on that half ("own") and on the other
("held out"), in per cent of the outputs' energy, and as the change from fp32, with its standard
error over the rows, which are solved apart from each other. `masks`: share of the entries on which
the mask agrees with that of fp32. "Other sums" adds up each product in two halves: what another
kernel of the library, for another number of rows, may do; it is compared with TF32, not with fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.config.solver import SolverSettings
from pipeline.solvers.inverse import DenseInverse, LowRankInverse
from pipeline.solvers.methods import prox, prox_admm
from pipeline.solvers.methods.prox_admm import ProxAdmmSolver
from pipeline.solvers.objective import objective
from pipeline.solvers.registry import solver_for
from pipeline.solvers.types import Statistics

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = (
    "block5_self_attn_k_proj",
    "block12_self_attn_o_proj",
    "block20_mlp_down_proj",
    "dead_columns",
)
FIRST = SolverSettings().admm_first_iterations

Product = Callable[[Tensor, Tensor], Tensor]


def rounded(values: Tensor, bits: int, nearest: bool = True) -> Tensor:
    """fp32 with `bits` of its 23 bits of mantissa: to the nearest, ties to even, or cut off."""
    dropped = 23 - bits
    whole = values.contiguous().view(torch.int32)
    if nearest:
        whole = whole + ((1 << (dropped - 1)) - 1) + ((whole >> dropped) & 1)
    return (whole & -(1 << dropped)).view(torch.float32)


def tf32(a: Tensor, b: Tensor) -> Tensor:
    """The product with operands rounded to TF32."""
    return rounded(a, 10) @ rounded(b, 10)


def tf32_cut(a: Tensor, b: Tensor) -> Tensor:
    """The product with operands cut to TF32, as hardware does with bits it does not read."""
    return rounded(a, 10, nearest=False) @ rounded(b, 10, nearest=False)


def three_terms(a: Tensor, b: Tensor) -> Tensor:
    """a_hi b_hi + a_hi b_lo + a_lo b_hi in TF32."""
    a_hi, b_hi = rounded(a, 10), rounded(b, 10)
    a_lo, b_lo = rounded(a - a_hi, 10), rounded(b - b_hi, 10)
    return a_hi @ b_hi + (a_hi @ b_lo + a_lo @ b_hi)


def bf16(a: Tensor, b: Tensor) -> Tensor:
    """The product with operands rounded to bf16, summed and returned in fp32."""
    return rounded(a, 7) @ rounded(b, 7)


def other_sums(a: Tensor, b: Tensor) -> Tensor:
    """The product in TF32, summed in another order."""
    a, b, half = rounded(a, 10), rounded(b, 10), a.shape[1] // 2
    return a[:, :half] @ b[:half] + a[:, half:] @ b[half:]


# Name -> the products of the first iterations (those with the first penalty), and of the others,
# and whether they are those of the centered form.
PRECISIONS: dict[str, tuple[Product, Product, bool]] = {
    "fp32": (torch.mm, torch.mm, False),
    "fp32, centered": (torch.mm, torch.mm, True),
    "TF32, plain": (tf32, tf32, False),
    "TF32, centered": (tf32, tf32, True),
    "other sums of TF32, plain": (other_sums, other_sums, False),
    "3 terms of TF32, plain": (three_terms, three_terms, False),
    "other sums of TF32, centered": (other_sums, other_sums, True),
    "cut TF32, centered": (tf32_cut, tf32_cut, True),
    "bf16 in the first 22, centered": (bf16, tf32, True),
    "bf16, centered": (bf16, bf16, True),
}


BASES = {
    "other sums of TF32, plain": "TF32, plain",
    "other sums of TF32, centered": "TF32, centered",
}
"""What a precision is compared with, where it is not fp32."""


@contextmanager
def products(first: Product, later: Product, centered: bool) -> Iterator[None]:
    """ADMM's iterations multiply in these precisions; centered: in the form that a GPU computes."""
    done = 0

    def mm(a: Tensor, b: Tensor) -> Tensor:
        return (first if done <= FIRST else later)(a, b)

    def dense(inverse: DenseInverse, rows: Tensor, out: Tensor) -> None:
        nonlocal done
        done += 1
        out.copy_(mm(rows, inverse.matrix))

    def low_rank(inverse: LowRankInverse, rows: Tensor, out: Tensor) -> None:
        nonlocal done
        done += 1
        torch.mul(rows, inverse.entries, out=out)
        out.sub_(mm(mm(rows, inverse.factor.T), inverse.factor))

    def gradient(change: Tensor, problem: object, matrix: Tensor, rounded: bool) -> Tensor:
        return later(change, matrix)

    with (
        patch.object(DenseInverse, "multiply", dense),
        patch.object(LowRankInverse, "multiply", low_rank),
        patch.object(ProxAdmmSolver, "_rounds", lambda solver, device: centered),
        patch.object(prox_admm, "_numba_kernels", lambda: None),
        patch.object(prox, "gradient_of", gradient),
    ):
        yield


def statistics_of(inputs: Tensor, keep: bool = False) -> Statistics:
    """Sums over inputs (tokens, C); with `keep` the inputs themselves."""
    squares = inputs.square().sum(dim=0)
    whole = None if keep else inputs.T @ inputs
    return Statistics(
        columns=inputs.shape[1],
        tokens=len(inputs),
        sequences=1,
        diagonal=squares,
        hessian=whole,
        inputs=inputs if keep else None,
    )


def synthetic(columns: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (R, C), and two halves of inputs, (2 C, C) and (4096, C).

    A spectrum that falls as 1 / i over a random basis, 64 shared directions, a mean, columns of
    unequal size and a few loud ones: as inputs of a language model's layers look.
    """
    generator = torch.Generator().manual_seed(columns)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    spectrum = torch.arange(1, columns + 1).float().pow(-0.5) * columns**0.25
    basis, mean = normal(64, columns) / 8, 0.3 * normal(columns)
    signs = normal(2, columns).sign()
    sizes = (0.5 * normal(columns)).exp()
    sizes[torch.randperm(columns, generator=generator)[:8]] *= 20

    def sample(tokens: int) -> Tensor:
        x = normal(tokens, columns) * spectrum
        for sign in signs:  # an orthogonal transform: Hartley's, of columns with random signs
            spectrum_of = torch.fft.fft(x * sign, norm="ortho")
            x = spectrum_of.real - spectrum_of.imag
        return (x + normal(tokens, 64) @ basis + mean) * sizes

    weight = normal(rows, columns) * normal(columns).abs().add(0.5) * 0.02
    return weight, sample(2 * columns), sample(4096)


def lost_by_row(solved: Tensor, weight: Tensor, inputs: Tensor) -> Tensor:
    """The error of each row on inputs (tokens, C), in per cent of all rows' outputs: (R,)."""
    lost = (inputs @ (solved - weight).T).double().square().sum(dim=0)
    return 100 * lost / (inputs @ weight.T).double().square().sum()


def change(after: Tensor, before: Tensor) -> tuple[float, float]:
    """The change of a sum over rows (R,) in per cent, and its standard error."""
    each, whole = after - before, float(before.sum())
    return 100 * float(each.sum()) / whole, 100 * float(each.std()) * len(each) ** 0.5 / whole


def compare(
    method: str,
    name: str,
    weight: Tensor,
    own: Tensor,
    other: Tensor,
    keep: bool,
    only: list[str],
) -> list[dict[str, Any]]:
    """One line per precision."""
    statistics = statistics_of(own, keep)
    solver = solver_for(SolverSettings(method=method))
    prepared = solver.prepare(statistics)
    total = objective(torch.zeros_like(weight), weight, statistics).sum()
    lines: list[dict[str, Any]] = []
    done: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for precision in only:
        began = time.perf_counter()
        with products(*PRECISIONS[precision]):
            solved = solver.solve(weight, prepared).weight
        lost = 100 * objective(solved, weight, statistics) / total
        done[precision] = lost, lost_by_row(solved, weight, other), solved != 0
        base = done[BASES.get(precision, "fp32")]
        line: dict[str, Any] = {"layer": name, "precision": precision}
        for index, where in enumerate(("own", "held_out")):
            line[where] = float(done[precision][index].sum())
            line[f"{where}_change"] = change(done[precision][index], base[index])
        line["masks"] = 100 * float((done[precision][2] == base[2]).double().mean())
        line["seconds"] = time.perf_counter() - began
        lines.append(line)
        print(json.dumps(line), flush=True)
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """The lines in Markdown."""
    head = "| layer | products | own | held out | change, own | change, held out | masks |"
    rows = [
        f"| {line['layer']} | {line['precision']} | {line['own']:.3f} % | {line['held_out']:.3f} % "
        f"| {line['own_change'][0]:+.2f} ± {line['own_change'][1]:.2f} % "
        f"| {line['held_out_change'][0]:+.2f} ± {line['held_out_change'][1]:.2f} % "
        f"| {line['masks']:.2f} % |"
        for line in lines
    ]
    return "\n".join([head, "|---|---|---:|---:|---:|---:|---:|", *rows])


def main() -> None:
    """Prints one JSON line per solve, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, default=ROOT.parent / "shared" / "golden")
    parser.add_argument("--synthetic", nargs="*", metavar="COLUMNSxROWS", default=[])
    parser.add_argument("--method", choices=("prox_admm", "prox"), default="prox_admm")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    options = parser.parse_args()
    only = ["fp32", *(name for name in options.precisions if name != "fp32")]
    lines: list[dict[str, Any]] = []
    for size in options.synthetic:
        columns, rows = map(int, size.split("x"))
        lines += compare(options.method, f"C = {columns:,}", *synthetic(columns, rows), False, only)
    if not options.synthetic:
        from safetensors.torch import load_file

        for name in GOLDEN:
            data = load_file(options.golden / f"{name}.safetensors")
            weight, (own, other) = data["weight"].float(), data["inputs"].float()
            lines += compare(options.method, name, weight, own, other, False, only)
            if options.method == "prox_admm" and len(own) < own.shape[1]:
                label = f"{name}, by its inputs"
                lines += compare(options.method, label, weight, own, other, True, only)
    print(f"\n{table(lines)}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
