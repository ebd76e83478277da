"""How real clients put a request on the wire: as raw bytes, and by the clients themselves."""

import asyncio
import base64
import gzip
import json
import logging
import random
import socket
import subprocess
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.responses import PlainTextResponse

from server.api.proxies import MAX_REPORTED, TrustedProxies
from server.core.http import inflate
from tests.support.apps import settings_in
from tests.support.http_stub import ANSWER_S, LiveApp, running_app
from tests.support.programs import program
from tests.support.v3_calls import BODY

pytestmark = pytest.mark.process

CLIENTS = Path(__file__).parents[1] / "support" / "clients"
JSON_BODY = json.dumps(BODY).encode()
LONG_BODY = json.dumps({**BODY, "prompt": "a cat " * 1_000, "unknown": "x" * 90_000}).encode()
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
UPGRADES = {
    "JDK": H2C + b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n",
    "curl": H2C + b"HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n",
    "nginx's recipe": b"Connection: upgrade\r\nUpgrade: websocket\r\n",
    "TLS": b"Upgrade: TLS/1.2\r\nConnection: Upgrade\r\n",
    "in two lines": b"connection: keep-alive\r\nCONNECTION: upgrade\r\nupgrade: h2c, foo/2\r\n",
    "no upgrade": b"Connection: upgrade\r\n",
    "nothing": b"",
}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveApp]:
    settings = settings_in(tmp_path_factory.mktemp("data"), queue={"max_waiting_per_key": 1_000})
    with running_app(settings) as app:
        yield app


@pytest.fixture(scope="module")
def open_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveApp]:
    """One that serves anybody, by any name."""
    named: dict[str, Any] = {
        "auth": {"allow_anonymous": True},
        "queue": {"max_waiting_per_key": 1_000},
    }
    with running_app(settings_in(tmp_path_factory.mktemp("data"), **named)) as app:
        yield app


def with_length(body: bytes, headers: bytes) -> bytes:
    """A whole V3 request."""
    head = b"POST /api/v3/inpaint HTTP/1.1\r\nHost: localhost\r\n" + headers
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def chunked(body: bytes, headers: bytes) -> bytes:
    """The same in chunks of many sizes."""
    sent = b"POST /api/v3/inpaint HTTP/1.1\r\nHost: localhost\r\n" + headers
    sent += b"Transfer-Encoding: chunked\r\n\r\n"
    size = 1
    while body:
        piece, body, size = body[:size], body[size:], size * 3 + 1
        sent += b"%x\r\n" % len(piece) + piece + b"\r\n"
    return sent + b"0\r\n\r\n"


def answers_to(port: int, packets: Sequence[bytes], count: int) -> list[dict[str, Any]]:
    """The bodies of so many answers on one connection, each packet sent by itself."""
    found: list[dict[str, Any]] = []
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for packet in packets:
            client.sendall(packet)
        with client.makefile("rb") as stream:
            for _ in range(count):
                assert stream.readline() == b"HTTP/1.1 200 OK\r\n"
                length = 0
                while (line := stream.readline()) != b"\r\n":
                    name, _, value = line.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                found.append(json.loads(stream.read(length)))
    return found


def in_one(request: bytes) -> list[bytes]:
    return [request]


def head_first(request: bytes) -> list[bytes]:
    head, _, body = request.partition(b"\r\n\r\n")
    return [head + b"\r\n\r\n", body]


def in_many(request: bytes) -> list[bytes]:
    return [request[start : start + 61] for start in range(0, len(request), 61)]


class TestUpgrades:
    @pytest.mark.parametrize("cut", [in_one, head_first, in_many])
    @pytest.mark.parametrize("form", [with_length, chunked])
    @pytest.mark.parametrize("name", UPGRADES)
    def test_a_wish_to_upgrade_is_served_as_it_would_be_without(
        self,
        name: str,
        form: Callable[[bytes, bytes], bytes],
        cut: Callable[[bytes], list[bytes]],
        app: LiveApp,
    ) -> None:
        body = JSON_BODY if cut is in_many else LONG_BODY
        request = form(body, UPGRADES[name])
        # The second one shows that the connection stays usable.
        packets = [*cut(request), *cut(with_length(JSON_BODY, b""))]
        first, second = answers_to(app.port, packets, count=2)
        assert (first["status"], second["status"]) == ("processing", "processing")
        assert first["id"] != second["id"]

    def test_several_wishes_on_one_connection_at_once(self, app: LiveApp) -> None:
        requests = b"".join(with_length(JSON_BODY, UPGRADES["JDK"]) for _ in range(5))
        answers = answers_to(app.port, [requests], count=5)
        assert len({answer["id"] for answer in answers}) == 5

    def test_a_get_without_a_body(self, app: LiveApp) -> None:
        request = b"GET /healthz HTTP/1.1\r\nHost: h\r\n" + UPGRADES["nginx's recipe"] + b"\r\n"
        assert answers_to(app.port, [request, request], count=2) == [{"status": "ok"}] * 2

    @pytest.mark.parametrize("method", [b"CONNECT h:80", b"PRI *"])
    def test_tunnels_are_refused(self, method: bytes, app: LiveApp) -> None:
        with socket.create_connection(("127.0.0.1", app.port), timeout=ANSWER_S) as client:
            client.sendall(method + b" HTTP/1.1\r\nHost: h\r\n\r\n")
            assert client.recv(65_536).startswith(b"HTTP/1.1 400")


class TestCompressedBodies:
    RAW = zlib.compressobj(wbits=-15)
    FORMS = {
        "gzip": ("gzip", gzip.compress(JSON_BODY)),
        "x-gzip": ("X-GZIP", gzip.compress(JSON_BODY)),
        "deflate": ("deflate", zlib.compress(JSON_BODY)),
        "deflate without a head": ("deflate", RAW.compress(JSON_BODY) + RAW.flush()),
        "identity": ("identity", JSON_BODY),
    }

    @pytest.mark.parametrize("name", FORMS)
    @pytest.mark.parametrize(("path", "status"), [("/api/v3/inpaint", 200), ("/api/jobs", 422)])
    def test_are_read(self, name: str, path: str, status: int, app: LiveApp) -> None:
        coding, content = self.FORMS[name]
        answer = app.client.post(path, content=content, headers={"content-encoding": coding})
        assert answer.status_code == status
        if status == 200:
            assert answer.json()["status"] == "processing"
        else:  # read as well: a V3 request has fields that the native API does not know
            assert answer.json()["code"] == "invalid_fields"

    @pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "compress", "nonsense"])
    def test_other_codings_get_a_sentence_of_their_own(self, coding: str, app: LiveApp) -> None:
        headers = {"content-encoding": coding}
        problem = app.client.post("/api/jobs", content=JSON_BODY, headers=headers)
        assert (problem.status_code, problem.json()["code"]) == (415, "unsupported_encoding")
        error = app.client.post("/api/v3/inpaint", content=JSON_BODY, headers=headers).json()
        assert "Content-Encoding" in error["tip"]

    @pytest.mark.parametrize(
        "content",
        [b"", gzip.compress(JSON_BODY)[:-12], b"no gzip at all", b"\x1f\x8b\x08"],
        ids=["empty", "cut", "plain", "begun"],
    )
    def test_broken_ones_are_refused(self, content: bytes, app: LiveApp) -> None:
        answer = app.client.post("/api/jobs", content=content, headers={"content-encoding": "gzip"})
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_body")

    def test_a_bomb_ends_at_the_limit_of_a_body(self, app: LiveApp) -> None:
        bomb = gzip.compress(bytes(100_000_000))
        answer = app.client.post("/api/jobs", content=bomb, headers={"content-encoding": "gzip"})
        assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")

    def test_what_is_inflated_counts_as_a_body(self, tmp_path: Path) -> None:
        with running_app(settings_in(tmp_path, http={"max_buffered_bytes": 5_500_000})) as app:
            noise = random.Random(7).randbytes(4_500_000)
            small = gzip.compress(json.dumps({"x": base64.b64encode(noise).decode()}).encode())
            answer = app.client.post(
                "/api/jobs", content=small, headers={"content-encoding": "gzip"}
            )
            assert (answer.status_code, answer.json()["code"]) == (503, "server_busy")
            assert app.client.post("/api/v3/inpaint", json=BODY).json()["status"] == "processing"

    def test_a_request_that_was_taken_up_is_read_at_the_limit_of_connections(
        self, tmp_path: Path
    ) -> None:
        with running_app(settings_in(tmp_path, http={"max_connections": 1})) as app:
            headers = {"content-encoding": "gzip", "connection": "close"}
            content = gzip.compress(JSON_BODY)
            answer = app.client.post("/api/v3/inpaint", content=content, headers=headers)
            assert answer.json()["status"] == "processing"

    def test_pieces_are_bounded(self) -> None:
        assert max(map(len, inflate(gzip.compress(bytes(50_000_000))))) <= 1_000_000
        with pytest.raises(zlib.error):
            list(inflate(zlib.compress(b"a" * 100)[:10]))


class TestProxies:
    @pytest.mark.parametrize(
        ("headers", "base"),
        [
            ({}, "http://inner:8000"),
            ({"X-Forwarded-Proto": "https"}, "https://inner:8000"),
            ({"X-Forwarded-Proto": "https,http"}, "https://inner:8000"),
            ({"X-Forwarded-Proto": "HTTPS"}, "https://inner:8000"),
            ({"X-Forwarded-Proto": "wss"}, "https://inner:8000"),
            ({"X-Forwarded-Proto": "javascript"}, "http://inner:8000"),
            ({"X-Forwarded-Host": "front.example"}, "http://front.example"),
            ({"X-Forwarded-Host": "front.example, inner"}, "http://front.example"),
            ({"X-Forwarded-Host": "front.example:8443"}, "http://front.example:8443"),
            ({"X-Forwarded-Host": "[2001:db8::1]"}, "http://[2001:db8::1]"),
            ({"X-Forwarded-Host": "a b/c"}, "http://inner:8000"),
            (
                {"X-Forwarded-Host": "f.example", "X-Forwarded-Port": "8443"},
                "http://f.example:8443",
            ),
            (
                {
                    "X-Forwarded-Host": "f.example",
                    "X-Forwarded-Port": "443",
                    "X-Forwarded-Proto": "https",
                },
                "https://f.example",
            ),
            ({"X-Forwarded-Host": "f.example", "X-Forwarded-Port": "x"}, "http://f.example"),
            ({"X-Forwarded-Host": "f.example", "X-Forwarded-Port": "99999"}, "http://f.example"),
            ({"X-Forwarded-Prefix": "/sd"}, "http://inner:8000/sd"),
            ({"X-Forwarded-Prefix": "/sd/, /b"}, "http://inner:8000/sd"),
            ({"X-Forwarded-Prefix": "//evil.example"}, "http://inner:8000"),
            ({"X-Forwarded-Prefix": '/"><script>'}, "http://inner:8000"),
            ({"Forwarded": "for=192.0.2.1;proto=https;host=f.example"}, "https://f.example"),
            (
                {"Forwarded": 'For="[2001:db8::1]:5";Host="f.example:1";Proto=https, for=10.0.0.1'},
                "https://f.example:1",
            ),
            ({"Forwarded": "proto=https", "X-Forwarded-Proto": "http"}, "http://inner:8000"),
            ({"Forwarded": 'host="a b";proto="'}, "http://inner:8000"),
        ],
        ids=str,
    )
    def test_links_follow_a_trusted_proxy(
        self, headers: dict[str, str], base: str, open_app: LiveApp
    ) -> None:
        headers = {**headers, "Host": "inner:8000"}
        answer = open_app.client.post("/api/v3/inpaint", json=BODY, headers=headers).json()
        assert answer["fetch_result"].startswith(f"{base}/api/v3/fetch/")

    def test_nobody_else_is_believed(self, tmp_path: Path) -> None:
        named: dict[str, Any] = {"auth": {"allow_anonymous": True}}
        named |= {"forwarded_allow_ips": ["192.0.2.1"]}
        told = {
            "X-Forwarded-Host": "evil.example",
            "X-Forwarded-Proto": "https",
            "X-Forwarded-Prefix": "/x",
            "Forwarded": "host=evil.example",
            "Host": "inner:8000",
        }
        with running_app(settings_in(tmp_path, **named)) as app:
            answer = app.client.post("/api/v3/inpaint", json=BODY, headers=told).json()
        assert answer["fetch_result"].startswith("http://inner:8000/api/v3/fetch/")

    def test_a_client_that_is_not_believed_is_logged_once(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It may be the operator's proxy, which is missing in the settings."""
        caplog.set_level(logging.WARNING)
        with running_app(settings_in(tmp_path, forwarded_allow_ips=["192.0.2.1"])) as app:
            app.client.get("/healthz", headers={"X-Forwarded-Extra": "1"})
            assert "proxy headers ignored" not in caplog.text
            for headers in ({"X-Forwarded-For": "192.0.2.7"}, {"Forwarded": "for=192.0.2.7"}):
                app.client.get("/healthz", headers=headers)
        assert caplog.text.count("proxy headers ignored") == 1
        assert "127.0.0.1 sends X-Forwarded-* or" in caplog.text
        assert "INPAINT_FORWARDED_ALLOW_IPS" in caplog.text

    def test_only_some_clients_are_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        async def call_from_each() -> None:
            proxies = TrustedProxies(PlainTextResponse("pong"), ["127.0.0.1"])
            for number in range(MAX_REPORTED + 5):
                transport = httpx2.ASGITransport(proxies, client=(f"2001:db8::{number:x}", 1))
                async with httpx2.AsyncClient(transport=transport) as client:
                    headers = {"X-Forwarded-For": "192.0.2.7"}
                    assert (await client.get("http://inner/", headers=headers)).text == "pong"

        caplog.set_level(logging.WARNING)
        asyncio.run(call_from_each())
        assert caplog.text.count("proxy headers ignored") == MAX_REPORTED

    def test_a_forwarded_host_must_be_allowed(self, tmp_path: Path) -> None:
        named: dict[str, Any] = {"auth": {"allow_anonymous": True}}
        named |= {"allowed_hosts": ["inner", "ours.example"]}
        with running_app(settings_in(tmp_path, **named)) as app:
            for host, name in (("ours.example", "ours.example"), ("evil.example", "inner")):
                headers = {"Host": "inner", "X-Forwarded-Host": host}
                answer = app.client.post("/api/v3/inpaint", json=BODY, headers=headers).json()
                assert answer["fetch_result"].startswith(f"http://{name}/")


def test_a_page_may_ask_before_it_calls_a_private_network(app: LiveApp) -> None:
    headers = {
        "origin": "http://localhost:3000",
        "access-control-request-method": "POST",
        "access-control-request-private-network": "true",
    }
    answer = app.client.options("/api/v3/inpaint", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-private-network"] == "true"


def test_idle_connections_outlive_those_of_proxies(tmp_path: Path) -> None:
    assert settings_in(tmp_path).http.keep_alive_s == 75


class TestRealClients:
    """Each posts the same body twice, by the means of its platform."""

    @pytest.fixture
    def body(self, tmp_path: Path) -> Path:
        file = tmp_path / "body.json"
        file.write_bytes(LONG_BODY)
        return file

    def answers(self, command: Sequence[str | Path]) -> list[dict[str, Any]]:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    @pytest.mark.parametrize("flag", ["--http2", "--http1.1", "--http1.0"])
    def test_curl(self, flag: str, body: Path, app: LiveApp) -> None:
        url = f"http://127.0.0.1:{app.port}/api/v3/inpaint"
        one = ["--data-binary", f"@{body}", "-H", "Content-Type: application/json", url]
        again = ["--next", "--silent", "--show-error", flag, "--write-out", "\n", *one]
        command = [program("curl"), "--silent", "--show-error", flag, "--write-out", "\n", *one]
        answers = self.answers([*command, *again])
        assert [answer["status"] for answer in answers] == ["processing"] * 2

    def test_jdk(self, body: Path, app: LiveApp) -> None:
        url = f"http://127.0.0.1:{app.port}/api/v3/inpaint"
        answers = self.answers([program("java"), CLIENTS / "Post.java", url, body])
        assert [answer["status"] for answer in answers] == ["processing"] * 2

    def test_node(self, body: Path, app: LiveApp) -> None:
        url = f"http://127.0.0.1:{app.port}/api/v3/inpaint"
        answers = self.answers([program("node"), CLIENTS / "post.mjs", url, body])
        assert [answer["status"] for answer in answers] == ["processing"] * 2
