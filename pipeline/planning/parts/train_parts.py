"""How long the reconstruction of a block takes, and its memory: see `pipeline/worker/training`."""

from __future__ import annotations

from dataclasses import replace

from pipeline.config.reconstruct import Reconstruct
from pipeline.planning.memory import PeakBytes, propagate_memory, sums_bytes
from pipeline.planning.parts.file_parts import FileParts
from pipeline.planning.parts.phase_parts import (
    BANDWIDTH,
    COMPUTE,
    LATENCY,
    NETWORK,
    Phase,
    PhasePart,
    merge,
)
from pipeline.planning.planned_job import PlannedJob
from pipeline.planning.shapes.model import BlockShape
from pipeline.reconstruct.schedule import (
    BUNDLE_BYTES,
    EXCHANGE_SHARE,
    MOST_WEIGHTS,
    held_out,
    steps_in_epoch,
)

# Operations of a forward and a backward, in those of a forward: with respect to the inputs and to
# the weights once more each.
_WITH_BACKWARD = 3.0
# The attention of a backward computes the scores again.
_ATTENTION_WITH_BACKWARD = 3.5
_SUM_BYTES, _STATE_BYTES = 4, 12
# Bytes that a step of Adam moves of each owned weight: the sum, the weight, two moments, and
# intermediate results of these, read and written.
_ADAM_BYTES = 80.0
# The same of an exchange, in the steps before the mask is fixed: pruned weights are slowed and
# hidden, and every other step makes a new mask.
_EXCHANGE_BYTES = 73.0


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


def train_phase(job: PlannedJob, block: BlockShape, files: FileParts, dispatch: PhasePart) -> Phase:
    """The training of a block. dispatch: the part that every call of a phase has."""
    how, rates, shape = job.reconstruct, job.rates, job.shape
    assert how is not None
    parts = -(-block.pruned // MOST_WEIGHTS)
    steps = how.epochs * steps_in_epoch(job.nsamples, how.batch)
    each, profile = sequences_of_step(how, job), block.full
    judged = -(-len(held_out(job.nsamples)) // job.workers) * (how.epochs + 1) * parts
    learned = steps * parts * each
    products, attention = train_flops(job, block, steps * parts)
    weights = float(block.pruned)
    rate = rates.product(shape.dtype)
    layers = sum(len(group.layers) for group in block.groups)
    slices = weights * shape.itemsize
    dense = float((block.parameters - block.pruned) * shape.itemsize)
    sent = sent_bytes(job, block) * steps
    outside = (job.workers - job.per_node) / max(job.workers - 1, 1) if job.nodes > 1 else 0.0
    # The inputs and the targets, each once: they stay in memory.
    stores = [part for _ in range(2) for part in files.store_read()[0]]
    return Phase(
        name="reconstruct",
        parts=merge(
            [
                *files.load(dense),
                *files.load_slices(block),
                *stores,
                PhasePart("forward and backward: products", COMPUTE, products / rate),
                PhasePart("forward and backward: attention", COMPUTE, attention / rates.attention),
                PhasePart(
                    "forward and backward: elementwise",
                    BANDWIDTH,
                    _WITH_BACKWARD * learned * profile.moved / rates.memory,
                ),
                PhasePart(
                    "held-out sequences",
                    COMPUTE,
                    judged * (profile.products / rate + profile.attention / rates.attention),
                ),
                *_inputs_of_layers(job, block, parts),
                PhasePart("Adam", BANDWIDTH, steps * moved_bytes(job, block) / rates.memory),
                PhasePart(
                    "operators",
                    LATENCY,
                    (3 * learned * profile.operators + steps * layers * 30) * rates.operator,
                ),
                PhasePart("between nodes", NETWORK, sent * outside / rates.network),
                PhasePart("inside a node", NETWORK, sent * (1 - outside) / rates.link),
                *files.write_slices(block),
                replace(dispatch, seconds=dispatch.seconds * (2 + parts * (how.epochs + 2))),
            ]
        ),
        peak=train_memory(job, block),
        read=(slices + dense) * job.nodes,
        written=slices,
        sent=sent * job.workers,
    )


def _inputs_of_layers(job: PlannedJob, block: BlockShape, parts: int) -> list[PhasePart]:
    """A forward of all sequences, for the scale in which an exchange compares weights."""
    how, rates = job.reconstruct, job.rates
    assert how is not None
    if not how.exchange:
        return []
    sequences, profile = float(job.busiest[0] * parts), block.full
    product = rates.product(job.shape.dtype)
    seconds = profile.products / product + profile.attention / rates.attention
    moved = profile.moved / rates.memory
    return [
        PhasePart("inputs of layers, for the exchange", COMPUTE, sequences * seconds),
        PhasePart("inputs of layers, for the exchange", BANDWIDTH, sequences * moved),
    ]


def sent_bytes(job: PlannedJob, block: BlockShape) -> float:
    """Bytes that a worker sends in a step: gradients to the rows' owners, and its rows to all."""
    how = job.reconstruct
    assert how is not None
    others, own = (job.workers - 1) / job.workers, block.pruned / job.workers
    gradients = others * sequences_of_step(how, job) * block.pruned * job.shape.forward_itemsize
    return gradients + (job.workers - 1) * own * job.shape.itemsize


def moved_bytes(job: PlannedJob, block: BlockShape) -> float:
    """Bytes that a worker's optimizer moves in a step, for its rows, and to install all rows."""
    how = job.reconstruct
    assert how is not None
    batch = min(how.batch, job.nsamples - len(held_out(job.nsamples)))
    # Each sequence's gradient is read, and the sum read and written.
    added = batch * (job.shape.forward_itemsize + 2 * _SUM_BYTES)
    exchange = EXCHANGE_SHARE * _EXCHANGE_BYTES if how.exchange else 0.0
    own = block.pruned / job.workers * (added + _ADAM_BYTES + exchange)
    return own + 2.0 * job.shape.forward_itemsize * block.pruned


def dense_memory(job: PlannedJob, block: BlockShape) -> PeakBytes:
    """Peak of the dense forward, beside the sums of the calibration."""
    peak = propagate_memory(job, block)
    sums = sums_bytes(job, block) if job.calibrates else 0.0
    return PeakBytes(peak.device + sums, peak.host)


def train_memory(job: PlannedJob, block: BlockShape) -> PeakBytes:
    """Peak of a training: the block, what a backward needs, gradients, sums, and owned rows.

    All of the worker's sequences are in memory, too: on a GPU, or as pages of their files.
    """
    how, shape = job.reconstruct, job.shape
    assert how is not None
    itemsize = shape.forward_itemsize
    trained = float(min(block.pruned, MOST_WEIGHTS))
    largest = float(max((r * c for g in block.groups for _, r, c in g.layers), default=0))
    ours = sequences_of_step(how, job)
    at_once = 1 if job.rates.on_gpu else max(1, min(job.threads, round(ours)))
    hidden = 2.0 * job.seqlen * shape.hidden * itemsize
    learning = at_once * (block.full.saved + block.full.live + hidden)
    # A worker that is alone has their sum, and those that are being added to it.
    gradients = trained * itemsize * (ours if job.workers > 1 else at_once)
    sums = trained * _SUM_BYTES if job.workers == 1 else 0.0
    owned = trained / job.workers * (_STATE_BYTES + 2 * shape.itemsize + 1)
    bundle = max(largest, min(trained, BUNDLE_BYTES / itemsize))
    exchanged = 2 * bundle * itemsize * ours + bundle / job.workers * _SUM_BYTES
    resident = job.busiest[0] * hidden
    device = block.parameters * itemsize + learning + gradients + sums + owned + exchanged
    return PeakBytes(device + resident, block.pruned / job.workers * shape.itemsize)
