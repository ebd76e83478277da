"""The door to addresses that users name: which are dialled, and what a bad host can do."""

import asyncio
import socket
import struct
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from server.egress import (
    MAX_REDIRECTS,
    AddressPolicy,
    Fetcher,
    FetchFailed,
    JudgingBackend,
    Refused,
)
from server.errors import ImageProblem
from server.settings import FetchSettings
from tests.http_stub import Behaviour, Stub, answering, response, running_stub

OPEN = AddressPolicy()
LOOPBACK = ip_network("127.0.0.0/8")
LIMITS: dict[str, Any] = {
    "allow_cidrs": (LOOPBACK,),
    "max_image_bytes": 10_000,
    "connect_timeout_s": 5,
    "total_timeout_s": 10,
}
IMPATIENT: dict[str, Any] = {"connect_timeout_s": 0.3, "total_timeout_s": 0.4}
"""For hosts that nothing but a deadline ends."""

DENIED = """
0.0.0.0 0.255.255.255 10.0.0.0 10.255.255.255 100.64.0.1 100.127.255.255 127.0.0.1 127.255.255.254
168.63.129.16 169.254.0.1 169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.170 192.0.2.1
192.31.196.1 192.52.193.1 192.88.99.1 192.168.0.1 192.168.255.255 192.175.48.1 198.18.0.1
198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
:: ::1 ::127.0.0.1 ::7f00:1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:7f00:1 ::ffff:10.0.0.1
::ffff:169.254.169.254 ::ffff:0:127.0.0.1 ::ffff:0:8.8.8.8 64:ff9b::7f00:1 64:ff9b::8.8.8.8
64:ff9b:1::1 100::1 100:0:0:1::1 2001::1 2001:0:7f00:1:: 2001:10::1 2001:20::1 2001:1ff::1
2001:db8::1 2002:7f00:1:: 2002:808:808:: 2620:4f:8000::1 3fff::1 3fff:fff::1 4000::1 5f00::1 fc00::1
fd00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 febf::1 fec0::1 ff02::1 ff0e::1
""".split()

PUBLIC = """
1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.1
168.63.129.15 169.253.255.255 172.15.255.255 172.32.0.0 192.0.1.1 192.167.255.255 192.169.0.0
198.17.255.255 198.20.0.0 223.255.255.255 ::ffff:8.8.8.8 2001:200::1 2001:4860:4860::8888
2003::1 2606:4700:4700::1111 2620:4f:7fff::1 2a00:1450::1 3ffe:ffff::1
""".split()


class TestAddressPolicy:
    @pytest.mark.parametrize("address", DENIED)
    def test_what_is_not_public_is_refused(self, address: str) -> None:
        with pytest.raises(Refused):
            OPEN.judge("name", [address])

    @pytest.mark.parametrize("address", PUBLIC)
    def test_public_addresses_pass(self, address: str) -> None:
        assert OPEN.judge("name", [address]) == address

    @pytest.mark.parametrize("bad", ["127.0.0.1", "::1", "10.0.0.1"])
    def test_one_bad_answer_spoils_all(self, bad: str) -> None:
        for answers in (["8.8.8.8", bad], [bad, "8.8.8.8"]):
            with pytest.raises(Refused):
                OPEN.judge("name", answers)

    def test_no_answer_is_refused(self) -> None:
        for policy in (OPEN, AddressPolicy(allow_hosts=["name"])):
            with pytest.raises(Refused):
                policy.judge("name", [])

    def test_allowed_networks_pass(self) -> None:
        policy = AddressPolicy([ip_network("10.1.0.0/16"), ip_network("fd00::/8")])
        for address in ("10.1.2.3", "::ffff:10.1.2.3", "fd12::1", "8.8.8.8"):
            assert policy.judge("name", [address]) == address
        for address in ("10.2.0.1", "fe80::1", "127.0.0.1"):
            with pytest.raises(Refused):
                policy.judge("name", [address])

    def test_allowed_hosts_are_exact_names(self) -> None:
        policy = AddressPolicy(allow_hosts=["nas.local"])
        assert policy.judge("NAS.local", ["10.0.0.1"]) == "10.0.0.1"
        for host in ("local", "x.nas.local", "nas.local.evil.example", "nas-local"):
            with pytest.raises(Refused):
                policy.judge(host, ["10.0.0.1"])

    @pytest.mark.parametrize(
        ("address", "network"),
        [("169.254.169.254", "169.254.0.0/16"), ("169.254.169.254", "0.0.0.0/0")]
        + [("::ffff:169.254.169.254", "0.0.0.0/0"), ("fd00:ec2::254", "fd00::/8")],
    )
    def test_metadata_addresses_must_be_named_singly(self, address: str, network: str) -> None:
        assert not AddressPolicy([ip_network(network)]).allows(ip_address(address))

    @pytest.mark.parametrize("address", ["169.254.169.254", "fd00:ec2::254"])
    def test_metadata_addresses_named_singly_pass(self, address: str) -> None:
        assert AddressPolicy([ip_network(address)]).allows(ip_address(address))


class TestDialling:
    """`JudgingBackend` with name look-ups of ours."""

    @staticmethod
    async def dial(stub: Stub, answers: list[list[str]], policy: AddressPolicy) -> int:
        """Connect once; how many look-ups that took."""
        lookups = iter(answers)

        async def lookup(_host: str, _port: int) -> list[str]:
            return next(lookups)

        stream = await JudgingBackend(policy, lookup).connect_tcp("name.example", stub.port)
        await stream.aclose()
        return len(answers) - len(list(lookups))

    def test_judged_address_is_the_one_dialled(self) -> None:
        async def run() -> int:
            async with running_stub(answering(b""), "127.0.0.2") as stub:
                policy = AddressPolicy([ip_network("127.0.0.2")])
                return await self.dial(stub, [["127.0.0.2"], ["127.0.0.1"]], policy)

        assert asyncio.run(run()) == 1

    @pytest.mark.parametrize("answer", [["127.0.0.1"], ["127.0.0.2", "127.0.0.1"], []])
    def test_refused_address_is_not_dialled(self, answer: list[str]) -> None:
        async def run() -> int:
            async with running_stub(answering(b"")) as stub:
                with pytest.raises(Refused):
                    await self.dial(stub, [answer], AddressPolicy([ip_network("127.0.0.2")]))
            return stub.connections

        assert asyncio.run(run()) == 0

    def test_unix_sockets_are_refused(self) -> None:
        with pytest.raises(Refused):
            asyncio.run(JudgingBackend(OPEN).connect_unix_socket("/run/docker.sock"))


async def get(url: str, **limits: Any) -> bytes | ImageProblem:
    """What a fetch ends with, in bounded time."""
    fetcher = Fetcher(FetchSettings(**(LIMITS | limits)))
    try:
        async with asyncio.timeout(20):
            return await fetcher.get(url)
    except FetchFailed as failed:
        return failed.kind
    finally:
        await fetcher.aclose()


def get_from(behaviour: Behaviour, path: str = "/", **limits: Any) -> bytes | ImageProblem:
    """What fetching from a stub on an allowed address ends with."""

    async def run() -> bytes | ImageProblem:
        async with running_stub(behaviour) as stub:
            return await get(stub.url + path, **limits)

    return asyncio.run(run())


OK = response("200 OK", body=b"picture")
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def send_for_ever(writer: asyncio.StreamWriter, piece: bytes, pause_s: float = 0) -> None:
    while True:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(pause_s)


async def stall_before_headers(_path: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    await asyncio.Event().wait()


async def drip_headers(_path: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    await send_for_ever(writer, b"X: y\r\n", 0.02)


async def drip_body(_path: str, writer: asyncio.StreamWriter) -> None:
    writer.write(CHUNKED)
    await send_for_ever(writer, b"1\r\nx\r\n", 0.02)


async def endless_body(_path: str, writer: asyncio.StreamWriter) -> None:
    writer.write(CHUNKED)
    await send_for_ever(writer, b"1000\r\n" + b"x" * 4096 + b"\r\n")


async def endless_headers(_path: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    await send_for_ever(writer, b"X: " + b"y" * 4096 + b"\r\n")


async def reset(_path: str, writer: asyncio.StreamWriter) -> None:
    linger = struct.pack("ii", 1, 0)  # closing sends RST
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


class TestHosts:
    def test_body_is_returned(self) -> None:
        assert get_from(answering(OK)) == b"picture"

    def test_body_without_length_is_returned(self) -> None:
        assert get_from(answering(CHUNKED + b"3\r\npic\r\n0\r\n\r\n")) == b"pic"
        assert get_from(answering(b"HTTP/1.0 200 OK\r\n\r\npic")) == b"pic"

    def test_body_may_be_as_large_as_allowed(self) -> None:
        assert get_from(answering(OK), max_image_bytes=7) == b"picture"
        assert get_from(answering(OK), max_image_bytes=6) is ImageProblem.TOO_LARGE

    @pytest.mark.parametrize(
        ("answer", "problem"),
        [
            (response("404 Not Found", body=b"<html>"), ImageProblem.NOT_REACHABLE),
            (response("500 Oops"), ImageProblem.NOT_REACHABLE),
            (response("204 No Content"), ImageProblem.NOT_REACHABLE),
            (response("206 Partial Content", body=b"pic"), ImageProblem.NOT_REACHABLE),
            (response("302 Found"), ImageProblem.NOT_REACHABLE),
            (response("200 OK", "Content-Encoding: gzip"), ImageProblem.NOT_REACHABLE),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nx", ImageProblem.NOT_REACHABLE),
            (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nx", ImageProblem.NOT_REACHABLE),
            (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nx", ImageProblem.NOT_REACHABLE),
            (
                b"HTTP/1.1 200 OK\r\nContent-Length: 99000000000\r\n\r\nx",
                ImageProblem.TOO_LARGE,
            ),
            (CHUNKED + b"zz\r\n", ImageProblem.NOT_REACHABLE),
            (CHUNKED + b"3\r\npi", ImageProblem.NOT_REACHABLE),
            (b"SSH-2.0-OpenSSH_9.2\r\n", ImageProblem.NOT_REACHABLE),
            (b"\x00" * 100, ImageProblem.NOT_REACHABLE),
            (b"", ImageProblem.NOT_REACHABLE),
        ],
        ids=lambda value: str(value)[:60],
    )
    def test_bad_answer(self, answer: bytes, problem: ImageProblem) -> None:
        assert get_from(answering(answer)) is problem

    @pytest.mark.parametrize("behaviour", [stall_before_headers, drip_headers, drip_body])
    def test_host_that_only_a_deadline_ends(self, behaviour: Behaviour) -> None:
        assert get_from(behaviour, **IMPATIENT) is ImageProblem.NOT_REACHABLE

    @pytest.mark.parametrize(
        ("behaviour", "problem"),
        [
            (endless_headers, ImageProblem.NOT_REACHABLE),
            (endless_body, ImageProblem.TOO_LARGE),
            (reset, ImageProblem.NOT_REACHABLE),
        ],
    )
    def test_host_with_bad_manners(self, behaviour: Behaviour, problem: ImageProblem) -> None:
        assert get_from(behaviour) is problem

    def test_host_that_never_accepts(self) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
            # The first connection fills the backlog; the kernel drops the next one's SYN.
            with socket.create_connection(listener.getsockname()):
                url = "http://{}:{}/".format(*listener.getsockname())
                assert asyncio.run(get(url, **IMPATIENT)) is ImageProblem.NOT_REACHABLE

    def test_host_that_does_not_listen(self) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = "http://{}:{}/".format(*unused.getsockname())
            assert asyncio.run(get(url)) is ImageProblem.NOT_REACHABLE

    def test_plain_host_behind_https(self) -> None:
        async def run() -> bytes | ImageProblem:
            async with running_stub(answering(OK)) as stub:
                return await get(stub.url.replace("http:", "https:"))

        assert asyncio.run(run()) is ImageProblem.NOT_REACHABLE

    def test_name_that_cannot_be_looked_up(self) -> None:
        assert asyncio.run(get(f"http://{'a' * 64}.invalid/")) in set(ImageProblem)


def redirecting(location: str) -> Behaviour:
    return answering(response("302 Found", f"Location: {location}"))


async def count_down(path: str, writer: asyncio.StreamWriter) -> None:
    """/3 leads to /2, and so on; /0 is the picture."""
    left = int(path[1:])
    writer.write(response("302 Found", f"Location: /{left - 1}") if left else OK)
    await writer.drain()


class TestRedirects:
    @pytest.mark.parametrize("hops", range(MAX_REDIRECTS + 1))
    def test_short_chains_are_followed(self, hops: int) -> None:
        assert get_from(count_down, f"/{hops}") == b"picture"

    @pytest.mark.parametrize("hops", [MAX_REDIRECTS + 1, 50])
    def test_long_chains_are_not(self, hops: int) -> None:
        assert get_from(count_down, f"/{hops}") is ImageProblem.NOT_REACHABLE

    @pytest.mark.parametrize(
        "location",
        [
            "file:///etc/passwd",
            "gopher://127.0.0.1/",
            "data:image/png;base64,AAAA",
            "http://10.0.0.1/",
            "//10.0.0.1/x",
            "http://169.254.169.254/latest/meta-data/",
            "http://[::1]/",
            "http://user:password@127.0.0.1/",
            "http://127.0.0.1\\@8.8.8.8/",
            "http://127.0.0.1/" + "x" * 2_048,
        ],
    )
    def test_denied_target(self, location: str) -> None:
        assert get_from(redirecting(location)) is ImageProblem.NOT_ALLOWED

    @pytest.mark.parametrize(
        "location", ["http://[bad/", "http://127.0.0.1:99999/", "http://", "\x7f"]
    )
    def test_target_that_is_no_url(self, location: str) -> None:
        assert get_from(redirecting(location)) in set(ImageProblem)

    def test_denied_target_is_not_dialled(self) -> None:
        async def run() -> tuple[object, int]:
            async with (
                running_stub(answering(OK), "127.0.0.2") as inner,
                running_stub(redirecting(inner.url)) as outer,
            ):
                problem = await get(outer.url, allow_cidrs=(ip_network("127.0.0.1"),))
                return problem, inner.connections

        assert asyncio.run(run()) == (ImageProblem.NOT_ALLOWED, 0)


HOSTILE_URLS = (
    """
http://127.0.0.1:PORT/ HTTP://127.0.0.1:PORT/ https://127.0.0.1:PORT/ http://localhost:PORT/
http://LOCALHOST:PORT/ http://127.1:PORT/ http://127.0.1:PORT/ http://0177.0.0.1:PORT/
http://0x7f.0.0.1:PORT/ http://0x7f.1:PORT/ http://0x7f000001:PORT/ http://2130706433:PORT/
http://017700000001:PORT/ http://127.0.0.01:PORT/ http://0:PORT/ http://0.0.0.0:PORT/
http://[::1]:PORT/ http://[::]:PORT/ http://[0:0:0:0:0:0:0:1]:PORT/ http://[::127.0.0.1]:PORT/
http://[::ffff:127.0.0.1]:PORT/ http://[::ffff:7f00:1]:PORT/ http://[64:ff9b::7f00:1]:PORT/
http://[2002:7f00:1::]:PORT/ http://[::1%25lo]:PORT/ http://[::1%lo]:PORT/ http://[fe80::1%25lo]:PORT/
http://[127.0.0.1]:PORT/ http://１２７.０.０.１:PORT/ http://127。0。0。1:PORT/
http://①②⑦.⓪.⓪.①:PORT/ http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ:PORT/ http://127%2e0%2e0%2e1:PORT/
http://127.0.0.1%00.example:PORT/ http://127.0.0.1%2f@x:PORT/ http://user@127.0.0.1:PORT/
http://user:password@127.0.0.1:PORT/ http://8.8.8.8@127.0.0.1:PORT/ http://@127.0.0.1:PORT/
http://8.8.8.8\\@127.0.0.1:PORT/ http://127.0.0.1:PORT\\@8.8.8.8/ http:\\\\127.0.0.1:PORT\\
http://127.0.0.1:PORT#@8.8.8.8/ http://127.0.0.1:PORT?@8.8.8.8/ http:///127.0.0.1:PORT/
http:127.0.0.1:PORT/ http:/127.0.0.1:PORT/ //127.0.0.1:PORT/ 127.0.0.1:PORT file:///etc/passwd
file://127.0.0.1:PORT/ gopher://127.0.0.1:PORT/_x ftp://127.0.0.1:PORT/ dict://127.0.0.1:PORT/
ldap://127.0.0.1:PORT/ jar:http://127.0.0.1:PORT/ ws://127.0.0.1:PORT/ http+unix://127.0.0.1:PORT/
data:image/png;base64,AAAA javascript:0 http:// http://: http://? http://a..b/
""".split()
    + [
        "",
        "http://127.0.0.1:PORT/\x00",
        "http://127.0.0.1:PORT/\r\nX: y",
        " http://127.0.0.1:PORT/",
        "http://127.0.0.1:PORT/\t",
        "ht\ntp://127.0.0.1:PORT/",
        "http://127.0.0.1\x7f:PORT/",
        "http://127.0.0.1:PORT/" + "x" * 2_048,
    ]
)


class TestDeniedListener:
    def test_hostile_urls_never_reach_it(self) -> None:
        async def run() -> None:
            async with running_stub(answering(OK)) as stub:
                fetcher = Fetcher(FetchSettings(connect_timeout_s=0.3))
                for url in HOSTILE_URLS:
                    with pytest.raises(FetchFailed):
                        await fetcher.get(url.replace("PORT", str(stub.port)))
                    assert stub.connections == 0, url
                await fetcher.aclose()

        asyncio.run(run())

    def test_refusal_is_the_same_whether_anybody_listens(self) -> None:
        async def run() -> tuple[object, object]:
            async with running_stub(answering(OK)) as stub:
                there = await get(stub.url, allow_cidrs=())
            return there, await get(stub.url, allow_cidrs=())

        assert asyncio.run(run()) == (ImageProblem.NOT_ALLOWED, ImageProblem.NOT_ALLOWED)

    def test_strange_forms_of_an_allowed_address_are_judged_by_address(self) -> None:
        async def run() -> object:
            async with running_stub(answering(OK)) as stub:
                return await get(f"http://0x7f.1:{stub.port}/")

        assert asyncio.run(run()) == b"picture"


class TestRequests:
    def test_request_says_little(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for variable in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(variable, "http://127.0.0.1:9")

        async def run() -> Stub:
            async with running_stub(answering(OK)) as stub:
                assert await get(f"{stub.url}/a%20b?c=d%2Fe#f") == b"picture"
                return stub

        stub = asyncio.run(run())
        request, *headers = stub.heads[0].strip().split("\r\n")
        assert request == "GET /a%20b?c=d%2Fe HTTP/1.1"
        assert {header.partition(":")[0].lower() for header in headers} == {
            *("host", "accept", "accept-encoding", "connection", "user-agent")
        }
        assert "accept-encoding: identity" in stub.heads[0].lower()

    def test_cookies_are_not_kept(self) -> None:
        cookie = response("200 OK", "Set-Cookie: session=secret; Path=/", body=b"picture")

        async def run() -> list[str]:
            async with running_stub(answering(cookie)) as stub:
                fetcher = Fetcher(FetchSettings(**LIMITS))
                await fetcher.get(stub.url)
                await fetcher.get(stub.url)
                await fetcher.aclose()
                return stub.heads

        heads = asyncio.run(run())
        assert len(heads) == 2
        assert "cookie" not in heads[1].lower()

    def test_places_are_limited_and_given_back(self) -> None:
        active, peak = 0, 0

        async def behave(path: str, writer: asyncio.StreamWriter) -> None:
            nonlocal active, peak
            active += 1
            peak = max(peak, active)
            await asyncio.sleep(0)
            active -= 1
            writer.write(OK if path == "/good" else response("404 Not Found"))

        async def run() -> list[bytes | BaseException]:
            async with running_stub(behave) as stub:
                fetcher = Fetcher(FetchSettings(**LIMITS, max_concurrent=2))
                paths = ["/bad"] * 4 + ["/good"] * 4
                answers = await asyncio.gather(
                    *(fetcher.get(stub.url + path) for path in paths), return_exceptions=True
                )
                await fetcher.aclose()
                return answers

        answers = asyncio.run(run())
        assert answers[4:] == [b"picture"] * 4
        assert peak <= 2
