"""The phases of a rank that choose regularization and solve, and the statistics they need."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.config.solver import AUTO, SolverSettings
from pipeline.messages import Job, SolvedSlices
from pipeline.models.forward_capture import LayerGroup
from pipeline.models.linears import linear_layers
from pipeline.models.selection import settings_of
from pipeline.models.skeleton import Skeleton
from pipeline.runtime.split import deal
from pipeline.runtime.stopwatch import Stopwatch, peak_memory
from pipeline.solvers.registry import solver_for
from pipeline.solvers.types import Team
from pipeline.statistics.accumulate import HalvedStatistics, HalvedSums, merged
from pipeline.statistics.all_reduce import Collective
from pipeline.worker.block_loader import BlockLoader
from pipeline.worker.few_tokens import least_tokens
from pipeline.worker.forward import Forward
from pipeline.worker.saved_layers import save_layer, saved_layers
from pipeline.worker.solve import (
    TOO_FEW_TOKENS,
    choose_settings,
    deal_rows,
    solve_group,
    teams,
)
from pipeline.worker.transfer.slice_writer import SliceWriter
from storage.errors import ModelError, NumericalError
from storage.run.directory import RunDirectory
from storage.run.lock import require_owner


@dataclass(frozen=True)
class PassState:
    """What a rank keeps between the phases of a pass over a block's inputs; all else is dropped.

    groups: the pass's groups of layers. sums: group → sums over this rank's sequences, from
    `calibrate` until `reduce`. statistics: group → statistics over all ranks' sequences, from
    `reduce` until `solve`.
    """

    groups: tuple[LayerGroup, ...] = ()
    sums: dict[str, HalvedSums] = field(default_factory=dict)
    statistics: dict[str, HalvedStatistics] = field(default_factory=dict)


class SolvePhases:
    """The phases that follow those of the statistics; `state` is what these have left."""

    job: Job
    rank: int
    world: int
    device: torch.device
    run: RunDirectory
    skeleton: Skeleton
    watch: Stopwatch
    loader: BlockLoader
    collective: Collective | None
    forward: Forward
    state: PassState

    def choose(self, block: int) -> dict[str, dict[str, Any]]:
        """Chooses the regularization of this rank's share of groups: group → settings as JSON.

        The entry is empty for a group whose method (`--override`) leaves nothing to choose.
        """
        cost = {group.name: float(group.columns) ** 3 for group in self.state.groups}
        owners = deal(list(cost), cost, self.world)
        choices: dict[str, dict[str, Any]] = {}
        layer_settings = self._settings(block)
        module = self.skeleton.blocks[block]
        for group in (group for group in self.state.groups if owners[group.name] == self.rank):
            settings = layer_settings[group.name]
            if settings.shrinkage != AUTO or solver_for(settings).needs != "full":
                choices[group.name] = {}
                continue
            halves = self.state.statistics[group.name]
            least = least_tokens(module, group.layers, self.job.expert_tokens)
            if min(half.tokens for half in halves) < least:
                choices[group.name] = TOO_FEW_TOKENS
                continue
            weights = self._named(block, dict.fromkeys(group.layers))
            with self.watch("choose"), _in_block(block):
                choices[group.name] = choose_settings(weights, halves, settings)
        return choices

    def solve(
        self, block: int, stamp: str, choices: dict[str, dict[str, Any]] | None
    ) -> SolvedSlices:
        """Solves this rank's rows of the pass's layers and writes them to files.

        Files are written while the next layers are solved.

        choices: what `choose` returned, for all groups; None if nothing is chosen.
        Raises `NumericalError`, naming block and layer, for NaN or Inf.
        """
        settings = self._settings(block)
        if self.state.statistics and block + 1 < len(self.skeleton.blocks):
            self.loader.ahead(block + 1)
        shapes = linear_layers(self.skeleton.blocks[block])
        # Without statistics (magnitude) nothing was observed: each layer is a group.
        groups = self.state.groups or tuple(LayerGroup((n,), shapes[n][1]) for n in settings)
        kind, nodes = self.device.type, self._nodes_of_gpus()
        dealt = deal_rows(settings, groups, shapes, self.world, kind, nodes)
        joint = teams(settings, groups, shapes, dealt, kind, nodes)
        made = {name: self.collective.team(of) for name, of in joint.items() if self.collective}
        ranges = dealt[self.rank]
        reports: dict[str, dict[str, Any]] = {}
        costs: dict[str, dict[str, float]] = {}
        guard = partial(require_owner, self.job.lock_file)
        folder = self.run.checkpoints(block)
        with SliceWriter(folder, self.rank, stamp, self.forward.writing, guard) as writer:
            # Those that ranks wait for each other in come first, on all ranks in the same order.
            for group in sorted(groups, key=lambda group: group.name not in joint):
                self._save_layers(block, group)
                rows = {layer: ranges[layer] for layer in group.layers if layer in ranges}
                halves = self.state.statistics.pop(group.name, ())
                if not rows:
                    continue
                choice = choices.get(group.name) if choices is not None else None
                began = time.perf_counter()
                team = made.get(group.name)
                solved = self._solve_group(block, settings[group.name], rows, halves, choice, team)
                costs[group.name] = {
                    "seconds": time.perf_counter() - began,
                    **peak_memory(self.device),
                }
                for layer, (stored, report) in solved.items():
                    writer.add(layer, rows[layer][0], stored)
                    self.watch.count("solved_weights", stored.numel())
                    reports[layer] = report
            self.forget()
            if joint and self.collective is not None:
                self.watch.count("inverses_sent_bytes", self.collective.take_sent())
            with self.watch("io"):
                files = writer.finish()
        self.watch.count("slices_written_bytes", sum(file.stored.bytes for file in files))
        return SolvedSlices(files, ranges, reports, costs)

    def forget(self) -> None:
        """Drops the statistics of an abandoned attempt or of a solved block."""
        self.state = PassState()

    def _nodes_of_gpus(self) -> int | None:
        """How many nodes hold the ranks, where these send from GPU to GPU; None elsewhere."""
        if self.collective is None or self.collective.backend != "nccl":
            return None
        return self.collective.nodes

    def _settings(self, block: int) -> dict[str, SolverSettings]:
        """Layer, by its path in the block → its settings, for the block's pruned layers."""
        if self.job.rules is None:
            raise ModelError("this job evaluates; it has no solver")
        return settings_of(self.skeleton, block, self.job.rules)

    def _solve_group(
        self,
        block: int,
        settings: SolverSettings,
        rows: dict[str, tuple[int, int]],
        halves: HalvedStatistics,
        choice: dict[str, Any] | None,
        team: Team | None,
    ) -> dict[str, tuple[Tensor, dict[str, Any]]]:
        """Layer → its solved rows and their report; see `pipeline.worker.solve.solve_group`."""
        weights, prefix = self._named(block, rows), self.skeleton.block_prefix(block)
        least = least_tokens(self.skeleton.blocks[block], rows, self.job.expert_tokens)
        with self.watch("solve"), _in_block(block):
            solved = solve_group(weights, merged(halves), settings, choice, least, team)
        return {layer: solved[prefix + layer] for layer in rows}

    def _named(self, block: int, rows: Mapping[str, tuple[int, int] | None]) -> dict[str, Tensor]:
        """The rows of layers by their names in the model; errors are to name them so."""
        prefix = self.skeleton.block_prefix(block)
        return {
            prefix + layer: self._read_weight(block, layer, part) for layer, part in rows.items()
        }

    def _read_weight(self, block: int, layer: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A layer's weight (R, C), or its rows start:stop, in the stored dtype on the device."""
        with self.watch("load"):
            weight = self.skeleton.read_weight(block, layer, rows).to(self.device)
        self.watch.count("weights_read_bytes", weight.nbytes)
        return weight

    def _save_layers(self, block: int, group: LayerGroup) -> None:
        """On rank 0, writes the group's layers that `--save-layers` names."""
        if self.rank or group.name not in self.state.statistics:
            return
        prefix, halves = self.skeleton.block_prefix(block), self.state.statistics[group.name]
        for layer in saved_layers(self.job.save_layers, prefix, group.layers):
            with self.watch("io"):
                weight = self._read_weight(block, layer)
                save_layer(self.job, self.run, prefix + layer, weight, halves)


@contextlib.contextmanager
def _in_block(block: int) -> Iterator[None]:
    """Has a `NumericalError` name the block."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"block {block}: {error}") from error
