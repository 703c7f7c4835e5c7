"""What a backward cannot repeat is said."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.backends.cuda import mem_efficient_sdp_enabled

from pipeline.reconstruct.results import notes
from pipeline.worker.training.kernels import repeatable

GPU, CPU = torch.device("cuda"), torch.device("cpu")
TORCHS = (
    "cumsum_cuda_kernel does not have a deterministic implementation, but you set "
    "'torch.use_deterministic_algorithms(True, warn_only=True)'."
)


def test_operators_that_torch_warns_of_are_named() -> None:
    with repeatable(GPU) as varying:
        warnings.warn(TORCHS, stacklevel=1)
        warnings.warn(TORCHS, stacklevel=1)
    assert varying == {"cumsum_cuda_kernel"}


def test_other_warnings_go_on() -> None:
    with pytest.warns(UserWarning, match="something else"), repeatable(GPU) as varying:
        warnings.warn("something else", stacklevel=1)
    assert not varying


def test_attention_on_a_gpu_takes_no_kernel_that_varies() -> None:
    before = mem_efficient_sdp_enabled()
    with repeatable(GPU):
        assert not mem_efficient_sdp_enabled()
    with repeatable(CPU):
        assert mem_efficient_sdp_enabled() == before
    assert mem_efficient_sdp_enabled() == before


def test_the_note_names_them() -> None:
    result = {
        "before": 2.0, "after": 1.0, "kept": 1, "epochs": 1, "held_out": [2.0, 1.0],
        "learned": [2.0], "finite": True, "untrained": [], "norms": 0,
        "varying": ["cumsum_cuda_kernel"],
    }  # fmt: skip
    (line,) = notes(result, "model.layers.3")
    assert line.startswith("model.layers.3: its reconstruction may differ")
    assert "cumsum_cuda_kernel" in line
