"""What prox24 insists on before it computes on a cluster: a dashboard that not everyone may use.

Ray's dashboard takes jobs, and a job is any command. Where it listens to other machines, only a
token (`RAY_AUTH_MODE=token`) keeps whoever reaches it from running code on every node.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import urllib.error
import urllib.parse
import urllib.request

import psutil

from storage.errors import ResourceError

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 5.0
_EVERYWHERE = ("0.0.0.0", "::")


def require_guarded_dashboard(dashboard: str | None, gcs: str, *, accept_open: bool) -> None:
    """Raises `ResourceError` if other machines may use the cluster's dashboard without a token.

    `dashboard`: where Ray says that it listens, HOST:PORT; empty if there is none. `gcs`: the
    address of the cluster, HOST:PORT. `accept_open`: only warns.
    """
    if not dashboard:
        return
    split = urllib.parse.urlsplit(dashboard if "//" in dashboard else f"//{dashboard}")
    if not _reachable(split.hostname or "", split.port or 80, gcs) or _asks_for_token(split.netloc):
        return
    problem = (
        f"the cluster's dashboard listens to other machines at {split.netloc} without a token: "
        "whoever reaches it can run code on every node"
    )
    if accept_open:
        logger.warning("%s (--open-dashboard)", problem)
        return
    raise ResourceError(
        f"{problem}; start Ray with RAY_AUTH_MODE=token or --dashboard-host 127.0.0.1, or, if only "
        "people whom you trust reach it, go on with --open-dashboard"
    )


def _reachable(host: str, port: int, gcs: str) -> bool:
    """Whether other machines can reach the dashboard.

    A head whose own address is 127.0.0.1 names that, whichever interfaces the dashboard listens
    on: then its sockets are looked at, for such a head runs on this machine.
    """
    if not _is_loopback(host):
        return True
    if not _is_loopback(gcs.rpartition(":")[0].strip("[]")):
        return False
    try:
        sockets = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return False
    listening = [tuple(s.laddr) for s in sockets if s.status == psutil.CONN_LISTEN]
    return any((place, port) in listening for place in _EVERYWHERE)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _asks_for_token(place: str) -> bool:
    """Whether the dashboard does.

    Where it does not answer this process, the cluster itself tells: it has taken a driver that
    has no token.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(
            f"http://{place}/api/authentication_mode", None, _ANSWER_SECONDS
        ) as answer:
            return bool(json.loads(answer.read(1 << 16)).get("authentication_mode") != "disabled")
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except (OSError, ValueError, AttributeError):
        return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
