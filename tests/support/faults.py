"""Ray workers that are struck by a real signal at a chosen point of a chosen phase.

A plan lies in a folder of its own; each fault of it strikes a number of times over all the
processes that come to its point, and leaves a file each time that says when.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import importlib
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from actors.worker import RankActor, Whereabouts
from pipeline.loop.rank import Call
from storage.run.shared_folders import Marked

# Where a worker may be struck: the function at whose n-th call in the phase it happens.
POINTS = {
    "build": "pipeline.worker.block_worker:open_skeleton",
    "join": "pipeline.statistics.all_reduce:Collective.__init__",
    "load": "pipeline.models.skeleton:Skeleton.load_block",
    "hash": "pipeline.worker.block_worker:fingerprint_weight_file",
    "accumulate": "pipeline.statistics.accumulate:GroupAccumulator.add",
    "sum": "pipeline.statistics.all_reduce:Collective.sum",
    "choice": "pipeline.worker.solve:choose_regularization",
    "solver": "pipeline.worker.solve_phases:solve_group",
    "write": "storage.files.commit:HashingWriter.write",
    "outputs": "pipeline.worker.forward:_finite",
    "gradient": "pipeline.worker.training.rank_training:RankTraining._to_owner",
    "judge": "pipeline.worker.training.rank_training:RankTraining.judge",
    "loss": "pipeline.models.forward_capture:ModelEnds.logits",
}


# As torch words them.
DEVICE_ERRORS: dict[str, Exception] = {
    "GPU": torch.AcceleratorError(
        "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be "
        "asynchronously reported at some other API call, so the stacktrace below might be "
        "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
    ),
    "GPU memory": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB "
        "of which 3.52 GiB is free. If reserved but unallocated memory is large try setting "
        "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
    ),
    "NCCL": torch.distributed.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:3356, unhandled cuda error (run with NCCL_DEBUG=INFO "
        "for details), NCCL version 2.27.5\nncclUnhandledCudaError: Call to CUDA function failed."
    ),
    "NCCL peer": torch.distributed.DistBackendError(
        "NCCL error in: NCCLUtils.cpp:77, remote process exited or there was a network error, "
        "NCCL version 2.27.5\nncclRemoteError: A call failed possibly due to a network error"
    ),
}


@dataclass(frozen=True)
class Fault:
    """At the `call`-th call of a point in a phase (of a block, or of any), on one rank.

    `what`: a signal's name, "memory" for an allocation without end, "NaN" in the point's first
    argument, a key of `DEVICE_ERRORS`, or an exception's name.
    """

    phase: str
    point: str
    call: int = 1
    block: int | None = None
    rank: int = 1
    what: str = "SIGKILL"
    times: int = 1

    @property
    def name(self) -> str:
        where = "any" if self.block is None else f"{self.block}"
        return f"{self.phase}-{self.point}-{self.call}-{where}-{self.rank}"


class Plan:
    """The faults of one job, and what became of them."""

    def __init__(self, folder: Path, faults: Sequence[Fault] = ()) -> None:
        self.folder = folder
        self.path = self.folder / "plan.json"
        if faults:
            self.folder.mkdir(parents=True)
            self.path.write_text(json.dumps([dataclasses.asdict(fault) for fault in faults]))

    def faults(self) -> list[Fault]:
        if not self.path.exists():
            return []
        return [Fault(**fault) for fault in json.loads(self.path.read_text())]

    def strike_now(self, fault: Fault) -> bool:
        """Whether the fault has strikes left; takes one."""
        for number in range(fault.times):
            try:
                with open(self.folder / f"{fault.name}.{number}", "x") as file:
                    json.dump({"time": time.time(), "pid": os.getpid()}, file)
                return True
            except FileExistsError:
                continue
        return False

    def make_blind(self, rank: int) -> None:
        """From now on that rank's node does not see the folders that the driver sees."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / f"blind-{rank}").touch()

    def blind(self, rank: int) -> bool:
        return (self.folder / f"blind-{rank}").exists()

    def struck(self, fault: Fault) -> list[dict[str, Any]]:
        """When and which process, for each strike."""
        paths = sorted(self.folder.glob(f"{fault.name}.*"))
        return [json.loads(path.read_text()) for path in paths]

    def log(self, rank: int, phase: str, block: int | None) -> None:
        line = {"time": time.time(), "rank": rank, "phase": phase, "block": block,
                "pid": os.getpid()}  # fmt: skip
        with open(self.folder / "log", "a") as file:
            file.write(json.dumps(line) + "\n")

    def phases(self) -> list[dict[str, Any]]:
        """Every phase that a rank began, in order."""
        return [json.loads(line) for line in (self.folder / "log").read_text().splitlines()]


class FaultyActor(RankActor):
    """A rank of a job that has a plan; see `faulty`."""

    plan_folder: ClassVar[Path]

    def where(self) -> Whereabouts:
        self._install()
        return super().where()

    def check_folders(self, marks: tuple[Marked, ...]) -> list[str]:
        if self._plan.blind(self.rank):
            # Its node has another folder at the same path.
            marks = tuple(dataclasses.replace(m, place=f"{m.place}-of-its-own") for m in marks)
        return super().check_folders(marks)

    def join(self, host: str, port: int, backend: str, timeout: float, nodes: int = 1) -> None:
        self._enter("join", None)
        super().join(host, port, backend, timeout, nodes)

    def perform(self, call: Call[Any]) -> Any:
        phase, block = call.phase, call.block
        if phase == "reduce":
            # It is told no block: it is the one that was observed last.
            block = self._observed
        self._enter(phase, block)
        if block is not None and phase in ("calibrate", "advance"):
            self._observed = block + (phase == "advance")
        return super().perform(call)

    def _install(self) -> None:
        self._plan = Plan(self.plan_folder)
        self._observed: int | None = None
        self._enter("start", None)
        for point in {f.point for f in self._plan.faults() if f.rank == self.rank}:
            module, _, path = POINTS[point].partition(":")
            owner: Any = importlib.import_module(module)
            *parents, name = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            setattr(owner, name, self._wrapped(point, getattr(owner, name)))

    def _enter(self, phase: str, block: int | None) -> None:
        self._phase, self._block, self._calls = phase, block, dict[str, int]()
        if self._plan.folder.exists():
            self._plan.log(self.rank, phase, block)

    def _wrapped(self, point: str, function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._calls[point] = self._calls.get(point, 0) + 1
            for fault in self._plan.faults():
                here = (fault.phase, fault.point, fault.call, fault.rank)
                if here != (self._phase, point, self._calls[point], self.rank):
                    continue
                if fault.block in (None, self._block) and self._plan.strike_now(fault):
                    if fault.what == "NaN":
                        args[0].view(-1)[0] = float("nan")
                    else:
                        strike(fault.what)
            return function(*args, **kwargs)

        return call


def faulty(plan: Plan) -> type[FaultyActor]:
    """The actor class of a job with that plan. Ray pickles it by value: it has no module."""
    return type("RankActor", (FaultyActor,), {"plan_folder": plan.folder, "__module__": "planned"})


def strike(what: str) -> None:
    """Does it to this very process."""
    if what.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[what])
    elif what == "memory":
        held = []
        while True:
            held.append(b"x" * (64 << 20))
            time.sleep(0.02)
    elif what in DEVICE_ERRORS:
        raise DEVICE_ERRORS[what]
    else:
        raise getattr(builtins, what)("planted")
