"""What a start says in the log; what it says on a terminal stands in `tests/transcripts/`."""

import socket
from importlib.metadata import version
from pathlib import Path

import pytest

from server.core.settings import load_settings
from server.serving.server import address_of
from tests.support.processes import ServerProcess, serving

pytestmark = pytest.mark.process

UPGRADES = ("websocket", "h2c")


def test_log_tells_what_was_started_and_when_it_is_ready(tmp_path: Path) -> None:
    with serving(tmp_path / "data", {"INPAINT_ADMIN__PORT": "0"}) as server:
        (listening,) = server.events("listening")
        assert listening["version"] == version("inpaint-server")
        assert listening["model"] == "builtin"
        assert listening["device"] in ("cpu", "cuda:0"), "what was found, not what was asked for"
        assert listening["data_dir"] == str(tmp_path / "data")
        assert listening["access"] == "this machine only, no key"
        assert server.wait_for("ready")["url"] == server.url
        for kind in UPGRADES:
            ask_to_upgrade(server.url, kind)
    assert len(server.events("admin listening")) == 1
    assert not [line for line in server.log if "tarted server process" in line]
    assert not [line for line in server.log if "pplication startup" in line or "uvicorn" in line]


def test_removed_setting_is_warned_of_and_does_not_stop_the_start(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, {"INPAINT_COMPILE": "true"}, "--workers", "0")
    try:
        assert server.client.get("/healthz").status_code == 200
    finally:
        server.stop()
        server.client.close()
    (warning,) = server.events("setting has no effect any more")
    assert warning["detail"].startswith("compile: the UNet is no longer compiled")


def ask_to_upgrade(url: str, kind: str) -> None:
    """Answered as any other call."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"GET /healthz HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: {kind}"
        connection.sendall(f"{head}\r\n\r\n".encode())
        assert connection.recv(4_096).startswith(b"HTTP/1.1 200")


def test_address_is_a_link_also_with_ipv6(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, {}, "--workers", "0", "--host", "::1")
    try:
        assert server.url.startswith("http://[::1]:")
        assert server.client.get("/healthz").status_code == 200
    finally:
        server.stop()
        server.client.close()
    assert address_of("127.0.0.1", 80) == "127.0.0.1:80"


@pytest.mark.parametrize(
    ("host", "keys", "has_stored", "access"),
    [
        ("127.0.0.1", "", False, "this machine only, no key"),
        ("0.0.0.0", "", False, "everybody, no key"),
        ("0.0.0.0", "", True, "with an API key"),
        ("127.0.0.1", "sixteen-letters-x", False, "with an API key"),
    ],
)
def test_access_is_told(host: str, keys: str, has_stored: bool, access: str) -> None:
    assert load_settings(host=host, auth={"keys": keys}).access(has_stored) == access
