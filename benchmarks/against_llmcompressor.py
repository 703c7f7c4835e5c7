"""prox24 against llm-compressor's SparseGPTModifier: same tokens, same machine, one run.

llm-compressor lives in an environment of its own, whose Python is named:

    python -m venv /tmp/lc && /tmp/lc/bin/pip install torch==2.13.0 llmcompressor==0.14
    python benchmarks/against_llmcompressor.py MODEL --text wikitext2-valid.txt \
        --python /tmp/lc/bin/python
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROWS = {
    "prox24 sparsegpt": ["--method", "sparsegpt"],
    "prox24 prox_admm": [],
    "prox24 sparsegpt, float32": ["--method", "sparsegpt", "--dtype", "float32"],
}


def compress(model: Path, tokens: Path, output: Path, dtype: str) -> None:
    """Runs in llm-compressor's environment: 2:4 by its SparseGPTModifier, saved dense."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(2)
    ids = json.loads(tokens.read_text())
    data = Dataset.from_list([{"input_ids": i, "attention_mask": [1] * len(i)} for i in ids])
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(model)
    began = time.perf_counter()
    oneshot(
        model=loaded,
        tokenizer=tokenizer,
        dataset=data,
        recipe=SparseGPTModifier(
            sparsity=0.5,
            mask_structure="2:4",
            targets=["Linear"],
            ignore=["re:.*lm_head"],
        ),
        num_calibration_samples=len(ids),
        max_seq_length=len(ids[0]),
        shuffle_calibration_samples=False,
    )
    print(f"oneshot {time.perf_counter() - began:.1f} s", flush=True)
    loaded.save_pretrained(output, save_compressed=False)
    tokenizer.save_pretrained(output)


def perplexity(model: Path, options: argparse.Namespace, text: Path) -> float:
    """By `prox24 eval`, for both tools' outputs."""
    command = [sys.executable, "-m", "cluster", "eval", str(model), "--json", "--workers", "2"]
    found = subprocess.run(
        [
            *(*command, "--dataset", str(text), "--seqlen", str(options.seqlen)),
            *("--nsamples", str(options.evaluation_sequences), "--batch-size", "1"),
        ],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ).stdout
    return float(json.loads(found)["perplexity"])


def main() -> None:
    """Prints time, peak memory and perplexity of each, and ratios to llm-compressor's time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--python", type=Path, help="llm-compressor's Python")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/prox24-llmcompressor"))
    parser.add_argument("--nsamples", type=int, default=40)
    parser.add_argument("--evaluation-sequences", type=int, default=20)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--dtype", default="float32", help="of llm-compressor's model")
    parser.add_argument("--compress", nargs=2, type=Path, metavar=("TOKENS", "OUTPUT"))
    options = parser.parse_args()
    if options.compress:
        compress(options.model.absolute(), *options.compress, options.dtype)
        return
    sys.path.insert(0, str(ROOT))
    from benchmarks.peak import run
    from benchmarks.perplexity import split_text
    from storage.run.activations import read_tokens

    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    calibration, evaluation = split_text(options.text, folder)
    rows: dict[str, dict[str, Any]] = {}
    for name in options.rows:
        more = ROWS[name]
        output = folder / "pruned"
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(folder / "pruned.run", ignore_errors=True)
        command = [sys.executable, "-m", "cluster", "prune", str(options.model), str(output)]
        peak = run(
            [
                *(*command, *more, "--dataset", str(calibration), "--seqlen", str(options.seqlen)),
                *("--nsamples", str(options.nsamples), "--workers", "2", "--batch-size", "1"),
            ],
            log=folder / "prune.log",
            environment={"PYTHONPATH": str(ROOT)},
            interval=2.0,
        )
        rows[name] = {"seconds": peak.seconds, "gib": peak.bytes / 2**30}
        rows[name]["perplexity"] = perplexity(output, options, evaluation)
        print(name, rows[name], flush=True)
    tokens = folder / "tokens.json"
    ids, _ = read_tokens(folder / "pruned.run" / "tokens.arrow")
    tokens.write_text(json.dumps(ids.tolist()))
    output = folder / "compressed"
    shutil.rmtree(output, ignore_errors=True)
    peak = run(
        [
            *(str(options.python), __file__, str(options.model), "--dtype", options.dtype),
            *("--compress", str(tokens), str(output)),
        ],
        log=folder / "compress.log",
        environment={"OMP_NUM_THREADS": "2"},
        interval=2.0,
    )
    theirs = {"seconds": peak.seconds, "gib": peak.bytes / 2**30}
    theirs["perplexity"] = perplexity(output, options, evaluation)
    name = f"llm-compressor SparseGPT, {options.dtype}"
    rows[name] = theirs
    print("| tool | seconds | ratio | peak GiB, all processes | perplexity |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, row in rows.items():
        ratio = row["seconds"] / theirs["seconds"]
        figures = f"{row['seconds']:.0f} | {ratio:.2f} | {row['gib']:.2f}"
        print(f"| {name} | {figures} | {row['perplexity']:.2f} |")


if __name__ == "__main__":
    main()
