"""`prox24 verify` finds what is wrong with an output, whatever was done to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cluster.command_line import run
from pipeline.output.verify import verify
from storage.errors import CorruptFileError, ModelError
from storage.files.commit import sha256_file
from tests.support.jobs import prune_here
from tests.support.tiny_models import save_tiny_model

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model in two weight files, and what a job made of it."""
    folder = tmp_path_factory.mktemp("verify")
    source = save_tiny_model(folder / "model", weight_files=2)
    prune_here(source, folder / "output", method="wanda")
    return source, folder / "output"


@pytest.fixture
def output(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the output to be harmed."""
    return Path(shutil.copytree(made[1], tmp_path / "output"))


def change(output: Path, name: str, harm: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Puts another tensor in the place of one, and its new file's hash in prox24.json."""
    for path in output.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if name not in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                continue
            metadata = file.metadata()
        tensors = load_file(path)
        tensors[name] = harm(tensors[name].clone())
        save_file(tensors, path, metadata=metadata)
        results = json.loads((output / "prox24.json").read_text())
        for stored in results["weight_files"]:
            if stored["name"] == path.name:
                stored["sha256"] = sha256_file(path)
        (output / "prox24.json").write_text(json.dumps(results))
        return
    raise AssertionError(name)


def problems(output: Path, source: Path) -> list[str]:
    return verify(output, source).problems


def test_a_finished_output_is_sound(made: tuple[Path, Path]) -> None:
    source, output = made
    found = verify(output, source)
    assert found.problems == []
    assert len(found.layers) == 2 * 7
    assert all(layer.holds and layer.zeros >= 0.5 for layer in found.layers)
    weights = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert 0.9 * weights < found.bytes < weights


def test_one_entry_too_many_in_a_group(made: tuple[Path, Path], output: Path) -> None:
    def fill(weight: torch.Tensor) -> torch.Tensor:
        weight[3, 4:8] = torch.where(weight[3, 4:8] == 0, 1e-30, weight[3, 4:8])
        return weight

    change(output, f"{LAYER}.weight", fill)
    assert problems(output, made[0]) == [f"{LAYER}: does not hold 2:4"]
    assert [layer.name for layer in verify(output, made[0]).layers if not layer.holds] == [LAYER]


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_what_is_not_pruned_is_the_sources_byte_by_byte(
    made: tuple[Path, Path], output: Path, name: str
) -> None:
    def nudge(weight: torch.Tensor) -> torch.Tensor:
        raw = weight.view(torch.uint8).view(-1)
        raw[-4] ^= 1
        return weight

    change(output, name, nudge)
    assert problems(output, made[0]) == [f"{name}: not pruned, but not the source's either"]


def test_a_value_that_is_not_finite(made: tuple[Path, Path], output: Path) -> None:
    def spoil(weight: torch.Tensor) -> torch.Tensor:
        weight[0, int(weight[0].abs().argmax())] = torch.inf
        return weight

    change(output, f"{LAYER}.weight", spoil)
    assert problems(output, made[0]) == [f"{LAYER}.weight: holds NaN or Inf"]


def test_another_shape_and_dtype(made: tuple[Path, Path], output: Path) -> None:
    change(output, "model.norm.weight", lambda weight: weight.double())
    found = problems(output, made[0])
    assert any("model.norm.weight: F64" in problem for problem in found)
    assert any("header is not the source's" in problem for problem in found)


def test_a_flipped_byte_is_found_by_the_files_hash(made: tuple[Path, Path], output: Path) -> None:
    path = sorted(output.glob("*.safetensors"))[0]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 0x40
    path.write_bytes(raw)
    assert f"{path.name}: its hash is not the one in prox24.json" in problems(output, made[0])


def test_side_files(made: tuple[Path, Path], output: Path) -> None:
    (output / "tokenizer.json").write_text("{}")
    (output / "generation_config.json").unlink()
    (output / "more.txt").write_text("more")
    assert problems(output, made[0]) == [
        "generation_config.json is missing",
        "more.txt is not in the source",
        "tokenizer.json is not the source's",
    ]


def test_a_layer_that_stayed_dense_unseen(made: tuple[Path, Path], output: Path) -> None:
    path = output / "prox24.json"
    results = json.loads(path.read_text())
    results["layers"] = [layer for layer in results["layers"] if layer["name"] != LAYER]
    path.write_text(json.dumps(results))
    assert problems(output, made[0]) == [
        f"{LAYER}: neither pruned nor stated as skipped",
        f"{LAYER}.weight: not pruned, but not the source's either",
    ]


def test_an_unstructured_pattern(made: tuple[Path, Path], tmp_path: Path) -> None:
    prune_here(made[0], tmp_path / "output", method="magnitude", pattern="unstructured:0.6")
    found = verify(tmp_path / "output", made[0])
    assert found.problems == []
    assert min(layer.zeros for layer in found.layers) > 0.59


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 1}', '{"schema_version": 9}'])
def test_results_that_are_none(made: tuple[Path, Path], output: Path, text: str) -> None:
    (output / "prox24.json").write_text(text)
    with pytest.raises(CorruptFileError, match=r"prox24\.json"):
        verify(output, made[0])


def test_no_output_of_ours(made: tuple[Path, Path]) -> None:
    with pytest.raises(ModelError, match="not a finished output"):
        verify(made[0], made[0])


def test_the_command(
    made: tuple[Path, Path], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, whole = made
    assert run(["verify", str(whole), "--source", str(source)]) == 0
    printed = capsys.readouterr().out
    assert "14 of 14 pruned layers hold their pattern" in printed
    assert max(map(len, printed.splitlines())) <= 80
    (output / "tokenizer.json").unlink()
    assert run(["verify", str(output), "--source", str(source), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["sound"], told["problems"]) == (False, ["tokenizer.json is missing"])
    assert run(["verify", str(output / "nothing"), "--source", str(source)]) == 2
