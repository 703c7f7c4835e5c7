"""The parts of phases that run blocks over the calibration data, for the busiest worker."""

from __future__ import annotations

from pipeline.planning.counts import hessian_flops, observing_operators
from pipeline.planning.memory import sums_products
from pipeline.planning.parts.phase_parts import BANDWIDTH, COMPUTE, HOST, LATENCY, PhasePart
from pipeline.planning.planned_job import PlannedJob
from pipeline.planning.shapes.model import BlockShape
from pipeline.planning.shapes.profile import ForwardProfile
from pipeline.solvers.registry import solver_for

# Operators around the blocks while a rank finds what blocks are called with: masks, rotary tables,
# their comparison for two texts. Counted for Llama (benchmarks/gpu_counts.py).
_CAPTURING = 45
# Operators that look for NaN in the output of a block.
_CHECKING = 5


class PassParts:
    """The parts of one job's passes."""

    def __init__(self, job: PlannedJob) -> None:
        self.job, self.rates, self.shape = job, job.rates, job.shape
        plain = job.rates.on_gpu and self.shape.dtype == "float32"
        # The rate at which the products of statistics are computed.
        self.precision = "float32" if plain else "statistics"

    def forward(self, profile: ForwardProfile, what: str) -> list[PhasePart]:
        """The forward of all batches of the busiest worker through one block."""
        sequences, batches, _ = self.job.busiest
        return self._batches(profile, what, sequences, batches)

    def finding(self, block: BlockShape) -> list[PhasePart]:
        """A batch, in which a rank finds the groups of layers and what blocks are called with."""
        job, what = self.job, "find groups"
        batch = float(job.largest_batch * job.seqlen * self.shape.hidden)
        size = batch * self.shape.forward_itemsize if self.rates.on_gpu else 0.0
        return [
            PhasePart("read store", HOST, size / self.rates.copy),
            *self._batches(block.full, what, job.largest_batch, 1),
            PhasePart(f"{what}: operators", LATENCY, _CAPTURING * self.rates.operator),
        ]

    def _batches(
        self, profile: ForwardProfile, what: str, sequences: int, batches: int
    ) -> list[PhasePart]:
        """The forward of some sequences through one block, in some batches."""
        rates = self.rates
        flops = profile.products / rates.product(self.shape.dtype)
        return [
            PhasePart(f"{what}: products", COMPUTE, sequences * flops),
            PhasePart(
                f"{what}: attention", COMPUTE, sequences * profile.attention / rates.attention
            ),
            PhasePart(f"{what}: elementwise", BANDWIDTH, sequences * profile.moved / rates.memory),
            PhasePart(f"{what}: operators", LATENCY, batches * profile.operators * rates.operator),
        ]

    def checked(self) -> list[PhasePart]:
        """The check of a block's outputs for NaN: operators on their magnitudes and on masks."""
        sequences, batches, _ = self.job.busiest
        entries = float(sequences * self.job.seqlen * self.shape.hidden)
        moved = entries * (5 * self.shape.forward_itemsize + 6)
        return [
            PhasePart("check outputs", BANDWIDTH, moved / self.rates.memory),
            PhasePart("check outputs", LATENCY, batches * _CHECKING * self.rates.operator),
        ]

    def hessian(self, block: BlockShape) -> list[PhasePart]:
        """The sums of second moments of the busiest worker in one block."""
        job, rates = self.job, self.rates
        batches = job.busiest[1]
        flops, moved, operators = 0.0, 0.0, 0.0
        for group in block.groups:
            seen = job.busiest_tokens(group)
            operators += observing_operators(group.columns, batches, sums_products(job, group))
            moved += seen * group.columns * (self.shape.forward_itemsize + 4)
            if sums_products(job, group):
                flops += hessian_flops(seen, group.columns)
                # Products read, float64 sums read and written; upper triangles only.
                once = 11.25 * batches + 4.5  # zeros to begin with
                moved += once * group.columns**2 if rates.on_gpu else 0.0
            elif solver_for(job.settings_of(group)).needs != "full":
                moved += 12.0 * seen * group.columns
        return [
            PhasePart("Hessian", COMPUTE, flops / rates.product(self.precision)),
            PhasePart("Hessian: copies", BANDWIDTH, moved / rates.memory),
            PhasePart("Hessian: operators", LATENCY, operators * rates.operator),
        ]
