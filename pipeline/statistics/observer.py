"""Running a dense block over batches while the second moments of its layers' inputs are summed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.experts import Expert, expert_of
from pipeline.models.forward_capture import BlockCall, LayerGroup
from pipeline.runtime.stopwatch import Stopwatch
from pipeline.statistics.accumulate import GroupAccumulator, HalvedSums


class _Observed(Exception):
    """Leaves the block's forward once the last group's input has been seen."""


def accumulators(
    module: nn.Module,
    groups: Iterable[LayerGroup],
    needs: Mapping[LayerGroup, str],
    device: torch.device,
    boundary: int | None,
) -> dict[LayerGroup, GroupAccumulator]:
    """Empty sums for groups of a block's layers; an expert's inputs are kept while they are few."""
    return {
        group: GroupAccumulator(
            *(group.columns, needs[group], device, boundary),
            keep=expert_of(module, group.name) is not None,
        )
        for group in groups
    }


class BlockObserver:
    """A block's groups, each observed at its first layer: the others are called with the same.

    A forward ends where the last group's input is known: what a block makes of its last linear
    layer's output (down_proj: a quarter of a Llama block) is no layer's input.
    """

    def __init__(
        self,
        module: nn.Module,
        sums: dict[LayerGroup, GroupAccumulator],
        call: Callable[[Tensor], BlockCall],
        watch: Stopwatch,
    ) -> None:
        """Observes `module`; `call` gives what it is called with for a batch."""
        self._module, self._sums, self._call, self._watch = module, sums, call, watch
        self._left = 0
        # Where a layer is called several times in a forward, the last time is not known.
        self._stops = all(group.calls == 1 for group in sums)
        self._handles = [
            module.get_submodule(group.name).register_forward_pre_hook(
                self._hook(total, expert_of(module, group.name)), with_kwargs=True
            )
            for group, total in sums.items()
        ]

    def add(self, start: int, hidden_states: Tensor) -> None:
        """Runs the block on sequences `start : start + n`, `hidden_states` (n, seqlen, hidden)."""
        for total in self._sums.values():
            total.begin_batch(start, hidden_states.shape[0], hidden_states.shape[1])
        self._left = len(self._sums)
        self._watch.count("tokens", hidden_states.shape[0] * hidden_states.shape[1])
        with self._watch("forward"):
            try:
                self._call(hidden_states).run(self._module, hidden_states)
            except _Observed:
                return

    def sums(self) -> dict[str, HalvedSums]:
        """The sums so far by group name. Ends the observation."""
        for handle in self._handles:
            handle.remove()
        found = {group.name: total.sums() for group, total in self._sums.items()}
        for sums in (half for halves in found.values() for half in halves):
            self._watch.count("statistics_bytes", sums.nbytes)
        return found

    def _hook(self, total: GroupAccumulator, expert: Expert | None) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with self._watch("hessian"):
                tokens = None if expert is None else expert.tokens
                total.add(args[0] if args else kwargs["input"], tokens)
            self._left -= 1
            if self._stops and not self._left:
                raise _Observed

        return hook
