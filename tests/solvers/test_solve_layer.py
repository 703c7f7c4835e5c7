"""`prox24 solve` on saved layers, and `prune --save-layers` that writes them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.command_line import run
from pipeline.config.prune import PruneConfig
from pipeline.config.solve import SolveConfig
from pipeline.prune import prune
from pipeline.runtime.progress import Silent
from pipeline.solve_layer import sequence_numbers, solve_layer
from pipeline.worker.local_executor import LocalExecutor
from storage.errors import ConfigError, DataError, NumericalError


def save_layer(path: Path, *, sequences: int = 4, dtype: torch.dtype = torch.float32) -> Path:
    """A random layer (24, 32) with correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(32, 32, generator=generator)
    inputs = torch.randn(sequences, 48, 32, generator=generator) @ mixing
    weight = torch.randn(24, 32, generator=generator).to(dtype)
    save_file({"weight": weight, "inputs": inputs}, path)
    return path


def by_hand(path: Path, pruned: torch.Tensor, sequences: slice) -> float:
    """100 L(W)/L(0) in float64, from its definition."""
    layer = load_file(path)
    x = layer["inputs"][sequences].reshape(-1, 32).double()
    change = (pruned.double() - layer["weight"].double()) @ x.T
    return float(100 * change.square().sum() / (layer["weight"].double() @ x.T).square().sum())


def test_the_error_is_that_of_the_written_weight_on_the_evaluation_sequences(
    tmp_path: Path,
) -> None:
    path = save_layer(tmp_path / "layer.safetensors", dtype=torch.bfloat16)
    config = SolveConfig(
        methods="wanda,prox_admm",
        fit_sequences="0:2",
        evaluate_sequences="3",
        output=str(tmp_path / "out"),
    )
    results = solve_layer(path, config)
    for method in ("wanda", "prox_admm"):
        pruned = load_file(tmp_path / "out" / f"{method}.safetensors")["weight"]
        assert pruned.dtype == torch.bfloat16
        assert int((pruned != 0).reshape(24, 8, 4).sum(-1).max()) <= 2
        expected = by_hand(path, pruned, slice(3, 4))
        assert results[method]["relative_error"] == pytest.approx(expected, rel=1e-4)
        assert results[method]["seconds"] > 0
    assert results["prox_admm"]["relative_error"] < results["wanda"]["relative_error"]


def test_all_methods_on_the_command_line_print_one_json_object(tmp_path: Path) -> None:
    path = save_layer(tmp_path / "layer.safetensors")
    command = [sys.executable, "-m", "cluster", "solve", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)
    assert list(results) == ["magnitude", "wanda", "sparsegpt", "prox", "prox_admm"]
    for figures in results.values():
        assert {"relative_error", "seconds", "peak_memory_bytes", "report"} <= figures.keys()


def test_a_layer_without_inputs_keeps_its_largest_weights(tmp_path: Path) -> None:
    path = save_layer(tmp_path / "layer.safetensors")
    layer = load_file(path) | {"inputs": torch.zeros(4, 48, 32)}
    save_file(layer, path)
    command = [sys.executable, "-m", "cluster", "solve", str(path), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for method in ("wanda", "sparsegpt", "prox", "prox_admm"):
        assert f"{method}: largest weights kept: its inputs are 0 on all of" in done.stdout
        same = load_file(tmp_path / f"{method}.safetensors")["weight"]
        assert torch.equal(same, load_file(tmp_path / "magnitude.safetensors")["weight"])
        assert int((same != 0).sum()) == 24 * 16


def test_solved_weights_that_the_layers_dtype_does_not_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_layer(tmp_path / "layer.safetensors")
    layer = load_file(path)
    layer["weight"] = (layer["weight"].sign() * 65000).half()
    save_file(layer, path)
    assert run(["solve", str(path), "--methods", "wanda,prox_admm"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("prox24: layer layer by prox_admm: ")
    assert "solved weights are beyond float16, in which the layer is stored" in said
    assert "leave the method out of --methods" in said
    assert run(["solve", str(path), "--methods", "wanda"]) == 0


def test_all_leaves_out_prox_where_the_pattern_is_not_the_papers(tmp_path: Path) -> None:
    path = save_layer(tmp_path / "layer.safetensors")
    results = solve_layer(path, SolveConfig(pattern="4:8", refine="none"))
    assert "prox" not in results
    assert "prox_admm" in results


def test_the_choice_of_shrinkage_is_reported(tmp_path: Path) -> None:
    path = save_layer(tmp_path / "layer.safetensors")
    results = solve_layer(path, SolveConfig(methods="prox_admm", shrinkage="auto"))
    assert 0 <= results["prox_admm"]["report"]["shrinkage"] <= 1


@pytest.mark.parametrize(
    ("tensors", "metadata", "error"),
    [
        ({"inputs": torch.ones(2, 3, 8)}, {}, DataError),
        ({"weight": torch.ones(4, 8)}, {}, DataError),
        ({"weight": torch.ones(4, 8), "inputs": torch.ones(2, 3, 12)}, {}, DataError),
        ({"weight": torch.ones(4, 8), "hessian": torch.eye(8)}, {}, DataError),
        ({"weight": torch.ones(4, 8), "hessian": torch.eye(12)}, {"tokens": "9"}, DataError),
        ({"weight": torch.ones(4, 6), "inputs": torch.ones(2, 3, 6)}, {}, ConfigError),
        ({"weight": torch.full((4, 8), torch.nan), "inputs": torch.ones(2, 3, 8)}, {}, None),
    ],
)
def test_a_file_that_is_no_layer_is_refused(
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str],
    error: type[Exception] | None,
) -> None:
    path = tmp_path / "layer.safetensors"
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(error or NumericalError, match="layer.safetensors|divisible"):
        solve_layer(path, SolveConfig(methods="wanda"))


def test_sequences_are_numbers_and_ranges() -> None:
    assert sequence_numbers(None, 3) == [0, 1, 2]
    assert sequence_numbers("0,2,4:6", 8) == [0, 2, 4, 5]
    assert sequence_numbers("6:", 8) == [6, 7]
    for bad in ("8", "a", "1:1", "-1"):
        with pytest.raises(ConfigError):
            sequence_numbers(bad, 8)


def test_a_job_saves_the_layers_that_match_and_they_solve_to_what_it_wrote(
    tmp_path: Path, tiny_model
) -> None:
    model = tiny_model("llama")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    config = PruneConfig(
        dataset=str(text),
        nsamples=8,
        seqlen=32,
        save_layers="*.1.self_attn.k_proj",
        reconstruct="none",
    )
    output = tmp_path / "out"
    prune(model, output, config, lambda: LocalExecutor(2, 1), Silent())
    saved = list((tmp_path / "out.run" / "layers").iterdir())
    assert [path.name for path in saved] == ["model.layers.1.self_attn.k_proj.safetensors"]
    folder = tmp_path / "solved"
    solve_layer(saved[0], SolveConfig(methods="prox_admm", output=str(folder)))
    again = load_file(folder / "prox_admm.safetensors")["weight"]
    written = load_file(output / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"]
    assert torch.equal(again != 0, written != 0)
    torch.testing.assert_close(again, written, rtol=1e-4, atol=1e-5)
