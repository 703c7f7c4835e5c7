"""Summing statistics over workers: the same traffic as an all-reduce, in rank order.

Each rank receives its slice of the tensor from all ranks, adds in rank order, and the slices are
gathered by all. So the sum depends on the ranks alone, not on a ring's order, and the in-process
executor gets the same bytes by adding the ranks' tensors one after another.
"""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from pipeline.statistics.accumulate import Sums, stays_kept
from storage.errors import WorkerLostError

# Bytes exchanged at once: bounds the buffers to about three times this.
_CHUNK_BYTES = 1 << 28
# torch 2.13 renamed it; 2.11 has the old name only.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def host_meeting(host: str) -> TCPStore:
    """Rank 0's meeting point on a free port of `host`; its `port` is what the others need."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


class Collective:
    """This process's membership in the group of all ranks."""

    def __init__(
        self, rank: int, world: int, store: TCPStore, backend: str, timeout: float
    ) -> None:
        """Joins the group that meets at `store`; any operation waits `timeout` seconds at most."""
        self.rank, self.world, self.backend = rank, world, backend
        # Bytes that this rank has sent to others.
        self.sent = 0
        try:
            dist.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=timeout),
            )
        except (RuntimeError, ValueError) as error:
            raise WorkerLostError(f"rank {rank} could not join the others: {error}") from error

    @classmethod
    def join(
        cls, rank: int, world: int, host: str, port: int, backend: str, timeout: float
    ) -> Collective:
        """Joins the group that rank 0 hosts at `host:port` (see `host_meeting`)."""
        try:
            store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout))
        except RuntimeError as error:
            raise WorkerLostError(f"rank {rank} cannot reach rank 0 at {host}:{port}") from error
        return cls(rank, world, store, backend, timeout)

    def close(self) -> None:
        """Leaves the group; safe to call after a peer has died."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, added in rank order, written into `tensor` (contiguous).

        Raises `WorkerLostError` when a peer is gone or does not answer in time.
        """
        flat = tensor.view(-1)
        step = _CHUNK_BYTES // flat.element_size()
        try:
            for start in range(0, flat.numel(), step):
                part = flat[start : start + step]
                part.copy_(self._sum_chunk(part))
        except RuntimeError as error:
            raise WorkerLostError(f"rank {self.rank} lost a peer while summing: {error}") from error
        return tensor

    def _sum_chunk(self, part: Tensor) -> Tensor:
        """`part` (n,) summed over ranks; gloo moves bytes of host memory only."""
        width = -(-part.numel() // self.world)
        device = part.device if self.backend == "nccl" else torch.device("cpu")
        sent = torch.zeros(width * self.world, dtype=part.dtype, device=device)
        sent[: part.numel()] = part
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        slices = received.view(self.world, width)
        total = slices[0].clone()
        for rank in range(1, self.world):
            total += slices[rank]
        gathered = torch.empty_like(sent)
        _ALL_GATHER(gathered, total)
        # To each other rank its slice, and then the sum of this rank's own.
        self.sent += 2 * (self.world - 1) * total.nbytes
        return gathered[: part.numel()].to(part.device)

    def sum_statistics(self, own: Sums) -> Sums:
        """The sum of all ranks' sums of one group; `own`'s tensors are overwritten."""
        # A row for each rank: tokens, sequences, and whether it has kept its inputs.
        counts = torch.zeros(self.world, 3, dtype=torch.int64)
        counts[self.rank] = torch.tensor([own.tokens, own.sequences, own.inputs is not None])
        if self.backend == "nccl":
            counts = counts.to(torch.device("cuda"))
        try:
            dist.all_reduce(counts)  # integers: exact in any order
        except RuntimeError as error:
            raise WorkerLostError(f"rank {self.rank} lost a peer while summing: {error}") from error
        counts = counts.cpu()
        tokens, sequences, _ = counts.sum(dim=0).tolist()
        if stays_kept(own.columns, tokens, counts[:, 2].bool().tolist()):
            before = int(counts[: self.rank, 0].sum())
            inputs = own.diagonal.new_zeros(tokens, own.columns, dtype=torch.float32)
            inputs[before : before + own.tokens] = own.kept()
            # Zeros are added to each row: the rows come out as they are, in rank order.
            self.sum(inputs)
            return dataclasses.replace(own, tokens=tokens, sequences=sequences, inputs=[inputs])
        if own.inputs is not None:
            own.spill()
        for tensor in own.tensors():
            self.sum(tensor)
        return dataclasses.replace(own, tokens=tokens, sequences=sequences)
