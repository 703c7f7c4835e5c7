"""How fast a machine is: measured rates, or a GPU's data sheet with assumed efficiencies.

Rates are those of one worker while all workers of its machine are busy, in SI units per second.
Those of the disk are for the filesystem that all nodes share.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.solvers.cost import BYTES_PER_ITERATION
from storage.errors import ConfigError
from storage.files.commit import replace_file
from storage.files.os_errors import file_errors
from storage.files.small_file import read_small

RATES_SCHEMA = 2  # 1: no tf32, and inverses counted as 2 C^3 operations

# Share of a data sheet's peak that matrix products reach in a job: assumptions, not measurements.
# cuBLAS on H100 reaches, in TFLOP/s at 8,192^3, 700 to 800 of 989 in bf16, 412 of 495 in TF32 and
# 50 of 67 in fp32 (public measurements); other shapes less.
PRODUCT_EFFICIENCY = {
    "bfloat16": 0.6,
    "float16": 0.6,
    "statistics": 0.6,
    "tf32": 0.83,
    "float32": 0.75,
    "float64": 0.7,
}
ATTENTION_EFFICIENCY = 0.3
BANDWIDTH_EFFICIENCY = 0.7
# The blocked inverse: narrow products, with small factorizations between them.
INVERSE_EFFICIENCY = 0.55


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates of a worker's device, its host, and the disk and network that it uses.

    Floating-point operations per second: bfloat16, float16, float32, float64: matrix products;
    tf32: those of iterations of a solve on a GPU; statistics: the products that are summed to
    Hessians (TF32 for 16-bit inputs on GPUs); attention; inverse: the fp32 inverse, about C^3
    operations; factor: the float64 factor.
    Bytes per second: memory: read and written by elementwise operators; hash: SHA-256 by one
    thread, with the copy to or from a file; copy: from a file in memory to a tensor on the device;
    check: hashed and checked for NaN; disk_read, disk_write: all workers together; link: sent by a
    worker within a node; network: sent by a worker between nodes.
    iteration: entries of the rows per second in an iteration of a solver, besides its product.
    Seconds: operator: to start an operator; sync: one fsync; dispatch: to start a phase and collect
    its results; start: to start the workers.
    Bytes: host_bytes, device_bytes: taken by a worker before it allocates tensors; device_memory:
    memory of the GPU, 0 on a CPU.
    """

    name: str
    measured: bool = False
    bfloat16: float
    float16: float
    float32: float
    tf32: float
    statistics: float
    float64: float
    attention: float
    inverse: float
    factor: float
    memory: float
    iteration: float
    operator: float
    hash: float
    copy: float
    check: float
    disk_read: float
    disk_write: float
    link: float
    network: float
    sync: float
    dispatch: float
    start: float
    host_bytes: float
    device_bytes: float
    device_memory: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type != "float":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            low = 0 if field.name in _MAY_BE_ZERO else 1e-300
            if not number or not low <= value < math.inf:
                raise ConfigError(f"rate {field.name} must be a positive number, not {value!r}")

    def product(self, precision: str) -> float:
        """Floating-point operations per second of matrix products in a precision."""
        return float(getattr(self, precision))

    @property
    def on_gpu(self) -> bool:
        """Whether the worker has a GPU."""
        return self.device_memory > 0

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict of JSON values."""
        return {"schema_version": RATES_SCHEMA, **dataclasses.asdict(self)}


_MAY_BE_ZERO = frozenset(
    {"operator", "sync", "dispatch", "start", "host_bytes", "device_bytes", "device_memory"}
)


@dataclass(frozen=True)
class DataSheet:
    """Data sheet of a GPU: dense TFLOP/s, memory in GB, bandwidth in GB/s, link in GB/s one way."""

    bfloat16: float
    tf32: float
    float32: float
    float64: float
    memory: float
    bandwidth: float
    link: float


# NVIDIA's data sheets, without sparsity; float64 with tensor cores where they support it.
GPUS: dict[str, DataSheet] = {
    "H100": DataSheet(989.0, 494.7, 67.0, 67.0, 80.0, 3350.0, 450.0),
    "H100-PCIe": DataSheet(756.0, 378.0, 51.0, 51.0, 80.0, 2000.0, 64.0),
    "H200": DataSheet(989.0, 494.7, 67.0, 67.0, 141.0, 4800.0, 450.0),
    "B200": DataSheet(2250.0, 1120.0, 75.0, 37.0, 180.0, 7700.0, 900.0),
    "A100-80GB": DataSheet(312.0, 156.0, 19.5, 19.5, 80.0, 2039.0, 300.0),
    "A100-40GB": DataSheet(312.0, 156.0, 19.5, 19.5, 40.0, 1555.0, 300.0),
    "L40S": DataSheet(362.0, 183.0, 91.6, 1.43, 48.0, 864.0, 32.0),
}


def gpu_rates(name: str) -> Rates:
    """Rates of a GPU of `GPUS`, with the efficiencies above. Raises `ConfigError` for others."""
    known_name = {known.lower(): known for known in GPUS}.get(name.lower().replace("_", "-"))
    if known_name is None:
        raise ConfigError(
            f"--gpu {name} is not known ({', '.join(GPUS)}); write its rates to a file and name it "
            "with --rates"
        )
    sheet = GPUS[known_name]
    tera = 1e12
    share = PRODUCT_EFFICIENCY
    bandwidth = sheet.bandwidth * 1e9 * BANDWIDTH_EFFICIENCY
    return Rates(
        name=known_name,
        bfloat16=sheet.bfloat16 * tera * share["bfloat16"],
        float16=sheet.bfloat16 * tera * share["float16"],
        statistics=sheet.tf32 * tera * share["statistics"],
        float32=sheet.float32 * tera * share["float32"],
        tf32=sheet.tf32 * tera * share["tf32"],
        float64=sheet.float64 * tera * share["float64"],
        attention=sheet.bfloat16 * tera * ATTENTION_EFFICIENCY,
        inverse=sheet.float32 * tera * INVERSE_EFFICIENCY,
        factor=sheet.float64 * tera * INVERSE_EFFICIENCY,
        memory=bandwidth,
        iteration=bandwidth / BYTES_PER_ITERATION,
        operator=6e-6,
        hash=1.2e9,
        copy=6e9,
        check=0.8e9,
        disk_read=10e9,
        disk_write=5e9,
        link=sheet.link * 1e9 * 0.6,
        network=25e9,
        sync=0.005,
        dispatch=0.02,
        start=30.0,
        host_bytes=2.5e9,
        device_bytes=1.0e9,
        device_memory=sheet.memory * 1e9,
    )


def cpu_rates() -> Rates:
    """Rates of one thread of a server CPU with AVX-512, used where nothing was measured."""
    return Rates(
        name="CPU thread",
        bfloat16=70e9,
        float16=40e9,
        statistics=80e9,
        float32=80e9,
        tf32=80e9,
        float64=40e9,
        attention=35e9,
        inverse=30e9,
        factor=25e9,
        memory=4e9,
        iteration=80e6,
        operator=2e-6,
        hash=0.9e9,
        copy=3e9,
        check=0.6e9,
        disk_read=2e9,
        disk_write=0.8e9,
        link=0.6e9,
        network=1e9,
        sync=0.005,
        dispatch=0.02,
        start=12.0,
        host_bytes=440 * 2**20,
        device_bytes=0.0,
        device_memory=0.0,
    )


_PER_THREAD = (
    "bfloat16", "float16", "statistics", "float32", "tf32", "float64", "attention", "inverse",
    "factor", "iteration",
)  # fmt: skip


def with_threads(rates: Rates, threads: int) -> Rates:
    """`rates`, those of one thread, for `threads` threads: memory and disk rates do not grow."""
    changed = {name: getattr(rates, name) * threads for name in _PER_THREAD}
    return replace(rates, **changed) if threads != 1 else rates


def save_rates(rates: Rates, path: Path) -> None:
    """Writes rates to a JSON file for `--rates`, which users may edit."""
    with replace_file(path) as writer:
        writer.write((json.dumps(rates.to_json(), indent=1) + "\n").encode())


def load_rates(path: Path) -> Rates:
    """Reads a file of rates, by `save_rates` or by a user.

    Raises `ConfigError` for a bad one, FileError where it cannot be read.
    """
    with file_errors("--rates"):
        raw = read_small(path)
    try:
        payload = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"--rates {path} is not JSON ({error}); --calibrate writes such a file"
        ) from error
    if not isinstance(payload, dict) or payload.pop("schema_version", None) != RATES_SCHEMA:
        raise ConfigError(
            f"--rates {path} is not a file of rates that this version reads; --calibrate writes one"
        )
    known = {field.name for field in dataclasses.fields(Rates)}
    wrong = sorted(known.symmetric_difference(payload) - {"measured"})
    if wrong:
        raise ConfigError(f"--rates {path}: {', '.join(wrong)} missing or unknown")
    return Rates(**payload)
