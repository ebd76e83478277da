"""Faults of processes: killed, stopped, hung, told to end."""

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.jobs.leases import LEASE_S
from server.jobs.outbox import RETRY_DELAYS_S
from server.jobs.store import JobStore
from server.serving.watchdog import EXIT_CODE
from server.serving.watchdog import STALL_S as LOOP_STALL_S
from server.storage.database import open_engine
from tests.chaos.clients import asking
from tests.chaos.matrix import Found, fault
from tests.chaos.oracle import Oracle
from tests.chaos.scripts import HUNG_LOAD, FaultKind, Script, Stage
from tests.chaos.site import (
    SHIFTED_COMMAND_LINE,
    STOPPABLE_COMMAND_LINE,
    Site,
    expect,
    running_site,
    signal_process,
)
from tests.support.waiting import until

KILLS = 3
STALL_S = 10
RUNNING_JOBS = 4
THREE_DAYS_S = 3 * 86_400
HOUR_S = 3_600.0
STAGES = [stage for stage in Stage if stage is not Stage.NONE]
DRAINED_S = 60.0
"""For what is left in the queue after a fault."""


def drain(site: Site, oracle: Oracle, within_s: float = DRAINED_S) -> str:
    """Every accepted job ends; what the oracle says then."""
    until(lambda: not oracle.states().keys() & {"queued", "running"}, within_s, "all jobs end")
    return oracle.last_check()


def take_away(site: Site, job_id: int) -> None:
    """As the server does with the jobs of a worker that it takes for dead."""
    engine = open_engine(site.database_url)
    expect(JobStore(engine).requeue_of(Oracle(site).row(job_id)["worker_id"]), "nothing taken away")
    engine.dispose()


@fault("F1", "kill -9 of the API", within_s=5)
def kill_api(room: Path) -> Found:
    """Clients keep asking while the process is killed and started again."""
    with running_site(room) as site:
        oracle = Oracle(site, orphans=KILLS)
        slowest_s = 0.0
        for _ in range(KILLS):
            with asking(site, webhook=f"{site.host.url}/ok/hook"):
                before = len(site.accepted)
                until(lambda: len(site.accepted) > before + 2, 20, "jobs are accepted")  # noqa: B023
                site.kill()
                slowest_s = max(slowest_s, site.start())
                oracle.check()
        injected = f"{KILLS} × SIGKILL of the API under load"
        return Found(injected, f"every id answered is kept: {drain(site, oracle)}", slowest_s)


@fault("F2", "kill -9 of a worker at every stage", within_s=5)
def kill_worker(room: Path) -> Found:
    """The worker kills itself where the prompt says; another makes the same picture."""
    with running_site(room, workers=4) as site:
        oracle = Oracle(site)
        calm = site.accept()
        site.ended(calm)
        wanted = picture_of(site, calm)
        slowest_s = 0.0
        for stage in STAGES:
            script = Script(tag=f"kill-{stage}", fault=FaultKind.EXIT, at=stage)
            job = site.accept(script, webhook=f"{site.host.url}/ok/{stage}")
            slowest_s = max(slowest_s, site.ended(job))
            expect(picture_of(site, job) == wanted, f"another picture after a kill when {stage}")
            attempt = oracle.row(job)["attempt"]
            expect(attempt == (1 if stage is Stage.COMMITTED else 2), f"{stage}: try {attempt}")
            oracle.check()
        injected = f"SIGKILL of the worker when {', '.join(STAGES)}"
        checked = f"second try, same picture; {oracle.last_check()}"
        return Found(injected, checked, slowest_s)


def picture_of(site: Site, job_id: int) -> bytes:
    """The first picture of a finished job, as a client gets it."""
    answer = site.client.get(site.fetch(job_id)["output"][0])
    expect(answer.status_code == 200, f"job {job_id}: dead link")
    return answer.content


STORE_HANGS = "waiting for the file store"
LONGEST_STORE_S = 150.0
"""A store may take a minute and more over one file before its worker is given up."""

HANGS = {
    "stopped": (FaultKind.STOP, Stage.HALF),
    "hung in C": (FaultKind.HANG, Stage.HALF),
    STORE_HANGS: (FaultKind.WAIT, Stage.BEFORE_STORE),
}


@fault("F3", "worker hangs", within_s=LEASE_S + 15, is_patient=True)
def worker_hangs(room: Path) -> Found:
    """Every worker there is hangs, each in its own way; then one that loads its model."""
    environment = {
        "INPAINT_WORKER_STALL_S": str(STALL_S),
        "INPAINT_WORKER_LOAD_STALL_S": str(STALL_S),
        "INPAINT_MAX_IN_FLIGHT": "1",
    }
    with running_site(room, environment, workers=len(HANGS)) as site:
        oracle = Oracle(site)
        jobs = {
            name: site.accept(Script(tag=str(kind), fault=kind, at=at))
            for name, (kind, at) in HANGS.items()
        }
        started = time.monotonic()
        took_s = {}
        for name, job in jobs.items():
            site.ended(job, within_s=LONGEST_STORE_S)
            took_s[name] = time.monotonic() - started
        tries = [oracle.row(job)["attempt"] for job in jobs.values()]
        expect(tries == [2] * len(jobs), f"the jobs needed {tries} tries")
        told = oracle.last_check()
        site.stop()
        hung_load(site)
        injected = f"a worker each {', '.join(HANGS)} at once, one hung while it loads"
        last_s = took_s.pop(STORE_HANGS)
        checked = (
            f"killed for their silence, the jobs made at the second try; {STORE_HANGS}: after "
            f"{last_s:.0f} s; {told}"
        )
        return Found(injected, checked, max(took_s.values()))


def hung_load(site: Site) -> None:
    """A worker that never gets its model loaded is given up too. Raises: Broken."""
    (site.marks / HUNG_LOAD).touch()
    site.start(workers=1, is_ready=False)
    until(lambda: not (site.marks / HUNG_LOAD).exists(), 60, "the worker loads")
    until(lambda: site.readiness() == 503, 20, "readiness says that no worker is there")
    site.ended(site.accept(Script(tag="behind a load")), within_s=6 * STALL_S)


@fault("F4", "poison job")
def poison(room: Path) -> Found:
    """It kills each worker that takes it; those beside it are made."""
    with running_site(room, workers=2) as site:
        oracle = Oracle(site)
        others = [site.accept(Script(tag=f"before{n}", step_s=0.05)) for n in range(3)]
        bad = site.accept(
            Script(tag="poison", fault=FaultKind.EXIT, at=Stage.HALF, times=0),
            webhook=f"{site.host.url}/ok/poison",
        )
        others += [site.accept(Script(tag=f"after{n}", step_s=0.05)) for n in range(3)]
        took_s = site.ended(bad, within_s=60, status="failed")
        site.ended(*others, within_s=60)
        expect("lost too often" in site.fetch(bad)["message"], "the reason is not told")
        expect(oracle.row(bad)["attempt"] == 3, "not three tries")
        until(lambda: bool(site.host.calls_for(bad)), 10, "the webhook tells of the failure")
        injected = "a job that kills each worker which takes it, between 6 others"
        checked = f"failed after 3 tries with its reason and webhook; {oracle.last_check()}"
        return Found(injected, checked, took_s)


@fault("F11", "device error that stays", within_s=10)
def device_lost(room: Path) -> Found:
    """The process ends, another is started, the jobs go on."""
    with running_site(room) as site:
        oracle = Oracle(site)
        beside = site.accept(Script(tag="beside", step_s=0.1), num_inference_steps=10)
        job = site.accept(
            Script(tag="lost", fault=FaultKind.DEVICE_LOST, at=Stage.HALF, step_s=0.05)
        )
        until(lambda: site.readiness() == 503, 10, "readiness says that no worker is there")
        reason = site.client.get(f"{site.url}/readyz/workers").json()["reason"]
        expect("0/1" in reason, f"readiness does not count workers: {reason}")
        took_s = site.ended(job, beside)
        expect(site.readiness() == 200, "not ready again")
        injected = "DeviceLost in the middle of a batch of two"
        checked = f"readiness said {reason!r}, both are made; {oracle.last_check()}"
        return Found(injected, checked, took_s)


@fault("F13", "the clock jumps three days, both ways", within_s=RETRY_DELAYS_S[0] * 1.2 + 5)
def clock_jumps(room: Path) -> Found:
    """Running jobs are not taken for lost, nothing is sent twice, what is due goes out in time."""
    with running_site(room, workers=2, launch=SHIFTED_COMMAND_LINE) as site:
        oracle = Oracle(site)
        remembered = site.create("before-any-jump")
        slowest_s = 0.0
        for shift_s in (THREE_DAYS_S, -THREE_DAYS_S, 0):
            slowest_s = max(slowest_s, jump(site, oracle, shift_s))
            told = sane_times(site)
            site.create(f"old-ones-are-removed-{shift_s}")
            expect(site.create("before-any-jump") == remembered, "an idempotency key is forgotten")
        tries = Counter(oracle.row(each)["attempt"] for each in site.accepted)
        expect(set(tries) == {1}, f"running jobs were taken for lost: {dict(tries)} (tries: jobs)")
        calls = Counter(len(site.host.calls_for(each)) for each in site.accepted)
        unasked = sum(webhook is None for webhook in site.accepted.values())
        expected = {0: unasked, 1: 3 * RUNNING_JOBS, 2: 3}
        expect(calls == expected, f"webhooks were called {dict(calls)} (calls: jobs)")
        injected = (
            f"jumps of +3, -6 and +3 days, each with {RUNNING_JOBS} leases held and a webhook to be"
            " tried again"
        )
        checked = (
            f"one try each, one webhook call each, the retry in time; {told}; a repeated"
            f" idempotency key replays; {drain(site, oracle)}"
        )
        return Found(injected, checked, slowest_s)


def sane_times(site: Site) -> str:
    """No estimate and no measured time is below 0 or beyond an hour. Raises: Broken."""
    figures = site.client.post(f"{site.url}/api/v3/system_load", json={"key": site.key}).json()
    job = site.accept(Script(tag="estimated", step_s=0.2))
    waiting = site.native(job)
    times = {"queue_time": figures["queue_time"], "eta_s": waiting["eta_s"] or 0.0}
    site.ended(*site.accepted_ids())
    for each in site.accepted_ids():
        spans = {name: ms or 0.0 for name, ms in site.native(each)["timings_ms"].items()}
        times |= {f"{name} of job {each}": ms / 1000 for name, ms in spans.items()}
        times[f"generationTime of job {each}"] = site.fetch(each)["generationTime"]
    odd = {name: seconds for name, seconds in times.items() if not 0 <= seconds < HOUR_S}
    expect(not odd, f"seconds that cannot be: {odd}")
    return f"{len(times)} estimates and durations from 0 to {max(times.values()):.1f} s"


def jump(site: Site, oracle: Oracle, shift_s: int) -> float:
    """Seconds from the jump until the pending webhook was tried again. Raises: Broken."""
    pending = site.accept(
        Script(tag=f"pending{shift_s}"), webhook=f"{site.host.url}/once500/{shift_s}"
    )
    jobs = [
        site.accept(
            Script(tag=f"{shift_s}-{n}", step_s=0.2),
            webhook=f"{site.host.url}/ok/{shift_s}-{n}",
            num_inference_steps=40,
        )
        for n in range(RUNNING_JOBS)
    ]
    site.claimed(jobs[-1])
    until(lambda: bool(site.host.calls_for(pending)), 30, "the first call")
    site.shift_clock(shift_s)
    took_s = until(
        lambda: len(site.host.calls_for(pending)) == 2,
        60,
        f"a webhook that was to be tried again is, after a jump to {shift_s} s",
    )
    site.ended(*jobs, within_s=60)
    for each in jobs:
        until(lambda: bool(site.host.calls_for(each)), 10, "webhooks go out")  # noqa: B023
    oracle.check()
    return took_s


@fault("F15", "late result of a worker given up", within_s=LEASE_S + 20, is_patient=True)
def late_result(room: Path) -> Found:
    """Stopped with a picture in hand; when it goes on, another has finished the job differently."""
    with running_site(room, workers=2) as site:
        oracle = Oracle(site)
        lateness_s(site, oracle, Stage.DECODED, take_away)
        slowest_s = lateness_s(site, oracle, Stage.HALF, let_lease_run_out)
        injected = (
            "a worker stopped when the picture was decoded and its job taken away, one stopped "
            "half-way until its lease ran out; then continued"
        )
        checked = f"the first result stays, the late one's files are gone; {oracle.last_check()}"
        return Found(injected, checked, slowest_s)


def let_lease_run_out(_site: Site, _job_id: int) -> None:
    """It does so by itself."""


def lateness_s(
    site: Site, oracle: Oracle, stage: Stage, give_up: Callable[[Site, int], None]
) -> float:
    """Stop a worker, let another finish, let it go on; seconds until the other had finished.

    The stages are of the thread that also writes to the database: a process that is stopped inside
    a write transaction would hold SQLite's lock, which is another fault. Raises: Broken.
    """
    job = site.accept(Script(f"late-{stage}", 0.0, FaultKind.STOP, stage, unrepeatable=True))
    until(lambda: bool(stopped_workers(site)), 20, "the worker stands still")
    (pid,) = stopped_workers(site)
    give_up(site, job)
    took_s = site.ended(job, within_s=LEASE_S + 40)
    before = picture_of(site, job)
    oracle.check()
    signal_process(pid, signal.SIGCONT)
    until(
        # Either it learns of it, or the supervisor did not wait for it.
        lambda: has_learnt(site, job) or pid not in site.worker_pids(),
        20,
        "the late worker learns of it",
    )
    expect(picture_of(site, job) == before, f"the late worker changed the picture ({stage})")
    files = site.files / "generations"
    prefix = oracle.row(job)["file_prefix"]
    until(lambda: len([*files.glob(f"{prefix}*")]) == 1, 10, "the late worker's picture is gone")
    oracle.check()
    return took_s


def has_learnt(site: Site, job_id: int) -> bool:
    """Whether a worker has said that a job is no longer its own."""
    said = [*site.log_events("job finished by another"), *site.log_events("job lease lost")]
    return any(each["job_id"] == job_id for each in said)


def stopped_workers(site: Site) -> list[int]:
    """Those that stand still after a SIGSTOP."""
    return [pid for pid in site.worker_pids() if process_state(pid) == "T"]


def process_state(pid: int) -> str:
    """The kernel's letter; "" for a process that has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


@fault("F17", "SIGTERM during a batch", within_s=30)
def told_to_end(room: Path) -> Found:
    """Waiting clients get their id; short jobs are finished, long ones given back."""
    # One job for each worker: in a shared batch the slower one would hold up the other.
    environment = {"INPAINT_HOLD_S": "60", "INPAINT_MAX_IN_FLIGHT": "1"}
    with running_site(room, environment, workers=2) as site:
        oracle = Oracle(site)
        answers: list[dict[str, Any]] = []

        def ask(step_s: float) -> None:
            script = Script(tag=f"held-{step_s}", step_s=step_s)
            answers.append(site.submit(script, num_inference_steps=30).json())

        clients = [threading.Thread(target=ask, args=(step_s,)) for step_s in (0.1, 2.0)]
        for client in clients:
            client.start()
        until(lambda: [oracle.row(n)["step"] > 0 for n in oracle.ids()] == [True] * 2, 20, "begun")
        started = time.monotonic()
        status = site.stop()
        took_s = time.monotonic() - started
        for client in clients:
            client.join()
        expect(status == 0, f"exit status {status}")
        told = [answer["status"] for answer in answers]
        expect(told == ["processing"] * 2 and len(site.accepted) == 2, f"clients were told {told}")
        states = dict(oracle.states())
        expect(states == {"finished": 1, "queued": 1}, f"at the end: {states}")
        injected = "SIGTERM with a job of 3 s and one of a minute running, both clients waiting"
        checked = f"exit 0, both clients have their id, jobs {states}; {oracle.check()}"
        return Found(injected, checked, took_s)


@fault("F23", "everything is killed at once", within_s=LEASE_S + 20, is_patient=True)
def power_loss(room: Path) -> Found:
    """As far as a process can tell, the machine went down."""
    with running_site(room, workers=2) as site:
        oracle = Oracle(site, orphans=2)
        jobs = [
            site.accept(Script(tag=f"power{n}", step_s=0.3), webhook=f"{site.host.url}/ok/{n}")
            for n in range(6)
        ]
        site.claimed(jobs[0])
        site.kill_everything()
        started = time.monotonic()
        ready_s = site.start(workers=2)
        site.ended(*jobs, within_s=LEASE_S + 40)
        took_s = time.monotonic() - started
        injected = "SIGKILL of the API and 2 workers at one moment, 6 jobs held or waiting"
        checked = f"ready in {ready_s:.1f} s, all jobs made; {oracle.last_check()}"
        return Found(injected, checked, took_s)


@fault("F32", "the event loop stops", within_s=5, is_patient=True)
def stop_loop(room: Path) -> Found:
    """The process ends by itself, as it could answer nobody, and is started again from outside."""
    with running_site(room, launch=STOPPABLE_COMMAND_LINE) as site:
        oracle = Oracle(site)
        jobs = [site.accept(webhook=f"{site.host.url}/ok/{number}") for number in range(4)]
        signal_process(site.pid, signal.SIGUSR1)
        exit_code, noticed_s = site.wait_for_end(LOOP_STALL_S + 15)
        expect(exit_code == EXIT_CODE, f"it ended with {exit_code}")
        told = site.log_events("the event loop has stopped, ending")
        expect(
            len(told) == 1 and "never_return" in told[0]["exception"], "no word of where it hung"
        )
        recovery_s = site.start()
        site.ended(*jobs)
        checked = f"it ended after {noticed_s:.0f} s and said where it hung: {drain(site, oracle)}"
        return Found("1 main thread that is busy for ever", checked, recovery_s)
