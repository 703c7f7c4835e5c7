"""`prox24 plan`: the plan of a job as tables of at most 80 columns, or as JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import rich.box
from rich.table import Table

from cluster.command import Command
from cluster.options import config_from, path_text
from cluster.source import CONFIG_HELP, config_source
from cluster.terminal import as_text
from pipeline.planning.options import (
    PlanConfig,
    planned_job,
    planned_shape,
    threads_of,
    worker_rates,
)
from pipeline.planning.rates import save_rates
from pipeline.runtime.units import duration, size_text
from storage.files.trial import require_file, require_folder

if TYPE_CHECKING:
    from pipeline.planning.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The argument of `prox24 plan` beside the options of its config class."""
    parser.add_argument("model", metavar="MODEL", type=path_text, help=CONFIG_HELP)


def run(options: argparse.Namespace) -> int:
    """Plans and prints; returns the exit status: 0, or 3 where the job would not fit."""
    config: PlanConfig = config_from(options, PlanConfig)
    if config.calibrate and config.rates is not None:
        require_file(Path(config.rates), "--rates", "name another file")
        require_folder(Path.cwd(), "the current folder", "--calibrate measures its disk: change it")
    rates = None if config.calibrate else worker_rates(config)
    source = config_source(options.model)
    from pipeline.planning.plan import Plan
    from pipeline.planning.to_json import plan_to_json

    shape = replace(planned_shape(source.folder, config), name=source.name)
    if config.calibrate and config.rates is not None:
        from pipeline.planning.measure_rates import measure_rates

        measured = measure_rates(
            source.folder,
            shape,
            batch_size=config.batch_size,
            workers=config.workers or 1,
            threads=threads_of(config),
            folder=Path.cwd(),
        )
        save_rates(measured, Path(config.rates))
        rates = worker_rates(config)
    plan = Plan(planned_job(shape, config, rates))
    if config.json:
        print(json.dumps(plan_to_json(plan)))
    else:
        print(plan_text(plan), end="")
    return 0 if all(need.fits for need in plan.needs()) else 3


def plan_text(plan: Plan) -> str:
    """The tables, as text."""
    return as_text(
        [
            *_heading(plan),
            _phases(plan),
            _volumes(plan),
            _blocks(plan),
            _needs(plan),
            "",
            _scaling(plan),
            *_closing(plan),
        ]
    )


def _heading(plan: Plan) -> list[str]:
    job, shape = plan.job, plan.job.shape
    cpu = "1 CPU worker" if job.workers == 1 else f"{job.workers} CPU workers"
    where = f"{job.workers} x {job.rates.name}" if job.rates.on_gpu else cpu
    nodes = f" on {job.nodes} nodes" if job.nodes > 1 else ""
    in_few_bits = f" (in bfloat16; stored as {shape.stored_as})" if shape.stored_as else ""
    source = "measured rates" if job.rates.measured else "data sheets and stated efficiencies"
    lines = [
        f"{shape.name}: {_count(shape.parameters)} parameters, "
        f"{size_text(shape.weight_bytes)}, {len(shape.blocks)} blocks{in_few_bits}",
        f"{job.settings.method} {job.settings.pattern}, {job.nsamples} x {job.seqlen} tokens, "
        f"{where}{nodes} ({source})",
    ]
    if job.routes:
        lines.append(_experts(plan))
    if shape.passed_by:
        blocks = ", ".join(map(str, shape.passed_by))
        lines.append(f"Left dense: blocks {blocks}, which a forward of text does not reach")
    return lines


def _experts(plan: Plan) -> str:
    """What is assumed of routing, and what it comes to."""
    job = plan.job
    experts = {g for kind in job.shape.kinds for g in kind.groups if g.active}
    group = max(experts, key=lambda g: (g.experts, g.columns))
    kept = sorted({g.columns for g in experts if job.inputs(g) is not None}, reverse=True)
    how = ""
    if any(job.solved_with(g) != job.settings_of(g) for g in experts):
        how = f", fewer than --expert-tokens {job.expert_tokens}: pruned by wanda"
    elif kept:
        how = f", kept in place of Hessians of {' and '.join(map(str, kept))} columns"
    return (
        f"Experts: routing is taken as even, {job.tokens(group):,.0f} of "
        f"{job.nsamples * job.seqlen:,} tokens for each of {group.experts}{how}. Needs hold for "
        "any routing."
    )


def _count(value: int) -> str:
    unit, name = (1e9, "billion") if value >= 1e9 else (1e6, "million")
    return f"{value / unit:.3g} {name}"


def _table(title: str, *columns: tuple[str, bool]) -> Table:
    table = Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1))
    for name, right in columns:
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "phases")
    return table


def _phases(plan: Plan) -> Table:
    table = _table(
        f"Phases: {duration(plan.seconds)} in all",
        *(("phase", False), ("times", True), ("time", True), ("share", True)),
        *(("limited by", False), ("then by", False)),
    )
    for name, total in plan.totals().items():
        limits = sorted(total["limits"].items(), key=lambda item: -item[1])
        shares = [
            f"{limit} {100 * part / total['seconds']:.0f} %" for limit, part in limits if part
        ]
        table.add_row(
            *(name, str(total["count"]), seconds_text(total["seconds"])),
            f"{100 * total['seconds'] / plan.seconds:.0f} %",
            *[*shares, "", ""][:2],
        )
    return table


def _volumes(plan: Plan) -> Table:
    gpu = plan.job.rates.on_gpu
    columns = [("GPU peak", True)] if gpu else []
    columns += [("host peak", True), ("read", True), ("written", True), ("between ranks", True)]
    table = _table("Memory of a worker, and bytes of all", ("phase", False), *columns)
    keys = ["device_bytes"] if gpu else []
    keys += ["host_bytes", "read_bytes", "written_bytes", "network_bytes"]
    for name, total in plan.totals().items():
        table.add_row(name, *(size_text(total[key]) if total[key] else "" for key in keys))
    return table


def _blocks(plan: Plan) -> Table:
    gpu = plan.job.rates.on_gpu
    columns = [("blocks", False), ("time each", True), ("phases", False)]
    columns += [("GPU peak", True)] if gpu else []
    table = _table("Blocks", *columns, ("host peak", True))
    for block in plan.blocks:
        name = f"{block.first}" if block.count == 1 else f"{block.first}-{block.last}"
        parts = ", ".join(f"{p.name} {seconds_text(p.seconds)}" for p in block.phases)
        cells = [name, seconds_text(block.seconds), parts]
        cells += [size_text(max(map(plan.device_bytes, block.phases), default=0))] if gpu else []
        table.add_row(*cells, size_text(max(map(plan.host_bytes, block.phases), default=0)))
    return table


def _needs(plan: Plan) -> Table:
    table = _table(
        "Needs at most",
        ("what", False),
        ("where", False),
        ("needs", True),
        ("has", True),
        ("", False),
    )
    for need in plan.needs():
        has = "unknown" if need.has is None else size_text(need.has)
        table.add_row(
            need.what, need.where, size_text(need.needs), has, "" if need.fits else "DOES NOT FIT"
        )
    disk = plan.disk_bytes
    parts = ", ".join(f"{name} {size_text(value)}" for name, value in disk.items() if value)
    table.caption, table.caption_justify = parts, "left"
    return table


def _scaling(plan: Plan) -> Table:
    from pipeline.planning.plan import scaling

    table = _table("By number of workers", ("workers", True), ("time", True), ("efficiency", True))
    plans = scaling(plan.job)
    alone = plans[0][1].seconds
    for workers, other in plans:
        share = alone / (workers * other.seconds)
        table.add_row(str(workers), duration(other.seconds), f"{100 * share:.0f} %")
    return table


def _closing(plan: Plan) -> list[str]:
    lines = []
    for need, options in plan.problems():
        advice = ", or ".join(options) if options else "no single option makes it fit"
        lines.append(
            f"{need.what} does not suffice in {need.where}: {size_text(need.needs)} of "
            f"{size_text(need.has or 0)}; what would fit: {advice}"
        )
    return lines


def seconds_text(value: float) -> str:
    """Seconds, or hours and minutes from two minutes on."""
    return duration(value) if value >= 120 else f"{value:.1f} s"


COMMAND = Command(
    name="plan",
    help="say what pruning MODEL will take",
    epilog="Reads the config and the headers of the weight files, no weights. Exit status 3: the "
    "job would not fit.",
    config=PlanConfig,
    arguments=add_arguments,
    run=run,
)
