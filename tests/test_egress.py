"""The door to addresses that users name: which are dialled, and what a bad host can do."""

import asyncio
import socket
import struct
import subprocess
import sys
import tracemalloc
from ipaddress import ip_network
from typing import Any

import pytest

from server.addresses import Rights
from server.egress import (
    MAX_REDIRECTS,
    Fetcher,
    FetchFailed,
    Picture,
    Pictures,
    conditions_of,
)
from server.errors import ImageProblem
from server.settings import FetchSettings
from tests.http_stub import Behaviour, Stub, answering, response, running_stub

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
    fetcher = Fetcher(FetchSettings(**(LIMITS | limits)))
    try:
        async with asyncio.timeout(120):
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


async def endless_small_chunks(_path: str, writer: asyncio.StreamWriter) -> None:
    writer.write(CHUNKED)
    await send_for_ever(writer, b"2\r\nxx\r\n" * 1_000)


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
        pieces = b"8\r\n12345678\r\n" * 100_000 + b"0\r\n\r\n"
        body = get_from(answering(CHUNKED + pieces), max_image_bytes=1_000_000)
        assert body == b"12345678" * 100_000

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
                return await get(stub.url.replace("http:", "https:"), **IMPATIENT)

        assert asyncio.run(run()) is ImageProblem.NOT_REACHABLE

    def test_name_that_cannot_be_looked_up(self) -> None:
        assert asyncio.run(get(f"http://{'a' * 64}.invalid/")) is ImageProblem.NOT_REACHABLE


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
        assert get_from(redirecting(location)) is ImageProblem.NOT_REACHABLE

    @pytest.mark.parametrize(
        "location", ["http://[bad/", "http://127.0.0.1:99999/", "http://", "http://xn--a/", "\x7f"]
    )
    def test_target_that_is_no_url(self, location: str) -> None:
        assert get_from(redirecting(location)) is ImageProblem.NOT_REACHABLE

    def test_denied_target_is_not_dialled(self) -> None:
        async def run() -> tuple[object, int]:
            async with (
                running_stub(answering(OK), "127.0.0.2") as inner,
                running_stub(redirecting(inner.url)) as outer,
            ):
                problem = await get(outer.url, allow_cidrs=(ip_network("127.0.0.1"),))
                return problem, inner.connections

        assert asyncio.run(run()) == (ImageProblem.NOT_REACHABLE, 0)


class TestRefusals:
    """A caller cannot tell what is behind an address that is denied, nor that it is denied."""

    def test_denied_and_unreachable_look_the_same(self) -> None:
        async def run() -> set[object]:
            async with running_stub(answering(OK)) as stub:
                denied_and_listening = await get(stub.url, allow_cidrs=())
            denied = await get(stub.url, allow_cidrs=())
            closed = await get(stub.url)
            unknown = await get(f"http://{'a' * 64}.invalid/")
            return {denied_and_listening, denied, closed, unknown}

        assert asyncio.run(run()) == {ImageProblem.NOT_REACHABLE}

    @pytest.mark.parametrize("url", ["ftp://a.example/", "http://a@b.example/", "http://a%2e/"])
    def test_form_of_a_url_is_told(self, url: str) -> None:
        assert asyncio.run(get(url)) is ImageProblem.NOT_ALLOWED

    def test_log_has_the_reason_but_not_the_path(self) -> None:
        program = """
import asyncio
from server.egress import Fetcher, FetchFailed
from server.settings import FetchSettings
from server.telemetry import configure_logging

async def run():
    try:
        await Fetcher(FetchSettings()).get("http://10.1.2.3/secret?token=secret")
    except FetchFailed as failed:
        print(failed)

configure_logging()
asyncio.run(run())
"""
        ended = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
        )
        assert ended.stdout.strip() == "not_reachable"
        (line,) = ended.stderr.splitlines()
        assert "10.1.2.3: Refused: address 10.1.2.3 port 80" in line
        assert "secret" not in line

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
            *("host", "accept", "accept-encoding", "user-agent")
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


def picture_of(size: int) -> Picture:
    return Picture(bytes(size), {"If-None-Match": '"1"'})


class TestPicturesKept:
    @staticmethod
    async def fetch_all(host: ChangingHost, *callers: str | None, **limits: Any) -> list[bytes]:
        """None instead of a caller: the picture changes."""

        async def behave(_path: str, writer: asyncio.StreamWriter) -> None:
            await host(stub.heads[-1], writer)

        async with running_stub(behave) as stub:
            fetcher = Fetcher(FetchSettings(**(LIMITS | limits)))
            bodies = []
            for key_id in callers:
                if key_id is None:
                    host.version += 1
                else:
                    bodies.append(await fetcher.get(f"{stub.url}/a.png", Rights(key_id)))
            await fetcher.aclose()
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
        pictures = Pictures(100_000, 100_000)
        for name in "abc":
            pictures.put("k", name, picture_of(30_000))
        assert pictures.get("k", "a")
        pictures.put("k", "d", picture_of(35_000))
        assert [bool(pictures.get("k", name)) for name in "abcd"] == [True, False, True, True]
        pictures.put("k", "a", picture_of(100_000))
        assert pictures.get("k", "a") is None, "and the old one is gone"

    def test_pictures_without_content_take_room_too(self) -> None:
        pictures = Pictures(100_000, 100_000)
        urls = [f"http://a.example/{number}" for number in range(1_000)]
        for url in urls:
            pictures.put("k", url, picture_of(0))
        kept = [url for url in urls if pictures.get("k", url)]
        assert 10 < len(kept) < 100
        assert kept == urls[-len(kept) :]

    def test_one_key_does_not_push_out_another(self) -> None:
        pictures = Pictures(100_000, 60_000)
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
            assert conditions_of({**headers, "date": DATE[6:]}) == {}

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
        assert conditions_of(headers) == conditions

    def test_key_may_reach_what_it_alone_is_allowed(self) -> None:
        async def run() -> tuple[object, object]:
            async with running_stub(answering(OK)) as stub:
                fetcher = Fetcher(FetchSettings())
                insider = await fetcher.get(stub.url, Rights("one", [LOOPBACK]))
                with pytest.raises(FetchFailed) as failed:
                    await fetcher.get(stub.url, Rights("two"))
                await fetcher.aclose()
                return insider, failed.value.kind

        assert asyncio.run(run()) == (b"picture", ImageProblem.NOT_REACHABLE)
