"""Examines the machine that it runs on: all probes that need no other node, each with a limit."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.doctor.environment import shown_environment, started_with
from pipeline.doctor.facts import Answer, NodeFacts, SumAnswer, Sums
from pipeline.doctor.run_probe import run_probe, run_probes

# Ranks of the sum on a machine without GPUs: enough to meet.
_CPU_RANKS = 2
_LOCALHOST = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a node is asked. folders: path -> the driver's marker there, None if there is none.

    rank: the node's number, by which it answers markers. seconds: the limit of each probe.
    """

    folders: Mapping[str, Mapping[str, str] | None]
    rank: int
    seconds: float


def examine(request: Request, environment: Mapping[str, str]) -> dict[str, Answer]:
    """The answers of all probes, by name; `folder PATH` for each folder.

    environment: of the probes' processes. The trial launch is tried where torch sees a GPU.
    """
    names = ("versions", "torch", "driver", "space")
    answers = run_probes(names, {}, request.seconds, environment)
    for path, mark in request.folders.items():
        arguments = {"path": path, "mark": mark, "rank": request.rank}
        answers[f"folder {path}"] = run_probe("folder", arguments, request.seconds, environment)
    if (answers["torch"].value or {}).get("devices"):
        answers["kernel"] = run_probe("kernel", {}, request.seconds, environment)
    return answers


def this_machine(
    folders: Sequence[str], seconds: float, environment: Mapping[str, str]
) -> tuple[NodeFacts, Sums]:
    """What is known of this machine alone, without Ray, and the sum over its GPUs.

    Without a GPU two processes sum with gloo.
    """
    request = Request(folders=dict.fromkeys(folders), rank=0, seconds=seconds)
    node = NodeFacts(
        name=socket.gethostname(),
        answers=examine(request, environment),
        environment=shown_environment(started_with()),
    )
    return node, _sums_here(node, seconds, environment)


def _sums_here(node: NodeFacts, seconds: float, environment: Mapping[str, str]) -> Sums:
    if not (build := node.value("torch")):
        return Sums(reason="torch does not answer")
    gpus = len(build["devices"])
    world, backend = (gpus, "nccl") if gpus else (_CPU_RANKS, "gloo")
    port = free_port(_LOCALHOST)
    arguments = [
        sum_arguments(
            rank, world, _LOCALHOST, port, backend, f"cuda:{rank}" if gpus else "cpu", seconds
        )
        for rank in range(world)
    ]
    # As between the workers of one machine: whatever its host name resolves to.
    here = {"GLOO_SOCKET_IFNAME": "lo", **environment}
    answers = run_sums(arguments, seconds, here)
    return Sums(
        backend=backend, ranks=tuple(SumAnswer(node=node.name, answer=each) for each in answers)
    )


def run_sums(
    arguments: Sequence[Mapping[str, Any]], seconds: float, environment: Mapping[str, str]
) -> list[Answer]:
    """The answers of several ranks on this machine, which run at once."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(lambda each: run_probe("sum", each, seconds, environment), arguments))


def sum_arguments(
    rank: int, world: int, host: str, port: int, backend: str, device: str, seconds: float
) -> dict[str, Any]:
    """The arguments of the probe `sum`; within it, waits end before the probe is killed."""
    return {
        "rank": rank,
        "world": world,
        "host": host,
        "port": port,
        "backend": backend,
        "device": device,
        "seconds": max(1.0, seconds / 2),
    }


def free_port(host: str) -> int:
    """A port of `host`, an address of this machine, on which nothing listens now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
        free.bind((host, 0))
        return int(free.getsockname()[1])
