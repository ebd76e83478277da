"""`EgressClient`: what is dialled, what an answer may hold, proxies, certificates, errors."""

import asyncio
import base64
import ssl
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpcore2
import pytest

from server.core.settings.sections import EgressSettings
from server.egress.client import (
    NETWORK_ERRORS,
    BodyTooLarge,
    EgressClient,
    EgressFailed,
    translated_errors,
)
from server.egress.policy import AddressDenied, AddressPolicy, checked_url
from tests.support.certificates import server_tls, write_certificate
from tests.support.egress import egress_client
from tests.support.http_stub import ANSWER_S, Stub, answering, response, running_stub

LOOPBACK = AddressPolicy([ip_network("127.0.0.0/8")])
OK = response("200 OK", body=b"picture")


@asynccontextmanager
async def encrypted_host(tls: ssl.SSLContext) -> AsyncIterator[Stub]:
    """A stub behind TLS, that answers with a picture."""
    stub = Stub("127.0.0.1")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stub.connections += 1
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            stub.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
            writer.write(OK)
        writer.close()

    server = await asyncio.start_server(serve, stub.host, 0, ssl=tls)
    stub.port = server.sockets[0].getsockname()[1]
    async with server:
        yield stub


async def ask(
    client: EgressClient,
    url: str,
    policy: AddressPolicy = LOOPBACK,
    method: str = "GET",
    **changes: Any,
) -> bytes:
    given: dict[str, Any] = {
        "owner": "k",
        "headers": {},
        "max_body_bytes": 100,
        "connect_timeout_s": ANSWER_S,
    } | changes
    async with (
        asyncio.timeout(2 * ANSWER_S),
        client.request(method, checked_url(url), policy, **given) as answer,
    ):
        return await answer.read()


def ask_stub(*answers: bytes, **changes: Any) -> list[bytes]:
    """The bodies of a host that gives these answers in turn."""
    left = iter(answers)

    async def behave(_path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(next(left))

    async def run() -> list[bytes]:
        async with running_stub(behave) as stub:
            client = egress_client()
            return [await ask(client, stub.url, **changes) for _ in answers]

    return asyncio.run(run())


class TestAnswers:
    @pytest.mark.parametrize(
        "surplus", [b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged", b"HTTP/1.1 200", b"x"]
    )
    def test_bytes_after_an_answer_are_not_the_next_answer(self, surplus: bytes) -> None:
        assert ask_stub(OK + surplus, OK) == [b"picture", b"picture"]

    def test_no_connection_is_left_for_a_request_under_another_policy(self) -> None:
        """What one key may reach is no way in for another."""

        async def run() -> int:
            async with running_stub(answering(OK)) as stub:
                client = egress_client()
                await ask(client, stub.url)
                for policy in (AddressPolicy(), AddressPolicy([ip_network("127.0.0.2")])):
                    with pytest.raises(AddressDenied, match="address 127.0.0.1 port"):
                        await ask(client, stub.url, policy)
                return stub.connections

        assert asyncio.run(run()) == 1

    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_host_that_hangs_up_is_not_asked_again(self, method: str) -> None:
        async def run() -> int:
            async with running_stub(answering(b"")) as stub:
                with pytest.raises(EgressFailed):
                    await ask(egress_client(), stub.url, method=method)
                return stub.connections

        assert asyncio.run(run()) == 1

    def test_answers_that_only_announce_are_skipped(self) -> None:
        early = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 3
        assert ask_stub(early + OK) == [b"picture"]

    def test_answers_that_only_announce_are_not_read_for_ever(self) -> None:
        async def announce(_path: str, writer: asyncio.StreamWriter) -> None:
            while True:
                writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 100)
                await writer.drain()

        async def run() -> None:
            async with running_stub(announce) as stub:
                await ask(egress_client(), stub.url)

        with pytest.raises(EgressFailed, match="more bytes"):
            asyncio.run(run())

    def test_switching_protocols_is_refused(self) -> None:
        with pytest.raises(EgressFailed):
            ask_stub(b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")

    @pytest.mark.parametrize("size", [101, 10_000])
    def test_large_body_is_refused(self, size: int) -> None:
        with pytest.raises(BodyTooLarge):
            ask_stub(response("200 OK", body=b"x" * size))

    @pytest.mark.parametrize("value", ["a\r\nX-Forged: b", "a\nb"])
    def test_header_cannot_begin_another(self, value: str) -> None:
        with pytest.raises(EgressFailed):
            ask_stub(OK, headers={"If-None-Match": value})


class CountingDialler(httpcore2.AnyIOBackend):
    """A dialler that counts, and to the hosts named `away` does not connect."""

    def __init__(self, *away: str) -> None:
        self.dialled: list[str] = []
        self._away = away

    async def connect_tcp(
        self, host: str, *arguments: Any, **named: Any
    ) -> httpcore2.AsyncNetworkStream:
        self.dialled.append(host)
        if host in self._away:
            raise httpcore2.ConnectError(host)
        return await super().connect_tcp(host, *arguments, **named)


class TestDialling:
    @staticmethod
    def found(_host: str, _port: int) -> Sequence[str]:
        return ["127.0.0.2", "127.0.0.1", "127.0.0.3"]

    async def test_second_address_is_tried(self) -> None:
        async with running_stub(answering(OK)) as stub:
            client = egress_client(resolver=self.found, dialler=CountingDialler("127.0.0.2"))
            assert await ask(client, stub.url.replace("127.0.0.1", "a.example")) == b"picture"

    def test_third_address_is_not(self) -> None:
        dialler = CountingDialler(*self.found("", 0))
        client = egress_client(resolver=self.found, dialler=dialler)
        with pytest.raises(EgressFailed):
            asyncio.run(ask(client, "http://a.example/"))
        assert dialler.dialled == ["127.0.0.2", "127.0.0.1"]

    def test_one_denied_address_of_many_denies_all(self) -> None:
        dialler = CountingDialler()
        client = egress_client(resolver=self.found, dialler=dialler)
        policy = AddressPolicy([ip_network("127.0.0.1"), ip_network("127.0.0.2")])
        with pytest.raises(AddressDenied, match=r"127\.0\.0\.3"):
            asyncio.run(ask(client, "http://a.example/", policy))
        assert dialler.dialled == []

    def test_slow_lookup_ends_in_a_timeout(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("server.egress.resolver.TIMEOUT_S", 0.05)
        is_over = threading.Event()

        def late(_host: str, _port: int) -> Sequence[str]:
            is_over.wait(60)
            return ["127.0.0.1"]

        async def run() -> None:
            try:
                await ask(egress_client(resolver=late), "http://slow.example/")
            finally:
                is_over.set()

        with pytest.raises(TimeoutError):
            asyncio.run(run())


FOREIGN = [
    each
    for each in vars(httpcore2).values()
    if isinstance(each, type)
    and issubclass(each, Exception)
    and each is not httpcore2.ConnectionNotAvailable  # it stays within httpcore2
]


class TestErrors:
    @pytest.mark.parametrize("foreign", FOREIGN)
    def test_every_error_of_the_transport_is_turned_into_ours(
        self, foreign: type[Exception]
    ) -> None:
        with pytest.raises(NETWORK_ERRORS), translated_errors():
            raise foreign

    @pytest.mark.parametrize(
        ("foreign", "ours"),
        [
            (httpcore2.ReadTimeout, TimeoutError),
            (TimeoutError, TimeoutError),
            (ConnectionResetError, EgressFailed),
            (UnicodeError, EgressFailed),
        ],
    )
    def test_time_outs_stay_time_outs(
        self, foreign: type[Exception], ours: type[Exception]
    ) -> None:
        with pytest.raises(Exception) as raised, translated_errors():  # noqa: PT011
            raise foreign("why")
        assert type(raised.value) is ours


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of pictures.example, signed by itself."""
    return write_certificate(tmp_path_factory.mktemp("tls") / "both.pem", "pictures.example")


def on_loopback(_host: str, _port: int) -> Sequence[str]:
    return ["127.0.0.1"]


class TestTls:
    @pytest.mark.process
    @pytest.mark.parametrize("name", ["pictures.example", "others.example"])
    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_certificate_must_be_of_the_name_though_an_address_is_dialled(
        self, method: str, name: str, certificate: Path
    ) -> None:
        """And the authority of the settings is trusted."""

        async def run() -> list[str]:
            async with encrypted_host(server_tls(certificate)) as host:
                client = egress_client(EgressSettings(ca_file=certificate), resolver=on_loopback)
                url = f"https://{name}:{host.port}/"
                if name == "pictures.example":
                    assert await ask(client, url, method=method) == b"picture"
                else:
                    with pytest.raises(EgressFailed, match="others.example"):
                        await ask(client, url, method=method)
                return host.heads

        assert len(asyncio.run(run())) == (name == "pictures.example")

    @pytest.mark.process
    async def test_name_is_sent_as_sni(self, certificate: Path) -> None:
        names: list[str | None] = []
        tls = server_tls(certificate)
        tls.sni_callback = lambda _socket, name, _context: names.append(name)
        async with encrypted_host(tls) as host:
            client = egress_client(EgressSettings(ca_file=certificate), resolver=on_loopback)
            await ask(client, f"https://pictures.example:{host.port}/")
        assert names == ["pictures.example"]

    @pytest.mark.process
    def test_unknown_signer_is_refused(self, certificate: Path) -> None:
        async def run() -> list[str]:
            async with encrypted_host(server_tls(certificate)) as host:
                with pytest.raises(EgressFailed, match="certificate verify failed"):
                    await ask(
                        egress_client(resolver=on_loopback),
                        f"https://pictures.example:{host.port}/",
                    )
                return host.heads

        assert asyncio.run(run()) == []


class TestProxy:
    @staticmethod
    def settings(port: int, user: str = "") -> EgressSettings:
        return EgressSettings.model_validate({"proxy": f"http://{user}127.0.0.1:{port}"})

    @pytest.mark.parametrize(
        ("host", "policy"),
        [
            ("pictures.invalid", LOOPBACK),  # nobody here resolves the name
            ("[2606:4700::1]", LOOPBACK),
            ("[::1]", AddressPolicy([ip_network("::1")])),
        ],
    )
    async def test_plain_requests_name_the_whole_address(
        self, host: str, policy: AddressPolicy
    ) -> None:
        async with running_stub(answering(OK)) as proxy:
            client = egress_client(self.settings(proxy.port, "me:p%C3%A4ss%20word@"))
            assert await ask(client, f"http://{host}/a?b", policy) == b"picture"
            (head,) = proxy.heads
        assert head.startswith(f"GET http://{host}/a?b HTTP/1.1\r\n")
        assert f"\r\nHost: {host}\r\n" in head
        user = base64.b64encode("me:päss word".encode()).decode()
        assert f"\r\nProxy-Authorization: Basic {user}\r\n" in head

    @pytest.mark.process
    def test_encrypted_requests_use_a_tunnel(self, certificate: Path) -> None:
        orders: list[bytes] = []

        async def run() -> str:
            async with encrypted_host(server_tls(certificate)) as host:

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
                port = proxy.sockets[0].getsockname()[1]
                trusting = ssl.create_default_context(cafile=certificate)
                client = egress_client(self.settings(port, "me:x@"), tls=trusting)
                assert await ask(client, "https://pictures.example/a") == b"picture"
                with pytest.raises(EgressFailed, match="others.example"):
                    await ask(client, "https://others.example/a")
                proxy.close()
                return host.heads[0]

        head = asyncio.run(run())
        assert head.startswith("GET /a HTTP/1.1\r\n")
        assert "Proxy-Authorization" not in head
        assert orders[0].startswith(b"CONNECT pictures.example:443 HTTP/1.1\r\n")
        assert b"Proxy-Authorization: Basic" in orders[0]

    async def test_refusal_of_the_proxy_is_a_failure(self) -> None:
        async with running_stub(answering(response("403 Forbidden"))) as proxy:
            with pytest.raises(EgressFailed, match="403"):
                await ask(egress_client(self.settings(proxy.port)), "https://pictures.invalid/")


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
