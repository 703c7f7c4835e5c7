"""A mixture of experts small enough to be trained here: methods, thresholds and memory.

Trains a Mixtral of bytes for hundreds of steps, so that routing is not random, prunes it, and
tables perplexity per byte by method and `--expert-tokens`, and peak memory by number of experts.

    python benchmarks/moe.py --text shared/data/wikitext2-valid.txt --folder /tmp/moe
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks import peak
from benchmarks.perplexity import split_text
from pipeline.config.evaluate import EvalConfig
from pipeline.evaluation.perplexity import evaluate
from pipeline.runtime.progress import Silent
from pipeline.worker.local_executor import LocalExecutor
from tests.support.jobs import prune_here
from tests.support.tiny_models import VOCABULARY, byte_tokenizer

SEQLEN = 128
METHODS = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt"},
    "prox+cg": {"method": "prox"},
    "prox_admm": {"method": "prox_admm"},
}
# Calibration sequences, and the thresholds that are tried with so many.
THRESHOLDS = {8: (0, 4, 8, 16, 32, 64, 128, 256, 1024), 64: (0, 8, 16, 64, 256, 1024, 4096)}
MEMORY = {4: None, 16: None, 64: None, 128: None, "128, --hessian-memory 0.05": "0.05"}


def tried() -> list[tuple[str, int, int]]:
    """Method, calibration sequences and threshold of each run."""
    return [
        (method, nsamples, least)
        for method in ("prox_admm", "sparsegpt")
        for nsamples, thresholds in THRESHOLDS.items()
        for least in thresholds
    ]


def tiny(experts: int, **changes: object) -> PreTrainedModel:
    """A Mixtral of bytes, float32, each token sent to two of `experts`."""
    shape: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    own = {"num_local_experts": experts, "num_experts_per_tok": 2}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mixtral", **(shape | own | changes))
    )


def train(folder: Path, text: Path, experts: int, steps: int) -> None:
    """Trains a model on the text's bytes with the usual balancing loss, and saves it."""
    torch.manual_seed(0)
    model = tiny(experts, output_router_logits=True, router_aux_loss_coef=0.02)
    ids = torch.tensor(byte_tokenizer()(text.read_text(encoding="utf-8"))["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        starts = torch.randint(0, len(ids) - SEQLEN, (16,))
        batch: Tensor = torch.stack([ids[start : start + SEQLEN] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {float(loss):.3f}", file=sys.stderr, flush=True)
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def perplexity(model: Path, text: Path) -> float:
    """Per byte, on the first 256 sequences of a text."""
    config = EvalConfig(
        dataset=str(text), seqlen=SEQLEN, nsamples=256, batch_size=32, executor="local"
    )
    return float(evaluate(model, config, lambda: LocalExecutor(1, 1), Silent())["perplexity"])


def pruned(model: Path, texts: tuple[Path, Path], output: Path, **options: Any) -> dict[str, Any]:
    """Prunes with the options; perplexity, and the experts' layers below the threshold."""
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(output.with_name(output.name + ".run"), ignore_errors=True)
    prune_here(model, output, dataset=str(texts[0]), seqlen=SEQLEN, batch_size=16, **options)
    results = json.loads((output / "prox24.json").read_text(encoding="utf-8"))
    tokens = [layer["tokens"] for layer in results["layers"] if ".experts." in layer["name"]]
    return {
        "perplexity": perplexity(output, texts[1]),
        "few": len(results["few_tokens"]),
        "layers": len(tokens),
        "fewest": min(tokens),
    }


def memory(folder: Path, text: Path, experts: int, limit: str | None) -> dict[str, Any]:
    """Peak of one process that prunes a random model with so many experts."""
    model = folder / f"random-{experts}"
    if not model.exists():
        wide = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1}
        tiny(experts, **wide).save_pretrained(model)
        byte_tokenizer().save_pretrained(model)
    output = folder / "memory-out"
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(output.with_name("memory-out.run"), ignore_errors=True)
    command = [
        *(sys.executable, "-m", "cluster", "prune", str(model), str(output)),
        *("--executor", "local", "--threads", "1", "--method", "sparsegpt"),
        *("--dataset", str(text), "--nsamples", "16", "--seqlen", "128"),
        *(() if limit is None else ("--hessian-memory", limit)),
    ]
    found = peak.run(command, log=folder / "memory.log")
    return {"bytes": found.bytes, "seconds": found.seconds}


def report(found: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown tables."""
    lines = [f"dense: perplexity {found['dense']['perplexity']:.3f} per byte", ""]
    lines += ["| method | perplexity |", "| --- | ---: |"]
    lines += [f"| {name} | {found[name]['perplexity']:.3f} |" for name in METHODS if name in found]
    head = "| method | sequences | --expert-tokens | by wanda | perplexity |"
    lines += ["", head, "| --- | ---: | ---: | ---: | ---: |"]
    for method, nsamples, least in tried():
        row = found.get(f"{method} {nsamples} {least}")
        if row is not None:
            share = f"{row['few']} of {row['layers']}"
            figures = f"{nsamples} | {least} | {share} | {row['perplexity']:.3f}"
            lines.append(f"| {method} | {figures} |")
    lines += ["", "| experts | peak MiB | seconds |", "| --- | ---: | ---: |"]
    for experts in MEMORY:
        row = found.get(f"memory {experts}")
        if row is not None:
            lines.append(f"| {experts} | {row['bytes'] / 2**20:.0f} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the tables; `FOLDER/moe.json` has the figures, and what is in it is not run again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/prox24-moe"))
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--without-memory", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    texts = split_text(options.text, options.folder)
    model, path = options.folder / "model", options.folder / "moe.json"
    found = json.loads(path.read_text()) if path.exists() else {}

    def note(name: str, row: dict[str, Any]) -> None:
        found[name] = row
        path.write_text(json.dumps(found, indent=1))

    if not (model / "config.json").exists():
        train(model, texts[0], options.experts, options.steps)
    if "dense" not in found:
        note("dense", {"perplexity": perplexity(model, texts[1])})
    output = options.folder / "out"
    for name, own in METHODS.items():
        if name not in found:
            note(name, pruned(model, texts, output, nsamples=128, **own))
    for method, nsamples, least in tried():
        if (name := f"{method} {nsamples} {least}") not in found:
            own = {"method": method, "nsamples": nsamples, "expert_tokens": least}
            note(name, pruned(model, texts, output, **own))
    for experts, limit in MEMORY.items():
        if (name := f"memory {experts}") not in found and not options.without_memory:
            count = int(str(experts).partition(",")[0])
            note(name, memory(options.folder, texts[0], count, limit))
    print(report(found))


if __name__ == "__main__":
    main()
