"""Two API machines and two worker machines that share one PostgreSQL and one S3, nothing else."""

import itertools
from collections.abc import Iterator

import httpx2
import pytest

from tests.chaos.fleet import Fleet, running_fleet
from tests.chaos.oracle import Oracle
from tests.chaos.scripts import Script
from tests.chaos.site import INLINE_IMAGE, INLINE_MASK
from tests.support.native_calls import events_of
from tests.support.postgres import PostgresServer
from tests.support.processes import Process
from tests.support.s3 import running_s3
from tests.support.waiting import until

pytestmark = pytest.mark.postgres

NATIVE_JOB = {"prompt": "x", "init_image": INLINE_IMAGE, "mask_image": INLINE_MASK, "seed": 7}


@pytest.fixture(scope="module")
def fleet(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    with (
        running_s3(tmp_path_factory.mktemp("s3")) as s3,
        running_fleet(tmp_path_factory.mktemp("fleet"), postgres_server, s3) as running,
    ):
        yield running


@pytest.fixture
def oracle(fleet: Fleet) -> Iterator[Oracle]:
    """Asked once more after each test."""
    oracle = Oracle(fleet.site, files=fleet.s3.bucket / "fleet")
    yield oracle
    for api in fleet.apis:
        fleet.site.accepted.update(api.accepted)
    oracle.check()


def test_job_of_one_api_is_answered_by_the_other(fleet: Fleet, oracle: Oracle) -> None:
    accepting, asked = fleet.apis
    job = accepting.accept(Script(tag="shared"), webhook=f"{fleet.host.url}/ok/shared")

    asked.ended(job)

    pictures = {get(url) for api in fleet.apis for url in api.outputs(job, "v3")}
    assert len(pictures) == 1
    until(lambda: bool(fleet.host.calls_for(job)), 30, "the webhook is called")
    # A second call would come from the other sender, which looks for due calls every second.
    marker = accepting.accept(Script(tag="marker"), webhook=f"{fleet.host.url}/ok/marker")
    until(lambda: bool(fleet.host.calls_for(marker)), 30, "the next webhook is called")
    assert len(fleet.host.calls_for(job)) == 1


def test_machines_keep_no_file_of_a_job(fleet: Fleet) -> None:
    job = fleet.apis[1].accept(Script(tag="stored"))
    fleet.apis[0].ended(job)

    found = [path for folder in fleet.data_folders() for path in folder.rglob("*.png")]

    assert found == []
    assert not [path for folder in fleet.data_folders() for path in folder.rglob("inpaint.db")]
    assert len([*(fleet.s3.bucket / "fleet" / "generations").glob("*.png")]) > 0


def test_no_session_is_sticky(fleet: Fleet, oracle: Oracle) -> None:
    """Every call goes to the next API: submit, poll, list, picture."""
    jobs = []
    for number in range(5):
        answer = fleet.client.post(f"{fleet.url}/api/jobs", json=NATIVE_JOB | {"seed": number})
        assert answer.status_code == 202
        jobs.append(answer.json()["id"])

    def states() -> set[str]:
        bodies = [fleet.client.get(f"{fleet.url}/api/jobs/{job}").json() for job in jobs]
        return {body["state"] for body in bodies}

    until(lambda: states() == {"finished"}, 60, "all jobs are finished")
    listed = fleet.client.get(f"{fleet.url}/api/jobs").json()["jobs"]
    assert {*jobs} <= {each["id"] for each in listed}
    for job in jobs:
        (output,) = fleet.client.get(f"{fleet.url}/api/jobs/{job}").json()["outputs"]
        assert output["url"].startswith(fleet.url)
        twice = {fleet.client.get(output["url"]).content for _ in fleet.apis}
        assert len(twice) == 1


def test_events_of_a_job_are_followed_at_the_other_api(fleet: Fleet, oracle: Oracle) -> None:
    job = fleet.apis[0].accept(Script(tag="followed", step_s=0.2), num_inference_steps=8)

    with fleet.client.stream("GET", f"{fleet.apis[1].url}/api/jobs/{job}/events") as stream:
        events = [*events_of(stream.iter_lines())]

    names = [name for name, _ in events]
    assert names[-1] == "finished"
    steps = [data["step"] for name, data in events if name == "step"]
    assert len(steps) > 1
    assert steps == sorted(steps)


def test_job_is_cancelled_at_the_other_api(fleet: Fleet, oracle: Oracle) -> None:
    job = fleet.apis[0].accept(Script(tag="cancelled", step_s=0.5), num_inference_steps=100)
    until(lambda: bool(fleet.holder_of(job)), 30, "a worker has it")

    answer = fleet.client.post(f"{fleet.apis[1].url}/api/jobs/{job}/cancel")

    assert answer.status_code == 200
    holders = [fleet.workers[name] for name in fleet.workers]
    until(lambda: any(lost(worker, job) for worker in holders), 30, "its worker lets go of it")


def test_idempotency_key_counts_at_every_api(fleet: Fleet, oracle: Oracle) -> None:
    ids = {api.create("once-in-the-fleet") for api in fleet.apis * 2}
    assert len(ids) == 1


def test_burst_is_shared_between_the_machines(fleet: Fleet, oracle: Oracle) -> None:
    turns = itertools.cycle(fleet.apis)
    jobs = [
        next(turns).accept(Script(tag=f"burst{number}", step_s=0.2), num_inference_steps=8)
        for number in range(8)
    ]
    until(lambda: all(fleet.holder_of(job) for job in jobs[:4]), 30, "jobs are claimed")

    holders = {fleet.holder_of(job) for job in jobs}

    assert {*fleet.workers} <= holders
    fleet.site.ended(*jobs)


def test_job_of_a_killed_worker_is_made_by_the_other(fleet: Fleet, oracle: Oracle) -> None:
    """Nobody sees the death: the lease ends, after 35 to 45 s."""
    calm = fleet.site.accept(Script(tag="calm"))
    fleet.site.ended(calm)
    job = fleet.site.accept(Script(tag="killed", step_s=0.3), num_inference_steps=20)
    until(lambda: bool(fleet.holder_of(job)), 30, "a worker has it")
    killed = fleet.holder_of(job)
    (other,) = {*fleet.workers} - {killed}

    fleet.workers[killed].kill()

    until(lambda: fleet.holder_of(job) == other, 60, "the other worker claims it")
    fleet.apis[1].ended(job)
    assert oracle.row(job)["attempt"] == 2
    assert get(fleet.apis[1].outputs(job, "v3")[0]) == get(fleet.site.outputs(calm, "v3")[0])
    fleet.start_worker(killed).wait_for("worker ready")


def test_worker_that_is_started_again_gives_its_job_back_at_once(
    fleet: Fleet, oracle: Oracle
) -> None:
    """As a service manager does, by the same id."""
    job = fleet.site.accept(Script(tag="restarted", step_s=0.3), num_inference_steps=20)
    until(lambda: bool(fleet.holder_of(job)), 30, "a worker has it")
    killed = fleet.holder_of(job)
    fleet.workers[killed].kill()

    fleet.start_worker(killed).wait_for("worker ready")

    until(lambda: oracle.row(job)["attempt"] == 2, 10, "a worker claims it again")
    fleet.apis[1].ended(job)


def get(url: str) -> bytes:
    answer = httpx2.get(url, trust_env=False)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    return answer.content


def lost(worker: Process, job_id: int) -> bool:
    said = worker.events("job lease lost")
    return any(each["job_id"] == job_id for each in said)
