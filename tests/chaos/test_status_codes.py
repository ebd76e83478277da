"""Every path's status while something is away: orchestrators, caches and clients go by it.

A server process of its own for each condition, asked for all paths at once. The vendor's paths say
200 under any error, so that of theirs the `status` in the body is looked at.
"""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from tests.chaos.bucket import Bucket, running_bucket
from tests.chaos.faults_database import NATIVE_JOB
from tests.chaos.faults_storage import fill, small_disk
from tests.chaos.hosts import Host
from tests.chaos.matrix import NotCovered
from tests.chaos.scripts import Script
from tests.chaos.site import Site, outside_world, signal_process
from tests.support.postgres import find_binaries, running_postgres
from tests.support.programs import lacking
from tests.support.proxies import LoopThread
from tests.support.waiting import until


@dataclass(frozen=True, slots=True)
class Made:
    """A server that has made a job. picture: its address without the suffix."""

    site: Site
    job: int
    picture: str


LEGACY = {"INPAINT_ERROR_STATUS": "legacy"}
ALL_WELL: dict[str, int | str] = {
    "GET /healthz": 200,
    "GET /readyz": 200,
    "GET /readyz/workers": 200,
    "GET PICTURE.png": 200,
    "GET PICTURE.base64": 200,
    "GET /generations/none.png": 404,
    "GET /openapi.json": 200,
    "GET /nowhere": 404,
    "POST /api/v3/inpaint": "processing",
    "POST /api/v3/fetch/JOB": "success",
    "POST /api/v3/system_load": "ok",
    "POST /api/jobs": 202,
    "GET /api/jobs": 200,
    "GET /api/jobs/JOB": 200,
    "GET /api/jobs/JOB/deliveries": 200,
    "POST /api/webhooks/ping": 200,
    "GET /api/status": 200,
}
NO_NEW_JOBS: dict[str, int | str] = {
    "GET /readyz": 503,
    "GET /readyz/workers": 503,
    "POST /api/v3/inpaint": "error",
    "POST /api/jobs": 503,
}
NO_PICTURES: dict[str, int | str] = {"GET PICTURE.png": 503, "GET PICTURE.base64": 503}
NO_ROWS: dict[str, int | str] = {
    "POST /api/v3/fetch/JOB": "error",
    "POST /api/v3/system_load": "error",
    "GET /api/jobs": 503,
    "GET /api/jobs/JOB": 503,
    "GET /api/jobs/JOB/deliveries": 503,
    "GET /api/status": 503,
}


@contextmanager
def started(site: Site) -> Iterator[Made]:
    """A server that has made a job."""
    try:
        site.start()
        job = site.accept(Script(tag="made"))
        site.ended(job)
        yield Made(site, job, site.outputs(job, "v3")[0].removesuffix(".png"))
    finally:
        site.close()


@contextmanager
def all_well(room: Path, host: Host, _thread: LoopThread) -> Iterator[Made]:
    site = Site(room, host, LEGACY)
    with started(site) as made:
        yield made


@contextmanager
def no_worker(room: Path, host: Host, _thread: LoopThread) -> Iterator[Made]:
    site = Site(room, host, LEGACY)
    with started(site) as made:
        site.stop()
        site.start(workers=0, is_ready=False)
        yield made


@contextmanager
def draining(room: Path, host: Host, _thread: LoopThread) -> Iterator[Made]:
    site = Site(room, host, LEGACY)
    with started(site) as made:
        long = site.accept(Script(tag="long", step_s=1.0), num_inference_steps=100)
        site.claimed(long)
        signal_process(site.pid, signal.SIGTERM)
        until(lambda: not site.is_open(), 10, "readiness says that it stops")
        yield made


@contextmanager
def disk_full(room: Path, host: Host, _thread: LoopThread) -> Iterator[Made]:
    with ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(room / "disk"))
        except NotCovered:
            lacking("the right to mount a tmpfs")
        site = Site(room, host, LEGACY, data_dir=disk / "data")
        made = stack.enter_context(started(site))
        fill(disk)
        site.submit()
        yield made


@contextmanager
def store_away(room: Path, host: Host, thread: LoopThread) -> Iterator[Made]:
    with on_bucket(room, host, thread) as (made, bucket):
        bucket.is_away = True
        made.site.submit()
        yield made
        bucket.is_away = False


@contextmanager
def store_hanging(room: Path, host: Host, thread: LoopThread) -> Iterator[Made]:
    with on_bucket(room, host, thread) as (made, bucket):
        bucket.is_hung = True
        made.site.submit()
        yield made
        bucket.is_hung = False


@contextmanager
def on_bucket(room: Path, host: Host, thread: LoopThread) -> Iterator[tuple[Made, Bucket]]:
    with running_bucket(thread) as bucket:
        site = Site(room, host, LEGACY | bucket.environment)
        with started(site) as made:
            yield made, bucket


def told_of_load(made: Made) -> int | str:
    call = "POST /api/v3/system_load"
    return told_by(call, ask(made, call))


@contextmanager
def database_away(room: Path, host: Host, _thread: LoopThread) -> Iterator[Made]:
    binaries = find_binaries()
    if binaries is None:
        lacking("PostgreSQL")
    with running_postgres(binaries) as server:
        url = str(server.url(server.create_database()))
        site = Site(room, host, LEGACY | {"INPAINT_DATABASE_URL": url})
        with started(site) as made:
            server.stop()
            try:
                # The last forecast counts for a moment, ten times as long as it took to make.
                until(lambda: told_of_load(made) == "error", 10, "the last forecast is too old")
                yield made
            finally:
                server.start()


Condition = Callable[[Path, Host, LoopThread], AbstractContextManager[Made]]

CONDITIONS: dict[str, tuple[Condition, dict[str, int | str]]] = {
    "all well": (all_well, {}),
    "no worker": (no_worker, {"GET /readyz/workers": 503}),
    "draining": (draining, NO_NEW_JOBS),
    "disk full": (disk_full, NO_NEW_JOBS),
    "store away": (store_away, NO_NEW_JOBS | NO_PICTURES),
    "store hanging": (store_hanging, NO_NEW_JOBS | NO_PICTURES),
    "database away": (database_away, NO_NEW_JOBS | NO_ROWS),
}


@pytest.mark.process
@pytest.mark.parametrize(
    "condition",
    [
        pytest.param(name, marks=[pytest.mark.postgres] if "database" in name else [])
        for name in CONDITIONS
    ],
)
def test_status_of_every_path(condition: str, tmp_path: Path) -> None:
    begin, changes = CONDITIONS[condition]
    with outside_world() as (thread, host), begin(tmp_path, host, thread) as made:
        with ThreadPoolExecutor(len(ALL_WELL)) as clients:
            calls = {call: clients.submit(ask, made, call) for call in ALL_WELL}
            answers = {call: each.result() for call, each in calls.items()}
    expected = ALL_WELL | changes
    assert {call: told_by(call, answer) for call, answer in answers.items()} == expected
    for call, answer in answers.items():
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) > 0, call
        if answer.status_code >= 400:
            assert answer.headers["cache-control"] == "no-store", call


def ask(made: Made, call: str) -> httpx2.Response:
    """The answer to a line of the table."""
    site = made.site
    method, path = call.replace("JOB", str(made.job)).split(" ")
    url = path.replace("PICTURE", made.picture) if "PICTURE" in path else site.url + path
    bodies = {
        "/api/v3/inpaint": site.body(),
        "/api/jobs": NATIVE_JOB,
        "/api/webhooks/ping": {"url": f"{site.host.url}/ok/ping"},
    }
    body = bodies.get(path, {}) if method == "POST" else None
    return site.client.request(method, url, json=body, timeout=60)


def told_by(call: str, answer: httpx2.Response) -> int | str:
    """What a client goes by."""
    if "/api/v3/" not in call:
        return answer.status_code
    assert answer.status_code == 200
    return str(answer.json()["status"])
