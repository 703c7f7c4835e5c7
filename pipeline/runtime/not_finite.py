"""Finds the module in which a forward stops being finite, and says what to do about it.

Nothing here runs in a forward that goes well. One that gave NaN or Inf is run again with a hook on
every module; the first module that gives a value that is not finite is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[], Any]
"""A forward of a module, to be run again."""


class _Found(Exception):
    """Ends a forward at the first value that is not finite."""

    def __init__(self, what: str, dtype: torch.dtype) -> None:
        super().__init__(what)
        self.what, self.dtype = what, dtype


def first_not_finite(root: nn.Module, path: str, run: Run) -> str | None:
    """What is the first to be not finite in a forward, as `the output of X is not finite in float16
    (which ends at 65504)`; None where all is finite.

    root: the module that `run` runs; path: its name in the model, of which those below it are
    named.
    """
    found = _first(root, path, run)
    if found is None:
        return None
    ends = " (which ends at 65504)" if found.dtype == torch.float16 else ""
    return f"{found.what} is not finite in {name_of(found.dtype)}{ends}"


def wider_dtype(dtype: torch.dtype) -> str:
    """What a user can do about a forward in `dtype` that is not finite."""
    if dtype == torch.float16:
        return "use --dtype bfloat16 or float32"
    return (
        f"no --dtype reaches further than {name_of(dtype)}: check the model's weights, and that it "
        "runs in transformers"
    )


def largest_inputs(root: nn.Module, layers: Iterable[str], run: Run) -> dict[str, float]:
    """The largest magnitude of each layer's inputs in a forward of `root`; layers by path in it."""
    largest = dict.fromkeys(layers, 0.0)

    def look(layer: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = _input(args, kwargs)
        if values is not None and values.numel():
            largest[layer] = max(largest[layer], float(values.abs().max()))

    handles = [
        root.get_submodule(layer).register_forward_pre_hook(partial(look, layer), with_kwargs=True)
        for layer in largest
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return largest


def name_of(dtype: torch.dtype) -> str:
    """A dtype as --dtype names it."""
    return str(dtype).removeprefix("torch.")


def _first(root: nn.Module, path: str, run: Run) -> _Found | None:
    """The first value that is not finite in a forward of `root`."""
    handles = []
    for name, module in root.named_modules():
        if next(module.parameters(), None) is None:
            continue  # an activation, perhaps of many layers: the input of the next layer tells
        full = ".".join(part for part in (path, name) if part)
        if module is not root:
            before = partial(_before, full)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(partial(_after, full)))
    try:
        run()
    except _Found as found:
        return found
    finally:
        for handle in handles:
            handle.remove()
    return None


def _before(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What came between two modules: attention, a product of gate and up, a residual sum."""
    _look(f"the input of {name}", _input(args, kwargs))


def _after(name: str, module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
    value = output[0] if isinstance(output, (tuple, list)) and output else output
    if _bad(value):
        for part, parameter in module.named_parameters(recurse=False):
            _look(f"the {part} of {name}", parameter)
    _look(f"the output of {name}", value)


def _look(what: str, value: Any) -> None:
    if _bad(value):
        raise _Found(what, value.dtype)


def _bad(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and not value.is_meta
        and not bool(torch.isfinite(value).all())
    )


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A module's hidden states; its other arguments (a mask) may hold infinities."""
    value = args[0] if args else kwargs.get("hidden_states", kwargs.get("input"))
    return value if isinstance(value, Tensor) and value.is_floating_point() else None
