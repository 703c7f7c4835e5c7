"""The cost of the forward of one sequence through a block, counted on the meta device.

The code of the block runs on tensors without data, and every operator is recorded with its shapes.
So this works for any architecture that runs on the meta device, and allocates nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from pipeline.models.forward_capture import BlockCall
from storage.errors import ModelError

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class ForwardProfile:
    """The forward of one sequence through one block.

    products, attention: floating-point operations of matrix products and of attention (causal
    attention counts only the half that is not masked). moved: bytes that all other operators read
    and write. operators: number of operators, products and attention included. live: the most bytes
    of intermediate results at once, without the input; in an observed forward with the fp32 copy of
    a layer's input, from which statistics are computed. saved: bytes that a backward needs.
    """

    products: float = 0.0
    attention: float = 0.0
    moved: float = 0.0
    operators: int = 0
    live: int = 0
    saved: int = 0


class _AllObserved(Exception):
    """Ends an observed forward at the input of the last group."""


class _Attention(TorchFunctionMode):
    """Counts scaled dot product attention as one operator.

    On the meta device it would run as several, with a matrix of scores that no real kernel stores.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.operators = 0.0, 0
        self.given = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            given = dict(zip(names, args, strict=False)) | kwargs
            query, key, value = given["query"], given["key"], given["value"]
            scores = query.shape[:-1].numel() * key.shape[-2]
            share = 0.5 if given.get("is_causal") else 1.0
            # What its own backward needs: what it was given, and what it gives.
            self.given += sum(_bytes(each) for each in (query, key, value, query))
            self.operators += 1
            self.flops += 2.0 * share * scores * (query.shape[-1] + value.shape[-1])
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **kwargs)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums what operators compute, read and write, and tracks the bytes of live tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products, self.moved, self.operators = 0.0, 0.0, 0
        self.live = self.peak = 0
        self._known: set[int] = set()

    def known(self, tensors: Iterable[Tensor]) -> None:
        """Excludes tensors that exist before the forward (weights, inputs) from the live bytes."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        fresh = [t for t in outputs if t.untyped_storage()._cdata not in storages]
        for tensor in fresh:
            self._follow(tensor)
        if not fresh and not func._schema.is_mutable:
            return output  # a view
        packet = func._overloadpacket
        if "empty" in str(packet):
            return output
        self.operators += 1
        if packet in flop_registry:
            self.products += flop_registry[packet](*args, **(kwargs or {}), out_val=output)
        else:
            self.moved += sum(_bytes(tensor) for tensor in (*inputs, *outputs))
        return output

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _bytes(tensor: Tensor) -> int:
    """Bytes that reading a tensor moves; an expanded dimension is read once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


def on_meta(call: BlockCall) -> BlockCall:
    """The same arguments with tensors on the meta device."""
    arguments, keywords = tree_map_only(
        Tensor, lambda tensor: tensor.to(META), (call.arguments, call.keywords)
    )
    return replace(call, arguments=arguments, keywords=keywords)


def find_groups_on_meta(
    block: nn.Module, call: BlockCall, hidden_states: Tensor, layers: Iterable[str]
) -> tuple[tuple[str, ...], ...]:
    """Layers of a block, grouped by the input that they share, as `find_groups` does with data.

    Raises `ModelError` for a layer that the forward of the block never calls.
    """
    seen: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    hooks = {
        layer: lambda _, args, kwargs, layer=layer: seen[layer].append(
            args[0] if args else kwargs["input"]
        )
        for layer in seen
    }
    with torch.no_grad():
        _run(block, call, hidden_states, hooks)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for layer, inputs in seen.items():
        if not inputs:
            raise ModelError(f"{layer} is a linear layer that its block's forward never calls")
        key = tuple(
            (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()) for x in inputs
        )
        groups.setdefault(key, []).append(layer)
    return tuple(map(tuple, groups.values()))


def profile_forward(
    block: nn.Module,
    call: BlockCall,
    hidden_states: Tensor,
    observed: Mapping[str, str] | None = None,
) -> ForwardProfile:
    """The cost of one forward of `hidden_states` (1, seqlen, hidden) on the meta device.

    observed: the first layer of each group -> its statistic, for a forward as `BlockObserver` runs
    it: each of these inputs is converted to fp32, and the forward ends at the last one.
    Raises `ModelError` where the block does not run on the meta device.
    """
    counter, attention = _Counter(), _Attention()
    counter.known(block.parameters())
    counter.known(block.buffers())
    counter.known([hidden_states])
    tensors = tree_leaves((call.arguments, call.keywords))
    counter.known(tensor for tensor in tensors if isinstance(tensor, Tensor))
    needs = observed or {}
    seen: list[str] = []

    def hook(layer: str) -> Callable[..., None]:
        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Only memory is counted here; `phases.py` adds the time.
            moved, operators = counter.moved, counter.operators
            copy = (args[0] if args else kwargs["input"]).to(torch.float32)
            if needs[layer] != "full":
                copy.square()
            del copy
            counter.moved, counter.operators = moved, operators
            seen.append(layer)
            if len(seen) == len(needs):
                raise _AllObserved

        return observe

    with torch.no_grad(), attention, counter:
        _run(block, call, hidden_states, {layer: hook(layer) for layer in needs})
    return ForwardProfile(
        products=counter.products,
        attention=attention.flops,
        moved=counter.moved,
        operators=counter.operators + attention.operators,
        live=counter.peak,
    )


def saved_bytes(block: nn.Module, call: BlockCall, hidden_states: Tensor) -> int:
    """Bytes that a forward of `hidden_states`, on the meta device, keeps for its backward.

    Weights and inputs are not counted. Raises `ModelError` as `profile_forward` does.
    """
    given = (*block.parameters(), *block.buffers(), hidden_states)
    # By address, which another storage could get if one of them were freed.
    known = {t.untyped_storage()._cdata: t.untyped_storage() for t in given}
    total = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal total
        key = tensor.untyped_storage()._cdata
        if key not in known:
            known[key] = tensor.untyped_storage()
            total += known[key].nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    trained = [p for p in block.parameters() if p.dim() == 2 and not p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad(), hooks, _Attention() as attention:
            _run(block, call, hidden_states, {})
    finally:
        for parameter in trained:
            parameter.requires_grad_(False)
    return total + int(attention.given)


def _run(
    block: nn.Module, call: BlockCall, hidden_states: Tensor, hooks: Mapping[str, Any]
) -> None:
    handles = [
        block.get_submodule(layer).register_forward_pre_hook(hook, with_kwargs=True)
        for layer, hook in hooks.items()
    ]
    try:
        call.run(block, hidden_states)
    except _AllObserved:
        return
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"the blocks of this model cannot be planned: {type(block).__name__} does not run "
            f"without data ({first})"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
