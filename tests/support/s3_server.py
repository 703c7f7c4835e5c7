"""A real S3-compatible server for tests: moto's, in a process of its own.

`python -m tests.support.s3_server FILE` writes its port to FILE when it listens.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATIENCE = 60.0
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "wJalr-secret-testing"}


class S3Server:
    """A running server. `environment` is what a process needs to reach it; `log` its requests."""

    def __init__(self, port: int, log: Path) -> None:
        self.address, self.log = f"http://127.0.0.1:{port}", log
        self.environment = {
            **CREDENTIALS,
            "AWS_ENDPOINT_URL": self.address,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def bucket(self, name: str) -> str:
        """A new bucket; its URI."""
        import pyarrow.fs

        filesystem = pyarrow.fs.S3FileSystem(
            access_key=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            secret_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
            endpoint_override=self.address.removeprefix("http://"),
            scheme="http",
            allow_bucket_creation=True,
        )
        filesystem.create_dir(name)
        return f"s3://{name}"


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """A server that ends with the block."""
    with serving("tests.support.s3_server", folder) as (port, log):
        yield S3Server(port, log)


@contextlib.contextmanager
def serving(module: str, folder: Path) -> Iterator[tuple[int, Path]]:
    """A module's server in a process of its own: its port, and its log, a line a request."""
    told, kept = folder / "port", folder / "log"
    with open(kept, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(told)], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while not told.exists():
            assert process.poll() is None, kept.read_text()
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.02)
        yield int(told.read_text()), kept
    finally:
        process.kill()
        process.wait()


def tell(port: int, told: str) -> None:
    """Says on which port this process listens."""
    Path(f"{told}.new").write_text(str(port))
    os.replace(f"{told}.new", told)


class Flaky:
    """Refuses the first two of equal requests for what is in a folder named `flaky`."""

    def __init__(self, application: Any) -> None:
        self.application = application
        self.seen: Counter[str] = Counter()

    def __call__(self, environ: Any, start_response: Any) -> Any:
        if "/flaky/" in environ["PATH_INFO"]:
            request = "{REQUEST_METHOD} {PATH_INFO} {QUERY_STRING}".format_map(environ)
            self.seen[request] += 1
            if self.seen[request] < 3:
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response("503 Slow Down", [("Content-Type", "application/xml")])
                return [b"<Error><Code>SlowDown</Code></Error>"]
        return self.application(environ, start_response)


def main(told: str) -> None:
    """Serves until it is killed."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = Flaky(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    tell(server.port, told)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1])
