"""A small sum over all workers, as a job's statistics are summed: all-to-all, add, all-gather."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

# torch 2.13 renamed it; 2.11 has only the old name.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_ENTRIES = 1024


def sum_over_workers(
    rank: int, world: int, host: str, port: int, backend: str, device: str, seconds: float
) -> dict[str, Any]:
    """One rank's part: a group of its own first, then, if `world` is above 1, that of all.

    host, port: where rank 0 listens. backend: of the group of all; a rank whose device is a GPU is
    alone with nccl. seconds: the most that anything waits. Returns the seconds of both, and as
    `error` what failed, with `phase`: "alone" or "all".
    """
    wait = timedelta(seconds=seconds)
    found: dict[str, Any] = {"error": None, "phase": None, "backend": backend}
    alone = "nccl" if device.startswith("cuda") else "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    try:
        found["phase"] = "alone"
        dist.init_process_group(alone, store=HashStore(), rank=0, world_size=1, timeout=wait)
        found["alone_seconds"] = _timed_sum(0, 1, device if alone == "nccl" else "cpu")
        if world > 1:
            found["phase"] = "all"
            store = TCPStore(host, port, world, rank == 0, wait, wait_for_workers=False)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
            found["seconds"] = _timed_sum(rank, world, device if backend == "nccl" else "cpu")
            # Rank 0 holds the store: it stays until all have seen their sum.
            store.set(f"done-{rank}", "")
            if rank == 0:
                store.wait([f"done-{other}" for other in range(world)], wait)
    except (RuntimeError, ValueError) as error:  # torch's errors of collectives are RuntimeErrors
        found["error"] = " ".join(str(error).split())
    return found


def _timed_sum(rank: int, world: int, device: str) -> float:
    """Seconds of a sum in the current group, which is left. RuntimeError if it is wrong.

    A group that fails is not left: with NCCL that may wait for ever. The process ends anyway.
    """
    began = time.monotonic()
    sent = torch.full((world * _ENTRIES,), float(rank + 1), device=device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    gathered = torch.empty_like(sent)
    _ALL_GATHER(gathered, received.view(world, _ENTRIES).sum(dim=0))
    expected = world * (world + 1) / 2
    if not bool((gathered == expected).all()):
        raise RuntimeError(f"the sum is {float(gathered[0])}, not {expected}")
    dist.destroy_process_group()
    return time.monotonic() - began
