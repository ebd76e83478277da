"""Shadow mode: `Shadow` also sends a share of the calls to the vendor, and compares the answers.

It never delays or changes an answer to a client: everything happens in tasks beside the calls, few
at a time, and a call that finds no room is counted and not sent.

Only keys that the operator has listed in `shadow.keys_file` leave this server. The list is for the
vendor's keys alone: `read_vendor_keys` refuses keys that this server has made, and the settings
refuse the file with this server's own keys. Headers of a client are not sent at all.
"""

import asyncio
import contextlib
import json
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response

from server.api.auth.keyring import read_keys_file
from server.api.auth.keys import KEY_PREFIX
from server.api.shapes import Answer, compare
from server.core.logs import get_logger, redact_secrets
from server.core.settings.sections import ShadowSettings
from server.core.settings.values import is_loopback
from server.egress.client import HEADERS, NETWORK_ERRORS, EgressClient
from server.egress.policy import AddressDenied, AddressPolicy, checked_url

logger = get_logger(__name__)

OWNER = "shadow"
"""The one owner of the egress client's resolver threads."""

UNSENT = frozenset({"webhook"})
"""Fields that are not sent. The client would otherwise get two webhook calls."""


@dataclass(frozen=True, slots=True)
class ShadowLimits:
    """What the calls to the vendor may take of this server.

    max_in_flight: calls at a time; each may hold a body of `max_body_bytes`. timeout_s: for a whole
    answer of the vendor, who may make the picture before answering. connect_timeout_s: for each
    address that is dialled. max_answer_bytes: of an answer's body.
    """

    max_in_flight: int = 4
    timeout_s: float = 120.0
    connect_timeout_s: float = 10.0
    max_answer_bytes: int = 4_000_000


class ShadowOutcome(StrEnum):
    """What became of a call that was to be sent."""

    SAME = "same"
    """Both answers have one shape."""
    DIFFERENT = "different"
    """The log has the differences."""
    UNANSWERED = "unanswered"
    """The vendor was not reached, or its answer was too late, too large or broken off."""
    DROPPED = "dropped"
    """Too many calls were under way."""
    ABANDONED = "abandoned"
    """The client left, or its call failed here, so there was nothing to compare with."""
    NOT_SENDABLE = "not_sendable"
    """The call has files, which the vendor's JSON cannot carry."""


class Shadow:
    """Use as an async context manager; leaving cancels the calls that are under way.

    keys: the vendor's, of `read_vendor_keys`. count: called with each `ShadowOutcome`.
    """

    def __init__(
        self,
        settings: ShadowSettings,
        keys: Collection[str],
        client: EgressClient,
        count: Callable[[ShadowOutcome], None],
        limits: ShadowLimits = ShadowLimits(),
    ) -> None:
        self._share = settings.share
        self._base_url = (settings.base_url or "").rstrip("/")
        self._policy = policy_of(self._base_url, client)
        self._keys = frozenset(keys)
        self._client = client
        self._count = count
        self._limits = limits
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Shadow":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @contextlib.contextmanager
    def beside(
        self, request: Request, fields: Mapping[str, Any], key: str | None
    ) -> Iterator[Callable[[Response], None]]:
        """While a call is answered here, send it to the vendor too if it is one of the share.

        Gives the function that takes our answer. Without an answer nothing is compared.
        """
        ours: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        if key is not None and self._is_chosen(request, key):
            self._start(request.scope["path"], {**fields, "key": key}, ours)

        def take(response: Response) -> None:
            if not ours.done():
                ours.set_result(Answer(response.status_code, bytes(response.body)))

        try:
            yield take
        finally:
            ours.cancel()  # has no effect where there is an answer

    def _is_chosen(self, request: Request, key: str) -> bool:
        # Where the vendor's name leads back here, a call of ours must not cause another one.
        is_ours = request.headers.get("user-agent") == HEADERS["User-Agent"]
        return not is_ours and key in self._keys and random.random() < self._share

    def _start(self, path: str, fields: dict[str, Any], ours: "asyncio.Future[Answer]") -> None:
        if len(self._tasks) >= self._limits.max_in_flight:
            self._count(ShadowOutcome.DROPPED)
        elif any(isinstance(value, bytes) for value in fields.values()):
            self._count(ShadowOutcome.NOT_SENDABLE)
        else:
            task = asyncio.create_task(self._compare(path, fields, ours))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _compare(
        self, path: str, fields: dict[str, Any], ours: "asyncio.Future[Answer]"
    ) -> None:
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                theirs = await self._send(path, fields)
        except (AddressDenied, *NETWORK_ERRORS) as error:
            self._count(ShadowOutcome.UNANSWERED)
            logger.info("vendor did not answer", path=path, error=type(error).__name__)
            return
        await asyncio.wait([ours])
        if ours.cancelled():
            self._count(ShadowOutcome.ABANDONED)
            return
        found = await to_thread.run_sync(compare, ours.result(), theirs)
        self._count(ShadowOutcome.DIFFERENT if found else ShadowOutcome.SAME)
        if found:
            logger.info("vendor answers in another shape", path=path, detail="; ".join(found))

    async def _send(self, path: str, fields: dict[str, Any]) -> Answer:
        """The vendor's answer. Raises: AddressDenied; one of NETWORK_ERRORS."""
        body = await to_thread.run_sync(encode, fields)
        fields.clear()  # They may hold megabytes of pictures.
        async with self._client.request(
            "POST",
            checked_url(self._base_url + path),
            self._policy,
            owner=OWNER,
            headers={"Content-Type": "application/json"},
            max_body_bytes=self._limits.max_answer_bytes,
            connect_timeout_s=self._limits.connect_timeout_s,
            body=body,
        ) as response:
            return Answer(response.status, await response.read())


def policy_of(base_url: str, client: EgressClient) -> AddressPolicy:
    """Public addresses and the URL's port; loopback only where the URL names it.

    A name of the vendor's that leads to a private address, as in a network that was taken over,
    must not carry a key there.
    """
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    return AddressPolicy(
        allow_hosts=(host,) if is_loopback(host) else (),
        allow_ports=(parts.port,) if parts.port else (),
        nat64_prefixes=client.nat64_prefixes,
    )


def encode(fields: Mapping[str, Any]) -> bytes:
    """The body of the vendor's call."""
    return json.dumps({name: fields[name] for name in fields if name not in UNSENT}).encode()


def read_vendor_keys(settings: ShadowSettings) -> list[str]:
    """The keys that may be sent to the vendor. They are redacted from the log from now on.

    Raises: OSError; ValueError for a file that others may read, and for a key of this server.
    """
    if settings.keys_file is None:
        return []
    keys = read_keys_file(settings.keys_file)
    if any(key.startswith(KEY_PREFIX) for key in keys):
        raise ValueError(
            f"{settings.keys_file} holds a key that this server has made; its keys are sent to the "
            "vendor, so list the vendor's alone"
        )
    redact_secrets(keys)
    return keys
