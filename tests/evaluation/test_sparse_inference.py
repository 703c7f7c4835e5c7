"""`examples/sparse_inference.py`: the linears of a pruned model as sparse tensors."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from transformers import AutoModelForCausalLM

from tests.support.jobs import is_linear_of_a_block, prune_here
from tests.support.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model in bf16 whose shapes sparse kernels take."""
    folder = tmp_path_factory.mktemp("sparse")
    save_tiny_model(
        folder / "model", hidden=128, intermediate=256, dtype=torch.bfloat16, num_key_value_heads=4
    )
    prune_here(folder / "model", folder / "output", method="wanda")
    return folder / "output"


@pytest.fixture
def example(repository: Path) -> ModuleType:
    path = repository / "examples" / "sparse_inference.py"
    assert len(path.read_text().splitlines()) <= 30
    spec = importlib.util.spec_from_file_location("sparse_inference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_pruned_linear_is_made_sparse_and_no_other(
    pruned: Path, example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made of a weight on a GPU is made here by torch's reference, which runs on a CPU.

    Compressed and taken apart again it is the same: the kernels see every weight that is not zero.
    """

    def compress(weight: torch.Tensor) -> torch.Tensor:
        packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
        assert packed.shape == (weight.shape[0], weight.shape[1] // 2)
        return sparse_semi_structured_to_dense_cutlass(packed, meta)

    monkeypatch.setattr(example, "to_sparse_semi_structured", compress)
    model = AutoModelForCausalLM.from_pretrained(pruned)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    made = example.sparsify(model)
    linears = [name for name in before if is_linear_of_a_block(name)]
    assert sorted(f"{name}.weight" for name in made) == sorted(linears)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.cuda
def test_on_a_gpu(pruned: Path, repository: Path) -> None:
    command = [sys.executable, "examples/sparse_inference.py", str(pruned), "the tide"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert "14 layers made sparse" in done.stderr
    assert "the tide" in done.stdout
