"""Faults of what lies on disk: database, files, model, schema."""

import asyncio
import importlib
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config

from server.database import MIGRATIONS, open_engine
from tests.chaos.clients import side_by_side
from tests.chaos.faults_processes import drain, picture_of
from tests.chaos.hosts import LoopThread, running_host, running_proxy
from tests.chaos.matrix import Found, NotCovered, fault
from tests.chaos.oracle import Oracle
from tests.chaos.scripts import Script
from tests.chaos.site import REPOSITORY, Site, expect, outside_world, running_site, until

TMPFS_BYTES = 4_000_000
NOT_READY_S = 45.0
"""From the last sign of life of a worker to 503, and a bit."""

BUILTIN = REPOSITORY / "models" / "builtin" / "weights"


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A tmpfs of 4 MB. Raises: NotCovered where mounting is not permitted."""
    folder.mkdir()
    options = f"size={TMPFS_BYTES}"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        raise NotCovered("mounting a tmpfs is not permitted here")
    try:
        yield folder
    finally:
        # Lazily: a process that is slow to end may still have it open.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all that is left; it."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (65_536, 512):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return path


def refused(site: Site) -> str:
    """A submit that must be refused with a retryable error, at once. Raises: Broken."""
    started = time.monotonic()
    answer = site.submit(Script(tag="refused"))
    told = f"{answer.status_code} {answer.text[:100]}"
    expect(answer.status_code == 503 and "retry-after" in answer.headers, f"submit got {told}")
    expect(time.monotonic() - started < 15, "the refusal took too long")
    return f"refused with 503, Retry-After {answer.headers['retry-after']}"


def limit_file_size(site: Site, limit: int) -> None:
    """RLIMIT_FSIZE of the API process: writes beyond so many bytes of any file fail."""
    resource.prlimit(site.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def refuses_and_heals_without_room(site: Site) -> tuple[str, float]:
    """Take the API's right to write away and give it back; the story, and seconds to heal."""
    limit_file_size(site, 0)
    told = refused(site)
    limit_file_size(site, resource.RLIM_INFINITY)
    healed_s = until(lambda: site.submit(Script(tag="healed")).status_code == 200, 10, "heals")
    return told, healed_s


@fault("F6", "SQLite: disk full, no right to write, EIO", within_s=10)
def disk_full(room: Path) -> Found:
    """Refuse, go on reading, heal by itself."""
    told, slowest_s, gaps = [], 0.0, []
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(room / "disk"))
        site = stack.enter_context(running_site(room, data_dir=disk / "data"))
        oracle = Oracle(site)
        before = site.accept(Script(tag="before"))
        site.ended(before)
        filler = fill(disk)
        told.append(f"full disk: {refused(site)}")
        expect(site.status(before) == "success", "reads do not work")
        picture_of(site, before)
        try:
            until(lambda: site.readiness() == 503, NOT_READY_S, "readiness says so")
        except AssertionError:
            gaps.append("readiness does not tell of a full disk")
        filler.unlink()
        slowest_s = max(slowest_s, healing_s(site))
        after = site.accept(Script(tag="after"))
        site.ended(after)
        text, healed_s = refuses_and_heals_without_room(site)
        told.append(f"RLIMIT_FSIZE: {text}")
        slowest_s = max(slowest_s, healed_s)
        drain(site, oracle)
        told.append(failing_fsync(site))
        return Found(f"{'; '.join(told)}; {drain(site, oracle)}", slowest_s, tuple(gaps))


def healing_s(site: Site) -> float:
    """Seconds until the server is ready and takes a job again."""
    started = time.monotonic()
    until(lambda: site.submit(Script(tag="healed")).status_code == 200, 30, "takes jobs again")
    until(lambda: site.readiness() == 200, 30, "ready again")
    return time.monotonic() - started


def failing_fsync(site: Site) -> str:
    """EIO from every fsync of the API process, by strace; what was seen."""
    if shutil.which("strace") is None:
        return "EIO: no strace here"
    rule = "inject=fsync,fdatasync:error=EIO"
    tracer = subprocess.Popen(
        ["strace", "-f", "-q", "-e", rule, "-o", "/dev/null", "-p", str(site.pid)],
        stderr=subprocess.PIPE,
    )
    try:
        status = Path(f"/proc/{site.pid}/status")
        until(
            lambda: "TracerPid:\t0" not in status.read_text() or tracer.poll() is not None,
            10,
            "strace is attached",
        )
        if tracer.poll() is not None:
            return "EIO: tracing is not permitted here"
        told = refused(site)
    finally:
        tracer.terminate()
        tracer.communicate()
    until(lambda: site.submit(Script(tag="fsync")).status_code == 200, 10, "heals after EIO")
    return f"EIO of fsync: {told}"


@fault("F7", "output store full", within_s=10)
def store_full(room: Path) -> Found:
    """Never a success with a dead link."""
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(room / "disk"))
        environment = {"INPAINT_STORAGE__URL": (disk / "files").as_uri()}
        site = stack.enter_context(running_site(room, environment))
        oracle = Oracle(site, files=disk / "files")
        slow = site.accept(Script(tag="slow", step_s=0.3), num_inference_steps=10)
        site.claimed(slow)
        filler = fill(disk)
        told = refused(site)
        until(lambda: site.status(slow) == "failed", 20, "the job whose picture has no room ends")
        gaps = (
            "the upload is not tried again: the job fails with "
            f"{site.fetch(slow)['message']!r}; S3",
        )
        filler.unlink()
        after = site.accept(Script(tag="after"))
        took_s = site.ended(after)
        picture_of(site, after)
        return Found(f"{told}; {oracle.check()}", took_s, gaps)


@contextmanager
def postgres() -> Iterator[Any]:
    """The tests' own PostgreSQL. Raises: NotCovered where there is none, or no support."""
    if importlib.util.find_spec("tests.postgres") is None:
        raise NotCovered("this version keeps its jobs in SQLite only")
    module = importlib.import_module("tests.postgres")
    binaries = module.find_binaries()
    if binaries is None:
        raise NotCovered("PostgreSQL's programs are not installed")
    with module.running_postgres(binaries) as running:
        yield running


@fault("F5", "PostgreSQL is killed", within_s=15)
def database_killed(room: Path) -> Found:
    """Refuse, hold on to what is being made, and go on when it is back."""
    with ExitStack() as stack:
        running = stack.enter_context(postgres())
        url = str(running.url(running.create_database()))
        environment = {"INPAINT_DATABASE_URL": url}
        site = stack.enter_context(running_site(room, environment, workers=2))
        oracle = Oracle(site)
        slowest_s = 0.0
        for away_s in (1, 10):
            job = site.accept(
                Script(tag=f"away{away_s}", step_s=0.2),
                num_inference_steps=20,
                webhook=f"{site.host.url}/ok/{away_s}",
            )
            site.claimed(job)
            running.stop()
            told = refused(site)
            time.sleep(away_s)
            running.start()
            started = time.monotonic()
            until(lambda: site.submit(Script(tag="back")).status_code == 200, 30, "takes jobs")
            slowest_s = max(slowest_s, time.monotonic() - started)
            site.ended(job, within_s=60)
            oracle.check()
        return Found(f"{told}; away for 1 and 10 s; {drain(site, oracle)}", slowest_s)


@fault("F22", "line between node and database is cut", within_s=15)
def line_cut(room: Path) -> Found:
    """The worker cannot renew its leases; nothing is finished twice."""
    with ExitStack() as stack:
        running = stack.enter_context(postgres())
        thread = stack.enter_context(LoopThread())
        host = stack.enter_context(running_host(thread))
        url = running.url(running.create_database())
        socket_path = next(Path(url.query["host"]).glob(".s.PGSQL.*[0-9]"))
        proxy = stack.enter_context(
            running_proxy(thread, lambda: asyncio.open_unix_connection(str(socket_path)))
        )
        through = url.set(host="127.0.0.1", port=proxy.port, query={})
        site = Site(room, host, {"INPAINT_DATABASE_URL": str(through)})
        stack.callback(site.close)
        site.start(workers=2)
        oracle = Oracle(site)
        jobs = [
            site.accept(Script(tag=f"cut{n}", step_s=0.2), num_inference_steps=20) for n in range(3)
        ]
        site.claimed(jobs[0])
        thread.call(proxy.cut())
        time.sleep(5)
        thread.call(proxy.reset())
        thread.call(proxy.heal())
        took_s = until(lambda: site.submit(Script(tag="back")).status_code == 200, 30, "heals")
        site.ended(*jobs, within_s=60)
        return Found(f"cut for 5 s, then reset; {drain(site, oracle)}", took_s)


@fault("F19", "10,000 queued jobs at the start", within_s=5)
def long_queue(room: Path) -> Found:
    """Ready as quickly as ever, memory flat, order kept."""
    many = 10_000
    with outside_world() as (_thread, host):
        site = Site(room, host)
        try:
            site.start(workers=0, is_ready=False)
            first = site.accept(Script(tag="first"))
            empty_kb = memory_kb(site.pid)
            site.stop()
            site.accepted.clear()  # the rows below share its input, which it would drop
            copy_job(site, first, many)
            ready_s = site.start()
            claimed = "job claimed"
            until(lambda: len(site.new_events(claimed)) >= 30, 30, "jobs are claimed")
            order = [each["job_id"] for each in site.new_events(claimed)]
            expect(order == sorted(order), f"claimed out of order: {order}")
            full_kb = memory_kb(site.pid)
            expect(full_kb < empty_kb + 30_000, f"{empty_kb} kB grew to {full_kb} kB")
            refusal = site.submit(Script(tag="over"))
            expect(refusal.status_code == 429, f"a full queue answered {refusal.status_code}")
            return Found(f"API memory {empty_kb // 1000} → {full_kb // 1000} MB", ready_s)
        finally:
            site.close()


def memory_kb(pid: int) -> int:
    """Resident memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))


def copy_job(site: Site, job_id: int, count: int) -> None:
    """Queue the same job so many times more, without inputs."""
    row = Oracle(site).row(job_id)
    del row["id"]
    with open_engine(site.database_url).begin() as connection:
        names = ", ".join(row)
        marks = ", ".join("?" for _ in row)
        copies = [
            tuple((row | {"file_prefix": str(uuid.UUID(int=n))}).values()) for n in range(count)
        ]
        connection.exec_driver_sql(f"INSERT INTO jobs ({names}) VALUES ({marks})", copies)


@fault("F24", "model file cut off", within_s=None)
def model_damaged(room: Path) -> Found:
    """The real worker: not ready, with the reason, and no hot loop of restarts."""
    model = room / "model"
    shutil.copytree(BUILTIN, model)
    weights = max((model / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1_000])
    with outside_world() as (_thread, host):
        real = f"{sys.executable} -m server.cli worker"
        site = Site(room, host, None, "--model", str(model), "--worker-command", real)
        try:
            site.start(is_ready=False)
            until(lambda: bool(site.log_events("worker cannot go on")), 120, "the log says why")
            reason = site.log_events("worker cannot go on")[0]["detail"]
            expect("unet" in reason, f"the log does not name the file: {reason}")
            answer = site.client.get(f"{site.url}/readyz")
            expect(answer.status_code == 503, "ready without a model")
            expect(str(model) not in answer.text, "readiness tells strangers of paths")
            until(lambda: len(site.log_events("worker ended")) >= 2, 120, "it is tried again")
            delays = [each["delay_s"] for each in site.log_events("worker ended")]
            expect(delays == sorted(set(delays)), f"restarted after {delays}: no backing off")
            job = site.accept(Script(tag="waits"))
            expect(site.status(job) == "processing", "an accepted job does not wait")
            reason = reason.replace(str(model), "…")
            return Found(f"not ready: {reason}; restarted after {delays} s; {Oracle(site).check()}")
        finally:
            site.close()


@fault("F26", "file store and rows disagree")
def files_gone(room: Path) -> Found:
    """A dead link is a 404, not an error; strays are cleared in time."""
    with running_site(room) as site:
        job = site.accept(Script(tag="gone"))
        site.ended(job)
        url = site.fetch(job)["output"][0]
        files = site.data_dir / "files"
        for path in (files / "generations").iterdir():
            path.unlink()
        expect(site.client.get(url).status_code == 404, "a missing picture is no 404")
        waiting = site.accept(Script(tag="first", step_s=0.5))
        site.claimed(waiting)
        beheaded = site.accept(Script(tag="input gone"))
        stray = files / "generations" / f"{uuid.uuid4()}-0.png"
        stray.write_bytes(b"stray")
        for path in (files / "inputs").iterdir():
            path.unlink()
        until(lambda: site.status(beheaded) in ("failed", "success"), 20, "the job ends")
        status = site.status(beheaded)
        after = site.accept(Script(tag="after"))
        site.ended(after)
        two_days_ago = time.time() - 2 * 86_400
        os.utime(stray, (two_days_ago, two_days_ago))
        site.stop()
        site.start()  # strays are looked for at the start
        gaps = ["rows whose file is gone are not marked"]
        try:
            until(lambda: not stray.exists(), 15, "an old stray is cleared")
        except AssertionError:
            gaps.append("old strays are not cleared")
        return Found(f"404 for the file, job without input: {status}", None, tuple(gaps))


@fault("F27", "two processes upgrade an old database", within_s=None)
def upgrade(room: Path) -> Found:
    """One wins, the other waits; a job queued by the old version is made."""
    with outside_world() as (_thread, host):
        new = Site(room / "new", host)
        try:
            new.start(workers=0, is_ready=False)
            job = new.accept(Script(tag="old"))
            new.stop()
            row = Oracle(new).row(job)
        finally:
            new.close()
        old = room / "old" / "data"
        shutil.copytree(new.data_dir / "files", old / "files")
        write_first_schema(old / "inpaint.db", row)
        sites = [Site(room / f"node{n}", host, data_dir=old) for n in range(2)]
        try:
            side_by_side([each.start for each in sites])
            sites[0].ended(job)
            sites[1].ended(job)
            fresh = sites[1].accept(Script(tag="new"))
            sites[1].ended(fresh)
        finally:
            for each in sites:
                each.close()
        return Found("both started on a database of the first version, its job was made")


def write_first_schema(path: Path, row: dict[str, Any]) -> None:
    """A database as the first version left it, with one queued job."""
    engine = open_engine(f"sqlite:///{path}")
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        columns = [each[1] for each in connection.exec_driver_sql("PRAGMA table_info(jobs)")]
        kept = {name: row[name] for name in columns}
        marks = ", ".join("?" for _ in kept)
        connection.exec_driver_sql(
            f"INSERT INTO jobs ({', '.join(kept)}) VALUES ({marks})", tuple(kept.values())
        )
    engine.dispose()
