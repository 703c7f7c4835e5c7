"""A cluster whose dashboard others can use without a token is refused."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest

from cluster.dispatch import connection, security
from cluster.dispatch.security import require_guarded_dashboard
from pipeline.config.evaluate import EvalConfig
from storage.errors import ResourceError

Check = Callable[..., None]


@contextmanager
def dashboard(status: int, answer: str, host: str = "127.0.0.1") -> Iterator[int]:
    """An HTTP server that answers as a dashboard does to the question of its mode; its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/api/authentication_mode"
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer((host, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every address counts as one that other machines reach."""
    monkeypatch.setattr(security, "_is_loopback", lambda host: False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)


def mode(name: str) -> str:
    return json.dumps({"authentication_mode": name})


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("status", "answer", "guarded"),
    [
        (200, mode("token"), True),
        (200, mode("disabled"), False),
        (401, "", True),
        (404, "", False),  # a Ray that knows of no tokens
        (200, "no JSON", False),
        (200, "[]", False),
    ],
)
def test_a_dashboard_for_all_needs_a_token(status: int, answer: str, guarded: bool) -> None:
    with dashboard(status, answer) as port:
        place = f"127.0.0.1:{port}"
        if guarded:
            require_guarded_dashboard(place, "10.0.0.1:6379", accept_open=False)
        else:
            with pytest.raises(ResourceError, match=rf"{place} without a token.*RAY_AUTH_MODE"):
                require_guarded_dashboard(f"http://{place}", "10.0.0.1:6379", accept_open=False)
            require_guarded_dashboard(place, "10.0.0.1:6379", accept_open=True)


@pytest.mark.usefixtures("elsewhere")
def test_one_that_does_not_answer_is_as_the_cluster_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ResourceError):
        require_guarded_dashboard(place, "10.0.0.1:6379", accept_open=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    require_guarded_dashboard(place, "10.0.0.1:6379", accept_open=False)


@pytest.mark.parametrize("place", [None, "", "127.0.0.1:8265", "[::1]:8265", "localhost:8265"])
def test_one_of_its_own_host_alone_is_fine(place: str | None) -> None:
    require_guarded_dashboard(place, "10.0.0.1:6379", accept_open=False)


def test_a_head_at_127_0_0_1_is_looked_at() -> None:
    """It says 127.0.0.1 of its dashboard even where that listens on every interface."""
    with dashboard(200, mode("disabled")) as port:
        require_guarded_dashboard(f"127.0.0.1:{port}", "127.0.0.1:6379", accept_open=False)
    with dashboard(200, mode("disabled"), "0.0.0.0") as port:
        place = f"127.0.0.1:{port}"
        assert any(tuple(s.laddr) == ("0.0.0.0", port) for s in psutil.net_connections("tcp"))
        with pytest.raises(ResourceError, match="without a token"):
            require_guarded_dashboard(place, "127.0.0.1:6379", accept_open=False)
        # Of a head elsewhere it is that host's own 127.0.0.1.
        require_guarded_dashboard(place, "10.0.0.1:6379", accept_open=False)


def test_a_cluster_that_turns_a_driver_away_may_want_a_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray says of a wrong token no more than that it could not connect."""

    def refuse(**options: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at it\nand more")

    monkeypatch.setattr(connection.ray, "init", refuse)
    with dashboard(200, "") as port:
        config = EvalConfig(ray_address=f"127.0.0.1:{port}")
        with pytest.raises(ResourceError, match=r"\(Failed to connect.* at it\).*RAY_AUTH_MODE"):
            connection.connect(config)
    with pytest.raises(ResourceError, match="no Ray cluster answers at auto"):
        connection.connect(EvalConfig(ray_address="auto"))
