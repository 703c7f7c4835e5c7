"""Trains a pruned model further with transformers' Trainer, and keeps its zeros.

    python examples/finetune.py PRUNED TUNED --text train.txt --eval-text valid.txt --steps 50

The mask is taken from the model as it is; `KeepMask` restores it after every step. Gradient
accumulation, bf16, and everything else are the Trainer's own.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.output.keep_mask import KeepMask, masks_of


def sequences(tokenizer, path: Path, seqlen: int) -> list[dict[str, torch.Tensor]]:
    """The text in pieces of `seqlen` tokens, as the Trainer wants them."""
    text = path.read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    pieces = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


@torch.no_grad()
def perplexity(model, pieces: list[dict[str, torch.Tensor]]) -> float:
    """exp of the mean next-token loss."""
    model.eval()
    losses = [
        model(**{k: v[None].to(model.device) for k, v in piece.items()}).loss.item()
        for piece in pieces
    ]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    """Prints perplexity and the share of zeros before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--eval-text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--evaluation-sequences", type=int, default=20)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    # Weights in fp32, products in bf16: a step of 2e-5 is lost in bf16 weights.
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    held_out = sequences(tokenizer, options.eval_text, options.seqlen)
    held_out = held_out[: options.evaluation_sequences]
    print(f"before: perplexity {perplexity(model, held_out):.2f}")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulate,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=options.steps // 10,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=5,
            report_to=[],
            save_strategy="no",
        ),
        train_dataset=sequences(tokenizer, options.text, options.seqlen),
        callbacks=[KeepMask(model)],
    )
    pruned = len(masks_of(model))
    trainer.train()
    print(f"after: perplexity {perplexity(model, held_out):.2f}")
    print(f"{len(masks_of(model))} of {pruned} layers still hold 2:4")
    model.to(torch.bfloat16).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
