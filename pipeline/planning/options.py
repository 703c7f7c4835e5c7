"""The options of `prox24 plan`, and the job they describe.

The options alone need no torch, which `PlannedJob` and `read_shape` import.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config.effect import refuse_of_model
from pipeline.config.fields import Given, option, require
from pipeline.config.layers import NO_EXPERTS, ExpertOptions
from pipeline.config.prune import ModelOptions
from pipeline.config.solver import unless_calibrated, unless_hessians
from pipeline.planning.rates import GPUS, Rates, cpu_rates, gpu_rates, load_rates, with_threads
from pipeline.runtime.free_memory import available_memory
from storage.errors import ConfigError, ModelError
from storage.object_store import Place

if TYPE_CHECKING:
    from pipeline.planning.planned_job import PlannedJob
    from pipeline.planning.shapes.model import ModelShape

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)b?", re.IGNORECASE)
_GPUS_PER_NODE = 8


def unless_gpus(config: Any) -> str | None:
    """The condition of what concerns GPUs; rates that were measured may be those of one."""
    if config.gpus is not None or config.rates is not None:
        return None
    return "without --gpus the plan is for CPU workers"


def unless_by_data_sheet(config: Any) -> str | None:
    """The condition of what names a data sheet."""
    return unless_gpus(config) if config.rates is None else "--rates says how fast a worker is"


def unless_cpu(config: Any) -> str | None:
    """The condition of what concerns the CPU of a worker."""
    if config.gpus is not None:
        return "with --gpus workers compute on GPUs"
    if config.rates is not None and not config.calibrate:
        return "--rates says how fast a worker is"
    return None


@dataclass(frozen=True, kw_only=True)
class PlanConfig(ModelOptions, ExpertOptions, Given):
    """Every option of `prox24 plan`. Raises `ConfigError` on a value out of range."""

    nsamples: int = option(128, "calibration sequences", unused=unless_calibrated, noted=True)
    seqlen: int = option(
        2048, "tokens of a calibration sequence", unused=unless_calibrated, noted=True
    )
    batch_size: int = option(
        4, "sequences in one forward pass", unused=unless_calibrated, noted=True
    )
    hessian_memory: float | None = option(
        None,
        "GB of Hessians that a worker may hold at once, as for `prune`; unset: half of a GPU's "
        "memory, any number on a CPU",
        unused=unless_hessians,
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None,
        "dtype of the forward passes; unset: the source's",
        unused=unless_calibrated,
        noted=True,
    )
    gpus: int | None = option(
        None, "GPUs in all, one worker each; unset: CPU workers of this machine"
    )
    gpu: str = option(
        "H100", f"kind of GPU, by its data sheet: {', '.join(GPUS)}", unused=unless_by_data_sheet
    )
    gpu_memory: str | None = option(
        None, "memory of a GPU, as in 80GB; unset: the data sheet's", unused=unless_gpus
    )
    nodes: int | None = option(None, "nodes; unset: 8 GPUs to a node, CPU workers on one")
    node_memory: str | None = option(
        None, "host memory of a node, as in 1TB; unset: for CPU workers what this machine has free"
    )
    workers: int | None = option(None, "CPU workers; unset: 1")
    threads: int | None = option(
        None,
        "CPU threads of a worker; unset: this machine's cores divided by the workers",
        unused=unless_cpu,
    )
    disk: str | None = option(
        None, "free disk, as in 2TB; unset: for CPU workers what the current folder has"
    )
    disk_speed: str | None = option(
        None, "what the shared filesystem writes in a second, as in 5GB; it reads twice as much"
    )
    network_speed: str | None = option(
        None, "what a worker sends to another node in a second, as in 25GB"
    )
    rates: str | None = option(
        None,
        "file of rates that --calibrate wrote; unset: data sheets and stated efficiencies",
        path=True,
    )
    calibrate: bool = option(
        False, "measure the rates of this machine first, at the model's shapes (about a minute)"
    )
    executor: Literal["ray", "local"] = option("ray", "what runs the workers")
    trust_remote_code: bool = option(False, "run model code that the model folder carries")
    json: bool = option(False, "print one JSON object on standard output and nothing else there")
    verbose: bool = option(False, "show debug messages")
    debug: bool = option(False, "show the traceback of an error")

    def __post_init__(self) -> None:
        ModelOptions.__post_init__(self)
        ExpertOptions.__post_init__(self)
        for name in ("nsamples", "batch_size", "gpus", "nodes", "workers", "threads"):
            require(self, name, at_least=1)
        require(self, "seqlen", at_least=2)
        for name in ("gpu_memory", "node_memory", "disk", "disk_speed", "network_speed"):
            if getattr(self, name):
                size_of(getattr(self, name), name.replace("_", "-"))
        workers = self.gpus or self.workers or 1
        if self.nodes is not None and self.nodes > workers:
            raise ConfigError(f"--nodes {self.nodes} is more than the {workers} workers")
        if self.gpus is not None and self.workers is not None:
            raise ConfigError("--gpus counts workers already: leave --workers out")
        if self.gpus is not None and self.calibrate:
            raise ConfigError("--calibrate measures this machine's CPU: leave --gpus out")
        if self.calibrate and self.rates is None:
            raise ConfigError("--calibrate writes what it measures: name the file with --rates")


def size_of(text: str, name: str) -> float:
    """Bytes of `80GB`, `1.5 TiB` or a number. Raises `ConfigError` that names the option `name`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--{name} {text!r} is not a size: write it as in 80GB or 1.5TiB")
    number, prefix, binary = match.groups()
    power = " kmgtp".index(prefix.lower() or " ")
    return float(number) * (1024.0 if binary else 1000.0) ** power


def planned_shape(model: Place, config: PlanConfig) -> ModelShape:
    """The shape of the model with these options.

    Raises `ModelError` for a model that `prune` would refuse.
    """
    from pipeline.planning.shapes.model import read_shape

    shape = read_shape(
        model,
        seqlen=config.seqlen,
        rules=config.layer_rules(),
        all_experts=config.calibrate_all_experts,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )
    if shape.unsupported is not None:
        raise ModelError(f"{shape.name}: {shape.unsupported}; this architecture is not supported")
    if not any(group.kept for kind in shape.kinds for group in kind.groups):
        refuse_of_model(config, {"experts": NO_EXPERTS})
    return shape


def planned_job(shape: ModelShape, config: PlanConfig, rates: Rates | None = None) -> PlannedJob:
    """The job that the options describe. rates: measured ones; None: those of the options."""
    from pipeline.planning.planned_job import PlannedJob

    on_gpus = config.gpus is not None
    workers = config.gpus or config.workers or 1
    nodes = config.nodes or (-(-workers // _GPUS_PER_NODE) if on_gpus else 1)
    rates = rates or worker_rates(config)
    memory = size_of(config.gpu_memory, "gpu-memory") if config.gpu_memory else rates.device_memory
    # CPU workers would run on this machine, GPU workers on others.
    if config.node_memory:
        host: float | None = size_of(config.node_memory, "node-memory")
    else:
        host = None if on_gpus else available_memory()
    free = None if on_gpus else float(shutil.disk_usage(Path.cwd()).free)
    return PlannedJob(
        shape=shape,
        settings=config.solver_settings(config.method),
        nsamples=config.nsamples,
        seqlen=config.seqlen,
        batch_size=config.batch_size,
        workers=workers,
        nodes=nodes,
        rates=rates,
        host_memory=host,
        device_memory=memory if rates.on_gpu else 0.0,
        disk=size_of(config.disk, "disk") if config.disk else free,
        in_process=config.executor == "local",
        hessian_memory=None if config.hessian_memory is None else config.hessian_memory * 1e9,
        expert_tokens=config.expert_tokens,
        reconstruct=config.reconstruction(config.nsamples),
        threads=threads_of(config),
    )


def threads_of(config: PlanConfig) -> int:
    """CPU threads of a worker."""
    return config.threads or max(1, len(os.sched_getaffinity(0)) // (config.workers or 1))


def worker_rates(config: PlanConfig) -> Rates:
    """Rates from the file of `--rates`, else of the GPU, else of CPU threads.

    Rates that are options of their own replace them.
    """
    if config.rates is not None:
        rates = load_rates(Path(config.rates))
    elif config.gpus is not None:
        rates = gpu_rates(config.gpu)
    else:
        rates = with_threads(cpu_rates(), threads_of(config))
    if config.disk_speed is not None:
        speed = size_of(config.disk_speed, "disk-speed")
        rates = replace(rates, disk_write=speed, disk_read=2 * speed)
    if config.network_speed is not None:
        rates = replace(rates, network=size_of(config.network_speed, "network-speed"))
    if config.executor == "local":
        rates = replace(rates, start=0.0)
    return rates
