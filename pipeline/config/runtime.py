"""Where a job runs: the options that `prune` and `eval` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pipeline.config.fields import option, require


def unless_ray(config: Any) -> str | None:
    """The condition of what concerns Ray alone."""
    return None if config.executor == "ray" else "with --executor local there is no Ray"


def unless_forwards(config: Any) -> str | None:
    """The condition of what concerns forward passes."""
    reason: str | None = config.without_forwards()
    return reason


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Where and how a job runs; shared by `prune` and `eval`.

    Raises `ConfigError` for a value out of range.
    """

    executor: Literal["ray", "local"] = option(
        "ray",
        "what runs the ranks: Ray workers, or this process, one rank after another (no Ray)",
        placement=True,
    )
    workers: int | None = option(
        None,
        "number of workers, one per GPU or CPU slot; unset, or `auto`: with Ray one per GPU of the "
        "cluster, without GPUs one per node; with the local executor 1",
        placement=True,
    )
    threads: int | None = option(
        None,
        "CPU threads of each worker, which change no byte of the result; unset: the machine's "
        "cores divided by the workers, 1 for GPU workers",
        placement=True,
    )
    gpus_per_worker: float | None = option(
        None,
        "GPUs asked of Ray for each worker; unset: 1 if the cluster has GPUs, else 0",
        placement=True,
        unused=unless_ray,
    )
    ray_address: str | None = option(
        None,
        "address of a running Ray cluster (`auto`, `HOST:6379`, `ray://HOST:10001`); unset: "
        "$RAY_ADDRESS, or else a new Ray on this machine",
        placement=True,
        unused=unless_ray,
    )
    open_dashboard: bool = option(
        False,
        "continue although the cluster's dashboard listens to other machines without a token: "
        "anyone who reaches it can run code on the cluster",
        placement=True,
        unused=unless_ray,
    )
    device: str | None = option(
        None,
        "torch device of each worker (cpu, cuda, cuda:1); unset: cuda where there is one",
        placement=True,
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None,
        "dtype of the forward passes; unset: the source's. Statistics are float32 products "
        "added in float64, and stored weights keep the source's dtype",
        unused=unless_forwards,
        noted=True,
    )
    attn_implementation: str | None = option(
        None,
        "how transformers computes attention in forward passes: eager, sdpa, flash_attention_2 or "
        "another name that it knows; unset: what it chooses for the model, which is recorded",
        unused=unless_forwards,
        noted=True,
    )
    batch_size: int = option(4, "sequences in one forward pass", unused=unless_forwards, noted=True)
    phase_timeout: float = option(
        7200.0,
        "seconds after which a phase of one block counts as hanging and is redone",
        placement=True,
        unused=unless_ray,
    )
    trace: str | None = option(
        None,
        "file for a timeline of every worker, to view with ui.perfetto.dev or chrome://tracing",
        placement=True,
        path=True,
    )
    on_lost_node: Literal["wait", "shrink"] = option(
        "wait",
        "when a node is lost and the others have no room for its workers, after --node-wait: "
        "`wait` stops, to be resumed when the node is back, because on GPUs fewer workers may "
        "round differently; `shrink` continues with the workers that fit",
        placement=True,
        unused=unless_ray,
    )
    node_wait: float = option(
        300.0,
        "seconds to wait for a lost node to come back or for another to replace it",
        placement=True,
        unused=unless_ray,
    )
    placement_timeout: float = option(
        300.0,
        "seconds to wait for room for the workers: for other jobs to end, nodes to join, or an "
        "autoscaler to add some",
        placement=True,
        unused=unless_ray,
    )
    network_interface: str | None = option(
        None,
        "network interface (`eth0`) by which the workers reach one another; unset: that of the "
        "node's address in Ray",
        placement=True,
        unused=unless_ray,
    )
    collective: Literal["auto", "nccl", "gloo"] = option(
        "auto",
        "how workers sum statistics: nccl between GPUs, gloo through host memory; auto: nccl where "
        "every worker has a GPU of its own. For parts of a GPU (MIG): gloo",
        placement=True,
        unused=unless_ray,
    )
    trust_remote_code: bool = option(
        False,
        "run Python code that is in the model folder",
        placement=True,
    )
    verbose: bool = option(
        False,
        "show Ray's log and debug messages",
        placement=True,
    )
    debug: bool = option(
        False,
        "show the traceback of an error",
        placement=True,
    )

    def without_forwards(self) -> str | None:
        """Why there is no forward pass; None where there is one."""
        return None

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "batch_size"):
            require(self, name, at_least=1)
        require(self, "gpus_per_worker", at_least=0)
        require(self, "phase_timeout", at_least=1)
        require(self, "node_wait", at_least=0)
        require(self, "placement_timeout", at_least=0)


class Opened(Protocol):
    """What says how to open a model: a job's options, or the message to its workers."""

    @property
    def dtype(self) -> str | None:
        """As for `pipeline.models.skeleton.open_skeleton`."""
        ...

    @property
    def trust_remote_code(self) -> bool:
        """As for `pipeline.models.skeleton.open_skeleton`."""
        ...

    @property
    def attn_implementation(self) -> str | None:
        """As for `pipeline.models.skeleton.open_skeleton`."""
        ...


def how_to_open(config: Opened) -> dict[str, Any]:
    """The keywords of `pipeline.models.skeleton.open_skeleton`."""
    return {
        "dtype": config.dtype,
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": config.attn_implementation,
    }
