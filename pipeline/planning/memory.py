"""Peak memory of a worker, phase by phase: what it holds at once, from shapes alone.

On a GPU the tensors lie in the device's memory, on a CPU in the process's. The counts follow
`pipeline/worker/block_worker.py` and the solvers; what a process takes before it holds a tensor is
the rates'.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pipeline.config.solver import AUTO
from pipeline.planning.counts import padded
from pipeline.planning.planned_job import PlannedJob
from pipeline.planning.shapes.model import BlockShape, GroupShape
from pipeline.solvers.registry import solver_for
from pipeline.statistics.accumulate import panels
from pipeline.worker.solve import MOST_ROWS

# What numba and its compiler take in a process that runs the proximal operator on a CPU, as seen.
_NUMBA_BYTES = 70 * 2**20
# A C library keeps freed blocks below 32 MiB for later ones; those of forwards and of solves do not
# fit into each other's places. So much at most is kept that way, as seen.
_KEPT_BYTES = 256 * 2**20
# What a sum over ranks exchanges at once, bytes (`pipeline/statistics/all_reduce.py`), and its
# buffers.
_CHUNK_BYTES = 1 << 28
_BUFFERS = 3
_OBJECTIVE_ROWS = 2048
# Matrices of the rows' size, fp32, that a refinement holds.
_ROWS_HELD_REFINING = 9
# The unstructured choice sorts: values and 64-bit indices.
_ROWS_HELD_SORTING = 6


@dataclass(frozen=True)
class Held:
    """Bytes of tensors: with the model's and solver's device, and beside it on the host."""

    device: float
    host: float = 0.0


def compiler_bytes(job: PlannedJob) -> float:
    """What a CPU worker's process takes for compiled kernels."""
    uses = any(solver_for(settings).compiles for settings in job.every)
    return float(_NUMBA_BYTES) if uses and not job.rates.on_gpu else 0.0


def kept_by_allocator(held: float) -> float:
    """What stays in a process of a phase that held so much, when another kind of phase runs."""
    return min(held, float(_KEPT_BYTES))


def sums_held(job: PlannedJob, block: BlockShape) -> float:
    """Bytes of a block's running sums on one rank, and of the product that is added to them."""
    widest = max((g.columns for g in block.groups if multiplies(job, g)), default=0)
    product = 4.0 * max((stop * (stop - start) for start, stop in panels(widest)), default=0)
    return product + job.sums(block.groups)


def multiplies(job: PlannedJob, group: GroupShape) -> bool:
    """Whether products of a group's inputs are summed as they come."""
    full = solver_for(job.settings_of(group)).needs == "full"
    return full and not (group.kept and job.own_tokens(group) / job.halves < group.columns)


def phase_memory(
    job: PlannedJob, block: BlockShape, before: BlockShape | None, after: BlockShape | None
) -> dict[str, Held]:
    """Peaks of a pruned block's phases: name -> bytes. `before`, `after`: its neighbours, None at
    the ends, and `before` in every pass but the first."""
    if not job.calibrates:
        return {"solve": _solve(job, block, None)}
    size = job.shape.forward_itemsize
    sums = sums_held(job, block)
    batch = job.largest_batch
    hidden = float(batch * job.seqlen * job.shape.hidden * size)
    staged = staged_bytes(job, block)
    weights = float(block.parameters * size)
    found = {}
    observed = hidden + batch * block.observed.live
    if before is None:
        # What blocks are called with is learnt by running the embeddings beside the first block.
        ends = float(job.shape.ends * size) + 2 * hidden
        found["calibrate"] = Held(weights + max(sums + observed, ends + observed), staged)
    else:
        both = weights + float(before.parameters * size)
        forward = max(hidden + batch * before.full.live, hidden + observed)
        found["advance"] = Held(both + sums + forward, staged + 2 * hidden)
    found["reduce"] = _reduce(job, block)
    if job.halves > 1:
        found["choose"] = _choose(job, block)
    found["solve"] = _solve(job, block, after)
    return found


def staged_bytes(job: PlannedJob, block: BlockShape) -> float:
    """The largest of a block's layers, as it passes the host's memory."""
    largest = max((r * c for g in block.groups for _, r, c in g.layers), default=0)
    return float(largest * job.shape.itemsize)


def propagate_memory(job: PlannedJob, before: BlockShape) -> Held:
    """A block alone on its way to the next one's inputs, pruned or dense."""
    size = job.shape.forward_itemsize
    hidden = float(job.largest_batch * job.seqlen * job.shape.hidden * size)
    weights = float(before.parameters * size)
    live = job.largest_batch * before.full.live
    return Held(weights + hidden + live, staged_bytes(job, before) + 2 * hidden)


def _reduce(job: PlannedJob, block: BlockShape) -> Held:
    """Group by group, statistics are made of sums; sums over ranks go through buffers."""
    each = set(block.groups)
    # A rank's few inputs become a matrix where those of all ranks are not few.
    widest = max((job.statistics([g]) + job.counted([g]) * g.kept for g in each), default=0.0)
    held = max(sums_held(job, block), job.statistics(block.groups)) + widest
    if job.workers > 1 and not job.in_process:
        sums = max((job.counted([group]) for group in each), default=0.0)
        held += (_BUFFERS + 2 / job.workers) * min(_CHUNK_BYTES, sums)
    return Held(held)


def embed_memory(job: PlannedJob) -> Held:
    """The embeddings, and one batch of what they give."""
    size = job.shape.forward_itemsize
    hidden = job.largest_batch * job.seqlen * job.shape.hidden * size
    table = float(job.shape.ends * job.shape.itemsize)
    return Held(float(job.shape.ends * size + 2 * hidden), table)


def _solve(job: PlannedJob, block: BlockShape, after: BlockShape | None) -> Held:
    """The largest group's solve on any rank: groups are solved in turn, statistics dropped after.

    Meanwhile the weights of the block after it, if there is one, are read into the host's memory.
    """
    itemsize, worst = job.shape.itemsize, Held(0.0)
    ahead = ahead_bytes(job, after)
    everything = job.statistics(block.groups)
    # Of alike groups each its share: where routing is uneven, which one holds what is not known.
    each = {
        group: job.statistics([group] * count) / count
        for group, count in Counter(block.groups).items()
    }
    for own in job.deal(block):
        left, done = everything, 0.0
        for group, rows in own:
            if rows:
                slices = float(rows * group.columns * itemsize)
                total = left + solve_held(job, group, rows)
                on_host = ahead + done + 2 * slices
                if total + on_host > worst.device + worst.host:
                    worst = Held(total, on_host)
                done += slices
            left -= each[group]
    return worst


def ahead_bytes(job: PlannedJob, after: BlockShape | None) -> float:
    """What is read of the next block's weights while one is solved, and kept until it is used."""
    return 0.0 if after is None else float(after.parameters * job.shape.forward_itemsize)


def _choose(job: PlannedJob, block: BlockShape) -> Held:
    """Trials on whole layers of the groups dealt to a rank."""
    worst = max(
        (
            solve_held(job, group, sum(r for _, r, _ in group.layers)) + 4.0 * group.columns**2
            for group in set(block.groups)
        ),
        default=0.0,
    )
    return Held(job.statistics(block.groups) + worst)


def solve_held(job: PlannedJob, group: GroupShape, rows: int) -> float:
    """Bytes that one group's solve of `rows` rows holds besides the statistics."""
    if not rows:
        return 0.0
    settings, columns = job.solved_with(group), float(group.columns)
    solver = solver_for(settings)
    full = solver.needs == "full"
    rows = min(rows, rows_at_once(group))
    entries = padded(rows) * columns
    held = solver.rows_held
    inputs = job.inputs(group)
    if inputs is None or not full:
        matrices = solver.matrix_bytes(columns)
    else:
        matrices = solver.matrix_bytes_of_inputs(padded(rows), columns, inputs)
    if settings.refine != "none":
        held = max(held, _ROWS_HELD_REFINING)
    if not solver.separable:
        held += _ROWS_HELD_SORTING
    if settings.shrinkage == AUTO:
        matrices += 4.0 * columns * columns  # both halves summed
    change = 16.0 * min(rows, _OBJECTIVE_ROWS) * columns if full else 0.0
    return matrices + entries * (4.0 * held + job.shape.itemsize) + change


def rows_at_once(group: GroupShape) -> int:
    """Rows of a group that a solve takes at most at once: see `pipeline.worker.solve.in_parts`."""
    each = max(rows for _, rows, _ in group.layers)
    return max(each, MOST_ROWS * group.columns // each * each)
