"""Finds the groups of layers of a block, once for all blocks of the same structure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pipeline.config.solver import SolverSettings
from pipeline.models.forward_capture import LayerGroup, find_groups
from pipeline.statistics.row_order import check_rows
from pipeline.worker.forward import Forward
from pipeline.worker.solve import split_groups
from storage.errors import ModelError


class Groups:
    """The groups of blocks that `forward` runs."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._found: dict[tuple[Any, ...], tuple[LayerGroup, ...]] = {}

    def find(
        self,
        block: int,
        module: nn.Module,
        settings: dict[str, SolverSettings],
        first: Callable[[], Tensor],
    ) -> tuple[LayerGroup, ...]:
        """The block's groups, from a forward pass of `first()`; cached for blocks of equal modules.

        Every rank uses the first sequences: a rank without any must know the groups too. A group
        whose layers differ in settings is split, so that each part has the statistics it needs.
        Raises `ModelError` as `find_groups` does, and where only some tokens count as `check_rows`.
        """
        structure = (str(module), *settings.items())
        if structure not in self._found:
            batch = first()
            call = self._forward.call(block, batch)
            prefix = self._forward.skeleton.block_prefix(block)
            groups = find_groups(module, call, batch, tuple(settings), prefix)
            if self._forward.counted() is not None:
                try:
                    with self._forward.watch("forward"):
                        check_rows(module, call, batch, groups)
                except ModelError as error:
                    raise ModelError(f"{prefix}{error}") from error
            self._found[structure] = split_groups(groups, settings)
        return self._found[structure]
