"""The job of prox24 by the plainest means: the oracle of tests, independent of blocks and files.

The whole model in memory and run in one batch for every block, hooks on all its linears,
every layer by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.solver import SolverSettings
from pipeline.solvers.objective import objective
from pipeline.solvers.registry import solver_for
from pipeline.solvers.types import Statistics
from pipeline.text.tokenizer import load_tokenizer
from tests.support.jobs import SMALL
from tests.support.texts import calibration_ids


def job_tokens(source: Path, text: Path) -> Tensor:
    """The calibration sequences of a small job on a text, (nsamples, seqlen)."""
    tokenizer = load_tokenizer(source)
    return calibration_ids(tokenizer, str(text), None, SMALL["nsamples"], SMALL["seqlen"], 0)


def inputs_of(modules: dict[str, torch.nn.Module], forward: Callable[[], Any]) -> dict[str, Tensor]:
    """What each module is called with in one forward."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name, module in modules.items()
    ]
    forward()
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def prune_in_memory(
    model: torch.nn.Module,
    tokens: Tensor,
    blocks: Sequence[Sequence[str]],
    settings: SolverSettings | Mapping[str, SolverSettings],
    transposed: bool = False,
    counted: Tensor | None = None,
) -> list[float]:
    """Prunes a model in place; returns each layer's relative error in per cent.

    blocks: of each block the names of its linears, in the order in which blocks are run.
    settings: of all, or of each by name. transposed: whether the linears hold their weights as
    (C, R). counted: (nsamples, seqlen) bool, the tokens whose statistics are taken; None: all.
    """
    counted = torch.ones_like(tokens, dtype=torch.bool) if counted is None else counted
    errors = []
    for names in blocks:
        own = {name: model.get_submodule(name) for name in names}
        seen = inputs_of(own, lambda: model(input_ids=tokens, use_cache=False))
        for name, module in own.items():
            solver = solver_for(settings[name] if isinstance(settings, Mapping) else settings)
            x = seen[name].flatten(0, -2).float()
            size = SMALL["batch_size"] * SMALL["seqlen"]
            chosen = counted.flatten().split(size)
            batches = [part[own] for part, own in zip(x.split(size), chosen, strict=True)]
            hessian = torch.stack([(part.T @ part).double() for part in batches]).sum(dim=0).float()
            statistics = Statistics(
                columns=x.shape[1],
                tokens=int(counted.sum()),
                sequences=int(counted.any(dim=1).sum()),
                diagonal=hessian.diagonal().clone(),
                hessian=hessian,
            )
            held = module.weight.detach().clone()
            weight = held.T.contiguous() if transposed else held
            pruned = solver.solve(weight, solver.prepare(statistics)).weight.to(weight.dtype)
            lost = objective(pruned, weight, statistics).sum()
            zero = objective(torch.zeros_like(weight), weight, statistics).sum()
            errors.append(float(100 * lost / zero))
            module.weight.copy_(pruned.T if transposed else pruned)
    return errors
