"""The options of `prox24 doctor`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from pipeline.config.fields import Given, option, require
from pipeline.config.runtime import unless_ray


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Given):
    """Every option of `prox24 doctor`. Raises `ConfigError` for a value out of range."""

    executor: Literal["ray", "local"] = option(
        "ray",
        "what to look at: the nodes of the Ray cluster, or, also where no cluster is named, this "
        "machine alone",
    )
    ray_address: str | None = option(
        None,
        "address of a running Ray cluster (`auto`, `HOST:6379`, `ray://HOST:10001`); unset: "
        "$RAY_ADDRESS, or else this machine alone, without Ray",
        unused=unless_ray,
    )
    folder: str | None = option(
        None,
        "folders that all nodes must share, with commas between: those of MODEL, OUTPUT and the "
        "run directory; may be given again. Unset: shared folders are not checked",
        path=True,
        repeated=",",
    )
    network_interface: str | None = option(
        None,
        "network interface (`eth0`) by which the workers reach one another; unset: that of the "
        "node's address in Ray",
        unused=unless_ray,
    )
    open_dashboard: bool = option(
        False,
        "warn only of a dashboard that listens to other machines without a token",
        unused=unless_ray,
    )
    timeout: float = option(60.0, "seconds after which a single check counts as hanging")
    json: bool = option(False, "print one JSON object on standard output and nothing else there")
    verbose: bool = option(False, "show Ray's log and debug messages")
    debug: bool = option(False, "show the traceback of an error")

    def __post_init__(self) -> None:
        require(self, "timeout", at_least=1)

    def folders(self) -> tuple[str, ...]:
        """The folders of `folder`, absolute, each once.

        Whether they exist is a check of its own: asking for one that hangs would hang, too.
        """
        paths = [os.path.abspath(part) for part in (self.folder or "").split(",") if part]
        return tuple(dict.fromkeys(paths))
