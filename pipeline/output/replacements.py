"""The pruned layers and trained norms that replace tensors of the source's weight files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from pipeline.models.roles.norms import trained_norm
from pipeline.models.skeleton import Skeleton
from storage.run.checkpoints import BlockRecord, read_layer, verify_record
from storage.run.directory import RunDirectory


class Replacements:
    """Callable: name of a stored tensor → its replacement, in the layout of its weight file.

    A block's files are compared with their hashes before the first of its layers is read. A stack
    of experts is replaced one expert at a time; experts that stay dense are read from the source.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        run: RunDirectory,
        records: Iterable[BlockRecord],
        threads: int = 1,
    ) -> None:
        """records: of the pruned blocks. threads: how many files are hashed at a time."""
        self._skeleton, self._run, self._threads = skeleton, run, threads
        # Stored tensor → number of the expert (0 for a tensor of one layer) → its layer.
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
            for norm in record.norms:
                name = trained_norm(skeleton, record.block, norm)
                self._owners.setdefault(name, {})[0] = record, norm
        self._verified: set[int] = set()

    def __call__(self, name: str) -> Iterable[Tensor] | None:
        """The new rows of a tensor, in pieces; None for a tensor that is copied from the source.

        Raises `CorruptFileError` if a file of a checkpoint is damaged.
        """
        if name not in self._owners:
            return None
        if name in self._stacks:
            return self._stack(name)
        return [self._pruned(*self._owners[name][0])]

    def _stack(self, name: str) -> Iterator[Tensor]:
        files, experts = self._skeleton.files, self._owners[name]
        for number in range(files.tensors[name].shape[0]):
            if number in experts:
                yield self._pruned(*experts[number])
            else:
                yield files.read(name, rows=(number, number + 1))

    def _pruned(self, record: BlockRecord, layer: str) -> Tensor:
        directory = self._run.checkpoints(record.block)
        if record.block not in self._verified:
            verify_record(directory, record, self._threads)
            self._verified.add(record.block)
        weight = read_layer(directory, record, layer, verify=False)
        if layer in record.norms:
            return weight.view(-1)
        return self._skeleton.as_stored(record.block, layer, weight)
