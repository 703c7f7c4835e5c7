"""The plan of a job: time, peak memory and bytes of its phases and blocks; what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from pipeline.planning.counts import store_bytes
from pipeline.planning.memory import compiler_bytes, kept_by_allocator, sums_bytes
from pipeline.planning.parts.phase_parts import Phase
from pipeline.planning.phases import PhaseModel
from pipeline.planning.planned_job import PlannedJob
from pipeline.solvers.registry import solver_class

PLAN_SCHEMA = 1
# Memory of the GPU's allocator over that of the tensors in it.
_FRAGMENTATION = 1.05
# Bytes on disk of records, tokens and side files.
SLACK_BYTES = 64 << 20


@dataclass(frozen=True)
class BlockPlan:
    """Consecutive blocks `first` to `last` (inclusive), each with the same phases."""

    first: int
    last: int
    phases: tuple[Phase, ...]

    @property
    def count(self) -> int:
        """Number of blocks."""
        return self.last - self.first + 1

    @property
    def seconds(self) -> float:
        """Wall seconds of one of the blocks."""
        return sum(phase.seconds for phase in self.phases)


@dataclass(frozen=True)
class Need:
    """The most that a job needs of a resource, and how much there is of it.

    what: "device memory", "host memory" or "disk". where: the phase that needs most. needs, has:
    bytes; `has` is None where it is unknown.
    """

    what: str
    where: str
    needs: float
    has: float | None

    @property
    def fits(self) -> bool:
        """Whether there is enough; True where that is unknown."""
        return self.has is None or self.needs <= self.has


class Plan:
    """Time, memory and disk that a `PlannedJob` will take.

    before, after: the phases before and after all blocks. blocks: those between.
    """

    def __init__(self, job: PlannedJob) -> None:
        self.job = job
        model = PhaseModel(job)
        self.before: tuple[Phase, ...] = (model.start(), model.fingerprint())
        if job.keeps_inputs:
            self.before += (model.embed(),)
        self.blocks = tuple(_blocks(job, model))
        self.after: tuple[Phase, ...] = (model.write(),)
        self.pruned_bytes = model.pruned_bytes()

    @cached_property
    def seconds(self) -> float:
        """Wall seconds of the whole job."""
        once = sum(phase.seconds for phase in (*self.before, *self.after))
        return once + sum(block.count * block.seconds for block in self.blocks)

    def phases(self) -> Iterator[tuple[str, int, Phase]]:
        """(where, number of times, phase) of every phase."""
        for phase in self.before:
            yield phase.name, 1, phase
        for block in self.blocks:
            for phase in block.phases:
                yield f"block {block.first}, {phase.name}", block.count, phase
        for phase in self.after:
            yield phase.name, 1, phase

    def totals(self) -> dict[str, dict[str, Any]]:
        """Phase name -> totals over all blocks, in the order in which the phases first run.

        `host_bytes` and `device_bytes` are maxima. `limits`: seconds by what limits the speed.
        """
        totals: dict[str, dict[str, Any]] = {}
        for _, count, phase in self.phases():
            total = totals.setdefault(
                phase.name,
                {"count": 0, "seconds": 0.0, "host_bytes": 0.0, "device_bytes": 0.0,
                 "read_bytes": 0.0, "written_bytes": 0.0, "network_bytes": 0.0, "limits": {}},
            )  # fmt: skip
            total["count"] += count
            total["seconds"] += count * phase.seconds
            total["host_bytes"] = max(total["host_bytes"], self.host_bytes(phase))
            total["device_bytes"] = max(total["device_bytes"], self.device_bytes(phase))
            total["read_bytes"] += count * phase.read
            total["written_bytes"] += count * phase.written
            total["network_bytes"] += count * phase.sent
            for part in phase.parts:
                limits = total["limits"]
                limits[part.limit] = limits.get(part.limit, 0.0) + count * part.seconds
        return totals

    def device_bytes(self, phase: Phase) -> float:
        """Peak bytes of one GPU in a phase; 0 on CPUs."""
        if not self.job.rates.on_gpu:
            return 0.0
        return self.job.rates.device_bytes + _FRAGMENTATION * phase.peak.device

    def host_bytes(self, phase: Phase) -> float:
        """Peak bytes of a worker's process in a phase; with the local executor, of all workers."""
        peak = phase.peak.host
        if not self.job.rates.on_gpu:
            peak += phase.peak.device + compiler_bytes(self.job)
            peak += kept_by_allocator(self._largest[not _solves(phase)])
            if self.job.in_process and self.job.calibrates:
                kinds = self.job.shape.kinds
                kept = max(
                    sums_bytes(self.job, each) for kind in kinds for each in self.job.passes(kind)
                )
                peak += (self.job.workers - 1) * kept
        return self.job.rates.host_bytes + peak

    @cached_property
    def _largest(self) -> dict[bool, float]:
        """Tensor bytes of the largest phase that solves (True), and of the largest other one."""
        largest = {True: 0.0, False: 0.0}
        for _, _, phase in self.phases():
            total = phase.peak.device + phase.peak.host
            largest[_solves(phase)] = max(largest[_solves(phase)], total)
        return largest

    @property
    def disk_bytes(self) -> dict[str, float]:
        """The most bytes on disk: activation stores, row slices, the output, and the rest.

        There are two stores at a time, three with the targets of a reconstruction.
        """
        job = self.job
        store = store_bytes(job.nsamples, job.seqlen, job.shape.hidden, job.shape.forward_itemsize)
        blocks = len(job.shape.blocks)
        stores = 2 if job.reconstruct is None else 3
        return {
            "activations": float(store * min(stores, blocks + 1)) if job.keeps_inputs else 0.0,
            "checkpoints": self.pruned_bytes,
            "output": float(job.shape.weight_bytes),
            "other": float(SLACK_BYTES),
        }

    @property
    def network_bytes(self) -> float:
        """Bytes that all workers together send in the whole job."""
        return sum(count * phase.sent for _, count, phase in self.phases())

    def needs(self) -> tuple[Need, ...]:
        """The most device memory, host memory of a node, and disk that the job needs.

        In a model with experts this is the maximum over all ways to route the tokens.
        """
        if self.job.routes and not self.job.uneven:
            return Plan(replace(self.job, uneven=True)).needs()
        job, needs = self.job, []
        all_phases = list(self.phases())
        if job.rates.on_gpu:
            where, _, phase = max(all_phases, key=lambda item: self.device_bytes(item[2]))
            memory = job.device_memory or job.rates.device_memory
            needs.append(Need("device memory", where, self.device_bytes(phase), memory))
        where, _, phase = max(all_phases, key=lambda item: self.host_bytes(item[2]))
        processes = 1 if job.in_process else job.per_node
        driver = 0.0 if job.in_process else min(job.rates.host_bytes, 600e6)
        host = processes * self.host_bytes(phase) + driver
        needs.append(Need("host memory", where, host, job.host_memory))
        needs.append(Need("disk", "the last block", sum(self.disk_bytes.values()), job.disk))
        return tuple(needs)

    def problems(self) -> tuple[tuple[Need, tuple[str, ...]], ...]:
        """What does not fit, and the options that each make it fit, the least costly first."""

        def fits(what: str, other: PlannedJob) -> bool:
            return next(need for need in Plan(other).needs() if need.what == what).fits

        return tuple(
            (need, remedies(self.job, need.what, partial(fits, need.what)))
            for need in self.needs()
            if not need.fits
        )


def _solves(phase: Phase) -> bool:
    return phase.name in ("solve", "choose")


def _blocks(job: PlannedJob, model: PhaseModel) -> Iterator[BlockPlan]:
    """The blocks with their phases; consecutive blocks with the same phases are one entry."""
    shape = job.shape
    cache: dict[tuple[int | None, ...], tuple[Phase, ...]] = {}
    start, current = 0, tuple[int | None, ...]()
    kinds = (None, *shape.blocks, None)
    # Blocks after the last one that is pruned are never run.
    last = max(block for block, kind in enumerate(shape.blocks) if shape.kinds[kind].groups)
    for block, nearby in enumerate(zip(kinds[1:-1], kinds[:-2], kinds[2:], strict=True)):
        key = (*nearby, int(block <= last))
        if key not in cache:
            kind, before, after = (None if k is None else shape.kinds[k] for k in nearby)
            assert kind is not None
            cache[key] = tuple(model.block(kind, before, after)) if block <= last else ()
        if current and key != current:
            yield BlockPlan(start, block - 1, cache[current])
            start = block
        current = key
    if current:
        yield BlockPlan(start, len(shape.blocks) - 1, cache[current])


def remedies(job: PlannedJob, what: str, fits: Callable[[PlannedJob], bool]) -> tuple[str, ...]:
    """Options, as text, each of which alone makes the job fit. For each, the smallest change.

    what: the `Need` that does not fit. fits: whether it fits in another job.
    """
    options = []
    for texts, others in _variants(job, what):
        for text, other in zip(texts, others, strict=True):
            if fits(other):
                options.append(text)
                break
    return tuple(options)


def _variants(job: PlannedJob, what: str) -> Iterator[tuple[list[str], list[PlannedJob]]]:
    """For each option: values as text, and the jobs with them, from the smallest change on."""
    if what != "disk":
        sizes = _halves(job.batch_size)
        yield [f"--batch-size {n}" for n in sizes], [replace(job, batch_size=n) for n in sizes]
        sums = max(job.counted(kind.groups) for kind in job.shape.kinds)
        limits = [f"{sums / 2**k / 1e9:.2g}" for k in range(1, 5)] if sums > 1e8 else []
        yield (
            [f"--hessian-memory {n}" for n in limits],
            [replace(job, hessian_memory=1e9 * float(n)) for n in limits],
        )
    if what == "host memory" and job.per_node > 1:
        counts = [n * job.nodes for n in _halves(job.per_node)]
        yield [f"--workers {n}" for n in counts], [replace(job, workers=n) for n in counts]
    if what == "device memory":
        counts = [job.workers * 2**k for k in range(1, 7)]
        yield (
            [f"--gpus {n}" for n in counts],
            [replace(job, workers=n, nodes=-(-n // job.per_node)) for n in counts],
        )
    lengths = _halves(job.seqlen, least=128)
    yield [f"--seqlen {n}" for n in lengths], [at_seqlen(job, n) for n in lengths]
    if what == "disk":
        counts = _halves(job.nsamples)
        yield [f"--nsamples {n}" for n in counts], [replace(job, nsamples=n) for n in counts]
    elif not solver_class(job.settings.method).by_score:
        others = [m for m in ("sparsegpt", "wanda") if m != job.settings.method]
        changed = [type(job.settings)(method=m, pattern=job.settings.pattern) for m in others]
        yield (
            [f"--method {m}" for m in others],
            [replace(job, settings=settings.resolved()) for settings in changed],
        )


def _halves(value: int, least: int = 1) -> list[int]:
    """A half, a quarter ... of `value`, down to `least`."""
    halves = []
    while value // 2 >= least:
        value //= 2
        halves.append(value)
    return halves


def at_seqlen(job: PlannedJob, seqlen: int) -> PlannedJob:
    """The job with another seqlen: attention scales with its square, the rest in proportion."""
    ratio = seqlen / job.seqlen
    kinds = []
    for kind in job.shape.kinds:
        full, observed = (
            replace(
                profile,
                products=profile.products * ratio,
                attention=profile.attention * ratio**2,
                moved=profile.moved * ratio,
                live=round(profile.live * ratio),
                saved=round(profile.saved * ratio),
            )
            for profile in (kind.full, kind.observed)
        )
        kinds.append(replace(kind, full=full, observed=observed))
    shape = replace(job.shape, kinds=tuple(kinds), seqlen=seqlen)
    return replace(job, shape=shape, seqlen=seqlen)


def with_workers(job: PlannedJob, workers: int) -> PlannedJob:
    """The job on another number of workers, with as many on a node."""
    return replace(job, workers=workers, nodes=-(-workers // job.per_node))


def scaling(job: PlannedJob, most: int | None = None) -> list[tuple[int, Plan]]:
    """(workers, plan) for 1, 2, 4 ... workers, up to `most`, and for the job's number of them.

    `most` is by default twice the workers of the job, at least 8.
    """
    limit = most or max(8, 2 * job.workers)
    counts, workers = set[int](), 1
    while workers <= limit:
        counts.add(workers)
        workers *= 2
    counts.add(job.workers)
    return [(n, Plan(with_workers(job, n))) for n in sorted(counts)]
