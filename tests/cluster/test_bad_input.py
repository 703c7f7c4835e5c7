"""Bad input to `prox24`: exit code 2, one line that names it, and nothing created."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.command_line import run
from tests.support.jobs import write_text
from tests.support.refusals import LOCAL, refuse

TinyModel = Callable[..., Path]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weight(folder: Path, name: str, value: torch.Tensor | float | None) -> None:
    """Another tensor (None: none), or one entry of another value, in whichever file it is."""
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        if name in weights:
            if value is None:
                del weights[name]
            elif isinstance(value, float):
                weights[name].view(-1)[5] = value
            else:
                weights[name] = value
            save_file(weights, path, {"format": "pt"})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


UP = "model.layers.1.mlp.up_proj.weight"
SECOND = "model-00002-of-00003.safetensors"
# What is done to a good model folder (3 weight files), and what the message names.
MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json",)),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), ("config.json",)),
    "missing weight file": (lambda f: (f / SECOND).unlink(), (SECOND,)),
    "truncated weight file": (lambda f: truncate(f / SECOND), (SECOND,)),
    "no weight files": (lambda f: [p.unlink() for p in f.glob("model*")], ("model.safetensors",)),
    "missing tensor": (lambda f: edit_weight(f, UP, None), (UP,)),
    "wrong shape": (lambda f: edit_weight(f, UP, torch.zeros(64, 28)), (UP, "[64, 28]")),
    "NaN": (lambda f: edit_weight(f, UP, math.nan), (UP, "NaN")),
    "infinity": (lambda f: edit_weight(f, "lm_head.weight", -math.inf), ("lm_head.weight", "Inf")),
    "encoder": (lambda f: edit_config(f, architectures=["BertForMaskedLM"]), ("BertForMaskedLM",)),
    "no architectures": (lambda f: edit_config(f, architectures=[]), ("architectures",)),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ("tokenizer",)),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_bad_model(
    tiny_model: TinyModel,
    text: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    case: str,
) -> None:
    model = tiny_model("llama", weight_files=3)
    damage, names = MODELS[case]
    damage(model)
    arguments = ["prune", model, tmp_path / "output", *LOCAL, "--dataset", text, "--nsamples", 4]
    refuse(arguments, tmp_path, capfd, *names)


def test_models_that_are_none(
    tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for model, name in (
        (tmp_path / "absent", "absent"),
        (text, "text.txt"),
        ("./absent", "./absent"),
        ("nobody/no-such-model", "nobody/no-such-model"),
        (tmp_path, "config.json"),
    ):
        arguments = ["prune", model, tmp_path / "output", *LOCAL, "--dataset", text]
        refuse(arguments, tmp_path, capfd, name)


def test_a_model_with_matrices_outside_linear_layers(
    tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "lru_width": 32, "intermediate_size": 64}
    config = AutoConfig.for_model(
        "recurrent_gemma", num_hidden_layers=3, vocab_size=260, attention_window_size=8, **sizes
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "griffin")
    arguments = ["prune", tmp_path / "griffin", tmp_path / "output", *LOCAL, "--dataset", text]
    name = "model.layers.0.temporal_block.rg_lru.input_gate_weight (4 × 8 × 8, 256 weights)"
    refuse(arguments, tmp_path, capfd, "RecurrentGemmaForCausalLM", name)


def test_a_width_not_divisible_by_4(
    tiny_model: TinyModel, tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llama", intermediate=70)
    arguments = ["prune", model, tmp_path / "output", *LOCAL, "--dataset", text]
    refuse(arguments, tmp_path, capfd, "mlp.down_proj", "70", "--skip-unsupported")


def write_dataset(folder: Path, kind: str) -> Path:
    path = folder / {"no column": "a.parquet", "numbers": "b.jsonl", "arrow": "c.arrow"}.get(
        kind, f"{kind}.txt"
    )
    if kind == "no column":
        pq.write_table(pa.table({"number": [1, 2, 3]}), path)
    elif kind == "numbers":
        path.write_text('{"text": 5}\n')
    elif kind == "arrow":
        path.write_bytes(b"this is not Arrow")
    elif kind == "latin":
        path.write_bytes("é".encode("latin-1") * 999)
    elif kind != "absent":
        path.write_text({"empty": "", "blank": "\n \n", "short": "a few words"}[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("absent", ["absent.txt"]),
        ("empty", ["empty.txt"]),
        ("blank", ["blank.txt"]),
        ("short", ["short.txt", "11 tokens", "4 × 32 = 128"]),
        ("latin", ["latin.txt", "UTF-8"]),
        ("no column", ["a.parquet", "--text-column"]),
        ("numbers", ["b.jsonl"]),
        ("arrow", ["c.arrow"]),
    ],
)
@pytest.mark.parametrize("command", ["prune", "eval"])
def test_a_bad_dataset(
    tiny_model: TinyModel,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    kind: str,
    names: list[str],
    command: str,
) -> None:
    dataset = write_dataset(tmp_path, kind)
    output = [tmp_path / "output"] if command == "prune" else []
    arguments = [command, tiny_model(), *output, *LOCAL, "--dataset", dataset, "--nsamples", 4]
    refuse(arguments, tmp_path, capfd, *names)


def test_a_hub_dataset_that_cannot_be_read(
    tiny_model: TinyModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prune", tiny_model(), tmp_path / "output", *LOCAL, "--dataset", "nobody/nothing"]
    refuse(arguments, tmp_path, capfd, "nobody/nothing")


@pytest.mark.parametrize(
    ("option", "value", "names"),
    [
        ("--seqlen", 257, ["--seqlen 257", "256"]),
        ("--seqlen", 1, ["--seqlen"]),
        ("--nsamples", 0, ["--nsamples"]),
        ("--nsamples", "many", ["--nsamples", "many"]),
        ("--workers", 0, ["--workers"]),
        ("--batch-size", -1, ["--batch-size"]),
        ("--damping", -0.1, ["--damping"]),
        ("--damping", "nan", ["--damping"]),
        ("--shrinkage", 1.5, ["shrinkage"]),
        ("--shrinkage", "some", ["--shrinkage", "some"]),
        ("--blocksize", 0, ["blocksize"]),
        ("--pattern", "4:2", ["4:2"]),
        ("--pattern", "two of four", ["two of four"]),
        ("--method", "alps", ["--method", "alps", "prox_admm"]),
        ("--refine", "newton", ["--refine", "newton"]),
        ("--dtype", "int8", ["--dtype", "int8"]),
        ("--device", "abacus", ["abacus"]),
        ("--device", "cuda:99", ["cuda:99"]),
        ("--executor", "slurm", ["--executor", "slurm"]),
        ("--no-such-option", 1, ["--no-such-option"]),
        ("--nsampels", 1, ["--nsampels"]),
        ("--method=magnitude --refine-steps", 0, ["--refine-steps"]),
    ],
)
def test_a_bad_option(
    tiny_model: TinyModel,
    tmp_path: Path,
    text: Path,
    capfd: pytest.CaptureFixture[str],
    option: str,
    value: object,
    names: list[str],
) -> None:
    arguments = ["prune", tiny_model(), tmp_path / "output", *LOCAL, "--dataset", text]
    refuse([*arguments, "--nsamples", 4, *option.split(), value], tmp_path, capfd, *names)


@pytest.mark.parametrize(
    ("yaml", "names"),
    [
        (None, ["job.yaml"]),
        ("nsamples: [1, 2]", ["job.yaml", "nsamples"]),
        ("- nsamples", ["job.yaml", "mapping"]),
        ("nsamples: {", ["job.yaml"]),
        ("nsampels: 4", ["--nsampels"]),
        ("nsamples: many", ["--nsamples", "many"]),
        ("method: alps", ["alps"]),
    ],
)
def test_a_bad_yaml_file(
    tiny_model: TinyModel,
    tmp_path: Path,
    text: Path,
    capfd: pytest.CaptureFixture[str],
    yaml: str | None,
    names: list[str],
) -> None:
    file = tmp_path / "job.yaml"
    if yaml is not None:
        file.write_text(yaml)
    arguments = ["prune", tiny_model(), tmp_path / "output", *LOCAL, "--dataset", text]
    refuse([*arguments, "--config", file], tmp_path, capfd, *names)


def test_outputs_that_cannot_be(
    tiny_model: TinyModel, tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious.txt").write_text("precious")
    options = [*LOCAL, "--dataset", text, "--nsamples", 4]
    refuse(["prune", model, full, *options], tmp_path, capfd, str(full), "--overwrite")
    refuse(["prune", model, text, *options], tmp_path, capfd, str(text), "file")
    refuse(["prune", model, model, *options], tmp_path, capfd, str(model))
    refuse(["prune", model, model, "--overwrite", *options], tmp_path, capfd, str(model))
    both = tmp_path / "both"
    refuse(["prune", model, both, "--run-dir", both, *options], tmp_path, capfd, str(both))
    for run_dir in (both / "run", tmp_path, model):
        refuse(["prune", model, both, "--run-dir", run_dir, *options], tmp_path, capfd, "--run-dir")


def test_no_arguments_and_no_such_command(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["prunne"], ["prune"], ["prune", "model"], ["eval"]):
        assert run(arguments) == 2
        shown = capfd.readouterr()
        assert "prox24" in shown.err
        assert "Traceback" not in shown.err
