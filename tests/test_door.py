"""Connections: which are dialled, which are kept, how a proxy is used, whom certificates name."""

import asyncio
import base64
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from server.addresses import AddressPolicy, checked_url
from server.door import MAX_UNREACHABLE, Door, dial
from server.exchange import BodyTooLarge, ExchangeFailed
from server.settings import EgressSettings
from tests.http_stub import ANSWER_S, answering, response, running_stub

LOOPBACK = AddressPolicy([ip_network("127.0.0.0/8")])
OK = response("200 OK", body=b"picture")


@dataclass(slots=True)
class KeepingHost:
    """A host that keeps connections. answers: what each request gets, None: hang up unanswered."""

    answers: Callable[[int], bytes | None]
    port: int = 0
    connections: int = 0
    requests: list[bytes] = field(default_factory=list)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/a.png"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.requests.append(head)
                answer = self.answers(len(self.requests))
                if answer is None:
                    break
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def keeping_host(
    answers: Callable[[int], bytes | None] = lambda _: OK, tls: ssl.SSLContext | None = None
) -> AsyncIterator[KeepingHost]:
    host = KeepingHost(answers)
    server = await asyncio.start_server(host.serve, "127.0.0.1", 0, ssl=tls)
    host.port = server.sockets[0].getsockname()[1]
    try:
        yield host
    finally:
        for writer in host.writers:
            writer.close()
        server.close()
        await server.wait_closed()


async def ask(
    door: Door, url: str, policy: AddressPolicy = LOOPBACK, method: str = "GET", **changes: Any
) -> bytes:
    given: dict[str, Any] = {
        "owner": "k",
        "headers": {},
        "max_body_bytes": 100,
        "connect_timeout_s": ANSWER_S,
    } | changes
    async with door.request(method, checked_url(url), policy, **given) as answer:
        return await answer.read()


def run_with_door(work: Callable[[Door], Awaitable[None]], door: Callable[[], Door] = Door) -> None:
    async def run() -> None:
        opened = door()
        try:
            async with asyncio.timeout(2 * ANSWER_S):
                await work(opened)
        finally:
            await opened.aclose()

    asyncio.run(run())


class TestKeptConnections:
    def test_one_connection_serves_many_requests(self) -> None:
        async def work(door: Door) -> None:
            async with keeping_host() as host:
                for _ in range(5):
                    assert await ask(door, host.url) == b"picture"
                assert (host.connections, len(host.requests)) == (1, 5)

        run_with_door(work)

    def test_kept_connection_is_judged_by_who_takes_it(self) -> None:
        """What one key may reach is no way in for another."""

        async def work(door: Door) -> None:
            async with keeping_host() as host:
                await ask(door, host.url)
                for policy in (AddressPolicy(), AddressPolicy([ip_network("127.0.0.2")])):
                    with pytest.raises(Exception, match="address 127.0.0.1 port"):
                        await ask(door, host.url, policy)
                await ask(door, host.url)
                assert (host.connections, len(host.requests)) == (1, 2)

        run_with_door(work)

    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_connection_closed_meanwhile_is_replaced(self, method: str) -> None:
        async def work(door: Door) -> None:
            async with keeping_host(lambda count: None if count == 2 else OK) as host:
                for _ in range(2):
                    assert await ask(door, host.url, method=method) == b"picture"
                assert (host.connections, len(host.requests)) == (2, 3)

        run_with_door(work)

    def test_new_connection_that_hangs_up_is_not_tried_again(self) -> None:
        async def work(door: Door) -> None:
            async with keeping_host(lambda _: None) as host:
                with pytest.raises(ExchangeFailed):
                    await ask(door, host.url)
                assert len(host.requests) == 1

        run_with_door(work)

    @pytest.mark.parametrize(
        "answer",
        [
            OK + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged",
            OK + b"HTTP/1.1 200",
            OK + b"x",
            response("200 OK", "Connection: close", body=b"picture"),
        ],
    )
    def test_connection_with_an_answer_too_many_is_not_kept(self, answer: bytes) -> None:
        async def work(door: Door) -> None:
            async with keeping_host(lambda count: answer if count == 1 else OK) as host:
                for _ in range(2):
                    assert await ask(door, host.url) == b"picture"
                assert host.connections == 2

        run_with_door(work)

    @pytest.mark.parametrize("size", [101, 10_000])
    def test_connection_whose_body_was_too_large_is_not_kept(self, size: int) -> None:
        large = response("200 OK", body=b"x" * size)

        async def work(door: Door) -> None:
            async with keeping_host(lambda count: large if count == 1 else OK) as host:
                with pytest.raises(BodyTooLarge):
                    await ask(door, host.url)
                assert await ask(door, host.url) == b"picture"
                assert host.connections == 2

        run_with_door(work)

    def test_answers_that_only_announce_are_skipped(self) -> None:
        early = b"HTTP/1.1 103 Early Hints\r\nContent-Length: 99\r\n\r\n" * 3

        async def work(door: Door) -> None:
            async with keeping_host(lambda _: early + OK) as host:
                assert await ask(door, host.url) == b"picture"

        run_with_door(work)

    def test_switching_protocols_is_refused(self) -> None:
        switch = b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"

        async def work(door: Door) -> None:
            async with keeping_host(lambda _: switch) as host:
                with pytest.raises(ExchangeFailed):
                    await ask(door, host.url)

        run_with_door(work)

    @pytest.mark.parametrize("value", ["a\r\nX-Forged: b", "a\nb"])
    def test_header_cannot_begin_another(self, value: str) -> None:
        async def work(door: Door) -> None:
            async with keeping_host() as host:
                with pytest.raises(ExchangeFailed):
                    await ask(door, host.url, headers={"If-None-Match": value})
                assert host.requests == []

        run_with_door(work)


class TestDialling:
    def test_second_address_is_tried(self) -> None:
        def resolver(_host: str, _port: int) -> Sequence[str]:
            return ["127.0.0.2", "127.0.0.1", "127.0.0.3"]

        async def work(door: Door) -> None:
            async with keeping_host() as host:
                assert await ask(door, host.url.replace("127.0.0.1", "a.example")) == b"picture"

        run_with_door(work, lambda: Door(resolver=resolver))

    def test_two_tries_and_then_a_pause(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("server.door.UNREACHABLE_S", ANSWER_S)
        dialled: list[str] = []

        async def nobody(address: str, _port: int) -> Any:
            dialled.append(address)
            raise ConnectionRefusedError

        async def work(door: Door) -> None:
            for _ in range(5):
                with pytest.raises((OSError, ExchangeFailed)):
                    await ask(door, "http://127.0.0.1/")

        run_with_door(work, lambda: Door(dialler=nobody))
        assert dialled == ["127.0.0.1"] * 2

    def test_memory_of_the_unreachable_is_bounded(self) -> None:
        def nobody(_host: str, _port: int) -> Any:
            raise OSError

        async def work(door: Door) -> None:
            for number in range(MAX_UNREACHABLE + 50):
                with pytest.raises(OSError):  # noqa: PT011 - there is nothing to match
                    await ask(door, f"http://host{number}.example/")
            assert len(door._unreachable) == MAX_UNREACHABLE

        run_with_door(work, lambda: Door(resolver=nobody))

    def test_own_impatience_says_nothing_of_a_host(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("server.lookups.TIMEOUT_S", 0.05)
        is_answering = threading.Event()

        def late(_host: str, _port: int) -> Sequence[str]:
            is_answering.wait(60)
            return ["127.0.0.1"]

        async def work(door: Door) -> None:
            async with keeping_host() as host:
                url = host.url.replace("127.0.0.1", "slow.example")
                with pytest.raises(TimeoutError):
                    await ask(door, url)
                is_answering.set()
                monkeypatch.setattr("server.lookups.TIMEOUT_S", 60)
                assert await ask(door, url) == b"picture"

        run_with_door(work, lambda: Door(resolver=late))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of pictures.example, signed by itself."""
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=pictures.example"
    names = "subjectAltName=DNS:pictures.example"
    subprocess.run(
        [*command.split(), "-addext", names, "-keyout", file, "-out", f"{file}.crt"],
        check=True,
        capture_output=True,
    )
    file.write_bytes(file.read_bytes() + Path(f"{file}.crt").read_bytes())
    return file


def server_tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def on_loopback(_host: str, _port: int) -> Sequence[str]:
    return ["127.0.0.1"]


class TestTls:
    @pytest.mark.parametrize("name", ["pictures.example", "others.example"])
    def test_certificate_must_be_of_the_name_though_an_address_is_dialled(
        self, name: str, certificate: Path
    ) -> None:
        async def work(door: Door) -> None:
            async with keeping_host(tls=server_tls(certificate)) as host:
                url = f"https://{name}:{host.port}/"
                if name == "pictures.example":
                    for _ in range(2):
                        assert await ask(door, url) == b"picture"
                    assert host.connections == 1
                else:
                    with pytest.raises(ssl.SSLCertVerificationError, match="others.example"):
                        await ask(door, url)
                    assert host.requests == []

        trusting = ssl.create_default_context(cafile=certificate)
        run_with_door(work, lambda: Door(resolver=on_loopback, tls=trusting))

    def test_authority_of_the_settings_is_trusted_for_images_and_webhooks(
        self, certificate: Path
    ) -> None:
        async def work(door: Door) -> None:
            async with keeping_host(tls=server_tls(certificate)) as host:
                url = f"https://pictures.example:{host.port}/"
                assert await ask(door, url) == b"picture"
                assert await ask(door, url, method="POST") == b"picture"
                with pytest.raises(ssl.SSLCertVerificationError, match="others.example"):
                    await ask(door, url.replace("pictures", "others"))

        settings = EgressSettings(ca_file=certificate)
        run_with_door(work, lambda: Door(settings, resolver=on_loopback))

    def test_unknown_signer_is_refused(self, certificate: Path) -> None:
        async def work(door: Door) -> None:
            async with keeping_host(tls=server_tls(certificate)) as host:
                with pytest.raises(ssl.SSLCertVerificationError):
                    await ask(door, f"https://pictures.example:{host.port}/")
                assert host.requests == []

        run_with_door(work, lambda: Door(resolver=on_loopback))


class TestProxy:
    @staticmethod
    def settings(port: int, user: str = "") -> EgressSettings:
        return EgressSettings.model_validate({"proxy": f"http://{user}127.0.0.1:{port}"})

    def test_plain_requests_name_the_whole_address(self) -> None:
        async def run() -> list[str]:
            async with running_stub(answering(OK)) as proxy:
                door = Door(self.settings(proxy.port, "me:pass%20word@"))
                # Nobody here resolves the name.
                assert await ask(door, "http://pictures.invalid/a?b") == b"picture"
                await door.aclose()
                return proxy.heads

        (head,) = asyncio.run(run())
        assert head.startswith("GET http://pictures.invalid/a?b HTTP/1.1\r\n")
        assert "\r\nHost: pictures.invalid\r\n" in head
        user = base64.b64encode(b"me:pass word").decode()
        assert f"\r\nProxy-Authorization: Basic {user}\r\n" in head

    def test_encrypted_requests_use_a_tunnel(self, certificate: Path) -> None:
        orders: list[bytes] = []

        async def run() -> None:
            async with keeping_host(tls=server_tls(certificate)) as host:

                async def tunnel(
                    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
                ) -> None:
                    orders.append(await reader.readuntil(b"\r\n\r\n"))
                    inner_reader, inner_writer = await asyncio.open_connection(
                        "127.0.0.1", host.port
                    )
                    writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

                proxy = await asyncio.start_server(tunnel, "127.0.0.1", 0)
                trusting = ssl.create_default_context(cafile=certificate)
                door = Door(self.settings(proxy.sockets[0].getsockname()[1], "me:x@"), tls=trusting)
                for _ in range(2):
                    assert await ask(door, "https://pictures.example/a") == b"picture"
                assert host.requests[0].startswith(b"GET /a HTTP/1.1\r\n")
                assert b"Proxy-Authorization" not in host.requests[0]
                await door.aclose()
                proxy.close()

        asyncio.run(run())
        assert len(orders) == 1
        assert orders[0].startswith(b"CONNECT pictures.example:443 HTTP/1.1\r\n")
        assert b"Proxy-Authorization: Basic" in orders[0]

    def test_refusal_of_the_proxy_is_a_failure(self) -> None:
        async def run() -> None:
            async with running_stub(answering(response("403 Forbidden"))) as proxy:
                door = Door(self.settings(proxy.port))
                with pytest.raises(ExchangeFailed, match="403"):
                    await ask(door, "https://pictures.invalid/")
                await door.aclose()

        asyncio.run(run())


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Bytes from one side to the other until one of them has gone."""
    try:
        while chunk := await reader.read(65_536):
            writer.write(chunk)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


def test_dialler_gives_its_socket_back_when_nobody_answers() -> None:
    async def run() -> None:
        with pytest.raises(OSError):  # noqa: PT011 - the system's own words
            await dial("127.0.0.1", 1)

    asyncio.run(run())
