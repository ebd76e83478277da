"""Faults of the database: away, out of reach, full of jobs, of an earlier version."""

import asyncio
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pysqlite3.dbapi2 as sqlite
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import MetaData, Table, text

from server.jobs.leases import LEASE_S
from server.storage.database import MIGRATIONS, open_engine
from server.storage.notify import REFRESH_S
from tests.chaos.clients import side_by_side
from tests.chaos.faults_processes import drain
from tests.chaos.faults_storage import refused
from tests.chaos.hosts import Host, running_host
from tests.chaos.matrix import Found, NotCovered, fault, need_data_folder
from tests.chaos.oracle import Oracle
from tests.chaos.relay import FAR, PORT, Line, running_relay
from tests.chaos.scripts import FOLDER_VARIABLE, Script
from tests.chaos.site import (
    INLINE_IMAGE,
    INLINE_MASK,
    Site,
    expect,
    outside_world,
    running_site,
)
from tests.support.proxies import LoopThread, TcpProxy, running_proxy
from tests.support.repository import REPOSITORY
from tests.support.waiting import until

AWAY_S = (1, 10, 60)
REFUSED_S = 45.0
"""The longest that a client may wait for a refusal while the database is silent."""
IDLE_COMMITS_PER_S = 5
"""Of a worker, or the API, that has nothing to do."""
IDLE_S = 10
"""Two reports of each worker."""
GONE_S = 2.0
"""Until readiness tells that the database file is gone."""
NATIVE_JOB = {"prompt": "a cat", "init_image": INLINE_IMAGE, "mask_image": INLINE_MASK}
MANY = 10_000
SQLITE = "SQLite"


@contextmanager
def postgres() -> Iterator[Any]:
    """The tests' own PostgreSQL. Raises: NotCovered where there is none, or no support."""
    if importlib.util.find_spec("tests.support.postgres") is None:
        raise NotCovered("this version keeps its jobs in SQLite only")
    module = importlib.import_module("tests.support.postgres")
    binaries = module.find_binaries()
    if binaries is None:
        raise NotCovered("PostgreSQL's programs are not installed")
    with module.running_postgres(binaries) as running:
        yield running


@fault("F5", "PostgreSQL is killed", within_s=15, is_patient=True)
def database_killed(room: Path) -> Found:
    """Refuse, hold on to what is being made, and go on when it is back."""
    with ExitStack() as stack:
        running = stack.enter_context(postgres())
        url = str(running.url(running.create_database()))
        environment = {"INPAINT_DATABASE_URL": url}
        site = stack.enter_context(running_site(room, environment, workers=2))
        # One submit each time may find the database gone when its input is stored already.
        oracle = Oracle(site, orphans=len(AWAY_S))
        slowest_s, tries = 0.0, []
        for away_s in AWAY_S:
            job = site.accept(
                Script(tag=f"away{away_s}", step_s=0.2),
                num_inference_steps=20,
                webhook=f"{site.host.url}/ok/{away_s}",
            )
            site.claimed(job)
            running.stop()
            refused(site)
            time.sleep(away_s)
            running.start()
            back_s = until(lambda: takes_jobs(site), 30, "takes jobs")
            slowest_s = max(slowest_s, back_s)
            site.ended(job, within_s=60)
            tries.append(oracle.row(job)["attempt"])
            oracle.check()
        expect(len(site.log_events("worker ended")) == 0, "a worker gave up")
        injected = f"pg_ctl stop -m immediate, away for {', '.join(map(str, AWAY_S))} s"
        checked = (
            f"submits told 503 with Retry-After, no worker gave up, the held jobs needed {tries} "
            f"tries; {drain(site, oracle)}"
        )
        return Found(injected, checked, slowest_s)


def takes_jobs(site: Site) -> bool:
    """Whether a job is taken now."""
    try:
        return site.submit(Script(tag="back")).status_code == 200
    except httpx2.HTTPError:
        return False


@fault("F29", "PostgreSQL beside idle workers")
def idle_workers(room: Path) -> Found:
    """Who has nothing to do asks for nothing; a new job is claimed all the same at once."""
    with ExitStack() as stack:
        running = stack.enter_context(postgres())
        url = str(running.url(running.create_database()))
        site = stack.enter_context(running_site(room, {"INPAINT_DATABASE_URL": url}, workers=3))
        rate = idle_commits_per_s(site)
        expect(rate <= 4 * IDLE_COMMITS_PER_S, f"{rate:.1f} commits/s with nothing to do")
        claimed_s = claims_s(site)
        expect(max(claimed_s) < REFRESH_S / 2, f"jobs wait {claimed_s} s for a free worker")
        checked = (
            f"{rate:.1f} commits/s of three idle workers and the API; jobs sent to them waited "
            f"{', '.join(f'{1000 * each:.0f}' for each in claimed_s)} ms"
        )
        return Found(f"nothing, for {IDLE_S} s", checked)


def idle_commits_per_s(site: Site) -> float:
    """Of all processes together."""
    engine = open_engine(site.database_url)

    def commits() -> int:
        query = text("SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()")
        with engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    before = commits()
    time.sleep(IDLE_S)
    after = commits()
    engine.dispose()
    return (after - before) / IDLE_S


def claims_s(site: Site, count: int = 5) -> list[float]:
    """Seconds that jobs wait in the queue, each sent when the one before has ended."""
    oracle, waits = Oracle(site), []
    for number in range(count):
        job = site.accept(Script(tag=f"idle{number}"))
        site.ended(job)
        row = oracle.row(job)
        waits.append(row["started_at"] - row["created_at"])
    return waits


@fault("F31", "database file is moved, or replaced", within_s=30)
def file_gone(room: Path) -> Found:
    """Nothing is promised that the next start would not know, and no key of the old file counts."""
    need_data_folder()
    moved_s = file_moved(room / "moved")
    file_replaced(room / "replaced")
    checked = (
        "readiness, submits and lists told 503 within 2 s, the worker ended with one sentence and "
        "made no new file; after the file's return all went on; a key revoked in the file that "
        "came instead was refused"
    )
    return Found("mv of inpaint.db* away and back, a backup put in its place", checked, moved_s)


def file_moved(room: Path) -> float:
    """Seconds from the file's return to the end of a new job. Raises: Broken."""
    with running_site(room) as site:
        site.ended(site.accept(Script(tag="before")))
        aside = room / "aside"
        aside.mkdir()
        files = [*site.data_dir.glob("inpaint.db*")]
        for each in files:
            each.rename(aside / each.name)
        told = site.client.post(f"{site.url}/api/jobs", json=NATIVE_JOB)
        expect(told.status_code == 503, f"a submit got {told.status_code} {told.text[:100]}")
        expect(told.json()["code"] == "storage_unavailable", f"a submit got {told.text}")
        until(lambda: not site.is_open(), GONE_S, "readiness tells of it")
        reason = site.client.get(f"{site.url}/readyz").json()["reason"]
        expect("database file was moved" in reason, f"readiness says {reason!r}")
        expect(site.client.get(f"{site.url}/api/jobs").status_code == 503, "jobs are listed")
        expect(site.readiness("/healthz") == 200, "the process does not answer")
        said = [each for each in site.log_events("store fails") if "was moved" in each["detail"]]
        expect(len(said) == 1, f"{len(said)} lines in the log")
        until(lambda: bool(site.log_events("worker cannot go on")), 10, "the worker ends")
        until(lambda: len(site.log_events("worker started")) > 1, 10, "it is started again")
        until(lambda: bool(site.log_events("the database does not answer")), 60, "and asks")
        expect(not files[0].exists(), "somebody has made a new database")
        for each in files:
            (aside / each.name).rename(each)
        started = time.monotonic()
        until(site.is_open, 10, "requests are taken again")
        site.ended(site.accept(Script(tag="after")))
        return time.monotonic() - started


def file_replaced(room: Path) -> None:
    """Raises: Broken."""
    with outside_world() as (_thread, host):
        site = Site(room, host)
        key = command_line(site, "keys", "create", "somebody").strip()
        key_id = command_line(site, "keys", "list").splitlines()[1].split("\t")[0]
        headers = {"Authorization": f"Bearer {key}"}

        def listed() -> int:
            return site.client.get(f"{site.url}/api/jobs", headers=headers).status_code

        try:
            site.start()
            expect(listed() == 200, "the key does not work")
            database = site.data_dir / "inpaint.db"
            backup = room / "backup.db"
            with closing(sqlite.connect(str(database))) as source:
                source.execute("VACUUM INTO ?", (str(backup),))
            for name in ("inpaint.db-wal", "inpaint.db-shm"):
                (site.data_dir / name).unlink()
            backup.replace(database)
            expect("1 revoked" in command_line(site, "keys", "revoke", key_id), "not revoked")
            expect(listed() == 503, "the revoked key works")
            until(lambda: not site.is_open(), GONE_S, "readiness tells of it")
            ping = f"{site.url}/api/webhooks/ping"
            answer = site.client.post(ping, headers=headers, json={"url": f"{host.url}/ok/ping"})
            expect(answer.status_code == 503, f"a ping with the revoked key: {answer.status_code}")
            site.stop()
            site.start()
            expect(listed() == 401, "the revoked key works after a restart")
        finally:
            site.close()


def command_line(site: Site, *arguments: str) -> str:
    """What our command prints of the site's data."""
    command = [
        sys.executable,
        "-m",
        "server.cli.main",
        *arguments,
        "--data-dir",
        str(site.data_dir),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    return done.stdout


@fault("F22", "line between node and database is cut", within_s=20, is_patient=True)
def line_cut(room: Path) -> Found:
    """A node loses its line to the database, with a reset and in silence."""
    with ExitStack() as stack:
        running = stack.enter_context(postgres())
        thread = stack.enter_context(LoopThread())
        host = stack.enter_context(running_host(thread))
        url = running.url(running.create_database())
        proxy = stack.enter_context(
            running_proxy(thread, lambda: asyncio.open_unix_connection(running.socket))
        )
        files = {"INPAINT_STORAGE__URL": (room / "files").as_uri()}
        other = Site(room / "other", host, files | {"INPAINT_DATABASE_URL": str(url)})
        stack.callback(other.close)

        def node(name: str, address: str, port: int) -> Site:
            through = url.set(host=address, port=port, query={})
            own = {"INPAINT_DATABASE_URL": str(through), FOLDER_VARIABLE: str(other.marks)}
            site = Site(room / name, host, files | own)
            stack.callback(site.close)
            site.start()
            return site

        # A submit on each node may find its line cut when its input is stored already.
        oracle = Oracle(other, files=room / "files", orphans=2)
        reset_site = node("reset", "127.0.0.1", proxy.port)
        slowest_s = reset_line(reset_site, thread, proxy)
        other.accepted.update(reset_site.accepted)
        reset_site.stop()
        injected, gaps = "the node's line reset after 5 s", []
        try:
            line = stack.enter_context(running_relay(running.socket))
            silent_site = node("silent", FAR, PORT)
            slowest_s = max(slowest_s, silent_line(silent_site, other, line, oracle))
            injected += "; of another silent, without a reset, until its job's lease had run out"
        except NotCovered as reason:
            other.start()
            gaps.append(f"silence: {reason}")
        checked = (
            f"a client is told 503 within {REFUSED_S:g} s, another node makes the job, the late "
            f"result changes nothing, the node takes jobs again; {drain(other, oracle)}"
        )
        return Found(injected, checked, slowest_s, tuple(gaps))


def reset_line(site: Site, thread: LoopThread, proxy: TcpProxy) -> float:
    """Cut for 5 s, then end all connections; seconds until jobs are taken again."""
    job = site.accept(Script(tag="reset", step_s=0.2), num_inference_steps=20)
    site.claimed(job)
    thread.call(proxy.cut())
    time.sleep(5)
    thread.call(proxy.reset())
    thread.call(proxy.heal())
    took_s = until(lambda: takes_jobs(site), 30, "takes jobs after a reset")
    site.ended(job)
    return took_s


def silent_line(cut_off: Site, other: Site, line: Line, oracle: Oracle) -> float:
    """Packets are lost until another node has made the job; seconds until jobs are taken again.

    Raises: Broken.
    """
    script = Script(tag="silent", step_s=0.3, unrepeatable=True)
    job = cut_off.accept(script, num_inference_steps=50)
    cut_off.claimed(job)
    other.accepted.update(cut_off.accepted)
    line.cut()
    other.start()
    answer = cut_off.client.post(
        f"{cut_off.url}/api/v3/inpaint", json=cut_off.body(), timeout=REFUSED_S
    )
    expect(answer.status_code == 503, f"behind a silent line a client got {answer.status_code}")
    expect(cut_off.readiness() != 200, "ready without a database")
    other.ended(job, within_s=LEASE_S + 60)
    oracle.check()
    line.heal()
    took_s = until(lambda: takes_jobs(cut_off), 60, "takes jobs after a silence")
    expect(oracle.row(job)["attempt"] == 2, "not two tries after a silence")
    other.accepted.update(cut_off.accepted)
    return took_s


@fault("F19", "10,000 queued jobs at the start", within_s=5)
def long_queue(room: Path) -> Found:
    """Ready as quickly as ever, memory flat, order kept."""
    with outside_world() as (_thread, host):
        site = Site(room, host)
        try:
            site.start(workers=0, is_ready=False)
            first = site.accept(Script(tag="first"))
            site.stop()
            site.accepted.clear()  # the rows below share its input, which it would drop
            site.start()
            until(lambda: len(site.new_events("job finished")) == 1, 30, "the one job is made")
            before_kb = [memory_kb(site.pid), *map(memory_kb, site.worker_pids())]
            site.stop()
            copy_job(site, first, MANY)
            ready_s = site.start()
            until(lambda: len(site.new_events("job claimed")) >= 100, 60, "jobs are claimed")
            order = [each["job_id"] for each in site.new_events("job claimed")]
            expect(order == sorted(order), f"claimed out of order: {order}")
            after_kb = [memory_kb(site.pid), *map(memory_kb, site.worker_pids())]
            for before, after in zip(before_kb, after_kb, strict=True):
                expect(after < before + 30_000, f"{before} kB grew to {after} kB")
            refusal = site.submit(Script(tag="over"))
            expect(refusal.status_code == 429, f"a full queue answered {refusal.status_code}")
            sizes = ", ".join(
                f"{before // 1000} → {after // 1000} MB"
                for before, after in zip(before_kb, after_kb, strict=True)
            )
            checked = f"memory of API and worker {sizes}, {len(order)} claimed in order, 429 beyond"
            return Found(f"{MANY} queued rows, then a start", checked, ready_s)
        finally:
            site.close()


def memory_kb(pid: int) -> int:
    """Resident memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))


def copy_job(site: Site, job_id: int, count: int) -> None:
    """Queue the same job so many times more, as it was before it was made, without inputs."""
    row = Oracle(site).row(job_id) | {
        "state": "queued",
        "attempt": 0,
        "step": 0,
        "total_steps": 0,
        **dict.fromkeys(("started_at", "finished_at", "run_s", "flagged")),
    }
    del row["id"]
    copies = [row | {"file_prefix": str(uuid.UUID(int=n))} for n in range(count)]
    insert_jobs(site.database_url, copies)


def plain(value: Any) -> Any:
    """JSON as text: PostgreSQL's driver reads it as values, and takes none."""
    return json.dumps(value) if isinstance(value, dict | list) else value


def insert_jobs(url: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as they are read without our types; columns that the table lacks are left out."""
    engine = open_engine(url)
    with engine.begin() as connection:
        table = Table("jobs", MetaData(), autoload_with=connection)
        names = [column.name for column in table.columns if column.name in rows[0]]
        marks = ", ".join("?" if engine.dialect.name == "sqlite" else "%s" for _ in names)
        connection.exec_driver_sql(
            f"INSERT INTO jobs ({', '.join(names)}) VALUES ({marks})",
            [tuple(plain(row[name]) for name in names) for row in rows],
        )
    engine.dispose()


@fault("F27", "two nodes upgrade an old database at once", within_s=None)
def upgrade(room: Path) -> Found:
    """One wins, the other waits; jobs that the old version left queued and running are made."""
    with ExitStack() as stack:
        _thread, host = stack.enter_context(outside_world())
        old_rows, files = jobs_of_today(room / "today", host)
        gaps: tuple[str, ...] = ()
        databases = {SQLITE: ""}
        try:
            running = stack.enter_context(postgres())
            databases["PostgreSQL"] = "postgres"
        except NotCovered as reason:
            gaps = (f"PostgreSQL: {reason}",)
        for name in databases:
            for version in old_versions():
                folder = room / f"{name}-{version}"
                shutil.copytree(files, folder / "files")
                url = f"sqlite:///{folder}/inpaint.db"
                if name != SQLITE:
                    url = str(running.url(running.create_database()))
                # Its lease has to run out: once for each database.
                live = old_rows if version == old_versions()[-1] else old_rows[:1]
                write_old_schema(url, version, live)
                start_both(folder, host, url, [row["id"] for row in live])
        injected = f"two nodes started at once on each of {', '.join(old_versions())}"
        checked = (
            "both are ready, a job queued then is made, and a new one; of the last version one "
            "that was running too"
        )
        return Found(f"{injected}, in {' and '.join(databases)}", checked, None, gaps)


def old_versions() -> list[str]:
    """Every schema but the present one, oldest first."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    known = [each.revision for each in ScriptDirectory.from_config(config).walk_revisions()]
    return known[:0:-1]


def jobs_of_today(room: Path, host: Host) -> tuple[list[dict[str, Any]], Path]:
    """Rows of a queued job and of one whose worker was lost, and the folder of their inputs."""
    site = Site(room, host)
    try:
        site.start(workers=0, is_ready=False)
        queued, running = (
            Oracle(site).row(site.accept(Script(tag=tag))) for tag in ("queued", "running")
        )
        site.stop()
    finally:
        site.close()
    lost = {"state": "running", "attempt": 1, "worker_id": "lost", "started_at": 0.0}
    # Versions up to 0005 kept the end of a lease in the row, later ones the last heartbeat; up to
    # 0010 its columns had other names.
    lease = {"lease_until": 0.0, "beaten_at": 0.0, "heartbeat_at": 0.0}
    rows = [queued | dict.fromkeys(lease), running | lost | lease]
    rows = [row | {"claim": row["fencing_token"]} for row in rows]
    return rows, site.files


def write_old_schema(url: str, version: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A database as an earlier version left it, with jobs."""
    engine = open_engine(url)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, version)
    engine.dispose()
    # Numbered by the database, as its counter does not know of ids that it has not given.
    insert_jobs(url, [{name: row[name] for name in row if name != "id"} for row in rows])


def start_both(folder: Path, host: Host, url: str, job_ids: Sequence[int]) -> None:
    """Two nodes on one database and one file store. Raises: Broken."""
    environment = {
        "INPAINT_DATABASE_URL": url,
        "INPAINT_STORAGE__URL": (folder / "files").as_uri(),
    }
    nodes = [Site(folder / f"node{n}", host, environment) for n in range(2)]
    try:
        side_by_side([node.start for node in nodes])
        for node in nodes:
            node.ended(*job_ids)
        nodes[1].ended(nodes[1].accept(Script(tag="new")))
    finally:
        side_by_side([node.close for node in nodes])
