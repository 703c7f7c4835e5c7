"""A rank's forward passes: reads its activation shards, runs blocks, writes activation shards."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.messages import Job
from pipeline.models.forward_capture import BlockCall, ModelEnds
from pipeline.models.skeleton import Skeleton
from pipeline.runtime.background import Background, Behind, file_threads
from pipeline.runtime.not_finite import (
    first_not_finite,
    largest_inputs,
    name_of,
    wider_dtype,
)
from pipeline.runtime.split import batch_ranges, even_range, second_half, shard_ranges
from pipeline.runtime.stopwatch import Stopwatch
from pipeline.worker.scratch import Scratch
from pipeline.worker.transfer.staging import Moving, Staging
from storage.errors import NumericalError
from storage.files.hashing import StoredFile
from storage.run.activations import (
    ActivationShard,
    open_activation_shard,
    read_tokens,
    write_activation_shard,
)
from storage.run.directory import RunDirectory
from storage.run.lock import require_owner

SHARDS_ON_GPU = 2
"""Activation shards that a GPU worker reads ahead, and writes behind; on a CPU it is one."""


class Forward:
    """Runs any block over the sequences of one rank.

    file_threads: how many files it hashes at a time. reading, writing: threads for files that are
    read ahead, and for files that are written behind or only hashed. staging: copies from and to
    the device.
    """

    def __init__(
        self, job: Job, rank: int, world: int, skeleton: Skeleton, watch: Stopwatch
    ) -> None:
        self.job, self.rank, self.world = job, rank, world
        self.skeleton, self.watch, self.device = skeleton, watch, watch.device
        self.run = RunDirectory(Path(job.run_directory))
        self.scratch = None if job.scratch is None else Scratch(job.scratch, self.run)
        # Where activation shards are.
        self.store = self.run if self.scratch is None else self.scratch.store
        on_gpu = self.device.type == "cuda"
        self.file_threads = file_threads(self.device.type, job.threads)
        self._shards = SHARDS_ON_GPU if on_gpu else 1
        self.reading = Background(self._shards)
        self.writing = Background(self.file_threads)
        self.staging = Staging(self.device)
        self._calls: dict[int, list[BlockCall]] = {}
        self._text: tuple[Tensor, Tensor | None] | None = None

    def tokens(self) -> Tensor:
        """The tokens of all sequences, (nsamples, seqlen) int64 on the CPU."""
        return self._read_tokens()[0]

    def counted(self) -> Tensor | None:
        """Which tokens statistics are taken of, (nsamples, seqlen) bool on the CPU; None: all."""
        return self._read_tokens()[1]

    def boundary(self) -> int:
        """The first sequence of the second half, where two halves have statistics of their own."""
        counted = self.counted()
        half = second_half([1] * self.job.nsamples if counted is None else counted.sum(1).tolist())
        assert half is not None  # the driver has refused tokens of which a half would be empty
        return half

    def _read_tokens(self) -> tuple[Tensor, Tensor | None]:
        if self._text is None:
            self._text = read_tokens(self.run.tokens(), sha256=self.job.tokens_sha256)
        return self._text

    def rank_shards(self, only: Sequence[int] | None = None) -> list[tuple[int, tuple[int, int]]]:
        """This rank's activation shards: (number, (first, last + 1) of its sequences).

        only: numbers of the shards that are wanted; None for all.
        """
        ranges = shard_ranges(self.job.nsamples, self.job.batch_size)
        start, stop = even_range(len(ranges), self.rank, self.world)
        return [
            (index, ranges[index]) for index in range(start, stop) if only is None or index in only
        ]

    def sequences_of(self, rank: int) -> tuple[int, int]:
        """The half-open range of the sequences whose shards a rank has."""
        ranges = shard_ranges(self.job.nsamples, self.job.batch_size)
        start, stop = even_range(len(ranges), rank, self.world)
        return (ranges[start][0], ranges[stop - 1][1]) if start < stop else (0, 0)

    def embedded(
        self, ends: ModelEnds, only: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """This rank's inputs of block 0: (number of the shard, batch (n, seqlen, hidden)).

        only: as in `rank_shards`. Raises `NumericalError` for NaN or Inf.
        """
        for index, (start, stop) in self.rank_shards(only):
            for first, last in batch_ranges(stop - start, self.job.batch_size):
                with self.watch("forward"):
                    tokens = self.tokens()[start + first : start + last]
                    hidden_states = ends.embed(tokens)
                if not _finite(hidden_states):
                    raise around_blocks(ends, partial(ends.embed, tokens), "the embeddings")
                yield index, hidden_states

    def output(self, block: int, module: nn.Module, hidden_states: Tensor) -> Tensor:
        """The block's output, (n, seqlen, hidden), for a batch of its inputs of that shape.

        Raises `NumericalError` for NaN or Inf, naming the module that gave it.
        """
        self.watch.count("tokens", hidden_states.shape[0] * hidden_states.shape[1])
        with self.watch("forward"):
            output = self.call(block, hidden_states).run(module, hidden_states)
        if not _finite(output):
            if (error := self.not_finite(block, module, hidden_states)) is not None:
                raise error
            raise NumericalError(
                f"block {block}: its output held NaN or Inf, but not when it was computed again; "
                "look at the hardware of this worker"
            )
        return output

    def not_finite(
        self, block: int, module: nn.Module, hidden_states: Tensor
    ) -> NumericalError | None:
        """The error that names the first module of the block whose values are not finite.

        hidden_states: (n, seqlen, hidden), inputs of the block. The block is run on them again;
        None if all is finite.
        """
        path = self.skeleton.block_prefix(block).rstrip(".")
        # A model may add to its inputs in place.
        run = partial(self.call(block, hidden_states).run, module, hidden_states.clone())
        found = first_not_finite(module, path, run)
        if found is None:
            return None
        return NumericalError(f"block {block}: {found}; {wider_dtype(self.skeleton.dtype)}")

    def statistics_error(
        self, block: int, module: nn.Module, layers: Sequence[str], batches: Iterable[Tensor]
    ) -> NumericalError:
        """Why the sums of squares of the inputs of `layers`, paths in the block, are not finite.

        batches: this rank's inputs of the block `module`, (n, seqlen, hidden), as they were summed.
        """
        largest = dict.fromkeys(layers, 0.0)
        for batch in batches:
            if (error := self.not_finite(block, module, batch)) is not None:
                return error
            run = partial(self.call(block, batch).run, module, batch)
            for layer, value in largest_inputs(module, layers, run).items():
                largest[layer] = max(largest[layer], value)
        names = [self.skeleton.block_prefix(block) + layer for layer in layers]
        more = f" (and {len(names) - 1} more layers)" if len(names) > 1 else ""
        return NumericalError(
            f"block {block}: the inputs of {names[0]}{more} reach {max(largest.values()):.1e}, and "
            "their squares, which are summed, overflow float32; leave such layers dense "
            f"(--override '{names[0]}=dense'), or use --method magnitude, which needs no inputs"
        )

    def rank_batches(
        self,
        block: int,
        shards: Sequence[StoredFile] | Mapping[int, StoredFile],
        batch_size: int | None = None,
        only: Sequence[int] | None = None,
        dense: bool = False,
    ) -> Iterator[tuple[int, int, Tensor]]:
        """This rank's inputs of a block: (number of the shard, of the first sequence, batch).

        A batch is (n, seqlen, hidden). shards: all shards, by number. only: as in `rank_shards`.
        dense: they are of the dense model's own chain. The next shard is opened, compared with its
        hash and copied to a GPU while the current one is used.
        """
        numbered = self.rank_shards(only)
        files = [shards[index] for index, _ in numbered]
        size = batch_size or self.job.batch_size
        begin = partial(self._begin, block, size, dense=dense)
        opened = self.reading.ahead(begin, files, self._shards)
        for index, (start, _) in numbered:
            with self.watch("io"):
                batches = next(opened)
            for batch in self._arriving(batches):
                yield index, start, batch
                start += batch.shape[0]

    def first_batch(self, block: int, shards: list[StoredFile]) -> Tensor:
        """The first batch of a block's inputs, (n, seqlen, hidden), the same on every rank.

        It serves to find groups of layers, for which its values do not matter. With --scratch-dir
        the shard may be on another node, so every rank takes the embeddings of the same sequences,
        which have the same shape.
        """
        if self.scratch is not None:
            with self.watch("load"):
                ends = ModelEnds(self.skeleton, self.device, head=False)
            return ends.embed(self.tokens()[: min(self.job.batch_size, self.job.nsamples)])
        with self.watch("io"):
            batches = self._begin(block, self.job.batch_size, shards[0])
        return next(self._arriving(batches))

    def write(
        self,
        block: int,
        stamp: str,
        batches: Iterable[tuple[int, Tensor]],
        *,
        dense: bool = False,
    ) -> list[StoredFile]:
        """Writes activation shards of a block's inputs, under names that only this attempt uses.

        batches: (number of the shard, batch (n, seqlen, hidden)) in order. dense: as in
        `rank_batches`. A shard is written while the next one is computed; a GPU's is also copied to
        the host then. Batches are copied first, because the caller may go on to change them in
        place.
        """
        written: dict[int, StoredFile] = {}
        behind = Behind(self.writing, self._shards)
        for index, shard in itertools.groupby(batches, key=lambda item: item[0]):
            copies = [self.staging.down(batch) for _, batch in shard]
            folder = self.store.chain(dense).activations(block)
            path = folder / f"shard-{index:05d}.{stamp}.arrow"
            require_owner(self.job.lock_file)

            def write(path: Path = path, copies: list[Moving] = copies, index: int = index) -> None:
                tensors = (copies.pop(0).tensor() for _ in range(len(copies)))
                written[index] = write_activation_shard(path, tensors, block=block, index=index)

            with self.watch("io"):
                behind.add(write)
        with self.watch("io"):
            behind.wait()
        self.watch.count("activations_written_bytes", sum(file.bytes for file in written.values()))
        return [written[index] for index in sorted(written)]

    def _open(self, block: int, stored: StoredFile, *, dense: bool = False) -> ActivationShard:
        """One activation shard, compared with its hash. dense: as in `rank_batches`."""
        path = self.store.chain(dense).activations(block) / stored.name
        return open_activation_shard(path, sha256=stored.sha256)

    def _begin(
        self, block: int, batch_size: int, stored: StoredFile, *, dense: bool = False
    ) -> Iterator[Moving]:
        """Opens an activation shard and begins to copy its batches to a GPU."""
        shard = self._open(block, stored, dense=dense)
        if self.device.type != "cuda":
            return self._staged(shard, batch_size)
        moving = list(self._staged(shard, batch_size))
        # Each is dropped when it is used.
        return (moving.pop(0) for _ in range(len(moving)))

    def _staged(self, shard: ActivationShard, batch_size: int) -> Iterator[Moving]:
        """Copies an activation shard's batches to a GPU, one after another.

        On a CPU they are views of the file's mapping, which is private: a model that adds to its
        input in place changes the view, not the file.
        """
        with shard:
            for start, stop in batch_ranges(shard.rows, batch_size):
                yield self.staging.up(shard.read(start, stop))

    def _arriving(self, batches: Iterator[Moving]) -> Iterator[Tensor]:
        """An activation shard's batches (n, seqlen, hidden) on the device; safe to write to."""
        while True:
            with self.watch("io"):
                moving = next(batches, None)
                if moving is None:
                    return
                batch = moving.tensor()
            del moving
            self.watch.count("activations_read_bytes", batch.nbytes)
            yield batch

    def call(self, block: int, hidden_states: Tensor) -> BlockCall:
        """The arguments that the model calls the block with, captured once per batch size."""
        size = hidden_states.shape[0]
        if size not in self._calls:
            with self.watch("load"):
                ends = ModelEnds(self.skeleton, self.device, head=False)
                self._calls[size] = ends.calls(self.tokens()[:size])
        return self._calls[size][block]


def around_blocks(ends: ModelEnds, run: Callable[[], object], what: str) -> NumericalError:
    """The error for `what` that is not finite, computed by `run` with the model around its blocks.

    It names the first module whose values are not finite.
    """
    found = first_not_finite(ends.model, "", run)
    dtype = name_of(ends.dtype)
    return NumericalError(f"{what}: {found or f'not finite in {dtype}'}; {wider_dtype(ends.dtype)}")


def _finite(hidden_states: Tensor) -> bool:
    return bool(torch.isfinite(hidden_states).all())
