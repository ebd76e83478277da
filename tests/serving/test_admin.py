"""The second port: what it tells, to whom, and what never becomes a label."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from server.api.middleware import PROBES
from server.core.settings import Settings
from server.jobs.job import Failure
from server.jobs.workers import ALIVE_S, WorkerStatus
from server.storage.database import open_engine
from tests.support.apps import settings_in, store_of
from tests.support.http_stub import ANSWER_S, LiveApp, running_app
from tests.support.jobs import seen_now, worker_status
from tests.support.v3_calls import BODY, finish, post, submit
from tests.support.waiting import until

pytestmark = pytest.mark.process


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_in(tmp_path, workers=1)


@pytest.fixture
def app(settings: Settings) -> Iterator[LiveApp]:
    with running_app(settings) as app:
        yield app


@pytest.fixture
def admin(app: LiveApp) -> Iterator[httpx2.Client]:
    """A client of the second port."""
    url = f"http://127.0.0.1:{app.admin_port}"
    with httpx2.Client(base_url=url, timeout=ANSWER_S, trust_env=False) as client:
        yield client


def figures_of(admin: httpx2.Client) -> dict[str, float]:
    """What the second port tells, see `figures_from`."""
    return figures_from(admin.get("/metrics"))


def figures_from(answer: httpx2.Response) -> dict[str, float]:
    """Every sample as `name{value of a label}`."""
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        sample.name + "".join(f"{{{v}}}" for v in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_figures_follow_what_happens(
    app: LiveApp, admin: httpx2.Client, settings: Settings
) -> None:
    finish(settings, submit(app.client))
    submit(app.client, webhook="http://127.0.0.1:1/")
    post(app.client, "inpaint", **(BODY | {"init_image": "http://127.0.0.1:1/"}))
    post(app.client, "inpaint", **(BODY | {"init_image": "AAAA"}))
    app.client.post("/canary-path")
    submit(app.client)
    with store_of(settings) as store:
        store.cancel(2)
        (job,) = store.claim("w", 1)
        store.fail(job, Failure.OUT_OF_MEMORY.sentence)
        store.workers.report(seen_now(worker_status("w", 0)))

    figures = figures_of(admin)

    expected = {
        "inpaint_requests_total{v3}{answered}{/api/v3/inpaint}{200}": 3,
        "inpaint_requests_total{v3}{refused}{/api/v3/inpaint}{200}": 2,
        "inpaint_requests_total{none}{refused}{unknown}{404}": 1,
        "inpaint_request_seconds_count{/api/v3/inpaint}": 5,
        "inpaint_refusals_total{ImageUnavailable}": 2,
        "inpaint_refusals_total{RouteNotFound}": 1,
        "inpaint_image_problems_total{private_address}": 1,
        "inpaint_image_problems_total{not_an_image}": 1,
        "inpaint_decodes_total{decoded}": 3,
        "inpaint_decodes_total{refused}": 1,
        "inpaint_intake_seconds_count{fetch}": 4,
        "inpaint_intake_seconds_count{decode}": 3,
        "inpaint_jobs{finished}": 1,
        "inpaint_jobs{cancelled}": 1,
        "inpaint_jobs{queued}": 0,
        "inpaint_failed_jobs{out_of_memory}": 1,
        "inpaint_failed_jobs{worker_lost}": 0,
        "inpaint_workers{ready}": 1,
        "inpaint_workers{failed}": 0,
        "inpaint_database_up": 1,
    }
    assert {name: figures.get(name) for name in expected} == expected
    assert sum(v for n, v in figures.items() if n.startswith("inpaint_webhooks{")) == 1
    assert figures["inpaint_connections"] >= 1
    assert "canary" not in str(figures)


@pytest.mark.parametrize("limit", ["max_waiting", "max_waiting_per_key"])
def test_full_queue_is_told_from_0(limit: str, tmp_path: Path) -> None:
    with running_app(settings_in(tmp_path, workers=1, queue={limit: 1})) as app:
        url = f"http://127.0.0.1:{app.admin_port}"
        with httpx2.Client(base_url=url, timeout=ANSWER_S, trust_env=False) as admin:
            before = figures_of(admin)["inpaint_refusals_total{QueueFull}"]
            submit(app.client)
            post(app.client, "inpaint", **BODY)
            after = figures_of(admin)["inpaint_refusals_total{QueueFull}"]
    assert (before, after) == (0, 1)


def test_figures_without_a_database(app: LiveApp, admin: httpx2.Client, settings: Settings) -> None:
    app.client.get("/no-such-path")
    engine = open_engine(settings.sqlalchemy_url)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE jobs RENAME TO away"))
    engine.dispose()
    figures = figures_of(admin)
    assert figures["inpaint_database_up"] == 0
    assert figures["inpaint_requests_total{none}{refused}{unknown}{404}"] == 1


def test_probes_are_no_requests_that_fail(app: LiveApp, admin: httpx2.Client) -> None:
    statuses = [app.client.get(path).status_code for path in (*PROBES, "/readyz//workers/")]
    assert statuses == [200, 200, 503, 503]
    figures = figures_of(admin)
    assert figures["inpaint_request_seconds_count{/readyz/workers}"] == 2
    assert not [name for name in figures if name.startswith("inpaint_requests_total")]


def test_readiness_with_details(app: LiveApp, admin: httpx2.Client, settings: Settings) -> None:
    for path, code in (("/readyz", 200), ("/readyz/workers", 503)):
        answer = admin.get(path)
        assert (answer.status_code, answer.json()["reason"]) == (code, "0/1 workers ready")
    with store_of(settings) as store:
        store.workers.report(seen_now(worker_status("w", 0)))
        failed = WorkerStatus("x", "cpu", "builtin", "failed", "/srv/model: no such file", 0)
        store.workers.report(seen_now(failed))
    submit(app.client)
    details: dict[str, Any] = {}

    def is_job_counted() -> bool:
        details.update(admin.get("/readyz").json())
        return bool(details["queue"]["waiting"])

    # A forecast that took long to make counts for a moment.
    until(is_job_counted, ANSWER_S, "one job waits")
    assert details["status"] == "ok"
    assert {each["id"]: each["detail"] for each in details["workers"]} == {
        "w": "ready",
        "x": "/srv/model: no such file",
    }
    assert (details["queue"]["waiting"], details["queue"]["running"]) == (1, 0)
    assert details["connections"]["open"] >= 1
    assert admin.get("/healthz").json() == {"status": "ok"}


def test_failed_worker_stays_known_while_it_is_silent(
    admin: httpx2.Client, settings: Settings
) -> None:
    """It has reported once and ended: its next run comes after minutes."""
    silent_s = ALIVE_S + 1
    with store_of(settings) as store:
        for worker in (worker_status("gone", 0), worker_status("unusable", 0, "failed")):
            silent = replace(seen_now(worker), seen_at=time.time() - silent_s)
            store.workers.report(silent, "inpaint_pictures_total 1.0\n")
        assert store.workers.alive() == []

    figures = figures_of(admin)
    readiness = admin.get("/readyz/workers")

    assert (figures["inpaint_workers{ready}"], figures["inpaint_workers{failed}"]) == (0, 1)
    assert not [name for name in figures if name.startswith("inpaint_pictures_total")]
    assert (readiness.status_code, readiness.json()["reason"]) == (
        503,
        "0/1 workers ready; 1 failed",
    )
    assert [each["detail"] for each in readiness.json()["workers"]] == ["failed"]


def test_ports_do_not_mix(app: LiveApp, admin: httpx2.Client) -> None:
    host = {"host": f"127.0.0.1:{app.admin_port}"}
    assert app.client.get("/metrics", headers=host).status_code == 404
    for method, path in (("POST", "/api/v3/inpaint"), ("GET", "/openapi.json"), ("GET", "/docs")):
        assert admin.request(method, path).status_code == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:PORT", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:PORT", 200),
        ("10.1.2.3", 200),
        ("[::1]:PORT", 200),
        ("metrics.internal:PORT", 200),
        ("attacker.example:PORT", 421),
        ("localhost.attacker.example", 421),
        ("127.0.0.1.attacker.example", 421),
        ("metrics.internal.attacker.example", 421),
        ("", 421),
    ],
)
def test_names_that_nobody_gave_to_the_port_are_refused(
    host: str, status: int, tmp_path: Path
) -> None:
    """A page can lead its own name to loopback and read what is there, but not under our name."""
    settings = settings_in(tmp_path, admin={"allowed_hosts": "metrics.internal"})
    with running_app(settings) as app:
        headers = {"host": host.replace("PORT", str(app.admin_port))}
        for path in ("/metrics", "/healthz", "/unknown"):
            url = f"http://127.0.0.1:{app.admin_port}{path}"
            answer = httpx2.get(url, headers=headers, timeout=ANSWER_S, trust_env=False)
            expected = 404 if (path, status) == ("/unknown", 200) else status
            assert answer.status_code == expected
