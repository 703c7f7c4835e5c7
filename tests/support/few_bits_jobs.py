"""Small jobs on models in few bits by the command line, and transformers' own dequantization."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedModel,
)

from cluster.command_line import run
from pipeline.formats.open_model import open_model

OPTIONS = ["--executor", "local", "--threads", "1", "--dataset"]
JOB = ["--method", "wanda", "--nsamples", "8", "--seqlen", "32", "--no-report"]
BF16 = torch.bfloat16
NAME = "model.layers.1.mlp.up_proj.weight"
# For groups of 32 in each row of deepseek_v3.
WIDE = {"moe_intermediate_size": 32, "intermediate_size": 64, "q_lora_rank": 32, "kv_lora_rank": 32}


def dequantized(folder: Path) -> PreTrainedModel:
    """The model that transformers loads when it is told to dequantize to bfloat16."""
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    how = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}.get(method, CompressedTensorsConfig)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=how(dequantize=True),
        experts_implementation="eager",
    )
    return model.eval()


def plain(source: Path, target: Path) -> Path:
    """The bfloat16 model that prox24 sees, put on the disk."""
    files = open_model(source)
    shutil.copytree(files.folder, target)
    for name in files.files:
        with files.source.open(name) as stream:
            (target / name).write_bytes(stream.read(files.size(name)))
    return target


def prune(source: Path, output: Path, text: Path) -> int:
    """A small job through the command line; its exit code."""
    return run(["prune", str(source), str(output), *OPTIONS, str(text), *JOB])


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON object that a command has printed."""
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 2) -> str:
    """The one line that a command prints to stderr when it refuses."""
    capsys.readouterr()
    assert run(arguments) == code
    message = capsys.readouterr().err.strip()
    assert message.splitlines()[-1].startswith("prox24: "), message
    return message.splitlines()[-1]
