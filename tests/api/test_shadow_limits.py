"""Limits of shadow mode: a vendor that is late, says too much or breaks off, or is not reached."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse

from server.api.shadow import Shadow, ShadowLimits, ShadowOutcome
from server.core.settings.sections import ShadowSettings
from tests.support.egress import egress_client
from tests.support.fake_vendor import FakeVendor, running_vendor

KEY = "of-the-vendor-0123456789"
WAIT_S = 30
CONNECT_S = ShadowLimits().connect_timeout_s
"""What a dial takes where its limit is not applied."""
REQUEST = Request({"type": "http", "method": "POST", "path": "/api/v3/inpaint", "headers": []})
LIMITS = ShadowLimits(max_in_flight=2, timeout_s=WAIT_S, max_answer_bytes=100)


@pytest.fixture
def vendor() -> Iterator[FakeVendor]:
    with running_vendor() as vendor:
        yield vendor


@dataclass(frozen=True)
class Calls:
    """Calls of clients that are answered `{}` here."""

    shadow: Shadow
    outcomes: "asyncio.Queue[ShadowOutcome]"

    def send(self) -> None:
        with self.shadow.beside(REQUEST, {"prompt": "a cat"}, KEY) as take:
            take(JSONResponse({}))

    async def outcome(self) -> ShadowOutcome:
        return await asyncio.wait_for(self.outcomes.get(), WAIT_S)


@asynccontextmanager
async def shadowing(url: str, limits: ShadowLimits) -> AsyncIterator[Calls]:
    outcomes: asyncio.Queue[ShadowOutcome] = asyncio.Queue()
    settings = ShadowSettings(share=1, base_url=url, keys_file=Path("of-no-use-here"))
    async with Shadow(settings, [KEY], egress_client(), outcomes.put_nowait, limits) as shadow:
        yield Calls(shadow, outcomes)


async def test_late_answer_frees_its_place(vendor: FakeVendor) -> None:
    vendor.may_answer.clear()
    async with shadowing(vendor.url, replace(LIMITS, timeout_s=0.3)) as calls:
        for _ in range(LIMITS.max_in_flight + 1):
            calls.send()
        assert await calls.outcome() is ShadowOutcome.DROPPED
        for _ in range(LIMITS.max_in_flight):
            assert await calls.outcome() is ShadowOutcome.UNANSWERED
            await to_thread.run_sync(lambda: vendor.calls.get(timeout=WAIT_S))
        calls.send()
        assert await calls.outcome() is ShadowOutcome.UNANSWERED, "it found a place"


@pytest.mark.parametrize(
    ("change", "error"),
    [({"answer": "x" * 101}, "BodyTooLarge"), ({"missing_bytes": 1}, "EgressFailed")],
    ids=["too large", "broken off"],
)
async def test_unusable_answer_frees_its_place(
    change: dict[str, str | int], error: str, vendor: FakeVendor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with shadowing(vendor.url, replace(LIMITS, max_in_flight=1)) as calls:
        for name, value in change.items():
            setattr(vendor, name, value)
        calls.send()
        assert await calls.outcome() is ShadowOutcome.UNANSWERED
        assert error in caplog.text
        vendor.answer, vendor.missing_bytes = "{}" + " " * 98, 0
        await to_thread.run_sync(lambda: vendor.calls.get(timeout=WAIT_S))
        calls.send()
        assert await calls.outcome() is ShadowOutcome.SAME


async def test_vendor_that_never_accepts_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        # The first connection fills the backlog; the kernel drops the next one's SYN.
        with socket.create_connection(listener.getsockname()):
            url = "http://{}:{}".format(*listener.getsockname())
            async with shadowing(url, replace(LIMITS, connect_timeout_s=0.3)) as calls:
                calls.send()
                async with asyncio.timeout(0.8 * CONNECT_S):
                    assert await calls.outcome() is ShadowOutcome.UNANSWERED
