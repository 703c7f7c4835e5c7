"""Compiles the Triton kernels for GPUs that are not here.

`python -m tests.support.compiled_kernels` prints a list as JSON: for each kernel, variant and GPU
the registers of a thread, and the bytes of its stack, where registers would be spilled to.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.config.pattern import Pattern
from pipeline.solvers.kernels import prox_triton, sparsegpt_triton, trial_triton
from pipeline.solvers.kernels.prox_operator import NEWTON_STEPS, NEWTON_TOLERANCE

GPUS = {"A100": 80, "H100": 90, "B200": 100}
# Pattern and columns of a call: the default, and the widest.
BLOCKS = (
    ("2:4", 128), ("4:8", 128), ("unstructured:0.5", 128), ("1:3", 129), ("2:4", 256),
)  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Name, kernel, types of its arguments, constants and options, as its launcher sets them."""
    for source, compute in DTYPES.items():
        limits = torch.finfo(compute)
        constants = {
            "BLOCK": prox_triton.BLOCKS[compute],
            "STEPS": NEWTON_STEPS[compute],
            "TOLERANCE": NEWTON_TOLERANCE[compute],
            "LARGEST": limits.max,
            "TINY": limits.tiny,
            "SMALL": prox_triton.SMALL[compute],
        }
        lambdas = "*fp64" if compute == torch.float64 else "*fp32"
        types = {"source": f"*{source}", "lambdas": lambdas, "target": f"*{source}"}
        types |= dict.fromkeys(("groups", "blocks"), "i32")
        options = {"num_warps": prox_triton.WARPS, "enable_fp_fusion": True}
        yield f"proximal operator, {source}", prox_triton._operator, types, constants, options
    types = {"source": "*fp32", "target": "*fp32"}
    yield "trial launch", trial_triton._double, types, {"BLOCK": 64}, {}
    for text, columns in BLOCKS:
        pattern = Pattern.parse(text)
        rows, padded, warps = sparsegpt_triton.tile_of(columns)
        constants = {
            "PRUNED": pattern.group - pattern.keep,
            "GROUP": pattern.group,
            "ROWS": rows,
            "WIDTH": padded,
        }
        types = {"weight": "*fp32", "mask": "*i1", "errors": "*fp32", "upper": "*fp32"}
        sizes = ("rows", "width", "weight_stride", "mask_stride", "upper_stride")
        types |= dict.fromkeys(sizes, "i32")
        options = {"num_warps": warps, "enable_fp_fusion": False}
        name = f"SparseGPT's block, {text}, {columns} columns"
        yield name, sparsegpt_triton._block, types, constants, options


def compile_for(
    capability: int,
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, int]:
    """Registers and stack bytes of the kernel as ptxas reports them."""
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    # Sizes and addresses of a real layer are multiples of 16.
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(types))}
    source = ASTSource(kernel, signature, dict(constants), aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report)
    assert found, report
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "stack": stack + local}


def main() -> None:
    rows = []
    for name, *rest in variants():
        for gpu, capability in GPUS.items():
            rows.append({"kernel": name, "gpu": gpu, **compile_for(capability, *rest)})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
