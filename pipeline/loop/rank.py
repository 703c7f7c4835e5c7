"""The phases of a job, as typed calls: all that a worker can be asked to do.

The block loop names phases by reference, `call(Rank.solve, block, stamp, choices)`, so that mypy
checks their arguments and results. The call is sent to a worker, which runs its method of that
name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

# Types only: executors start workers before the driver has imported torch.
if TYPE_CHECKING:
    from pipeline.messages import (
        Advanced,
        Likelihood,
        Observed,
        Reference,
        SequenceDistance,
        SolvedSlices,
        Target,
        TrainedEpoch,
        TrainedRows,
    )
    from pipeline.models.forward_capture import LayerGroup
    from pipeline.records.scratch import FreeScratch
    from pipeline.runtime.device import FreeMemory
    from storage.files.hashing import StoredFile
    from storage.model.files import WeightFileFingerprint
    from storage.run.checkpoints import BlockRecord

P = ParamSpec("P")
T = TypeVar("T")


class Rank(Protocol):
    """One rank of a job. `pipeline.worker.block_worker.BlockWorker` implements it.

    block: number of a decoder block. shards: all activation shards of the block's inputs, by
    number. stamp: part of the names of new files, unique to this attempt. only: numbers of the
    activation shards that are wanted; None for all of the rank's.
    """

    # -- before the blocks ------------------------------------------------------------------

    def free_memory(self) -> FreeMemory:
        """Free memory of the rank's node and GPU."""
        ...

    def hessian_memory(self) -> float | None:
        """Bytes of statistics that the rank's device should hold at once; None: no limit."""
        ...

    def fingerprint(self, files: list[str]) -> list[WeightFileFingerprint]:
        """Hashes whole weight files. Raises `ModelError` for NaN or Inf in them."""
        ...

    # -- a block ----------------------------------------------------------------------------

    def embed(self, stamp: str, only: Sequence[int] | None = None) -> list[StoredFile]:
        """Writes the rank's activation shards of block 0: the embedded tokens."""
        ...

    def calibrate(
        self, block: int, shards: list[StoredFile], limit: float | None, number: int
    ) -> Observed:
        """Runs the dense block over the rank's shards; sums the statistics of pass `number`.

        limit: bytes of statistics to hold at once, the same for every rank; None: no limit.
        """
        ...

    def reduce(self) -> None:
        """Sums the statistics over all ranks, in rank order."""
        ...

    def groups_held(self) -> tuple[LayerGroup, ...]:
        """The groups of layers whose statistics are in memory: the same on every rank."""
        ...

    def choose(self, block: int) -> dict[str, dict[str, Any]]:
        """Chooses the regularization of the rank's share of groups: group → settings as JSON."""
        ...

    def solve(
        self, block: int, stamp: str, choices: dict[str, dict[str, Any]] | None
    ) -> SolvedSlices:
        """Solves the rank's rows of the current groups' layers; writes them to one file.

        choices: what `choose` returned, for all groups; None if nothing is chosen.
        """
        ...

    # -- its reconstruction (--reconstruct) -------------------------------------------------

    def dense(
        self,
        block: int,
        shards: Sequence[StoredFile],
        of_targets: bool,
        stamp: str,
    ) -> list[StoredFile]:
        """Runs the dense block; writes its outputs as targets: the dense next block's inputs.

        of_targets: whether `shards` are targets themselves, or inputs of the pruned model.
        """
        ...

    def begin_training(
        self,
        block: int,
        record: BlockRecord,
        shards: list[StoredFile],
        targets: list[StoredFile],
    ) -> int:
        """Loads the solved block; returns in how many parts its layers are trained.

        targets: what the outputs are compared with, by number as `shards`.
        """
        ...

    def begin_part(self, block: int, part: int) -> float:
        """Begins to train a part of the layers; returns the loss of the held-out sequences."""
        ...

    def train(self, block: int, epoch: int) -> TrainedEpoch:
        """Trains the part for one epoch."""
        ...

    def end_part(self, block: int) -> None:
        """Has the part's layers as they were best."""
        ...

    def end_training(self, block: int, stamp: str) -> TrainedRows:
        """Writes the rank's rows as they were best."""
        ...

    # -- the next block's inputs ------------------------------------------------------------

    def propagate(
        self,
        block: int,
        record: BlockRecord | None,
        shards: Sequence[StoredFile] | Mapping[int, StoredFile],
        stamp: str,
        only: Sequence[int] | None = None,
    ) -> list[StoredFile]:
        """Runs the block, pruned as in `record` (None: dense), and writes the next inputs."""
        ...

    def advance(
        self,
        block: int,
        record: BlockRecord | None,
        shards: list[StoredFile],
        stamp: str,
        limit: float | None,
    ) -> Advanced:
        """`propagate` of a block and `calibrate` of the next one, in one pass over the shards."""
        ...

    # -- after the blocks -------------------------------------------------------------------

    def write_output(
        self, files: list[str], records: list[BlockRecord], folder: str
    ) -> list[StoredFile]:
        """Rewrites source weight files into `folder`, a path or URI, with the pruned tensors."""
        ...

    def losses(self, block: int, shards: list[StoredFile]) -> list[float]:
        """Summed next-token loss (nats) of each of the rank's sequences."""
        ...

    def likelihoods(
        self, block: int, shards: list[StoredFile], targets: Sequence[Sequence[Target]]
    ) -> list[list[Likelihood]]:
        """The likelihoods of the targets of each of the rank's sequences."""
        ...

    def distances(
        self, block: int, shards: list[StoredFile], reference: Reference
    ) -> list[SequenceDistance]:
        """The distances of each of the rank's sequences from another model."""
        ...

    # -- the node's scratch (--scratch-dir) -------------------------------------------------

    def free_scratch(self) -> FreeScratch:
        """Bytes free on the node's scratch, and bytes of this job's files there."""
        ...

    def damaged_shards(
        self, block: int, shards: list[StoredFile], hashed: bool, dense: bool
    ) -> dict[int, str]:
        """The rank's damaged activation shards: number → what is wrong.

        hashed: compare contents with the recorded hashes, not sizes alone. dense: they are targets.
        """
        ...

    def drop_shards(self, block: int, names: list[str]) -> None:
        """Deletes activation shards by name."""
        ...

    def sweep_scratch(self, kept: Mapping[str, list[str]]) -> None:
        """Deletes every activation shard that `kept`, folder in the scratch → names, lacks."""
        ...

    def clear_scratch(self) -> None:
        """Deletes the job's scratch folder."""
        ...


@dataclass(frozen=True)
class Call(Generic[T]):
    """A phase to run on one rank, and its arguments; made by `call`."""

    phase: str
    arguments: tuple[Any, ...]

    @property
    def block(self) -> int | None:
        """The block that the phase works on; None for a phase outside the blocks."""
        first = self.arguments[0] if self.arguments else None
        return first if isinstance(first, int) else None


def call(
    phase: Callable[Concatenate[Rank, P], T], *arguments: P.args, **named: P.kwargs
) -> Call[T]:
    """A call of a phase, which is given as a method of `Rank`.

    Arguments are given by position. Raises TypeError for one that is given by name.
    """
    if named:
        raise TypeError(f"{phase.__name__}: give arguments by position")
    return Call(phase.__name__, arguments)
