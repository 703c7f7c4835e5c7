"""One rank's part in the reconstruction of one block, from its first step to its last.

The block is whole on every rank, and every rank computes the gradients of its own sequences. Rows
of the layers are owned: their exact weights and Adam's moments are on one rank alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pipeline.models.linears import as_held
from pipeline.reconstruct.adam import RowAdam, first_rate
from pipeline.reconstruct.gradients import Run, gradients, squared_error
from pipeline.reconstruct.schedule import held_out, rate, steps_in_epoch, steps_of_epoch
from pipeline.runtime.stopwatch import Stopwatch
from pipeline.runtime.threads import in_pieces, threads
from pipeline.worker.training.exchange import Exchange, Rows, summed, to_all, to_owners

T = TypeVar("T")

Sequences = Mapping[int, Callable[[], tuple[Tensor, Tensor, Tensor | None]]]
"""Number of each of the rank's sequences -> what reads it: the block's input and the target,
(1, seqlen, hidden), both to be changed at will, and the counted tokens (1, seqlen), None: all."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What decides the steps, the same on every rank.

    nsamples: calibration sequences. batch: of a step. epochs: at most. learning_rate: relative, see
    `first_rate`. seed: of the order.
    """

    nsamples: int
    batch: int
    epochs: int
    learning_rate: float
    seed: int

    @property
    def steps(self) -> int:
        """Steps of all epochs."""
        return self.epochs * steps_in_epoch(self.nsamples, self.batch)


class RankTraining:
    """Trains the kept weights of layers of a block.

    block: the pruned block, on the device. run: its forward. layers: layer -> the dtype in which
    its weight is stored, of the layers to train. A forward always sees weights as stored.
    """

    def __init__(
        self,
        block: nn.Module,
        run: Run,
        layers: Mapping[str, torch.dtype],
        sequences: Sequences,
        plan: TrainingPlan,
        rows: tuple[int, int],
        collective: Exchange | None,
        watch: Stopwatch,
    ) -> None:
        self._modules: dict[str, Any] = {layer: block.get_submodule(layer) for layer in layers}
        self._run, self._sequences, self._plan = run, sequences, plan
        self._collective, self._watch = collective, watch
        weights = {layer: self._weight(layer) for layer in layers}
        shapes = {layer: (weight.shape[0], weight.shape[1]) for layer, weight in weights.items()}
        self.rows = Rows(shapes, dict(layers), *rows)
        self._owned: dict[str, RowAdam] = {}
        self.best: dict[str, Tensor] = {}
        for layer, weight in weights.items():
            own = weight[self.rows.of(layer)]
            kept = weight != 0
            squares = float(weight.double().square().sum())
            first = first_rate(squares, int(kept.sum()), plan.learning_rate)
            self._owned[layer] = RowAdam(own, kept[self.rows.of(layer)], first)
            self.best[layer] = own.to(layers[layer])
            self._modules[layer].weight.requires_grad_(True)
        self._done = 0
        self.losses = [self.judge()]

    def epoch(self, number: int) -> tuple[float, float]:
        """Runs an epoch; the mean loss of its sequences, each before its step, and the held-out's.

        Either is not finite where a loss or a gradient was not.
        """
        plan, total, count = self._plan, 0.0, 0
        for batch in steps_of_epoch(plan.nsamples, plan.batch, number, plan.seed):
            losses = self._step(batch)
            total, count = total + sum(losses), count + len(losses)
            if not math.isfinite(total):
                break
        self.losses.append(self.judge() if math.isfinite(total) else math.nan)
        if self.losses[-1] <= min(self.losses[:-1]):
            self.best = self._stored()
        return total / max(count, 1), self.losses[-1]

    def judge(self) -> float:
        """The mean loss of the held-out sequences of all ranks."""
        numbers = held_out(self._plan.nsamples)

        def loss(number: int) -> float:
            with torch.no_grad():
                inputs, target, counted = self._sequences[number]()
                return float(squared_error(self._run(inputs), target, counted))

        with self._watch("forward"):
            found = self._each(loss, [n for n in numbers if n in self._sequences])
        losses = [found.get(number, 0.0) for number in numbers]
        return float(self._sum(losses).mean())

    # -- parts of these ---------------------------------------------------------------------

    def _step(self, batch: Sequence[int]) -> list[float]:
        """One step on all ranks; the losses of its sequences, of all ranks."""
        weights = [self._modules[layer].weight for layer in self.rows.shapes]
        sums = {
            layer: torch.zeros(shape, dtype=torch.float64, device=self._watch.device)
            for layer, shape in self.rows.shapes.items()
        }

        def learn(number: int) -> tuple[float, list[Tensor]]:
            loss, found = gradients(self._run, weights, *self._sequences[number]())
            return float(loss), found

        mine: dict[int, float] = {}
        with self._watch("train"):
            # A sequence each: the gradients do not depend on who computes the others.
            for some in _in_chunks([n for n in batch if n in self._sequences], threads()):
                found = self._each(learn, some)
                for number in some:
                    mine[number], gradients_of = found[number]
                    for layer, gradient in zip(sums, gradients_of, strict=True):
                        sums[layer] += as_held(self._modules[layer], gradient)
        losses = self._sum([mine.get(number, 0.0) for number in batch]).tolist()
        with self._watch("reduce"):
            own = to_owners(sums, self.rows, self._collective)
        factor = rate(self._done, self._plan.steps)
        self._done += 1
        if not math.isfinite(sum(losses)):
            return losses
        with self._watch("train"):
            for layer, state in self._owned.items():
                state.step(own[layer].div_(len(batch)), factor)
            stored = self._stored()
        with self._watch("reduce"):
            everywhere = to_all(stored, self.rows, self._collective)
        for layer, parts in everywhere.items():
            weight = self._weight(layer)
            for rows, values in parts:
                weight[rows] = values.to(weight.dtype)
        return losses

    def _stored(self) -> dict[str, Tensor]:
        """The rows that this rank owns, as they would be stored now."""
        return {
            layer: state.weight.to(self.rows.dtypes[layer], copy=True)
            for layer, state in self._owned.items()
        }

    def _weight(self, layer: str) -> Tensor:
        """A layer's weight (R, C) in the block: a view."""
        module = self._modules[layer]
        return as_held(module, module.weight.detach())

    def _sum(self, losses: Sequence[float]) -> Tensor:
        return summed(losses, self._collective, self._watch.device)

    def _each(self, work: Callable[[int], T], numbers: Sequence[int]) -> dict[int, T]:
        """`work` for each of these sequences, several at a time on a CPU."""
        found: dict[int, T] = {}

        def one(number: int) -> None:
            found[number] = work(number)

        if self._watch.device.type == "cpu":
            in_pieces(one, numbers)
        else:
            for number in numbers:
                one(number)
        return found


def _in_chunks(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]
