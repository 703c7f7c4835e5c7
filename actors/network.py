"""Which address and interface a rank talks to its peers by: a decision, and carrying it out."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from storage.errors import ResourceError

# What gloo and NCCL read. By default they take the interface that the host name resolves to, which
# is often 127.0.0.1.
VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True)
class Endpoint:
    """An address that the other nodes reach this one by; its interface, None where none has it."""

    address: str
    interface: str | None


def choose_endpoint(
    node_address: str, interfaces: Mapping[str, Sequence[str]], named: str | None
) -> Endpoint:
    """The interface `named`, or the one of the address by which Ray knows the node.

    interfaces: name → its addresses. Ray reaches the node by `node_address`, so other nodes do;
    what the host name resolves to plays no part. Raises `ResourceError` for a name that the node
    has not, or that has no address.
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
    # The node's own, or else the first of IPv4, which comes before IPv6 where there are both.
    best = min(addresses, key=lambda a: (a != node_address, ipaddress.ip_address(a).version))
    return Endpoint(best, named)


def require_reachable(addresses: Sequence[str]) -> None:
    """Raises `ResourceError` where one of the ranks' addresses is one that only its node knows.

    A loopback address is fine as long as all are: one machine.
    """
    loopback = [address for address in addresses if _is_loopback(address)]
    if loopback and len(loopback) < len(addresses):
        others = sorted(set(addresses) - set(loopback))
        raise ResourceError(
            f"a node is known as {loopback[0]}, which the others ({', '.join(others)}) cannot "
            "reach; start its Ray with --node-ip-address, or name its --network-interface"
        )


def choose_backend(devices: Sequence[str], gpus: float) -> str:
    """`nccl` where every rank has a GPU of its own, else `gloo`.

    devices: the types of the ranks' devices. gpus: what each rank has of a GPU; NCCL refuses two
    ranks on one.
    """
    return "nccl" if gpus >= 1 and len(devices) > 1 and set(devices) == {"cuda"} else "gloo"


def own_interfaces() -> dict[str, list[str]]:
    """This machine's interfaces and their addresses, of IPv6 without the zone."""
    return {
        name: [a.address.partition("%")[0] for a in addresses]
        for name, addresses in psutil.net_if_addrs().items()
    }


def use_interface(endpoint: Endpoint, *, named: bool) -> None:
    """Has gloo and NCCL talk through the endpoint's interface, in this process.

    A variable that the user has set on the node wins over an interface that was not `named`.
    """
    if endpoint.interface is None:
        return
    for variable in VARIABLES:
        if named or variable not in os.environ:
            # NCCL takes a name for a prefix, unless an equal sign says that it is whole.
            whole = "=" if variable.startswith("NCCL") else ""
            os.environ[variable] = whole + endpoint.interface


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False  # psutil also lists hardware addresses
    return True


def _is_loopback(text: str) -> bool:
    return _is_address(text) and ipaddress.ip_address(text).is_loopback
