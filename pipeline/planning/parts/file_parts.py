"""Parts of phases that move a worker's bytes: weights, row slices, activation stores.

Files are hashed and written in several lanes: `pipeline.runtime.background.file_threads`, and two
activation shards at a time on a GPU. Lanes share a disk, whose rates are those of all workers. A
GPU is taken to have the cores for its worker's lanes. Reading a store and writing another use
threads of their own; a disk reads and writes at the same time.
"""

from __future__ import annotations

import math

from pipeline.planning.parts.phase_parts import DISK, HASH, HOST, LATENCY, PhasePart
from pipeline.planning.planned_job import PlannedJob
from pipeline.planning.shapes.model import BlockShape
from pipeline.worker.forward import SHARDS_ON_GPU
from pipeline.worker.transfer import slice_writer


class FileParts:
    """The parts of one job's phases. Sizes are in bytes."""

    def __init__(self, job: PlannedJob) -> None:
        self.job, self.rates, self.shape = job, job.rates, job.shape
        self._shards = SHARDS_ON_GPU if self.rates.on_gpu else 1

    def longest_lane(self) -> float:
        """Bytes that one thread of the busiest worker hashes of the source's weight files."""
        files = self.job.busiest_files
        return max(sum(files) / self.job.file_threads, max(files, default=0.0))

    def load(self, size: float, sharers: int = 1, what: str = "load weights") -> list[PhasePart]:
        """A worker reads `size` bytes: the same as all others (sharers 1), or a part of its own.

        A node reads the same bytes from the disk only once; else `sharers` workers read. What all
        read are whole tensors, which each compares with their hashes.
        """
        fetched = size * (self.job.nodes if sharers == 1 else sharers)
        parts = [
            PhasePart(what, DISK, fetched / self.rates.disk_read),
            PhasePart(what, HOST, size / self.rates.copy),
        ]
        if sharers == 1:
            parts.append(PhasePart("verify weights", HASH, size / self.rates.hash))
        return parts

    def copied(self, size: float) -> list[PhasePart]:
        """Weights that were read ahead are copied to a GPU, two tensors at a time."""
        seconds = size / self.rates.copy / SHARDS_ON_GPU if self.rates.on_gpu else 0.0
        return [PhasePart("copy weights", HOST, seconds)]

    def copied_back(self, size: float) -> list[PhasePart]:
        """What a GPU has computed is copied to the host."""
        return [PhasePart("copy back", HOST, size / self.rates.copy)] if self.rates.on_gpu else []

    def load_slices(self, block: BlockShape) -> list[PhasePart]:
        """Every worker verifies and reads all row slices of a block, two layers at a time."""
        sizes = self.slices(block)
        total, largest = sum(sizes), min(max(sizes, default=0.0), slice_writer.FILE_BYTES)
        lanes = min(self.job.file_threads, sum(map(_files, sizes)))
        verified = max(total / max(lanes, 1), largest)
        return [
            PhasePart("load slices", DISK, self.job.nodes * total / self.rates.disk_read),
            PhasePart("load slices", HOST, total / self.rates.copy / self._shards),
            PhasePart("verify slices", HASH, verified / self.rates.hash),
        ]

    def write_slices(self, block: BlockShape) -> list[PhasePart]:
        """Every worker writes its row slices. Those that are written during solves count, too."""
        sizes = self.slices(block)
        most = max(sizes, default=0.0)
        lanes = max(min(self.job.file_threads, _files(most)), 1)
        disk = PhasePart("write slices", DISK, sum(sizes) / self.rates.disk_write)
        rest = [
            PhasePart("hash slices", HASH, most / self.rates.hash),
            PhasePart("sync", LATENCY, 4 * self.rates.sync),
        ]
        return [*self.copied_back(most), *in_lanes(disk, rest, lanes)]

    def slices(self, block: BlockShape) -> list[float]:
        """Bytes of each worker's row slices of a block."""
        return [
            float(self.shape.itemsize * sum(share.rows * share.group.columns for share in own))
            for own in self.job.deal(block)
        ]

    def store_read(self) -> tuple[list[PhasePart], float]:
        """Parts of reading an activation store, and its bytes."""
        total, busiest, shards = self._store()
        disk = PhasePart("read store", DISK, total / self.rates.disk_read)
        rest = [PhasePart("verify store", HASH, busiest / self.rates.hash)]
        if self.rates.on_gpu:
            rest.append(PhasePart("read store", HOST, busiest / self.rates.copy))
        return in_lanes(disk, rest, min(self._shards, shards)), total

    def store_written(self) -> tuple[list[PhasePart], float]:
        """Parts of writing an activation store, and its bytes."""
        total, busiest, shards = self._store()
        disk = PhasePart("write store", DISK, total / self.rates.disk_write)
        rest = [
            PhasePart("hash store", HASH, busiest / self.rates.hash),
            *self.copied_back(busiest),
            PhasePart("sync", LATENCY, 2 * shards * self.rates.sync),
        ]
        return in_lanes(disk, rest, min(self._shards, shards)), total

    def _store(self) -> tuple[float, float, int]:
        """Bytes of an activation store; bytes and number of the busiest worker's shards of it."""
        sequences, _, shards = self.job.busiest
        one = float(self.job.seqlen * self.shape.hidden * self.shape.forward_itemsize)
        return self.job.nsamples * one, sequences * one, shards

    def hide(
        self,
        read: list[PhasePart],
        written: list[PhasePart],
        computed: list[PhasePart],
        pieces: int,
    ) -> list[PhasePart]:
        """What is read and written, less what overlaps with the computation, in `pieces`.

        On a GPU the shorter of the two overlaps with the longer.
        """
        if self.rates.on_gpu:
            shown, hidden = list[PhasePart](), max(read, written, key=_sum)
        else:
            shown = [part for part in (*read, *written) if part.limit in (HASH, HOST)]
            hidden = [part for part in (*read, *written) if part.limit not in (HASH, HOST)]
        total = _sum(hidden)
        if not total:
            return shown
        first = 1 / max(pieces, 1)
        share = max(first, 1 - (1 - first) * _sum(computed) / total)
        return shown + [PhasePart(p.what, p.limit, share * p.seconds) for p in hidden]


def in_lanes(disk: PhasePart, rest: list[PhasePart], lanes: int) -> list[PhasePart]:
    """Files are moved in lanes: in each the disk and the rest take turns, and all share the disk.

    The rest is what the disk does not hide.
    """
    others = _sum(rest)
    left = max(0.0, (disk.seconds + others) / max(lanes, 1) - disk.seconds)
    share = left / others if others else 0.0
    return [disk, *(PhasePart(p.what, p.limit, share * p.seconds) for p in rest)]


def _files(size: float) -> int:
    """The number of files for so many bytes of row slices."""
    return math.ceil(size / slice_writer.FILE_BYTES)


def _sum(parts: list[PhasePart]) -> float:
    return sum(part.seconds for part in parts)
