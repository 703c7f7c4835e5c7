"""`prox24 bench`: how fast a model's 2:4 products are on this GPU, beside published results."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from cluster.command import Command
from cluster.options import config_from, path_text
from cluster.source import CONFIG_HELP, config_source
from cluster.terminal import as_text, bar, plain_table, shows_bars, terminal
from pipeline.config.prune import ModelOptions
from pipeline.speed.options import BenchConfig
from pipeline.speed.published import A100, PUBLISHED_BATCHES

if TYPE_CHECKING:
    from pipeline.speed.machine import Machine
    from pipeline.speed.products import Measured
    from pipeline.speed.whole import ModelSpeed

NO_GPU = 3
_COLUMNS_BESIDE = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The argument of `prox24 bench` beside the options of its config class."""
    parser.add_argument("model", metavar="MODEL", type=path_text, help=CONFIG_HELP)


def run(options: argparse.Namespace) -> int:
    """Measures and prints; returns the exit status, as `bench_command`."""
    return bench_command(options.model, config_from(options, BenchConfig))


def bench_command(model: str, config: BenchConfig, machine: Machine | None = None) -> int:
    """Measures and prints; returns the exit status: 0, or 3 without a GPU that can do 2:4.

    machine: where to measure; None for this machine's GPU.
    """
    source = config_source(model)
    from pipeline.planning.shapes.model import read_shape
    from pipeline.speed.machine import missing_gpu, this_gpu
    from pipeline.speed.products import forward_dtype, measure_products, products_of
    from pipeline.speed.whole import measure_model, workloads

    trusted = config.trust_remote_code
    shape = read_shape(
        source.folder,
        seqlen=config.seqlen,
        dtype=config.dtype,
        rules=ModelOptions(skip_unsupported=True).layer_rules(),
        trust_remote_code=trusted,
    )
    products = products_of(shape)
    if machine is None:
        reason = missing_gpu()
        if reason is not None:
            print(
                f"prox24: {reason}: nothing is measured. bench needs an NVIDIA GPU of compute "
                "capability 8.0 (Ampere) or newer",
                file=sys.stderr,
            )
            return NO_GPU
        machine = this_gpu(config.repeats)
    loads = workloads(config.seqlen)
    with _progress(len(products) + len(loads)) as report:
        measured = measure_products(
            products, config.batches(), forward_dtype(config.dtype), machine,
            lambda product: report(f"{product.title} {product.rows} x {product.columns}"),
        )  # fmt: skip
        speeds = measure_model(
            source.folder, shape, loads, config.dtype, trusted, machine,
            lambda load: report(f"model, {load.sequences} x {load.seqlen}"),
        )  # fmt: skip
    heading = f"{source.name} on {machine.name}, {config.dtype}"
    if config.json:
        print(json.dumps(as_json(heading, measured, speeds)))
    else:
        print(bench_text(heading, measured, speeds), end="")
    return 0


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """Shows on a terminal which of `total` measurements is running, and the time left."""
    console = terminal()
    if not shows_bars(console):
        yield lambda what: None
        return
    with bar(console, "{task.completed:.0f}/{task.total:.0f}") as progress:
        task = progress.add_task("measuring", total=total, completed=-1, error="")

        def report(what: str) -> None:
            progress.update(task, advance=1, description=what)

        yield report


def as_json(
    heading: str, measured: Sequence[Measured], speeds: Sequence[ModelSpeed]
) -> dict[str, Any]:
    """Every figure, times in seconds; a product's `published` are A100's at batch 8192 to 32768."""
    return {
        "bench": heading,
        "products": [
            {
                **dataclasses.asdict(each.product),
                "times": [{**dataclasses.asdict(t), "speedup": t.speedup} for t in each.times],
                "published": A100.get((each.product.rows, each.product.columns)),
                "problem": each.problem,
            }
            for each in measured
        ],
        "model": [
            {
                **dataclasses.asdict(speed.workload),
                "dense_tokens_per_second": _rate(speed, speed.dense),
                "sparse_tokens_per_second": _rate(speed, speed.sparse),
                "problem": speed.problem,
            }
            for speed in speeds
        ],
    }


def _rate(speed: ModelSpeed, seconds: float) -> float | None:
    return speed.workload.tokens / seconds if speed.problem is None else None


def bench_text(heading: str, measured: Sequence[Measured], speeds: Sequence[ModelSpeed]) -> str:
    """The tables, and where 2:4 is slower, as text of at most 80 columns."""
    starts = range(0, len(measured), _COLUMNS_BESIDE)
    return as_text(
        [
            heading,
            "Time of the dense product over that of the 2:4 one: below 1, 2:4 is SLOWER.\n",
            _beside_published(measured),
            *(_by_batch(measured[start : start + _COLUMNS_BESIDE]) for start in starts),
            _whole(speeds),
            *verdict(measured, speeds),
        ]
    )


def _beside_published(measured: Sequence[Measured]) -> Table:
    """In the layout of the published table: three batch sizes in a cell."""
    batches = " / ".join(map(str, PUBLISHED_BATCHES))
    columns = ("layer", "out x in", "this GPU", "A100, published")
    table = plain_table(columns, f"Batch {batches}", fold=True)
    for each in measured:
        product = each.product
        speedups = {timed.batch: f"{timed.speedup:.2f}" for timed in each.times}
        published = A100.get((product.rows, product.columns))
        table.add_row(
            product.title,
            f"{product.rows} x {product.columns}",
            " / ".join(speedups.get(batch, "-") for batch in PUBLISHED_BATCHES),
            " / ".join(f"{value:.2f}" for value in published) if published else "",
        )
    return table


def _by_batch(measured: Sequence[Measured]) -> Table:
    sizes = [f"{each.product.rows} x {each.product.columns}" for each in measured]
    table = plain_table(("batch", *sizes), "By batch size", fold=True)
    columns = [{timed.batch: timed.speedup for timed in each.times} for each in measured]
    for batch in sorted({batch for column in columns for batch in column}):
        cells = (f"{column[batch]:.2f}" if batch in column else "-" for column in columns)
        table.add_row(str(batch), *cells)
    return table


def _whole(speeds: Sequence[ModelSpeed]) -> Table:
    columns = ("tokens", "dense", "2:4", "2:4 over dense")
    table = plain_table(columns, "Whole model, tokens per second")
    for speed in speeds:
        load = speed.workload
        name = f"{load.sequences} x {load.seqlen}"
        if speed.problem is not None:
            table.add_row(name, "-", "-", "-")
            continue
        rates = (f"{load.tokens / seconds:.0f}" for seconds in (speed.dense, speed.sparse))
        table.add_row(name, *rates, f"{speed.speedup:.2f}")
    return table


def verdict(measured: Sequence[Measured], speeds: Sequence[ModelSpeed]) -> list[str]:
    """Where 2:4 is slower than dense, what was not measured and why, and how the rest was."""
    lines = []
    for each in measured:
        name = f"{each.product.title} ({each.product.rows} x {each.product.columns})"
        if each.slower:
            where = batch_ranges(each.slower, [timed.batch for timed in each.times])
            lines.append(f"2:4 is SLOWER than dense: {name} at batch {where}")
        if each.problem is not None:
            lines.append(f"not measured further: {name}: {each.problem}")
    for speed in speeds:
        name = f"whole model, {speed.workload.sequences} x {speed.workload.seqlen} tokens"
        if speed.problem is not None:
            lines.append(f"not measured: {name}: {speed.problem}")
        elif speed.speedup < 1:
            lines.append(f"2:4 is SLOWER than dense: {name}")
    lines.append(
        "Random weights, every product compared with the dense one first. The whole model is never "
        "loaded: its figures are the times of one block of each kind, times their number, and of "
        "the output embedding of the last tokens; attention has no cache to read."
    )
    return lines


def batch_ranges(sizes: Sequence[int], all_sizes: Sequence[int]) -> str:
    """Batch sizes as runs of those that were measured: `1-64, 1024`."""
    runs: list[list[int]] = []
    for index, batch in enumerate(all_sizes):
        if batch not in sizes:
            continue
        if runs and index and runs[-1][-1] == all_sizes[index - 1]:
            runs[-1].append(batch)
        else:
            runs.append([batch])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


COMMAND = Command(
    name="bench",
    help="time a model's 2:4 products on this GPU",
    epilog="Reads the config, no weights. Exit status 3: there is no GPU here that multiplies 2:4 "
    "weights.",
    config=BenchConfig,
    arguments=add_arguments,
    run=run,
)
