"""Whether the nodes of a job have enough memory for it, according to its plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pipeline.config.prune import PruneConfig
from pipeline.models.selection import layers_to_prune
from pipeline.models.skeleton import Skeleton
from pipeline.planning.memory import sums_bytes
from pipeline.planning.parts.phase_parts import Phase
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
    skeleton: Skeleton,
    config: PruneConfig,
    workers: Sequence[FreeMemory],
    progress: Progress,
    counted_share: float = 1.0,
) -> None:
    """Compares the memory that the workers will need with what they have free.

    workers: the free memory of each worker. counted_share: of the calibration tokens, how many
    statistics are taken of. Only tensors that are certainly held at once count: not
    what a process takes by itself, which is taken already, and not what an allocator wastes. So a
    refused job cannot succeed; one that is not refused may still run out of memory. Experts, whose
    tokens are not known yet, are counted with even shares.
    Raises `ResourceError`, with the options that would make the job fit.
    """
    if _surely_fits(skeleton, config, workers):
        return
    try:
        job = replace(_planned(skeleton, config, workers), counted_share=counted_share)
    except ModelError as error:
        progress.note(f"memory is not checked before the start: {error}")
        return
    for node, count, free in _by_place(workers, lambda w: w.node, lambda w: w.host):
        _require(job, "host memory", f"node {node}", count, free)
    if job.rates.on_gpu:
        for gpu, count, free in _by_place(workers, lambda w: w.gpu or "", lambda w: w.free):
            _require(job, "device memory", f"GPU {gpu}", count, free)


def held_bytes(job: PlannedJob, what: str) -> tuple[float, str]:
    """The most bytes of host or device memory that a worker certainly holds, and in which phase.

    what: "host memory" or "device memory". With the local executor it is one worker that computes,
    and the statistics of all others.
    """

    def bytes_in(phase: Phase) -> float:
        if what == "device memory":
            return phase.peak.device
        return phase.peak.host + (0.0 if job.rates.on_gpu else phase.peak.device)

    where, _, phase = max(Plan(job).phases(), key=lambda item: bytes_in(item[2]))
    needed = bytes_in(phase)
    if job.in_process and job.calibrates:
        kept = (sums_bytes(job, each) for k in job.shape.kinds for each in job.passes(k))
        needed += (job.workers - 1) * max(kept)
    return needed, where


def _by_place(
    workers: Sequence[FreeMemory],
    place: Callable[[FreeMemory], str],
    free: Callable[[FreeMemory], float],
) -> list[tuple[str, int, float]]:
    """(name, number of workers, bytes free) of each node or GPU."""
    by_name: dict[str, list[float]] = {}
    for worker in workers:
        by_name.setdefault(place(worker), []).append(free(worker))
    return [(name, len(values), min(values)) for name, values in by_name.items()]


def _require(job: PlannedJob, what: str, name: str, count: int, free: float) -> None:
    """Raises `ResourceError` where `count` workers at `name` need more than is free there."""
    processes = 1 if job.in_process else count
    needed, where = held_bytes(job, what)
    if processes * needed <= free:
        return

    def fits(other: PlannedJob) -> bool:
        # With fewer workers in all there are fewer at this node or GPU, too.
        here = 1 if job.in_process else max(1, processes * other.workers // job.workers)
        if what == "device memory" or other.workers > job.workers:
            here = processes
        return here * held_bytes(other, what)[0] <= free

    options = [option.replace("--gpus", "--workers") for option in remedies(job, what, fits)]
    advice = "no single option makes it fit"
    if options:
        advice = "what would fit: " + ", or ".join(options)
    raise ResourceError(
        f"{name}: {where} needs at least {size_text(processes * needed)} of {what}, "
        f"{size_text(free)} are free; {advice}"
    )


def _surely_fits(skeleton: Skeleton, config: PruneConfig, workers: Sequence[FreeMemory]) -> bool:
    """Whether far more memory is free than the job can need: then no plan is made."""
    rules = config.layer_rules()
    full = any(solver_for(settings).needs == "full" for settings in rules.all_settings())
    most, size = 0.0, float(skeleton.dtype.itemsize)
    heads = getattr(skeleton.model.config.get_text_config(), "num_attention_heads", None) or 1
    tokens = float(config.batch_size * config.seqlen)
    for block, module in enumerate(skeleton.blocks):
        layers = layers_to_prune(skeleton, block, rules)
        squares = sum(8.0 * c * c for _, c in layers.values())
        widest = max((c for _, c in layers.values()), default=0)
        rows = max((48.0 * r * c for r, c in layers.values()), default=0.0)
        needed = sum(p.numel() for p in module.parameters()) * 3 * size + rows
        if full:
            needed += squares + 16.0 * widest * widest
        if config.reconstructs():
            # Gradients, sums of them, Adam's state, and what a backward needs.
            trained = sum(r * c for r, c in layers.values())
            needed += 48.0 * trained
            needed += 12.0 * tokens * sum(r + c for r, c in layers.values())
        if skeleton.attention == "eager":
            needed += 12.0 * tokens * config.seqlen * heads
        most = max(most, needed + 12.0 * tokens * sum(r + c for r, c in layers.values()))
    ends = 8.0 * sum(p.numel() for p in skeleton.model.get_input_embeddings().parameters())
    total = (most + ends) * len(workers)
    return all(total < w.host / 2 and (not w.gpu or total < w.free / 2) for w in workers)


def _planned(skeleton: Skeleton, config: PruneConfig, workers: Sequence[FreeMemory]) -> PlannedJob:
    """The job to plan, on the nodes of the given workers."""
    settings = config.solver_settings(config.method)
    shape = read_shape(
        skeleton.files.place,
        seqlen=config.seqlen,
        rules=config.layer_rules(),
        all_experts=config.calibrate_all_experts,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        # Other kernels store no scores, and may not run on the meta device.
        attn_implementation="eager" if skeleton.attention == "eager" else None,
    )
    total = min(worker.total for worker in workers)
    rates = replace(gpu_rates("H100"), device_memory=total) if total else cpu_rates()
    return PlannedJob(
        shape=shape,
        settings=settings,
        nsamples=config.nsamples,
        seqlen=config.seqlen,
        batch_size=config.batch_size,
        workers=len(workers),
        nodes=len({worker.node for worker in workers}),
        rates=rates,
        device_memory=total,
        in_process=config.executor == "local",
        hessian_memory=None if config.hessian_memory is None else config.hessian_memory * 1e9,
        expert_tokens=config.expert_tokens,
        reconstruct=config.reconstruction(config.nsamples),
        threads=config.threads or 1,
    )
