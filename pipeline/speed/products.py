"""Times the product of each distinct layer shape of a model, dense and 2:4."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config.pattern import Pattern
from pipeline.models.skeleton import FORWARD_DTYPES
from pipeline.planning.shapes.model import GroupShape, ModelShape
from pipeline.solvers.masks import keep_mask
from pipeline.speed.machine import Machine
from storage.errors import NumericalError, first_line

PATTERN = Pattern.parse("2:4")
# Both kernels sum in fp32, in another order, and round once. So results differ by a few units in
# the last place of the largest output.
_TOLERATED_ROUNDINGS = 8


@dataclass(frozen=True)
class Product:
    """A product with a weight of shape (R, C) = (rows, columns), and the layers that have it.

    fused: whether the layers share an input and are one product with all their rows.
    """

    layers: tuple[str, ...]
    rows: int
    columns: int
    fused: bool = False

    @property
    def title(self) -> str:
        """`q_proj+k_proj+v_proj` for a fused product, else `q_proj, o_proj`."""
        names = [name.rpartition(".")[2] for name in self.layers]
        return "+".join(names) if self.fused else ", ".join(dict.fromkeys(names))


@dataclass(frozen=True)
class Timed:
    """Seconds of one product at a batch size (tokens), dense and 2:4."""

    batch: int
    dense: float
    sparse: float

    @property
    def speedup(self) -> float:
        """Above 1 where 2:4 is faster."""
        return self.dense / self.sparse


@dataclass(frozen=True)
class Measured:
    """The times of a product, by increasing batch size, and why there are no more (or None)."""

    product: Product
    times: tuple[Timed, ...]
    problem: str | None = None

    @property
    def slower(self) -> tuple[int, ...]:
        """The batch sizes at which 2:4 is slower than dense."""
        return tuple(timed.batch for timed in self.times if timed.speedup < 1)


def products_of(shape: ModelShape) -> list[Product]:
    """The products with every distinct shape of a pruned layer.

    First come the fused products of layers that share an input, as inference engines run them.
    """
    groups = [group for kind in shape.kinds for group in kind.groups]
    fused = [_fused(group) for group in groups if len(group.layers) > 1]
    alone: dict[tuple[int, int], list[str]] = {}
    for group in groups:
        for name, rows, columns in group.layers:
            alone.setdefault((rows, columns), []).append(name)
    single = [Product(tuple(dict.fromkeys(names)), *size) for size, names in alone.items()]
    # Blocks of two kinds can have the same product.
    return list({(p.rows, p.columns, p.fused): p for p in (*fused, *single)}.values())


def _fused(group: GroupShape) -> Product:
    names = tuple(name for name, _, _ in group.layers)
    return Product(names, sum(rows for _, rows, _ in group.layers), group.columns, fused=True)


def measure_products(
    products: Iterable[Product],
    batches: Sequence[int],
    dtype: torch.dtype,
    machine: Machine,
    tell: Callable[[Product], object],
) -> list[Measured]:
    """Times every product at every batch size; `tell` is called before each product.

    An error of a kernel, or too little memory, ends the times of a product and is its `problem`.
    Raises `NumericalError` where the results of the two kernels differ.
    """
    measured = []
    for product in products:
        tell(product)
        measured.append(_measured(product, batches, dtype, machine))
    return measured


def forward_dtype(name: str) -> torch.dtype:
    """The torch dtype with this name."""
    return FORWARD_DTYPES[name]


@torch.no_grad()
def _measured(
    product: Product, batches: Sequence[int], dtype: torch.dtype, machine: Machine
) -> Measured:
    times: list[Timed] = []
    batch = 0
    try:
        weight = random_weight(product.rows, product.columns, dtype, machine.device)
        compressed = machine.compress(weight)
        for batch in batches:
            times.append(_timed(product, batch, weight, compressed, machine))
    except torch.OutOfMemoryError:
        return Measured(product, tuple(times), f"out of memory at batch size {batch or 'any'}")
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return Measured(product, tuple(times), f"torch refuses: {first_line(error)}")
    return Measured(product, tuple(times))


def _timed(
    product: Product, batch: int, weight: Tensor, compressed: Tensor, machine: Machine
) -> Timed:
    """Times one product (batch, C) x (C, R) by both kernels, after comparing their results."""
    generator = torch.Generator(machine.device).manual_seed(batch)
    inputs = torch.randn(
        batch, product.columns, dtype=weight.dtype, device=machine.device, generator=generator
    )
    check_product(
        nn.functional.linear(inputs, weight),
        nn.functional.linear(inputs, compressed),
        f"{product.title} ({product.rows} x {product.columns}), batch size {batch}",
    )
    return Timed(
        batch,
        machine.seconds(lambda: nn.functional.linear(inputs, weight)),
        machine.seconds(lambda: nn.functional.linear(inputs, compressed)),
    )


def random_weight(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A Gaussian weight (rows, columns) that is 2:4. Its values do not affect the time."""
    generator = torch.Generator(device).manual_seed(rows * columns)
    weight = torch.randn(rows, columns, dtype=dtype, device=device, generator=generator)
    return weight.mul_(columns**-0.5).masked_fill_(~keep_mask(PATTERN, weight.abs()), 0)


def check_product(dense: Tensor, sparse: Tensor, where: str) -> None:
    """Raises `NumericalError`, naming `where`, if the results differ by more than rounding."""
    largest = float(dense.abs().max())
    difference = float((dense - sparse).abs().max())
    allowed = _TOLERATED_ROUNDINGS * torch.finfo(dense.dtype).eps * largest
    if not difference <= allowed:  # NaN included
        raise NumericalError(
            f"{where}: the 2:4 product differs from the dense one by {difference:.3g}, more than "
            f"rounding explains ({allowed:.3g}); its times would be meaningless"
        )
