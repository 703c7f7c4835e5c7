"""A job's plan: phases and blocks with their seconds, peaks and bytes, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from pipeline.planning.counts import store_bytes
from pipeline.planning.memory import compiler_bytes, kept_by_allocator, sums_held
from pipeline.planning.phase_parts import Phase
from pipeline.planning.phases import PhaseModel
from pipeline.planning.planned_job import PlannedJob
from pipeline.solvers.registry import solver_class

PLAN_SCHEMA = 1
# What an allocator on a GPU leaves unused between tensors.
_FRAGMENTATION = 1.05
# Records, tokens and side files.
SLACK_BYTES = 64 << 20


@dataclass(frozen=True)
class BlockPlan:
    """Consecutive blocks `first` to `last` that take the same, each with these phases."""

    first: int
    last: int
    phases: tuple[Phase, ...]

    @property
    def count(self) -> int:
        """How many blocks."""
        return self.last - self.first + 1

    @property
    def seconds(self) -> float:
        """Wall seconds of one of them."""
        return sum(phase.seconds for phase in self.phases)


@dataclass(frozen=True)
class Need:
    """What the job takes most of somewhere, against what is there; bytes, `has` None: unknown."""

    what: str
    where: str
    needs: float
    has: float | None

    @property
    def fits(self) -> bool:
        """Whether it is enough, as far as is known."""
        return self.has is None or self.needs <= self.has


class Plan:
    """What `PlannedJob` will take."""

    def __init__(self, job: PlannedJob) -> None:
        self.job = job
        model = PhaseModel(job)
        self.before: tuple[Phase, ...] = (model.start(), model.fingerprint())
        if job.calibrates:
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
        """(where, how often, phase) of every phase there is."""
        for phase in self.before:
            yield phase.name, 1, phase
        for block in self.blocks:
            for phase in block.phases:
                yield f"block {block.first}, {phase.name}", block.count, phase
        for phase in self.after:
            yield phase.name, 1, phase

    def totals(self) -> dict[str, dict[str, Any]]:
        """Phase name -> its totals over all blocks, in order of time."""
        found: dict[str, dict[str, Any]] = {}
        for _, count, phase in self.phases():
            total = found.setdefault(
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
        return found

    def device_bytes(self, phase: Phase) -> float:
        """Peak of one GPU in a phase; 0 on CPUs."""
        if not self.job.rates.on_gpu:
            return 0.0
        return self.job.rates.device_bytes + _FRAGMENTATION * phase.held.device

    def host_bytes(self, phase: Phase) -> float:
        """Peak of one worker's process in a phase; in process, of all ranks at once."""
        held = phase.held.host
        if not self.job.rates.on_gpu:
            held += phase.held.device + compiler_bytes(self.job)
            held += kept_by_allocator(self._largest[not _solves(phase)])
            if self.job.in_process and self.job.calibrates:
                kinds = self.job.shape.kinds
                kept = max(
                    sums_held(self.job, each) for kind in kinds for each in self.job.passes(kind)
                )
                held += (self.job.workers - 1) * kept
        return self.job.rates.host_bytes + held

    @cached_property
    def _largest(self) -> dict[bool, float]:
        """Bytes of the largest phase that solves (True), and of the largest other one."""
        found = {True: 0.0, False: 0.0}
        for _, _, phase in self.phases():
            total = phase.held.device + phase.held.host
            found[_solves(phase)] = max(found[_solves(phase)], total)
        return found

    @property
    def disk_bytes(self) -> dict[str, float]:
        """What lies on disk at most: activation stores, row slices, the output."""
        job = self.job
        store = store_bytes(job.nsamples, job.seqlen, job.shape.hidden, job.shape.forward_itemsize)
        blocks = len(job.shape.blocks)
        return {
            "activations": float(store * min(2, blocks)) if job.calibrates else 0.0,
            "checkpoints": self.pruned_bytes,
            "output": float(job.shape.weight_bytes),
            "other": float(SLACK_BYTES),
        }

    @property
    def network_bytes(self) -> float:
        """Bytes that all ranks send one another in the whole job."""
        return sum(count * phase.sent for _, count, phase in self.phases())

    def needs(self) -> tuple[Need, ...]:
        """Device memory, host memory of the fullest node, and disk, each at its highest.

        Where experts hold what they are sent, the most that any routing can make them hold.
        """
        if self.job.routes and not self.job.uneven:
            return Plan(replace(self.job, uneven=True)).needs()
        job, found = self.job, []
        all_phases = list(self.phases())
        if job.rates.on_gpu:
            where, _, phase = max(all_phases, key=lambda item: self.device_bytes(item[2]))
            memory = job.device_memory or job.rates.device_memory
            found.append(Need("device memory", where, self.device_bytes(phase), memory))
        where, _, phase = max(all_phases, key=lambda item: self.host_bytes(item[2]))
        processes = 1 if job.in_process else job.per_node
        driver = 0.0 if job.in_process else min(job.rates.host_bytes, 600e6)
        host = processes * self.host_bytes(phase) + driver
        found.append(Need("host memory", where, host, job.host_memory))
        found.append(Need("disk", "the last block", sum(self.disk_bytes.values()), job.disk))
        return tuple(found)

    def problems(self) -> tuple[tuple[Need, tuple[str, ...]], ...]:
        """What does not fit, with the options that make it fit, the least costly first."""

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
    """Blocks with their phases; neighbours that take the same are one entry."""
    shape = job.shape
    cache: dict[tuple[int | None, ...], tuple[Phase, ...]] = {}
    start, current = 0, tuple[int | None, ...]()
    kinds = (None, *shape.blocks, None)
    # What comes after the last block that is pruned is never run.
    last = max(block for block, kind in enumerate(shape.blocks) if shape.kinds[kind].groups)
    for block, near in enumerate(zip(kinds[1:-1], kinds[:-2], kinds[2:], strict=True)):
        key = (*near, int(block <= last))
        if key not in cache:
            own, before, after = (None if k is None else shape.kinds[k] for k in near)
            assert own is not None
            cache[key] = tuple(model.block(own, before, after)) if block <= last else ()
        if current and key != current:
            yield BlockPlan(start, block - 1, cache[current])
            start = block
        current = key
    if current:
        yield BlockPlan(start, len(shape.blocks) - 1, cache[current])


def remedies(job: PlannedJob, what: str, fits: Callable[[PlannedJob], bool]) -> tuple[str, ...]:
    """Options, each of which alone makes the job fit; one that helps nowhere is not named.

    what: the `Need` that does not fit; fits: whether that of another job does.
    """
    found = []
    for texts, others in _variants(job, what):
        for text, other in zip(texts, others, strict=True):
            if fits(other):
                found.append(text)
                break
    return tuple(found)


def _variants(job: PlannedJob, what: str) -> Iterator[tuple[list[str], list[PlannedJob]]]:
    """Families of changes, each from the smallest on."""
    if what != "disk":
        sizes = _halves(job.batch_size)
        yield [f"--batch-size {n}" for n in sizes], [replace(job, batch_size=n) for n in sizes]
        held = max(job.counted(kind.groups) for kind in job.shape.kinds)
        limits = [f"{held / 2**k / 1e9:.2g}" for k in range(1, 5)] if held > 1e8 else []
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
    found = []
    while value // 2 >= least:
        value //= 2
        found.append(value)
    return found


def at_seqlen(job: PlannedJob, seqlen: int) -> PlannedJob:
    """The job with shorter sequences: attention falls with the square, all else in proportion."""
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
            )
            for profile in (kind.full, kind.observed)
        )
        kinds.append(replace(kind, full=full, observed=observed))
    shape = replace(job.shape, kinds=tuple(kinds), seqlen=seqlen)
    return replace(job, shape=shape, seqlen=seqlen)


def with_workers(job: PlannedJob, workers: int) -> PlannedJob:
    """The same job on another number of workers of the same kind, as many on a node."""
    return replace(job, workers=workers, nodes=-(-workers // job.per_node))


def scaling(job: PlannedJob, most: int | None = None) -> list[tuple[int, Plan]]:
    """Plans for 1, 2, 4 ... workers, beyond the job's own number."""
    limit = most or max(8, 2 * job.workers)
    counts, workers = set[int](), 1
    while workers <= limit:
        counts.add(workers)
        workers *= 2
    counts.add(job.workers)
    return [(n, Plan(with_workers(job, n))) for n in sorted(counts)]
