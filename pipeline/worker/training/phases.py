"""The phases of a rank that reconstruct a solved block (`--reconstruct`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.pattern import Pattern
from pipeline.messages import Job, TrainedEpoch, TrainedRows
from pipeline.models.linears import linear_shape
from pipeline.models.roles.norms import trainable_norms
from pipeline.models.selection import settings_of
from pipeline.models.skeleton import Skeleton
from pipeline.reconstruct.adam import ExchangingAdam, RowAdam
from pipeline.reconstruct.gradients import Run
from pipeline.reconstruct.schedule import parts
from pipeline.runtime.stopwatch import Stopwatch
from pipeline.solvers.mask_counts import mask_counts
from pipeline.statistics.all_reduce import Collective
from pipeline.worker.block_loader import BlockLoader
from pipeline.worker.few_tokens import least_tokens
from pipeline.worker.forward import Forward
from pipeline.worker.training.exchange import Exchange
from pipeline.worker.training.kernels import repeatable
from pipeline.worker.training.rank_training import Place, RankTraining, Sequences, TrainingPlan
from storage.files.hashing import StoredFile
from storage.model.safetensors_format import torch_dtype
from storage.run.checkpoints import BlockRecord, RowSlice, write_row_slices
from storage.run.directory import RunDirectory
from storage.run.lock import require_owner


@dataclass
class BlockTraining:
    """What a rank keeps from `begin_training` to `end_training`.

    module, run: the pruned block and its forward. norms: its norms that are trained -> dtype as
    stored (safetensors name). dtypes: of the layers and norms that are trained, as stored. parts:
    their names, as they are trained one part after another. squares: sums of the layers' squared
    inputs, (C,) float64, with an exchange. best: what this rank will write.
    """

    module: nn.Module
    run: Run
    norms: dict[str, str]
    dtypes: dict[str, torch.dtype]
    parts: list[list[str]]
    sequences: Sequences
    squares: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, RowSlice] = field(default_factory=dict)
    current: RankTraining | None = None


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
    training: BlockTraining | None = None
    # The dense block that statistics were just taken of, and its number.
    calibrated: tuple[int, nn.Module] | None = None
    peers: Exchange | None = None  # the ranks of one process; else they meet in the collective

    def dense(
        self,
        block: int,
        shards: Sequence[StoredFile],
        of_targets: bool,
        stamp: str,
    ) -> list[StoredFile]:
        """Runs the dense block and writes its outputs as targets: inputs of the dense next block.

        of_targets: whether `shards` are of the dense chain; else of the pruned one.
        """
        kept, self.calibrated = self.calibrated, None
        module = kept[1] if kept is not None and kept[0] == block else self.loader.dense(block)
        outputs = (
            (index, self.forward.output(block, module, batch))
            for index, _, batch in self.forward.rank_batches(block, shards, dense=of_targets)
        )
        return self.forward.write(block + 1, stamp, outputs, dense=True)

    def begin_training(
        self,
        block: int,
        record: BlockRecord,
        shards: list[StoredFile],
        targets: list[StoredFile],
    ) -> int:
        """Loads the solved block and opens its inputs and targets; in how many parts it is trained.

        Layers of experts with too few tokens are left out: see `pipeline.worker.few_tokens`.
        """
        module = self.loader.pruned(block, record)
        layers = {
            layer: item
            for layer, item in record.layers.items()
            if item.results["statistic"] == "none"
            or item.results["tokens"] >= self._least(block, layer)
        }
        how, like = self.job.reconstruct, torch.empty(1, self.job.seqlen, 0)
        norms = trainable_norms(self.skeleton, block) if how is not None and how.norms else {}
        sizes = {norm: module.get_parameter(norm).numel() for norm in norms}
        dtypes = norms | {layer: item.dtype for layer, item in layers.items()}
        self.training = BlockTraining(
            module,
            partial(self.forward.call(block, like).run, module),
            norms,
            {name: torch_dtype(dtype) for name, dtype in dtypes.items()},
            parts(sizes | {layer: math.prod(item.shape) for layer, item in layers.items()}),
            self._sequences(block, shards, targets),
        )
        return len(self.training.parts)

    def begin_part(self, block: int, part: int) -> float:
        """Begins to train a part of the block's layers; the loss of the held-out sequences."""
        state, how = self._state(), self.job.reconstruct
        assert how is not None
        layers = state.parts[part]
        plan = TrainingPlan(how, self.job.nsamples, block)
        sequences = [range(*self.forward.sequences_of(rank)) for rank in range(self.world)]
        place = Place(self.rank, sequences, self.peers or self.collective)
        if how.exchange:
            linears = [layer for layer in layers if layer not in state.norms]
            state.squares |= input_squares(state, linears, place, self.watch)
        state.current = RankTraining(
            state.module,
            state.run,
            {layer: state.dtypes[layer] for layer in layers},
            state.sequences,
            plan,
            place,
            self.watch,
            partial(self._trainer, block),
        )
        self._count_sent()
        return state.current.losses[0]

    def train(self, block: int, epoch: int) -> TrainedEpoch:
        """Runs one epoch of the part."""
        current = self._state().current
        assert current is not None, f"block {block} has not begun"
        with repeatable(self.device) as varying:
            own, judged = current.epoch(epoch)
        self._count_sent()
        return TrainedEpoch(own, judged, tuple(sorted(varying)))

    def end_part(self, block: int) -> None:
        """Has the block's weights as they were best, for the next part and the end."""
        state = self._state()
        assert state.current is not None, f"block {block} has not begun"
        for layer, best in state.current.end().items():
            state.best[layer] = RowSlice(state.current.rows(layer).start, best.cpu() + 0.0)
        state.current = None
        self._count_sent()

    def end_training(self, block: int, stamp: str) -> TrainedRows:
        """Writes the rows that this rank owns, as they were best, and drops the state."""
        state, self.training = self._state(), None
        slices = {layer: part for layer, part in state.best.items() if len(part.tensor)}
        ranges = {
            layer: (part.start, part.start + len(part.tensor)) for layer, part in slices.items()
        }
        masks = {
            layer: self._mask_counts(block, layer, part, state.squares[layer])
            for layer, part in slices.items()
            if layer in state.squares
        }
        if not slices:
            return TrainedRows(None, ranges, masks, state.norms)
        path = self.run.checkpoints(block) / f"trained-{self.rank}.{stamp}.safetensors"
        require_owner(self.job.lock_file)
        with self.watch("io"):
            file = write_row_slices(path, slices)
        self.watch.count("slices_written_bytes", file.bytes)
        return TrainedRows(file, ranges, masks, state.norms)

    # -- parts of these ---------------------------------------------------------------------

    def _count_sent(self) -> None:
        """Counts what this rank has sent to others since the last call."""
        if self.collective is not None:
            self.watch.count("training_sent_bytes", self.collective.take_sent())

    def _least(self, block: int, layer: str) -> int:
        """Fewest tokens with which a layer is trained: see `pipeline.worker.few_tokens`."""
        return least_tokens(self.skeleton.blocks[block], (layer,), self.job.expert_tokens)

    def _state(self) -> BlockTraining:
        assert self.training is not None, "no block has begun"
        return self.training

    def _trainer(self, block: int, layer: str, rows: slice, weight: Tensor, rate: float) -> RowAdam:
        """What trains rows of a layer or norm. With an exchange weights may change places."""
        state = self._state()
        if layer in state.norms or layer not in state.squares:
            return RowAdam(weight, rate, whole=layer in state.norms)
        dense = self._dense_rows(block, layer, rows)
        scale = (state.squares[layer] / max(self.job.nsamples * self.job.seqlen, 1)).sqrt()
        pattern = self._pattern(block, layer)
        return ExchangingAdam(weight, rate, dense, scale.float().to(self.device), pattern)

    def _mask_counts(
        self, block: int, layer: str, part: RowSlice, squares: Tensor
    ) -> dict[str, Any]:
        """What a record says of the mask of rows that an exchange may have changed."""
        rows = slice(part.start, part.start + len(part.tensor))
        trained, dense = part.tensor.to(self.device), self._dense_rows(block, layer, rows)
        return mask_counts(trained, dense, self._pattern(block, layer), squares.float())

    def _dense_rows(self, block: int, layer: str, rows: slice) -> Tensor:
        with self.watch("load"):
            stored = self.skeleton.read_weight(block, layer, (rows.start, rows.stop))
            return stored.to(self.device)

    def _pattern(self, block: int, layer: str) -> Pattern:
        assert self.job.rules is not None
        return settings_of(self.skeleton, block, self.job.rules)[layer].parsed_pattern

    def _sequences(
        self, block: int, shards: Sequence[StoredFile], targets: Sequence[StoredFile]
    ) -> dict[int, Callable[[], tuple[Tensor, Tensor, Tensor | None]]]:
        """What reads each of this rank's sequences: its input, its target, its counted tokens.

        They stay where they are read to: on the GPU, or as views of the mapped files.
        """
        counted = self.forward.counted()
        inputs, outputs = (
            {start: batch for _, start, batch in batches}
            for batches in (
                self.forward.rank_batches(block, shards, batch_size=1),
                self.forward.rank_batches(block + 1, targets, batch_size=1, dense=True),
            )
        )

        def read(number: int) -> tuple[Tensor, Tensor, Tensor | None]:
            some = None if counted is None else counted[number : number + 1].to(self.device)
            # A copy: a block may change its input in place, and it is read in every epoch.
            return inputs[number].clone(), outputs[number], some

        return {number: partial(read, number) for number in inputs}


def input_squares(
    state: BlockTraining, layers: Sequence[str], place: Place, watch: Stopwatch
) -> dict[str, Tensor]:
    """Sums of layers' squared inputs over all ranks' sequences: layer -> (C,) float64, CPU."""
    modules: dict[str, Any] = {layer: state.module.get_submodule(layer) for layer in layers}
    sums = {
        layer: torch.zeros(linear_shape(module)[1], dtype=torch.float64, device=watch.device)
        for layer, module in modules.items()
    }

    def hook(layer: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs: Tensor = args[0] if args else kwargs["input"]
        sums[layer] += inputs.flatten(0, -2).float().square().sum(dim=0).double()

    handles = [
        module.register_forward_pre_hook(partial(hook, layer), with_kwargs=True)
        for layer, module in modules.items()
    ]
    with watch("forward"):
        for read in state.sequences.values():
            inputs, _, _ = read()
            state.run(inputs)
    for handle in handles:
        handle.remove()
    found = {}
    for layer, total in sums.items():
        found[layer] = (total if place.peers is None else place.peers.sum(total)).cpu()
    return found
