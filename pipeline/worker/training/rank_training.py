"""One rank's training of layers of one block, from its first step to its last.

The block is whole on every rank, and every rank computes the gradients of its own sequences. Rows
of the layers are owned: their exact weights and Adam's moments are on one rank alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from pipeline.config.reconstruct import Reconstruct
from pipeline.reconstruct.adam import RowAdam, first_rate
from pipeline.reconstruct.gradients import Run, gradients, relative_error
from pipeline.reconstruct.schedule import freezes, held_out, rate, steps_in_epoch, steps_of_epoch
from pipeline.runtime.stopwatch import Stopwatch
from pipeline.runtime.threads import in_pieces, threads
from pipeline.worker.training.exchange import (
    Exchange,
    bundles,
    in_order,
    rows_of,
    summed,
    to_all,
    to_owner,
)
from pipeline.worker.training.trained import Trained

T = TypeVar("T")

Sequences = Mapping[int, Callable[[], tuple[Tensor, Tensor, Tensor | None]]]
"""Number of each of the rank's sequences -> what reads it: the block's input and the target,
(1, seqlen, hidden), the first of them to be changed at will, and the counted tokens (1, seqlen),
None: all."""


@dataclass(frozen=True)
class TrainingPlan:
    """What decides the steps, the same on every rank. nsamples: calibration sequences."""

    how: Reconstruct
    nsamples: int
    block: int

    @property
    def steps(self) -> int:
        """Steps of all epochs."""
        return self.how.epochs * steps_in_epoch(self.nsamples, self.how.batch)

    def epoch(self, number: int) -> list[list[int]]:
        """The sequences of each step of an epoch."""
        seed = self.how.seed * 10_007 + self.block
        return steps_of_epoch(self.nsamples, self.how.batch, number, seed)


@dataclass(frozen=True)
class Place:
    """A rank among the others.

    sequences: by rank, which it has. peers: None where it is alone.
    """

    rank: int
    sequences: Sequence[range]
    peers: Exchange | None

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.sequences)


class RankTraining:
    """Trains layers of a block, and its norms.

    block: the pruned block, on the device. run: its forward. layers: path of a layer, or of a
    norm's weight or bias -> the dtype in which it is stored. A forward always sees weights as they
    would be stored. make: makes what trains the rows that the rank owns, from the layer's name, the
    rows, their weight and the rate.
    """

    def __init__(
        self,
        block: nn.Module,
        run: Run,
        layers: Mapping[str, torch.dtype],
        sequences: Sequences,
        plan: TrainingPlan,
        place: Place,
        watch: Stopwatch,
        make: Callable[[str, slice, Tensor, float], RowAdam],
    ) -> None:
        self._trained = {layer: Trained.of(block, layer) for layer in layers}
        self._run, self._sequences, self._plan = run, sequences, plan
        self._place, self._watch, self._dtypes = place, watch, layers
        self._owned: dict[str, RowAdam] = {}
        for layer in layers:
            weight = self._weight(layer)
            squares = float(weight.double().square().sum())
            first = first_rate(squares, int((weight != 0).sum()), plan.how.learning_rate)
            rows = self.rows(layer)
            self._owned[layer] = make(layer, rows, weight[rows], first)
            self._trained[layer].parameter.requires_grad_(True)
        self._bundles = bundles(
            {
                layer: (weight.nbytes, (weight.dtype, dtype))
                for layer, dtype in layers.items()
                for weight in [self._weight(layer)]
            }
        )
        self._done = 0
        self._best = {
            layer: self._weight(layer)[self.rows(layer)].to(dtype, copy=True)
            for layer, dtype in layers.items()
        }
        self.losses = [self.judge()]

    def rows(self, layer: str) -> slice:
        """The rows of a layer that this rank owns."""
        return rows_of(len(self._weight(layer)), self._place.rank, self._place.world)

    def epoch(self, number: int) -> tuple[float, float]:
        """Runs an epoch; the mean loss of its sequences, each before its step, and the held-out's.

        Either is not finite where a loss was not; the epoch ends there.
        """
        total, count = 0.0, 0
        for batch in self._plan.epoch(number):
            losses = self._step(batch)
            total, count = total + sum(losses), count + len(losses)
            if not math.isfinite(total):
                break
        self.losses.append(self.judge() if math.isfinite(total) else math.nan)
        if self.losses[-1] <= min(self.losses[:-1]):
            self._best = {layer: self._stored(layer) for layer in self._owned}
        return total / max(count, 1), self.losses[-1]

    def end(self) -> dict[str, Tensor]:
        """Puts the best weights into the block, and returns the rows (r, C) that the rank owns."""
        self._install(dict(self._best))
        for trained in self._trained.values():
            trained.parameter.requires_grad_(False)
        return self._best

    def judge(self) -> float:
        """The mean loss of the held-out sequences of all ranks."""
        numbers = held_out(self._plan.nsamples)

        def loss(number: int) -> float:
            with torch.no_grad():
                inputs, target, counted = self._sequences[number]()
                return float(relative_error(self._run(inputs), target, counted))

        with self._watch("forward"):
            found = self._each(loss, [n for n in numbers if n in self._sequences])
        losses = self._summed([found.get(number, 0.0) for number in numbers])
        return sum(losses) / len(losses)

    # -- parts of these ---------------------------------------------------------------------

    def _step(self, batch: Sequence[int]) -> list[float]:
        """One step on all ranks; the losses of its sequences, of all ranks."""
        plan = self._plan
        if freezes(self._done, plan.steps):
            for state in self._owned.values():
                state.freeze()
        factor = rate(self._done, plan.steps)
        self._done += 1
        found, mine = self._gradients(batch)
        losses = self._summed([mine.get(number, 0.0) for number in batch])
        if not math.isfinite(sum(losses)):
            return losses
        with self._watch("reduce"):
            own: dict[str, Tensor] = {}
            for bundle in self._bundles:
                own |= self._to_owner({layer: found.pop(layer) for layer in bundle}, batch)
        stored: dict[str, Tensor] = {}

        def update(layer: str) -> None:
            self._owned[layer].step(own.pop(layer).mul_(1 / len(batch)), factor)
            stored[layer] = self._stored(layer)

        with self._watch("train"):
            self._at_once(update, list(self._owned))
        self._install(stored)
        return losses

    def _gradients(self, batch: Sequence[int]) -> tuple[dict[str, list[Tensor]], dict[int, float]]:
        """Of this rank's sequences in a step: their gradients by layer, and their losses.

        The gradients are those of each sequence, in order; on a rank that is alone their sum.
        """
        weights = [trained.parameter for trained in self._trained.values()]
        numbers = [number for number in batch if number in self._sequences]
        kept: dict[str, list[Tensor]] = {layer: [] for layer in self._trained}
        losses: dict[int, float] = {}

        def learn(number: int) -> tuple[float, list[Tensor]]:
            loss, found = gradients(self._run, weights, *self._sequences[number]())
            return float(loss), found

        with self._watch("train"):
            # A sequence each: its gradients do not depend on who computes the others.
            for start in range(0, len(numbers), threads()):
                some = numbers[start : start + threads()]
                found = self._each(learn, some)
                for number in some:
                    losses[number], each = found.pop(number)
                    for layer, gradient in zip(kept, each, strict=True):
                        held = self._trained[layer].as_matrix(gradient)
                        if self._place.world > 1:
                            kept[layer].append(held)
                        elif kept[layer]:
                            kept[layer][0] += held
                        else:
                            kept[layer].append(in_order([held]))
        return kept, losses

    def _to_owner(
        self, found: Mapping[str, list[Tensor]], batch: Sequence[int]
    ) -> dict[str, Tensor]:
        """The sums of all ranks' gradients of a bundle's layers, (rows, C) fp32."""
        place = self._place
        counts = [sum(number in part for number in batch) for part in place.sequences]
        gradients = [each or [self._weight(layer)[None][:0]] for layer, each in found.items()]
        return dict(zip(found, to_owner(gradients, counts, place.rank, place.peers), strict=True))

    def _stored(self, layer: str) -> Tensor:
        """The rows that this rank owns, as they would be stored now."""
        return self._owned[layer].weight().to(self._dtypes[layer], copy=True)

    def _install(self, own: dict[str, Tensor]) -> None:
        """Puts all ranks' rows of the layers into the block; `own` is emptied."""
        place = self._place
        with self._watch("reduce"):
            for bundle in self._bundles:
                weights = [self._weight(layer) for layer in bundle]
                mine = [own.pop(layer) for layer in bundle]
                to_all(mine, weights, place.world, place.peers)

    def _weight(self, layer: str) -> Tensor:
        """A layer's weight (R, C) in the block: a view."""
        trained = self._trained[layer]
        return trained.as_matrix(trained.parameter.detach())

    def _summed(self, losses: Sequence[float]) -> list[float]:
        return summed(losses, self._place.peers, self._watch.device)

    def _each(self, work: Callable[[int], T], numbers: Sequence[int]) -> dict[int, T]:
        """`work` for each of these sequences, several at a time on a CPU."""
        found: dict[int, T] = {}

        def one(number: int) -> None:
            found[number] = work(number)

        self._at_once(one, numbers)
        return found

    def _at_once(self, work: Callable[[T], None], items: Sequence[T]) -> None:
        """Calls `work` with each item, on several threads on a CPU."""
        if self._watch.device.type == "cpu":
            in_pieces(work, items)
        else:
            for item in items:
                work(item)
