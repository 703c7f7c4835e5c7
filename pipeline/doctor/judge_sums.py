"""What is wrong with the sum over all workers."""

from __future__ import annotations

from pipeline.doctor.facts import Finding, SumAnswer, Sums

_OPEN = (
    "open the ports between the nodes (collectives choose free ones), or name the network that "
    "they share: --network-interface"
)
# Part of an error's message, in lower case -> what mends it. The first that is found counts.
_REMEDIES = (
    ("unable to find address", "name a network that the node has: --network-interface, or unset "
     "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"),
    ("no socket interface found", "name a network that the node has: --network-interface, or unset "
     "NCCL_SOCKET_IFNAME"),
    ("/dev/shm", "give the container more /dev/shm: `docker run --shm-size`"),
    ("no space left", "give the container more /dev/shm: `docker run --shm-size`"),
    ("duplicate gpu", "two workers have one GPU: NCCL needs one for each"),
    ("driver", "the driver is older than NCCL asks for: update it"),
    ("timed out", _OPEN),
    ("timeout", _OPEN),
    ("connect", _OPEN),
    ("nccl", "run it again with NCCL_DEBUG=INFO in the environment of the nodes: NCCL then says "
     "more"),
)  # fmt: skip
_OTHERWISE = "look at the worker's log on that node"


def total(sums: Sums) -> list[Finding]:
    """Findings: of each rank that failed alone, else of those that failed in the common group."""
    if sums.reason:
        return [Finding(check="sum", state="skipped", found=f"not tried: {sums.reason}")]
    found = []
    failed = [rank for rank in sums.ranks if _error(rank)]
    # Where a rank fails by itself, the others only miss it.
    first = [rank for rank in failed if not _waited(rank)] or failed
    seen = set[tuple[str, str]]()
    for rank in first:
        error = _error(rank)
        if (rank.node, error) not in seen:
            seen.add((rank.node, error))
            text = f"{_backend(sums, rank)}: {error}"
            found.append(_wrong(text, rank.node, sum_remedy(error)))
    if not failed:
        found.append(Finding(check="sum", state="ok", found=_success(sums)))
    if sums.busy:
        text = f"{sums.busy} GPUs are in use by others, and were left out"
        remedy = "run it again when no other job is at work"
        found.append(Finding(check="sum", state="warning", found=text, remedy=remedy))
    return found


def sum_remedy(error: str) -> str:
    """What mends a sum that failed, by the message of its error."""
    text = error.lower()
    return next((remedy for part, remedy in _REMEDIES if part in text), _OTHERWISE)


def _error(rank: SumAnswer) -> str:
    return rank.answer.problem or str((rank.answer.value or {}).get("error") or "")


def _waited(rank: SumAnswer) -> bool:
    """Whether a rank failed by waiting for others."""
    error = _error(rank).lower()
    return rank.answer.hung or "timed out" in error or "timeout" in error or "peer" in error


def _backend(sums: Sums, rank: SumAnswer) -> str:
    alone = (rank.answer.value or {}).get("phase") == "alone"
    return f"{sums.backend}, alone" if alone else f"{sums.backend}, {len(sums.ranks)} workers"


def _success(sums: Sums) -> str:
    nodes = len({rank.node for rank in sums.ranks})
    world = len(sums.ranks)
    workers = f"{world} workers on {nodes} node{'s' if nodes > 1 else ''}, and each alone"
    return f"{sums.backend}: {workers if world > 1 else 'one worker alone'}: the sums are right"


def _wrong(text: str, node: str, remedy: str) -> Finding:
    return Finding(check="sum", state="wrong", found=text, where=(node,), remedy=remedy)
