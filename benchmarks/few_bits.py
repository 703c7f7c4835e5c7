"""Models in few bits against the same models in bfloat16: bytes, and a job's peak memory.

`fp8`: two blocks of Llama-3.1-8B's shape in FP8 by blocks of 128 x 128. `mxfp4`: two blocks of
gpt-oss's shape, with 8 experts, in MXFP4. Each is pruned as it is stored and as the bfloat16 model
that transformers makes of it, whose tensors must be those that prox24 reads, to the byte.

    python benchmarks/few_bits.py fp8 mxfp4 --folder /tmp/prox24-few-bits
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, GptOssConfig, Mxfp4Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.memory import make_model, prune
from pipeline.formats.open_model import open_model
from tests.support.few_bits import fp8_model, mxfp4_model
from tests.support.tiny_models import byte_tokenizer

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 2,
}
JOB = ("--method", "wanda", "--nsamples", "4", "--seqlen", "256", "--batch-size", "1")


def make_gpt_oss(folder: Path) -> None:
    """Random bf16 weights of gpt-oss's hidden sizes."""
    config = GptOssConfig(
        vocab_size=1024,
        num_hidden_layers=2,
        num_local_experts=8,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        dtype="bfloat16",
        architectures=["GptOssForCausalLM"],
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def compare(source: Path, plain: Path, quantization: Any) -> None:
    """Writes the bfloat16 model that prox24 reads to `plain`; compares it with transformers'."""
    files = open_model(source)
    began = time.monotonic()
    shutil.copytree(files.folder, plain)
    size = 0
    for name in files.files:
        with files.source.open(name) as stream, open(plain / name, "wb") as target:
            while chunk := stream.read(2**23):
                size += target.write(chunk)
    seconds = time.monotonic() - began
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=quantization
    )
    expected, same = model.state_dict(), 0
    for name in files.files:
        with safe_open(plain / name, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118, it is no mapping
                assert torch.equal(opened.get_tensor(key), expected[key]), key
                same += 1
    assert same == len(expected)
    stored = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    print(
        f"{source.name}: {stored / 2**30:.2f} GiB stored, {size / 2**30:.2f} GiB in bfloat16, read "
        f"in {seconds:.1f} s; all {same} tensors are transformers' own",
        flush=True,
    )


def measure(folder: Path, name: str) -> None:
    """One model, both ways."""
    source, plain = folder / name, folder / f"{name}-bf16"
    for left in (source, plain):
        shutil.rmtree(left, ignore_errors=True)
    if name == "fp8":
        make_model(source, LLAMA_8B, 512)
        fp8_model(source, (128, 128))
        compare(source, plain, FineGrainedFP8Config(dequantize=True))
    else:
        make_gpt_oss(source)
        mxfp4_model(source)
        compare(source, plain, Mxfp4Config(dequantize=True))
    peaks = [
        prune(folder, model, model.name, *JOB, "--workers", "1", "--threads", "1")
        for model in (source, plain)
    ]
    few, wide = (peak.bytes for peak in peaks)
    print(f"{name}: {few / wide:.3f} times the memory of bfloat16, {few - wide:+,} bytes")


def main() -> None:
    """Runs the cases that were named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", choices=["fp8", "mxfp4"])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/prox24-few-bits"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for case in options.cases:
        measure(options.folder, case)


if __name__ == "__main__":
    main()
