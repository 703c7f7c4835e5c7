"""Peak memory of whole jobs on models of the shapes that matter, made of random weights here.

`70b`: two blocks of Llama-3.1-70B's exact shape through wanda. `deep`: two and four blocks of
hidden 1,024 through prox_admm, whose peaks must not differ. `store`: activations several times
as large as the memory that the workers may take.

    python benchmarks/memory.py 70b deep store --folder /tmp/prox24-memory
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peak import Peak, run
from tests.support.jobs import write_text
from tests.support.tiny_models import byte_tokenizer

LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 2,
}


def small(blocks: int) -> dict[str, int]:
    """Blocks of hidden 1,024 and intermediate 4,096."""
    return {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_hidden_layers": blocks,
    }


def make_model(folder: Path, shape: dict[str, int], positions: int) -> None:
    """A Llama of random bf16 weights, one weight file a block, written tensor by tensor."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=1024,
        max_position_embeddings=positions,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        **shape,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    files: dict[str, list[str]] = {}
    for name in model.state_dict():
        block = name.split(".")[2] if ".layers." in name else "ends"
        files.setdefault(f"model-{block}.safetensors", []).append(name)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    total = 0
    for file, names in files.items():
        tensors = {name: random_tensor(shapes[name], generator) for name in names}
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    byte_tokenizer().save_pretrained(folder)
    config.save_pretrained(folder)


def random_tensor(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Ones for a norm, else normal values whose products keep the scale of their input."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    scale = shape[-1] ** -0.5
    return torch.randn(shape, generator=generator, dtype=torch.bfloat16).mul_(scale)


def prune(folder: Path, model: Path, name: str, *options: str) -> Peak:
    """One job; its output and run directory are removed."""
    text = write_text(folder / "text.txt", characters=1 << 18)
    output = folder / f"pruned-{name}"
    for left in (output, output.with_name(output.name + ".run")):
        shutil.rmtree(left, ignore_errors=True)
    command = [sys.executable, "-m", "cluster", "prune", str(model), str(output)]
    peak = run(
        [*command, "--dataset", str(text), *options],
        log=folder / f"{name}.log",
        environment={"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
    )
    summary = json.loads((folder / f"pruned-{name}.run/report/summary.json").read_text())
    gib = {key: f"{value / 2**30:.2f}" for key, value in summary["memory"].items()}
    parts = ", ".join(f"{key} {value / 2**30:.2f}" for key, value in peak.by_name.items())
    print(
        f"{name}: {peak.seconds:.0f} s, all processes {peak.bytes / 2**30:.2f} GiB ({parts}), "
        f"the largest {peak.single / 2**30:.2f} GiB; peak RSS {gib}",
        flush=True,
    )
    shutil.rmtree(output)
    shutil.rmtree(output.with_name(output.name + ".run"))
    return peak


def measure_70b(folder: Path) -> None:
    """Llama-3.1-70B's block shape, two blocks, wanda, 4 x 512 tokens."""
    model = folder / "70b"
    make_model(model, LLAMA_70B, 512)
    prune(
        *(folder, model, "70b", "--method", "wanda", "--nsamples", "4", "--seqlen", "512"),
        *("--workers", "1", "--batch-size", "1"),
    )


def measure_deep(folder: Path) -> None:
    """The same peak for two blocks and for four."""
    peaks = []
    for blocks in (2, 4):
        model = folder / f"small-{blocks}"
        make_model(model, small(blocks), 512)
        options = ("--nsamples", "8", "--seqlen", "512", "--workers", "2", "--batch-size", "1")
        peaks.append(prune(folder, model, f"deep-{blocks}", *options).bytes)
    print(f"deep: four blocks take {peaks[1] / peaks[0]:.3f} times the memory of two")


def measure_store(folder: Path) -> None:
    """A store several times as large as what a worker holds beyond its constant."""
    model = folder / "small-2"
    make_model(model, small(2), 512)
    peaks = []
    for nsamples in (16, 512):
        store = nsamples * 512 * 1024 * 2
        options = ("--nsamples", str(nsamples), "--seqlen", "512", "--method", "wanda")
        peak = prune(folder, model, f"store-{nsamples}", *options, "--workers", "1")
        peaks.append(peak.bytes)
        print(f"store: {nsamples} sequences, two stores of {store / 2**20:.0f} MiB")
    print(f"store: 32 times the activations take {peaks[1] / peaks[0]:.3f} times the memory")


def main() -> None:
    """Runs the cases that were named."""
    parser = argparse.ArgumentParser(description=__doc__)
    cases = {"70b": measure_70b, "deep": measure_deep, "store": measure_store}
    parser.add_argument("cases", nargs="+", choices=cases)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/prox24-memory"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print(time.strftime("%Y-%m-%d"), resource.getpagesize(), "bytes a page")
    for case in options.cases:
        cases[case](options.folder)


if __name__ == "__main__":
    main()
