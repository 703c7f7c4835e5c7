"""A pruned model that is trained further keeps its zeros after every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from pipeline.keep_mask import KeepMask, masks_of
from tests.jobs import prune_here
from tests.tiny_models import save_tiny_model


class Watch(TrainerCallback):  # type: ignore[misc]
    """Notes after every step whether all masks hold, and what the weights are."""

    def __init__(self, model: torch.nn.Module, masks: dict[str, torch.Tensor]) -> None:
        self.model, self.masks, self.held, self.moved = model, masks, [], []
        self.before = {n: model.get_submodule(n).weight.detach().clone() for n in masks}

    def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
        weights = {n: self.model.get_submodule(n).weight.detach() for n in self.masks}
        self.held.append(all(not w[~self.masks[n]].any() for n, w in weights.items()))
        self.moved.append(all(not torch.equal(w, self.before[n]) for n, w in weights.items()))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_hold_after_every_step(tmp_path: Path, dtype: torch.dtype, bf16: bool) -> None:
    prune_here(save_tiny_model(tmp_path / "model"), tmp_path / "pruned", method="wanda")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=dtype)
    masks = masks_of(model)
    assert len(masks) == 2 * 7
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (24, 16), generator=generator)
    watch = Watch(model, masks)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, learning_rate=1e-2, weight_decay=0.1, bf16=bf16,
            report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        callbacks=[KeepMask(model), watch],
    )  # fmt: skip
    trainer.train()
    assert watch.held == [True] * 3
    assert watch.moved == [True] * 3
    assert masks_of(model).keys() == masks.keys()


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert masks_of(model) == {}
    with pytest.raises(ValueError, match="not pruned"):
        KeepMask(model)
