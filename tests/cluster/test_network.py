"""Which address and interface a worker talks by: Ray's, whatever the host name resolves to."""

from __future__ import annotations

import os

import psutil
import pytest

from actors.network import (
    VARIABLES,
    Endpoint,
    choose_backend,
    choose_endpoint,
    local_interfaces,
    require_reachable,
    use_interface,
)
from storage.errors import ResourceError

INTERFACES = {
    "lo": ["127.0.0.1", "::1", "00:00:00:00:00:00"],
    "eth0": ["10.0.0.5", "02:fc:00:00:00:01"],
    "ib0": ["fe80::1", "192.168.7.5", "00:01"],
    "down0": ["02:fc:00:00:00:02"],
}


@pytest.mark.parametrize(
    ("address", "named", "endpoint"),
    [
        ("10.0.0.5", None, Endpoint("10.0.0.5", "eth0")),
        ("127.0.0.1", None, Endpoint("127.0.0.1", "lo")),
        # Behind a translated address: none of its own, and gloo must find one by itself.
        ("203.0.113.9", None, Endpoint("203.0.113.9", None)),
        ("10.0.0.5", "ib0", Endpoint("192.168.7.5", "ib0")),
        ("10.0.0.5", "eth0", Endpoint("10.0.0.5", "eth0")),
    ],
)
def test_the_interface_of_rays_address_or_the_named_one(
    address: str, named: str | None, endpoint: Endpoint
) -> None:
    assert choose_endpoint(address, INTERFACES, named) == endpoint


@pytest.mark.parametrize("named", ["eth1", "down0"])
def test_an_interface_that_a_node_has_not(named: str) -> None:
    with pytest.raises(ResourceError) as caught:
        choose_endpoint("10.0.0.5", INTERFACES, named)
    for text in ("node 10.0.0.5", named, "--network-interface"):
        assert text in str(caught.value)


def test_an_address_that_the_others_cannot_reach() -> None:
    require_reachable(["127.0.0.1", "127.0.0.1"])
    require_reachable(["10.0.0.5", "10.0.0.6"])
    with pytest.raises(ResourceError) as caught:
        require_reachable(["10.0.0.5", "127.0.0.1"])
    for text in ("127.0.0.1", "10.0.0.5", "--node-ip-address", "--network-interface"):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("devices", "gpus", "backend"),
    [
        (["cuda", "cuda"], 1, "nccl"),
        (["cuda", "cuda"], 2, "nccl"),
        (["cpu", "cpu"], 0, "gloo"),
        (["cuda", "cuda"], 0.5, "gloo"),
        (["cuda", "cpu"], 1, "gloo"),
        (["cuda"], 1, "gloo"),
    ],
)
def test_nccl_only_where_each_rank_has_a_gpu_of_its_own(
    devices: list[str], gpus: float, backend: str
) -> None:
    assert choose_backend(devices, gpus) == backend


def test_a_variable_of_the_user_wins_unless_an_interface_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gloo, nccl = VARIABLES
    monkeypatch.setenv(gloo, "mine")
    monkeypatch.delenv(nccl, raising=False)
    use_interface(Endpoint("10.0.0.5", "eth0"), named=False)
    assert (os.environ[gloo], os.environ[nccl]) == ("mine", "=eth0")
    use_interface(Endpoint("192.168.7.5", "ib0"), named=True)
    assert (os.environ[gloo], os.environ[nccl]) == ("ib0", "=ib0")


def test_this_machines_interfaces() -> None:
    found = local_interfaces()
    assert found.keys() == psutil.net_if_addrs().keys()
    assert any("127.0.0.1" in addresses for addresses in found.values())
