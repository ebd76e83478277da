"""Webhook calls: written with the job's end, signed, sent to allowed addresses, tried again."""

import asyncio
import json
import queue
import random
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, delete, func, select, update
from standardwebhooks import Webhook
from svix.webhooks import Webhook as SvixWebhook
from svix.webhooks import WebhookVerificationError

from models.params import InpaintParams
from server.api.dialects.registry import write_webhook
from server.core.errors import Conflict, ConflictKind
from server.core.settings.sections import WebhookSettings
from server.jobs.job import Failure, Job, NewJob, RequestFacts
from server.jobs.outbox import MAX_AGE_S, RETRY_DELAYS_S, DeliveryState, host_of, key_of
from server.jobs.store import MAX_ATTEMPTS, JobStore
from server.storage.clock import MEASURE_S, DatabaseClock
from server.storage.database import open_engine
from server.storage.tables import delivery_attempts
from server.storage.tables import jobs as job_rows
from server.webhooks.deliveries import (
    KEPT_ATTEMPTS,
    LISTED_ATTEMPTS,
    LONGEST_DELAY_S,
    Attempt,
    Delivery,
    DeliveryStore,
)
from server.webhooks.sender import (
    CALLS_PER_HOST,
    WebhookCaller,
    WebhookSender,
    to_seconds,
)
from server.webhooks.signing import sign
from tests.support.clocks import Clock
from tests.support.databases import migrated_sqlite
from tests.support.egress import egress_client
from tests.support.http_stub import answering, response, running_stub
from tests.support.postgres import PostgresServer
from tests.support.webhooks import WAIT_S, abrupt_receiver, attempt, receiver

LOOPBACK = WebhookSettings.model_validate({"allow_cidrs": "127.0.0.0/8"})


@pytest.fixture
def jobs(engine: Engine, clock: Clock) -> JobStore:
    return JobStore(engine, clock=clock, shared_clock=clock)


@pytest.fixture
def deliveries(engine: Engine, clock: Clock) -> DeliveryStore:
    return DeliveryStore(engine, clock=clock, jitter=random.Random(0))


def submit(
    jobs: JobStore,
    webhook: str | None,
    track_id: Any = 7,
    dialect: str = "v3",
    key_id: str = "somebody",
) -> Job:
    """A job that a worker holds."""
    jobs.submit(
        NewJob(
            dialect=dialect,
            request=RequestFacts(
                base_url="http://inpaint.example",
                init_image="http://pictures.example/init.png",
                mask_image="http://pictures.example/mask.png",
                own={"wants_base64": True},
            ),
            params=InpaintParams(prompt="a red circle", seed=1, samples=2),
            key_id=key_id,
            file_prefix=str(uuid.uuid4()),
            work=1.0,
            webhook=webhook,
            track_id=track_id,
        )
    )
    (job,) = jobs.claim("worker", 1)
    return job


def tries_of(deliveries: DeliveryStore, job: Job) -> list[Attempt]:
    """Every try of a job's webhook, first to last."""
    return [attempt for status in deliveries.of_job(job.id) for _, attempt in status.attempts]


def host_of_somebody(netloc: str) -> str:
    return f"somebody http://{netloc}"


def test_call_is_written_with_the_end_of_the_job(jobs: JobStore, deliveries: DeliveryStore) -> None:
    job = submit(jobs, "http://receiver.example/hook")
    assert deliveries.claim_due(10) == []
    jobs.finish(job, [False, False])
    (due,) = deliveries.claim_due(10)
    assert (due.job_id, due.url, due.host, due.attempt) == (
        *(job.id, "http://receiver.example/hook", host_of_somebody("receiver.example:80")),
        1,
    )
    assert deliveries.claim_due(10) == [], "nobody else makes a call that is claimed"


def test_every_way_to_end_makes_one_call(jobs: JobStore, deliveries: DeliveryStore) -> None:
    failed, cancelled = submit(jobs, "http://a.example"), submit(jobs, "http://b.example")
    jobs.fail(failed, "no")
    jobs.fail(failed, "no")
    jobs.cancel(cancelled.id)
    lost = submit(jobs, "http://c.example")
    for _ in range(MAX_ATTEMPTS):
        jobs.requeue_of("worker")
        jobs.claim("worker", 1)
    submit(jobs, None)
    ids = [each.job_id for each in deliveries.claim_due(10)]
    assert sorted(ids) == [failed.id, cancelled.id, lost.id]


def test_retries_follow_the_schedule_until_it_is_used_up(
    jobs: JobStore, deliveries: DeliveryStore, clock: Clock
) -> None:
    jobs.finish(job := submit(jobs, "http://receiver.example"), [])
    ids = set()
    for delay_s in RETRY_DELAYS_S:
        (due,) = deliveries.claim_due(10)
        ids.add(due.id)
        assert deliveries.record(due, attempt(500)) is DeliveryState.PENDING
        clock.now += 0.79 * delay_s
        assert deliveries.claim_due(10) == []
        clock.now += 0.42 * delay_s
    (last,) = deliveries.claim_due(10)
    assert deliveries.record(last, attempt(None)) is DeliveryState.DEAD
    clock.now += 1_000_000
    assert deliveries.claim_due(10) == []
    assert len(tries_of(deliveries, job)) == len(RETRY_DELAYS_S) + 1
    assert ids == {last.id}, "receivers know repeats by their id"


@pytest.mark.parametrize(
    ("status", "state"),
    [
        (200, DeliveryState.DELIVERED),
        (204, DeliveryState.DELIVERED),
        (301, DeliveryState.PENDING),
        (400, DeliveryState.PENDING),
        (410, DeliveryState.DEAD),
        (503, DeliveryState.PENDING),
        (None, DeliveryState.PENDING),
    ],
)
def test_only_2xx_counts_as_received(
    jobs: JobStore, deliveries: DeliveryStore, status: int | None, state: DeliveryState
) -> None:
    jobs.finish(submit(jobs, "http://receiver.example"), [])
    (due,) = deliveries.claim_due(1)
    assert deliveries.record(due, attempt(status)) is state


def test_retry_after_is_obeyed(jobs: JobStore, deliveries: DeliveryStore, clock: Clock) -> None:
    jobs.finish(submit(jobs, "http://receiver.example"), [])
    (due,) = deliveries.claim_due(1)
    deliveries.record(due, attempt(429, retry_after_s=600))
    clock.now += 599
    assert deliveries.claim_due(1) == []
    clock.now += 2
    assert len(deliveries.claim_due(1)) == 1


def test_call_of_a_dead_sender_is_made_by_another(
    jobs: JobStore, deliveries: DeliveryStore, clock: Clock
) -> None:
    jobs.finish(submit(jobs, "http://receiver.example"), [])
    (first,) = deliveries.claim_due(1)
    clock.now += 61
    (second,) = deliveries.claim_due(1)
    assert (first.id, second.attempt) == (second.id, 2)
    deliveries.record(first, attempt(500))
    assert deliveries.record(second, attempt(200)) is DeliveryState.DELIVERED


def test_busy_host_is_passed_over(jobs: JobStore, deliveries: DeliveryStore) -> None:
    for host in ("slow.example:8080", "quick.example"):
        jobs.finish(submit(jobs, f"http://{host}/hook"), [])
    (due,) = deliveries.claim_due(5, skipped_hosts=[host_of_somebody("slow.example:8080")])
    assert due.host == host_of_somebody("quick.example:80")


def test_claim_takes_few_calls_of_one_host(jobs: JobStore, deliveries: DeliveryStore) -> None:
    for index in range(12):
        host = "slow.example" if index < 10 else f"quick-{index}.example"
        jobs.finish(submit(jobs, f"http://{host}/hook"), [])
    slow = host_of_somebody("slow.example:80")
    under_way = {slow: 3, "elsewhere": 4}
    hosts = Counter(each.host for each in deliveries.claim_due(64, per_host=4, under_way=under_way))
    assert hosts[slow] == 1, "with the three under way"
    hosts += Counter(
        each.host for each in deliveries.claim_due(64, per_host=4, under_way={slow: 1})
    )
    assert hosts == {
        slow: 4,
        host_of_somebody("quick-10.example:80"): 1,
        host_of_somebody("quick-11.example:80"): 1,
    }


def test_keys_take_turns(jobs: JobStore, deliveries: DeliveryStore) -> None:
    for index in range(12):
        # A name of its own for each call evades what is counted by host.
        jobs.finish(submit(jobs, f"http://{index}.hung.example", key_id="greedy"), [])
    for _ in range(2):
        jobs.finish(submit(jobs, "http://receiver.example", key_id="modest"), [])
    keys = [key_of(each.host) for each in deliveries.claim_due(4)]
    assert sorted(keys) == ["greedy", "greedy", "modest", "modest"]


def test_key_with_fewer_calls_under_way_goes_first(
    jobs: JobStore, deliveries: DeliveryStore
) -> None:
    for key_id in ("greedy", "greedy", "modest", "modest"):
        jobs.finish(submit(jobs, "http://receiver.example", key_id=key_id), [])
    under_way = {host_of("greedy", f"http://{index}.hung.example"): 1 for index in range(8)}
    (due,) = deliveries.claim_due(1, under_way=under_way)
    assert key_of(due.host) == "modest"
    assert len(deliveries.claim_due(64, under_way=under_way)) == 3, "nobody waits in vain"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("http://a.example", "https://a.example"),
        ("http://a.example", "http://a.example:8080"),
        ("http://a.example", "http://b.example"),
    ],
)
def test_calls_of_other_addresses_count_apart(one: str, other: str) -> None:
    assert host_of("key", one) != host_of("key", other)
    assert host_of("key", one) != host_of("another", one)


@pytest.mark.parametrize(
    "same", ["http://A.example:80/x", "http://user@a.example?x", "HTTP://a.example"]
)
def test_calls_of_one_address_count_together(same: str) -> None:
    assert host_of("key", same) == host_of("key", "http://a.example/hook")


def test_failing_receiver_of_one_key_holds_up_no_other_key(
    jobs: JobStore, deliveries: DeliveryStore
) -> None:
    """Nor the same host's other ports."""
    for key_id in ("one", "other"):
        for _ in range(5):
            jobs.finish(submit(jobs, "http://victim.example", key_id=key_id), [])
    held = host_of("one", "http://victim.example")
    assert {each.host for each in deliveries.claim_due(64, [held])} == {
        host_of("other", "http://victim.example")
    }


@pytest.mark.parametrize("address", ["http://[", "http://a\u2100b/x", "no url at all"])
def test_job_ends_whatever_its_webhook_says(
    jobs: JobStore, deliveries: DeliveryStore, address: str
) -> None:
    assert jobs.finish(job := submit(jobs, address), [])
    (attempt,) = asyncio.run(send_until(LOOPBACK, deliveries, jobs, job, 1))
    assert (attempt.status, attempt.outcome) == (None, "address not allowed")


@pytest.mark.parametrize("retry_after", ["\u00b2", "soon", "", "-5", "1e9"])
def test_odd_retry_after_is_passed_over(retry_after: str) -> None:
    assert to_seconds(retry_after) is None


def test_signature_verifies_with_both_secrets_of_a_rotation() -> None:
    secrets = ["whsec_" + "A" * 32, "whsec_" + "b" * 32]
    body = json.dumps({"track_id": 7, "prompt": "für"})
    now = int(time.time())
    headers = sign("msg_1", now, body, [SecretStr(secret) for secret in secrets])
    for secret in secrets:
        assert Webhook(secret).verify(body, headers) == json.loads(body)
        SvixWebhook(secret).verify(body, headers)
    with pytest.raises(WebhookVerificationError):
        SvixWebhook(secrets[0]).verify(body + " ", headers)
    assert "webhook-signature" not in sign("msg_1", now, body, [])


async def send_until(
    settings: WebhookSettings, deliveries: DeliveryStore, jobs: JobStore, job: Job, tries: int
) -> list[Attempt]:
    """Run a sender until a job's webhook was tried so often."""
    sender = asyncio.create_task(
        WebhookSender(settings, deliveries, jobs, write_webhook, egress_client()).run()
    )
    async with asyncio.timeout(WAIT_S):
        # The rows are what a sender leaves behind; nothing tells of their change in one process.
        while len(attempts := tries_of(deliveries, job)) < tries:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    sender.cancel()
    await asyncio.wait([sender])
    return attempts


@pytest.mark.parametrize("track_id", [7, "7", None, 1.5, True])
def test_receiver_gets_the_success_answer_with_track_id(
    jobs: JobStore, deliveries: DeliveryStore, track_id: Any
) -> None:
    with receiver() as (url, calls):
        jobs.finish(job := submit(jobs, url, track_id), [False, False])
        asyncio.run(send_until(LOOPBACK, deliveries, jobs, job, 1))
        headers, body = calls.get(timeout=WAIT_S)
    assert list(body) == ["status", "generationTime", "id", "output", "meta", "track_id"]
    assert (body["status"], body["id"]) == ("success", job.id)
    assert (body["track_id"], type(body["track_id"])) == (track_id, type(track_id))
    assert body["output"] == [
        f"http://inpaint.example/generations/{name}" for name in job.output_names
    ]
    assert headers["content-type"] == "application/json"
    assert headers["webhook-id"].startswith("msg_")


def test_receiver_hears_of_a_failure(jobs: JobStore, deliveries: DeliveryStore) -> None:
    with receiver() as (url, calls):
        jobs.fail(job := submit(jobs, url), "It did not work")
        asyncio.run(send_until(LOOPBACK, deliveries, jobs, job, 1))
        assert calls.get(timeout=WAIT_S)[1] == {
            "status": "failed",
            "id": job.id,
            "message": "Failed, Try Again. It did not work",
            "track_id": 7,
        }


def test_redirect_is_not_followed(jobs: JobStore, deliveries: DeliveryStore) -> None:
    with receiver(302) as (url, calls):
        jobs.finish(job := submit(jobs, url), [])
        (attempt,) = asyncio.run(send_until(LOOPBACK, deliveries, jobs, job, 1))
        assert (attempt.status, attempt.is_success) == (302, False)
        assert calls.qsize() == 1


def test_private_address_is_not_called(jobs: JobStore, deliveries: DeliveryStore) -> None:
    with receiver() as (url, calls):
        jobs.finish(job := submit(jobs, url), [])
        (attempt,) = asyncio.run(send_until(WebhookSettings(), deliveries, jobs, job, 1))
        assert (attempt.status, attempt.outcome) == (None, "address not allowed")
        assert calls.empty()


def test_slow_receiver_is_given_up(jobs: JobStore, deliveries: DeliveryStore) -> None:
    settings = LOOPBACK.model_copy(update={"timeout_s": 0.3})
    with socket.create_server(("127.0.0.1", 0)) as silent:
        slow = f"http://127.0.0.1:{silent.getsockname()[1]}"
        jobs.finish(job := submit(jobs, slow), [])
        (attempt,) = asyncio.run(send_until(settings, deliveries, jobs, job, 1))
        assert (attempt.status, attempt.outcome) == (None, "no answer")


def test_slow_receiver_holds_up_no_other(jobs: JobStore, deliveries: DeliveryStore) -> None:
    settings = LOOPBACK.model_copy(update={"timeout_s": 10 * WAIT_S})
    with socket.create_server(("127.0.0.1", 0)) as silent, receiver() as (url, _calls):
        slow = f"http://127.0.0.1:{silent.getsockname()[1]}"
        jobs.finish(late := submit(jobs, slow), [])
        jobs.finish(job := submit(jobs, url), [])
        (attempt,) = asyncio.run(send_until(settings, deliveries, jobs, job, 1))
        assert attempt.status == 200
        assert tries_of(deliveries, late) == []


def test_calls_to_one_host_follow_each_other_without_a_pause(
    jobs: JobStore, deliveries: DeliveryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.webhooks.sender.POLL_S", 10 * WAIT_S)
    count = 3 * CALLS_PER_HOST  # no more than these are claimed at a time

    async def send(calls: "queue.Queue[Any]") -> None:
        sender = asyncio.create_task(
            WebhookSender(LOOPBACK, deliveries, jobs, write_webhook, egress_client()).run()
        )
        async with asyncio.timeout(WAIT_S):
            while calls.qsize() < count:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        sender.cancel()
        await asyncio.wait([sender])

    with receiver() as (url, calls):
        for _ in range(count):
            jobs.finish(submit(jobs, url), [])
        asyncio.run(send(calls))
        assert calls.qsize() == count


@pytest.mark.parametrize("end", ["finished", "failed", "cancelled"])
def test_native_job_speaks_its_own_language(
    end: str, jobs: JobStore, deliveries: DeliveryStore
) -> None:
    with receiver() as (url, calls):
        job = submit(jobs, url, dialect="native")
        if end == "finished":
            jobs.finish(job, [False, False])
        elif end == "failed":
            jobs.fail(job, Failure.OUT_OF_MEMORY.sentence)
        else:
            jobs.cancel(job.id)
        asyncio.run(send_until(LOOPBACK, deliveries, jobs, job, 1))
        _, body = calls.get(timeout=WAIT_S)
    assert (body["type"], body["state"], body["id"]) == (f"job.{end}", end, job.id)
    assert body["track_id"] == 7
    urls = [f"http://inpaint.example/generations/{name}" for name in job.output_names]
    assert body["outputs"] == (urls if end == "finished" else [])
    assert (body["error"] or {}).get("code") == ("out_of_memory" if end == "failed" else None)


@pytest.mark.parametrize(
    ("dialect", "said"),
    [
        (
            "v3",
            {"status": "success", "output": []},
        ),
        ("native", {"type": "job.finished", "outputs": []}),
    ],
)
def test_call_made_again_names_no_expired_pictures(
    dialect: str, said: dict[str, Any], jobs: JobStore
) -> None:
    jobs.finish(job := submit(jobs, "http://receiver.example", dialect=dialect), [False, False])
    finished = jobs.get(job.id)
    assert finished is not None
    assert said.items() <= write_webhook(replace(finished, expired_at=1.0)).items()


class HastyDeliveries(DeliveryStore):
    """One whose first claim meets the removal of its job's row."""

    meanwhile: Callable[[], None] | None = None

    def claim_due(self, *arguments: Any, **named: Any) -> list[Delivery]:
        """As the base class."""
        claimed = super().claim_due(*arguments, **named)
        if claimed and self.meanwhile is not None:
            act, self.meanwhile = self.meanwhile, None
            act()
        return claimed


def test_call_of_a_removed_row_is_not_made(engine: Engine, jobs: JobStore, clock: Clock) -> None:
    deliveries = HastyDeliveries(engine, clock=clock)
    with receiver() as (url, calls):
        jobs.finish(old := submit(jobs, url), [])
        young = submit(jobs, url)

        def remove() -> None:
            with engine.begin() as connection:
                connection.execute(delete(job_rows).where(job_rows.c.id == old.id))
            jobs.finish(young, [])

        deliveries.meanwhile = remove
        asyncio.run(send_until(LOOPBACK, deliveries, jobs, young, 1))
        told = [calls.get(timeout=WAIT_S)[1] for _ in range(calls.qsize())]
    assert [body.get("id") for body in told] == [young.id]


class TestRedelivery:
    def test_same_id_again(self, jobs: JobStore, deliveries: DeliveryStore) -> None:
        with receiver() as (url, calls):
            jobs.finish(job := submit(jobs, url), [False, False])
            asyncio.run(send_until(LOOPBACK, deliveries, jobs, job, 1))
            deliveries.redeliver(job.id)
            asyncio.run(send_until(LOOPBACK, deliveries, jobs, job, 2))
            (first, one), (second, other) = (calls.get(timeout=WAIT_S) for _ in range(2))
        assert first["webhook-id"] == second["webhook-id"]
        assert one == other
        (status,) = deliveries.of_job(job.id)
        assert status.state is DeliveryState.DELIVERED
        assert [number for number, _ in status.attempts] == [1, 2]

    def test_dead_letter_gets_one_more_try(self, jobs: JobStore, deliveries: DeliveryStore) -> None:
        jobs.finish(job := submit(jobs, "http://receiver.example"), [])
        (due,) = deliveries.claim_due(1)
        deliveries.record(due, attempt(410))
        dead = deliveries.list_of("somebody", state=DeliveryState.DEAD, limit=10)
        assert [each.job_id for each in dead] == [job.id]
        deliveries.redeliver(job.id)
        assert deliveries.list_of("somebody", state=DeliveryState.DEAD, limit=10) == []
        (again,) = deliveries.claim_due(1)
        assert (again.id, again.attempt) == (due.id, 2)

    def test_call_under_way_is_not_made_twice_at_once(
        self, jobs: JobStore, deliveries: DeliveryStore, clock: Clock
    ) -> None:
        jobs.finish(job := submit(jobs, "http://receiver.example"), [])
        (first,) = deliveries.claim_due(1)
        deliveries.redeliver(job.id)
        assert deliveries.claim_due(1) == []
        assert deliveries.record(first, attempt(500)) is DeliveryState.PENDING
        deliveries.redeliver(job.id)
        (second,) = deliveries.claim_due(1)
        assert (second.id, second.attempt) == (first.id, 2)
        clock.now += 61
        deliveries.redeliver(job.id)  # its sender has died
        assert [each.attempt for each in deliveries.claim_due(1)] == [3]

    def test_job_without_a_call(self, jobs: JobStore, deliveries: DeliveryStore) -> None:
        jobs.finish(silent := submit(jobs, None), [])
        live = submit(jobs, "http://receiver.example")
        for job in (silent, live):
            with pytest.raises(Conflict) as refused:
                deliveries.redeliver(job.id)
            assert refused.value.kind is ConflictKind.NO_DELIVERY

    def test_not_once_the_pictures_have_been_removed(
        self, engine: Engine, jobs: JobStore, deliveries: DeliveryStore
    ) -> None:
        jobs.finish(job := submit(jobs, "http://receiver.example"), [False, False])
        (due,) = deliveries.claim_due(1)
        deliveries.record(due, attempt(200))
        with engine.begin() as connection:
            connection.execute(update(job_rows).values(expired_at=1.0))
        with pytest.raises(Conflict) as refused:
            deliveries.redeliver(job.id)
        assert refused.value.kind is ConflictKind.PICTURES_EXPIRED
        (status,) = deliveries.of_job(job.id)
        assert status.state is DeliveryState.DELIVERED

    def test_it_makes_the_call_no_younger(
        self, jobs: JobStore, deliveries: DeliveryStore, clock: Clock
    ) -> None:
        jobs.finish(submit(jobs, "http://receiver.example"), [])
        (due,) = deliveries.claim_due(1)
        clock.now += MAX_AGE_S - 1
        deliveries.redeliver(due.job_id)
        assert deliveries.mark_old_dead(due.host) == 0
        clock.now += 2
        assert deliveries.mark_old_dead(due.host) == 1

    def test_history_is_bounded(
        self, engine: Engine, jobs: JobStore, deliveries: DeliveryStore
    ) -> None:
        count = KEPT_ATTEMPTS + 5
        for _ in range(2):
            jobs.finish(submit(jobs, "http://receiver.example"), [])
        jobs.finish(untried := submit(jobs, "http://receiver.example"), [])
        for _ in range(count):
            due, other = deliveries.claim_due(2)
            for each in (due, other):
                deliveries.record(each, attempt(200 if each is due else 204))
                deliveries.redeliver(each.job_id)
        latest, second, first = deliveries.list_of(None, state=None, limit=9)
        assert (latest.job_id, latest.attempts, latest.attempts_total) == (untried.id, (), 0)
        for call, status in ((first, 200), (second, 204)):
            assert call.attempts_total == count
            numbers = [number for number, _ in call.attempts]
            assert numbers == [*range(count - LISTED_ATTEMPTS + 1, count + 1)]
            assert {each.status for _, each in call.attempts} == {status}
        kept = select(func.count(), func.min(delivery_attempts.c.attempt)).group_by(
            delivery_attempts.c.delivery_id
        )
        with engine.connect() as connection:
            assert [*connection.execute(kept)] == [(KEPT_ATTEMPTS, count - KEPT_ATTEMPTS + 1)] * 2

    def test_lists_are_of_a_key_and_paged(self, jobs: JobStore, deliveries: DeliveryStore) -> None:
        ids = []
        for _ in range(3):
            jobs.finish(job := submit(jobs, "http://receiver.example"), [])
            ids.append(job.id)

        def listed(key_id: str | None, limit: int, before: int | None = None) -> list[int]:
            found = deliveries.list_of(key_id, state=None, limit=limit, before_job_id=before)
            return [each.job_id for each in found]

        assert listed("somebody", 2) == ids[:0:-1]
        assert listed("somebody", 2, ids[1]) == ids[:1]
        assert listed(None, 9) == ids[::-1]
        assert listed("another", 9) == []


class TestHeldHost:
    """The receiver's host fails again and again."""

    SETTINGS = WebhookSettings.model_validate(
        {"allow_cidrs": "127.0.0.0/8", "hold_after_failures": 2, "hold_s": 0.05}
    )

    def test_its_calls_wait_others_pass_and_nothing_is_lost(
        self, jobs: JobStore, deliveries: DeliveryStore
    ) -> None:
        settings = self.SETTINGS.model_copy(update={"hold_s": 600.0})
        with receiver(503, 503) as (bad, bad_calls), receiver() as (good, good_calls):
            failing = [submit(jobs, bad) for _ in range(2)]
            for job in failing:
                jobs.finish(job, [])

            async def body() -> list[str]:
                sender = WebhookSender(settings, deliveries, jobs, write_webhook, egress_client())
                task = asyncio.create_task(sender.run())
                async with asyncio.timeout(WAIT_S):
                    while not sender.open_hosts:  # noqa: ASYNC110 - its own affair
                        await asyncio.sleep(0.01)
                    waiting = submit(jobs, bad)
                    jobs.finish(waiting, [])
                    passing = submit(jobs, good)
                    jobs.finish(passing, [])
                    while not tries_of(deliveries, passing):  # noqa: ASYNC110 - as above
                        await asyncio.sleep(0.01)
                held = sender.open_hosts
                task.cancel()
                await asyncio.wait([task])
                (status,) = deliveries.of_job(waiting.id)
                assert (status.state, status.attempts) == (DeliveryState.PENDING, ())
                return held

            held = asyncio.run(body())
            assert held == [host_of("somebody", bad)]
            assert (bad_calls.qsize(), good_calls.qsize()) == (2, 1)

    def test_one_call_asks_and_the_rest_follow_once_it_is_answered(
        self, jobs: JobStore, deliveries: DeliveryStore
    ) -> None:
        def count(state: DeliveryState) -> int:
            return len(deliveries.list_of(None, state=state, limit=20))

        # More failures in a row than hold the host; the calls after them are received.
        with receiver(*[500] * 5) as (url, _calls):
            for job in [submit(jobs, url) for _ in range(9)]:
                jobs.finish(job, [])

            async def body() -> None:
                sender = WebhookSender(
                    self.SETTINGS, deliveries, jobs, write_webhook, egress_client()
                )
                task = asyncio.create_task(sender.run())
                async with asyncio.timeout(WAIT_S):
                    while not sender.open_hosts:  # noqa: ASYNC110 - its own affair
                        await asyncio.sleep(0.01)
                    while count(DeliveryState.DELIVERED) < 4:  # noqa: ASYNC110 - as above
                        await asyncio.sleep(0.01)
                task.cancel()
                await asyncio.wait([task])

            asyncio.run(body())
        assert count(DeliveryState.PENDING) == 5, "those that failed wait for their schedule"

    @pytest.mark.parametrize("status", [400, 404, 410])
    def test_host_that_answers_is_no_failing_host(
        self, status: int, jobs: JobStore, deliveries: DeliveryStore
    ) -> None:
        with receiver(*[status] * 6) as (url, _calls):
            for job in (submit(jobs, url) for _ in range(6)):
                jobs.finish(job, [])

            async def body() -> list[str]:
                sender = WebhookSender(
                    self.SETTINGS, deliveries, jobs, write_webhook, egress_client()
                )
                task = asyncio.create_task(sender.run())
                async with asyncio.timeout(WAIT_S):
                    while not all(  # noqa: ASYNC110 - as above
                        each.attempts for each in deliveries.list_of(None, state=None, limit=9)
                    ):
                        await asyncio.sleep(0.01)
                task.cancel()
                await asyncio.wait([task])
                return sender.open_hosts

            assert asyncio.run(body()) == []

    def test_old_calls_are_given_up_and_listed(
        self, jobs: JobStore, deliveries: DeliveryStore, clock: Clock
    ) -> None:
        jobs.finish(old := submit(jobs, "http://receiver.example"), [])
        jobs.finish(other := submit(jobs, "http://other.example"), [])
        clock.now += MAX_AGE_S + 1
        jobs.finish(young := submit(jobs, "http://receiver.example"), [])
        assert deliveries.mark_old_dead(host_of("somebody", "http://receiver.example")) == 1
        states = {each.job_id: each.state for each in deliveries.list_of(None, state=None, limit=9)}
        assert states == {
            old.id: DeliveryState.DEAD,
            other.id: DeliveryState.PENDING,
            young.id: DeliveryState.PENDING,
        }

    @pytest.mark.parametrize(
        ("status", "state"), [(500, DeliveryState.DEAD), (200, DeliveryState.DELIVERED)]
    )
    def test_call_given_up_while_under_way(
        self,
        status: int,
        state: DeliveryState,
        jobs: JobStore,
        deliveries: DeliveryStore,
        clock: Clock,
    ) -> None:
        jobs.finish(job := submit(jobs, "http://receiver.example"), [])
        clock.now += MAX_AGE_S + 1
        (due,) = deliveries.claim_due(1)
        assert deliveries.mark_old_dead(due.host) == 1
        deliveries.record(due, attempt(status))
        (found,) = deliveries.of_job(job.id)
        assert found.state is state


class TestClocks:
    """Machines' clocks differ and jump; calls are made when they are due all the same."""

    def test_first_call_is_due_whatever_the_writers_clock(
        self, engine: Engine, deliveries: DeliveryStore, clock: Clock
    ) -> None:
        for days in (3, -3):
            ahead = JobStore(engine, clock=lambda: clock.now + days * 86_400)  # noqa: B023
            ahead.finish(submit(ahead, "http://receiver.example"), [])
            assert len(deliveries.claim_due(9)) == 1

    @pytest.mark.parametrize("days", [3, -3])
    def test_jump_in_a_senders_life_changes_nothing(self, days: float, tmp_path: Path) -> None:
        """With SQLite; PostgreSQL has a clock of its own."""
        engine = open_engine(migrated_sqlite(tmp_path))
        wall, steady, jobs = Clock(), Clock(), JobStore(engine)
        sender = DeliveryStore(engine, clock=DatabaseClock(engine, wall, steady), lease_s=60)
        jobs.finish(submit(jobs, "http://receiver.example"), [])
        (due,) = sender.claim_due(1)
        sender.record(due, attempt(429, retry_after_s=3_600))
        wall.now += days * 86_400
        assert sender.claim_due(1) == []
        steady.now += 3_601
        assert len(sender.claim_due(1)) == 1
        engine.dispose()

    def test_call_parked_by_a_clock_that_was_ahead_is_due(
        self, jobs: JobStore, engine: Engine, clock: Clock
    ) -> None:
        ahead = Clock()
        ahead.now = clock.now + LONGEST_DELAY_S + 10
        jobs.finish(submit(jobs, "http://receiver.example"), [])
        earlier = DeliveryStore(engine, clock=ahead)
        (due,) = earlier.claim_due(1)
        earlier.record(due, attempt(500))
        assert len(DeliveryStore(engine, clock=clock).claim_due(1)) == 1

    @pytest.mark.postgres
    def test_postgresql_tells_the_time_to_all(self, postgres_server: PostgresServer) -> None:
        name = postgres_server.create_migrated()
        engine = open_engine(str(postgres_server.url(name)))
        wall, steady = Clock(), Clock()
        there = DatabaseClock(engine, wall, steady)
        assert abs(there() - time.time()) < WAIT_S
        wall.now, steady.now = 0, steady.now + MEASURE_S / 2
        assert abs(there() - time.time() - MEASURE_S / 2) < WAIT_S, "between two looks by its own"
        steady.now += MEASURE_S / 2
        assert abs(there() - time.time()) < WAIT_S
        engine.dispose()
        postgres_server.drop(name)
        steady.now += MEASURE_S
        assert abs(there() - time.time() - MEASURE_S) < WAIT_S, "no answer: it goes on"


@pytest.mark.parametrize("length", [0, 10], ids=["whole", "body cut off"])
def test_receiver_that_resets_the_connection_has_answered(length: int) -> None:
    """The socket no longer knows its peer then, and what is left of the body cannot be read."""
    answer = f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode()
    with abrupt_receiver(answer) as url:
        statuses = [ping(url, LOOPBACK)[1].status for _ in range(20)]
    assert statuses == [200] * 20


def ping(url: str, settings: WebhookSettings) -> tuple[str, Attempt]:
    """Without a table of calls: a ping is kept nowhere."""

    async def send() -> tuple[str, Attempt]:
        return await WebhookCaller(settings, egress_client()).ping(url)

    return asyncio.run(send())


def test_ping_is_signed_and_tells_what_came_back() -> None:
    secret = "whsec_" + "A" * 32
    settings = LOOPBACK.model_copy(update={"secret": (SecretStr(secret),)})
    with receiver(418) as (url, calls):
        message_id, attempt = ping(url, settings)
        headers, body = calls.get(timeout=WAIT_S)
    assert (attempt.status, attempt.outcome, attempt.is_success) == (418, "answered", False)
    assert (headers["webhook-id"], body["type"]) == (message_id, "ping")
    SvixWebhook(secret).verify(json.dumps(body).encode(), headers)


def test_ping_keeps_to_the_address_policy() -> None:
    with receiver() as (url, calls):
        _, attempt = ping(url, WebhookSettings())
        assert (attempt.status, attempt.outcome) == (None, "address not allowed")
        assert calls.empty()


async def test_long_url_with_blanks_is_called_with_them_escaped() -> None:
    padding = "x" * 8_000
    async with running_stub(answering(response("200 OK"))) as stub:
        caller = WebhookCaller(LOOPBACK, egress_client())
        _, attempt = await caller.ping(f"{stub.url}/my hook?a=b c&d={padding}")
        assert attempt.is_success
        (head,) = stub.heads
    assert head.split(" ")[1] == f"/my%20hook?a=b%20c&d={padding}"
