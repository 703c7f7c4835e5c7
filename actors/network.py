"""Which address and network interface a worker uses for the other workers."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from storage.errors import ConfigError, ResourceError

# Variables that gloo and NCCL read. By default they use the interface of the address that the host
# name resolves to, which is often 127.0.0.1.
VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True)
class Endpoint:
    """An address by which other nodes reach this one, and its interface; None if there is none."""

    address: str
    interface: str | None


def choose_endpoint(
    node_address: str, interfaces: Mapping[str, Sequence[str]], named: str | None
) -> Endpoint:
    """The interface `named`; None: that of the address by which Ray knows the node.

    interfaces: name → its addresses. node_address: the address by which Ray, and so every other
    node, reaches this one. What the host name resolves to does not matter. Raises `ResourceError`
    for an interface that the node does not have, or that has no address.
    """
    if named is None:
        owners = [name for name, addresses in interfaces.items() if node_address in addresses]
        return Endpoint(node_address, owners[0] if owners else None)
    if named not in interfaces:
        raise ResourceError(
            f"node {node_address} has no network interface {named}: it has "
            f"{', '.join(sorted(interfaces))}; choose another --network-interface"
        )
    addresses = [address for address in interfaces[named] if _is_address(address)]
    if not addresses:
        raise ResourceError(
            f"node {node_address}: network interface {named} has no address; choose another "
            "--network-interface"
        )
    # The address by which Ray knows the node if it has it; else IPv4 before IPv6.
    best = min(addresses, key=lambda a: (a != node_address, ipaddress.ip_address(a).version))
    return Endpoint(best, named)


def require_reachable(addresses: Sequence[str]) -> None:
    """Raises `ResourceError` where some, but not all, workers have a loopback address.

    addresses: one per worker. If all are loopback addresses, the job runs on one machine.
    """
    loopback = [address for address in addresses if _is_loopback(address)]
    if loopback and len(loopback) < len(addresses):
        others = sorted(set(addresses) - set(loopback))
        raise ResourceError(
            f"a node is known as {loopback[0]}, which the others ({', '.join(others)}) cannot "
            "reach; start its Ray with --node-ip-address, or name its --network-interface"
        )


def choose_backend(devices: Sequence[str], gpus: float, wanted: str = "auto") -> str:
    """`nccl` where every worker has a GPU of its own, else `gloo`.

    devices: device type of each worker. gpus: GPUs per worker, a fraction where workers share one,
    which NCCL does not support. wanted: `--collective`; for parts of a GPU (MIG) that Ray counts
    as GPUs, between which NCCL does not work either, the user says `gloo`.

    Raises `ConfigError` for `nccl` where it cannot work.
    """
    possible = gpus >= 1 and set(devices) == {"cuda"}
    if wanted == "nccl" and not possible:
        raise ConfigError(
            f"--collective nccl needs a GPU of its own for every worker; here {gpus:g} GPUs a "
            f"worker, on {', '.join(sorted(set(devices)))}: leave it out"
        )
    # One worker sends nothing.
    return "nccl" if possible and len(devices) > 1 and wanted != "gloo" else "gloo"


def local_interfaces() -> dict[str, list[str]]:
    """Interfaces of this machine → their addresses; IPv6 addresses without their zone."""
    return {
        name: [a.address.partition("%")[0] for a in addresses]
        for name, addresses in psutil.net_if_addrs().items()
    }


def use_interface(endpoint: Endpoint, *, named: bool) -> None:
    """Makes gloo and NCCL use the interface of the endpoint, in this process.

    named: whether the user chose the interface by option. If not, variables that are already set on
    the node are not changed.
    """
    if endpoint.interface is None:
        return
    for variable in VARIABLES:
        if named or variable not in os.environ:
            # NCCL matches names by prefix, unless they follow an equals sign.
            exact = "=" if variable.startswith("NCCL") else ""
            os.environ[variable] = exact + endpoint.interface


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False  # psutil also lists hardware addresses
    return True


def _is_loopback(text: str) -> bool:
    return _is_address(text) and ipaddress.ip_address(text).is_loopback
