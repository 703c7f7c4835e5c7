"""`hosts.sh` for real: two hosts, a token, a job, and its metrics as Prometheus would read them.

`hosts.sh stop` is not called: `ray stop` ends every Ray of this machine, whichever host's it is.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.metrics import METRICS, exported_name
from pipeline.records.status import find_run_directory, read_status
from tests.support.jobs import contents, write_text
from tests.support.namespaces import Host, Network, network
from tests.support.ray_jobs import undisturbed
from tests.support.tiny_models import save_tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.skipif(
        importlib.util.find_spec("opentelemetry") is None,
        reason="metrics need ray[default]: pip install prox24[cluster]",
    ),
]

# What only a job with trouble records.
OF_TROUBLE = {"prox24_retries"}


@pytest.fixture(scope="module")
def hosts() -> Iterator[Network]:
    with (
        tempfile.TemporaryDirectory(prefix="p24-", ignore_cleanup_errors=True) as folder,
        network(Path(folder), 2) as made,
    ):
        yield made


def run(made: Network, host: Host, repository: Path, *arguments: str, **more: str) -> str:
    """`hosts.sh` on a host, in whose home there is nothing."""
    home = made.folder / host.link
    home.mkdir(exist_ok=True)
    ours = made.environment_of(sys.executable)  # its `ray` and `prox24` are the ones to be tried
    environment = {k: v for k, v in ours.items() if k != "RAY_AUTH_TOKEN"}
    done = subprocess.run(
        host.command(repository / "cluster" / "launch" / "hosts.sh", *arguments),
        env=environment
        | {"HOME": str(home), "RAY_TMPDIR": str(home), "ADDRESS": host.address}
        | more,
        cwd=repository, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def metrics(host: Host) -> str:
    """What the host's metrics port says; nothing if it does not answer."""
    url = f"http://{host.address}:20005/metrics"
    command = host.command("curl", "--silent", "--noproxy", "*", "--max-time", "5", url)
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def test_two_hosts_prune_and_are_seen(hosts: Network, repository: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", blocks=3)
    text = write_text(tmp_path / "text.txt")
    options = {"nsamples": 8, "seqlen": 32, "batch_size": 2, "threads": 1, "workers": 2}
    first, second = hosts.hosts
    # One CPU each, so that every host has a worker.
    ray = {"RAY_OPTIONS": "--num-cpus 1", "HF_HUB_OFFLINE": "1"}
    ray["RAY_metrics_report_interval_ms"] = "500"
    run(hosts, first, repository, "token")
    token = hosts.folder / first.link / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o077 == 0
    (hosts.folder / second.link / ".ray").mkdir(parents=True)
    (hosts.folder / second.link / ".ray" / "auth_token").write_text(token.read_text())
    run(hosts, first, repository, "head", **ray)
    run(hosts, second, repository, "join", first.address, **ray)

    job = {"MODEL": str(model), "OUTPUT": str(tmp_path / "output")}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    job["OPTIONS"] = f"--dataset {text} {flags}"
    said = run(hosts, first, repository, "prune", **job, **ray)
    assert "worker 1 on " in said  # who did what
    assert contents(tmp_path / "output") == undisturbed(model, text, tmp_path / "whole", **options)
    assert read_status(find_run_directory(tmp_path / "output"))["state"] == "finished"

    # Counters outlive the processes; a gauge is gone soon after its own.
    expected = {exported_name(name) for name in METRICS if METRICS[name].kind == "counter"}
    expected -= {exported_name(name) for name in OF_TROUBLE}
    found: set[str] = set()
    deadline = time.monotonic() + 30
    while not expected <= found and time.monotonic() < deadline:
        for host in hosts.hosts:
            found |= set(re.findall(r"^(ray_prox24_\w+)\{", metrics(host), re.MULTILINE))
        time.sleep(0.5)
    assert expected <= found
