"""Reconstruction by the plainest means: the whole model in memory, torch's Adam, one process."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.config.solver import SolverSettings
from pipeline.reconstruct.schedule import held_out, steps_of_epoch
from tests.support.plain_prune import prune_in_memory


def reconstruct_in_memory(
    model: torch.nn.Module,
    tokens: Tensor,
    blocks: Sequence[Sequence[str]],
    settings: SolverSettings,
    *,
    epochs: int,
    batch: int,
    share: float,
    seed: int,
    dense_chain: bool = True,
    norms: bool = False,
) -> list[tuple[float, float]]:
    """Prunes and reconstructs a model in place; the held-out losses of each block: before, after.

    blocks: of each block the names of its linears, in order. The rest as the options' meaning.
    """
    dense = copy.deepcopy(model)
    outcome = []
    for number, names in enumerate(blocks):
        before = _hidden(model, tokens)[number]
        prune_in_memory(model, tokens, [names], settings)
        if dense_chain:
            target = _hidden(dense, tokens)[number + 1]
        else:
            with torch.no_grad():
                target = _through(dense, number, tokens, before)
        steps = [
            step
            for epoch in range(epochs)
            for step in steps_of_epoch(len(tokens), batch, epoch, seed * 10_007 + number)
        ]
        trained = [f"{name}.weight" for name in names]
        if norms:
            block = f"model.layers.{number}."
            trained += [name for name in dict(model.named_parameters())
                        if name.startswith(block) and "norm" in name]  # fmt: skip
        outcome.append(
            _train(model, number, trained, (tokens, before, target), steps, epochs, share)
        )
    return outcome


def _train(
    model: torch.nn.Module,
    number: int,
    names: Sequence[str],
    data: tuple[Tensor, Tensor, Tensor],
    steps: Sequence[Sequence[int]],
    epochs: int,
    share: float,
) -> tuple[float, float]:
    tokens, inputs, target = data
    weights = [model.get_parameter(name) for name in names]
    masks = [(weight != 0) | (weight.dim() == 1) for weight in weights]
    groups = []
    for weight, mask in zip(weights, masks, strict=True):
        weight.requires_grad_(True)
        size = float(weight.detach()[mask].square().mean().sqrt())
        groups.append({"params": [weight], "lr": share * size})
    optimizer = torch.optim.Adam(groups, eps=1e-30)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(steps))

    def loss(sequence: int) -> Tensor:
        only = slice(sequence, sequence + 1)
        output = _through(model, number, tokens[only], inputs[only])
        each = (output - target[only]).square().sum(dim=2) / target[only].square().sum(dim=2)
        return each.mean()

    def judge() -> float:
        with torch.no_grad():
            return float(torch.stack([loss(s) for s in held_out(len(tokens))]).mean())

    first = lowest = judge()
    kept = [weight.detach().clone() for weight in weights]
    for position, step in enumerate(steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            torch.stack([loss(sequence) for sequence in step]).mean().backward()
        for weight, mask in zip(weights, masks, strict=True):
            weight.grad = weight.grad * mask
        optimizer.step()
        decay.step()
        if (position + 1) % (len(steps) // epochs) == 0 and (now := judge()) <= lowest:
            lowest, kept = now, [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)
            weight.requires_grad_(False)
    return first, lowest


@torch.no_grad()
def _hidden(model: torch.nn.Module, tokens: Tensor) -> list[Tensor]:
    """The input of each block, and the output of the last one (before the final norm)."""
    seen: list[Tensor] = []
    layers = model.model.layers
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        for layer in layers
    ]
    last: list[Tensor] = []
    hooks.append(
        layers[-1].register_forward_hook(
            lambda _, __, out: last.append(out[0] if isinstance(out, tuple) else out)
        )
    )
    model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [*seen, last[0]]


def _through(model: torch.nn.Module, number: int, tokens: Tensor, inputs: Tensor) -> Tensor:
    """The output of one block for these inputs, called as the model calls it."""
    layer = model.model.layers[number]
    positions = torch.arange(tokens.shape[1])[None]
    rotary = model.model.rotary_emb(inputs, positions)
    output = layer(inputs, attention_mask=None, position_ids=positions, position_embeddings=rotary)
    return output[0] if isinstance(output, tuple) else output
