"""How many workers, and what each one gets: pure decisions on what the cluster says it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storage.errors import ResourceError


@dataclass(frozen=True)
class Placement:
    """`workers` ranks of `threads` CPUs and `gpus` GPUs each."""

    workers: int
    threads: int
    gpus: float

    def bundle(self) -> dict[str, float]:
        """What one rank asks of Ray."""
        bundle: dict[str, float] = {"CPU": self.threads}
        if self.gpus:
            bundle["GPU"] = self.gpus
        return bundle

    def text(self) -> str:
        """The same for people."""
        return " and ".join(f"{amount:g} {kind}" for kind, amount in self.bundle().items())


def choose_placement(
    workers: int | None,
    threads: int | None,
    gpus_per_worker: float | None,
    nodes: Sequence[Mapping[str, Any]],
) -> Placement:
    """Fills in what the user left open from `ray.nodes()`.

    GPUs where there are any, one worker each; else one worker per node, its cores divided by the
    workers on it. Raises `ResourceError` for more than the cluster has, naming both.
    """
    alive = [node["Resources"] for node in nodes if node.get("Alive")]
    has_gpus = any(resources.get("GPU", 0) >= 1 for resources in alive)
    gpus = gpus_per_worker if gpus_per_worker is not None else float(has_gpus)
    if workers is None:
        workers = (
            sum(int(resources.get("GPU", 0) // gpus) for resources in alive)
            if gpus
            else sum(resources.get("CPU", 0) >= (threads or 1) for resources in alive)
        )
    cores = int(sum(resources.get("CPU", 0) for resources in alive))
    if threads is None:
        threads = 1 if gpus else max(1, cores // max(workers, 1))
        # Workers that fit in sum may not fit on each node: a node's spare cores are no one's.
        while threads > 1 and _slots(alive, threads, gpus) < workers:
            threads -= 1
    slots = _slots(alive, threads, gpus)
    if workers < 1 or slots < workers:
        wanted = Placement(max(workers, 1), threads, gpus)
        raise ResourceError(
            f"{max(workers, 1)} workers of {wanted.text()} each are more than the cluster's "
            f"{len(alive)} nodes hold ({slots}); lower --workers, --threads or --gpus-per-worker"
        )
    return Placement(workers, threads, gpus)


def _slots(nodes: Sequence[Mapping[str, float]], threads: int, gpus: float) -> int:
    """Workers that fit, node by node."""
    return sum(
        int(
            min(
                node.get("CPU", 0) // threads,
                node.get("GPU", 0) // gpus if gpus else float("inf"),
            )
        )
        for node in nodes
    )
