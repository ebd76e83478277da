"""Thousands of clients that say half a word, and hundreds that walk away."""

import json
import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import pytest

from tests.support.apps import settings_in, store_of
from tests.support.http_stub import LiveApp, running_app
from tests.support.jobs import waiting_in
from tests.support.processes import ServerProcess
from tests.support.v3_calls import BODY
from tests.support.waiting import until

pytestmark = pytest.mark.process

SOCKETS = 2_000
CALLS = 11
CALLED: dict[str, tuple[str, str, Any, str]] = {
    "health": ("GET", "/healthz", None, "ok"),
    "load": ("POST", "/api/v3/system_load", {}, "ok"),
    "a job": ("POST", "/api/v3/inpaint", BODY, "processing"),
}
"""Method, path, body and the status that is told."""
CLIENTS = 300
BODIES, BODY_BYTES = 12, 8_000_000
LIMIT_S = 120.0
HALVES = (
    b"",
    b"POST /api/v3/inpaint HTTP/1.1\r\nHost: localhost\r\n",
    b"POST /api/v3/inpaint HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n{",
)


@pytest.fixture(autouse=True)
def _many_files() -> Iterator[None]:
    """As many open files as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def hanging(port: int) -> Iterator[list[socket.socket]]:
    """Connections that have sent nothing, half a head, or half a body."""
    with ExitStack() as stack:
        sockets = []
        for number in range(SOCKETS):
            each = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            each.sendall(HALVES[number % len(HALVES)])
            sockets.append(each)
        yield sockets


def time_calls(url: str) -> dict[str, float]:
    """A call of each kind, on a connection of its own, as a health check comes: seconds each."""
    took_s = {}
    for name, (method, path, body, expected) in CALLED.items():
        started = time.monotonic()
        with httpx2.Client(base_url=url, timeout=60, trust_env=False) as client:
            answer = client.request(method, path, json=body)
        took_s[name] = time.monotonic() - started
        assert answer.json()["status"] == expected
    return took_s


@pytest.mark.parametrize("max_connections", [8_000, 500], ids=["room", "no room"])
def test_server_answers_while_thousands_hang(max_connections: int, tmp_path: Path) -> None:
    environment = {
        "INPAINT_HTTP__MAX_CONNECTIONS": str(max_connections),
        "INPAINT_HTTP__HEAD_TIMEOUT_S": "600",
        "INPAINT_HTTP__BODY_TIMEOUT_S": "600",
        "INPAINT_HOLD_S": "0",
        "INPAINT_ADMIN__PORT": "0",
    }
    server = ServerProcess(tmp_path, environment, "--workers", "0")
    admin = server.wait_for("admin listening")["url"]
    try:
        with server.client, hanging(httpx2.URL(server.url).port or 0):
            took_s = [time_calls(server.url) for _ in range(CALLS)]
            connections = httpx2.get(f"{admin}/readyz", timeout=60, trust_env=False).json()[
                "connections"
            ]
        # The machine may be busy with something else for a while, the server may not.
        for name in CALLED:
            assert median(each[name] for each in took_s) < 1, name
        if max_connections > SOCKETS:
            assert connections["cut"] == 0
            assert connections["open"] > SOCKETS
        else:
            assert connections["cut"] >= SOCKETS - max_connections
            assert connections["open"] <= max_connections
    finally:
        assert server.stop() == 0


def test_clients_that_walk_away_leave_nothing(tmp_path: Path) -> None:
    room = {"max_waiting": CLIENTS + 10, "max_waiting_per_key": CLIENTS + 10}
    settings = settings_in(tmp_path, hold_s=5, queue=room)
    body = json.dumps(BODY).encode()
    request = (
        b"POST /api/v3/inpaint HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        % len(body)
    )
    with running_app(settings) as app, store_of(settings) as store:
        app.client.get("/healthz", headers={"connection": "close"})
        until(lambda: sum(left_in(app)[:3]) == 0, LIMIT_S, "no request is left")
        before = left_in(app)
        with ExitStack() as stack:
            for _ in range(CLIENTS):
                each = stack.enter_context(socket.create_connection(("127.0.0.1", app.port)))
                each.sendall(request + body)
            until(lambda: waiting_in(store) == CLIENTS, LIMIT_S, "every client has a job")
        until(lambda: left_in(app) == before, LIMIT_S, "nothing is left behind")
        assert app.client.post("/api/v3/fetch/1").json()["status"] == "processing"
        assert waiting_in(store) == CLIENTS


def test_waiting_clients_keep_none_of_their_bodies_in_memory(tmp_path: Path) -> None:
    environment = {"INPAINT_HOLD_S": "600", "INPAINT_ADMIN__PORT": "0"}
    server = ServerProcess(tmp_path, environment, "--workers", "0")
    port = httpx2.URL(server.url).port or 0
    body = json.dumps({**BODY, "unknown": "x" * BODY_BYTES}).encode()
    head = f"POST /api/v3/inpaint HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    try:
        with ExitStack() as stack, server.client:
            store = stack.enter_context(store_of(settings_in(tmp_path)))
            sizes: list[int] = []
            for _ in range(BODIES):
                client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                client.sendall(head.encode() + b"\r\n" + body)
                until(lambda: waiting_in(store) == len(sizes) + 1, LIMIT_S, "the job waits")
                sizes.append(memory_of(server.pid))
            assert sizes[-1] - sizes[0] < BODIES * BODY_BYTES / 2
    finally:
        server.stop()


def memory_of(pid: int) -> int:
    """Resident bytes of a process."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def left_in(app: LiveApp) -> tuple[int, ...]:
    """Connections, running requests, waiters, sockets open in this process."""
    state = app.server.server_state
    sockets = [name for name in map(link_of, os.listdir("/proc/self/fd")) if "socket:" in name]
    waiting = app.app.state.services.watcher
    return app.server.limiter.open_count, len(state.tasks), len(waiting), len(sockets)


def link_of(number: str) -> str:
    """What a file descriptor of this process is; the one of the listing itself is gone already."""
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except FileNotFoundError:
        return ""
