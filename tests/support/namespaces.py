"""Hosts of a network of their own on this machine: namespaces joined by a bridge.

The bridge has a namespace too, so nothing of the machine's own network is touched. Every host has
one address, runs a real `ray start`, and can be cut off by taking its link down. All of them have
this machine's name, which may well resolve to 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support.ray_jobs import STORE_BYTES

PORT = 6379
NETWORK = "10.77.24"
_NUMBERS = itertools.count()
# A host that is cut off is given up after some four seconds, not after half a minute.
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
# Ray's own pretended cloud, which its autoscaler is tested with.
AUTOSCALING = {
    "cluster_name": "prox24",
    "max_workers": 4,
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 1,
    # Its nodes start Ray themselves: no one logs in to set them up.
    "provider": {"type": "fake_multinode", "disable_node_updaters": True},
    "auth": {},
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": 1, "object_store_memory": STORE_BYTES},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 4,
        },
    },
    "file_mounts": {},
    **{
        key: []
        for key in (
            "cluster_synced_files", "initialization_commands", "setup_commands",
            "head_setup_commands", "worker_setup_commands", "head_start_ray_commands",
            "worker_start_ray_commands", "rsync_exclude", "rsync_filter",
        )
    },
    "file_mounts_sync_continuously": False,
}  # fmt: skip
RAY = ("-m", "ray.scripts.scripts")


def _ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=60)
    if check and done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Host:
    """A namespace with one address on the bridge, and the folder that its Ray keeps for itself."""

    name: str
    address: str
    # The bridge's end of its link.
    link: str

    def command(self, *arguments: str | Path) -> list[str]:
        """The command line that runs `arguments` there."""
        return ["ip", "netns", "exec", self.name, *map(str, arguments)]

    def processes(self) -> list[int]:
        """Whatever runs there."""
        return [int(pid) for pid in _ip("netns", "pids", self.name, check=False).split()]

    def kill(self) -> None:
        """Ends whatever runs there."""
        deadline = time.monotonic() + 20
        while (found := self.processes()) and time.monotonic() < deadline:
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)


class Network:
    """A bridge and some hosts on it; the first is to run Ray's head."""

    def __init__(self, folder: Path, hosts: int) -> None:
        """Raises `OSError` where namespaces may not be made. `folder`: for Ray's files; short."""
        self.folder = folder
        # Several at a time in one process each have a hub of their own.
        self.hub = f"prox24-{os.getpid()}-{next(_NUMBERS)}"
        self.hosts: list[Host] = []
        # As the documentation has it for clusters; what the user's shell says of Ray is left out.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment = inherited | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            # For the pretended cloud.
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        _ip("netns", "add", self.hub)
        try:
            self._hub("link", "add", "bridge", "type", "bridge")
            self._hub("link", "set", "bridge", "up")
            for number in range(hosts):
                self._add(number)
        except OSError:
            self.close()
            raise

    @property
    def address(self) -> str:
        """Of Ray's head."""
        return f"{self.hosts[0].address}:{PORT}"

    def start_ray(
        self, host: Host, *more: str, before: str = ":", python: str | Path = sys.executable
    ) -> None:
        """`ray start` on a host, with one CPU and without a dashboard, unless `more` has it so.

        before: a shell command, e.g. to mount over a path: what is mounted there is seen there
        alone. python: the interpreter of all its processes, first on their path.
        """
        options = ["--num-cpus=1", f"--object-store-memory={STORE_BYTES}"]
        options += [f"--node-ip-address={host.address}", "--disable-usage-stats"]
        if host is self.hosts[0]:
            options += ["--head", f"--port={PORT}", f"--temp-dir={self.folder}"]
            options += ["--include-dashboard=false", f"--system-config={json.dumps(HEALTH)}"]
        else:
            options += [f"--address={self.address}"]
            # Its own, as on a machine of its own: what Ray unpacks here another node deletes.
            before = f"mount -t tmpfs none {self.folder} && {before}"
        names = {option.partition("=")[0] for option in more}
        options = [option for option in options if option.partition("=")[0] not in names]
        command = ("sh", "-c", f'{before} && exec "$@"', "sh", python, *RAY, "start", *options)
        done = subprocess.run(
            host.command(*command, *more),
            capture_output=True, text=True, timeout=120, cwd="/",
            env=self.environment_of(python),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def environment_of(self, python: str | Path) -> dict[str, str]:
        """For processes of that interpreter, which is then their `python`."""
        path = f"{Path(python).parent}:{self.environment['PATH']}"
        return self.environment | {"PATH": path}

    def cut(self, host: Host) -> None:
        """Takes the host's link down: what it sends is lost, and no connection is closed."""
        self._hub("link", "set", host.link, "down")

    def mend(self, host: Host) -> None:
        """Takes the link up again."""
        self._hub("link", "set", host.link, "up")

    def close(self) -> None:
        """Ends whatever runs in the namespaces, and them."""
        for host in self.hosts:
            host.kill()
            _ip("netns", "del", host.name, check=False)
        _ip("netns", "del", self.hub, check=False)

    def _add(self, number: int) -> None:
        host = Host(f"{self.hub}-{number}", f"{NETWORK}.{number + 11}", f"host{number}")
        _ip("netns", "add", host.name)
        self.hosts.append(host)
        self._hub(
            "link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.name
        )
        self._hub("link", "set", host.link, "master", "bridge", "up")
        _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", host.name, "link", "set", "eth0", "up")
        _ip("-n", host.name, "link", "set", "lo", "up")
        # It leads nowhere; Ray asks it for a host's own address where none is given.
        _ip("-n", host.name, "route", "add", "default", "via", f"{NETWORK}.1")

    def _hub(self, *arguments: str) -> None:
        _ip("-n", self.hub, *arguments)


@contextlib.contextmanager
def network(folder: Path, hosts: int) -> Iterator[Network]:
    """Hosts without Ray as yet; skips, with the reason, where they cannot be made."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("network namespaces need Linux and the `ip` command of iproute2")
    try:
        made = Network(folder, hosts)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"network namespaces may not be made here ({error})")
    try:
        yield made
    finally:
        made.close()


class HostedDriver:
    """A Python program on the first host, `-m cluster` from a checkout; its words go to a file."""

    def __init__(
        self,
        made: Network,
        folder: Path,
        arguments: Sequence[str | Path],
        log: Path,
        python: str | Path = sys.executable,
    ) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                made.hosts[0].command(python, *arguments),
                cwd=folder, stderr=file, stdout=file, env=made.environment_of(python),
            )  # fmt: skip

    def messages(self) -> str:
        return self.log.read_text()

    def wait(self) -> int:
        return self.process.wait(timeout=300)

    def end(self) -> None:
        """Kills it if it still runs."""
        if self.process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(self.process.pid).children(recursive=True):
                    child.kill()
            self.process.kill()
            self.process.wait()
