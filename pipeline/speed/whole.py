"""Times a whole model from one block of each kind, so that the model is never loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pipeline.models.forward_capture import BlockCall
from pipeline.models.linears import linear_layers
from pipeline.planning.shapes.model import ModelShape
from pipeline.planning.shapes.source import example_block
from pipeline.speed.machine import Machine
from pipeline.speed.products import PATTERN, random_weight
from storage.errors import first_line
from storage.object_store import Place


@dataclass(frozen=True)
class Workload:
    """One forward: `sequences` of `seqlen` tokens each."""

    sequences: int
    seqlen: int

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return self.sequences * self.seqlen


@dataclass(frozen=True)
class ModelSpeed:
    """Seconds of a forward through all blocks and the output embedding, dense and 2:4.

    problem: why they could not be measured; None if they were.
    """

    workload: Workload
    dense: float = 0.0
    sparse: float = 0.0
    problem: str | None = None

    @property
    def speedup(self) -> float:
        """Above 1 where 2:4 is faster."""
        return self.dense / self.sparse


def workloads(seqlen: int) -> tuple[Workload, ...]:
    """One token of 1 and of 32 sequences, as in generation, and prompts of 1 and 4 sequences."""
    return Workload(1, 1), Workload(32, 1), Workload(1, seqlen), Workload(4, seqlen)


def measure_model(
    model: Place,
    shape: ModelShape,
    loads: Sequence[Workload],
    dtype: str,
    trust_remote_code: bool,
    machine: Machine,
    tell: Callable[[Workload], object],
) -> list[ModelSpeed]:
    """Times one block of each kind, dense and 2:4, and adds up the times of all blocks.

    Weights are random: only shapes matter. `tell` is called before each workload. Too little
    memory, or an error of a kernel, is the `problem` of that workload.
    """
    measured = []
    for load in loads:
        tell(load)
        try:
            dense, sparse = _head(shape, load, dtype, machine)
            for kind in range(len(shape.kinds)):
                block = _block(model, shape, kind, load, dtype, trust_remote_code, machine)
                count = shape.blocks.count(kind)
                dense, sparse = dense + count * block[0], sparse + count * block[1]
            measured.append(ModelSpeed(load, dense, sparse))
        except torch.OutOfMemoryError:
            problem = "does not fit: one block and its activations need more than this GPU has"
            measured.append(ModelSpeed(load, problem=problem))
        except (RuntimeError, ValueError, NotImplementedError) as error:
            measured.append(ModelSpeed(load, problem=f"torch refuses: {first_line(error)}"))
    return measured


@torch.no_grad()
def _head(shape: ModelShape, load: Workload, dtype: str, machine: Machine) -> tuple[float, float]:
    """Seconds of the output embedding, which is never pruned, for the last token of each sequence.

    Twice: dense and 2:4.
    """
    options = {"dtype": getattr(torch, dtype), "device": machine.device}
    inputs = torch.zeros(load.sequences, shape.hidden, **options)
    weight = torch.zeros(shape.vocabulary, shape.hidden, **options)
    seconds = machine.seconds(lambda: nn.functional.linear(inputs, weight))
    return seconds, seconds


@torch.no_grad()
def _block(
    model: Place,
    shape: ModelShape,
    kind: int,
    load: Workload,
    dtype: str,
    trust_remote_code: bool,
    machine: Machine,
) -> tuple[float, float]:
    """Seconds of one block of a kind, dense and with its pruned layers compressed."""
    block, call, hidden = example_block(
        model,
        dtype,
        load.sequences,
        load.seqlen,
        block=shape.blocks.index(kind),
        trust_remote_code=trust_remote_code,
    )
    need = sum(p.numel() * p.element_size() for p in block.parameters()) + 2 * hidden.nbytes
    if need > machine.free():
        raise torch.OutOfMemoryError
    block.to(machine.device)
    arguments, keywords = tree_map_only(
        Tensor, lambda tensor: tensor.to(machine.device), (call.arguments, call.keywords)
    )
    call, hidden = BlockCall(arguments, keywords), hidden.to(machine.device)
    dense = machine.seconds(lambda: call.run(block, hidden))
    compress_layers(block, machine)
    return dense, machine.seconds(lambda: call.run(block, hidden))


def compress_layers(block: nn.Module, machine: Machine) -> None:
    """Gives all layers of a block that would be pruned, also in experts, a compressed 2:4 weight.

    Each becomes an nn.Linear. Other classes multiply by a transposed weight, for which there is no
    2:4 product.
    """
    for name, (rows, columns) in linear_layers(block).items():
        if columns % PATTERN.group:
            continue  # a job leaves it dense, too
        module = block.get_submodule(name)
        weight = random_weight(rows, columns, module.weight.dtype, machine.device)  # type: ignore[arg-type]
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(machine.compress(weight), requires_grad=False)
        linear.bias = module.bias  # type: ignore[assignment]
        block.set_submodule(name, linear)
