"""What each weight of a block is for: pruned, left dense with a reason, or not to be had.

Roles come from what weights do, not from their names. A router is what the choice of experts is
computed with, seen in a forward without data; a norm or a bias is small; a depthwise convolution
mixes no channels. What is large and is multiplied as a matrix, but is no linear layer, cannot be
pruned, and the model is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.models.experts import Expert, Experts
from pipeline.models.roles.weight_flow import Flow, Use, follow, hollow

ROUTER = "it chooses the experts of a token"
SHARED_GATE = "it weighs the shared expert"
DEPTHWISE = "a depthwise convolution: it mixes no channels"
SMALL = "a small parameter outside linear layers"
ELEMENTWISE = "no matrix product uses it"
NEVER_CALLED = "the block uses its weight but never calls the layer, so its inputs are not seen"

LINEAR_CLASSES: tuple[Any, ...] = (nn.Linear, Conv1D)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_KEPT = "_prox24_roles"


@dataclass
class Roles:
    """Of a block, by path. layers: linear layers that stay dense, and why. parameters: what else
    of two or more dimensions stays dense, and why. refused: what cannot be pruned nor left dense
    unseen, and what it does."""

    layers: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def roles_of(block: nn.Module) -> Roles:
    """The roles of a block's weights; looked at once, and kept with the block and its copies."""
    roles = getattr(block, _KEPT, None)
    if not isinstance(roles, Roles):
        roles = _look(block)
        setattr(block, _KEPT, roles)
    return roles


def _look(block: nn.Module) -> Roles:
    roles = Roles()
    routing = _routing(block, roles)
    _refuse_lists(block, roles)
    for path, module in block.named_modules():
        if isinstance(module, Expert):
            continue
        unknown = {}
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            reason = routing.get(full)
            if reason is not None and isinstance(module, LINEAR_CLASSES):
                if name == "weight":
                    roles.layers[path] = reason
            elif parameter.dim() < 2 or isinstance(module, LINEAR_CLASSES):
                continue
            elif reason is not None:
                roles.parameters[full] = reason
            else:
                unknown[name] = parameter
        if unknown:
            _sort_out(block, path, module, unknown, roles)
    return roles


# -- mixtures of experts -------------------------------------------------------------------------


def _routing(block: nn.Module, roles: Roles) -> dict[str, str]:
    """Parameter -> why it stays dense, of what decides how much of which expert a token gets."""
    found: dict[str, str] = {}
    for path, owner in block.named_modules():
        if isinstance(owner, Expert):
            continue
        experts = [child for child in owner.children() if isinstance(child, Experts)]
        for each in experts:
            chosen = _choosing(owner, each) or _beside(owner, each)
            prefix = f"{path}." if path else ""
            if not chosen:
                roles.refused[f"{prefix}experts"] = (
                    "is a mixture of experts in which prox24 cannot tell what chooses the experts"
                )
            found |= dict.fromkeys((prefix + name for name in chosen), ROUTER)
            if owner is not block:
                for name, parameter in _besides(owner):
                    one = parameter.dim() == 2 and parameter.shape[0] == 1 < parameter.shape[1]
                    if one and name.endswith("weight"):
                        found.setdefault(prefix + name, SHARED_GATE)
    return found


class _Recorder(nn.Module):
    """Stands for `Experts` in a forward without data: notes where its arguments come from."""

    def __init__(self) -> None:
        super().__init__()
        self.flow: Flow | None = None
        self.chosen: set[str] = set()

    def forward(self, hidden_states: Tensor, *choice: Any, **named: Any) -> Tensor:
        assert self.flow is not None
        # What the experts' inputs were computed with does more than choose.
        self.chosen |= self.flow.of((choice, named)) - self.flow.of(hidden_states)
        return hidden_states.new_zeros(hidden_states.shape)


def _choosing(owner: nn.Module, experts: Experts) -> set[str]:
    """Parameters of `owner` that the experts of a token are chosen and weighed with.

    Empty where its forward cannot be run by itself.
    """
    first = next(next(iter(experts)).children())
    widths = [int(first.weight.shape[1])]  # type: ignore[index]
    widths += [int(parameter.shape[-1]) for _, parameter in _besides(owner) if parameter.dim() == 2]
    for width in dict.fromkeys(widths):
        recorder = _Recorder()
        copied = hollow(owner, {id(experts): recorder})
        use = Use()
        recorder.flow = Flow(copied, use)
        follow(copied, width, use, flow=recorder.flow)
        if recorder.chosen:
            return recorder.chosen
    return set()


def _beside(owner: nn.Module, experts: Experts) -> set[str]:
    """Parameters of the module beside the experts whose only matrices have a row for each.

    Of several such modules those count whose names say so.
    """
    found: dict[str, set[str]] = {}
    for name, child in owner.named_children():
        matrices = [p for p in child.parameters() if p.dim() >= 2]
        if child is not experts and matrices and all(p.shape[0] == experts.count for p in matrices):
            found[name] = {f"{name}.{inner}" for inner, _ in child.named_parameters()}
    if len(found) > 1:
        found = {name: own for name, own in found.items() if "router" in name or "gate" in name}
    return set().union(*found.values())


def _refuse_lists(block: nn.Module, roles: Roles) -> None:
    """Refuses experts that are a list of modules: not all are called in every forward.

    A list counts as one of experts where a layer beside it has an output for each of its entries,
    or where it is called so.
    """
    for path, owner in block.named_modules():
        for name, entries in owner.named_children():
            if not isinstance(entries, (nn.ModuleList, nn.ModuleDict)) or len(entries) < 2:
                continue
            inside = {id(parameter) for parameter in entries.parameters()}
            beside = (p for p in owner.parameters() if id(p) not in inside and p.dim() == 2)
            linears = [m for m in entries.modules() if isinstance(m, LINEAR_CLASSES)]
            chosen = any(len(entries) in parameter.shape for parameter in beside)
            if linears and (chosen or name == "experts"):
                roles.refused[f"{path}.{name}".lstrip(".")] = (
                    "is a list of modules that only some tokens reach; prox24 prunes experts that "
                    "are stacked, as transformers 5 has them"
                )


def _besides(owner: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a mixture that are not its experts', by path."""
    yield from owner.named_parameters(recurse=False)
    for path, child in owner.named_children():
        if not isinstance(child, Experts):
            for name, parameter in child.named_parameters():
                yield f"{path}.{name}", parameter


# -- what is no linear layer ---------------------------------------------------------------------


def _sort_out(
    block: nn.Module, path: str, module: nn.Module, unknown: dict[str, nn.Parameter], roles: Roles
) -> None:
    """Roles of the parameters `unknown` of one module of a block, and of linears inside it that
    are used without being called."""
    use = Use()
    convolution = isinstance(module, _CONVOLUTIONS)
    owner_path, owner = path, module
    if convolution:  # the mixer around it tells which of its linears are called
        owner_path = path.rpartition(".")[0]
        owner = block.get_submodule(owner_path)
    if not isinstance(owner, nn.ModuleList) and owner is not block:
        use = _used(owner)
    prefix = f"{owner_path}." if owner_path else ""
    for name, child in owner.named_modules():
        uncalled = f"{name}.weight" in use.products and name not in use.called
        if uncalled and isinstance(child, LINEAR_CLASSES):
            roles.layers.setdefault(prefix + name, NEVER_CALLED)
    for name, parameter in unknown.items():
        full = f"{path}.{name}".lstrip(".")
        dense, does = _judge(module, name, parameter, use, _widest(block))
        if dense is not None:
            roles.parameters[full] = dense
        else:
            shape = " × ".join(map(str, parameter.shape))
            roles.refused[full] = f"({shape}, {parameter.numel():,} weights) {does}"


def _judge(
    module: nn.Module, name: str, parameter: Tensor, use: Use, widest: int
) -> tuple[str | None, str]:
    """Why a parameter stays dense, or None and what it does."""
    if isinstance(module, _CONVOLUTIONS):
        if module.groups == module.in_channels:
            return DEPTHWISE, ""
        return None, "is a convolution that mixes channels, which prox24 cannot prune"
    if parameter.numel() <= widest:  # as many as a vector of the block has
        return SMALL, ""
    if isinstance(module, nn.RNNBase):
        return None, "is a recurrent matrix, which prox24 cannot prune"
    if isinstance(module, nn.Embedding) or name in use.lookups:
        return None, "is a table inside a block, which prox24 cannot prune"
    if name in use.others and name not in use.products:
        return ELEMENTWISE, ""
    if name in use.products and parameter.dim() == 2:
        return None, "is multiplied as a matrix, but by no linear layer; prox24 cannot prune it"
    if parameter.dim() >= 3:
        return None, (
            "has three dimensions (a stack of experts, or of other matrices) and is computed in a "
            "way that prox24 cannot take apart"
        )
    return None, "is a weight matrix outside linear layers, which prox24 cannot prune"


def _used(module: nn.Module) -> Use:
    """What a module does with its parameters, run by itself."""
    widths = [
        int(child.weight.shape[0 if isinstance(child, Conv1D) else 1])
        for child in module.modules()
        if isinstance(child, LINEAR_CLASSES)
    ]
    widths += [int(p.shape[-1]) for p in module.parameters() if p.dim() >= 2]
    seen = Use()
    for width in dict.fromkeys(widths):
        use = follow(hollow(module, {}), width, Use())
        if use.finished:
            return use
        # What was not reached might do anything: that a use was none of a matrix is not certain.
        seen.products |= use.products
        seen.lookups |= use.lookups
        seen.called |= use.called
    return seen


def _widest(block: nn.Module) -> int:
    """The longest vector that a linear layer of a block gives or takes."""
    sizes = [max(m.weight.shape) for m in block.modules() if isinstance(m, LINEAR_CLASSES)]
    return max(map(int, sizes), default=0)
