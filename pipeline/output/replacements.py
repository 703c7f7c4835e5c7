"""What the output has in place of the source's tensors: the pruned layers, from the checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from pipeline.models.skeleton import Skeleton
from storage.run.checkpoints import BlockRecord, read_layer, verify_record
from storage.run.directory import RunDirectory


class Replacements:
    """By the name of a stored tensor what is written in its place, in the layout of its file.

    A block's files are compared with their hashes before the first of its layers is read. Of a
    stack of experts one at a time is in memory; those that stay dense are read from the source.
    """

    def __init__(
        self, skeleton: Skeleton, run: RunDirectory, records: Iterable[BlockRecord]
    ) -> None:
        """`records`: of the pruned blocks."""
        self._skeleton, self._run = skeleton, run
        # Stored tensor -> number of the part (0 of a whole one) -> the layer it is.
        self._owners: dict[str, dict[int, tuple[BlockRecord, str]]] = {}
        self._stacks: set[str] = set()
        for record in records:
            for layer in record.layers:
                name = skeleton.weight_name(record.block, layer)
                part = skeleton.part(record.block, layer)
                number = 0 if part is None else part.index
                self._owners.setdefault(name, {})[number] = record, layer
                if part is not None:
                    self._stacks.add(name)
        self._verified: set[int] = set()

    def __call__(self, name: str) -> Iterable[Tensor] | None:
        """The rows of a tensor that is replaced, in pieces; None for one that is copied."""
        if name not in self._owners:
            return None
        if name in self._stacks:
            return self._stack(name)
        return [self._pruned(*self._owners[name][0])]

    def _stack(self, name: str) -> Iterator[Tensor]:
        files, own = self._skeleton.files, self._owners[name]
        for number in range(files.tensors[name].shape[0]):
            if number in own:
                yield self._pruned(*own[number])
            else:
                yield files.read(name, rows=(number, number + 1))

    def _pruned(self, record: BlockRecord, layer: str) -> Tensor:
        directory = self._run.checkpoints(record.block)
        if record.block not in self._verified:
            verify_record(directory, record)
            self._verified.add(record.block)
        weight = read_layer(directory, record, layer, verify=False)
        return self._skeleton.as_stored(record.block, layer, weight)
