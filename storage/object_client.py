"""pyarrow's clients of object stores: where a store is, who asks, what its errors are.

pyarrow is imported when a store is first used: a command that reads none starts without it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from storage.errors import ResourceError, first_line

_ADDRESSES = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "gs": ("STORAGE_EMULATOR_HOST",),
}
_TRIES = 8
_CONNECT_SECONDS, _SILENT_SECONDS = 10.0, 60.0
_GS_TRY_SECONDS = 120.0
_GS_CREDENTIALS = ".config/gcloud/application_default_credentials.json"
_GS_METADATA = "metadata.google.internal"


def filesystem(scheme: str, bucket: str, options: tuple[tuple[str, str], ...]) -> Any:
    """The `pyarrow.fs.FileSystem` of a bucket: scheme and options as in `ObjectFolder`.

    Raises ResourceError where there are no credentials for `gs://`.
    """
    return _filesystem(scheme, bucket, options, _environment(scheme))


def store_errors() -> tuple[type[Exception], ...]:
    """What pyarrow raises when a store fails. An `except` clause calls this after an error only."""
    import pyarrow as pa

    return OSError, pa.ArrowException


@contextlib.contextmanager
def reaching(what: object) -> Iterator[None]:
    """Say in one line which object (`str(what)`) the store did not give, or did not take."""
    try:
        yield
    except store_errors() as error:
        raise ResourceError(
            f"{what}: {first_line(error)}; look at the address, the credentials and the bucket's "
            "permissions, then run the same command again"
        ) from error


@functools.cache
def never_freed() -> list[Any]:
    """A list whose items are never freed, not even at the process's end.

    A daemon thread that waits for ever holds it. Python stops daemon threads at exit and frees
    nothing of theirs.
    """
    items: list[Any] = []
    wait = threading.Event().wait
    holder = threading.Thread(target=lambda _: wait(), args=(items,), daemon=True)
    holder.start()
    return items


def _environment(scheme: str) -> str:
    """The address that the store's own tools take from the environment."""
    given = (os.environ.get(name) for name in _ADDRESSES[scheme])
    return next((address for address in given if address), "")


def _require_google_credentials(bucket: str) -> None:
    """ResourceError where there is nowhere to get them from, which the client tries for minutes."""
    file = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if file or (Path.home() / _GS_CREDENTIALS).exists():
        return
    try:
        socket.getaddrinfo(os.environ.get("GCE_METADATA_ROOT") or _GS_METADATA, 80)
    except OSError as error:
        raise ResourceError(
            f"gs://{bucket}: found no credentials (none in GOOGLE_APPLICATION_CREDENTIALS, in "
            f"~/{_GS_CREDENTIALS}, or of this machine); run 'gcloud auth application-default "
            "login', or name a key file in the variable"
        ) from error


@functools.lru_cache(maxsize=32)
def _filesystem(
    scheme: str, bucket: str, options: tuple[tuple[str, str], ...], environment: str
) -> Any:
    import pyarrow.fs

    given = dict(options)
    address = given.get("endpoint_override", environment)
    protocol, _, host = address.rpartition("://")
    common = {
        "scheme": given.get("scheme") or protocol or "https",
        "endpoint_override": host or None,
    }
    if scheme == "gs":
        patience = timedelta(seconds=_GS_TRY_SECONDS)
        # Credentials are for who can be believed to be the store, and not to be read on the way.
        open_to_all = common["scheme"] == "http"
        if not open_to_all:
            _require_google_credentials(bucket)
        return pyarrow.fs.GcsFileSystem(**common, anonymous=open_to_all, retry_time_limit=patience)
    region = given.get("region") or os.environ.get("AWS_REGION")
    region = region or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and not host:
        region = pyarrow.fs.resolve_s3_region(bucket)
    return pyarrow.fs.S3FileSystem(
        **common,
        region=region,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=_TRIES),
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_SILENT_SECONDS,
    )
