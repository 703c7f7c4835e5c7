"""Stored tensors that transformers splits or joins on loading: loaded so, and never pruned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import core_model_loading as loading

from cluster.command_line import run
from tests.support.published import Tensors, as_transformers, change, changed, publish, refusal

Capture = pytest.CaptureFixture[str]
LLAMA = {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}


def conversions(operation: str) -> tuple[Any, Any]:
    """An operation of transformers' conversions, and what holds them."""
    return getattr(loading, operation), loading.WeightConverter


@contextlib.contextmanager
def converting(kind: str, converter: Any) -> Iterator[None]:
    """While it lasts, transformers has a conversion for the files of a model type."""
    from transformers import conversion_mapping as mapping

    before = mapping.get_checkpoint_conversion_mapping(kind)
    mapping.register_checkpoint_conversion_mapping(kind, [converter], overwrite=True)
    try:
        yield
    finally:
        mapping._checkpoint_conversion_mapping_cache.pop(kind)
        if before is not None:
            mapping.register_checkpoint_conversion_mapping(kind, before)


def test_what_is_split_on_loading_is_not_pruned(tmp_path: Path, capsys: Capture) -> None:
    """A Llama with gate and up in one stored tensor, which its class splits."""
    chunk, converter = conversions("Chunk")

    def how(tensors: Tensors) -> None:
        for block in range(2):
            prefix = f"model.layers.{block}.mlp."
            parts = [tensors.pop(f"{prefix}{name}_proj.weight") for name in ("gate", "up")]
            tensors[f"{prefix}gate_up_proj.weight"] = torch.cat(parts)

    source = change(publish(tmp_path / "source", "llama", **LLAMA), how)
    targets = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    with converting("llama", converter("mlp.gate_up_proj.weight", targets, [chunk(dim=0)])):
        found = refusal(source, tmp_path, capsys)
        for word in ("mlp.gate_proj.weight", "mlp.gate_up_proj.weight (Chunk)", "--exclude"):
            assert word in found
        assert run(["plan", str(source), "--seqlen", "32"]) == 2
        assert "gate_up_proj.weight (Chunk)" in capsys.readouterr().err
        output = as_transformers(source, tmp_path, capsys, "--exclude", r".*(gate|up)_proj")
    assert len(changed(source, output)) == 10


def test_what_is_joined_on_loading_is_not_pruned(tmp_path: Path, capsys: Capture) -> None:
    """A Phi-3 with gate and up stored apart, which its class holds in one."""
    concatenate, converter = conversions("Concatenate")

    def how(tensors: Tensors) -> None:
        for block in range(2):
            prefix = f"model.layers.{block}.mlp."
            gate, up = tensors.pop(f"{prefix}gate_up_proj.weight").chunk(2)
            tensors |= {f"{prefix}gate_proj.weight": gate, f"{prefix}up_proj.weight": up}

    source = change(publish(tmp_path / "source", "phi3", **LLAMA), how)
    parts = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    with converting("phi3", converter(parts, "mlp.gate_up_proj.weight", [concatenate(0)])):
        found = refusal(source, tmp_path, capsys)
        assert "mlp.gate_proj.weight, model.layers.0.mlp.up_proj.weight (Concatenate)" in found
        output = as_transformers(source, tmp_path, capsys, "--exclude", ".*gate_up_proj")
    assert len(changed(source, output)) == 6
