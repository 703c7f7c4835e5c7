"""Every error that prox24 raises on purpose.

    Prox24Error                 exit code 1
    ├── InputError              exit code 2: the user can correct it; raised before any compute
    │   ├── ConfigError         an option, or a combination of options
    │   ├── ModelError          the source model: missing, incomplete, unsupported, not finite
    │   ├── DataError           the calibration or evaluation text
    │   ├── OutputError         the output folder
    │   ├── RunDirectoryError   the run directory: another job's, in use, written by another version
    │   ├── ResourceError       workers, GPUs, memory, disk space, the Ray address
    │   │   └── WorkerMemoryError   a worker was stopped for its node's memory; retried once
    │   ├── FileError           a file or folder that the system does not let prox24 use
    │   └── CorruptFileError    a file is not what was written: truncated, altered, not its format
    ├── NumericalError          a computation produced NaN or Inf; never retried
    ├── WorkerLostError         a worker or its node is gone; the driver retries the block
    │   └── DeviceFaultError    a worker's GPU failed, and its process cannot use it any more
    └── RunInterrupted          exit code 130: SIGINT or SIGTERM, everything committed is kept

A message is one line that names the subject (file, tensor, block, layer, rows) and the remedy.
An error has no state but its `args`, so it can be pickled on the way from a worker.
"""

from __future__ import annotations

from typing import ClassVar


class Prox24Error(Exception):
    """Root of the tree. `exit_code` is the status of a command that ends with this error."""

    exit_code: ClassVar[int] = 1


class InputError(Prox24Error):
    """Something given to prox24 is wrong, and the user can correct it."""

    exit_code: ClassVar[int] = 2


class ConfigError(InputError):
    """An option has no valid value, or contradicts another one."""


class ModelError(InputError):
    """The source model is missing, incomplete, of an unsupported kind, or not finite."""


class DataError(InputError):
    """The calibration or evaluation text is missing, empty, too short, or has no text column."""


class OutputError(InputError):
    """The output folder cannot be used."""


class RunDirectoryError(InputError):
    """The run directory belongs to another job or owner, or to another version of prox24."""


class ResourceError(InputError):
    """Workers, GPUs, memory, disk space or the cluster itself are not available as requested."""


class WorkerMemoryError(ResourceError):
    """A worker was stopped because its node ran out of memory, perhaps by another program's use."""


class FileError(InputError):
    """A file or folder cannot be used: its mode, its kind, a link, its filesystem.

    What the file's own contents have wrong is a CorruptFileError; a full disk is a ResourceError.
    """


class CorruptFileError(InputError):
    """A file is not what was written: truncated, altered, or not of its format."""


class NumericalError(Prox24Error):
    """A computation produced NaN or Inf, or a factorization failed. Never retried."""


class WorkerLostError(Prox24Error):
    """A worker process or its node is gone. The driver replaces it and retries the block."""


class DeviceFaultError(WorkerLostError):
    """A worker's GPU failed. Its process lives, but cannot use the GPU: it is replaced."""


class RunInterrupted(Prox24Error):
    """SIGINT or SIGTERM arrived. Committed blocks are kept; the same command resumes the job."""

    exit_code: ClassVar[int] = 130


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for one-line reports."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
