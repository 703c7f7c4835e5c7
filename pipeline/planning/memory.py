"""Peak memory of a worker in each phase, from shapes alone.

Tensors are in the memory of the GPU, or of the process on a CPU. The counts follow the code of
`pipeline/worker/block_worker.py` and of the solvers. Memory that a process takes before it
allocates tensors is part of `Rates`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pipeline.config.solver import AUTO
from pipeline.planning.counts import padded
from pipeline.planning.planned_job import PlannedJob
from pipeline.planning.shapes.model import BlockShape, GroupShape
from pipeline.runtime.split import sequences_per_shard
from pipeline.solvers.registry import solver_for
from pipeline.statistics.accumulate import panels
from pipeline.worker.forward import SHARDS_ON_GPU
from pipeline.worker.solve import MOST_ROWS
from pipeline.worker.transfer.staging import PINNED_BYTES

# Bytes of numba and its compiler in a CPU process that runs the proximal operator; measured.
_NUMBA_BYTES = 70 * 2**20
# The C library keeps freed allocations below 32 MiB. Those of forwards and of solves do not fit
# each other. This is the most that was seen to be kept.
_KEPT_BYTES = 256 * 2**20
# Bytes that a sum over workers exchanges at once (`pipeline/statistics/all_reduce.py`), and the
# number of buffers of this size.
_CHUNK_BYTES = 1 << 28
_BUFFERS = 3
_OBJECTIVE_ROWS = 2048
# (R, C) fp32 matrices that a refinement holds, two masks among them. The inverse is gone by then.
_ROWS_HELD_REFINING = 10.5
# The same for sorting scores with an unstructured pattern: values and 64-bit indices.
_ROWS_HELD_SORTING = 6


@dataclass(frozen=True)
class PeakBytes:
    """Peak bytes of tensors: on the device of model and solver, and on the host besides it."""

    device: float
    host: float = 0.0


def compiler_bytes(job: PlannedJob) -> float:
    """Bytes that compiled kernels take in the process of a CPU worker."""
    uses = any(solver_for(settings).compiles for settings in job.every)
    return float(_NUMBA_BYTES) if uses and not job.rates.on_gpu else 0.0


def kept_by_allocator(peak: float) -> float:
    """Bytes that stay with the process from a phase with this peak, in phases of the other kind."""
    return min(peak, float(_KEPT_BYTES))


def sums_bytes(job: PlannedJob, block: BlockShape) -> float:
    """Bytes of the running sums of a block on one worker, and of a product to be added to them."""
    widest = max((g.columns for g in block.groups if sums_products(job, g)), default=0)
    product = 4.0 * max((stop * (stop - start) for start, stop in panels(widest)), default=0)
    return product + job.sums(block.groups)


def sums_products(job: PlannedJob, group: GroupShape) -> bool:
    """Whether products of a group's inputs are summed batch by batch, instead of kept as inputs."""
    full = solver_for(job.settings_of(group)).needs == "full"
    return full and not (group.kept and job.busiest_tokens(group) / job.halves < group.columns)


def phase_memory(
    job: PlannedJob, block: BlockShape, before: BlockShape | None, after: BlockShape | None
) -> dict[str, PeakBytes]:
    """Phase name -> peak bytes, for the phases of a block that is pruned.

    before, after: the neighbouring blocks, None at the ends. `before` is None in every pass but the
    first, too.
    """
    if not job.calibrates:
        return {"solve": _solve(job, block, None)}
    size = job.shape.forward_itemsize
    sums = sums_bytes(job, block)
    batch = job.largest_batch
    hidden = float(batch * job.seqlen * job.shape.hidden * size)
    staged = staged_bytes(job, block) + pinned_bytes(job)
    weights = float(block.parameters * size)
    peaks = {}
    observed = hidden + batch * block.observed.live + read_ahead_bytes(job)
    if before is None:
        # The arguments of the blocks are captured by running the embeddings with the first block.
        ends = float(job.shape.ends * size) + 2 * hidden
        peaks["calibrate"] = PeakBytes(weights + max(sums + observed, ends + observed), staged)
    else:
        both = weights + float(before.parameters * size) + written_behind_bytes(job)
        full = hidden + batch * before.full.live + read_ahead_bytes(job)
        forward = max(full, hidden + observed)
        staged = layers_ahead(job) * staged_bytes(job, before) + pinned_bytes(job)
        peaks["advance"] = PeakBytes(both + sums + forward, staged + 2 * hidden)
    peaks["reduce"] = _reduce(job, block)
    if job.halves > 1:
        peaks["choose"] = _choose(job, block)
    peaks["solve"] = _solve(job, block, after)
    return peaks


def staged_bytes(job: PlannedJob, block: BlockShape) -> float:
    """Bytes of the largest layer of a block, which is read into host memory first."""
    largest = max((r * c for g in block.groups for _, r, c in g.layers), default=0)
    return float(largest * job.shape.itemsize)


def layers_ahead(job: PlannedJob) -> int:
    """Pruned layers that are in host memory on their way to the device."""
    return SHARDS_ON_GPU if job.rates.on_gpu else 1


def pinned_bytes(job: PlannedJob) -> float:
    """Bytes of pinned buffers, which a GPU worker keeps from its first copy on."""
    return float(PINNED_BYTES) if job.rates.on_gpu and job.calibrates else 0.0


def _shard_bytes(job: PlannedJob, most: int) -> float:
    """Bytes of activation shards on a GPU: `most`, or as many as the busiest worker has."""
    if not job.rates.on_gpu:
        return 0.0
    sequences = min(sequences_per_shard(job.batch_size), job.nsamples)
    one = sequences * job.seqlen * job.shape.hidden * job.shape.forward_itemsize
    return float(min(most, job.busiest[2]) * one)


def read_ahead_bytes(job: PlannedJob) -> float:
    """Bytes on a GPU of batches that wait to be used: of the current shard and the next ones."""
    batch = job.largest_batch * job.seqlen * job.shape.hidden * job.shape.forward_itemsize
    return max(0.0, _shard_bytes(job, SHARDS_ON_GPU + 1) - batch)


def written_behind_bytes(job: PlannedJob) -> float:
    """Bytes on a GPU of copies that wait to be written: of the current shard and the last ones."""
    return _shard_bytes(job, SHARDS_ON_GPU + 1)


def propagate_memory(job: PlannedJob, before: BlockShape) -> PeakBytes:
    """Peak of the forward of one block, pruned or dense, that computes the next block's inputs."""
    size = job.shape.forward_itemsize
    hidden = float(job.largest_batch * job.seqlen * job.shape.hidden * size)
    weights = float(before.parameters * size)
    live = job.largest_batch * before.full.live
    moving = read_ahead_bytes(job) + written_behind_bytes(job)
    staged = layers_ahead(job) * staged_bytes(job, before) + pinned_bytes(job)
    return PeakBytes(weights + hidden + live + moving, staged + 2 * hidden)


def _reduce(job: PlannedJob, block: BlockShape) -> PeakBytes:
    """Group by group, sums are exchanged through buffers and converted to statistics."""
    each = Counter(block.groups)
    sums, statistics = job.sums(block.groups), job.statistics(block.groups)
    peak = left = sums
    done = 0.0
    for group, count in each.items():
        own = job.statistics([group])
        # The few inputs that a worker has kept become a matrix where those of all are many.
        own += job.counted([group]) * group.kept
        buffers = 0.0
        if job.workers > 1 and not job.in_process:
            chunk = min(_CHUNK_BYTES, job.counted([group]))
            buffers = (_BUFFERS + (1 if job.rates.on_gpu else 2) / job.workers) * chunk
        # Of many equal groups, the sums shrink and the statistics grow one by one.
        after_sums = left - job.sums([group] * count)
        after = done + job.statistics([group] * count)
        peak = max(
            peak,
            left + done + max(own, buffers),
            after_sums + job.sums([group]) + after + own * group.kept,
        )
        left, done = after_sums, after
    return PeakBytes(max(peak, statistics), pinned_bytes(job))


def embed_memory(job: PlannedJob) -> PeakBytes:
    """The embeddings, and one batch of their outputs."""
    size = job.shape.forward_itemsize
    hidden = job.largest_batch * job.seqlen * job.shape.hidden * size
    table = float(job.shape.ends * job.shape.itemsize)
    device = float(job.shape.ends * size + 2 * hidden) + written_behind_bytes(job)
    return PeakBytes(device, table + pinned_bytes(job))


def _solve(job: PlannedJob, block: BlockShape, after: BlockShape | None) -> PeakBytes:
    """The largest peak of any worker while it solves one group after another.

    On a GPU each memory has its own: the worker with most on its GPU may not have most on the host.
    Statistics of a group are freed after its solve. Meanwhile the weights of the next block, if
    there is one, are read into host memory.
    """
    itemsize, largest = job.shape.itemsize, PeakBytes(0.0)
    ahead = ahead_bytes(job, after) + pinned_bytes(job)
    # Equal groups (of experts) get equal shares: which expert gets most tokens is not known.
    each = {
        group: job.statistics([group] * count) / count
        for group, count in Counter(block.groups).items()
    }
    all_statistics = job.statistics(block.groups)
    for shares in job.deal(block):
        left, solved = all_statistics, 0.0
        for group, rows, _ in shares:
            if rows:
                slices = float(rows * group.columns * itemsize)
                device = left + solve_bytes(job, group, rows)
                host = ahead + solved + 2 * slices
                if job.rates.on_gpu:
                    largest = PeakBytes(max(device, largest.device), max(host, largest.host))
                elif device + host > largest.device + largest.host:
                    largest = PeakBytes(device, host)
                solved += slices
            left -= each[group]
    return largest


def ahead_bytes(job: PlannedJob, after: BlockShape | None) -> float:
    """Bytes of the next block's weights, read during a solve and kept until they are used."""
    return 0.0 if after is None else float(after.parameters * job.shape.forward_itemsize)


def _choose(job: PlannedJob, block: BlockShape) -> PeakBytes:
    """Trials on all rows of one group at a time; the largest group of the block counts."""
    largest = max(
        (
            solve_bytes(job, group, sum(r for _, r, _ in group.layers)) + 4.0 * group.columns**2
            for group in set(block.groups)
        ),
        default=0.0,
    )
    return PeakBytes(job.statistics(block.groups) + largest, pinned_bytes(job))


def solve_bytes(job: PlannedJob, group: GroupShape, rows: int) -> float:
    """Bytes of solving `rows` rows of a group, besides the statistics."""
    if not rows:
        return 0.0
    settings, columns = job.solved_with(group), float(group.columns)
    solver = solver_for(settings)
    full = solver.needs == "full"
    rows = min(rows, rows_at_once(group))
    entries = padded(rows) * columns
    row_matrices = float(solver.rows_held)
    inputs = job.inputs(group)
    if inputs is None or not full:
        matrices = solver.matrix_bytes(columns)
    else:
        matrices = solver.matrix_bytes_of_inputs(padded(rows), columns, inputs)
    if not solver.separable:
        row_matrices += _ROWS_HELD_SORTING
    # Objectives are computed when a joint method has freed its own matrices.
    change = 16.0 * min(rows, _OBJECTIVE_ROWS) * columns if full and not solver.joint else 0.0
    held = matrices + 4.0 * row_matrices * entries + change
    if settings.refine != "none":
        held = max(held, 4.0 * _ROWS_HELD_REFINING * entries)
    both = 4.0 * columns * columns if settings.shrinkage == AUTO else 0.0  # the sum of both halves
    return held + both + entries * job.shape.itemsize


def rows_at_once(group: GroupShape) -> int:
    """The most rows of a group that are solved at once: see `pipeline.worker.solve.in_parts`."""
    each = max(rows for _, rows, _ in group.layers)
    return max(each, MOST_ROWS * group.columns // each * each)
