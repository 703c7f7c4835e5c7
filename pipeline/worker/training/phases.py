"""The phases of a rank that reconstruct a solved block (`--reconstruct`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.messages import Job, TrainedEpoch, TrainedRows
from pipeline.models.forward_capture import BlockCall
from pipeline.models.skeleton import Skeleton
from pipeline.runtime.stopwatch import Stopwatch
from pipeline.statistics.all_reduce import Collective
from pipeline.worker.block_loader import BlockLoader
from pipeline.worker.few_tokens import least_tokens
from pipeline.worker.forward import Forward
from pipeline.worker.training.energy import held_out_energy
from pipeline.worker.training.exchange import Exchange
from pipeline.worker.training.rank_training import RankTraining, TrainingPlan
from storage.files.hashing import StoredFile
from storage.model.safetensors_format import torch_dtype
from storage.run.activations import ActivationShard
from storage.run.checkpoints import BlockRecord, RowSlice, write_row_slices
from storage.run.directory import RunDirectory
from storage.run.lock import require_owner


class TrainingPhases:
    """The phases from `dense`, which computes the targets, to `end_training`."""

    job: Job
    rank: int
    world: int
    device: torch.device
    run: RunDirectory
    skeleton: Skeleton
    watch: Stopwatch
    loader: BlockLoader
    forward: Forward
    collective: Collective | None
    training: RankTraining | None = None
    peers: Exchange | None = None  # the ranks of one process; else they meet in the collective

    def dense(
        self,
        block: int,
        shards: Sequence[StoredFile],
        of_targets: bool,
        stamp: str,
        only: Sequence[int] | None = None,
    ) -> list[StoredFile]:
        """Runs the dense block and writes its outputs as targets: inputs of the dense next block.

        of_targets: whether `shards` are of the dense chain; else of the pruned one.
        """
        module = self.loader.dense(block)
        outputs = (
            (index, self.forward.output(block, module, batch))
            for index, _, batch in self.forward.rank_batches(
                block, shards, only=only, dense=of_targets
            )
        )
        return self.forward.write(block + 1, stamp, outputs, dense=True)

    def target_energy(self, block: int, targets: list[StoredFile]) -> dict[int, float]:
        """Mean square of the targets, of each held-out sequence of the rank, by its number."""
        with self.watch("io"):
            return held_out_energy(self.forward, block, targets, self.job.nsamples)

    def begin_training(
        self,
        block: int,
        record: BlockRecord,
        shards: list[StoredFile],
        targets: list[StoredFile],
    ) -> float:
        """Loads the solved block and opens its inputs and targets; the held-out sequences' loss."""
        module = self.loader.pruned(block, record)
        layers = {
            layer: torch_dtype(item.dtype)
            for layer, item in record.layers.items()
            if item.results["tokens"] >= self._least(block, layer)
        }
        call = self._call(block, module)
        settings = self.job.reconstruct
        assert settings is not None
        plan = TrainingPlan(
            nsamples=self.job.nsamples,
            batch=settings.batch,
            epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            seed=settings.seed * 10_007 + block,
        )
        self.training = RankTraining(
            module,
            partial(call.run, module),
            layers,
            self._sequences(block, shards, targets),
            plan,
            (self.rank, self.world),
            self.peers or self.collective,
            self.watch,
        )
        return self.training.losses[0]

    def train(self, block: int, epoch: int) -> TrainedEpoch:
        """Runs one epoch of the block's reconstruction."""
        assert self.training is not None, f"block {block} has not begun"
        own, judged = self.training.epoch(epoch)
        return TrainedEpoch(own, judged)

    def end_training(self, block: int, stamp: str) -> TrainedRows:
        """Writes the rows that this rank owns, at their best, and drops the state."""
        training, self.training = self.training, None
        assert training is not None, f"block {block} has not begun"
        ranges = {}
        slices = {}
        for layer, best in training.best.items():
            rows = training.rows.of(layer)
            if len(best):
                ranges[layer] = (rows.start, rows.stop)
                slices[layer] = RowSlice(rows.start, best.cpu() + 0.0)
        if not slices:
            return TrainedRows(None, ranges)
        path = self.run.checkpoints(block) / f"trained-{self.rank}.{stamp}.safetensors"
        require_owner(self.job.lock_file)
        with self.watch("io"):
            file = write_row_slices(path, slices)
        self.watch.count("slices_written_bytes", file.bytes)
        return TrainedRows(file, ranges)

    # -- parts of these ---------------------------------------------------------------------

    def _least(self, block: int, layer: str) -> int:
        """Fewest tokens with which a layer is trained: see `pipeline.worker.few_tokens`."""
        return least_tokens(self.skeleton.blocks[block], (layer,), self.job.expert_tokens)

    def _call(self, block: int, module: nn.Module) -> BlockCall:
        """What the block is called with, for one sequence, in the dtype that it is trained in."""
        dtype = next(iter(module.parameters())).dtype
        like = torch.empty(1, self.job.seqlen, 0, dtype=dtype)
        return self.forward.call(block, like)

    def _sequences(
        self, block: int, shards: Sequence[StoredFile], targets: Sequence[StoredFile]
    ) -> dict[int, Callable[[], tuple[Tensor, Tensor, Tensor | None]]]:
        """What reads each of this rank's sequences: its input, its target, its counted tokens."""
        counted = self.forward.counted()
        found: dict[int, Callable[[], tuple[Tensor, Tensor, Tensor | None]]] = {}
        for index, (start, stop) in self.forward.rank_shards():
            with self.watch("io"):
                inputs = self.forward.open(block, shards[index])
                outputs = self.forward.open(block + 1, targets[index], dense=True)
            for number in range(start, stop):
                some = None if counted is None else counted[number : number + 1].to(self.device)
                read: Any = partial(self._read, inputs, outputs, number - start, some)
                found[number] = read
        return found

    def _read(
        self, inputs: ActivationShard, outputs: ActivationShard, row: int, counted: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        # A copy of the input: a block may change it in place, and it is read in every epoch.
        batch = inputs.read(row, row + 1).to(self.device, copy=True)
        return batch, outputs.read(row, row + 1).to(self.device), counted
