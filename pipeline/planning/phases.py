"""How long each phase takes: what the busiest rank does in it, over the rates.

A phase is a sum of parts, and all ranks wait for the slowest at its end. Reading ahead and writing
behind run in a thread beside the computation: of them only what is longer counts, and the first
piece. Where every core computes, hashing and copying take time from it and hide nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.planning.counts import (
    hessian_flops,
    objective_share,
    reduced_bytes,
    solve_counts,
    summed_bytes,
)
from pipeline.planning.job import PlannedJob
from pipeline.planning.memory import Held, embed_memory, phase_memory
from pipeline.planning.profile import ForwardProfile
from pipeline.planning.shape import BlockShape, GroupShape

COMPUTE, BANDWIDTH, LATENCY = "compute", "bandwidth", "latency"
DISK, HASH, NETWORK, HOST = "disk", "hashing", "network", "host copy"
# Trials of `--shrinkage auto` take about a quarter of the solve they choose for.
_CHOICE_SHARE = 0.25


@dataclass(frozen=True)
class Part:
    """Seconds of one kind of work, and what sets its pace."""

    what: str
    limit: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase: its parts, its peak memory (bytes of a worker's device and of its host process),
    and what all ranks together read, write and send, in bytes."""

    name: str
    parts: tuple[Part, ...]
    held: Held = field(default_factory=lambda: Held(0.0))
    read: float = 0.0
    written: float = 0.0
    sent: float = 0.0

    @property
    def seconds(self) -> float:
        """Wall seconds."""
        return sum(part.seconds for part in self.parts)

    @property
    def limit(self) -> str:
        """What takes most of the phase."""
        totals: dict[str, float] = {}
        for part in self.parts:
            totals[part.limit] = totals.get(part.limit, 0.0) + part.seconds
        return max(totals, key=lambda limit: totals[limit]) if totals else LATENCY


class PhaseModel:
    """Phases of a job, one method each."""

    def __init__(self, job: PlannedJob) -> None:
        self.job, self.rates, self.shape = job, job.rates, job.shape
        self._dispatch = Part("dispatch", LATENCY, job.rates.dispatch)

    # -- once -----------------------------------------------------------------------------------

    def start(self) -> Phase:
        """Ray and the workers."""
        return Phase(name="start workers", parts=(Part("start", LATENCY, self.rates.start),))

    def fingerprint(self) -> Phase:
        """Every weight file hashed and checked for NaN."""
        job, total = self.job, float(self.shape.weight_bytes)
        parts = (
            Part("read", DISK, total / self.rates.disk_read),
            Part("hash and check", HASH, job.busiest_files / self.rates.check),
            self._dispatch,
        )
        return Phase(name="check weights", parts=parts, read=total)

    def embed(self) -> Phase:
        """The embeddings loaded, and the first store written."""
        table = float(self.shape.ends * self.shape.itemsize)
        loaded = self._load(table)
        written, size = self._store_written()
        return Phase(
            name="embed",
            parts=(*loaded, *written, self._dispatch),
            held=embed_memory(self.job),
            read=table * self.job.nodes,
            written=size,
        )

    def write(self) -> Phase:
        """The output: weight files copied with the pruned tensors in place, then made durable."""
        job, total = self.job, float(self.shape.weight_bytes)
        own = float(job.busiest_files)
        pruned = self.pruned_bytes()
        share = own / total if total else 0.0
        parts = (
            Part("read", DISK, (total + pruned) / self.rates.disk_read),
            Part("write", DISK, total / self.rates.disk_write),
            Part("hash", HASH, (own + 2 * share * pruned) / self.rates.hash),
            Part("copy", HOST, (own + share * pruned) / self.rates.copy),
            Part("sync", LATENCY, 2 * self.rates.sync * len(self.shape.files)),
            self._dispatch,
        )
        largest = max(r * c for k in self.shape.kinds for g in k.groups for _, r, c in g.layers)
        held = Held(0.0, 2.0 * largest * self.shape.itemsize)
        return Phase(
            name="write output", parts=parts, held=held, read=total + pruned, written=total
        )

    def pruned_bytes(self) -> float:
        """Bytes of all row slices."""
        elements = sum(self.shape.kind(b).pruned for b in range(len(self.shape.blocks)))
        return float(elements * self.shape.itemsize)

    # -- for each block -------------------------------------------------------------------------

    def block(
        self, block: BlockShape, before: BlockShape | None, after: BlockShape | None
    ) -> list[Phase]:
        """A block's phases in order; `before`, `after`: its neighbours, None at the ends."""
        phases: list[Phase] = []
        turns = self.job.turns(block)
        for number, own in enumerate(turns):
            memory = phase_memory(self.job, own, before if not number else None)
            last = after if number + 1 == len(turns) else None
            if self.job.calibrates and (number or before is None):
                phases.append(self._calibrate(own, memory["calibrate"]))
            elif self.job.calibrates and before is not None:
                phases.append(self._advance(own, before, memory["advance"]))
            if "reduce" in memory:
                phases.append(self._reduce(own, memory["reduce"]))
            if "choose" in memory:
                phases.append(self._choose(own, memory["choose"]))
            phases.append(self._solve(own, memory["solve"], last))
        return phases

    def _calibrate(self, block: BlockShape, held: Held) -> Phase:
        weights = float(block.parameters * self.shape.itemsize)
        table = float(self.shape.ends * self.shape.itemsize)
        read, store = self._store_read()
        computed = [*self._forward(block.observed, "dense forward"), *self._hessian(block)]
        parts = (
            *self._load(weights + table),
            *computed,
            *self._hide(read, computed, self.job.busiest[2]),
            self._dispatch,
        )
        return Phase(
            name="calibrate",
            parts=parts,
            held=held,
            read=store + self.job.nodes * (weights + table),
        )

    def _advance(self, block: BlockShape, before: BlockShape, held: Held) -> Phase:
        """The block before, pruned, and this one, dense, on the same batches."""
        weights = float(before.parameters * self.shape.itemsize)
        slices = float(before.pruned * self.shape.itemsize)
        read, store = self._store_read()
        written, size = self._store_written()
        computed = [
            *self._forward(before.full, "pruned forward"),
            *self._forward(block.observed, "dense forward"),
            *self._hessian(block),
        ]
        parts = (
            *self._load(weights + slices),
            Part("verify slices", HASH, slices / self.rates.hash),
            *computed,
            *self._hide([*read, *written], computed, self.job.busiest[2]),
            self._dispatch,
        )
        return Phase(
            name="advance",
            parts=parts,
            held=held,
            read=store + self.job.nodes * (weights + slices),
            written=size,
        )

    def _hide(self, beside: list[Part], computed: list[Part], pieces: int) -> list[Part]:
        """What is left to wait for of work that runs beside the computation in `pieces`."""
        busy = () if self.rates.on_gpu else (HASH, HOST)
        shown = [part for part in beside if part.limit in busy]
        hidden = [part for part in beside if part.limit not in busy]
        total = sum(part.seconds for part in hidden)
        if not total:
            return shown
        first = 1 / max(pieces, 1)
        cover = (1 - first) * sum(part.seconds for part in computed)
        share = max(first, 1 - cover / total)
        return shown + [Part(p.what, p.limit, share * p.seconds) for p in hidden]

    def _reduce(self, block: BlockShape, held: Held) -> Phase:
        job, rates = self.job, self.rates
        own = sum(
            g.count * reduced_bytes(job.settings, g.columns, job.workers) for g in block.groups
        )
        # What leaves the node goes over its network, the rest over the link inside.
        outside = (job.workers - job.per_node) / max(job.workers - 1, 1) if job.nodes > 1 else 0.0
        added = sum(g.count * summed_bytes(job.settings, g.columns) for g in block.groups)
        parts = (
            Part("between nodes", NETWORK, own * outside / rates.network),
            Part("inside a node", NETWORK, own * (1 - outside) / rates.link),
            Part("add", BANDWIDTH, 8.0 * added / rates.memory if rates.on_gpu else 0.0),
            self._dispatch,
        )
        return Phase(name="reduce", parts=parts, held=held, sent=own * job.workers)

    def _choose(self, block: BlockShape, held: Held) -> Phase:
        """Groups are dealt to ranks whole: the costliest one's trials set the time."""
        worst = max(
            (
                sum(p.seconds for p in self._group(g, sum(r for _, r, _ in g.layers)))
                for g in block.groups
            ),
            default=0.0,
        )
        parts = (Part("trials", COMPUTE, _CHOICE_SHARE * worst), self._dispatch)
        return Phase(name="choose", parts=parts, held=held)

    def _solve(self, block: BlockShape, held: Held, after: BlockShape | None) -> Phase:
        """The rank that takes longest; meanwhile the next block's weights are read."""
        job = self.job
        cache: dict[tuple[GroupShape, int], list[Part]] = {}
        computed: list[Part] = []
        most = 0.0
        for own in job.deal(block):
            parts, entries = list[Part](), 0
            for group, rows in own:
                if rows and (group, rows) not in cache:
                    cache[group, rows] = self._group(group, rows)
                parts += cache[group, rows] if rows else []
                entries += rows * group.columns
            if not computed or _sum(parts) > _sum(computed):
                computed = parts
            most = max(most, float(entries * self.shape.itemsize))
        slices = float(block.pruned * self.shape.itemsize)
        parts = [*computed, *self._load(most, sharers=job.workers)]
        read = slices
        if after is not None and job.calibrates:
            ahead = float(after.parameters * self.shape.itemsize)
            parts += self._hide(self._load(ahead), computed, 1 << 30)
            read += ahead * job.nodes
        parts += [
            Part("write slices", DISK, slices / self.rates.disk_write),
            Part("hash slices", HASH, most / self.rates.hash),
            Part("sync", LATENCY, 4 * self.rates.sync),
            self._dispatch,
        ]
        return Phase(name="solve", parts=merge(parts), held=held, read=read, written=slices)

    # -- parts ----------------------------------------------------------------------------------

    def _group(self, group: GroupShape, rows: int) -> list[Part]:
        """One group's solve: what is done for the rows, and what every rank does alike."""
        rates, columns = self.rates, group.columns
        device = "cuda" if rates.on_gpu else "cpu"
        counts = solve_counts(self.job.settings, rows, columns, self.shape.itemsize, device)
        entries = float(rows) * columns
        one = 2.0 * entries * columns
        square, share = float(columns) * columns, objective_share(columns)
        parts = [
            self._product("products", counts.products, one, 4 * (square + 2 * entries), "float32"),
            self._product(
                "objective", counts.wide, share * one, 2 * square + 16 * entries, "float64"
            ),
            Part("products", COMPUTE, counts.other / rates.float32),
            Part("inverse, same on all", COMPUTE, counts.inverse / rates.inverse),
            Part("factor, same on all", COMPUTE, counts.factor / rates.factor),
            Part("iterations", BANDWIDTH, counts.steps * entries / rates.iteration),
            Part("passes over H and W", BANDWIDTH, counts.moved / rates.memory),
            Part("operators", LATENCY, counts.operators * rates.operator),
        ]
        return parts

    def _product(self, what: str, count: int, flops: float, moved: float, precision: str) -> Part:
        """Products as fast as the slower of arithmetic and memory; on a CPU caches hold them."""
        compute = count * flops / self.rates.product(precision)
        memory = count * moved / self.rates.memory if self.rates.on_gpu else 0.0
        return Part(what, BANDWIDTH if memory > compute else COMPUTE, max(compute, memory))

    def _forward(self, profile: ForwardProfile, what: str) -> list[Part]:
        job, rates = self.job, self.rates
        sequences, batches, _ = job.busiest
        flops = profile.products / rates.product(self.shape.dtype)
        # A block's result is checked for NaN: read, a mask written and read.
        checked = 2.0 * job.seqlen * self.shape.hidden * self.shape.forward_itemsize
        return [
            Part(f"{what}: products", COMPUTE, sequences * flops),
            Part(f"{what}: attention", COMPUTE, sequences * profile.attention / rates.attention),
            Part(
                f"{what}: elementwise",
                BANDWIDTH,
                sequences * (profile.moved + checked) / rates.memory,
            ),
            Part(f"{what}: operators", LATENCY, batches * profile.operators * rates.operator),
        ]

    def _hessian(self, block: BlockShape) -> list[Part]:
        job, rates = self.job, self.rates
        sequences, batches, _ = job.busiest
        tokens = float(sequences * job.seqlen)
        plain = rates.on_gpu and self.shape.dtype == "float32"
        flops, moved = 0.0, 0.0
        for group in block.groups:
            seen = group.count * group.share * tokens
            moved += seen * group.columns * (self.shape.forward_itemsize + 4)
            if job.needs == "full":
                flops += group.count * hessian_flops(group.share * tokens, group.columns)
                # The product written and read, float64 sums read and written: of a triangle.
                moved += group.count * batches * 13.5 * group.columns**2 if rates.on_gpu else 0.0
            else:
                moved += 12.0 * seen * group.columns
        precision = "float32" if plain else "statistics"
        return [
            Part("Hessian", COMPUTE, flops / rates.product(precision)),
            Part("Hessian: copies", BANDWIDTH, moved / rates.memory),
        ]

    def _load(self, size: float, sharers: int = 1) -> list[Part]:
        """`size` bytes read by a rank, the same by all ranks (sharers 1) or each its own."""
        fetched = size * (self.job.nodes if sharers == 1 else sharers)
        return [
            Part("load weights", DISK, fetched / self.rates.disk_read),
            Part("load weights", HOST, size / self.rates.copy),
        ]

    def _store_read(self) -> tuple[list[Part], float]:
        total, own, _ = self._store()
        parts = [
            Part("read store", DISK, total / self.rates.disk_read),
            Part("verify store", HASH, own / self.rates.hash),
        ]
        if self.rates.on_gpu:
            parts.append(Part("read store", HOST, own / self.rates.copy))
        return parts, total

    def _store_written(self) -> tuple[list[Part], float]:
        total, own, shards = self._store()
        parts = [
            Part("write store", DISK, total / self.rates.disk_write),
            Part("hash store", HASH, own / self.rates.hash),
            Part("sync", LATENCY, 2 * shards * self.rates.sync),
        ]
        return parts, total

    def _store(self) -> tuple[float, float, int]:
        """Bytes of a store, of the busiest rank's part of it, and that rank's files."""
        sequences, _, shards = self.job.busiest
        one = float(self.job.seqlen * self.shape.hidden * self.shape.forward_itemsize)
        return self.job.nsamples * one, sequences * one, shards


def _sum(parts: Iterable[Part]) -> float:
    return sum(part.seconds for part in parts)


def merge(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Parts of the same name and limit as one."""
    totals: dict[tuple[str, str], float] = {}
    for part in parts:
        key = (part.what, part.limit)
        totals[key] = totals.get(key, 0.0) + part.seconds
    return tuple(Part(what, limit, seconds) for (what, limit), seconds in totals.items())
