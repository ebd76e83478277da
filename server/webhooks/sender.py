"""Webhook calls: signed, sent through the address policy, tried again until received.

A circuit breaker for each host keeps calls to a host that fails again and again as rows, and probes
the host with one call at a time, so that its time-outs do not hold up the calls to other hosts.
"""

import asyncio
import contextlib
import email.utils
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar, TypeVarTuple

import anyio
import anyio.to_thread
from sqlalchemy.exc import SQLAlchemyError

from server.core.errors import RateLimited
from server.core.logs import get_logger
from server.core.rate_limits import TokenBuckets
from server.core.settings import WebhookSettings
from server.egress.client import NETWORK_ERRORS, BodyTooLarge, EgressClient
from server.egress.policy import AddressDenied, EgressGrant, checked_url
from server.jobs.job import Job
from server.jobs.outbox import host_of
from server.jobs.store import JobStore
from server.webhooks.circuit_breaker import CircuitBreakers
from server.webhooks.deliveries import Attempt, Delivery, DeliveryStore
from server.webhooks.signing import sign

Args = TypeVarTuple("Args")
R = TypeVar("R")

logger = get_logger(__name__)

POLL_S = 0.25
"""Between two claims while no call ends: a call that ends makes room for another at once."""

DATABASE_THREADS = 4

MAX_REPLY_BYTES = 64_000
CALLS_PER_HOST = 4
"""Claimed at a time, and from so many under way on no more are: one slow receiver must not hold up
the others."""

ASKED_CALLS_PER_MINUTE = 30
"""Pings and redeliveries together, of one key."""

OPERATOR = EgressGrant("operator")
"""For what no key has asked for."""

NOT_ALLOWED = "address not allowed"
NOT_MADE = "could not be made"


class WebhookCaller:
    """Makes the calls, signed and through the address policy."""

    def __init__(self, settings: WebhookSettings, client: EgressClient | None = None) -> None:
        self._settings = settings
        self._client = client or EgressClient()

    async def ping(self, url: str, grant: EgressGrant = OPERATOR) -> tuple[str, Attempt]:
        """A test event to any address that a webhook may have: its id, and how it went."""
        message_id = f"msg_{uuid.uuid4().hex}"
        return message_id, await self.send(url, message_id, {"type": "ping"}, grant)

    async def send(
        self, url: str, message_id: str, values: dict[str, Any], grant: EgressGrant = OPERATOR
    ) -> Attempt:
        """One signed POST, and how it went.

        values: the body, as JSON. grant: of who named the URL.
        """
        started_at, started = time.time(), time.perf_counter()
        status, retry_after_s, outcome = None, None, "answered"
        try:
            body = json.dumps(values)
            headers = sign(message_id, int(started_at), body, self._settings.secret)
            async with asyncio.timeout(self._settings.timeout_s):
                status, retry_after_s = await self._post(url, body.encode(), headers, grant)
        except (AddressDenied, *NETWORK_ERRORS) as error:
            outcome = outcome_of(error)
            reason = f"{host_of(grant.key_id, url)}: {type(error).__name__}: {error}"
            logger.info("webhook not answered", detail=reason)
        duration_s = time.perf_counter() - started
        return Attempt(started_at, duration_s, status, outcome, retry_after_s)

    async def _post(
        self, url: str, body: bytes, headers: dict[str, str], grant: EgressGrant
    ) -> tuple[int, float | None]:
        """Status and Retry-After of the receiver's answer, of which no more than a bit is read."""
        target = checked_url(url)
        if self._settings.https_only and target.scheme != "https":
            raise AddressDenied("not https")
        async with self._client.request(
            "POST",
            target,
            grant.policy(self._settings, self._client.nat64_prefixes),
            owner=grant.key_id,
            headers={"Content-Type": "application/json", **headers},
            max_body_bytes=MAX_REPLY_BYTES,
            connect_timeout_s=self._settings.timeout_s,
            body=body,
        ) as answer:
            with contextlib.suppress(BodyTooLarge):
                await answer.read()
            return answer.status, to_seconds(answer.headers.get("retry-after", ""))


class WebhookSender:
    """Sends what is due; run `run` as a task beside the server.

    render: the body of the call for a job that has ended, in the words of the job's dialect.
    grant_of: what a key's webhooks may reach, by its id; nothing more than the settings' say.
    """

    def __init__(
        self,
        settings: WebhookSettings,
        deliveries: DeliveryStore,
        jobs: JobStore,
        render: Callable[[Job], dict[str, Any]],
        client: EgressClient | None = None,
        grant_of: Callable[[str], EgressGrant] = EgressGrant,
    ) -> None:
        self._settings = settings
        self._render = render
        self._grant_of = grant_of
        self._caller = WebhookCaller(settings, client)
        self._deliveries = deliveries
        self._jobs = jobs
        self._calls: Counter[str] = Counter()
        self._circuits = CircuitBreakers(settings.hold_after_failures, settings.hold_s)
        self._probes: set[str] = set()
        self._asked_calls = TokenBuckets()
        self._has_ended = asyncio.Event()
        self._threads = anyio.CapacityLimiter(DATABASE_THREADS)

    async def run(self) -> None:
        """Until cancelled. Calls under way then are tried again after the next start."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._has_ended.clear()
                for delivery in await self._claim():
                    tasks.create_task(self._deliver(delivery))
                await self._call_ends_within(POLL_S)

    async def _in_thread(self, function: Callable[[*Args], R], *args: *Args) -> R:
        """A call to the database, off the event loop."""
        return await anyio.to_thread.run_sync(function, *args, limiter=self._threads)

    async def _call_ends_within(self, seconds: float) -> None:
        """Wait that long, or until one of the calls under way makes room."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._has_ended.wait()

    async def ping(self, url: str, grant: EgressGrant) -> tuple[str, Attempt]:
        """As `WebhookCaller.ping`, beside the calls that are due. Raises: RateLimited."""
        self.count_asked_call(grant.key_id)
        return await self._caller.ping(url, grant)

    def count_asked_call(self, key_id: str) -> None:
        """Note a call that a key asks for by itself, beside those of its jobs' ends.

        Raises: RateLimited.
        """
        wait_s = self._asked_calls.take(key_id, ASKED_CALLS_PER_MINUTE)
        if wait_s is not None:
            raise RateLimited(wait_s, ASKED_CALLS_PER_MINUTE)

    @property
    def held_hosts(self) -> list[str]:
        """Hosts that always fail and are spared for now."""
        return self._circuits.held

    async def _claim(self) -> list[Delivery]:
        places = self._settings.max_concurrent - self._calls.total()
        busy = [host for host, calls in self._calls.items() if calls >= CALLS_PER_HOST]
        if places <= 0:
            return []
        probes = self._circuits.due_for_probe[:places]
        try:
            claimed = await self._in_thread(
                self._deliveries.claim_due, places, [*busy, *self._circuits.held], CALLS_PER_HOST
            )
            if probes:
                probing = await self._in_thread(self._deliveries.claim_probes, probes)
                for each in probing:
                    self._circuits.begin_probe(each.host)
                self._probes.update(each.id for each in probing)
                claimed += probing
        except SQLAlchemyError:
            logger.exception("webhooks cannot be looked up")
            return []
        self._calls.update(each.host for each in claimed)
        return claimed

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            attempt = await self._attempt(delivery)
            if attempt is None:
                return
            state = await self._in_thread(self._deliveries.record, delivery, attempt)
            await self._judge_host(delivery.host, attempt)
            logger.info(
                "webhook",
                job_id=delivery.job_id,
                state=state,
                status=attempt.status,
                detail=attempt.outcome,
                duration_ms=round(attempt.duration_s * 1000),
            )
        except Exception:
            # One call must not stop the others. Its claim runs out, and it is made again.
            logger.exception("webhook call failed", job_id=delivery.job_id)
        finally:
            if delivery.id in self._probes:
                self._probes.remove(delivery.id)
                self._circuits.end_probe(delivery.host)
            self._calls -= Counter([delivery.host])  # drops hosts without calls
            self._has_ended.set()

    async def _judge_host(self, host: str, attempt: Attempt) -> None:
        """Whether the host as a whole works, for this key: one that is denied is no other case than
        one that is away, or being spared would tell them apart."""
        if attempt.outcome == NOT_MADE:
            return
        if not attempt.is_host_failure:
            self._circuits.note_success(host)
        elif self._circuits.note_failure(host):
            given_up = await self._in_thread(self._deliveries.give_up, host)
            logger.warning("webhook host is held", detail=host, count=given_up)

    async def _attempt(self, delivery: Delivery) -> Attempt | None:
        """None where the job's row has been removed, and its calls with it."""
        started_at = time.time()
        try:
            return await self._call(delivery)
        except Exception:
            # Counted like any other failure, or it would be tried for ever.
            logger.exception("webhook call cannot be made", job_id=delivery.job_id)
            return Attempt(started_at, time.time() - started_at, None, NOT_MADE)

    async def _call(self, delivery: Delivery) -> Attempt | None:
        job = await self._in_thread(self._jobs.get, delivery.job_id)
        if job is None:
            return None
        grant = self._grant_of(job.key_id)
        return await self._caller.send(delivery.url, delivery.id, self._render(job), grant)


def outcome_of(error: Exception) -> str:
    """Why there was no answer, for operators: whoever named the address is not told."""
    if isinstance(error, AddressDenied):
        return NOT_ALLOWED
    return "no answer" if isinstance(error, TimeoutError) else "not reachable"


def to_seconds(retry_after: str) -> float | None:
    """Seconds the receiver asks to be left alone, from either form of the header."""
    value = retry_after.strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
