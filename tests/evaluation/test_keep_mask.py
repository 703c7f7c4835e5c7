"""A pruned model that is trained further keeps its zeros after every step."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from pipeline.output.keep_mask import KeepMask, masks_of
from tests.support.jobs import is_linear_of_a_block, prune_here, tensors
from tests.support.tiny_models import save_tiny_model

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "finetune.py"


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


def test_the_example_trains_and_keeps_the_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`examples/finetune.py` as it is, in bf16 with accumulated gradients, on a tiny model."""
    pruned, tuned = tmp_path / "pruned", tmp_path / "tuned"
    # Letters of which the next is always the same: a few steps suffice to see it learn.
    text = tmp_path / "letters.txt"
    text.write_text("abcdefgh" * 256)
    prune_here(save_tiny_model(tmp_path / "model"), pruned, dataset=str(text), method="wanda")
    options = {
        "text": text, "eval-text": text, "steps": 8, "seqlen": 32, "batch-size": 2,
        "accumulate": 2, "learning-rate": 1e-2, "evaluation-sequences": 4,
    }  # fmt: skip
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    monkeypatch.setattr("sys.argv", ["finetune.py", str(pruned), str(tuned), *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    before, after = (float(p) for p in re.findall(r"(?:before|after): perplexity (\S+)", printed))
    assert after < before / 2
    assert "14 of 14 layers still hold 2:4" in printed
    dense = dict(tensors(pruned))
    for name, tensor in tensors(tuned):
        if is_linear_of_a_block(name):
            assert not tensor[dense[name] == 0].any(), name
            assert (tensor != 0).float().mean() > 0.45, name
    assert len(EXAMPLE.read_text().splitlines()) <= 100


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert masks_of(model) == {}
    with pytest.raises(ValueError, match="not pruned"):
        KeepMask(model)
