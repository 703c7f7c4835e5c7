"""The whole job on one GPU without Ray: uninterrupted, and killed and resumed; same bytes.

Random weights, made on the spot: this shows plumbing, determinism, time and memory, not accuracy.

    python benchmarks/gpu_job.py --folder /tmp/gpu-job
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pydoc_data.topics
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))


def command(model: Path, output: Path, text: Path, options: argparse.Namespace) -> list[str]:
    """The job as its user types it."""
    return [
        *(sys.executable, "-m", "cluster", "prune", str(model), str(output)),
        *("--executor", "local", "--device", options.device, "--dataset", str(text)),
        *("--nsamples", str(options.nsamples), "--seqlen", str(options.seqlen)),
        *("--method", options.method),
    ]


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/prox24-gpu-job"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--method", default="prox_admm")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=1024)
    options = parser.parse_args()
    import torch

    from tests.support.tiny_models import save_tiny_model

    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    model = save_tiny_model(
        options.folder / "model",
        "llama",
        blocks=options.blocks,
        hidden=options.hidden,
        intermediate=options.intermediate,
        positions=options.seqlen,
        num_attention_heads=16,
        num_key_value_heads=4,
        dtype=torch.bfloat16,
    )
    text = options.folder / "text.txt"
    text.write_text("\n\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")

    whole = options.folder / "whole"
    began = time.monotonic()
    subprocess.run(command(model, whole, text, options), cwd=REPOSITORY, check=True)
    seconds = time.monotonic() - began

    killed = options.folder / "killed"
    process = subprocess.Popen(command(model, killed, text, options), cwd=REPOSITORY)
    record = killed.with_name("killed.run") / "checkpoints" / "block-001" / "record.json"
    while not record.exists():
        if process.poll() is not None:
            raise SystemExit("the job ended before it could be killed")
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(command(model, killed, text, options), cwd=REPOSITORY, check=True)

    summary = json.loads((options.folder / "whole.run" / "report" / "summary.json").read_text())
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name() if "cuda" in options.device else "cpu",
                "torch": torch.__version__,
                "date": time.strftime("%Y-%m-%d"),
                "same_bytes_after_kill": digest(whole) == digest(killed),
                "seconds": seconds,
                "split": summary["seconds"],
                "memory": summary["memory"],
                "errors": [block["relative_error"] for block in summary["blocks"]],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
