"""The actor of `prox24 doctor`: one a node, and one a GPU for the sum over all workers."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import psutil
import ray

from actors.network import choose_endpoint, local_interfaces, use_interface
from pipeline.doctor.environment import shown_environment, started_with
from pipeline.doctor.examine import examine, free_port
from pipeline.doctor.run_probe import run_probe

if TYPE_CHECKING:
    from pipeline.doctor.examine import Request
    from pipeline.doctor.facts import Answer

_DEVICES = "CUDA_VISIBLE_DEVICES"


class NodeDoctor:
    """Runs probes on its node, each in a process of its own. The driver makes it a Ray actor."""

    def __init__(self, interface: str | None) -> None:
        """interface: the option `--network-interface`."""
        self._interface = interface

    def clock(self) -> float:
        """This node's time, in seconds since the epoch."""
        return time.time()

    def examine(self, request: Request) -> tuple[dict[str, Answer], dict[str, str]]:
        """The answers of all probes, and the variables that Ray was started with here."""
        started = environment_of_ray()
        environment = dict(os.environ)
        # Ray hides GPUs from an actor that asks for none.
        environment.pop(_DEVICES, None)
        if _DEVICES in started:
            environment[_DEVICES] = started[_DEVICES]
        return examine(request, environment), shown_environment(started)

    def meeting(self) -> tuple[str, int]:
        """An address of this node, and a port that is free there.

        Raises `ResourceError` where the interface is missing.
        """
        address = choose_endpoint(
            ray.util.get_node_ip_address(), local_interfaces(), self._interface
        ).address
        return address, free_port(address)

    def sum(self, arguments: Mapping[str, Any], seconds: float) -> Answer:
        """This rank's part of the sum over all workers, by the network that a job would use."""
        endpoint = choose_endpoint(
            ray.util.get_node_ip_address(), local_interfaces(), self._interface
        )
        use_interface(endpoint, named=self._interface is not None)
        return run_probe("sum", arguments, seconds, dict(os.environ))


def environment_of_ray() -> dict[str, str]:
    """The variables with which Ray was started on this node; this process's if that is hidden."""
    try:
        for process in psutil.Process().parents():
            if "raylet" in process.name():
                return process.environ()
    except (psutil.Error, OSError):
        pass
    return started_with()
