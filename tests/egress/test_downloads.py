"""Pictures from addresses that users name: which are dialled, and what a bad host can do."""

import asyncio
import gzip
import socket
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from ipaddress import ip_network
from typing import Any

import pytest

from server.core.errors import ImageProblem
from server.core.settings.sections import EgressSettings, FetchSettings
from server.egress.downloads import (
    MAX_REDIRECTS,
    CachedImage,
    ConditionalCache,
    FetchFailed,
    ImageDownloader,
    conditional_headers,
)
from server.egress.policy import EgressGrant
from tests.corpora.hostile_urls import resolve_by_table
from tests.support.egress import egress_client
from tests.support.http_stub import Behaviour, StubDialler, answering, response, running_stub

LOOPBACK = ip_network("127.0.0.0/8")
LIMITS: dict[str, Any] = {
    "allow_cidrs": (LOOPBACK,),
    "max_image_bytes": 10_000,
    "connect_timeout_s": 60,
    "total_timeout_s": 60,
}
IMPATIENT: dict[str, Any] = {"connect_timeout_s": 0.3, "total_timeout_s": 0.4}
"""For hosts that nothing but a deadline ends."""


async def get(url: str, **limits: Any) -> bytes | ImageProblem:
    """What a fetch ends with, in bounded time."""
    fetcher = ImageDownloader(FetchSettings(**(LIMITS | limits)), egress_client())
    try:
        async with asyncio.timeout(120):
            return await fetcher.get(url)
    except FetchFailed as failed:
        return failed.kind


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


async def endless_small_chunks(_path: str, writer: asyncio.StreamWriter) -> None:
    writer.write(CHUNKED)
    await send_for_ever(writer, b"2\r\nxx\r\n" * 1_000)


async def endless_chunk_extensions(_path: str, writer: asyncio.StreamWriter) -> None:
    writer.write(CHUNKED)
    await send_for_ever(writer, b"1;" + b"y" * 4096 + b"\r\nx\r\n")


async def endless_trailers(_path: str, writer: asyncio.StreamWriter) -> None:
    writer.write(CHUNKED + b"0\r\n")
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
            (endless_chunk_extensions, ImageProblem.NOT_REACHABLE),
            (endless_trailers, ImageProblem.NOT_REACHABLE),
            (endless_body, ImageProblem.TOO_LARGE),
            (reset, ImageProblem.NOT_REACHABLE),
        ],
    )
    def test_host_with_bad_manners(self, behaviour: Behaviour, problem: ImageProblem) -> None:
        assert get_from(behaviour) is problem

    def test_body_in_crumbs_is_not_read_to_its_end(self) -> None:
        """Long before it is too large."""
        tracemalloc.start()
        try:
            problem = get_from(endless_small_chunks, max_image_bytes=10_000_000)
            assert problem is ImageProblem.NOT_REACHABLE
            assert tracemalloc.get_traced_memory()[1] < 5_000_000
        finally:
            tracemalloc.stop()

    def test_body_in_small_pieces_is_read(self) -> None:
        piece = b"12345678" * 16
        pieces = b"80\r\n" + piece + b"\r\n"
        answer = CHUNKED + pieces * 5_000 + b"0\r\n\r\n"
        assert get_from(answering(answer), max_image_bytes=1_000_000) == piece * 5_000

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

    async def test_plain_host_behind_https(self) -> None:
        async with running_stub(answering(OK)) as stub:
            assert (
                await get(stub.url.replace("http:", "https:"), **IMPATIENT)
                is ImageProblem.NOT_REACHABLE
            )

    def test_name_that_cannot_be_looked_up(self) -> None:
        assert asyncio.run(get(f"http://{'a' * 64}.invalid/")) is ImageProblem.NOT_REACHABLE


CONTENT = b"picture " * 1_000


def raw_deflate(content: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(content) + packer.flush()


def encoded(coding: str, body: bytes) -> bytes:
    return response("200 OK", f"Content-Encoding: {coding}", body=body)


class TestContentEncodings:
    @pytest.mark.parametrize(
        "coding",
        [
            *("", "identity", "Identity", "base64", "aws-chunked", "utf-8", "UTF-8", "binary"),
            *("none", "image/png", "aws-chunked, base64", ",", "x" * 1_000),
        ],
    )
    def test_what_is_no_compression_means_nothing(self, coding: str) -> None:
        assert get_from(answering(encoded(coding, b"picture"))) == b"picture"

    @pytest.mark.parametrize(
        ("coding", "body"),
        [
            ("gzip", gzip.compress(CONTENT)),
            ("GZIP", gzip.compress(CONTENT)),
            ("x-gzip", gzip.compress(CONTENT)),
            ("aws-chunked, gzip", gzip.compress(CONTENT)),
            ("gzip,identity", gzip.compress(CONTENT)),
            ("gzip", gzip.compress(CONTENT) + bytes(100)),
            ("deflate", zlib.compress(CONTENT)),
            ("deflate", raw_deflate(CONTENT)),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_gzip_and_deflate_are_undone(self, coding: str, body: bytes) -> None:
        assert get_from(answering(encoded(coding, body))) == CONTENT

    @pytest.mark.parametrize(
        "coding", ["br", "BR", "zstd", "compress", "x-compress", "gzip, br", "gzip, gzip"]
    )
    def test_others_have_a_sentence_of_their_own(self, coding: str) -> None:
        body = encoded(coding, gzip.compress(CONTENT))
        assert get_from(answering(body)) is ImageProblem.COMPRESSED

    @pytest.mark.parametrize("coding", ["gzip", "deflate"])
    @pytest.mark.parametrize(
        "body",
        [b"", b"picture", gzip.compress(CONTENT)[:-9], bytes(50)],
        ids=["empty", "plain", "cut", "zeros"],
    )
    def test_broken_compression_is_damage(self, coding: str, body: bytes) -> None:
        assert get_from(answering(encoded(coding, body))) is ImageProblem.DAMAGED

    @pytest.mark.parametrize("pack", [gzip.compress, zlib.compress, raw_deflate])
    def test_limit_is_of_inflated_bytes(self, pack: Callable[[bytes], bytes]) -> None:
        coding = "gzip" if pack is gzip.compress else "deflate"
        answer = answering(encoded(coding, pack(CONTENT)))
        assert get_from(answer, max_image_bytes=len(CONTENT)) == CONTENT
        assert get_from(answer, max_image_bytes=len(CONTENT) - 1) is ImageProblem.TOO_LARGE

    def test_bomb_takes_no_more_room_than_a_picture(self) -> None:
        packer = zlib.compressobj(wbits=16 + zlib.MAX_WBITS)
        bomb = b"".join(packer.compress(bytes(1_000_000)) for _ in range(200)) + packer.flush()
        tracemalloc.start()
        try:
            answer = answering(encoded("gzip", bomb))
            assert get_from(answer, max_image_bytes=1_000_000) is ImageProblem.TOO_LARGE
            assert tracemalloc.get_traced_memory()[1] < 10_000_000
        finally:
            tracemalloc.stop()

    async def test_unchanged_picture_is_kept_inflated(self) -> None:
        body = response(
            *("200 OK", "Content-Encoding: gzip", 'ETag: "1"'), body=gzip.compress(CONTENT)
        )
        answers = iter([body, response("304 Not Modified", 'ETag: "1"')])

        async def behave(_path: str, writer: asyncio.StreamWriter) -> None:
            writer.write(next(answers))

        async with running_stub(behave) as stub:
            fetcher = ImageDownloader(FetchSettings(**LIMITS), egress_client())
            assert [await fetcher.get(stub.url) for _ in range(2)] == [CONTENT] * 2


class WarpedLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock can be put forward, so that time-outs need no waiting."""

    ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self.ahead_s


async def pass_time(seconds: float) -> None:
    """Put the clock forward, and let whatever is due by then happen."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, WarpedLoop)
    loop.ahead_s += seconds
    for _ in range(10):
        await asyncio.sleep(0)


class TestSlowHosts:
    """With the times of the default settings."""

    def fetch(self, behaviour: Behaviour) -> bytes | ImageProblem:
        async def run() -> bytes | ImageProblem:
            async with running_stub(behaviour) as stub:
                fetcher = ImageDownloader(FetchSettings(allow_cidrs=(LOOPBACK,)), egress_client())
                try:
                    return await fetcher.get(stub.url)
                except FetchFailed as failed:
                    return failed.kind

        with asyncio.Runner(loop_factory=WarpedLoop) as runner:
            return runner.run(run())

    @pytest.mark.parametrize(
        ("seconds", "outcome"),
        [(8, b"picture"), (16, b"picture"), (21, ImageProblem.NOT_REACHABLE)],
    )
    def test_first_byte_may_take_as_long_as_the_whole(
        self, seconds: float, outcome: object
    ) -> None:
        async def think(_path: str, writer: asyncio.StreamWriter) -> None:
            await pass_time(seconds)
            writer.write(OK)

        assert self.fetch(think) == outcome

    @pytest.mark.parametrize(
        ("seconds", "outcome"), [(3, OK[-7:]), (5, ImageProblem.NOT_REACHABLE)]
    )
    def test_pieces_are_bounded_by_the_whole(self, seconds: float, outcome: object) -> None:
        async def drip(_path: str, writer: asyncio.StreamWriter) -> None:
            for at in range(0, len(OK), len(OK) // 5 + 1):
                writer.write(OK[at : at + len(OK) // 5 + 1])
                await writer.drain()
                await pass_time(seconds)

        assert self.fetch(drip) == outcome

    def test_redirects_count_too(self) -> None:
        async def behave(path: str, writer: asyncio.StreamWriter) -> None:
            await pass_time(8)
            await count_down(path, writer)

        async def run(hops: int) -> bytes | ImageProblem:
            async with running_stub(behave) as stub:
                return await get(f"{stub.url}/{hops}", connect_timeout_s=5, total_timeout_s=20)

        for hops, outcome in ((1, b"picture"), (2, ImageProblem.NOT_REACHABLE)):
            with asyncio.Runner(loop_factory=WarpedLoop) as runner:
                assert runner.run(run(hops)) == outcome


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
            "http://127.0.0.1/" + "x" * 8_192,
        ],
    )
    def test_denied_target(self, location: str) -> None:
        assert get_from(redirecting(location)) is ImageProblem.NOT_REACHABLE

    @pytest.mark.parametrize(
        "location", ["http://[bad/", "http://127.0.0.1:99999/", "http://", "http://xn--a/", "\x7f"]
    )
    def test_target_that_is_no_url(self, location: str) -> None:
        assert get_from(redirecting(location)) is ImageProblem.NOT_REACHABLE

    @pytest.mark.parametrize(
        ("location", "path"),
        [
            (b"/my picture.png", "/my%20picture.png"),
            (b"my picture.png?a=b c#d e", "/from/my%20picture.png?a=b%20c"),
            (b"/my%20picture.png", "/my%20picture.png"),
            (b"  /a.png  ", "/a.png"),
            ("/Grüße/写真.png".encode(), "/Gr%C3%BC%C3%9Fe/%E5%86%99%E7%9C%9F.png"),
            ("?name=é à".encode(), "/from/here?name=%C3%A9%20%C3%A0"),
            (b"/caf\xe9 1.png", "/caf%E9%201.png"),
        ],
    )
    async def test_location_that_is_not_escaped(self, location: bytes, path: str) -> None:
        async def behave(asked: str, writer: asyncio.StreamWriter) -> None:
            head = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: "
            is_first = asked == "/from/here"
            writer.write(head + location + b"\r\n\r\n" if is_first else OK)

        async with running_stub(behave) as stub:
            body, heads = await get(f"{stub.url}/from/here"), stub.heads
        assert body == b"picture"
        assert [head.split(" ")[1] for head in heads] == ["/from/here", path]

    async def test_denied_target_is_not_dialled(self) -> None:
        async with (
            running_stub(answering(OK), "127.0.0.2") as inner,
            running_stub(redirecting(inner.url)) as outer,
        ):
            problem = await get(outer.url, allow_cidrs=(ip_network("127.0.0.1"),))
            assert (problem, inner.connections) == (ImageProblem.NOT_REACHABLE, 0)


PUBLIC = "93.184.215.14"
NAMES = {
    "listening.example": "127.0.0.1",
    "closed.example": "127.0.0.2",
    "pictures.example": PUBLIC,
    "printer": "127.0.0.1",
    "printer.local": "127.0.0.1",
    "www": PUBLIC,
}
"""Names and the address that our resolver says; it knows no others."""


async def get_by_name(url: str, behaviour: Behaviour, **settings: Any) -> bytes | ImageProblem:
    """What a fetch ends with where names are those of `NAMES`, and `PUBLIC` leads to a stub.

    In the URL `PORT` stands for the stub's port on 127.0.0.1.
    """

    def resolve(host: str, _port: int) -> list[str]:
        if host not in NAMES:
            raise socket.gaierror(socket.EAI_NONAME, "unknown name")
        return [NAMES[host]]

    async with running_stub(behaviour) as stub:
        client = egress_client(resolver=resolve, dialler=StubDialler(PUBLIC, stub.port))
        fetcher = ImageDownloader(FetchSettings.model_validate(settings), client)
        try:
            return await fetcher.get(url.replace("PORT", str(stub.port)))
        except FetchFailed as failed:
            return failed.kind


class TestRefusals:
    """Of one URL a caller is told the same, whatever is behind its address, and whether or not."""

    async def test_denied_and_unreachable_look_the_same(self) -> None:
        names = ("listening.example", "closed.example", "unknown.example")
        assert {await get_by_name(f"http://{name}/", answering(OK)) for name in names} == {
            ImageProblem.NOT_REACHABLE
        }

    @pytest.mark.parametrize(
        "host",
        [
            *(
                "127.0.0.1",
                "127.0.0.2",
                "127.1",
                "0x7f.1",
                "2130706433",
                "127.0.0.1.",
            ),
            *("[::1]", "[::ffff:127.0.0.1]", "10.0.0.1", "172.16.0.1"),
            *("192.168.1.20", "169.254.1.1", "[fe80::1]", "[fd00::1]", "100.64.0.1"),
            *("localhost", "LOCALHOST", "localhost.", "a.localhost", "printer", "printer.local"),
            *("Unknown", "unknown.local.", "unknown.internal", "nas.home.arpa"),
        ],
    )
    @pytest.mark.parametrize("port", ["", ":PORT", ":1"])
    def test_what_the_url_shows_is_told(self, host: str, port: str) -> None:
        url = f"http://{host}{port}/a.png"
        problem = asyncio.run(get_by_name(url, answering(OK)))
        assert problem is ImageProblem.PRIVATE_ADDRESS

    @pytest.mark.parametrize(
        "url",
        [
            "http://169.254.169.254/latest/meta-data/",
            "http://0.0.0.0:PORT/",
            "http://[::]/",
            "http://unknown.example/",
            "http://localhost.example/",
        ],
    )
    def test_what_no_setting_opens_is_not_said_to_be(self, url: str) -> None:
        assert asyncio.run(get_by_name(url, answering(OK))) is ImageProblem.NOT_REACHABLE

    @pytest.mark.parametrize(
        ("url", "settings"),
        [
            ("http://127.0.0.2:1/", {"allow_cidrs": "127.0.0.2"}),
            ("http://localhost:1/", {"allow_cidrs": "127.0.0.0/8"}),
            ("http://printer:1/", {"allow_hosts": "printer"}),
            ("http://printer:1/", {"allow_cidrs": "10.0.0.0/8"}),
            ("http://pictures.example:1/", {"allow_cidrs": "10.0.0.0/8"}),
            ("http://pictures.example:1/", {"allow_hosts": "pictures.example"}),
        ],
    )
    def test_what_an_operator_has_opened_may_fail_for_any_cause(
        self, url: str, settings: dict[str, str]
    ) -> None:
        problem = asyncio.run(get_by_name(url, reset, **settings))
        assert problem is ImageProblem.NOT_REACHABLE

    @pytest.mark.parametrize("host", ["93.184.215.14", "pictures.example", "unknown.example"])
    def test_port_is_told_of_any_public_host(self, host: str) -> None:
        async def run(port: int, **settings: Any) -> object:
            return await get_by_name(f"http://{host}:{port}/", reset, **settings)

        assert asyncio.run(run(8000)) is ImageProblem.PORT_NOT_ALLOWED
        assert asyncio.run(run(8000, allow_ports="8000")) is ImageProblem.NOT_REACHABLE
        assert asyncio.run(run(443)) is ImageProblem.NOT_REACHABLE

    @pytest.mark.parametrize("location", ["http://127.0.0.1/", "http://printer/", "http://x:1/"])
    def test_target_of_a_redirect_is_not_told_of(self, location: str) -> None:
        problem = asyncio.run(get_by_name("http://pictures.example/", redirecting(location)))
        assert problem is ImageProblem.NOT_REACHABLE

    @pytest.mark.parametrize(
        ("status", "problem"),
        [
            ("404 Not Found", ImageProblem.NOT_FOUND),
            ("410 Gone", ImageProblem.NOT_FOUND),
            ("401 Unauthorized", ImageProblem.FORBIDDEN),
            ("403 Forbidden", ImageProblem.FORBIDDEN),
            ("500 Oops", ImageProblem.HOST_FAILED),
            ("206 Partial Content", ImageProblem.HOST_FAILED),
            ("304 Not Modified", ImageProblem.HOST_FAILED),
        ],
    )
    def test_status_is_told_of_public_hosts_alone(self, status: str, problem: ImageProblem) -> None:
        behaviour = answering(response(status))
        for host in ("pictures.example", PUBLIC, "www"):
            assert asyncio.run(get_by_name(f"http://{host}/", behaviour)) is problem
        for url, opened in (
            ("http://listening.example/", {"allow_hosts": "listening.example"}),
            ("http://listening.example/", {"allow_cidrs": "127.0.0.1"}),
            ("http://127.0.0.1:PORT/", {"allow_cidrs": "127.0.0.0/8"}),
            ("http://printer/", {"allow_hosts": "printer"}),
        ):
            answer = asyncio.run(get_by_name(url, behaviour, **opened))
            assert answer is ImageProblem.NOT_REACHABLE

    @pytest.mark.parametrize("url", ["http://printer/", "http://pictures.example/", "https://www/"])
    def test_nothing_is_told_of_what_a_proxy_finds(self, url: str) -> None:
        async def run() -> object:
            async with running_stub(answering(response("404 Not Found"))) as proxy:
                settings = EgressSettings.model_validate({"proxy": proxy.url})
                client = egress_client(settings, resolver=resolve_by_table)
                with pytest.raises(FetchFailed) as failed:
                    await ImageDownloader(FetchSettings(), client).get(url)
                return failed.value.kind

        assert asyncio.run(run()) is ImageProblem.NOT_REACHABLE

    @pytest.mark.parametrize("url", ["ftp://a.example/", "http://a@b.example/", "http://a%2e/"])
    def test_form_of_a_url_is_told(self, url: str) -> None:
        assert asyncio.run(get(url)) is ImageProblem.INVALID_URL

    def test_length_of_a_url_is_told(self) -> None:
        url = "http://127.0.0.1:PORT/a.png?token="
        behaviour = answering(OK)
        for length, expected in ((8_192, b"picture"), (8_193, ImageProblem.URL_TOO_LONG)):

            async def run(length: int = length) -> object:
                async with running_stub(behaviour) as stub:
                    base = url.replace("PORT", str(stub.port))
                    return await get(base + "x" * (length - len(base)))

            assert asyncio.run(run()) == expected

    @pytest.mark.process
    def test_log_has_the_reason_but_not_the_path(self) -> None:
        program = """
import asyncio
from server.egress.downloads import ImageDownloader, FetchFailed
from server.core.settings.sections import FetchSettings
from server.core.logs import configure_logging
from tests.support.egress import egress_client

async def run():
    fetcher = ImageDownloader(FetchSettings(), egress_client())
    try:
        await fetcher.get("http://10.1.2.3/secret?token=secret")
    except FetchFailed as failed:
        print(failed)

configure_logging()
asyncio.run(run())
"""
        ended = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
        )
        assert ended.stdout.strip() == "private_address"
        (line,) = ended.stderr.splitlines()
        assert "10.1.2.3: AddressDenied: address 10.1.2.3 port 80" in line
        assert "secret" not in line

    async def test_strange_forms_of_an_allowed_address_are_judged_by_address(self) -> None:
        async with running_stub(answering(OK)) as stub:
            assert await get(f"http://0x7f.1:{stub.port}/") == b"picture"


class TestRequests:
    async def test_request_says_little(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for variable in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(variable, "http://127.0.0.1:9")
        async with running_stub(answering(OK)) as stub:
            assert await get(f"{stub.url}/a%20b c?d=e%2Ff g#h i") == b"picture"
        request, *headers = stub.heads[0].strip().split("\r\n")
        assert request == "GET /a%20b%20c?d=e%2Ff%20g HTTP/1.1"
        assert {header.partition(":")[0].lower() for header in headers} == {
            *("host", "accept", "accept-encoding", "user-agent", "connection")
        }
        assert "accept-encoding: identity" in stub.heads[0].lower()

    async def test_cookies_are_not_kept(self) -> None:
        cookie = response("200 OK", "Set-Cookie: session=secret; Path=/", body=b"picture")
        async with running_stub(answering(cookie)) as stub:
            fetcher = ImageDownloader(FetchSettings(**LIMITS), egress_client())
            await fetcher.get(stub.url)
            await fetcher.get(stub.url)
            heads = stub.heads
        assert len(heads) == 2
        assert "cookie" not in heads[1].lower()

    async def test_places_are_limited_and_given_back(self) -> None:
        active, peak = 0, 0

        async def behave(path: str, writer: asyncio.StreamWriter) -> None:
            nonlocal active, peak
            active += 1
            peak = max(peak, active)
            await asyncio.sleep(0)
            active -= 1
            writer.write(OK if path == "/good" else response("404 Not Found"))

        async with running_stub(behave) as stub:
            fetcher = ImageDownloader(FetchSettings(**LIMITS, max_concurrent=2), egress_client())
            paths = ["/bad"] * 4 + ["/good"] * 4
            answers = await asyncio.gather(
                *(fetcher.get(stub.url + path) for path in paths), return_exceptions=True
            )
        assert answers[4:] == [b"picture"] * 4
        assert peak <= 2


DATE = "Date: Sun, 22 Nov 2026 12:00:00 GMT"
OLD = "Last-Modified: Sun, 22 Nov 2026 11:00:00 GMT"


class ChangingHost:
    """A picture with an ETag. Each request's `If-None-Match` is noted."""

    def __init__(self) -> None:
        self.version = 1
        self.asked: list[str] = []

    async def __call__(self, head: str, writer: asyncio.StreamWriter) -> None:
        conditions = [line for line in head.split("\r\n") if line.lower().startswith("if-none")]
        self.asked.append(conditions[0].partition(": ")[2] if conditions else "")
        tag = f'"{self.version}"'
        if self.asked[-1] == tag:
            writer.write(response("304 Not Modified", f"ETag: {tag}"))
        else:
            writer.write(response("200 OK", f"ETag: {tag}", body=f"v{self.version}".encode()))
        await writer.drain()


def picture_of(size: int) -> CachedImage:
    return CachedImage(bytes(size), {"If-None-Match": '"1"'})


class TestPicturesKept:
    @staticmethod
    async def fetch_all(host: ChangingHost, *callers: str | None, **limits: Any) -> list[bytes]:
        """None instead of a caller: the picture changes."""

        async def behave(_path: str, writer: asyncio.StreamWriter) -> None:
            await host(stub.heads[-1], writer)

        async with running_stub(behave) as stub:
            fetcher = ImageDownloader(FetchSettings(**(LIMITS | limits)), egress_client())
            bodies = []
            for key_id in callers:
                if key_id is None:
                    host.version += 1
                else:
                    bodies.append(await fetcher.get(f"{stub.url}/a.png", EgressGrant(key_id)))
            return bodies

    def test_unchanged_picture_is_not_sent_again(self) -> None:
        host = ChangingHost()
        assert asyncio.run(self.fetch_all(host, "k", "k", "k")) == [b"v1"] * 3
        assert host.asked == ["", '"1"', '"1"']

    def test_changed_picture_is_noticed_at_once(self) -> None:
        host = ChangingHost()
        bodies = asyncio.run(self.fetch_all(host, "k", "k", None, "k", "k"))
        assert bodies == [b"v1", b"v1", b"v2", b"v2"]

    def test_keys_do_not_share(self) -> None:
        host = ChangingHost()
        asyncio.run(self.fetch_all(host, "one", "two", "one"))
        assert host.asked == ["", "", '"1"'], "two asks as if nobody had"

    def test_nothing_is_kept_without_room(self) -> None:
        for cache_bytes in (0, 1):
            host = ChangingHost()
            asyncio.run(self.fetch_all(host, "k", "k", cache_bytes=cache_bytes))
            assert host.asked == ["", ""]

    def test_host_that_says_unchanged_unasked(self) -> None:
        assert get_from(answering(response("304 Not Modified"))) is ImageProblem.NOT_REACHABLE

    def test_room_is_bounded_and_the_last_used_stay(self) -> None:
        pictures = ConditionalCache(100_000, 100_000)
        for name in "abc":
            pictures.put("k", name, picture_of(30_000))
        assert pictures.get("k", "a")
        pictures.put("k", "d", picture_of(35_000))
        assert [bool(pictures.get("k", name)) for name in "abcd"] == [True, False, True, True]
        pictures.put("k", "a", picture_of(100_000))
        assert pictures.get("k", "a") is None, "and the old one is gone"

    def test_pictures_without_content_take_room_too(self) -> None:
        pictures = ConditionalCache(100_000, 100_000)
        urls = [f"http://a.example/{number}" for number in range(1_000)]
        for url in urls:
            pictures.put("k", url, picture_of(0))
        kept = [url for url in urls if pictures.get("k", url)]
        assert 10 < len(kept) < 100
        assert kept == urls[-len(kept) :]

    def test_one_key_does_not_push_out_another(self) -> None:
        pictures = ConditionalCache(100_000, 60_000)
        for name in "ab":
            pictures.put("modest", name, picture_of(15_000))
        for number in range(100):
            pictures.put("greedy", str(number), picture_of(15_000))
        held = [bool(pictures.get("greedy", str(number))) for number in range(100)]
        assert held == [False] * 97 + [True] * 3
        for number in range(100):
            pictures.put("third", str(number), picture_of(15_000))
        assert pictures.get("modest", "a")
        assert pictures.get("modest", "b")

    def test_long_signs_of_change_are_not_kept(self) -> None:
        for headers in ({"etag": f'"{"x" * 300}"'}, {"last-modified": OLD[15:] + " " * 300}):
            assert conditional_headers({**headers, "date": DATE[6:]}) == {}

    @pytest.mark.parametrize(
        ("headers", "conditions"),
        [
            ({"etag": '"a"'}, {"If-None-Match": '"a"'}),
            ({"etag": 'W/"a"'}, {}),
            ({"etag": '"a"', "cache-control": "private, No-Store"}, {}),
            ({"last-modified": OLD[15:], "date": DATE[6:]}, {"If-Modified-Since": OLD[15:]}),
            ({"last-modified": DATE[6:], "date": DATE[6:]}, {}),
            ({"last-modified": OLD[15:]}, {}),
            ({"last-modified": "yesterday", "date": DATE[6:]}, {}),
            ({}, {}),
        ],
    )
    def test_only_sure_signs_of_change_count(
        self, headers: dict[str, str], conditions: dict[str, str]
    ) -> None:
        assert conditional_headers(headers) == conditions

    def test_key_may_reach_what_it_alone_is_allowed(self) -> None:
        async def run() -> tuple[object, object]:
            async with running_stub(answering(OK)) as stub:
                fetcher = ImageDownloader(FetchSettings(), egress_client())
                insider = await fetcher.get(stub.url, EgressGrant("one", [LOOPBACK]))
                with pytest.raises(FetchFailed) as failed:
                    await fetcher.get(stub.url, EgressGrant("two"))
                return insider, failed.value.kind

        assert asyncio.run(run()) == (b"picture", ImageProblem.PRIVATE_ADDRESS)
