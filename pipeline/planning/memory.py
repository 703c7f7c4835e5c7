"""Peak memory of a worker, phase by phase: what it holds at once, from shapes alone.

On a GPU the tensors lie in the device's memory, on a CPU in the process's. The counts follow
`pipeline/worker.py` and the solvers; what a process takes before it holds a tensor is the rates'.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.planning.counts import padded, statistic_bytes, summed_bytes
from pipeline.planning.job import PlannedJob
from pipeline.planning.shape import BlockShape, GroupShape
from pipeline.solvers import solver_for
from pipeline.solvers.types import AUTO
from pipeline.statistics import panels

# What numba and its compiler take in a process that runs the proximal operator on a CPU, as seen.
_NUMBA_BYTES = 70 * 2**20
# A C library keeps freed blocks below 32 MiB for later ones; those of forwards and of solves do not
# fit into each other's places. So much at most is kept that way, as seen.
_KEPT_BYTES = 256 * 2**20
# What a sum over ranks exchanges at once, bytes (`pipeline/collective.py`), and its buffers.
_CHUNK_BYTES = 1 << 28
_BUFFERS = 3
_INVERSE_PANEL = 512
_OBJECTIVE_ROWS = 2048
# Matrices of the rows' size, fp32, that a method holds at most, besides C x C.
_ROWS_HELD = {"prox_admm": 9, "prox": 7, "sparsegpt": 5, "wanda": 7, "magnitude": 6}
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
    uses = job.settings.method in ("prox", "prox_admm") and not job.rates.on_gpu
    return float(_NUMBA_BYTES) if uses else 0.0


def kept_by_allocator(held: float) -> float:
    """What stays in a process of a phase that held so much, when another kind of phase runs."""
    return min(held, float(_KEPT_BYTES))


def statistics_held(job: PlannedJob, block: BlockShape) -> float:
    """Bytes of a block's statistics on one rank."""
    return float(sum(g.count * statistic_bytes(job.settings, g.columns) for g in block.groups))


def sums_held(job: PlannedJob, block: BlockShape) -> float:
    """Bytes of a block's running sums on one rank, and of the product that is added to them."""
    widest = max((g.columns for g in block.groups), default=0) if job.needs == "full" else 0
    product = 4.0 * max((stop * (stop - start) for start, stop in panels(widest)), default=0)
    return product + sum(g.count * summed_bytes(job.settings, g.columns) for g in block.groups)


def phase_memory(job: PlannedJob, block: BlockShape, before: BlockShape | None) -> dict[str, Held]:
    """Peaks of a block's phases: name -> bytes. `before`: the block before it, None for block 0."""
    if not job.calibrates:
        return {"solve": _solve(job, block)}
    size = job.shape.forward_itemsize
    sums = sums_held(job, block)
    batch = job.largest_batch
    hidden = float(batch * job.seqlen * job.shape.hidden * size)
    largest = max((r * c for g in block.groups for _, r, c in g.layers), default=0)
    staged = float(largest * job.shape.itemsize)
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
    if job.settings.shrinkage == AUTO:
        found["choose"] = _choose(job, block)
    found["solve"] = _solve(job, block)
    return found


def _reduce(job: PlannedJob, block: BlockShape) -> Held:
    """Group by group, statistics are made of sums; sums over ranks go through buffers."""
    sums = [summed_bytes(job.settings, g.columns) for g in block.groups]
    widest = max((statistic_bytes(job.settings, g.columns) for g in block.groups), default=0)
    held = max(sums_held(job, block), statistics_held(job, block)) + widest
    if job.workers > 1 and not job.in_process:
        held += (_BUFFERS + 2 / job.workers) * min(_CHUNK_BYTES, max(sums, default=0))
    return Held(held)


def embed_memory(job: PlannedJob) -> Held:
    """The embeddings, and one batch of what they give."""
    size = job.shape.forward_itemsize
    hidden = job.largest_batch * job.seqlen * job.shape.hidden * size
    table = float(job.shape.ends * job.shape.itemsize)
    return Held(float(job.shape.ends * size + 2 * hidden), table)


def _solve(job: PlannedJob, block: BlockShape) -> Held:
    """The largest group's solve on any rank: groups are solved in turn, statistics dropped after.

    Meanwhile the next block's weights are read into the host's memory.
    """
    itemsize, worst = job.shape.itemsize, Held(0.0)
    ahead = float(block.parameters * job.shape.forward_itemsize) if job.calibrates else 0.0
    everything = statistics_held(job, block)
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
            left -= statistic_bytes(job.settings, group.columns)
    return worst


def _choose(job: PlannedJob, block: BlockShape) -> Held:
    """Trials on whole layers of the groups dealt to a rank."""
    worst = max(
        (
            solve_held(job, group, sum(r for _, r, _ in group.layers)) + 4.0 * group.columns**2
            for group in block.groups
        ),
        default=0.0,
    )
    return Held(statistics_held(job, block) + worst)


def solve_held(job: PlannedJob, group: GroupShape, rows: int) -> float:
    """Bytes that one group's solve of `rows` rows holds besides the statistics."""
    if not rows:
        return 0.0
    settings, columns = job.settings, float(group.columns)
    full = solver_for(settings).needs == "full"
    square = columns * columns
    entries = padded(rows) * columns
    held = _ROWS_HELD[settings.method]
    matrices = {"prox_admm": 4.0, "prox": 4.0, "sparsegpt": 8.0}.get(settings.method, 0.0) * square
    if settings.method == "prox_admm":
        matrices += 8.0 * columns * min(_INVERSE_PANEL, columns)
    if settings.refine != "none":
        held = max(held, _ROWS_HELD_REFINING)
    if not solver_for(settings).separable:
        held += _ROWS_HELD_SORTING
    if settings.shrinkage == AUTO:
        matrices += 4.0 * square  # both halves summed
    change = 16.0 * min(rows, _OBJECTIVE_ROWS) * columns if full else 0.0
    return matrices + entries * (4.0 * held + job.shape.itemsize) + change
