"""What holds in every wire language: keys, limits, hostile images, and whose job it is.

No model runs here: a call that is accepted is looked for among the rows.
"""

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from standardwebhooks import Webhook

from server.api.auth.keys import digest_of
from server.api.dialects.registry import BY_NAME
from server.core.settings import Settings
from server.jobs.job import Failure, Job
from server.jobs.store import JobStore
from tests.corpora.hostile_pictures import CORPUS
from tests.support.apps import KEYS, client_of, settings_in, store_of
from tests.support.dialect_calls import DialectCalls, Wish
from tests.support.every_dialect import EVERY_CALLS
from tests.support.http_stub import LiveApp, png_bytes, running_app
from tests.support.jobs import claim_job, new_job
from tests.support.webhooks import WAIT_S, receiver

pytestmark = pytest.mark.process
every_dialect = pytest.mark.parametrize("calls", EVERY_CALLS, ids=lambda calls: calls.name)

FIRST, SECOND = KEYS
SECRET = "whsec_" + base64.b64encode(bytes(32)).decode()


def half_white() -> bytes:
    levels = np.zeros((64, 64), np.uint8)
    levels[:, 32:] = 255
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    return buffer.getvalue()


WISH = Wish("a cat", png_bytes(), half_white(), seed=5)


def key_ids(store: JobStore) -> list[str]:
    """Whose jobs there are."""
    return [job.key_id for each in range(1, 100) if (job := store.get(each)) is not None]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    # Calls that wait for their pictures give up at once.
    return settings_in(
        tmp_path_factory.mktemp("data"),
        auth={"keys": KEYS},
        wait_s=0.2,
        max_body_bytes=2_000_000,
        steps_policy="exact",
    )


@pytest.fixture(scope="module")
def app(settings: Settings) -> Iterator[LiveApp]:
    with running_app(settings) as app:
        yield app


@pytest.fixture
def client(app: LiveApp) -> Iterator[httpx2.Client]:
    with client_of(app, FIRST) as client:
        yield client


@pytest.fixture
def store(settings: Settings, client: httpx2.Client) -> Iterator[JobStore]:
    client.get("/healthz")  # once the server answers, its tables are there
    with store_of(settings) as store:
        yield store


@every_dialect
def test_job_belongs_to_the_key(calls: DialectCalls, app: LiveApp, store: JobStore) -> None:
    before = key_ids(store)
    for key in KEYS:
        with client_of(app, key) as client:
            calls.send(client, WISH)
    first, second = key_ids(store)[len(before) :]
    assert first != second


@every_dialect
@pytest.mark.parametrize("key", ["", "key-of-nobody-at-all"])
def test_unknown_key_is_refused(
    calls: DialectCalls, key: str, client: httpx2.Client, store: JobStore
) -> None:
    before = key_ids(store)
    del client.headers["Authorization"]
    answer = calls.send(client, replace(WISH, key=key) if key else WISH)
    assert calls.is_refused(answer)
    assert "key" in calls.error_text(answer).lower()
    assert key_ids(store) == before


def refused_pictures() -> list[Any]:
    """A hostile picture of each kind of problem, the first two that are made quickly."""
    chosen: dict[Any, list[str]] = {}
    for name, picture in CORPUS.items():
        names = chosen.setdefault(picture.problem, [])
        if picture.problem is not None and len(names) < 2:
            names.append(name)
    return [name for names in chosen.values() for name in names]


@every_dialect
@pytest.mark.parametrize("name", refused_pictures())
def test_hostile_picture_is_refused_by_its_field(
    calls: DialectCalls, name: str, client: httpx2.Client, store: JobStore
) -> None:
    before = key_ids(store)
    answer = calls.send(client, replace(WISH, init_image=CORPUS[name].make()))
    assert calls.is_refused(answer)
    assert "image" in calls.error_text(answer)
    assert key_ids(store) == before


@every_dialect
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": "a " * 4_000}, "prompt"),
        ({"strength": 1.5}, "strength"),
        ({"guidance_scale": 99.0}, ""),
        ({"steps": 1_000}, "steps"),
        ({"samples": 5}, ""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_value_out_of_range_is_refused(
    calls: DialectCalls,
    changes: dict[str, Any],
    field: str,
    client: httpx2.Client,
    store: JobStore,
) -> None:
    if calls.max_samples == 1 and "samples" in changes:
        pytest.skip("a call of this dialect has no number of pictures")
    before = key_ids(store)
    answer = calls.send(client, replace(WISH, **changes))
    assert calls.is_refused(answer)
    assert field in calls.error_text(answer)
    assert key_ids(store) == before


@every_dialect
def test_body_over_the_limit_is_refused(calls: DialectCalls, client: httpx2.Client) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1_000, 1_000, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    assert calls.is_refused(calls.send(client, replace(WISH, init_image=buffer.getvalue())))


@every_dialect
def test_full_queue_says_when_to_come_again(calls: DialectCalls, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, queue={"max_waiting": 0})
    with running_app(settings) as app:
        answer = calls.send(app.client, WISH)
    assert calls.is_refused(answer)
    assert answer.headers["Retry-After"] == "30"


@every_dialect
def test_dialect_that_is_switched_off_has_no_routes(calls: DialectCalls, tmp_path: Path) -> None:
    (other,) = {"native", "v3"} - {calls.name} if calls.name in ("native", "v3") else {"native"}
    with running_app(settings_in(tmp_path, dialects=[other])) as app:
        assert calls.send(app.client, WISH).status_code in (404, 405)


@every_dialect
def test_full_share_of_a_key_leaves_room_for_other_keys(
    calls: DialectCalls, tmp_path: Path
) -> None:
    settings = settings_in(
        tmp_path, auth={"keys": KEYS}, wait_s=0.2, queue={"max_waiting_per_key": 2}
    )
    first, second = (digest_of(key)[:12] for key in KEYS)
    with (
        running_app(settings) as app,
        client_of(app, FIRST) as busy,
        client_of(app, SECOND) as idle,
    ):
        busy.get("/healthz")
        with store_of(settings) as store:
            for _ in range(2):
                store.submit(new_job(key_id=first))
            refused = calls.send(busy, WISH)
            calls.send(idle, WISH)
            assert key_ids(store) == [first, first, second]
    assert calls.is_refused(refused)
    assert refused.headers["Retry-After"] == "30"


@pytest.mark.parametrize("dialect", BY_NAME)
def test_webhook_tells_how_the_job_ended(dialect: str, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, webhook={"allow_cidrs": "127.0.0.0/8", "secret": [SECRET]})
    with running_app(settings) as app, receiver() as (url, received):
        app.client.get("/healthz")
        with store_of(settings) as store:
            for end in (finish_job, fail_job, cancel_job):
                job = store.submit(new_job(dialect=dialect, webhook=url, track_id="mine"))
                end(store, job)
                headers, body = received.get(timeout=WAIT_S)
                Webhook(SECRET).verify(json.dumps(body), headers)
                assert str(job.id) in json.dumps(body)


def finish_job(store: JobStore, job: Job) -> None:
    assert store.finish(claim_job(store, job.id), [False] * job.params.samples)


def fail_job(store: JobStore, job: Job) -> None:
    assert store.fail(claim_job(store, job.id), Failure.OUT_OF_MEMORY.sentence)


def cancel_job(store: JobStore, job: Job) -> None:
    assert store.cancel(job.id)
