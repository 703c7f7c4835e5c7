"""What BOS at the start of every sequence is worth to a model that was trained with it.

Trains a tiny model on sequences that start with BOS (a few minutes on two cores), and measures by
the commands that users run: perplexity with --bos auto and never, dense and pruned.

    python benchmarks/bos.py --text TEXT.txt --folder /tmp/bos
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from tests.support.tiny_models import byte_tokenizer

SEQLEN = 128


def tokenizer_with_bos() -> PreTrainedTokenizerFast:
    """One token per byte, and BOS before every text."""
    tokenizer: Any = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    trained: PreTrainedTokenizerFast = tokenizer
    return trained


def train(text: str, steps: int) -> Any:
    """A model of four blocks that has seen `steps` batches of 32 sequences, each with BOS."""
    tokenizer: Any = tokenizer_with_bos()
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (steps - step) / (0.5 * steps), (step + 1) / 50)
        starts = torch.randint(0, len(ids) - SEQLEN, (32,))
        batch = torch.stack([ids[start : start + SEQLEN - 1] for start in starts])
        batch = torch.nn.functional.pad(batch, (1, 0), value=tokenizer.bos_token_id)
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", file=sys.stderr)
    return model.eval()


def prox24(*arguments: str) -> str:
    """Standard output of a prox24 command, run in this process's environment."""
    command = [sys.executable, "-m", "cluster", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Trains, prunes with and without BOS, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    whole = options.text.read_text(encoding="utf-8")
    cut = len(whole) * 4 // 5
    train_text, aside = folder / "train.txt", folder / "aside.txt"
    train_text.write_text(whole[:cut], encoding="utf-8")
    aside.write_text(whole[cut : cut + 60_000], encoding="utf-8")
    dense = folder / "dense"
    if not dense.exists():
        model = train(whole[:cut], options.steps)
        model.save_pretrained(dense)
        tokenizer_with_bos().save_pretrained(dense)
    models = {"dense": dense}
    for bos in ("auto", "never"):
        models[f"pruned, --bos {bos}"] = folder / f"pruned-{bos}"
        prox24(
            *("prune", str(dense), str(folder / f"pruned-{bos}"), "--dataset", str(train_text)),
            *("--nsamples", "64", "--seqlen", str(SEQLEN), "--bos", bos, "--overwrite"),
            *("--executor", "local", "--no-report"),
        )
    print(f"{'':20} {'--bos auto':>12} {'--bos never':>12}")
    for name, path in models.items():
        figures = [
            json.loads(
                prox24(
                    *("eval", str(path), "--dataset", str(aside), "--seqlen", str(SEQLEN)),
                    *("--bos", bos, "--json", "--executor", "local"),
                )
            )["perplexity"]
            for bos in ("auto", "never")
        ]
        print(f"{name:20} {figures[0]:12.3f} {figures[1]:12.3f}", flush=True)


if __name__ == "__main__":
    main()
