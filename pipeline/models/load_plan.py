"""What each tensor of a model is loaded from, decided from names before any weight is read.

The rule is transformers' own (see `transformers_loading`): a stored tensor becomes a parameter or a
persistent buffer of the model, alone or by a conversion, or nothing. What becomes nothing (rotary
frequencies, causal masks and position ids that the class computes itself) is never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.models.expert_part import ExpertPart
from pipeline.models.expert_tensors import expert_names, stacked_targets, stored_together
from pipeline.models.experts import unstack_experts
from pipeline.models.transformers_loading import Route, Routes, convert, operations, tie, tied_names
from storage.errors import ModelError
from storage.model.files import ModelFiles, TensorEntry

_ROWS_BYTES = 16 * 2**20
# Places, dtypes, tensors and states of their files -> whether two tensors are the same.
_COMPARED: dict[tuple[object, ...], bool] = {}


@dataclass(frozen=True)
class Conversion:
    """How transformers makes tensors of the model from stored ones that it changes.

    targets: what is made; routes: of the first of them, which all of it is made of.
    """

    targets: tuple[str, ...]
    sources: tuple[Route, ...]
    rules: Routes

    def read(self, files: ModelFiles, model: PreTrainedModel) -> dict[str, Tensor]:
        """The tensors that are made, by name, on the CPU. Raises `ModelError` where it fails."""
        tensors = ((route, files.read(route.stored)) for route in self.sources)
        converter = self.rules.converter(self.sources[0].pattern or "")
        try:
            return convert(converter, self.targets[0], tensors, model)
        except (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{files.place}: transformers cannot make {self.targets[0]} of {self}: {error}"
            ) from error

    def __str__(self) -> str:
        stored = [route.stored for route in self.sources]
        more = f" and {len(stored) - 2} more" if len(stored) > 2 else ""
        done = operations(self.rules.converter(self.sources[0].pattern or ""))
        return f"{', '.join(stored[:2])}{more} ({done})"


@dataclass(frozen=True)
class LoadPlan:
    """Where each tensor of a model comes from.

    sources: name in the model -> stored tensor that it is, all of it, for parameters and persistent
    buffers; of tied parameters each name has the same. parts: parameter -> its part of a stored
    tensor. converted: name -> the conversion that makes it. loaded: names of all stored tensors
    that any of these need, tied ones included.
    """

    sources: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, ExpertPart] = field(default_factory=dict)
    converted: Mapping[str, Conversion] = field(default_factory=dict)
    loaded: frozenset[str] = frozenset()

    def has(self, name: str) -> bool:
        """Whether a tensor of the model, by its name, is in the weight files."""
        return name in self.sources or name in self.parts or name in self.converted

    def stored(self, name: str) -> str | None:
        """The stored tensor that a tensor of the model is, or is a part of; None if there is none.

        Nor is there one where it is made by a conversion.
        """
        return self.parts[name].tensor if name in self.parts else self.sources.get(name)


def plan_loading(model: PreTrainedModel, files: ModelFiles) -> LoadPlan:
    """The load plan of a model without weights, as transformers made it.

    Changes the model: experts that it holds together are taken apart, and parameters that are tied
    for these files become one, the others two. Two stored embeddings that ought to be tied are
    compared, which reads them; nothing else is read. Raises `ModelError` where several tensors
    claim to be the same, or where experts are stored in a layout that is not supported.
    """
    rules = Routes(model, files.tensors)
    names = set(model.state_dict())
    by_target = rules.of(names)
    expert_targets = stacked_targets(model)
    unstack_experts(model, stored_together(model, rules, files.tensors))
    experts = expert_names(model, rules, files.tensors)
    loaded = {part.tensor for part in experts.parts.values()} | set(experts.whole.values())
    sources = dict(experts.whole)
    converted: dict[str, Conversion] = {}
    for target, routes in by_target.items():
        if target in expert_targets:
            continue
        if routes[0].pattern is None:
            # Of several the first is taken: transformers overlooks the others.
            sources[target] = routes[0].stored
            loaded.add(routes[0].stored)
            continue
        if any(route.pattern is None for route in routes):
            raise ModelError(
                f"{files.place}: {', '.join(r.stored for r in routes[:3])} would all become "
                f"{target}; remove the tensors that are not the model's"
            )
        conversion = Conversion(rules.targets(routes[0]), tuple(routes), rules)
        converted |= dict.fromkeys(conversion.targets, conversion)
        loaded |= {route.stored for route in routes}
    missing = names - sources.keys() - converted.keys() - expert_targets
    _resolve_ties(model, files, sources, missing)
    return LoadPlan(sources, experts.parts, converted, frozenset(loaded))


def _resolve_ties(
    model: PreTrainedModel, files: ModelFiles, sources: dict[str, str], missing: set[str]
) -> None:
    """Ties what transformers would tie for these files, and gives each such name its source."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # One of two equal tensors is as good as missing: then it is tied to the other.
    equal = {
        target
        for target, source in tied_names(model).items()
        if target in sources
        and source in sources
        and same_values(files, sources[target], sources[source], parameters[target].dtype)
    }
    tie(model, missing | equal)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for names in owners.values():
        taken = next((n for n in names if n in sources and n not in equal), None)
        if taken is not None:
            sources |= dict.fromkeys(names, sources[taken])


def same_values(files: ModelFiles, one: str, other: str, dtype: torch.dtype) -> bool:
    """Whether two stored tensors hold the same values in `dtype`; some rows are read at a time.

    A process compares two tensors once, unless someone writes to their files.
    """
    entries = [files.entry(name) for name in (one, other)]
    key = (str(files.place), dtype, *((entry, files.state(entry.name)) for entry in entries))
    if key not in _COMPARED:
        _COMPARED[key] = _compare(files, entries[0], entries[1], dtype)
    return _COMPARED[key]


def _compare(files: ModelFiles, one: TensorEntry, other: TensorEntry, dtype: torch.dtype) -> bool:
    if one.shape != other.shape or not one.shape:
        return False
    rows = one.shape[0]
    step = max(1, _ROWS_BYTES * rows // max(1, one.end - one.start))
    for start in range(0, rows, step):
        part = (start, min(start + step, rows))
        first, second = (files.read(entry.name, rows=part).to(dtype) for entry in (one, other))
        if not torch.equal(first, second):
            return False
    return True
