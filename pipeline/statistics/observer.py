"""Runs a dense block over batches and sums the second moments of the inputs of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.experts import Expert, expert_of
from pipeline.models.forward_capture import BlockCall, LayerGroup
from pipeline.runtime.stopwatch import Stopwatch
from pipeline.statistics.accumulate import Batch, GroupAccumulator, HalvedSums
from storage.errors import ModelError


class _AllObserved(Exception):
    """Ends the forward of a block once the input of the last group has been observed."""


def accumulators(
    module: nn.Module,
    groups: Iterable[LayerGroup],
    needs: Mapping[LayerGroup, str],
    device: torch.device,
    boundary: int | None,
) -> dict[LayerGroup, GroupAccumulator]:
    """Empty sums for groups of layers of the block `module`.

    needs: group -> statistic of its solver. boundary: see `GroupAccumulator`. The inputs of experts
    are kept while they are fewer than the columns.
    """
    return {
        group: GroupAccumulator(
            *(group.columns, needs[group], device, boundary),
            keep=expert_of(module, group.name) is not None,
        )
        for group in groups
    }


class BlockObserver:
    """Observes the groups of a block, each at its first layer: all its layers have the same input.

    A forward ends at the input of the last group. The rest (down_proj: a quarter of a Llama block)
    is not needed.
    """

    def __init__(
        self,
        module: nn.Module,
        sums: dict[LayerGroup, GroupAccumulator],
        call: Callable[[Tensor], BlockCall],
        watch: Stopwatch,
        counted: Tensor | None = None,
    ) -> None:
        """Registers hooks on the block `module`. call: hidden states -> arguments of the block.

        counted: (nsamples, seqlen) bool, of all sequences of the calibration the tokens whose
        inputs are summed; None for all tokens.
        """
        self.module, self._sums, self._call, self._watch = module, sums, call, watch
        self._counted = counted
        self._left = 0  # groups not yet observed in this forward
        # Where a layer is called several times in a forward, its last call is not known.
        self._stops = all(group.calls == 1 for group in sums)
        self._handles = [
            module.get_submodule(group.name).register_forward_pre_hook(
                self._hook(group.name, total, expert_of(module, group.name)), with_kwargs=True
            )
            for group, total in sums.items()
        ]

    def add(self, start: int, hidden_states: Tensor) -> None:
        """Runs the block on sequences `start : start + n`, `hidden_states` (n, seqlen, hidden).

        Raises `ModelError` where only some tokens count and a layer's inputs are not one for each.
        """
        size, length = hidden_states.shape[:2]
        counted = None
        if self._counted is not None:
            counted = self._counted[start : start + size].flatten().to(hidden_states.device)
        batch = Batch(start, size, length, counted)
        for total in self._sums.values():
            total.begin_batch(batch)
        self._left = len(self._sums)
        self._watch.count("tokens", size * length)
        with self._watch("forward"):
            try:
                self._call(hidden_states).run(self.module, hidden_states)
            except _AllObserved:
                return

    def sums(self) -> dict[str, HalvedSums]:
        """The sums by group name. Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        by_group = {group.name: total.sums() for group, total in self._sums.items()}
        for sums in (half for halves in by_group.values() for half in halves):
            self._watch.count("statistics_bytes", sums.nbytes)
        return by_group

    def _hook(
        self, name: str, total: GroupAccumulator, expert: Expert | None
    ) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with self._watch("hessian"):
                tokens = None if expert is None else expert.tokens
                try:
                    total.add(args[0] if args else kwargs["input"], tokens)
                except ModelError as error:
                    raise ModelError(f"{name}: {error}; use --calibrate-on all") from error
            self._left -= 1
            if self._stops and not self._left:
                raise _AllObserved

        return hook
