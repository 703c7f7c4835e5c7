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
    exchange: bool = False,
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
        data, source = (tokens, before, target), dense if exchange else None
        outcome.append(_train(model, number, trained, data, steps, epochs, share, source))
    return outcome


class _Trained:
    """A parameter of the model: what it is trained from, and what of it the model sees."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        self.weight, self.master = weight, torch.nn.Parameter(weight.detach().clone())
        self.mask = (weight.detach() != 0) | (weight.dim() == 1)
        self.size = float(weight.detach()[self.mask].square().mean().sqrt())
        self.scale: Tensor | None = None
        weight.requires_grad_(True)

    def exchange(self, dense: Tensor, scale: Tensor) -> None:
        """Begins an exchange of 2:4: pruned weights are the dense ones, below 0.9 of the kept."""
        self.scale, four = scale, (len(dense), -1, 4)
        sizes = (self.master.detach() * scale).abs()
        least = sizes.masked_fill(~self.mask, torch.inf).view(four).min(dim=2, keepdim=True)[0]
        hidden = ((dense * scale).view(four).clamp(-0.9 * least, 0.9 * least)).view_as(dense)
        self.master.data = torch.where(self.mask, self.master.data, hidden / scale)

    def choose(self) -> None:
        """The two largest of four, where a kept weight counts 1.3-fold."""
        assert self.scale is not None
        sizes = (self.master.detach() * self.scale).abs() * torch.where(self.mask, 1.3, 1.0)
        order = sizes.view(-1, 4).argsort(dim=1, descending=True)
        mask = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :2], True)
        self.mask = mask.view_as(self.mask)

    def show(self) -> None:
        """Gives the model what it sees."""
        self.weight.data.copy_(self.master.data * self.mask)


def _train(
    model: torch.nn.Module,
    number: int,
    names: Sequence[str],
    data: tuple[Tensor, Tensor, Tensor],
    steps: Sequence[Sequence[int]],
    epochs: int,
    share: float,
    dense: torch.nn.Module | None,
) -> tuple[float, float]:
    """dense: the model before pruning, with an exchange."""
    tokens, inputs, target = data
    trained = {name: _Trained(model.get_parameter(name)) for name in names}
    groups = [{"params": [each.master], "lr": share * each.size} for each in trained.values()]
    if dense is not None:
        scales = _input_scales(model, number, tokens, inputs)
        for name, scale in scales.items():
            trained[name].exchange(dense.get_parameter(name).detach(), scale)
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
    kept = [each.weight.detach().clone() for each in trained.values()]
    for position, step in enumerate(steps):
        free = position < 0.6 * len(steps)
        if not free and position - 1 < 0.6 * len(steps):
            for each in (each for each in trained.values() if each.scale is not None):
                each.choose()  # for the last time
                each.show()
        model.zero_grad()
        with torch.enable_grad():
            torch.stack([loss(sequence) for sequence in step]).mean().backward()
        before = {}
        for name, each in trained.items():
            every = free and each.scale is not None
            each.master.grad = each.weight.grad * (
                torch.ones_like(each.mask) if every else each.mask
            )
            before[name] = each.master.detach().clone()
        optimizer.step()
        decay.step()
        for name, each in trained.items():
            if free and each.scale is not None:  # pruned ones at a quarter of the rate
                moved = each.master.data - before[name]
                each.master.data = before[name] + torch.where(each.mask, moved, moved / 4)
                if position % 2:
                    each.choose()
            each.show()
        if (position + 1) % (len(steps) // epochs) == 0 and (now := judge()) <= lowest:
            lowest, kept = now, [each.weight.detach().clone() for each in trained.values()]
    with torch.no_grad():
        for each, value in zip(trained.values(), kept, strict=True):
            each.weight.copy_(value)
            each.weight.requires_grad_(False)
    return first, lowest


@torch.no_grad()
def _input_scales(
    model: torch.nn.Module, number: int, tokens: Tensor, inputs: Tensor
) -> dict[str, Tensor]:
    """The root mean square of each input of a block's linears, by the name of the weight."""
    found: dict[str, Tensor] = {}
    prefix = f"model.layers.{number}."
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: found.__setitem__(
                f"{prefix}{name}.weight", args[0].flatten(0, 1).square().mean(dim=0).sqrt()
            )
        )
        for name, module in model.get_submodule(prefix[:-1]).named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    _through(model, number, tokens, inputs)
    for hook in hooks:
        hook.remove()
    return found


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
