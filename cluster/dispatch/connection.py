"""The connection to a Ray cluster, or to one of our own on this machine."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

import actors
import cluster
import pipeline
import storage
from cluster.dispatch.security import require_guarded_dashboard
from pipeline.config.runtime import RuntimeConfig
from storage.errors import ResourceError, first_line
from storage.files.names import is_utf8, printable
from storage.files.os_errors import raise_file_error

# How long a cluster may take to accept a connection.
_KNOCK_SECONDS = 10.0
# Where `ray job submit` leaves the job's runtime environment for its driver.
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# Not sent along: Python makes them anew, and they would change the package's hash.
_NOT_SENT = ["__pycache__", "*.pyc"]


def cluster_address(config: RuntimeConfig) -> str | None:
    """Where the cluster is: `--ray-address` or $RAY_ADDRESS; None for a Ray of our own."""
    return config.ray_address or os.environ.get("RAY_ADDRESS")


def connect(config: RuntimeConfig) -> bool:
    """Connects to `--ray-address`, $RAY_ADDRESS, or a Ray of our own; whether it is our own.

    Raises `ResourceError` for an address that does not answer, a cluster that wants a token which
    this process lacks, one whose dashboard others can use without, and a Ray that does not start.
    """
    context = connect_unguarded(config)
    if context is None:
        return True
    try:
        require_guarded(context, accept_open=config.open_dashboard)
    except ResourceError:
        ray.shutdown()
        raise
    return False


def require_guarded(context: Any, *, accept_open: bool) -> None:
    """Raises `ResourceError` if others can use the dashboard of a cluster without a token.

    context: from `connect_unguarded`. accept_open: only warns.
    """
    gcs = ray.get_runtime_context().gcs_address
    require_guarded_dashboard(context.dashboard_url, gcs, accept_open=accept_open)


def connect_unguarded(config: RuntimeConfig) -> Any | None:
    """`connect`, whatever the dashboard; Ray's context of the cluster, None for a Ray of our own.

    Raises `ResourceError` for an address that does not answer, and for a cluster that wants a token
    which this process lacks.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = cluster_address(config)
    level = logging.INFO if config.verbose else logging.ERROR
    options: dict[str, Any] = {"log_to_driver": config.verbose, "logging_level": level}
    if not config.verbose:
        logging.getLogger("ray").setLevel(logging.ERROR)
    if address is None:
        # More workers than cores may be asked for: the placement says no, not Ray's scheduler.
        try:
            with _own_signals(), _told_in_utf8():
                ray.init(address="local", include_dashboard=False, **options)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise_file_error(error)
            raise ResourceError(
                f"Ray does not start on this machine ({first_line(error)}); look at its temporary "
                "folder ($TMPDIR, or /tmp: writable, and of a short path), or use --executor local"
            ) from error
        return None
    listens = False
    try:
        listens = _knock(address)
        with _own_signals(), _told_in_utf8():
            return ray.init(address=address, runtime_env=code_to_send(os.environ), **options)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        if not listens:
            raise ResourceError(
                f"no Ray cluster answers at {address} ({first_line(error)}); start one, or leave "
                "--ray-address out to use this machine"
            ) from error
        # To a driver without the right token Ray says no more than that it cannot connect.
        raise ResourceError(
            f"what listens at {address} does not take this driver ({first_line(error)}): the "
            "cluster may want its token (RAY_AUTH_MODE=token, and the token in ~/.ray/auth_token "
            "or $RAY_AUTH_TOKEN), or have another version of Ray or Python; or --ray-address is "
            "not the cluster's"
        ) from error


def code_to_send(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The runtime environment that brings prox24 to the nodes: they run what this driver runs.

    None in a job that was submitted with a working directory or modules: Ray gives its workers the
    same, and this driver runs from there itself.
    """
    try:
        job = json.loads(environment.get(_JOB_VARIABLE) or "{}").get("runtime_env") or {}
    except (ValueError, AttributeError):
        job = {}
    if job.get("working_dir") or job.get("py_modules"):
        return None
    packages = (storage, pipeline, actors, cluster)
    folders = [str(Path(package.__file__ or "").parent) for package in packages]
    return {"py_modules": folders, "excludes": _NOT_SENT}


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Puts SIGTERM's handler back: Ray's own ends the process at once, without a word on how to
    resume. Only the main thread has a say in signals."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _told_in_utf8() -> Iterator[None]:
    """Ray records the command line, the search path and the current folder of its driver, and fails
    where a path in them is not UTF-8."""
    utils: Any = ray._private.utils
    told, searched = utils.get_entrypoint_name, list(sys.path)
    utils.get_entrypoint_name = lambda: printable(told())
    sys.path[:] = [path for path in searched if is_utf8(path)]
    here = os.open(".", os.O_RDONLY)
    try:
        if not is_utf8(os.path.realpath(f"/proc/self/fd/{here}")):
            os.chdir("/")
        yield
    finally:
        os.fchdir(here)
        os.close(here)
        utils.get_entrypoint_name, sys.path[:] = told, searched


def _knock(address: str) -> bool:
    """Whether something listens at HOST:PORT; raises `OSError` if not: Ray tries on for minutes.

    False, untried, for addresses without a port (`auto`), which are Ray's to resolve.
    """
    host, _, port = address.rpartition("//")[2].partition("?")[0].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_SECONDS).close()
        return True
    return False
