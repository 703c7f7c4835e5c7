"""How long each phase takes: the work of the busiest worker, divided by the rates.

The time of a phase is the sum of its parts, and all workers wait for the slowest at its end.
Reading ahead and writing behind overlap with the computation in background threads: only their
first piece counts, and what takes longer than the computation. On a CPU hashing and copying use
cores that compute, so they do not overlap.
"""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.planning.counts import (
    hessian_flops,
    reduce_moved,
    reduce_operators,
    reduced_bytes,
)
from pipeline.planning.memory import (
    PeakBytes,
    ahead_bytes,
    embed_memory,
    phase_memory,
    propagate_memory,
    sums_products,
)
from pipeline.planning.parts.file_parts import FileParts
from pipeline.planning.parts.pass_parts import PassParts
from pipeline.planning.parts.phase_parts import (
    BANDWIDTH,
    COMPUTE,
    DISK,
    HASH,
    HOST,
    LATENCY,
    NETWORK,
    Phase,
    PhasePart,
    merge,
)
from pipeline.planning.parts.solve_parts import group_parts
from pipeline.planning.parts.train_parts import dense_memory, train_phase
from pipeline.planning.planned_job import PlannedJob, Share
from pipeline.planning.shapes.model import BlockShape
from pipeline.solvers.registry import solver_for

# Trials of `--shrinkage auto` take about a quarter of the solve they choose for.
_CHOICE_SHARE = 0.25


class PhaseModel:
    """The phases of a job, one method each."""

    def __init__(self, job: PlannedJob) -> None:
        self.job, self.rates, self.shape = job, job.rates, job.shape
        self.files, self.passes = FileParts(job), PassParts(job)
        self._dispatch = PhasePart("dispatch", LATENCY, job.rates.dispatch)

    # -- phases that run once -------------------------------------------------------------------

    def start(self) -> Phase:
        """Starts Ray and the workers."""
        return Phase(name="start workers", parts=(PhasePart("start", LATENCY, self.rates.start),))

    def fingerprint(self) -> Phase:
        """Hashes every weight file and checks it for NaN."""
        total = float(self.shape.weight_bytes)
        parts = (
            PhasePart("read", DISK, total / self.rates.disk_read),
            PhasePart("hash and check", HASH, self.files.longest_lane() / self.rates.check),
            self._dispatch,
        )
        return Phase(name="check weights", parts=parts, read=total)

    def embed(self) -> Phase:
        """Loads the embeddings, and writes the first activation store."""
        table = float(self.shape.ends * self.shape.itemsize)
        loaded = self.files.load(table)
        written, size = self.files.store_written()
        return Phase(
            name="embed",
            parts=(*loaded, *written, self._dispatch),
            peak=embed_memory(self.job),
            read=table * self.job.nodes,
            written=size,
        )

    def write(self) -> Phase:
        """Writes the output: copies weight files, with pruned tensors replaced, and syncs them."""
        job, total = self.job, float(self.shape.weight_bytes)
        busiest = sum(job.busiest_files)
        pruned = self.pruned_bytes()
        share = busiest / total if total else 0.0
        # A block's files are verified together: as many as there are workers, or more.
        lanes = min(job.file_threads, job.workers)
        parts = (
            PhasePart("read", DISK, (total + pruned) / self.rates.disk_read),
            PhasePart("write", DISK, total / self.rates.disk_write),
            PhasePart("hash", HASH, busiest / self.rates.hash),
            PhasePart("verify slices", HASH, 2 * share * pruned / lanes / self.rates.hash),
            PhasePart("copy", HOST, (busiest + share * pruned) / self.rates.copy),
            PhasePart("sync", LATENCY, 2 * self.rates.sync * len(self.shape.files)),
            self._dispatch,
        )
        largest = max(r * c for k in self.shape.kinds for g in k.groups for _, r, c in g.layers)
        peak = PeakBytes(0.0, 2.0 * largest * self.shape.itemsize)
        return Phase(
            name="write output", parts=parts, peak=peak, read=total + pruned, written=total
        )

    def pruned_bytes(self) -> float:
        """Bytes of all row slices."""
        elements = sum(self.shape.kind(b).pruned for b in range(len(self.shape.blocks)))
        return float(elements * self.shape.itemsize)

    # -- phases of a block ----------------------------------------------------------------------

    def block(
        self, block: BlockShape, before: BlockShape | None, after: BlockShape | None
    ) -> list[Phase]:
        """The phases of a block, in order.

        before, after: the neighbouring blocks, None at the ends. A block that stays dense has only
        the phase that computes its inputs.
        """
        phases: list[Phase] = []
        if not block.groups:
            through = before if self.job.keeps_inputs else None
            return [self._propagate(through)] if through is not None else []
        passes = self.job.passes(block)
        for number, part in enumerate(passes):
            memory = phase_memory(self.job, part, before if not number else None, after)
            last = after if number + 1 == len(passes) else None
            if self.job.calibrates and (number or before is None):
                peak = memory["calibrate"]
                ahead = ahead_bytes(self.job, after) if number else 0.0
                peak = PeakBytes(peak.device, peak.host + ahead)
                phases.append(self._calibrate(part, peak, first=not number))
            elif self.job.calibrates and before is not None:
                phases.append(self._advance(part, before, memory["advance"]))
            if "reduce" in memory:
                phases.append(self._reduce(part, memory["reduce"]))
            if "choose" in memory:
                phases.append(self._choose(part, memory["choose"]))
            phases.append(self._solve(part, memory["solve"], last))
        if self.job.reconstruct is not None:
            phases += [self._dense(block), train_phase(self.job, block, self.files, self._dispatch)]
        return phases

    def _dense(self, block: BlockShape) -> Phase:
        """The dense forward of a block that computes the targets of its reconstruction.

        It has the weights from the calibration, if there was one.
        """
        weights = 0.0 if self.job.calibrates else float(block.parameters * self.shape.itemsize)
        read, store = self.files.store_read()
        written, size = self.files.store_written()
        computed = [*self.passes.forward(block.full, "dense forward"), *self.passes.checked()]
        parts = (
            *(self.files.load(weights) if weights else []),
            *computed,
            *self.files.hide(read, written, computed, self.job.busiest[2]),
            self._dispatch,
        )
        return Phase(
            name="dense",
            parts=merge(parts),
            peak=dense_memory(self.job, block),
            read=store + self.job.nodes * weights,
            written=size,
        )

    def _calibrate(self, block: BlockShape, peak: PeakBytes, first: bool) -> Phase:
        """The dense forward of a block, which sums the statistics of its layers.

        first: whether a rank also finds what it keeps for all blocks, with a batch of its own.
        """
        weights = float(block.parameters * self.shape.itemsize)
        table = float(self.shape.ends * self.shape.itemsize)
        read, store = self.files.store_read()
        computed = self._observed(block)
        parts = (
            *self.files.load(weights + table),
            *(self.passes.finding(block) if first else []),
            *computed,
            *self.files.hide(read, [], computed, self.job.busiest[2]),
            self._dispatch,
        )
        return Phase(
            name="calibrate",
            parts=parts,
            peak=peak,
            read=store + self.job.nodes * (weights + table),
        )

    def _advance(self, block: BlockShape, before: BlockShape, peak: PeakBytes) -> Phase:
        """Each batch through the previous block, pruned, and then through this one, dense."""
        weights = float(block.parameters * self.shape.itemsize)
        # The solve of the previous block has read this block's weights ahead.
        loaded = self.files.copied(weights) if before.groups else self.files.load(weights)
        read = 0.0 if before.groups else weights
        return self._pass("advance", before, self._observed(block), loaded, read, peak)

    def _observed(self, block: BlockShape) -> list[PhasePart]:
        """The dense forward of a block, with the sums of its layers' statistics."""
        forward = self.passes.forward(block.observed, "dense forward")
        return [*forward, *self.passes.hessian(block)]

    def _propagate(self, before: BlockShape) -> Phase:
        """Each batch through the previous block, pruned or not, for a block that stays dense."""
        return self._pass("propagate", before, [], [], 0.0, propagate_memory(self.job, before))

    def _pass(
        self,
        name: str,
        before: BlockShape,
        observed: list[PhasePart],
        loaded: list[PhasePart],
        weights: float,
        peak: PeakBytes,
    ) -> Phase:
        """Each batch through the previous block, followed by the parts `observed`.

        loaded, weights: parts and bytes of the weights that are loaded besides those of the
        previous block, of which the pruned ones are in row slices.
        """
        dense = float((before.parameters - before.pruned) * self.shape.itemsize)
        slices = float(before.pruned * self.shape.itemsize)
        read, store = self.files.store_read()
        written, size = self.files.store_written()
        ran = "pruned forward" if before.groups else "forward of a block that stays dense"
        computed = [*self.passes.forward(before.full, ran), *self.passes.checked(), *observed]
        parts = (
            *loaded,
            *self.files.load(dense),
            *self.files.load_slices(before),
            *computed,
            *self.files.hide(read, written, computed, self.job.busiest[2]),
            self._dispatch,
        )
        return Phase(
            name=name,
            parts=merge(parts),
            peak=peak,
            read=store + self.job.nodes * (weights + dense + slices),
            written=size,
        )

    def _reduce(self, block: BlockShape, peak: PeakBytes) -> Phase:
        """Sums the statistics over the workers."""
        job, rates = self.job, self.rates
        added, products, operators = 0.0, 0.0, 0.0
        for group in block.groups:
            inputs = job.inputs(group)
            full = solver_for(job.settings_of(group)).needs == "full"
            # Inputs that are few in total are gathered, in fp32, instead of summed as products.
            kept = inputs is not None and full
            size = 4.0 * (inputs or 0) * group.columns if kept else job.counted([group])
            added += size
            operators += reduce_operators(size, group.columns, job.workers, full)
            if full and not kept and not sums_products(job, group):
                products += hessian_flops(job.busiest_tokens(group), group.columns)
        sent = reduced_bytes(added, job.workers)
        # Traffic to other nodes uses the network, the rest the links inside a node.
        outside = (job.workers - job.per_node) / max(job.workers - 1, 1) if job.nodes > 1 else 0.0
        moved = reduce_moved(added, job.workers) if rates.on_gpu else 0.0
        parts = (
            PhasePart("between nodes", NETWORK, sent * outside / rates.network),
            PhasePart("inside a node", NETWORK, sent * (1 - outside) / rates.link),
            PhasePart("add", BANDWIDTH, moved / rates.memory),
            PhasePart("operators", LATENCY, operators * rates.operator),
            PhasePart("Hessian", COMPUTE, products / rates.product(self.passes.precision)),
            self._dispatch,
        )
        return Phase(name="reduce", parts=parts, peak=peak, sent=sent * job.workers)

    def _choose(self, block: BlockShape, peak: PeakBytes) -> Phase:
        """Trials for `--shrinkage auto`: one worker for each group, so the costliest one counts."""
        longest = max(
            (
                _sum(group_parts(self.job, g, sum(r for _, r, _ in g.layers)))
                for g in set(block.groups)
            ),
            default=0.0,
        )
        parts = (PhasePart("trials", COMPUTE, _CHOICE_SHARE * longest), self._dispatch)
        return Phase(name="choose", parts=parts, peak=peak)

    def _solve(self, block: BlockShape, peak: PeakBytes, after: BlockShape | None) -> Phase:
        """The solves of the slowest worker, which also reads the weights of the next block."""
        job = self.job
        cache: dict[Share, list[PhasePart]] = {}
        computed: list[PhasePart] = []
        for shares in job.deal(block):
            parts = list[PhasePart]()
            for share in filter(lambda share: share.rows, shares):
                if share not in cache:
                    cache[share] = group_parts(job, share.group, share.rows, share.team)
                parts += cache[share]
            if not computed or _sum(parts) > _sum(computed):
                computed = parts
        slices = float(block.pruned * self.shape.itemsize)
        most = max(self.files.slices(block), default=0.0)
        parts = [*computed, *self.files.load(most, sharers=job.workers)]
        read = slices
        if after is not None and job.calibrates:
            ahead = float(after.parameters * self.shape.itemsize)
            read_ahead = self.files.load(ahead, what="read ahead")
            parts += self.files.hide(read_ahead, [], computed, 1 << 30)
            read += ahead * job.nodes
        parts += [*self.files.write_slices(block), self._dispatch]
        return Phase(name="solve", parts=merge(parts), peak=peak, read=read, written=slices)


def _sum(parts: Iterable[PhasePart]) -> float:
    return sum(part.seconds for part in parts)
