"""Messages between the driver and its workers: the job, and the results of its phases."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipeline.config.layers import LayerRules
from pipeline.config.reconstruct import Reconstruct
from storage.files.hashing import StoredFile
from storage.run.shared_folders import SharedFolder

if TYPE_CHECKING:
    from pipeline.models.forward_capture import LayerGroup

T = TypeVar("T")

Likelihood = tuple[float, bool]
"""A target's log-likelihood (nats), and whether each of its tokens is the most likely one."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker needs to know of the job; sent when it starts.

    source: the dense model, a path or URI. run_directory: a path that all nodes see.
    tokens_sha256: hash of the calibration tokens' file.
    rules: which layers are pruned, with which settings; None for an evaluation.
    nsamples, seqlen: calibration sequences, and tokens of each. batch_size: sequences of a forward
    pass. dtype: of the forward pass; None for the source's. device: torch device; None for cuda
    where there is one. threads: CPU threads of a rank.
    save_layers: glob of layer names whose weight and Hessian are saved, or None.
    trace: whether outcomes carry `events`.
    lock_file: the driver's lock on the run directory; workers check it before they write.
    scratch: the job's folder on each node's local disk, for activation shards; None: they are in
    the run directory. scratch_nodes: by rank, the node that wrote the newest shards there, as
    (Ray's node id, address), "" where unknown.
    source_identity: `ModelFiles.identity` of the model that every node must see.
    shared: folders that every node must see as one.
    interface: network interface that workers talk through; None: that of the node's Ray address.
    expert_tokens: fewest tokens of an expert for its method (see `pipeline.worker.few_tokens`).
    all_experts: whether every expert's statistics cover every token, not just those routed to it.
    attn_implementation: as for `open_skeleton`.
    reconstruct: None where blocks are not reconstructed.
    """

    source: str
    run_directory: str
    tokens_sha256: str
    rules: LayerRules | None
    nsamples: int
    seqlen: int
    batch_size: int
    dtype: str | None
    device: str | None
    threads: int
    trust_remote_code: bool
    save_layers: str | None = None
    trace: bool = False
    lock_file: str | None = None
    scratch: str | None = None
    scratch_nodes: tuple[tuple[str, str], ...] = ()
    source_identity: str | None = None
    shared: tuple[SharedFolder, ...] = ()
    interface: str | None = None
    expert_tokens: int = 0
    all_experts: bool = False
    attn_implementation: str | None = None
    reconstruct: Reconstruct | None = None


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """A phase's result on one rank.

    seconds: by kind of work. memory: peaks in bytes. counts: see `pipeline.runtime.stopwatch`.
    events: with --trace, what was done when: (kind of work, "" for the whole phase; start in
    seconds since the epoch; duration in seconds).
    """

    value: T
    seconds: dict[str, float]
    memory: dict[str, Any]
    events: tuple[tuple[str, float, float], ...] = ()
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Observed:
    """A block's groups of layers, and the number of passes that sum their statistics."""

    groups: tuple[LayerGroup, ...]
    passes: int


@dataclass(frozen=True)
class Advanced:
    """One rank's activation shards of the next block's inputs, and that block's groups."""

    shards: list[StoredFile]
    observed: Observed


@dataclass(frozen=True)
class SliceFile:
    """A file of row slices. ranges: layer → its rows that are in it, (start, stop)."""

    stored: StoredFile
    ranges: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class SolvedSlices:
    """One rank's row slices of a block's layers.

    files: where they are stored; none if the rank had no rows. ranges: layer → its rows,
    (start, stop). reports: layer → a `SolveReport` of these rows as JSON, with the counts of
    `pipeline.solvers.mask_counts` under `mask`. costs: group → seconds and peak memory in bytes of
    this rank's solve.
    """

    files: tuple[SliceFile, ...]
    ranges: dict[str, tuple[int, int]]
    reports: dict[str, dict[str, Any]]
    costs: dict[str, dict[str, float]]


@dataclass(frozen=True)
class TrainedEpoch:
    """Mean losses of an epoch: of the sequences learned from, and after it of the held-out ones.

    varying: operators without a kernel on this device whose result is the same in every run.
    """

    learned: float
    held_out: float
    varying: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainedRows:
    """One rank's rows of a reconstructed block's layers: file and ranges as in `SolvedSlices`.

    masks: the counts of `pipeline.solvers.mask_counts` of layers whose masks may have changed.
    norms: the norms among them -> dtype as stored (safetensors name), the same on all ranks.
    """

    file: StoredFile | None
    ranges: dict[str, tuple[int, int]]
    masks: dict[str, dict[str, Any]]
    norms: dict[str, str]


@dataclass(frozen=True)
class Reference:
    """The model to compare with.

    source: a path or URI. dtype: of its forward pass. shards: the outputs of its last block for the
    same sequences, stored in `run_directory` as the inputs of `block`.
    """

    source: str
    dtype: str
    run_directory: str
    block: int
    shards: list[StoredFile]


@dataclass(frozen=True)
class SequenceDistance:
    """Sums over one sequence's predicted tokens.

    jensen_shannon, kullback_leibler: in nats. same: positions where both models have the same most
    likely token.
    """

    jensen_shannon: float
    kullback_leibler: float
    same: int


@dataclass(frozen=True)
class Target:
    """Tokens whose likelihood is asked for; the logits at `position` predict the first of them.

    They are given apart from the sequence, which need not contain the last one.
    """

    position: int
    tokens: tuple[int, ...]
