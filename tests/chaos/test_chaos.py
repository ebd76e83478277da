"""A few faults of `make chaos`, one server for all: what a release must never forget."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.storage.database import open_engine
from tests.chaos.faults_database import file_moved, file_replaced, idle_workers
from tests.chaos.faults_network import delivery, refused_in_parallel, tries, waiters_leave
from tests.chaos.faults_processes import (
    HOUR_S,
    lateness_s,
    picture_of,
    sane_times,
    stopped_workers,
    take_away,
)
from tests.chaos.faults_storage import without_room
from tests.chaos.light_libraries import STOOD_IN
from tests.chaos.oracle import Oracle
from tests.chaos.scripts import LEDGER, FaultKind, Script, Stage
from tests.chaos.site import (
    SHIFTED_COMMAND_LINE,
    Broken,
    Site,
    outside_world,
    running_site,
    signal_process,
)
from tests.support.databases import rename_table
from tests.support.waiting import until


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server with two workers around the fake backend; every receiver here answers at once."""
    room = tmp_path_factory.mktemp("site")
    patient = {"INPAINT_WEBHOOK__TIMEOUT_S": "30"}
    with running_site(room, patient, workers=2, launch=SHIFTED_COMMAND_LINE) as running:
        yield running


@pytest.fixture(scope="module")
def oracle_of_site(site: Site) -> Oracle:
    """One for all tests: it remembers every picture."""
    return Oracle(site)


@pytest.fixture
def oracle(oracle_of_site: Oracle) -> Iterator[Oracle]:
    """Asked once more after each test."""
    yield oracle_of_site
    oracle_of_site.check()


def test_worker_killed_in_the_middle_changes_nothing(site: Site, oracle: Oracle) -> None:
    calm = site.accept(Script(tag="calm"))
    killed = site.accept(Script(tag="killed", fault=FaultKind.EXIT, at=Stage.HALF))

    site.ended(calm, killed)

    assert picture_of(site, killed) == picture_of(site, calm)
    assert oracle.row(killed)["attempt"] == 2


def test_late_result_does_not_replace_the_first(site: Site, oracle: Oracle) -> None:
    lateness_s(site, oracle, Stage.DECODED, take_away)


def test_accepted_job_survives_the_death_of_the_api(site: Site, oracle: Oracle) -> None:
    job = site.accept(Script(tag="survives", step_s=0.2), webhook=f"{site.host.url}/ok/survives")
    site.kill()
    oracle.check()

    site.start(workers=2)

    site.ended(job)
    assert oracle.row(job)["attempt"] == 1, "the job is not to blame for the death of a server"
    until(lambda: bool(site.host.calls_for(job)), 30, "the webhook is called")


def begun(site: Site, tag: str) -> tuple[int, int]:
    """A job whose worker stands still half-way, and the worker's process."""
    job = site.accept(Script(tag=tag, fault=FaultKind.STOP, at=Stage.HALF))
    until(lambda: bool(stopped_workers(site)), 60, "the worker stands still")
    (pid,) = stopped_workers(site)
    return job, pid


def test_picture_waits_for_the_file_store(site: Site, oracle: Oracle) -> None:
    pictures = site.files / "generations"
    aside = pictures.with_name("aside")
    job, pid = begun(site, "kept")
    pictures.mkdir(exist_ok=True)  # where no other test has made a picture
    pictures.rename(aside)
    pictures.touch()  # no folder can be made there
    signal_process(pid, signal.SIGCONT)
    until(lambda: waits(site, job), 60, "the store has refused the picture")
    other = site.accept(Script(tag="other"))
    until(lambda: waits(site, other), 60, "the worker goes on with other jobs")
    assert site.status(job) == "processing"

    pictures.unlink()
    aside.rename(pictures)

    site.ended(job, other)
    assert oracle.row(job)["attempt"] == 1


def test_commit_waits_for_the_database(site: Site, oracle: Oracle) -> None:
    job, pid = begun(site, "uncommitted")
    rename_jobs(site, "jobs", "away")
    signal_process(pid, signal.SIGCONT)
    until(lambda: waits(site, job), 60, "the commit was refused")

    rename_jobs(site, "away", "jobs")

    site.ended(job)
    assert oracle.row(job)["attempt"] == 1


def test_jump_of_the_clock_bends_no_time_and_forgets_no_key(tmp_path: Path) -> None:
    one_by_one = {"INPAINT_MAX_IN_FLIGHT": "1"}
    with running_site(tmp_path, one_by_one, launch=SHIFTED_COMMAND_LINE) as site:
        oracle = Oracle(site)
        remembered = site.create("kept")
        for hours in (30, -24):
            jobs = [
                site.accept(Script(tag=f"{hours}-{n}", step_s=0.1), num_inference_steps=10)
                for n in range(3)
            ]
            site.claimed(jobs[0])
            site.shift_clock(hours * HOUR_S)
            sane_times(site)
            site.create(f"old-ones-are-removed-{hours}")
            assert site.create("kept") == remembered
        oracle.check()


def test_stopping_server_refuses_jobs_and_answers_for_earlier_ones(tmp_path: Path) -> None:
    with running_site(tmp_path, {"INPAINT_MAX_IN_FLIGHT": "1"}) as site:
        running = site.accept(Script(tag="running", step_s=1.0), num_inference_steps=100)
        site.claimed(running)
        waiting = site.accept(Script(tag="waiting"))
        signal_process(site.pid, signal.SIGTERM)
        until(lambda: site.readiness() == 503, 10, "readiness says that it stops")
        assert "draining" in site.client.get(f"{site.url}/readyz").json()["reason"]

        refused = site.submit(Script(tag="refused"))

        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert site.status(waiting) == "processing"
        # Else the worker would work on it for the rest of its time.
        cancelled = site.client.post(f"{site.url}/api/jobs/{running}/cancel")
        assert cancelled.status_code == 200
        assert site.stop() == 0
        oracle = Oracle(site)
        assert oracle.row(waiting)["state"] == "queued"
        assert oracle.row(waiting)["attempt"] == 0


def waits(site: Site, job_id: int) -> bool:
    """Whether a worker has said that it keeps the job's end."""
    said = site.log_events("a store is unavailable, the job's end is retried")
    return any(each["job_id"] == job_id for each in said)


def rename_jobs(site: Site, old: str, new: str) -> None:
    """Without their table nobody can do anything with jobs."""
    engine = open_engine(site.database_url)
    rename_table(engine, old, new)
    engine.dispose()


def test_poison_job_is_set_aside_and_its_neighbours_are_made(site: Site, oracle: Oracle) -> None:
    before = site.accept(Script(tag="before", step_s=0.05))
    poison = site.accept(Script(tag="poison", fault=FaultKind.EXIT, at=Stage.HALF, times=0))
    after = site.accept(Script(tag="after", step_s=0.05))

    site.ended(before, after)
    site.ended(poison, status="failed")

    assert "lost too often" in site.fetch(poison)["message"]
    assert oracle.row(poison)["attempt"] == 3


def test_webhook_is_tried_again_after_an_error(site: Site, oracle: Oracle) -> None:
    job = site.accept(Script(tag="hook"), webhook=f"{site.host.url}/once500/hook")
    until(lambda: tries(site, job) >= 1, 30, "the first try")

    site.shift_clock(10)

    until(lambda: delivery(site, job)["state"] == "delivered", 30, "the second try")
    site.shift_clock(0)
    first, second = site.host.calls_for(job)
    assert first.webhook_id == second.webhook_id


def test_disk_without_room_is_refused_and_heals(site: Site, oracle: Oracle) -> None:
    without_room(site)


def test_job_of_a_hung_worker_is_made_by_another(site: Site, oracle: Oracle) -> None:
    job = site.accept(Script(tag="hung", fault=FaultKind.STOP, at=Stage.HALF))
    until(lambda: bool(stopped_workers(site)), 60, "the worker stands still")

    take_away(site, job)

    site.ended(job)
    for pid in stopped_workers(site):
        signal_process(pid, signal.SIGCONT)


def test_clients_that_leave_while_they_wait_take_nothing_along(tmp_path: Path) -> None:
    waiters_leave(tmp_path, waiters=40, made=10)


def test_no_more_are_taken_than_there_is_room_for(tmp_path: Path) -> None:
    with outside_world() as (thread, host):
        refused_in_parallel(tmp_path, thread, host, submits=200)


@pytest.mark.postgres
def test_idle_workers_leave_postgresql_alone_and_wake_at_once(tmp_path: Path) -> None:
    idle_workers(tmp_path)


def test_database_file_that_is_moved_away_is_noticed(tmp_path: Path) -> None:
    file_moved(tmp_path)


def test_key_revoked_in_a_file_that_came_instead_is_refused(tmp_path: Path) -> None:
    file_replaced(tmp_path)


def test_oracle_notices_what_is_wrong(site: Site) -> None:
    """Each of its questions has an answer that it does not accept."""
    oracle = Oracle(site)
    job = site.accept(webhook=f"{site.host.url}/ok/oracle")
    site.ended(job)
    oracle.check()
    pictures = site.files / "generations"
    picture = pictures / f"{oracle.row(job)['file_prefix']}-0.png"
    content, stray = picture.read_bytes(), pictures / "stray.png"

    site.accepted[10**9] = None
    with pytest.raises(Broken, match="job 1000000000 is lost"):
        oracle.check()
    del site.accepted[10**9]
    picture.write_bytes(b"other bytes")
    with pytest.raises(Broken, match="has changed since it was finished"):
        oracle.check()
    with pytest.raises(Broken, match="not the one of the first finish"):
        Oracle(site).check()
    with pytest.raises(Broken, match="not served as it was first finished"):
        Oracle(site).check()
    picture.rename(stray)
    os.utime(stray, (0, 0))
    with pytest.raises(Broken, match="without a picture; files without a row"):
        oracle.check()
    stray.unlink()
    picture.write_bytes(content)
    ledger = site.marks / LEDGER
    written = ledger.read_text()
    ledger.write_text(written + written)
    with pytest.raises(Broken, match=f"job {job} was finished 2 times"):
        oracle.check()
    ledger.write_text(written)
    oracle.check()


def test_stand_ins_are_for_the_worker_alone() -> None:
    """The tests beside this one need the true libraries."""
    import torch

    assert "torch" in STOOD_IN
    assert torch.tensor([1.5]).sum().item() == 1.5
