"""Slow, silent and many clients: who is cut, who is answered, and what is left of them."""

import asyncio
import json
import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.api.proxies import is_trusted
from server.core.settings.sections import HttpSettings
from server.serving.connections import RESERVE, ConnectionLimiter
from server.serving.server import bind
from server.storage.files import CHUNK_BYTES, Storage
from tests.support.apps import settings_in, store_of
from tests.support.http_stub import LiveApp, running_app
from tests.support.jobs import waiting_in
from tests.support.v3_calls import BODY
from tests.support.waiting import until

pytestmark = pytest.mark.process

SHORT = {"head_timeout_s": 0.5, "body_timeout_s": 0.5, "keep_alive_s": 1, "send_timeout_s": 0.5}
POST = b"POST /api/v3/system_load HTTP/1.1\r\nHost: localhost\r\n"
LIMIT_S = 30.0
"""For what takes less than one on a quiet machine."""


class Line:
    """A connection as the limiter sees it."""

    def __init__(self, address: str = "192.0.2.1") -> None:
        self.address = address
        self.body_bytes = self.unsent_bytes = 0
        self.is_cut = False

    def cut(self) -> None:
        self.is_cut = True


async def test_answers_are_sent_without_waiting_for_acknowledgements() -> None:
    """Nagle's algorithm would hold back an answer's body for 40 ms."""
    accepted = asyncio.get_running_loop().create_future()

    class Server(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            accepted.set_result(transport.get_extra_info("socket"))

    listener = bind("127.0.0.1", 0)
    server = await asyncio.get_running_loop().create_server(Server, sock=listener)
    async with server:
        with socket.create_connection(listener.getsockname()):
            connection = await accepted
            assert int(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))


class TestConnectionLimiter:
    def limiter(self, max_connections: int = 3, **limits: int) -> ConnectionLimiter:
        return ConnectionLimiter(
            HttpSettings.model_validate(limits), max_connections, ["127.0.0.1"]
        )

    def test_the_one_that_waited_longest_makes_room(self) -> None:
        limiter, lines = self.limiter(), [Line() for _ in range(5)]
        assert all(limiter.opened(line) for line in lines)
        assert [line.is_cut for line in lines] == [True, True, False, False, False]
        assert (limiter.open_count, limiter.cut_count) == (3, 2)

    def test_a_whole_request_is_never_cut(self) -> None:
        limiter, lines = self.limiter(), [Line() for _ in range(4)]
        for line in lines[:2]:
            limiter.opened(line)
            limiter.request_started(line)
        assert limiter.opened(lines[2])
        assert limiter.opened(lines[3])
        assert [line.is_cut for line in lines] == [False, False, True, False]

    def test_a_reserve_is_left_where_all_work(self) -> None:
        limiter = self.limiter()
        working = [Line() for _ in range(3 + RESERVE)]
        for line in working:
            assert limiter.opened(line)
            limiter.request_started(line)
        assert limiter.is_busy
        assert not limiter.opened(Line())
        limiter.closed(working[0])
        assert limiter.opened(Line())

    def test_slow_clients_do_not_make_the_server_busy(self) -> None:
        limiter = self.limiter()
        for _ in range(10):
            limiter.opened(Line())
        assert not limiter.is_busy

    def test_an_answered_connection_waits_again_as_the_youngest(self) -> None:
        limiter, (first, second, third, fourth) = self.limiter(), [Line() for _ in range(4)]
        for line in (first, second, third):
            limiter.opened(line)
        limiter.request_started(first)
        limiter.idle(first)
        limiter.opened(fourth)
        assert [first.is_cut, second.is_cut] == [False, True]

    def test_one_address_loses_its_own(self) -> None:
        limiter = self.limiter(10, max_connections_per_address=2)
        other, mine = Line("192.0.2.9"), [Line() for _ in range(3)]
        for line in (other, *mine):
            assert limiter.opened(line)
        assert [line.is_cut for line in (other, *mine)] == [False, True, False, False]
        for line in mine[1:]:
            limiter.request_started(line)
        assert not limiter.opened(Line())
        assert limiter.opened(Line("192.0.2.8"))

    def test_a_trusted_proxy_has_many_clients(self) -> None:
        limiter = self.limiter(10, max_connections_per_address=1)
        lines = [Line("127.0.0.1") for _ in range(5)]
        assert all(limiter.opened(line) for line in lines)
        assert not any(line.is_cut for line in lines)

    def test_bodies_together_have_a_limit(self) -> None:
        limiter = self.limiter(max_buffered_bytes=100)
        quiet, first, second = lines = [Line("127.0.0.1") for _ in range(3)]
        for line in lines:
            limiter.opened(line)
        limiter.received(first, 60)
        limiter.received(second, 60)
        assert [line.is_cut for line in lines] == [False, True, False]
        limiter.request_started(second)
        limiter.received(second, 40)
        assert limiter.is_busy
        limiter.idle(second)
        assert not limiter.is_busy

    def test_a_body_that_nobody_holds_makes_room(self) -> None:
        limiter, (first, second) = self.limiter(max_buffered_bytes=100), [Line("127.0.0.1"), Line()]
        for line in (first, second):
            limiter.opened(line)
        limiter.received(first, 100)
        limiter.request_started(first)
        assert limiter.is_busy_for(second)
        limiter.release(first)
        assert not limiter.is_busy_for(second)
        assert not first.is_cut

    def test_one_address_has_a_share_of_the_room_for_bodies(self) -> None:
        limiter = self.limiter(10, max_buffered_bytes=400)
        mine, other, proxy = [Line() for _ in range(3)], Line("192.0.2.9"), Line("127.0.0.1")
        for line in (*mine, other, proxy):
            limiter.opened(line)
        limiter.received(mine[0], 60)
        limiter.received(mine[1], 60)
        assert [line.is_cut for line in mine] == [True, False, False]
        limiter.request_started(mine[1])
        limiter.received(mine[2], 40)
        assert [limiter.is_busy_for(line) for line in (mine[2], other)] == [True, False]
        limiter.received(proxy, 200)
        assert not limiter.is_busy_for(proxy)
        assert not proxy.is_cut

    def test_answers_that_are_not_taken_count_beside_bodies(self) -> None:
        limiter = self.limiter(10, max_buffered_bytes=100)
        lines = [Line(f"192.0.2.{n}") for n in range(4)]
        for line in lines:
            limiter.opened(line)
            limiter.request_started(line)
        first, second, third, fourth = lines
        limiter.unsent(first, 40)
        limiter.unsent(second, 40)
        limiter.unsent(first, 30)
        limiter.unsent(third, 50)
        assert [line.is_cut for line in lines] == [True, False, False, False], "the slowest goes"
        limiter.unsent(second, 0)
        limiter.unsent(fourth, 60)
        assert [line.is_cut for line in lines] == [True, False, True, False]

    def test_nothing_is_left_of_those_who_left(self) -> None:
        limiter, lines = self.limiter(100), [Line(f"192.0.2.{n}") for n in range(50)]
        for line in lines:
            limiter.opened(line)
            limiter.received(line, 10)
            limiter.unsent(line, 10)
        for line in lines * 2:
            limiter.closed(line)
            limiter.release(line)
            limiter.unsent(line, 10)
        left = (
            limiter._open,
            limiter._waiting,
            limiter._waiting_of,
            limiter._counts,
            limiter._unsent,
        )
        assert not any((*left, limiter._buffered_bytes, limiter._buffered_of))


@pytest.mark.parametrize(
    ("address", "trusted", "expected"),
    [
        ("127.0.0.1", ["127.0.0.1"], True),
        ("127.0.0.2", ["127.0.0.1"], False),
        ("10.1.2.3", ["127.0.0.1", "10.0.0.0/8"], True),
        ("10.1.2.3", ["fd00::/8"], False),
        ("fd00::/64", ["fd00::/8"], True),
        ("192.0.2.1", ["*"], True),
        ("", ["10.0.0.0/8"], False),
    ],
)
def test_is_trusted(address: str, trusted: list[str], expected: bool) -> None:
    assert is_trusted(address, trusted) is expected


OPEN = {"max_body_bytes": 100_000, "auth": {"allow_anonymous": True}}


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveApp]:
    """A server without patience, for what it cuts: on a machine that stands still, all."""
    settings = settings_in(tmp_path_factory.mktemp("data"), http=SHORT, **OPEN)
    with running_app(settings) as app:
        yield app


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveApp]:
    """One that waits for requests, under any name, and closes idle connections soon."""
    settings = settings_in(tmp_path_factory.mktemp("data"), http={"keep_alive_s": 1}, **OPEN)
    with running_app(settings) as app:
        app.client.headers["connection"] = "close"
        yield app


class TestDeadlines:
    @pytest.mark.parametrize(
        "sent",
        [
            b"",
            b"\r\n",
            b"POST /api",
            POST,
            POST + b"Content-Length: 100\r\n\r\n{",
            POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
        ],
    )
    def test_a_request_that_does_not_come_is_cut(self, sent: bytes, hasty: LiveApp) -> None:
        with socket.create_connection(("127.0.0.1", hasty.port), timeout=LIMIT_S) as client:
            client.sendall(sent)
            assert end_of(client) == b""

    def test_dripping_does_not_prolong(self, hasty: LiveApp) -> None:
        with socket.create_connection(("127.0.0.1", hasty.port), timeout=LIMIT_S) as client:
            client.sendall(POST)
            drip_until_cut(client, b"x: y\r\n", 0.05)

    def test_a_refused_body_does_not_stay_open(self, tmp_path: Path) -> None:
        # Long enough for the answer, which must come before it.
        settings = settings_in(tmp_path, http={"body_timeout_s": 5}, **OPEN)
        with (
            running_app(settings) as app,
            socket.create_connection(("127.0.0.1", app.port), timeout=LIMIT_S) as client,
        ):
            client.sendall(POST + b"Content-Length: 9000000\r\n\r\n{")
            assert client.recv(65_536).startswith(b"HTTP/1.1 200")
            drip_until_cut(client, b"x", 0.05)

    def test_an_idle_connection_is_closed(self, patient: LiveApp) -> None:
        with socket.create_connection(("127.0.0.1", patient.port), timeout=LIMIT_S) as client:
            client.sendall(POST + b"\r\n")
            assert end_of(client).startswith(b"HTTP/1.1 200")

    def test_one_connection_serves_many_requests(self, patient: LiveApp) -> None:
        with socket.create_connection(("127.0.0.1", patient.port), timeout=LIMIT_S) as client:
            client.sendall((POST + b"Content-Length: 2\r\n\r\n{}") * 10)
            assert end_of(client).count(b'"status":"ok"') == 10

    def test_a_client_that_takes_no_answer_is_cut(self, tmp_path: Path) -> None:
        settings = settings_in(tmp_path, http=SHORT)
        name = "generations/00000000-0000-4000-8000-000000000000-0.png"
        Storage(settings.storage_url).put(name, bytes(20_000_000))
        with running_app(settings) as app, slow_reader(app.port) as client:
            client.sendall(f"GET /{name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            resets = select.poll()
            resets.register(client, select.POLLHUP)
            assert resets.poll(LIMIT_S * 1_000)

    def test_slow_readers_hold_little_of_a_picture(self, tmp_path: Path) -> None:
        settings = settings_in(tmp_path)
        name = "generations/00000000-0000-4000-8000-000000000000-0.png"
        picture = bytes(range(256)) * 80_000
        Storage(settings.storage_url).put(name, picture)
        with running_app(settings) as app, ExitStack() as stack:
            limiter = app.server.limiter
            readers = [stack.enter_context(slow_reader(app.port)) for _ in range(20)]
            for reader in readers:
                reader.sendall(f"GET /{name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            until(lambda: len(limiter._unsent) == len(readers), LIMIT_S, "unsent answers")
            held = [each.unsent_bytes for each in limiter._unsent]
            assert max(held) <= 2 * CHUNK_BYTES
            head, _, start = readers[0].recv(65_536).partition(b"\r\n\r\n")
            assert b"content-length: %d" % len(picture) in head.lower()
            while len(start) < len(picture):
                start += readers[0].recv(1_000_000)
            assert start == picture, "and get it whole once they read"

    def test_a_client_that_takes_its_answer_slowly_but_steadily_is_kept(
        self, tmp_path: Path
    ) -> None:
        # Long enough for a client that stands still for a moment.
        settings = settings_in(tmp_path, http={"send_timeout_s": 4})
        name = "generations/00000000-0000-4000-8000-000000000000-0.png"
        Storage(settings.storage_url).put(name, bytes(8_000_000))
        with running_app(settings) as app, slow_reader(app.port) as client:
            client.sendall(f"GET /{name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            limiter = app.server.limiter
            until(lambda: bool(limiter._unsent), LIMIT_S, "an unsent answer")
            connection: Any = next(iter(limiter._unsent))
            looks = [connection._send_deadline]
            for _ in range(2):
                left = 400_000
                while left > 0:
                    left -= len(client.recv(left))
                until(
                    lambda: connection._send_deadline is not looks[-1], LIMIT_S, "another deadline"
                )
                looks.append(connection._send_deadline)
            assert connection._send_deadline is not None, "it was cut"


def slow_reader(port: int) -> socket.socket:
    """A connection whose kernel takes little that is not read."""
    client = socket.socket()
    client.settimeout(LIMIT_S)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_048)
    client.connect(("127.0.0.1", port))
    return client


def end_of(client: socket.socket) -> bytes:
    """All that comes until the server closes; it may close with a reset."""
    content = b""
    try:
        while chunk := client.recv(65_536):
            content += chunk
    except ConnectionResetError:
        pass
    return content


def drip_until_cut(client: socket.socket, drop: bytes, pause_s: float) -> None:
    """Send a few bytes now and then; fails when the server puts up with it."""
    client.settimeout(pause_s)
    limit = time.monotonic() + LIMIT_S
    while time.monotonic() < limit:
        try:
            client.sendall(drop)
            if not client.recv(65_536):
                return
        except TimeoutError:
            continue
        except ConnectionError:
            return
    raise AssertionError("the server still waits")


class TestHeads:
    @pytest.mark.parametrize(
        "head",
        [
            b"GET /healthz HTTP/1.1\r\n" + b"x: y\r\n" * 101 + b"\r\n",
            b"GET /healthz HTTP/1.1\r\nHost: h\r\nx: " + b"y" * 8_200 + b"\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nx: " + b"y" * 70_000,
            b"GET /healthz HTTP/1.1\r\nx: " + b"y" * 70_000 + b"\r\n\r\n",
            b"GET /healthz?" + b"y" * 70_000 + b" HTTP/1.1\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\n" + (b"x: " + b"y" * 1_000 + b"\r\n") * 70 + b"\r\n",
            b"GET /healthz HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ],
        ids=["many", "large", "endless", "long", "url", "total", "smuggled", "tls", "http2"],
    )
    def test_head_beyond_the_limits(self, head: bytes, patient: LiveApp) -> None:
        with socket.create_connection(("127.0.0.1", patient.port), timeout=LIMIT_S) as client:
            with suppress(ConnectionError):  # refused before its end has left
                client.sendall(head)
            refusal = end_of(client)
        # A reset may overtake the refusal.
        assert refusal == b"" or refusal.startswith(b"HTTP/1.1 400")
        assert len(refusal) < 500
        assert patient.client.get("/healthz").json() == {"status": "ok"}

    def test_large_body_in_one_piece_is_no_large_head(self, patient: LiveApp) -> None:
        body = json.dumps({"x": "y" * 90_000}).encode()
        with socket.create_connection(("127.0.0.1", patient.port), timeout=LIMIT_S) as client:
            client.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert client.recv(15) == b"HTTP/1.1 200 OK"

    @pytest.mark.parametrize("host", ["a b", "h/x", "h?x=", "h#", "u@h", "h:x", "[::1", "é", "h,i"])
    def test_malformed_host_is_refused(self, host: str, patient: LiveApp) -> None:
        headers = [(b"Host", host.encode())]
        answer = patient.client.post("/api/v3/system_load", headers=headers).json()
        assert answer["message"] == "Invalid API Request"
        assert "Host header" in answer["tip"]
        problem = patient.client.get("/api/jobs", headers=headers)
        assert (problem.status_code, problem.json()["code"]) == (400, "invalid_host")

    @pytest.mark.parametrize("host", ["h", "h:80", "a-b.example.", "127.0.0.1:1", "[::1]:8000"])
    def test_well_formed_hosts(self, host: str, patient: LiveApp) -> None:
        answer = patient.client.post("/api/v3/system_load", headers={"host": host}).json()
        assert answer["status"] == "ok"

    @pytest.mark.parametrize(
        ("version", "headers", "is_taken"),
        [
            (b"1.1", b"Host: localhost\r\n", True),
            (b"1.1", b"", False),
            (b"1.1", b"Host: localhost\r\nHost: h\r\n", False),
            (b"1.0", b"", True),
        ],
    )
    def test_host_is_missing_in_the_oldest_requests_only(
        self, version: bytes, headers: bytes, is_taken: bool, patient: LiveApp
    ) -> None:
        answer = answer_to(patient.port, version, headers)
        assert (b'"status":"ok"' in answer) is is_taken

    @pytest.mark.parametrize("version", [b"1.0", b"1.1"])
    def test_host_may_not_be_missing_where_hosts_are_listed(
        self, version: bytes, tmp_path: Path
    ) -> None:
        with running_app(settings_in(tmp_path, allowed_hosts=["ours.example"])) as app:
            assert b"Invalid API Request" in answer_to(app.port, version, b"")
            assert b'"status":"ok"' in answer_to(app.port, version, b"Host: ours.example\r\n")

    def test_hosts_can_be_listed(self, tmp_path: Path) -> None:
        settings = settings_in(tmp_path, allowed_hosts=["Pictures.example", "*.ours.example"])
        with running_app(settings) as app:

            def status_for(host: str) -> Any:
                return app.client.post("/api/v3/system_load", headers={"host": host}).json()[
                    "status"
                ]

            allowed = ["pictures.example", "PICTURES.example:8000", "a.ours.example"]
            others = ["evil.example", "ours.example", "xours.example", "pictures.example.evil"]
            assert [status_for(host) for host in allowed] == ["ok"] * 3
            assert [status_for(host) for host in others] == ["error"] * 4
            assert app.client.get("/healthz", headers={"host": "10.0.0.7"}).status_code == 200


def answer_to(port: int, version: bytes, headers: bytes) -> bytes:
    """What a call with these headers only is answered."""
    head = b"POST /api/v3/system_load HTTP/" + version + b"\r\n" + headers
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as client:
        client.sendall(head + b"Connection: close\r\n\r\n")
        return end_of(client)


class TestAnswers:
    @pytest.mark.parametrize("path", ["/healthz", "/nowhere", "/openapi.json", "/api/v3/fetch/1"])
    def test_every_answer_has_the_headers(self, path: str, patient: LiveApp) -> None:
        for method in ("GET", "POST", "OPTIONS"):
            headers = patient.client.request(method, path).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["cache-control"] == "no-store"
            assert len(headers["x-request-id"]) == 32
            assert "server" not in headers

    def test_clients_may_name_their_requests(self, patient: LiveApp) -> None:
        for given, is_taken in [
            ("order-2026.11_22", True),
            ("short", False),
            ("x" * 65, False),
            ("white space", False),
            ('"quotes"', False),
        ]:
            answer = patient.client.get("/healthz", headers={"x-request-id": given})
            assert (answer.headers["x-request-id"] == given) is is_taken

    def test_busy_server_says_so_and_answers_probes(self, tmp_path: Path) -> None:
        settings = settings_in(tmp_path, hold_s=60, http={"max_connections": 1})
        with running_app(settings) as app, httpx2.Client(base_url=app.client.base_url) as holder:
            with store_of(settings) as store, holding(holder):
                until(lambda: waiting_in(store) > 0, LIMIT_S, "a waiting job")
                answer = app.client.post("/api/v3/system_load")
                assert answer.json()["message"] == "The server is busy"
                assert answer.headers["retry-after"] == "5"
                assert app.client.get("/healthz").json() == {"status": "ok"}
                store.cancel(1)

    def test_a_held_call_gives_its_share_of_the_room_for_bodies_back(self, tmp_path: Path) -> None:
        settings = settings_in(tmp_path, hold_s=60, http={"max_buffered_bytes": 1_000})
        with running_app(settings) as app, httpx2.Client(base_url=app.client.base_url) as holder:
            app.client.get("/healthz")
            with store_of(settings) as store, holding(holder):
                until(lambda: waiting_in(store) > 0, LIMIT_S, "a waiting job")
                until(lambda: not app.server.limiter.is_busy, LIMIT_S, "a free place")
                assert app.client.post("/api/v3/system_load").json()["queue_num"] == 1
                store.cancel(1)


class holding:
    """A request held by the server while the block runs."""

    def __init__(self, client: httpx2.Client) -> None:
        request = client.build_request("POST", "/api/v3/inpaint", json=BODY)
        head = f"POST {request.url.path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
        self._content = f"{head}{len(request.content)}\r\n\r\n".encode() + request.content
        self._port = request.url.port

    def __enter__(self) -> socket.socket:
        self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=LIMIT_S)
        self._socket.sendall(self._content)
        return self._socket

    def __exit__(self, *_error: object) -> None:
        self._socket.close()
