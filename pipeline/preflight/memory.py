"""Before a job starts: whether its memory suffices, by the plan, on the nodes that it has got."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pipeline.config.prune import PruneConfig
from pipeline.models.selection import layers_to_prune
from pipeline.models.skeleton import Skeleton
from pipeline.planning.memory import sums_held
from pipeline.planning.phase_parts import Phase
from pipeline.planning.plan import Plan, remedies
from pipeline.planning.planned_job import PlannedJob
from pipeline.planning.rates import cpu_rates, gpu_rates
from pipeline.planning.shapes.model import read_shape
from pipeline.runtime.device import FreeMemory
from pipeline.runtime.progress import Progress
from pipeline.runtime.units import size_text
from pipeline.solvers.registry import solver_for
from storage.errors import ModelError, ResourceError


def check_memory(
    skeleton: Skeleton, config: PruneConfig, rooms: Sequence[FreeMemory], progress: Progress
) -> None:
    """Compares what the ranks will hold with what `rooms`, one for each rank, have free.

    Only tensors count that are certainly held at once: neither what a process takes by itself,
    which it has taken already, nor what an allocator wastes. So a job that is refused cannot end
    well, and one that is not may still be close; of experts, whose tokens are not known yet, even
    shares count. Raises `ResourceError` with the plan's advice.
    """
    if _surely_fits(skeleton, config, rooms):
        return
    try:
        job = _planned(skeleton, config, rooms)
    except ModelError as error:
        progress.note(f"memory is not checked before the start: {error}")
        return
    for node, count, free in _by(rooms, lambda room: room.node, lambda room: room.host):
        _require(job, "host memory", f"node {node}", count, free)
    if job.rates.on_gpu:
        for gpu, count, free in _by(rooms, lambda room: room.gpu or "", lambda room: room.free):
            _require(job, "device memory", f"GPU {gpu}", count, free)


def held_bytes(job: PlannedJob, what: str) -> tuple[float, str]:
    """The most that a rank certainly holds of host or device memory, and in which phase.

    In process it is all ranks': the statistics of each, and one that works.
    """

    def of(phase: Phase) -> float:
        if what == "device memory":
            return phase.held.device
        return phase.held.host + (0.0 if job.rates.on_gpu else phase.held.device)

    where, _, phase = max(Plan(job).phases(), key=lambda item: of(item[2]))
    held = of(phase)
    if job.in_process and job.calibrates:
        kept = (sums_held(job, each) for k in job.shape.kinds for each in job.passes(k))
        held += (job.workers - 1) * max(kept)
    return held, where


def _by(
    rooms: Sequence[FreeMemory],
    key: Callable[[FreeMemory], str],
    free: Callable[[FreeMemory], float],
) -> list[tuple[str, int, float]]:
    """(name, ranks there, bytes free) of every node, or GPU."""
    found: dict[str, list[float]] = {}
    for room in rooms:
        found.setdefault(key(room), []).append(free(room))
    return [(name, len(values), min(values)) for name, values in found.items()]


def _require(job: PlannedJob, what: str, name: str, count: int, free: float) -> None:
    """Refuses what `count` ranks at `name` hold, where that is more than is free."""
    ranks = 1 if job.in_process else count
    held, where = held_bytes(job, what)
    if ranks * held <= free:
        return

    def fits(other: PlannedJob) -> bool:
        # Fewer workers are fewer on this node, or GPU, too.
        share = 1 if job.in_process else max(1, ranks * other.workers // job.workers)
        if what == "device memory" or other.workers > job.workers:
            share = ranks
        return share * held_bytes(other, what)[0] <= free

    options = [option.replace("--gpus", "--workers") for option in remedies(job, what, fits)]
    advice = "what would fit: " + ", or ".join(options) if options else "no one option makes it fit"
    raise ResourceError(
        f"{name}: {where} needs at least {size_text(ranks * held)} of {what}, {size_text(free)} "
        f"are free; {advice}"
    )


def _surely_fits(skeleton: Skeleton, config: PruneConfig, rooms: Sequence[FreeMemory]) -> bool:
    """Whether far more than the job can hold is free: then no plan is made."""
    rules = config.layer_rules()
    full = any(solver_for(settings).needs == "full" for settings in rules.all_settings())
    most, size = 0.0, float(skeleton.dtype.itemsize)
    tokens = float(config.batch_size * config.seqlen)
    for block, module in enumerate(skeleton.blocks):
        layers = layers_to_prune(skeleton, block, rules)
        squares = sum(8.0 * c * c for _, c in layers.values())
        widest = max((c for _, c in layers.values()), default=0)
        rows = max((48.0 * r * c for r, c in layers.values()), default=0.0)
        held = sum(p.numel() for p in module.parameters()) * 3 * size + rows
        if full:
            held += squares + 16.0 * widest * widest
        most = max(most, held + 12.0 * tokens * sum(r + c for r, c in layers.values()))
    ends = 8.0 * sum(p.numel() for p in skeleton.model.get_input_embeddings().parameters())
    total = (most + ends) * len(rooms)
    return all(total < room.host / 2 and (not room.gpu or total < room.free / 2) for room in rooms)


def _planned(skeleton: Skeleton, config: PruneConfig, rooms: Sequence[FreeMemory]) -> PlannedJob:
    settings = config.solver_settings(config.method)
    shape = read_shape(
        skeleton.files.place,
        seqlen=config.seqlen,
        rules=config.layer_rules(),
        all_experts=config.calibrate_all_experts,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )
    total = min(room.total for room in rooms)
    rates = replace(gpu_rates("H100"), device_memory=total) if total else cpu_rates()
    return PlannedJob(
        shape=shape,
        settings=settings,
        nsamples=config.nsamples,
        seqlen=config.seqlen,
        batch_size=config.batch_size,
        workers=len(rooms),
        nodes=len({room.node for room in rooms}),
        rates=rates,
        device_memory=total,
        in_process=config.executor == "local",
        hessian_memory=None if config.hessian_memory is None else config.hessian_memory * 1e9,
        expert_tokens=config.expert_tokens,
    )
