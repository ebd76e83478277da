"""`WebhookSender`: claims due webhook calls, signs them and sends them through `egress/client`.

A circuit breaker per key and host stops calls to a host that keeps failing, and probes it with one
call at a time, so that its time-outs do not delay calls to other hosts. Stopped calls stay rows.
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

from server.core import tracing
from server.core.errors import RateLimited
from server.core.logs import get_logger
from server.core.rate_limits import TokenBuckets
from server.core.settings.sections import WebhookSettings
from server.egress.client import NETWORK_ERRORS, BodyTooLarge, EgressClient, EgressFailed
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
"""Interval between claims. The end of a call triggers a claim at once."""

DATABASE_THREADS = 4

MAX_REPLY_BYTES = 64_000
CALLS_PER_HOST = 4
"""Limit of concurrent calls, so that one slow receiver does not delay calls to others."""

MANUAL_CALLS_PER_MINUTE = 30
"""Rate limit of a key's pings and redeliveries together."""

OPERATOR = EgressGrant("operator")
"""Grant of the command line's test calls, which belong to no key."""

NOT_ALLOWED = "address not allowed"
NOT_MADE = "could not be made"
NO_ANSWER = "no answer"
NOT_REACHABLE = "not reachable"

CLASSES = {
    NO_ANSWER: "no_answer",
    NOT_REACHABLE: "not_reachable",
    NOT_ALLOWED: "not_allowed",
    NOT_MADE: "not_made",
}
"""Of calls without a response."""

OUTCOMES = ("2xx", "3xx", "4xx", "5xx", "other", *CLASSES.values())
"""All values of `class_of`."""


class WebhookCaller:
    """Signs webhook calls and sends them through the address policy."""

    def __init__(self, settings: WebhookSettings, client: EgressClient) -> None:
        self._settings = settings
        self._client = client

    async def ping(self, url: str, grant: EgressGrant = OPERATOR) -> tuple[str, Attempt]:
        """Send a test event; its message id and the result."""
        message_id = f"msg_{uuid.uuid4().hex}"
        return message_id, await self.send(url, message_id, {"type": "ping"}, grant)

    async def send(
        self, url: str, message_id: str, values: dict[str, Any], grant: EgressGrant = OPERATOR
    ) -> Attempt:
        """Send one signed POST.

        values: the body, as JSON. grant: of the key that gave the URL.
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
        """Status and Retry-After in seconds. At most `MAX_REPLY_BYTES` of the body are read."""
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
        ) as response:
            # The status is the answer. Receivers may close the connection before its body is read.
            with contextlib.suppress(BodyTooLarge, EgressFailed):
                await response.read()
            return response.status, to_seconds(response.headers.get("retry-after", ""))


class WebhookSender:
    """Sends due calls; `run` is a background task of the API process.

    render: the call's body for an ended job, in the job's dialect.
    grant_of: the grant of a key id; by default the key has none beyond the settings.
    """

    def __init__(
        self,
        settings: WebhookSettings,
        deliveries: DeliveryStore,
        jobs: JobStore,
        render: Callable[[Job], dict[str, Any]],
        client: EgressClient,
        grant_of: Callable[[str], EgressGrant] = EgressGrant,
    ) -> None:
        self._settings = settings
        self._render = render
        self._grant_of = grant_of
        self._caller = WebhookCaller(settings, client)
        self._deliveries = deliveries
        self._jobs = jobs
        self._calls: Counter[str] = Counter()
        self._breakers = CircuitBreakers(settings.hold_after_failures, settings.hold_s)
        self._probes: set[str] = set()
        self._manual_calls = TokenBuckets()
        self._call_ended = asyncio.Event()
        self._threads = anyio.CapacityLimiter(DATABASE_THREADS)
        self.outcomes: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        """How many calls this process has made, by `class_of` their result."""

    async def run(self) -> None:
        """Run until cancelled. The lease of an interrupted call runs out, and it is made again."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._call_ended.clear()
                for delivery in await self._claim():
                    tasks.create_task(self._deliver(delivery))
                await self._wait_for_call_end(POLL_S)

    async def _in_thread(self, function: Callable[[*Args], R], *args: *Args) -> R:
        """Run a database call in a thread."""
        return await anyio.to_thread.run_sync(function, *args, limiter=self._threads)

    async def _wait_for_call_end(self, seconds: float) -> None:
        """Wait so many seconds, or until a call ends and so leaves room for another."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._call_ended.wait()

    async def ping(self, url: str, grant: EgressGrant) -> tuple[str, Attempt]:
        """`WebhookCaller.ping` with the rate limit of the key. Raises: RateLimited."""
        self.limit_manual_calls(grant.key_id)
        return await self._caller.ping(url, grant)

    def limit_manual_calls(self, key_id: str) -> None:
        """Count a ping or redelivery against the key's rate limit. Raises: RateLimited."""
        wait_s = self._manual_calls.take(key_id, MANUAL_CALLS_PER_MINUTE)
        if wait_s is not None:
            raise RateLimited(wait_s, MANUAL_CALLS_PER_MINUTE)

    @property
    def open_hosts(self) -> list[str]:
        """Hosts whose circuit breaker is open."""
        return self._breakers.open_hosts

    async def _claim(self) -> list[Delivery]:
        places = self._settings.max_concurrent - self._calls.total()
        if places <= 0:
            return []
        probes = self._breakers.due_for_probe[:places]
        try:
            claimed = await self._in_thread(
                self._deliveries.claim_due,
                places,
                self._breakers.open_hosts,
                CALLS_PER_HOST,
                {**self._calls},
            )
            if probes:
                probing = await self._in_thread(self._deliveries.claim_probes, probes)
                for each in probing:
                    self._breakers.begin_probe(each.host)
                self._probes.update(each.id for each in probing)
                claimed += probing
        except SQLAlchemyError:
            logger.exception("webhooks cannot be claimed")
            return []
        self._calls.update(each.host for each in claimed)
        return claimed

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            attempt = await self._attempt(delivery)
            if attempt is None:
                return
            self.outcomes[class_of(attempt)] += 1
            state = await self._in_thread(self._deliveries.record, delivery, attempt)
            await self._update_breaker(delivery.host, attempt)
            logger.info(
                "webhook",
                job_id=delivery.job_id,
                state=state,
                status=attempt.status,
                detail=attempt.outcome,
                duration_ms=round(attempt.duration_s * 1000),
            )
        except Exception:
            # One call must not stop the others. Its lease runs out, and it is made again.
            logger.exception("webhook call failed", job_id=delivery.job_id)
        finally:
            if delivery.id in self._probes:
                self._probes.remove(delivery.id)
                self._breakers.end_probe(delivery.host)
            self._calls -= Counter([delivery.host])  # Subtracting removes hosts without calls.
            self._call_ended.set()

    async def _update_breaker(self, host: str, attempt: Attempt) -> None:
        """Count the result for the circuit breaker of this key and host.

        A denied address counts like a host without an answer. Otherwise the state of the breaker,
        which clients see, would reveal which addresses are denied.
        """
        if attempt.outcome == NOT_MADE:
            return
        if not attempt.is_host_failure:
            self._breakers.record_success(host)
        elif self._breakers.record_failure(host):
            dead = await self._in_thread(self._deliveries.mark_old_dead, host)
            logger.warning("webhook circuit breaker opened", detail=host, count=dead)

    async def _attempt(self, delivery: Delivery) -> Attempt | None:
        """Make a call; None where the job's row, and so its calls, have been removed."""
        started_at = time.time()
        try:
            return await self._call(delivery)
        except Exception:
            # Recorded like other failures, because the call would otherwise be tried for ever.
            logger.exception("webhook call cannot be made", job_id=delivery.job_id)
            return Attempt(started_at, time.time() - started_at, None, NOT_MADE)

    async def _call(self, delivery: Delivery) -> Attempt | None:
        job = await self._in_thread(self._jobs.get, delivery.job_id)
        if job is None:
            return None
        grant = self._grant_of(job.key_id)
        attempt = await self._caller.send(delivery.url, delivery.id, self._render(job), grant)
        trace_call(job, delivery, attempt)
        return attempt


def outcome_of(error: Exception) -> str:
    """Why there was no response, for operators only: clients could map our network with it."""
    if isinstance(error, AddressDenied):
        return NOT_ALLOWED
    return NO_ANSWER if isinstance(error, TimeoutError) else NOT_REACHABLE


def trace_call(job: Job, delivery: Delivery, attempt: Attempt) -> None:
    """The span of a call that has just ended, in the trace of its job."""
    tracing.record(
        "webhook",
        attempt.duration_s,
        job.traceparent,
        failure="" if attempt.is_success else class_of(attempt),
        job_id=job.id,
        attempt=delivery.attempt,
        status=attempt.status,
    )


def class_of(attempt: Attempt) -> str:
    """The class of the response's status, or why there was none, for metrics."""
    if attempt.status is None:
        return CLASSES[attempt.outcome]
    return f"{attempt.status // 100}xx" if 200 <= attempt.status < 600 else "other"


def to_seconds(retry_after: str) -> float | None:
    """Seconds of a Retry-After header, given in seconds or as a date; None for an invalid one."""
    value = retry_after.strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
