"""Counts what torch would start on a GPU, on tensors of any device."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Launches(TorchDispatchMode):
    """Counts the operations that are a kernel on a GPU: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.counted.values())

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not function.is_view and "empty" not in function.name():
            self.counted[function.name()] += 1
        return function(*args, **(kwargs or {}))
