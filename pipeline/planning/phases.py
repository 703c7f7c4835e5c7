"""How long each phase takes: the work of the busiest worker, divided by the rates.

The time of a phase is the sum of its parts, and all workers wait for the slowest at its end.
Reading ahead and writing behind overlap with the computation in a background thread: only their
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
    solve_counts,
)
from pipeline.planning.memory import (
    PeakBytes,
    ahead_bytes,
    embed_memory,
    phase_memory,
    propagate_memory,
    rows_at_once,
    sums_products,
)
from pipeline.planning.pass_parts import PassParts
from pipeline.planning.phase_parts import (
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
from pipeline.planning.shapes.model import BlockShape, GroupShape
from pipeline.solvers.cost import objective_share
from pipeline.solvers.registry import solver_for

# Trials of `--shrinkage auto` take about a quarter of the solve they choose for.
_CHOICE_SHARE = 0.25
# Operators of a layer's checks, conversion and report, for any number of rows.
_PER_LAYER = 75


class PhaseModel(PassParts):
    """The phases of a job, one method each."""

    # -- phases that run once -------------------------------------------------------------------

    def start(self) -> Phase:
        """Starts Ray and the workers."""
        return Phase(name="start workers", parts=(PhasePart("start", LATENCY, self.rates.start),))

    def fingerprint(self) -> Phase:
        """Hashes every weight file and checks it for NaN."""
        job, total = self.job, float(self.shape.weight_bytes)
        parts = (
            PhasePart("read", DISK, total / self.rates.disk_read),
            PhasePart("hash and check", HASH, job.busiest_files / self.rates.check),
            self._dispatch,
        )
        return Phase(name="check weights", parts=parts, read=total)

    def embed(self) -> Phase:
        """Loads the embeddings, and writes the first activation store."""
        table = float(self.shape.ends * self.shape.itemsize)
        loaded = self._load(table)
        written, size = self._store_written()
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
        busiest = float(job.busiest_files)
        pruned = self.pruned_bytes()
        share = busiest / total if total else 0.0
        parts = (
            PhasePart("read", DISK, (total + pruned) / self.rates.disk_read),
            PhasePart("write", DISK, total / self.rates.disk_write),
            PhasePart("hash", HASH, (busiest + 2 * share * pruned) / self.rates.hash),
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
            through = before if self.job.calibrates else None
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
        return phases

    def _calibrate(self, block: BlockShape, peak: PeakBytes, first: bool) -> Phase:
        """The dense forward of a block, which sums the statistics of its layers.

        first: whether a rank also finds what it keeps for all blocks, with a batch of its own.
        """
        weights = float(block.parameters * self.shape.itemsize)
        table = float(self.shape.ends * self.shape.itemsize)
        read, store = self._store_read()
        computed = [*self._forward(block.observed, "dense forward"), *self._hessian(block)]
        finding = self._finding(block) if first else []
        parts = (
            *self._load(weights + table),
            *finding,
            *computed,
            *self._hide(read, computed, self.job.busiest[2]),
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
        # The solve of the previous block, if there was one, has read this block's weights ahead.
        weights = float(block.parameters * self.shape.itemsize)
        more, ahead = (0.0, weights) if before.groups else (weights, 0.0)
        observed = [*self._forward(block.observed, "dense forward"), *self._hessian(block)]
        return self._pass("advance", before, observed, more, ahead, peak)

    def _propagate(self, before: BlockShape) -> Phase:
        """Each batch through the previous block, pruned or not, for a block that stays dense."""
        return self._pass("propagate", before, [], 0.0, 0.0, propagate_memory(self.job, before))

    def _pass(
        self,
        name: str,
        before: BlockShape,
        observed: list[PhasePart],
        more: float,
        ahead: float,
        peak: PeakBytes,
    ) -> Phase:
        """Each batch through the previous block, followed by the parts `observed`.

        more, ahead: bytes of weights that are loaded besides those of the previous block, and of
        those that are in host memory already.
        """
        # Of a pruned block only what is not pruned is read from the source.
        weights = more + float((before.parameters - before.pruned) * self.shape.itemsize)
        slices = float(before.pruned * self.shape.itemsize)
        read, store = self._store_read()
        written, size = self._store_written()
        ran = "pruned forward" if before.groups else "forward of a block that stays dense"
        computed = [*self._forward(before.full, ran), *self._checked(), *observed]
        parts = (
            *self._load(weights + slices),
            *self._to_device("load weights", ahead),
            PhasePart("verify slices", HASH, slices / self.rates.hash),
            *computed,
            *self._hide([*read, *written], computed, self.job.busiest[2]),
            self._dispatch,
        )
        return Phase(
            name=name,
            parts=parts,
            peak=peak,
            read=store + self.job.nodes * (weights + slices),
            written=size,
        )

    def _hide(
        self, beside: list[PhasePart], computed: list[PhasePart], pieces: int
    ) -> list[PhasePart]:
        """The parts `beside`, less what overlaps with the computation, as they run in `pieces`."""
        busy = () if self.rates.on_gpu else (HASH, HOST)
        shown = [part for part in beside if part.limit in busy]
        hidden = [part for part in beside if part.limit not in busy]
        total = sum(part.seconds for part in hidden)
        if not total:
            return shown
        first = 1 / max(pieces, 1)
        cover = (1 - first) * sum(part.seconds for part in computed)
        share = max(first, 1 - cover / total)
        return shown + [PhasePart(p.what, p.limit, share * p.seconds) for p in hidden]

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
            PhasePart("Hessian", COMPUTE, products / rates.product(self._precision)),
            self._dispatch,
        )
        return Phase(name="reduce", parts=parts, peak=peak, sent=sent * job.workers)

    def _choose(self, block: BlockShape, peak: PeakBytes) -> Phase:
        """Trials for `--shrinkage auto`: one worker for each group, so the costliest one counts."""
        longest = max(
            (
                sum(p.seconds for p in self._group(g, sum(r for _, r, _ in g.layers)))
                for g in set(block.groups)
            ),
            default=0.0,
        )
        parts = (PhasePart("trials", COMPUTE, _CHOICE_SHARE * longest), self._dispatch)
        return Phase(name="choose", parts=parts, peak=peak)

    def _solve(self, block: BlockShape, peak: PeakBytes, after: BlockShape | None) -> Phase:
        """The solves of the slowest worker, which also reads the weights of the next block."""
        job = self.job
        cache: dict[tuple[GroupShape, int], list[PhasePart]] = {}
        computed: list[PhasePart] = []
        most = 0.0
        for worker_rows in job.deal(block):
            parts, entries = list[PhasePart](), 0
            for group, rows in worker_rows:
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
            parts += self._hide(self._load(ahead, what="read ahead"), computed, 1 << 30)
            read += ahead * job.nodes
        parts += [
            *self._to_device("copy back", most),
            PhasePart("write slices", DISK, slices / self.rates.disk_write),
            PhasePart("hash slices", HASH, most / self.rates.hash),
            PhasePart("sync", LATENCY, 4 * self.rates.sync),
            self._dispatch,
        ]
        return Phase(name="solve", parts=merge(parts), peak=peak, read=read, written=slices)

    # -- parts of phases ------------------------------------------------------------------------

    def _group(self, group: GroupShape, rows: int) -> list[PhasePart]:
        """The solve of `rows` rows of a group, with the work that is the same on every worker."""
        rates, columns = self.rates, group.columns
        most = rows_at_once(group)
        if rows > most:
            # Factorizations are computed again for each part of the rows.
            pieces = [most] * (rows // most) + ([rows % most] if rows % most else [])
            return list(merge(part for piece in pieces for part in self._group(group, piece)))
        device = "cuda" if rates.on_gpu else "cpu"
        counts = solve_counts(
            *(self.job.solved_with(group), rows, columns, self.shape.itemsize, device),
            inputs=self.job.inputs(group),
        )
        operators = counts.operators + _PER_LAYER * len(group.layers)
        entries = float(rows) * columns
        one = 2.0 * entries * columns
        square, share = float(columns) * columns, objective_share(columns)
        parts = [
            self._product("products", counts.products, one, 4 * (square + 2 * entries), "float32"),
            self._product(
                "objective", counts.wide, share * one, 2 * square + 16 * entries, "float64"
            ),
            PhasePart("products", COMPUTE, counts.other / rates.float32),
            PhasePart("inverse, same on all", COMPUTE, counts.inverse / rates.inverse),
            PhasePart("factor, same on all", COMPUTE, counts.factor / rates.factor),
            PhasePart("iterations", BANDWIDTH, counts.steps * entries / rates.iteration),
            PhasePart("passes over H and W", BANDWIDTH, counts.moved / rates.memory),
            PhasePart("operators", LATENCY, operators * rates.operator),
        ]
        return parts

    def _product(
        self, what: str, count: float, flops: float, moved: float, precision: str
    ) -> PhasePart:
        """Products, limited by arithmetic or by memory; on a CPU always by arithmetic (caches)."""
        compute = count * flops / self.rates.product(precision)
        memory = count * moved / self.rates.memory if self.rates.on_gpu else 0.0
        return PhasePart(what, BANDWIDTH if memory > compute else COMPUTE, max(compute, memory))


def _sum(parts: Iterable[PhasePart]) -> float:
    return sum(part.seconds for part in parts)
