"""A rank's forward side: its activation shards in, blocks run, activation shards out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.capture import BlockCall, ModelEnds
from pipeline.job import Job
from pipeline.measure import Stopwatch
from pipeline.model import Skeleton
from pipeline.split import batch_ranges, even_range, shard_ranges
from storage.arrow_store import open_activation_shard, read_tokens, write_activation_shard
from storage.commit import StoredFile
from storage.errors import NumericalError
from storage.lock import require_owner
from storage.run_directory import RunDirectory


class Forward:
    """What one rank needs to run any block over its own sequences."""

    def __init__(
        self, job: Job, rank: int, world: int, skeleton: Skeleton, watch: Stopwatch
    ) -> None:
        self.job, self.rank, self.world = job, rank, world
        self.skeleton, self.watch, self.device = skeleton, watch, watch.device
        self.run = RunDirectory(Path(job.run_directory))
        self._calls: dict[int, list[BlockCall]] = {}
        self._tokens: Tensor | None = None

    def tokens(self) -> Tensor:
        """All sequences, int64 `(nsamples, seqlen)` on the CPU."""
        if self._tokens is None:
            self._tokens = read_tokens(self.run.tokens())
        return self._tokens

    def own_shards(self) -> list[tuple[int, tuple[int, int]]]:
        """(index, range of sequences) of the activation shards that are this rank's."""
        ranges = shard_ranges(self.job.nsamples, self.job.batch_size)
        start, stop = even_range(len(ranges), self.rank, self.world)
        return [(index, ranges[index]) for index in range(start, stop)]

    def embedded(self, ends: ModelEnds, start: int, stop: int) -> Iterator[Tensor]:
        """Inputs of block 0 for sequences `start:stop`, batch by batch."""
        for first, last in batch_ranges(stop - start, self.job.batch_size):
            with self.watch("forward"):
                hidden_states = ends.embed(self.tokens()[start + first : start + last])
            yield _finite(hidden_states, "the embeddings")

    def outputs(self, block: int, module: nn.Module, stored: StoredFile) -> Iterator[Tensor]:
        """A block's outputs for one activation shard of its inputs, batch by batch."""
        for hidden_states in self.batches(block, stored, self.job.batch_size):
            with self.watch("forward"):
                output = self.call(block, hidden_states).run(module, hidden_states)
            yield _finite(output, f"block {block}")

    def own_batches(self, block: int, shards: list[StoredFile]) -> Iterator[tuple[int, Tensor]]:
        """(number of the first sequence, batch) of all of this rank's inputs of a block."""
        for index, (start, _) in self.own_shards():
            for batch in self.batches(block, shards[index], self.job.batch_size):
                yield start, batch
                start += batch.shape[0]

    def batches(self, block: int, stored: StoredFile, batch_size: int) -> Iterator[Tensor]:
        """An activation shard's batches `(n, seqlen, hidden)` on the device, the model's own."""
        path = self.run.activations(block) / stored.name
        with self.watch("io"):
            shard = open_activation_shard(path, sha256=stored.sha256)
        with shard:
            for start, stop in batch_ranges(shard.rows, batch_size):
                with self.watch("io"):
                    # Zero-copy on a CPU. The map is private: a model that adds to its input in
                    # place changes its own view, not the file.
                    batch = shard.read(start, stop).to(self.device)
                yield batch

    def write(self, block: int, index: int, stamp: str, batches: Iterable[Tensor]) -> StoredFile:
        """Writes one activation shard of a block's inputs under a name of this attempt alone."""
        path = self.run.activations(block) / f"shard-{index:05d}.{stamp}.arrow"
        require_owner(self.job.lock_file)
        with self.watch("io"):
            return write_activation_shard(path, batches, block=block, index=index)

    def call(self, block: int, hidden_states: Tensor) -> BlockCall:
        """What the block is called with for batches of this size, learnt once for each size."""
        size = hidden_states.shape[0]
        if size not in self._calls:
            with self.watch("load"):
                ends = ModelEnds(self.skeleton, self.device, head=False)
                self._calls[size] = ends.calls(self.tokens()[:size])
        return self._calls[size][block]


def _finite(hidden_states: Tensor, where: str) -> Tensor:
    if not bool(torch.isfinite(hidden_states).all()):
        dtype = str(hidden_states.dtype).removeprefix("torch.")
        raise NumericalError(
            f"the output of {where} is not finite in {dtype}; try --dtype float32 or bfloat16"
        )
    return hidden_states
