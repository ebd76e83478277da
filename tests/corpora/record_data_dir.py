"""Records what an earlier version leaves behind: its database, its files, and what was promised.

    python -m tests.corpora.record_data_dir COMMIT

unpacks that commit into a temporary folder, and has its own code serve there, once with SQLite and
once with PostgreSQL. A call of V3 is finished, and its webhook finds nobody; one of V3 and one
of the native API are accepted by a server without workers. What is left goes to
`tests/corpora/data_dirs`, into a folder named after the schema and the database:

    database.sql    the database as SQL, of `iterdump` or `pg_dump`
    files/          the file store
    facts.json      the key, the ids and the link that clients hold; see `Facts`
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2

from tests.support.postgres import PostgresServer, find_binaries, running_postgres
from tests.support.processes import Process
from tests.support.repository import REPOSITORY
from tests.support.v3_calls import IMAGE
from tests.support.waiting import until

DATA_DIRS = REPOSITORY / "tests" / "corpora" / "data_dirs"

RECEIVER = "127.0.0.1:45678"
"""Host and port of all webhooks. Nothing listens there while a folder is recorded."""

PUBLIC_URL = "http://pictures.example"

END_S = 120
"""For one small picture on a busy machine."""

OF_PG_DUMP = ("--", "SET ", "\\", "SELECT pg_catalog.set_config")
"""What lines begin with that are comments of `pg_dump`, or settings that other releases lack."""

ENVIRONMENT = {
    "INPAINT_HOLD_S": "0",
    "INPAINT_PUBLIC_URL": PUBLIC_URL,
    "INPAINT_WEBHOOK__ALLOW_CIDRS": "127.0.0.0/8",
}

BODY: dict[str, Any] = {
    "prompt": "a cat",
    "init_image": f"data:image/png;base64,{IMAGE}",
    "mask_image": f"data:image/png;base64,{IMAGE}",
    "width": 64,
    "height": 64,
    "num_inference_steps": 21,
    "seed": 7,
}

NATIVE_BODY = BODY | {"num_inference_steps": 4}


@dataclass(frozen=True, slots=True)
class Facts:
    """What clients of the recorded server know.

    schema: the newest migration. commit: of the code that wrote all of this.
    key: an API key. finished, finished_link, finished_sha256: the ended job of V3, the link to its
    picture and what it leads to; its webhook is due again.
    queued_v3: a waiting job with a webhook. queued_native: one without.
    """

    schema: str
    commit: str
    key: str
    finished: int
    finished_link: str
    finished_sha256: str
    queued_v3: int
    queued_native: int


class OldServer:
    """An earlier version of the server, with all of its own code.

    code: where that lies. database: the URL of a PostgreSQL, None for SQLite in the data folder.
    """

    def __init__(self, code: Path, data_dir: Path, database: str | None) -> None:
        project = tomllib.loads((code / "pyproject.toml").read_text(encoding="utf-8"))
        self._program = project["project"]["scripts"]["inpaint-server"].partition(":")[0]
        self._code = code
        self._flags = ("--data-dir", str(data_dir))
        chosen = {} if database is None else {"INPAINT_DATABASE_URL": database}
        self._environment = {**ENVIRONMENT, "PYTHONPATH": str(code), **chosen}

    def create_key(self) -> str:
        """A new API key."""
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                self._program,
                "keys",
                "create",
                "the recorded client",
                *self._flags,
            ],
            cwd=self._code,
            env={**os.environ, **self._environment},
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    @contextlib.contextmanager
    def serving(self, key: str, *flags: str) -> Iterator[httpx2.Client]:
        """A client of the server, which stops at the end."""
        command = ("serve", "--port", "0", *self._flags, *flags)
        process = Process(self._environment, *command, program=self._program, folder=self._code)
        try:
            url = process.wait_for("listening")["url"]
            with httpx2.Client(base_url=url, headers={"X-API-Key": key}, trust_env=False) as client:
                yield client
        finally:
            process.stop()


def finish_one(client: httpx2.Client, key: str) -> tuple[int, str, str]:
    """A job of V3 whose webhook was tried: its id, its link, and the SHA-256 of its picture."""
    job = post_v3(client, key, "recorded-1")
    ended: dict[str, Any] = {}

    def is_finished() -> bool:
        ended.update(client.post(f"/api/v3/fetch/{job}", json={"key": key}).json())
        return bool(ended["status"] == "success")

    until(is_finished, END_S, "the first job is finished")
    until(lambda: was_tried(client, job), END_S, "its webhook was tried")
    (link,) = ended["output"]
    picture = client.get(link.removeprefix(PUBLIC_URL)).raise_for_status().content
    return job, link, hashlib.sha256(picture).hexdigest()


def was_tried(client: httpx2.Client, job: int) -> bool:
    deliveries = client.get(f"/api/jobs/{job}/deliveries").json()["deliveries"]
    return any(each["attempts"] and each["state"] == "pending" for each in deliveries)


def post_v3(client: httpx2.Client, key: str, track_id: str) -> int:
    told = {"key": key, "track_id": track_id, "webhook": f"http://{RECEIVER}/hook"}
    answer = client.post("/api/v3/inpaint", json=BODY | told).json()
    return int(answer["id"])


def post_native(client: httpx2.Client) -> int:
    answer = client.post("/api/jobs", json=NATIVE_BODY)
    return int(answer.raise_for_status().json()["id"])


def record(code: Path, commit: str, data_dir: Path, database: str | None) -> Facts:
    """Serve from an earlier version's code, and leave a data folder behind."""
    server = OldServer(code, data_dir, database)
    key = server.create_key()
    with server.serving(key, "--devices", "cpu") as client:
        finished, link, sha256 = finish_one(client, key)
    with server.serving(key, "--workers", "0") as client:
        queued_v3, queued_native = post_v3(client, key, "recorded-2"), post_native(client)
    return Facts("", commit, key, finished, link, sha256, queued_v3, queued_native)


def dump_sqlite(file: Path) -> str:
    with closing(sqlite3.connect(file)) as database:
        return "\n".join(database.iterdump()) + "\n"


def dump_postgres(binaries: Path, url: str) -> str:
    """Plain SQL; the settings of `pg_dump`'s own release are left out."""
    program = (binaries / "initdb").resolve().with_name("pg_dump")
    command: list[str | Path] = [program, "--inserts", "--no-owner", "--dbname", url]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kept = [each for each in text.splitlines() if each and not each.startswith(OF_PG_DUMP)]
    return "\n".join(kept) + "\n"


def save(facts: Facts, backend: str, sql: str, data_dir: Path) -> Path:
    """Write the folder of one schema and database."""
    (schema,) = re.findall(r"alembic_version\"? VALUES ?\('(\w+)'\)", sql)
    folder = DATA_DIRS / f"{schema}_{backend}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(data_dir / "files", folder / "files")
    (folder / "database.sql").write_text(sql, encoding="utf-8")
    told = asdict(facts) | {"schema": schema}
    (folder / "facts.json").write_text(json.dumps(told, indent=4) + "\n", encoding="utf-8")
    return folder


def record_sqlite(code: Path, commit: str, data_dir: Path) -> Path:
    facts = record(code, commit, data_dir, None)
    return save(facts, "sqlite", dump_sqlite(data_dir / "inpaint.db"), data_dir)


def record_postgres(code: Path, commit: str, data_dir: Path) -> Path:
    binaries = find_binaries()
    assert binaries is not None, "PostgreSQL's programs are not installed"
    with running_postgres(binaries) as postgres:
        url = address(postgres)
        facts = record(code, commit, data_dir, url)
        return save(facts, "postgres", dump_postgres(binaries, url), data_dir)


def address(postgres: PostgresServer) -> str:
    return str(postgres.url(postgres.create_database()))


def unpack(commit: str, folder: Path) -> None:
    """The files of a commit."""
    archive = subprocess.run(
        ["git", "archive", commit], cwd=REPOSITORY, check=True, capture_output=True
    ).stdout
    folder.mkdir()
    subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the data folders of an earlier version.")
    parser.add_argument("commit")
    asked = parser.parse_args().commit
    told = subprocess.run(
        ["git", "rev-parse", "--short=12", asked], cwd=REPOSITORY, check=True, capture_output=True
    )
    commit = told.stdout.decode().strip()
    # The port is taken without listening, so that all calls to it are refused.
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as nobody:
        host, _, port = RECEIVER.partition(":")
        nobody.bind((host, int(port)))
        code = Path(scratch, "code")
        unpack(commit, code)
        for each in (record_sqlite, record_postgres):
            print(each(code, commit, Path(scratch, each.__name__)).relative_to(REPOSITORY))


if __name__ == "__main__":
    main()
