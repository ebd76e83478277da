"""`python -m tests.support.shared_stores COMMAND ...`: the command's servers use PostgreSQL and S3.

Each data folder stands for a database and a prefix in a bucket, so that a server that is started
again in the same folder finds what it had. What a command asks for by itself goes first.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import psycopg

from server.storage.database import migrate, open_engine
from tests.support.databases import migrated_sqlite
from tests.support.postgres import find_binaries, running_postgres
from tests.support.s3 import BUCKET, locate_rclone, running_s3

VARIABLE = "TESTS_SHARED_STORES"


@dataclass(frozen=True, slots=True)
class SharedStores:
    """host: folder of PostgreSQL's socket. bucket: S3's folder. environment: how S3 is reached."""

    host: str
    bucket: str
    environment: dict[str, str]

    def environment_of(self, data_dir: Path) -> dict[str, str]:
        """For a process with this data folder, whose database is made if there is none."""
        name = name_of(data_dir)
        with psycopg.connect(
            host=self.host, user="inpaint", dbname="postgres", autocommit=True
        ) as connection:
            query = "SELECT 1 FROM pg_database WHERE datname = %s"
            if connection.execute(query, (name,)).fetchone() is None:
                connection.execute(f"CREATE DATABASE {name}".encode())
        return {
            **self.environment,
            "INPAINT_DATABASE_URL": f"postgresql://inpaint@/{name}?host={self.host}",
            "INPAINT_STORAGE__URL": f"s3://{BUCKET}/{name}",
        }


def name_of(data_dir: Path) -> str:
    return f"of_{hashlib.sha256(bytes(data_dir.absolute())).hexdigest()[:24]}"


def shared_stores() -> SharedStores | None:
    """Those this program runs under; None where each data folder holds everything."""
    told = os.environ.get(VARIABLE)
    return None if told is None else SharedStores(**cast("dict[str, Any]", json.loads(told)))


def environment_of(data_dir: Path) -> dict[str, str]:
    """Settings of a process with this data folder; empty without shared stores."""
    shared = shared_stores()
    return {} if shared is None else shared.environment_of(data_dir)


def migrated_database_of(data_dir: Path) -> str:
    """The URL of its database, which has our tables."""
    url = environment_of(data_dir).get("INPAINT_DATABASE_URL")
    if url is None:
        return migrated_sqlite(data_dir)
    engine = open_engine(url)
    migrate(engine)
    engine.dispose()
    return url


def files_of(data_dir: Path) -> Path:
    """The folder that holds the files of a server with this data folder."""
    shared = shared_stores()
    return data_dir / "files" if shared is None else Path(shared.bucket) / name_of(data_dir)


def main(command: list[str]) -> int:
    """The command's exit status."""
    binaries = find_binaries()
    if binaries is None or locate_rclone() is None:
        sys.exit("PostgreSQL's programs or rclone are not installed")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="inpaint-s3-")))
        postgres = stack.enter_context(running_postgres(binaries))
        s3 = stack.enter_context(running_s3(folder / "s3"))
        host = str(postgres.url("postgres").query["host"])
        shared = SharedStores(host, str(s3.bucket), s3.environment)
        environment = {**os.environ, VARIABLE: json.dumps(asdict(shared))}
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
