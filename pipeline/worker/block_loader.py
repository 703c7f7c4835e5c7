"""Loads a block's weights onto a rank's device: dense, pruned, or read ahead of their use."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial

import torch
from torch import nn

from pipeline.models.linears import as_held
from pipeline.models.text_forward import text_forward
from pipeline.worker.forward import Forward
from pipeline.worker.transfer.staging import Moving
from storage.run.checkpoints import BlockRecord, read_layer, verify_record
from storage.run.directory import RunDirectory


class BlockLoader:
    """Loads blocks of a model from the source's weight files and the run's checkpoints."""

    def __init__(self, run: RunDirectory, forward: Forward) -> None:
        self.run, self.skeleton = run, forward.skeleton
        self.watch, self.device = forward.watch, forward.device
        self._reading, self._staging = forward.reading, forward.staging
        self._file_threads = forward.file_threads
        self._prefetched: tuple[int, Future[nn.Module]] | None = None

    def ahead(self, block: int) -> None:
        """Begins to read a block's dense weights into host memory, for the next `dense`."""
        if block not in text_forward(self.skeleton).reached:
            return
        load = partial(self.skeleton.load_block, block, torch.device("cpu"))
        self._prefetched = (block, self._reading.submit(load))

    def dense(self, block: int) -> nn.Module:
        """A block with the source's weights, on the device; uses what `ahead` has read."""
        with self.watch("load"):
            if self._prefetched is not None and self._prefetched[0] == block:
                future, self._prefetched = self._prefetched[1], None
                module = self._staging.module_up(future.result(), self._reading)
                return self._counted(block, module)
            return self._counted(block, self.skeleton.load_block(block, self.device))

    def pruned(self, block: int, record: BlockRecord | None) -> nn.Module:
        """A block with the pruned weights that `record` names, on the device; dense if it is None.

        A block that no forward calls is not read: nothing stands in its place. Raises
        `CorruptFileError` if a file that the record names is damaged.
        """
        if block not in text_forward(self.skeleton).reached:
            return nn.Identity()
        with self.watch("load"):
            layers = () if record is None else record.layers
            module = self.skeleton.load_block(block, self.device, without=layers)
            self._counted(block, module)
            if record is not None:
                self.watch.count("slices_read_bytes", sum(stored.bytes for stored in record.files))
                self._fill(block, module, record)
        return module

    def _fill(self, block: int, module: nn.Module, record: BlockRecord) -> None:
        """Gives a block its pruned layers, and its norms where they were trained.

        The next ones are read while one is copied to a GPU.
        """
        directory = self.run.checkpoints(block)
        verify_record(directory, record, self._file_threads)

        def read(layer: str) -> Moving:
            weight = read_layer(directory, record, layer, verify=False)
            weight = as_held(module.get_submodule(layer), weight).contiguous()
            return self._staging.up(weight.to(self.skeleton.dtype))

        for layer, weight in zip(
            record.layers, self._reading.ahead(read, record.layers), strict=True
        ):
            parameter = nn.Parameter(weight.tensor(), requires_grad=False)
            module.get_submodule(layer).weight = parameter
        for norm in record.norms:
            stored = read_layer(directory, record, norm, verify=False)
            with torch.no_grad():
                module.get_parameter(norm).copy_(stored.view(-1))

    def _counted(self, block: int, module: nn.Module) -> nn.Module:
        """Counts the stored bytes of the tensors of `module` as read; returns `module`."""
        prefix = self.skeleton.block_prefix(block)
        read: dict[tuple[str, int | None], int] = {}
        for tensor, value in module.state_dict(keep_vars=True).items():
            name = self.skeleton.tensor_name(prefix + tensor)
            if name is None or value.is_meta:
                continue
            entry = self.skeleton.files.tensors[name]
            size, part = entry.end - entry.start, self.skeleton.parts.get(prefix + tensor)
            if part is None:
                read[name, None] = size
            else:  # all experts are one tensor
                read[name, part.index] = size // entry.shape[0]
        self.watch.count("weights_read_bytes", sum(read.values()))
        return module
