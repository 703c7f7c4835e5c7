"""What Ray says of a failure, as prox24's own errors."""

from __future__ import annotations

import re

from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
)

from storage.errors import (
    FileError,
    Prox24Error,
    ResourceError,
    WorkerLostError,
    WorkerMemoryError,
)

# Ray's own words on a death: why the process ended, in the line that says so.
_EXIT_DETAIL = re.compile(r"Worker exit detail: (.*?)(?:\. Some common causes|$)", re.MULTILINE)
_REASON = re.compile(r"^The actor is dead because (.*?)\.?$", re.MULTILINE)
_NODE_MEMORY = re.compile(r"was (\S+ used / \S+) limit")
# Of an actor whose class could not be imported: what Ray says, the node, and the error itself.
_NOT_IMPORTED = "failed to import on the worker"
_ADDRESS = re.compile(r"\bip=([\w.:]+)")
_ERROR_LINE = re.compile(r"^(?:\x1b\[\d+m)*(\w*(?:Error|Exception): .*)$", re.MULTILINE)
_CAUSE_CHARACTERS = 300


def translate(error: Exception, phase: str, worker: str) -> Exception:
    """Ray's report of a failure of `worker` (for people) in `phase`, as prox24's own error.

    What the worker raised itself comes out as it is, a FileError with the worker's name; a worker
    over Ray's memory limit as `WorkerMemoryError`; a process that is gone, and whatever else Ray
    reports, as `WorkerLostError` with the cause. A node that cannot import prox24 or what it needs
    is a `ResourceError`: that would only come again.
    """
    # It imports torch, which the driver has imported when a phase can fail.
    from pipeline.runtime.device_errors import remedy

    if isinstance(error, OutOfMemoryError):
        found = _NODE_MEMORY.search(str(error))
        of_node = f" ({found[1]} of its node's memory)" if found else ""
        return WorkerMemoryError(
            f"phase {phase}: Ray's memory monitor stopped {worker}{of_node}; {remedy(phase)}"
        )
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, FileError):
            # The same path may be in order on the other nodes.
            return FileError(f"{worker}: {cause}")
        if isinstance(cause, Exception) and not isinstance(cause, RayError):
            return cause
        return Prox24Error(f"phase {phase}: {worker} failed: {last_line(error)}")
    if isinstance(error, ActorDiedError) and _NOT_IMPORTED in str(error):
        address, lines = _ADDRESS.search(str(error)), _ERROR_LINE.findall(str(error))
        node = f"node {address[1]}" if address else f"the node of {worker}"
        why = lines[-1][:_CAUSE_CHARACTERS] if lines else "no reason given"
        return ResourceError(
            f"{node} cannot import prox24 and what it needs ({why}); install its dependencies "
            "there, in the driver's versions"
        )
    if isinstance(error, (ActorDiedError, ActorUnavailableError)):
        return WorkerLostError(f"phase {phase}: {worker} is gone ({_why(str(error))})")
    if isinstance(error, RayError):
        return WorkerLostError(
            f"phase {phase}: {worker} failed with Ray's {type(error).__name__}: {one_line(error)}"
        )
    return error


def is_of_the_worker(error: Exception) -> bool:
    """Whether the worker's process raised this itself, and so still lives."""
    return isinstance(error, RayTaskError) or not isinstance(error, RayError)


def one_line(error: BaseException) -> str:
    """The error's text on one line, cut."""
    return " ".join(str(error).split())[:_CAUSE_CHARACTERS] or type(error).__name__


def last_line(error: BaseException) -> str:
    """The last line of an error's text: of a remote traceback, the one that names the error."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()[:_CAUSE_CHARACTERS]


def reason_of(error: BaseException) -> str:
    """Of Ray's report on a failure, the line that names the error itself; else its last one."""
    named = _ERROR_LINE.findall(str(error))
    return str(named[-1]) if named else last_line(error)


def _why(text: str) -> str:
    for pattern in (_EXIT_DETAIL, _REASON):
        if found := pattern.search(text):
            return found[1].strip()[:_CAUSE_CHARACTERS]
    return (text.strip().splitlines() or ["no reason given"])[0][:_CAUSE_CHARACTERS]
