"""The backup of `docs/operations.md`, taken and restored by its own commands.

It is taken while jobs run and end. Between any two commands a job ends and another one is accepted,
so that files come and go behind the copies. What was accepted before the first command is there
after the restore: jobs end, the key is valid, and the pending webhook is sent.
"""

import io
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from PIL import Image

from server.api.auth.keys import KeyStore
from server.core.settings import Settings
from server.storage.database import open_engine
from server.worker.loop import run as run_worker
from tests.support.apps import client_of, settings_in
from tests.support.databases import migrated_sqlite
from tests.support.documents import blocks_of
from tests.support.http_stub import running_app
from tests.support.native_calls import create
from tests.support.postgres import PostgresServer, find_binaries
from tests.support.repository import REPOSITORY
from tests.support.waiting import until
from tests.support.webhooks import deliveries_of, receiver

END_S = 120
"""Limit for the jobs of the test on a busy machine."""

WAITING = 6
"""Jobs at the first command. They run one after another, so most of them have not ended then."""

JOB = {"width": 64, "height": 64, "num_inference_steps": 15, "samples": 1}

WEBHOOK = {"allow_cidrs": ["127.0.0.0/8"], "hold_after_failures": 1, "hold_s": 900}
"""After its first failure a receiver is called no more by this process."""


@dataclass(frozen=True)
class Stores:
    """A database with our tables, and what the commands of the page call it.

    database_url, restored_url: what the settings call the first and the restored one; None for the
    file in the data folder. backup, restore: the commands.
    """

    database_url: str | None
    restored_url: str | None
    backup: list[str]
    restore: list[str]


def documented_commands() -> list[list[str]]:
    """The commands of each block on the page, without the lines that set their variables."""
    ours = Path(__file__).relative_to(REPOSITORY).as_posix()
    blocks = [b for b in blocks_of("docs/operations.md") if b.noted("run by") == ours]
    lines = [block.text.replace("\\\n", "").splitlines() for block in blocks]
    return [[line for line in each if not line.startswith("DATA")] for each in lines]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def stores(request: pytest.FixtureRequest, data_dir: Path) -> Iterator[Stores]:
    copies, dump, files, sqlite, postgres = documented_commands()
    if request.param == "sqlite":
        migrated_sqlite(data_dir)
        yield Stores(None, None, copies, [*files, *sqlite])
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name, restored = server.create_migrated(), "inpaint_restored"
    make_folder, before, _, after = copies
    yield Stores(
        str(server.url(name)),
        str(server.url(restored)),
        [make_folder, before, *dump, after],
        [*files, *postgres],
    )
    server.drop(name)
    server.drop(restored)


@pytest.fixture
def variables(stores: Stores, data_dir: Path, tmp_path: Path) -> dict[str, str]:
    """What commands are given."""
    programs = find_binaries()
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "DATA": str(data_dir),
        "BACKUP": str(tmp_path / "backup"),
        "DATABASE": stores.database_url or "",
        "RESTORED": stores.restored_url or "",
    }


def settings_of(data_dir: Path, url: str | None) -> Settings:
    return settings_in(data_dir, max_in_flight=1, database_url=url, webhook=WEBHOOK)


def new_key(settings: Settings) -> str:
    engine = open_engine(settings.sqlalchemy_url)
    key, _ = KeyStore(engine).create("a team")
    engine.dispose()
    return key


@contextmanager
def serving(settings: Settings, key: str) -> Iterator[httpx2.Client]:
    """A server and its worker, which keeps its id when it is started again."""
    stopping = threading.Event()
    with running_app(settings) as live, client_of(live, key) as client:
        worker = threading.Thread(target=run_worker, args=(settings, "w", "cpu", stopping))
        worker.start()
        try:
            assert live.client.get("/api/jobs").status_code == 401, "the key is needed"
            yield client
        finally:
            stopping.set()
            worker.join(END_S)


def states(client: httpx2.Client) -> dict[int, str]:
    jobs = client.get("/api/jobs", params={"limit": 100}).raise_for_status().json()["jobs"]
    return {job["id"]: job["state"] for job in jobs}


def accept(client: httpx2.Client, hook: str) -> tuple[list[int], dict[int, list[bytes]]]:
    """Create jobs; all ids, and the pictures of those that have ended, one with a webhook."""
    told = create(client, **JOB, webhook=hook)["id"]
    accepted = [told, *(create(client, **JOB)["id"] for _ in range(WAITING))]
    deliveries_of(client, told, attempts=1)
    ended = [job for job, state in states(client).items() if state == "finished"]
    return accepted, {job: pictures(client, job) for job in ended}


def wait_for_another_end(client: httpx2.Client) -> None:
    before = [*states(client).values()].count("finished")
    until(lambda: [*states(client).values()].count("finished") > before, END_S, "a job ends")


def back_up(client: httpx2.Client, commands: list[str], variables: Mapping[str, str]) -> None:
    for command in commands:
        # A file may be removed while `cp` copies it, which its status tells.
        run(command, variables, check=not command.startswith("cp "))
        create(client, **JOB)
        wait_for_another_end(client)


def run(command: str, variables: Mapping[str, str], *, check: bool = True) -> None:
    subprocess.run(["sh", "-c", command], cwd=REPOSITORY, env=variables, check=check)


def copy_of_database(data_dir: Path, folder: Path) -> Path:
    """What SQLite has in its files while the server runs; a stop tidies up."""
    folder.mkdir()
    for path in data_dir.glob("inpaint.db*"):
        shutil.copy(path, folder)
    return folder


def pictures(client: httpx2.Client, job: int) -> list[bytes]:
    body = client.get(f"/api/jobs/{job}").raise_for_status().json()
    assert body["state"] == "finished", body
    paths = [httpx2.URL(output["url"]).path for output in body["outputs"]]
    return [client.get(path).raise_for_status().content for path in paths]


def test_restored_backup_has_all_that_was_accepted_before(
    stores: Stores, variables: dict[str, str], data_dir: Path, tmp_path: Path
) -> None:
    settings = settings_of(data_dir, stores.database_url)
    key = new_key(settings)
    with receiver(503) as (hook, calls):
        with serving(settings, key) as client:
            accepted, known = accept(client, hook)
            back_up(client, stores.backup, variables)
            at_work = copy_of_database(data_dir, tmp_path / "at_work")
        shutil.copytree(at_work, data_dir, dirs_exist_ok=True)  # A crash would have left this.
        refused, _ = calls.get_nowait()
        assert calls.empty(), "the webhook is pending"
        for command in stores.restore:
            run(command, variables)
        with serving(settings_of(data_dir, stores.restored_url), key) as client:
            assert "queued" in states(client).values(), "the backup was taken while jobs waited"
            taken, _ = calls.get(timeout=END_S)
            until(lambda: not {"queued", "running"} & {*states(client).values()}, END_S, "all end")
            made = {job: pictures(client, job) for job in accepted}
    assert taken["webhook-id"] == refused["webhook-id"]
    assert {job: made[job] for job in known} == known
    assert {Image.open(io.BytesIO(each)).size for job in made for each in made[job]} == {(64, 64)}
