"""Faults of several machines: the stores that they share, away or hanging, and deaths in Ray."""

import asyncio
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.jobs.leases import LEASE_S
from tests.chaos.faults_database import postgres, takes_jobs
from tests.chaos.faults_processes import drain
from tests.chaos.faults_storage import HUNG_SUBMIT_S, TOLD_S
from tests.chaos.fleet import Fleet, running_fleet
from tests.chaos.matrix import Found, NotCovered, fault
from tests.chaos.oracle import Oracle
from tests.chaos.relay import NEAR, running_machine
from tests.chaos.scripts import FOLDER_VARIABLE, Script
from tests.chaos.shifted_clock import FILE_VARIABLE
from tests.chaos.site import Site, expect, outside_world
from tests.support.processes import Process
from tests.support.proxies import TcpProxy, close_server
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


class TwoMachines:
    """An API and, in a network of its own behind `line`, a machine for workers.

    They share PostgreSQL and S3, which the far one reaches by `NEAR` alone. Everything ends with
    the stack. Raises: NotCovered.
    """

    def __init__(self, room: Path, stack: ExitStack) -> None:
        if locate_rclone() is None:
            raise NotCovered("rclone is not installed")
        self.room, self._stack = room, stack
        self._thread, self.host = stack.enter_context(outside_world())
        server = stack.enter_context(postgres())
        s3 = stack.enter_context(running_s3(room / "s3"))
        url = server.url(server.create_database())
        self._near = {**s3.environment, "INPAINT_DATABASE_URL": str(url)}
        self.api = Site(room / "api", self.host, self._near)
        stack.callback(self.api.close)
        self.api.start(0, is_ready=False)
        self.oracle = Oracle(self.api, files=s3.bucket / "fleet", orphans=1)
        self.line = stack.enter_context(running_machine())
        port = self._pass_on(lambda: asyncio.open_unix_connection(server.socket))
        s3_port = self._pass_on(lambda: asyncio.open_connection("127.0.0.1", s3.port))
        self._far = {
            **s3.environment,
            "INPAINT_DATABASE_URL": str(url.set(host=NEAR, port=port, query={})),
            "AWS_ENDPOINT": f"http://{NEAR}:{s3_port}",
        }

    def start_worker(self, name: str, *, is_far: bool) -> Process:
        """`inpaint-server worker` on either machine."""
        marks = {FOLDER_VARIABLE: str(self.api.marks), FILE_VARIABLE: str(self.api.marks / "clock")}
        worker = Process(
            (self._far if is_far else self._near) | marks,
            *("--data-dir", str(self.room / name), "--worker-id", name),
            program="tests.chaos.backend",
            under=self.line.inside if is_far else (),
        )
        self._stack.callback(worker.stop)
        return worker

    def _pass_on(self, connect: Callable[[], Any]) -> int:
        """A port of `NEAR` behind which a store of this machine answers."""
        proxy = TcpProxy(connect)
        listening = self._thread.call(proxy.start(NEAR))
        self._stack.callback(lambda: self._thread.call(close_server(listening)))
        return proxy.port


@fault("F34", "a worker's machine is cut off", within_s=60, is_patient=True)
def machine_cut_off(room: Path) -> Found:
    """A worker loses PostgreSQL and S3 in silence, in the middle of a job, and finds them again."""
    with ExitStack() as stack:
        machines = TwoMachines(room, stack)
        api, oracle, host = machines.api, machines.oracle, machines.host
        cut_off = machines.start_worker("far", is_far=True)
        until(lambda: api.readiness() == 200, 60, "the far worker is ready")
        script = Script(tag="cut-off", step_s=0.3, unrepeatable=True)
        job = api.accept(script, num_inference_steps=50, webhook=f"{host.url}/ok/cut-off")
        until(lambda: oracle.row(job)["step"] > 0, 60, "the far worker makes it")
        machines.line.cut()
        other = machines.start_worker("near", is_far=False)
        api.ended(job, within_s=LEASE_S + 60)
        expect(made_by(other, job), "the near worker did not make it")
        oracle.check()
        other.stop()
        machines.line.heal()
        after = api.accept(Script(tag="after"))
        recovery_s = api.ended(after, within_s=120)
        expect(made_by(cut_off, after), "the far worker takes no jobs")
        expect(oracle.row(job)["attempt"] == 2, "not two attempts")
        until(lambda: len(host.calls_for(job)) > 0, 60, "the webhook is called")
        checked = drain(api, oracle)
        expect(len(host.calls_for(job)) == 1, "the webhook was called twice")
    injected = "packets of a worker in a network namespace lost until its lease ran out"
    checked = f"another worker made the job, the late result changed nothing; {checked}"
    return Found(injected, checked, recovery_s)


def made_by(worker: Process, job_id: int) -> bool:
    """Whether a worker has said so."""
    return any(each["job_id"] == job_id for each in worker.events("job finished"))


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
