"""A Google Cloud Storage server for tests: gcp-storage-emulator's, in a process of its own.

`python -m tests.support.google_server FILE` writes its port to FILE when it listens.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

from tests.support.s3_server import serving, tell


class GoogleServer:
    """A running server. `environment` is what a process needs to reach it; `log` its requests."""

    def __init__(self, port: int, log: Path) -> None:
        self.address, self.log = f"http://127.0.0.1:{port}", log
        self.environment = {"STORAGE_EMULATOR_HOST": self.address}

    def bucket(self, name: str) -> str:
        """A new bucket; its URI."""
        request = urllib.request.Request(
            f"{self.address}/storage/v1/b?project=tests",
            json.dumps({"name": name}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200
        return f"gs://{name}"


@contextlib.contextmanager
def google_server(folder: Path) -> Iterator[GoogleServer]:
    """A server that ends with the block."""
    with serving("tests.support.google_server", folder) as (port, log):
        yield GoogleServer(port, log)


def main(told: str) -> None:
    """Serves until it is killed. In threads: pyarrow leaves a read of the whole object waiting."""
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    logging.basicConfig(level=logging.INFO)
    handler = partial(RequestHandler, Storage(use_memory_fs=True))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    tell(server.server_port, told)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1])
