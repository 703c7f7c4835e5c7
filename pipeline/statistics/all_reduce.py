"""Sums statistics over the workers, in rank order, with the traffic of an all-reduce.

Each worker receives its slice of the tensor from all workers and adds them in rank order; then all
workers gather the slices. So the sum does not depend on the order of a ring, and the in-process
executor gets the same bytes by adding the workers' tensors one after another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from pipeline.runtime.device_errors import fault_of, in_short
from pipeline.statistics.accumulate import Sums, keeps_inputs
from storage.errors import ResourceError, WorkerLostError

# Bytes exchanged at once. The buffers take about three times as much.
_CHUNK_BYTES = 1 << 28
# torch 2.13 renamed it; 2.11 has only the old name.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def host_meeting(host: str) -> TCPStore:
    """The store of rank 0 on a free port of `host`, at which all workers meet.

    The other workers need its `port`.
    """
    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


@dataclasses.dataclass(frozen=True)
class _Team:
    """A `pipeline.solvers.types.Team` of some of the workers, in the order of their ranks."""

    collective: Collective
    ranks: tuple[int, ...]
    group: dist.ProcessGroup

    @property
    def index(self) -> int:
        """This worker's place among `ranks`."""
        return self.ranks.index(self.collective.rank)

    @property
    def size(self) -> int:
        """The number of members."""
        return len(self.ranks)

    def send(self, tensor: Tensor, owner: int) -> None:
        """See `Team`. Raises `WorkerLostError` as `Collective.sum` does."""
        self.collective.send(tensor, self.ranks[owner], self.group, self.size)


class Collective:
    """The membership of this process in the group of all workers."""

    def __init__(
        self, rank: int, world: int, store: TCPStore, backend: str, timeout: float, nodes: int = 1
    ) -> None:
        """Joins the group that meets at `store`. Raises `WorkerLostError` if that fails.

        world: number of workers. timeout: the most seconds that an operation waits. nodes: how many
        nodes hold the workers.
        """
        self.rank, self.world, self.backend, self.nodes = rank, world, backend, nodes
        self._teams: dict[tuple[int, ...], _Team | None] = {}
        self._timeout = timedelta(seconds=timeout)
        # Bytes that this worker has sent to others.
        self.sent = 0
        try:
            dist.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=world,
                timeout=self._timeout,
            )
        except (RuntimeError, ValueError) as error:
            if fault_of(error) == "collective":
                raise self._explained(RuntimeError(str(error))) from error
            raise WorkerLostError(f"rank {rank} could not join the others: {error}") from error

    @classmethod
    def join(
        cls,
        rank: int,
        world: int,
        host: str,
        port: int,
        backend: str,
        timeout: float,
        nodes: int = 1,
    ) -> Collective:
        """Joins the group that rank 0 hosts at `host:port` (see `host_meeting`).

        Raises `WorkerLostError` if rank 0 cannot be reached.
        """
        try:
            store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout))
        except RuntimeError as error:
            raise WorkerLostError(f"rank {rank} cannot reach rank 0 at {host}:{port}") from error
        return cls(rank, world, store, backend, timeout, nodes)

    def close(self) -> None:
        """Leaves the group; may be called after another worker has died."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def take_sent(self) -> int:
        """The bytes that this worker has sent to others since the last call."""
        sent, self.sent = self.sent, 0
        return sent

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the workers, in rank order, written into `tensor` (contiguous).

        Raises `WorkerLostError` when another worker is gone or does not answer in time.
        """
        if self.world == 1:
            return tensor
        flat = tensor.view(-1)
        step = _CHUNK_BYTES // flat.element_size()
        try:
            for start in range(0, flat.numel(), step):
                part = flat[start : start + step]
                part.copy_(self._sum_chunk(part))
        except RuntimeError as error:
            raise self._explained(error) from error
        return tensor

    def team(self, ranks: tuple[int, ...]) -> _Team | None:
        """Some of the workers as a team; None for a worker that is not of it.

        All workers call this, for the same teams in the same order: torch numbers groups in each
        process, and the numbers must agree. Raises `WorkerLostError` as `sum` does.
        """
        if ranks not in self._teams:
            try:
                group = dist.new_group(list(ranks), timeout=self._timeout)
            except RuntimeError as error:
                raise self._explained(error) from error
            self._teams[ranks] = _Team(self, ranks, group) if self.rank in ranks else None
        return self._teams[ranks]

    def _explained(self, error: RuntimeError) -> Exception:
        """What a failed collective means: a lost worker, unless it is the device's or NCCL's own.

        A failed allocation and a failed GPU are returned as they are; the phase explains them.
        """
        fault = fault_of(error)
        if fault in ("memory", "device"):
            return error
        if fault == "collective":
            return ResourceError(
                f"rank {self.rank}: {self.backend} cannot send here ({in_short(error)}); "
                "NCCL_DEBUG=INFO in the nodes' environment shows more; --collective gloo goes on "
                "through host memory"
            )
        return WorkerLostError(f"rank {self.rank} lost a peer while sending: {error}")

    def send(self, tensor: Tensor, source: int, group: dist.ProcessGroup, size: int) -> None:
        """Overwrites a contiguous tensor by that of rank `source`, on all `size` ranks of a group.

        gloo sends from host memory only. Raises `WorkerLostError` as `sum` does.
        """
        try:
            on_wire = tensor if self.backend == "nccl" else tensor.cpu()
            dist.broadcast(on_wire, source, group=group)
        except RuntimeError as error:
            raise self._explained(error) from error
        if on_wire is not tensor:
            tensor.copy_(on_wire)
        if self.rank == source:
            self.sent += (size - 1) * tensor.nbytes

    def _sum_chunk(self, part: Tensor) -> Tensor:
        """`part` (n,) summed over the workers. gloo sends from host memory only."""
        width = -(-part.numel() // self.world)
        device = self._device_of(part)
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
        # A slice to each other worker, then the sum of this worker's slice to each of them.
        self.sent += 2 * (self.world - 1) * total.nbytes
        return gathered[: part.numel()].to(part.device)

    def swap(
        self, joined: Tensor, parts: Sequence[int], sizes: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """By rank, what it has for this worker: (sizes[rank],). Raises as `sum` does.

        joined: (sum(parts),), what this worker has for each rank, one after the other.
        """
        sent = joined.to(self._device_of(joined))
        received = sent.new_empty(sum(sizes))
        try:
            dist.all_to_all_single(received, sent, list(sizes), list(parts))
        except RuntimeError as error:
            raise self._explained(error) from error
        self.sent += (len(joined) - parts[self.rank]) * joined.element_size()
        return torch.split(received.to(joined.device), list(sizes))

    def gather_parts(self, part: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """By rank, the `part` (sizes[rank],) of every worker. Raises as `sum` does."""
        own = part.to(self._device_of(part))
        # Equal sizes: gloo's gather knows no others.
        longest = max(sizes)
        padded = own
        if len(own) < longest:
            padded = own.new_zeros(longest)
            padded[: len(own)] = own
        gathered = own.new_empty(self.world * longest)
        try:
            _ALL_GATHER(gathered, padded)
        except RuntimeError as error:
            raise self._explained(error) from error
        self.sent += (self.world - 1) * part.nbytes
        rows = gathered.view(self.world, longest)
        return [rows[rank, :size].to(part.device) for rank, size in enumerate(sizes)]

    def _device_of(self, tensor: Tensor) -> torch.device:
        """Where a tensor is sent from: gloo sends from host memory only."""
        return tensor.device if self.backend == "nccl" else torch.device("cpu")

    def sum_statistics(self, sums: Sums) -> Sums:
        """The sum of all workers' sums of one group; the tensors of `sums` are overwritten.

        Raises `WorkerLostError` as `sum` does.
        """
        if self.world == 1:
            return sums
        # A row for each worker: tokens, sequences, and whether it has kept its inputs.
        counts = torch.zeros(self.world, 3, dtype=torch.int64)
        counts[self.rank] = torch.tensor([sums.tokens, sums.sequences, sums.inputs is not None])
        if self.backend == "nccl":
            counts = counts.to(torch.device("cuda"))
        try:
            dist.all_reduce(counts)  # integers: exact in any order
        except RuntimeError as error:
            raise self._explained(error) from error
        counts = counts.cpu()
        tokens, sequences, _ = counts.sum(dim=0).tolist()
        if keeps_inputs(sums.columns, tokens, counts[:, 2].bool().tolist()):
            before = int(counts[: self.rank, 0].sum())
            inputs = sums.diagonal.new_zeros(tokens, sums.columns, dtype=torch.float32)
            inputs[before : before + sums.tokens] = sums.kept()
            # The other workers add zeros to these rows: the result is all rows, in rank order.
            self.sum(inputs)
            return dataclasses.replace(sums, tokens=tokens, sequences=sequences, inputs=[inputs])
        if sums.inputs is not None:
            sums.spill()
        for tensor in sums.tensors():
            self.sum(tensor)
        return dataclasses.replace(sums, tokens=tokens, sequences=sequences)
