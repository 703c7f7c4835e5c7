"""The trial launch of a Triton kernel: what it says where Triton cannot compile, load or compute.

That the kernel compiles for GPUs is shown by `test_triton_kernels`.
"""

from __future__ import annotations

import subprocess
import types
from pathlib import Path

import pytest
import torch

from pipeline.solvers.kernels import on_gpu
from pipeline.solvers.kernels.on_gpu import launch_remedy, trial_launch
from storage.errors import ResourceError
from tests.support.fake_gpu import fake_gpu


def test_it_runs_on_a_gpu() -> None:
    with fake_gpu() as record:
        trial_launch(torch.device("cuda", 0))
    assert [name for name in record.launches.elements() if name.endswith("_double")] != []


@pytest.mark.cuda
def test_it_runs_on_a_real_gpu() -> None:
    trial_launch(torch.device("cuda", 0))


def _build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> Exception:
    """The error of Triton's own build of a launcher from this source."""
    build = pytest.importorskip("triton.runtime.build")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises((RuntimeError, subprocess.CalledProcessError)) as caught:
        build.compile_module_from_src(source, "prox24_trial")
    return caught.value


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a slim image: what Triton raises there, and what the user reads."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    error = _build(tmp_path, monkeypatch, "int nothing;")

    def doubles(device: torch.device) -> bool:
        raise error

    module = types.SimpleNamespace(doubles=doubles)
    monkeypatch.setattr(on_gpu, "triton_module", lambda name: module)
    with pytest.raises(ResourceError, match="cannot run a kernel on cuda:0.*install gcc") as caught:
        trial_launch(torch.device("cuda", 0))
    assert "\n" not in str(caught.value)


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    error = _build(tmp_path, monkeypatch, "int nothing;")
    assert "python3-dev" in launch_remedy(str(error))


def test_a_wrong_result_is_not_computed_with(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(doubles=lambda device: False)
    monkeypatch.setattr(on_gpu, "triton_module", lambda name: module)
    with pytest.raises(ResourceError, match="wrong result on cuda:0.*replace it"):
        trial_launch(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("libcuda.so cannot found!", "driver"),
        ("0 active drivers ([]). There should only be one.", "driver"),
        ("[Errno 13] Permission denied: '/.triton'", "TRITON_CACHE_DIR"),
        ("x.so: failed to map segment from shared object", "noexec"),
        ("the provided PTX was compiled with an unsupported toolchain.", "update the driver"),
        ("something new", "force-reinstall torch"),
    ],
)
def test_remedies(message: str, remedy: str) -> None:
    assert remedy in launch_remedy(message)
