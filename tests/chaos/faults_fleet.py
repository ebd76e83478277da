"""Faults of several machines: the stores that they share, away or hanging, and deaths in Ray."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.faults_database import postgres, takes_jobs
from tests.chaos.faults_processes import drain
from tests.chaos.faults_storage import HUNG_SUBMIT_S, TOLD_S
from tests.chaos.fleet import Fleet, running_fleet
from tests.chaos.matrix import Found, NotCovered, fault
from tests.chaos.oracle import Oracle
from tests.chaos.scripts import Script
from tests.chaos.site import Site, expect
from tests.support.repository import REPOSITORY
from tests.support.s3 import locate_rclone, running_s3
from tests.support.waiting import until

AWAY_S = 60.0
"""How long a store is away in the matrix; in `test_fleet.py` it is seconds."""

LIVENESS_WITHIN_S = 1.0
BACK_WITHIN_S = 60.0

RAY = REPOSITORY / ".venv" / "cluster"
DEMONSTRATION_S = 900


@dataclass(frozen=True, slots=True)
class Outage:
    """What is broken. reason: a word of `/readyz`. keeps_rows: whether jobs can be read meanwhile.

    begin, end: break it and mend it.
    """

    name: str
    reason: str
    keeps_rows: bool
    begin: Callable[[Fleet], None]
    end: Callable[[Fleet], None]


S3_KILLED = Outage(
    "S3 killed", "file store", True, lambda fleet: fleet.s3.kill(), lambda fleet: fleet.s3.start()
)
S3_HANGING = Outage(
    "S3 hanging", "file store", True, lambda fleet: fleet.s3.hang(), lambda fleet: fleet.s3.go_on()
)
POSTGRES_KILLED = Outage(
    "PostgreSQL killed",
    "database",
    False,
    lambda fleet: fleet.postgres.stop(),
    lambda fleet: fleet.postgres.start(),
)


@contextmanager
def fleet_of_its_own(room: Path) -> Iterator[tuple[Fleet, Oracle]]:
    """A fleet on a PostgreSQL that may be killed. Raises: NotCovered."""
    if locate_rclone() is None:
        raise NotCovered("rclone is not installed")
    with (
        postgres() as server,
        running_s3(room / "s3") as s3,
        running_fleet(room / "fleet", server, s3) as fleet,
    ):
        # A submit on each API may find a store gone when its input is stored already.
        yield fleet, Oracle(fleet.site, files=s3.bucket / "fleet", orphans=100)


def survive(fleet: Fleet, oracle: Oracle, outage: Outage, away_s: float) -> float:
    """Break a store under a running and a finished job; seconds until all was well again.

    Raises: Broken.
    """
    finished = fleet.site.accept(Script(tag=f"{outage.name}-{away_s}-before".replace(" ", "-")))
    fleet.site.ended(finished)
    picture = fleet.apis[1].outputs(finished, "v3")[0]
    script = Script(tag=f"{outage.name}-{away_s}".replace(" ", "-"), step_s=0.2)
    hook = f"{fleet.host.url}/ok/{outage.reason.replace(' ', '-')}-{away_s:g}"
    running = fleet.site.accept(script, num_inference_steps=20, webhook=hook)
    until(lambda: oracle.row(running)["step"] > 0, 60, "a worker has read the input")
    outage.begin(fleet)
    try:
        started = time.monotonic()
        for api in fleet.apis:
            expect_outage(api, outage, finished, picture)
        while time.monotonic() - started < away_s:
            for api in fleet.apis:
                expect_alive(api)
            time.sleep(0.2)
    finally:
        outage.end(fleet)
    started = time.monotonic()
    for api in fleet.apis:
        until(lambda: takes_jobs(api), BACK_WITHIN_S, "takes jobs again")  # noqa: B023
        until(api.is_open, BACK_WITHIN_S, "is ready again")
    back_s = time.monotonic() - started
    fleet.apis[1].ended(running, within_s=120)
    expect(oracle.row(running)["attempt"] == 1, "the running job was made anew")
    until(lambda: len(fleet.host.calls_for(running)) == 1, 60, "the webhook is called once")
    expect(fleet.site.client.get(picture).status_code == 200, "the old picture is not served")
    return back_s


def expect_outage(api: Site, outage: Outage, finished: int, picture: str) -> None:
    """What an API answers while a store is away. Raises: Broken."""
    started = time.monotonic()
    answer = api.submit(Script(tag="refused"))
    told = f"a submit got {answer.status_code} after {time.monotonic() - started:.1f} s"
    expect(answer.status_code == 503 and int(answer.headers["retry-after"]) > 0, told)
    expect(time.monotonic() - started < HUNG_SUBMIT_S, told)
    until(lambda: not api.is_open(), TOLD_S, "readiness tells of it")
    reason = api.client.get(f"{api.url}/readyz").json()["reason"]
    expect(outage.reason in reason, f"readiness says {reason!r}")
    expect_alive(api)
    told = f"GET of a finished job while {outage.name}"
    status = api.client.get(f"{api.url}/api/jobs/{finished}").status_code
    expect(status == (200 if outage.keeps_rows else 503), f"{told}: {status}")
    if outage.keeps_rows:
        path = picture.partition("/generations/")[2]
        seen = api.client.get(f"{api.url}/generations/{path}")
        expect(seen.status_code == 503, f"a picture got {seen.status_code}")
        expect(seen.headers["cache-control"] == "no-store", "a refusal may be cached")


def expect_alive(api: Site) -> None:
    """Liveness must not tell of a store: a restart would not help. Raises: Broken."""
    started = time.monotonic()
    expect(api.readiness("/healthz") == 200, "the process does not answer")
    took_s = time.monotonic() - started
    expect(took_s < LIVENESS_WITHIN_S, f"liveness took {took_s:.1f} s")


@fault("F33", "several machines: PostgreSQL killed, S3 killed, hanging", 60, is_patient=True)
def shared_stores(room: Path) -> Found:
    """Refuse at both APIs, say what fails, lose nothing, go on."""
    with fleet_of_its_own(room) as (fleet, oracle):
        slowest_s = 0.0
        for outage in (POSTGRES_KILLED, S3_KILLED, S3_HANGING):
            slowest_s = max(slowest_s, survive(fleet, oracle, outage, AWAY_S))
            for api in fleet.apis:
                fleet.site.accepted.update(api.accepted)
            oracle.check()
        expect(
            not any(worker.events("worker cannot go on") for worker in fleet.workers.values()),
            "a worker gave up",
        )
        checked = (
            "both APIs told 503 with Retry-After and named the store in /readyz, liveness stayed "
            f"200, running jobs ended at their first attempt; {drain(fleet.site, oracle)}"
        )
        return Found(f"each for {AWAY_S:g} s under two APIs and two workers", checked, slowest_s)


@fault("F21", "death of a worker, replica, node or head of Ray")
def ray_dies(_room: Path) -> Found:
    """The demonstration of a cluster, which runs where Ray is. Raises: Broken, NotCovered."""
    if not (RAY / "installed").exists():
        raise NotCovered("make cluster was not run")
    command = [str(RAY / "bin" / "python"), "-m", "tests.cluster", "--jobs", "12", "--json"]
    finished = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=DEMONSTRATION_S
    )
    expect(finished.returncode == 0, (finished.stdout + finished.stderr)[-2_000:])
    found = json.loads(finished.stdout.splitlines()[-1])
    return Found(
        "; ".join(row["fault"] for row in found["faults"]),
        f"{found['finished']} of {found['jobs']} jobs finished, no picture changed, "
        f"{found['webhooks']} webhooks delivered",
        max(row["recovery_s"] for row in found["faults"]),
    )
