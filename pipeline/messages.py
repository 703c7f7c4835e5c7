"""What passes between the driver and its ranks: the job, and what a phase gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipeline.config.layers import LayerRules
from storage.files.hashing import StoredFile
from storage.run.shared_folders import SharedFolder

if TYPE_CHECKING:
    from pipeline.models.forward_capture import LayerGroup

T = TypeVar("T")

Likelihood = tuple[float, bool]
"""A target's log-likelihood (nats), and whether each of its tokens is the most likely one."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every rank is told at its start. Paths are seen by all nodes.

    `rules` say what is pruned, and how; None for an evaluation. `tokens_sha256` is of the tokens'
    file. `save_layers` is a pattern of layer names whose weight and Hessian are saved, or None.
    `trace`: whether outcomes tell what was done when. `lock_file`: the driver's hold on the run
    directory. `scratch`: the job's folder on each node's own scratch, for activation shards, or
    None; `scratch_nodes`: the node of each rank that wrote there, as Ray's id and address, "" where
    it is not known.
    `shared`: folders that must be the same on every node, and `source_identity` (see `ModelFiles`)
    that of the model. `interface`: the network interface that ranks talk through, or None for the
    one of the address by which Ray knows their node. `expert_tokens`: see
    `pipeline.worker.few_tokens`. `all_experts`: whether every expert's statistics are of every
    token.
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


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """A phase's result on one rank, with its seconds by kind and its peak memory in bytes.

    `events` are there where the job is traced: (kind, or "" for the whole phase; start in seconds
    since the epoch; seconds). `counts`: see `pipeline.runtime.stopwatch`.
    """

    value: T
    seconds: dict[str, float]
    memory: dict[str, Any]
    events: tuple[tuple[str, float, float], ...] = ()
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Observed:
    """A block's groups of layers, and in how many passes their statistics are taken."""

    groups: tuple[LayerGroup, ...]
    passes: int


@dataclass(frozen=True)
class Advanced:
    """One rank's shards of the next block's inputs, and what it has observed of that block."""

    shards: list[StoredFile]
    observed: Observed


@dataclass(frozen=True)
class SolvedSlices:
    """One rank's row slices of a block: the file (None if it had no rows) and a report each.

    A report is a `SolveReport` as JSON, and under `mask` what `pipeline.solvers.mask_counts` counts
    in the rows. `costs` gives per group of layers the seconds and the peak memory of this rank's
    solve.
    """

    file: StoredFile | None
    ranges: dict[str, tuple[int, int]]
    reports: dict[str, dict[str, Any]]
    costs: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Reference:
    """The model to compare with: its location and forward dtype, and the outputs of its last block,
    stored in its run directory as the inputs of `block`, for the same sequences."""

    source: str
    dtype: str
    run_directory: str
    block: int
    shards: list[StoredFile]


@dataclass(frozen=True)
class SequenceDistance:
    """Sums over one sequence's predicted tokens: JS and KL in nats, equal most likely tokens."""

    jensen_shannon: float
    kullback_leibler: float
    same: int


@dataclass(frozen=True)
class Target:
    """Tokens to follow one another in a sequence, the first of them after `position`.

    They are given apart from the sequence, which need not hold them.
    """

    position: int
    tokens: tuple[int, ...]
