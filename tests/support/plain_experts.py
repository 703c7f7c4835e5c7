"""The job of prox24 on a mixture of experts by the plainest means: the oracle of tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.solver import SolverSettings
from pipeline.solvers.registry import solver_for
from pipeline.solvers.types import Statistics
from tests.support.moe_models import EXPERTS, expert_matrices, stacked_experts


@torch.no_grad()
def prune_experts_in_memory(
    model: nn.Module,
    tokens: Tensor,
    *,
    blocks: str = "model.layers",
    together: bool = False,
    dense: tuple[str, ...] = (),
    counted: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The parameters pruned by sparsegpt, and each expert's matrices' tokens.

    Every block's statistics are taken with the blocks before it pruned, itself dense. blocks: path
    of their list. together: whether gate and up of an expert are one matrix.
    dense: endings of the paths of linears that are left alone.
    counted: (nsamples, seqlen) bool, the tokens whose statistics are taken; None: all.
    """
    wanted = torch.ones(tokens.numel(), dtype=torch.bool) if counted is None else counted.flatten()
    solver = solver_for(SolverSettings(method="sparsegpt").resolved())
    counts: dict[str, int] = {}
    layers: Any = model.get_submodule(blocks)
    for number, block in enumerate(layers):
        linears = {
            path: module
            for path, module in block.named_modules()
            if isinstance(module, nn.Linear)
            and module.out_features > 1
            and "router" not in path
            and not (dense and path.endswith(dense))
        }
        experts = stacked_experts(block)
        seen: dict[str, tuple[Any, ...]] = {}
        handles = [
            module.register_forward_pre_hook(_note(seen, path))
            for path, module in (linears | experts).items()
        ]
        model(input_ids=tokens, use_cache=False)
        for handle in handles:
            handle.remove()
        jobs = [
            (module.weight, seen[path][0].flatten(0, -2)[wanted])
            for path, module in linears.items()
        ]
        for path, module in experts.items():
            for name, matrix, inputs in inputs_of(module, seen[path], together, wanted):
                counts[f"{blocks}.{number}.{path}.{name}"] = len(inputs)
                jobs.append((matrix, inputs))
        solved = [
            solver.solve(weight.clone(), solver.prepare(statistics_of(inputs, len(tokens)))).weight
            for weight, inputs in jobs
        ]
        for (weight, _), pruned in zip(jobs, solved, strict=True):
            weight.copy_(pruned)
    return dict(model.named_parameters()), counts


def _note(seen: dict[str, tuple[Any, ...]], path: str) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen[path] = args

    return hook


def inputs_of(
    module: Any, called: tuple[Any, ...], together: bool, wanted: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, matrix and the inputs of its expert's own tokens, of those that are `wanted`, (T,)."""
    matrices = expert_matrices(module, together=together)
    for number, own in enumerate(own_inputs(wanted, *called)):
        down = matrices[f"{number}.down_proj"]
        if together:
            first = matrices[f"{number}.gate_up_proj"]
            yield f"{number}.gate_up_proj", first, own
            yield f"{number}.down_proj", down, gated(module, number, own @ first.T)
            continue
        if f"{number}.gate_proj" not in matrices:
            up = matrices[f"{number}.up_proj"]
            yield f"{number}.up_proj", up, own
            yield f"{number}.down_proj", down, module.act_fn(own @ up.T)
            continue
        gate, up = (matrices[f"{number}.{kind}_proj"] for kind in ("gate", "up"))
        yield f"{number}.gate_proj", gate, own
        yield f"{number}.up_proj", up, own
        yield f"{number}.down_proj", down, module.act_fn(own @ gate.T) * (own @ up.T)


def own_inputs(
    wanted: Tensor, states: Tensor, chosen: Tensor | None = None, weights: Tensor | None = None
) -> Iterable[Tensor]:
    """Each expert's own rows of what its block's experts are called with, of those `wanted`, (T,).

    Llama 4's are called with all tokens for each of them, those of others multiplied by zero.
    """
    if chosen is None:
        for rows in states.view(EXPERTS, -1, states.shape[-1]):
            yield rows[(rows != 0).any(dim=1) & wanted]
        return
    for number in range(EXPERTS):
        yield states[(chosen == number).any(dim=1) & wanted]


def gated(module: Any, number: int, first: Tensor) -> Tensor:
    """The last matrix's input, of the first one's output."""
    if hasattr(module, "gate_up_proj_bias"):
        gate, up = (first + module.gate_up_proj_bias[number]).unflatten(-1, (-1, 2)).unbind(-1)
        gate, up = gate.clamp(max=module.limit), up.clamp(-module.limit, module.limit)
        return (up + 1) * gate * torch.sigmoid(gate * module.alpha)
    gate, up = first.chunk(2, dim=-1)
    inner: Tensor = module.act_fn(gate) * up
    return inner


def statistics_of(inputs: Tensor, sequences: int) -> Statistics:
    """The second moments of a layer's inputs, in one product."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    return Statistics(
        columns=rows.shape[1], tokens=len(rows), sequences=sequences, hessian=rows.T @ rows
    )
