"""The corpus of hostile URLs against the real client: nothing that is denied is ever dialled.

A dialler of ours writes down what it is asked for, and connects only on loopback. Beside it
`conftest.py` watches every socket of the process, so that no other way out goes unseen.
"""

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any

import httpcore2
import pytest

from server.core.errors import ImageProblem
from server.core.settings.sections import EgressSettings, FetchSettings, WebhookSettings
from server.egress.client import EgressClient
from server.egress.downloads import FetchFailed, ImageDownloader
from server.egress.policy import AddressDenied, EgressGrant
from server.webhooks.sender import WebhookCaller
from tests.corpora.hostile_urls import (
    ANSWERS,
    DENIED,
    HOSTILE_URLS,
    PUBLIC,
    bracketed,
    resolve_by_table,
)
from tests.support.egress import egress_client
from tests.support.http_stub import Stub, answering, response, running_stub

OK = response("200 OK", body=b"picture")
REFUSALS = (
    ImageProblem.NOT_REACHABLE,
    ImageProblem.INVALID_URL,
    ImageProblem.URL_TOO_LONG,
    ImageProblem.PRIVATE_ADDRESS,
    ImageProblem.PORT_NOT_ALLOWED,
)
AS_FAR_AS = (ip_network("127.0.0.0/8"), ip_network("::1"))

NAMES = (*ANSWERS, "a..b", "a.xn--a", "unknown.example")


class Recorder(httpcore2.AnyIOBackend):
    """A dialler. dialled: what it was asked for."""

    def __init__(self) -> None:
        self.dialled: list[str] = []

    async def connect_tcp(
        self, host: str, port: int, *arguments: Any, **named: Any
    ) -> httpcore2.AsyncNetworkStream:
        self.dialled.append(host)
        parsed = ipaddress.ip_address(host.partition("%")[0])
        if any(parsed in network for network in AS_FAR_AS):
            return await super().connect_tcp(host, port, *arguments, **named)
        raise httpcore2.ConnectError(host)


@dataclass(frozen=True, slots=True)
class Trap:
    """A client with a recorder, and a listener on 127.0.0.1 that must hear nothing."""

    stub: Stub
    recorder: Recorder
    client: EgressClient
    fetcher: ImageDownloader

    async def fetch(self, url: str) -> bytes | ImageProblem:
        try:
            return await self.fetcher.get(url.replace("PORT", str(self.stub.port)))
        except FetchFailed as failed:
            return failed.kind


def trapped(try_it: Callable[[Trap], Awaitable[None]], **limits: Any) -> Trap:
    """What a client has dialled after the attempts."""

    async def run() -> Trap:
        async with running_stub(answering(OK)) as stub:
            recorder = Recorder()
            client = egress_client(resolver=resolve_by_table, dialler=recorder)
            fetcher = ImageDownloader(FetchSettings.model_validate(limits), client)
            trap = Trap(stub, recorder, client, fetcher)
            await try_it(trap)
            return trap

    return asyncio.run(run())


def test_corpus_is_large_and_of_every_class() -> None:
    assert len(HOSTILE_URLS) >= 300
    assert all(
        any(address in url for url in HOSTILE_URLS) for address in DENIED if "%" not in address
    )


def test_no_fetch_reaches_what_is_denied() -> None:
    async def try_all(trap: Trap) -> None:
        for url in HOSTILE_URLS:
            assert await trap.fetch(url) in REFUSALS, url
            assert (trap.recorder.dialled, trap.stub.connections) == ([], 0), url

    trapped(try_all)


def test_no_webhook_reaches_what_is_denied() -> None:
    """By the sender's own policy and words, as a job's webhook and as a ping."""

    async def try_all(trap: Trap) -> None:
        caller = WebhookCaller(WebhookSettings(), trap.client)
        for hostile in HOSTILE_URLS:
            url = hostile.replace("PORT", str(trap.stub.port))
            for attempt in (
                await caller.send(url, "msg_1", {}, EgressGrant("k")),
                (await caller.ping(url))[1],
            ):
                assert (attempt.status, attempt.is_success) == (None, False), url
            assert (trap.recorder.dialled, trap.stub.connections) == ([], 0), url

    trapped(try_all)


def test_webhook_reaches_what_is_allowed() -> None:
    """The corpus would prove nothing if the caller reached nobody."""

    async def try_it(trap: Trap) -> None:
        settings = WebhookSettings.model_validate({"allow_cidrs": "127.0.0.1"})
        url = f"http://loopback.example:{trap.stub.port}/"
        attempt = await WebhookCaller(settings, trap.client).send(
            url, "msg_1", {}, EgressGrant("k")
        )
        assert attempt.status == 200

    trap = trapped(try_it)
    assert (trap.recorder.dialled, trap.stub.connections) == (["127.0.0.1"], 1)


def test_no_redirect_reaches_what_is_denied() -> None:
    """From a host that is allowed, on 127.0.0.2, to each of the corpus."""

    async def lead_astray(path: str, writer: asyncio.StreamWriter) -> None:
        location = targets[int(path[1:])].encode("utf-8", "replace")
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\n\r\n")
        await writer.drain()

    targets: list[str] = []

    async def try_all(trap: Trap) -> None:
        async with running_stub(lead_astray, "127.0.0.2") as outer:
            targets.extend(url.replace("PORT", str(trap.stub.port)) for url in HOSTILE_URLS)
            for index, target in enumerate(targets):
                answer = await trap.fetch(f"{outer.url}/{index}")
                assert answer is ImageProblem.NOT_REACHABLE, target
                assert trap.stub.connections == 0, target
        assert outer.connections >= len(targets)
        # A header ends with its line: of one target only its public beginning is left.
        assert set(trap.recorder.dialled) == {"127.0.0.2", "8.8.8.8"}

    trapped(try_all, allow_cidrs="127.0.0.2")


@pytest.mark.parametrize("address", PUBLIC)
def test_recorder_hears_of_public_addresses(address: str) -> None:
    """The corpus would prove nothing if the recorder never heard of anything."""

    async def try_it(trap: Trap) -> None:
        await trap.fetch(f"https://{bracketed(address)}/")

    dialled = {ipaddress.ip_address(each) for each in trapped(try_it).recorder.dialled}
    assert dialled == {ipaddress.ip_address(address)}


@pytest.mark.parametrize("name", ["private.internal", "loopback.example", "shared.example"])
def test_named_private_host_works(name: str) -> None:
    is_here = name == "loopback.example"
    got: list[bytes | ImageProblem] = []

    async def try_it(trap: Trap) -> None:
        got.append(await trap.fetch(f"http://{name}:PORT/"))

    by_network = ",".join(ANSWERS[name])
    for allowed in ({"allow_hosts": name}, {"allow_cidrs": by_network}):
        trap = trapped(try_it, **allowed)
        assert set(trap.recorder.dialled) == set(ANSWERS[name])
        assert trap.stub.connections == is_here
    # The recorder connects on loopback only; of the others it is enough that they were dialled.
    assert got == [b"picture" if is_here else ImageProblem.NOT_REACHABLE] * 2


async def test_name_that_flips_between_judging_and_dialling() -> None:
    """The second answer leads to the denied listener; it is asked for only by a second fetch."""
    answers = [["127.0.0.2"], ["127.0.0.1"], ["127.0.0.2", "127.0.0.1"]]
    lookups = iter(answers)

    def flip(_host: str, _port: int) -> list[str]:
        return next(lookups)

    # In this order: a port that is free on 127.0.0.1 hardly ever is not on 127.0.0.2.
    denied = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = denied.sockets[0].getsockname()[1]
    async with running_stub(answering(OK), "127.0.0.2", port) as good:
        recorder = Recorder()
        client = egress_client(resolver=flip, dialler=recorder)
        settings = FetchSettings.model_validate({"allow_cidrs": "127.0.0.2"})
        fetcher = ImageDownloader(settings, client)
        url = f"http://flips.example:{good.port}/"
        seen: list[object] = []
        for _ in answers:
            try:
                seen.append(await fetcher.get(url))
            except FetchFailed as failed:
                seen.append(type(failed.__cause__))
        denied.close()
        assert (seen, good.connections, recorder.dialled) == (
            [b"picture", AddressDenied, AddressDenied],
            1,
            ["127.0.0.2"],
        )


class TestBehindAProxy:
    """The proxy resolves names; what can be judged without that still is."""

    def test_bad_addresses_and_ports_do_not_reach_the_proxy(self) -> None:
        async def run() -> int:
            async with running_stub(answering(OK)) as proxy:
                settings = EgressSettings.model_validate({"proxy": proxy.url})
                client = egress_client(settings, resolver=resolve_by_table)
                fetcher = ImageDownloader(FetchSettings(), client)
                for url in HOSTILE_URLS:
                    # A name on a usual port is the proxy's to judge.
                    if url.lower().split("/")[2:3] in ([name] for name in NAMES):
                        continue
                    with pytest.raises(FetchFailed):
                        await fetcher.get(url.replace("PORT", str(proxy.port)))
                    assert proxy.connections == 0, url
                return proxy.connections

        assert asyncio.run(run()) == 0
