"""How fast a machine is: measured rates, or a GPU's data sheet with stated efficiencies.

All rates are of one worker while all workers of its machine work, in SI units per second; those of
the disk are of the filesystem that all nodes share.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from storage.errors import ConfigError
from storage.files.commit import replace_file

RATES_SCHEMA = 1

# Share of a data sheet's peak that products reach in a job: assumptions, not measurements of ours.
# cuBLAS on H100 gives 700 to 800 TFLOP/s of bf16's 989 on 8,192^3; smaller and odd shapes less.
PRODUCT_EFFICIENCY = {
    "bfloat16": 0.6,
    "float16": 0.6,
    "statistics": 0.6,
    "float32": 0.75,
    "float64": 0.7,
}
ATTENTION_EFFICIENCY = 0.3
BANDWIDTH_EFFICIENCY = 0.7
# The block inversion: thin products and small factors between them.
INVERSE_EFFICIENCY = 0.55
# What reaches memory in one iteration of ADMM or of conjugate gradients, for each entry of the
# rows, besides the product: twelve and fifteen fp32 reads or writes, some of them fused.
BYTES_PER_ITERATION = 92.0


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one worker's device, its host, and the disk and network around it do in a second.

    products by precision, attention: floating-point operations; statistics: of the products that
    Hessians are summed of (TF32 for 16-bit inputs on GPUs). inverse, factor: those of the fp32
    inverse and of the float64 factor. memory: bytes that operators move. iteration: entries of the
    rows that a solver's iteration works off, besides its product. operator: seconds to start one.
    hash: bytes of SHA-256 with the copy to or from a file. copy: bytes from a file in memory to a
    tensor on the device. check: bytes hashed and checked for NaN. disk_read, disk_write: bytes, all
    workers together. link: bytes a worker sends within a node, network: between nodes.
    sync: seconds of one fsync. dispatch: seconds to start a phase and collect it.
    start: seconds to start the workers. host_bytes, device_bytes: what a worker takes before it
    holds a tensor. device_memory: bytes of the device, 0 where that is the host's memory.
    """

    name: str
    measured: bool = False
    bfloat16: float
    float16: float
    float32: float
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
        """Floating-point operations a second of matrix products."""
        return float(getattr(self, precision))

    @property
    def on_gpu(self) -> bool:
        """Whether the device has memory of its own."""
        return self.device_memory > 0

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values."""
        return {"schema_version": RATES_SCHEMA, **dataclasses.asdict(self)}


_MAY_BE_ZERO = frozenset(
    {"operator", "sync", "dispatch", "start", "host_bytes", "device_bytes", "device_memory"}
)


@dataclass(frozen=True)
class DataSheet:
    """A GPU by its maker's data sheet: dense TFLOP/s, GB, GB/s, and GB/s one way between GPUs."""

    bfloat16: float
    tf32: float
    float32: float
    float64: float
    memory: float
    bandwidth: float
    link: float


# NVIDIA's data sheets, without sparsity; float64 is that of the tensor cores where they have it.
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
    """Rates of a GPU known by name, with the efficiencies above. Raises `ConfigError`."""
    found = {known.lower(): known for known in GPUS}.get(name.lower().replace("_", "-"))
    if found is None:
        raise ConfigError(
            f"--gpu {name} is not known ({', '.join(GPUS)}); measure one with --calibrate and give "
            "its --rates"
        )
    sheet = GPUS[found]
    tera = 1e12
    share = PRODUCT_EFFICIENCY
    bandwidth = sheet.bandwidth * 1e9 * BANDWIDTH_EFFICIENCY
    return Rates(
        name=found,
        bfloat16=sheet.bfloat16 * tera * share["bfloat16"],
        float16=sheet.bfloat16 * tera * share["float16"],
        statistics=sheet.tf32 * tera * share["statistics"],
        float32=sheet.float32 * tera * share["float32"],
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
    """Rates of one thread of a server core with AVX-512, where nothing was measured."""
    return Rates(
        name="CPU thread",
        bfloat16=70e9,
        float16=40e9,
        statistics=80e9,
        float32=80e9,
        float64=40e9,
        attention=35e9,
        inverse=60e9,
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
    "bfloat16", "float16", "statistics", "float32", "float64", "attention", "inverse", "factor",
    "iteration",
)  # fmt: skip


def with_threads(rates: Rates, threads: int) -> Rates:
    """Rates of a worker with `threads` times the threads: compute grows, memory and disk do not."""
    changed = {name: getattr(rates, name) * threads for name in _PER_THREAD}
    return replace(rates, **changed) if threads != 1 else rates


def save_rates(rates: Rates, path: Path) -> None:
    """Writes rates to a JSON file for `--rates`, which people may edit."""
    with replace_file(path) as writer:
        writer.write((json.dumps(rates.to_json(), indent=1) + "\n").encode())


def load_rates(path: Path) -> Rates:
    """Reads rates that `save_rates` wrote, or a user who has measured. Raises `ConfigError`."""
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--rates {path} cannot be read: {error}") from error
    if not isinstance(payload, dict) or payload.pop("schema_version", None) != RATES_SCHEMA:
        raise ConfigError(f"--rates {path} is no file of rates; --calibrate writes one")
    known = {field.name for field in dataclasses.fields(Rates)}
    wrong = sorted(known.symmetric_difference(payload) - {"measured"})
    if wrong:
        raise ConfigError(f"--rates {path}: {', '.join(wrong)} missing or unknown")
    return Rates(**payload)
