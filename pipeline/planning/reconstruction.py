"""How long the reconstruction of a block takes, and its memory: see `pipeline/worker/training`."""

from __future__ import annotations

from dataclasses import replace

from pipeline.config.reconstruct import Reconstruct
from pipeline.planning.memory import PeakBytes
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
)
from pipeline.planning.planned_job import PlannedJob
from pipeline.planning.shapes.model import BlockShape
from pipeline.reconstruct.schedule import MOST_WEIGHTS, held_out, steps_in_epoch

# Operations of a forward and a backward, in those of a forward: with respect to the inputs and to
# the weights once more each.
_WITH_BACKWARD = 3.0
# The attention of a backward computes the scores again.
_ATTENTION_WITH_BACKWARD = 3.5
_SUM_BYTES, _STATE_BYTES = 8, 12
# Bytes that a step of Adam moves of each owned weight: the sum, its fp32 copy, the weight, two
# moments, and intermediate results of these, read and written.
_ADAM_BYTES = 100.0


def sequences_of_step(how: Reconstruct, job: PlannedJob) -> float:
    """Sequences of a step on the worker with most of them, on average over an epoch."""
    learn = job.nsamples - len(held_out(job.nsamples))
    batch = min(how.batch, learn)
    return max(1.0, batch / job.workers) if job.workers < batch else 1.0


def train_flops(job: PlannedJob, block: BlockShape, steps: float) -> tuple[float, float]:
    """Operations of products, and of attention, of the busiest worker in `steps` steps."""
    how = job.reconstruct
    assert how is not None
    sequences = steps * sequences_of_step(how, job)
    return (
        _WITH_BACKWARD * sequences * block.full.products,
        _ATTENTION_WITH_BACKWARD * sequences * block.full.attention,
    )


def train_phase(job: PlannedJob, block: BlockShape, fixed: tuple[PhasePart, ...]) -> Phase:
    """The training of a block. fixed: the parts that every phase has."""
    how, rates, shape = job.reconstruct, job.rates, job.shape
    assert how is not None
    steps = how.epochs * steps_in_epoch(job.nsamples, how.batch)
    parts = -(-block.pruned // MOST_WEIGHTS)
    products, attention = train_flops(job, block, steps * parts)
    each, weights = sequences_of_step(how, job), float(block.pruned)
    itemsize = shape.forward_itemsize
    profile = block.full
    judged = -(-len(held_out(job.nsamples)) // job.workers) * (how.epochs + 1) * parts
    moved = _WITH_BACKWARD * steps * parts * each * profile.moved
    # Gradients are added to the sums: read, and the sum read and written.
    summed = steps * each * weights * (itemsize + 2 * _SUM_BYTES)
    zeroed = steps * weights * _SUM_BYTES
    adam = steps * _ADAM_BYTES * weights / job.workers
    installed = steps * 2.0 * itemsize * weights
    sent = (job.workers - 1) / job.workers * weights * (_SUM_BYTES + shape.itemsize) * steps
    outside = (job.workers - job.per_node) / max(job.workers - 1, 1) if job.nodes > 1 else 0.0
    layers = sum(len(group.layers) for group in block.groups)
    operators = steps * parts * each * 3 * profile.operators + steps * layers * 30
    read = 2.0 * float(job.seqlen * shape.hidden * itemsize)
    copied = (steps * parts * each + judged) * read if rates.on_gpu else 0.0
    slices = weights * shape.itemsize
    rate = rates.product(shape.dtype)
    forward = judged * profile.products / rate + judged * profile.attention / rates.attention
    return Phase(
        name="reconstruct",
        parts=(
            PhasePart("load weights", DISK, (slices * job.nodes) / rates.disk_read),
            PhasePart("load weights", HOST, block.parameters * itemsize / rates.copy),
            PhasePart("verify slices", HASH, slices / rates.hash),
            PhasePart("verify stores", HASH, 2 * job.busiest[0] * read / 2 / rates.hash),
            PhasePart("forward and backward: products", COMPUTE, products / rate),
            PhasePart("forward and backward: attention", COMPUTE, attention / rates.attention),
            PhasePart("forward and backward: elementwise", BANDWIDTH, moved / rates.memory),
            PhasePart("held-out sequences", COMPUTE, forward),
            PhasePart("sums of gradients", BANDWIDTH, (summed + zeroed) / rates.memory),
            PhasePart("Adam", BANDWIDTH, (adam + installed) / rates.memory),
            PhasePart("operators", LATENCY, operators * rates.operator),
            PhasePart("between nodes", NETWORK, sent * outside / rates.network),
            PhasePart("inside a node", NETWORK, sent * (1 - outside) / rates.link),
            PhasePart("copies of sequences", HOST, copied / rates.copy),
            PhasePart("write slices", DISK, slices / rates.disk_write),
            PhasePart("hash slices", HASH, slices / job.workers / rates.hash),
            PhasePart("sync", LATENCY, 4 * rates.sync),
            *(replace(p, seconds=p.seconds * (how.epochs + 3)) for p in fixed),
        ),
        peak=train_memory(job, block),
        read=slices * job.nodes,
        written=slices,
        sent=sent * job.workers,
    )


def train_memory(job: PlannedJob, block: BlockShape) -> PeakBytes:
    """Peak of a training: the block, what a backward needs, gradients, sums, and owned rows."""
    shape = job.shape
    itemsize = shape.forward_itemsize
    trained = float(min(block.pruned, MOST_WEIGHTS))
    largest = float(max((r * c for g in block.groups for _, r, c in g.layers), default=0))
    at_once = 1 if job.rates.on_gpu else max(1, min(job.threads, round(_most_of_step(job))))
    hidden = 2.0 * job.seqlen * shape.hidden * itemsize
    # Of several sequences at once: activations and gradients of each.
    learning = at_once * (block.full.saved + block.full.live + hidden + trained * itemsize)
    owned = trained / job.workers * (_STATE_BYTES + 2 * shape.itemsize + 1)
    exchanged = largest * 2 * _SUM_BYTES if job.workers > 1 else 0.0
    device = block.parameters * itemsize + learning + trained * _SUM_BYTES + owned + exchanged
    return PeakBytes(device, block.pruned / job.workers * shape.itemsize)


def _most_of_step(job: PlannedJob) -> float:
    assert job.reconstruct is not None
    return sequences_of_step(job.reconstruct, job)
