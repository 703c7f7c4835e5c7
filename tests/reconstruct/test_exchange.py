"""Which layers are exchanged together, and that it decides nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.reconstruct import schedule
from pipeline.worker.training.exchange import bundles
from tests.support.jobs import prune_here
from tests.support.tiny_models import save_tiny_model

MOST = schedule.BUNDLE_BYTES


def test_layers_share_a_bundle_while_they_fit() -> None:
    half = MOST // 2
    sizes = {"q": half, "k": half, "v": 1, "up": 3 * MOST, "down": 1}
    found = bundles({name: (size, torch.bfloat16) for name, size in sizes.items()})
    assert found == [["q", "k"], ["v"], ["up"], ["down"]]


def test_a_bundle_has_one_dtype() -> None:
    wide, narrow = (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)
    found = bundles({"norm": (4, wide), "q": (4, narrow), "k": (4, narrow), "bias": (4, wide)})
    assert found == [["norm"], ["q", "k"], ["bias"]]
    assert bundles({}) == []


def test_bundles_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    made = []
    for most in (MOST, 5000, 1):
        monkeypatch.setattr(schedule, "BUNDLE_BYTES", most)
        out = tmp_path / f"out-{most}"
        prune_here(
            source, out, workers=3, reconstruct="block", reconstruct_epochs=2,
            reconstruct_norms=True,
        )  # fmt: skip
        made.append([path.read_bytes() for path in sorted(out.glob("*.safetensors"))])
    assert made[0] == made[1] == made[2]
