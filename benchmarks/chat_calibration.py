"""Calibration on all tokens of chats against the responses alone, and on plain text.

The chats are made here, by the model itself: a public study (SparseDecoding, 2026) calibrates on
the model's own answers. Everything else is done by the commands that users run.

    python benchmarks/chat_calibration.py MODEL --text TEXT.txt --folder /tmp/chat
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TOPICS = (
    *("bread", "tides", "chess", "volcanoes", "bicycles", "honey bees", "glaciers", "the violin"),
    *("vaccines", "maps", "tea", "bridges", "sleep", "comets", "paper", "whales", "rust", "salt"),
    *("printing", "clouds", "coral reefs", "clocks", "cotton", "earthquakes", "falcons", "glass"),
    *("insulin", "kites", "lighthouses", "magnets"),
)
QUESTIONS = (
    "Explain {} to a child.",
    "Write a short story about {}.",
    "What are three facts about {}?",
    "Why do people care about {}?",
)
ROWS = {
    "text": ("text", []),
    "chat, all tokens": ("chat", []),
    "chat, responses": ("chat", ["--calibrate-on", "responses"]),
}


def make_chats(model: str, path: Path, tokens: int) -> None:
    """The model's answers to all questions about all topics, sampled; one conversation a line."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    asked = [question.format(topic) for question in QUESTIONS for topic in TOPICS]
    torch.manual_seed(0)
    lines = []
    for start in range(0, len(asked), 24):
        part = [[{"role": "user", "content": text}] for text in asked[start : start + 24]]
        inputs = tokenizer.apply_chat_template(
            part, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
        )
        output = network.generate(
            **inputs, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_p=0.95
        )
        for messages, ids in zip(part, output, strict=True):
            answer = tokenizer.decode(
                ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True
            ).strip()
            lines.append(
                json.dumps({"messages": [*messages, {"role": "assistant", "content": answer}]})
            )
        print(f"{len(lines)} of {len(asked)} chats", file=sys.stderr)
    path.write_text("\n".join(lines) + "\n")


def prox24(*arguments: str) -> str:
    """Standard output of a prox24 command."""
    command = [sys.executable, "-m", "cluster", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def perplexity(model: str, text: Path) -> float:
    """The perplexity by `prox24 eval` at seqlen 512."""
    printed = prox24(
        *("eval", model, "--dataset", str(text), "--seqlen", "512", "--json"),
        *("--executor", "local", "--dtype", "float32", "--batch-size", "8"),
    )
    value: float = json.loads(printed)["perplexity"]
    return value


def main() -> None:
    """Writes the chats, prunes in each way, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--method", default="prox_admm")
    parser.add_argument("--nsamples", default="24")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    chats = folder / "all.jsonl"
    if not chats.exists():
        make_chats(options.model, chats, options.tokens)
    lines = chats.read_text().splitlines()
    # A question in four is kept aside for the evaluation, with its answer.
    aside = [line for number, line in enumerate(lines) if number % 4 == 3]
    used = [line for number, line in enumerate(lines) if number % 4 != 3]
    files = {"chat": folder / "chat.jsonl", "chat aside": folder / "aside.jsonl"}
    files["chat"].write_text("\n".join(used) + "\n")
    files["chat aside"].write_text("\n".join(aside) + "\n")
    whole = options.text.read_text(encoding="utf-8")
    files |= {"text": folder / "text.txt", "text aside": folder / "text-aside.txt"}
    files["text"].write_text(whole[: len(whole) * 4 // 5], encoding="utf-8")
    files["text aside"].write_text(whole[len(whole) * 4 // 5 :], encoding="utf-8")
    print(f"{'calibrated on':20} {'chat aside':>12} {'text aside':>12}")
    for name in ("dense", *ROWS):
        model = options.model
        if name != "dense":
            dataset, arguments = ROWS[name]
            model = str(folder / name.replace(", ", "-").replace(" ", "-"))
            prox24(
                *(
                    "prune",
                    options.model,
                    model,
                    "--dataset",
                    str(files[dataset]),
                    "--seqlen",
                    "512",
                ),
                *("--nsamples", options.nsamples, "--method", options.method, "--overwrite"),
                *("--executor", "local", "--no-report", "--dtype", "float32", *arguments),
            )
        figures = [perplexity(model, files[f"{kind} aside"]) for kind in ("chat", "text")]
        print(f"{name:20} {figures[0]:12.3f} {figures[1]:12.3f}", flush=True)


if __name__ == "__main__":
    main()
